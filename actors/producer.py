"""Producer: what turns leases into finished groups. The rollout actor drives it and knows nothing of models.

`GroupProducer` is the real one; benchmarks drive the same rollout actor with simulated ones, which need no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.lease import FinishedGroup, Lease
from common.weight_store import Snapshot


@dataclass(frozen=True, slots=True)
class Fault:
    """A lease whose own data is at fault: its prompt cannot be served, its logits or its reward failed."""

    number: int
    attempt: int
    reason: str


class Producer(Protocol):
    """Fed with leases and weights between two steps, stepped as long as there is work."""

    @property
    def version(self) -> int:
        """Version of the weights it generates with; -1 before the first."""
        ...

    @property
    def room(self) -> int:
        """Groups that it could start now."""
        ...

    def start(self, lease: Lease) -> None:
        """Begin a group; what is wrong with it comes out of `step` as a `Fault`."""
        ...

    def drop(self, lease: Lease) -> None:
        """Forget a group whose lease is lost; nothing of it comes out any more."""
        ...

    def adopt(self, flat: np.ndarray, snapshot: Snapshot) -> None:
        """Take new weights; `flat` was verified against the snapshot's digest."""
        ...

    def adopt_base(self, arrays: Sequence[np.ndarray]) -> None:
        """Take the weights that are frozen beside those of the next `adopt`; they were verified."""
        ...

    def step(self) -> list[FinishedGroup | Fault]:
        """Go on by one step; the groups that ended."""
        ...

    def rest(self) -> float | None:
        """Seconds until `step` has something to do: 0 is now, None is not before `wake` or a new lease."""
        ...

    def gauges(self) -> dict[str, float]:
        """Counters; called from another thread."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...


MakeProducer = Callable[[str, Callable[[], None]], Producer]
"""Makes a producer from its worker's name and `wake`, which it may call from any thread to have `step` called."""
