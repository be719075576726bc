"""Trainer: what a batch of groups changes. The learner actor drives it and knows nothing of models.

`PolicyTrainer` is the real one; benchmarks drive the same learner actor with simulated ones, which need no torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from common.errors import RunError
from common.lease import Sample

Report = Callable[[str, dict[str, float]], None]


class BatchRefused(RunError):
    """A batch that cannot be trained on: a reward, the loss or a gradient is not finite. It has changed nothing."""


class Trainer(Protocol):
    """Starts from nothing or from a checkpoint, and goes on batch by batch."""

    @property
    def steps(self) -> int:
        """Learner steps that its weights contain."""
        ...

    def warm_start(self, report: Report) -> None:
        """Make the weights that training starts from; `report` takes its progress."""
        ...

    def restore(self, folder: Path) -> None:
        """Go on where the state that `saved` wrote into `folder` was."""
        ...

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        """One step on a batch at a version; its metrics. Raises `BatchRefused` when the batch is at fault."""
        ...

    def recorded(self, sample: Sample) -> pa.Table | None:
        """What the run's record keeps of the sample that was trained last (`learner.record_rows`); None is nothing."""
        ...

    def weights(self) -> np.ndarray:
        """All that is published, as one flat buffer. Raises `RunError` when it is not finite."""
        ...

    def base(self) -> list[np.ndarray]:
        """What is frozen and published once, beside the first `weights`; nothing where everything learns."""
        ...

    def saved(self) -> Callable[[Path], None]:
        """A copy of the whole state, as a function that writes it into a folder, later and from another thread."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...

    def gauges(self) -> dict[str, float]:
        """What is measured beside training, after some steps."""
        ...
