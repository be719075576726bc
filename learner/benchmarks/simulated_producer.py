"""SimulatedProducer: takes the time of a generation and leaves bytes of the size of its result; needs no torch."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.producer import Fault
from common.lease import FinishedGroup, Lease
from common.weight_store import Snapshot
from learner.benchmarks.event_model import Workload


@dataclass(frozen=True, kw_only=True)
class MakeSimulated:
    """Makes the producers of one fleet, each with its share of the slots; travels to the actors."""

    workload: Workload
    slots: int
    payload_bytes: int = 40_000

    def __call__(self, name: str, wake: Callable[[], None]) -> "SimulatedProducer":
        return SimulatedProducer(self)


class SimulatedProducer:
    """A producer whose groups end when their drawn time is over."""

    def __init__(self, made_by: MakeSimulated) -> None:
        self._made_by = made_by
        self._payload = b"\0" * made_by.payload_bytes
        self._due: list[tuple[float, int, int, int]] = []
        self._weights = np.empty(0, np.float32)
        self._version = -1
        self._adopted_at: dict[str, float] = {}

    @property
    def version(self) -> int:
        return self._version

    @property
    def room(self) -> int:
        return self._made_by.slots - len(self._due)

    def start(self, lease: Lease) -> None:
        """From now on its time runs; its oldest token has the version of now."""
        due = time.monotonic() + self._made_by.workload.draw(lease.number)
        heapq.heappush(self._due, (due, lease.number, lease.attempt, self._version))

    def drop(self, lease: Lease) -> None:
        self._due = [group for group in self._due if group[1:3] != (lease.number, lease.attempt)]
        heapq.heapify(self._due)

    def adopt(self, flat: np.ndarray, snapshot: Snapshot) -> None:
        """Copies the weights, as a model does."""
        self._weights = flat.copy()
        self._version = snapshot.version
        self._adopted_at[f"adopted_{snapshot.version}"] = time.monotonic()

    def adopt_base(self, arrays: Sequence[np.ndarray]) -> None:
        """Its weights have none."""

    def step(self) -> list[FinishedGroup | Fault]:
        """The groups whose time is over."""
        now, ended = time.monotonic(), []
        while self._due and self._due[0][0] <= now:
            _, number, attempt, oldest = heapq.heappop(self._due)
            ended.append(FinishedGroup(number, attempt, self._payload, 1.0, oldest, 8))
        return ended

    def rest(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def gauges(self) -> dict[str, float]:
        """When each version was adopted: `adopted_<version>`, seconds of the machine's monotonic clock."""
        return dict(self._adopted_at)

    def close(self) -> None:
        """Nothing was started."""
