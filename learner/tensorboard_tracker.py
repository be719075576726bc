"""TensorboardTracker: curves in `RUN/tensorboard`, for `tensorboard --logdir RUN/tensorboard`.

Warm start and training are two of TensorBoard's runs, since each counts its own steps. Steps that are done again hide
what was written of them before (TensorBoard's `purge_step`).
"""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 10  # at most so much is lost with a process that is killed
FOLDERS = {"warm_start": "warm_start", "step": "train"}


class TensorboardTracker:
    """`learner.trackers.Tracker` that writes TensorBoard's event files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._last: dict[str, int] = {}

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        writer = self._writers.get(kind)
        if writer is None or step <= self._last[kind]:
            if writer is not None:
                writer.close()
            writer = SummaryWriter(
                str(self._folder / FOLDERS[kind]), purge_step=step, flush_secs=FLUSH_SECONDS, max_queue=1000
            )
            self._writers[kind] = writer
        self._last[kind] = step
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
