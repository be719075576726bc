"""Trackers: the rows of `metrics.jsonl` for TensorBoard and Weights & Biases as well (`metrics.trackers`).

- Each tracker has a thread of its own and gets the rows in order. Whatever it raises, and however long it takes, the
  run goes on: a failure is one warning, and the tracker is off from there on.
- A run that goes on from a checkpoint does some steps again; a tracker shows each step once (`Tracker.write`).
- `metrics.jsonl` has every row, whatever becomes of them here.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Protocol

from common.config import Config
from common.errors import UserError, one_line
from common.place import FAILURES
from learner.run_directory import RunDirectory

PENDING_ROWS = 10_000  # that a tracker may be behind by; what comes then is left out
CLOSE_SECONDS = 20.0
WANDB_FILE = "wandb.json"  # has the id of the run there
STEP_KEYS = {"warm_start": "warm_start_steps", "step": "learner_steps"}
"""Which rows are tracked, and the key that counts their steps. Each kind has an axis of its own."""


class Tracker(Protocol):
    """A place that shows curves. Called from one thread; may raise anything."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One row: its kind, a key of `STEP_KEYS`, its step, and its values by tag. A step that is not beyond the last
        one of its kind is done again."""
        ...

    def close(self) -> None:
        """Called once, after the last row."""
        ...


class Trackers:
    """Opened by whoever appends to `metrics.jsonl`, closed at the end of the run."""

    def __init__(self, opens: Mapping[str, Callable[[], Tracker]], warn: Callable[[str], None]) -> None:
        """
        Args:
            opens: a function for each name that opens the tracker, from its thread.
            warn: takes a warning, from any thread.
        """
        self._feeds = [_Feed(name, make, warn) for name, make in opens.items()]

    def put(self, kind: str, values: Mapping[str, float]) -> None:
        """One report; returns at once. Those without a step are passed over."""
        if not self._feeds or kind not in STEP_KEYS or STEP_KEYS[kind] not in values:
            return
        step = int(values[STEP_KEYS[kind]])
        tagged = {tag(key): float(value) for key, value in values.items()}
        for feed in self._feeds:
            feed.put((kind, step, tagged))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let all of them take what they have, for so long; may be called again."""
        until = time.monotonic() + seconds
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.wait(max(0.0, until - time.monotonic()), seconds)
        self._feeds = []


Row = tuple[str, int, dict[str, float]]


class _Feed:
    """One tracker, its thread and what it has not taken yet."""

    def __init__(self, name: str, make: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._make, self._warn = name, make, warn
        self._rows: SimpleQueue[Row | None] = SimpleQueue()
        self._behind = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        if self._rows.qsize() < PENDING_ROWS:
            self._rows.put(row)
        elif not self._behind and self._thread.is_alive():
            self._behind = True
            self._warn(f"tracker {self._name} is {PENDING_ROWS} rows behind: it lacks some (metrics.jsonl has them)")

    def end(self) -> None:
        self._rows.put(None)

    def wait(self, seconds: float, given: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"tracker {self._name} has not taken the last rows in {given:g} s (metrics.jsonl has them)")

    def _run(self) -> None:
        try:
            tracker = self._make()
            try:
                while (row := self._rows.get()) is not None:
                    tracker.write(*row)
            finally:
                tracker.close()
        except Exception as error:
            text = one_line(error) or type(error).__name__
            self._warn(f"tracker {self._name} is off from here on: {text} (metrics.jsonl has every step)")


def tag(key: str) -> str:
    """`learner_weight_ess{reveal_step=2}` -> `learner/learner_weight_ess/reveal_step_2`: trackers group by the first
    part."""
    name, _, labels = key.partition("{")
    section = "warm_start" if name.startswith("warm_start") else name.partition("_")[0]
    return "/".join([section, name, *(labels.rstrip("}").replace("=", "_").split(",") if labels else [])])


def open_trackers(config: Config, directory: RunDirectory, warn: Callable[[str], None]) -> Trackers:
    """Those of the configuration; called before the first row of this process is appended to `metrics.jsonl`."""
    before = _told_before(directory) if "wandb" in config.metrics.trackers else {}

    def tensorboard() -> Tracker:
        from learner.tensorboard_tracker import TensorboardTracker

        return TensorboardTracker(directory.path / "tensorboard")

    def wandb() -> Tracker:
        from learner.wandb_tracker import WandbTracker

        return WandbTracker(config, directory, before)

    known = {"tensorboard": tensorboard, "wandb": wandb}
    return Trackers({name: known[name] for name in config.metrics.trackers}, warn)


def _told_before(directory: RunDirectory) -> dict[str, int]:
    """The last step of each kind of a run that W&B knows; nothing of one that it does not."""
    last: dict[str, int] = {}
    with suppress(*FAILURES):
        if directory.place.holds(WANDB_FILE):
            for row in directory.read_metrics():
                key = STEP_KEYS.get(row.get("kind", ""))
                if key is not None and key in row:
                    last[row["kind"]] = max(last.get(row["kind"], 0), int(row[key]))
    return last


def check_trackers(config: Config) -> None:
    """Refuse trackers that cannot be opened here, before anything is started.

    Raises:
        UserError: when a package is missing, or TensorBoard's folder would be in an object store.
    """
    for name in config.metrics.trackers:
        if find_spec(name) is None:
            raise UserError(
                f"metrics.trackers: {name} needs the package {name}, which is not installed; "
                f"pip install 'diffpo[{name}]', or leave it out"
            )
    if "tensorboard" in config.metrics.trackers and RunDirectory(config.run_directory).place.folder is None:
        raise UserError(
            f"metrics.trackers: tensorboard appends to files, which run.root={config.run.root} cannot; set run.root to "
            "a folder (run.checkpoints may stay a URI), or take wandb"
        )
