"""SimulatedRun: real Ray, buffer, rollout actors and weights; generations and learner steps only take their time."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.rollout_actor import RolloutActor
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from common.weight_store import Snapshot, digest
from learner.benchmarks.event_model import Outcome, Workload
from learner.benchmarks.simulated_producer import MakeSimulated

WEIGHTS = 1_060_000  # numbers in one version: the model of the main job
EVERYTHING = 1 << 60  # of the journal: there is nothing to return to
FREE = {"num_cpus": 0}


class MeasuredBuffer(ReplayBuffer):
    """The replay buffer, which can also say what it has cost."""

    async def cpu_seconds(self) -> float:
        """CPU seconds of its process."""
        return time.process_time()


class SimulatedLearner:
    """Takes batches, waits for as long as a step takes, publishes new weights."""

    def __init__(self, *, buffer: Any, train_seconds: float, weights: int = WEIGHTS) -> None:
        self._buffer, self._train_seconds = buffer, train_seconds
        self._flat = np.zeros(weights, np.float32)
        self._version = -1
        self.published: list[float] = []
        self._waited: list[float] = []
        self._staleness: list[int] = []
        self._arrived: list[float] = []

    def publish(self, trained: list[int]) -> None:
        """One version more; notes the time before it starts."""
        self._version += 1
        self._flat[0] = self._version
        self.published.append(time.monotonic())
        snapshot = Snapshot(self._version, digest(self._flat), [ray.put(self._flat)])
        ray.get(self._buffer.publish.remote(snapshot, trained))
        self._buffer.settle.remote(EVERYTHING)

    def sample(self) -> tuple[list[int], float]:
        """A batch's numbers, and when they arrived."""
        batch: Any = ray.get(self._buffer.sample.remote())
        arrived = time.monotonic()
        self._staleness += batch.staleness
        return batch.numbers, arrived

    def run(self, steps: int) -> None:
        """That many steps more; the first call publishes the first version before."""
        if self._version < 0:
            self.publish([])
        for _ in range(steps):
            asked = time.monotonic()
            numbers, arrived = self.sample()
            self._waited.append(arrived - asked)
            self._arrived.append(arrived)
            time.sleep(self._train_seconds)
            self.publish(numbers)

    def timed_run(self, steps: int) -> list[float]:
        """The same; when each batch arrived."""
        self.run(steps)
        return self._arrived[-steps:]

    def report(self) -> dict[str, Any]:
        """What it has seen: times of publication, seconds waited per step, staleness of every trained group."""
        return {"published": self.published, "waited": self._waited, "staleness": self._staleness}


@dataclass
class SimulatedRun:
    """The parts of a run while it is measured; made by `simulated_run`."""

    buffer: Any
    learner: Any
    actors: list[Any]

    def report(self) -> dict[str, Any]:
        return ray.get(self.learner.report.remote())

    def gauges(self) -> dict[str, float]:
        return ray.get(self.buffer.gauges.remote())

    def outcome(self) -> Outcome:
        """What the learner has seen so far, as the event model tells it."""
        seen, gauges = self.report(), self.gauges()
        published, waited = seen["published"], seen["waited"]
        return Outcome(
            seconds=published[-1] - published[0],
            idle=sum(waited[1:]) / max(1e-9, published[-1] - published[1]),
            staleness=seen["staleness"],
            dropped=int(gauges["stale_discards"] + gauges["wasted_groups"]),
        )


def make_buffer(folder: Path, *, groups_per_step: int, max_staleness: int, admission: str = "windowed_fifo") -> Any:
    """A buffer actor as the controller makes it, without a limit of groups; its segment files lie below a folder."""
    return (
        ray.remote(MeasuredBuffer)
        .options(max_concurrency=1000, **FREE)
        .remote(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            admission=admission,
            lease_seconds=60.0,
            drop_no_spread=False,
            store=SegmentStore(tempfile.mkdtemp(dir=folder), memory_bytes=1 << 28),
        )
    )


@contextmanager
def simulated_run(
    workload: Workload,
    folder: Path,
    *,
    max_staleness: int,
    admission: str = "windowed_fifo",
    actors: int = 2,
    **make: Any,
) -> Iterator[SimulatedRun]:
    """Buffer, learner and actors, waiting for the first weights; all are ended at the end.

    Args:
        workload: what is generated and trained; its slots are dealt out to the actors.
        folder: where the buffer may keep its segment files.
        max_staleness: eta of the policy.
        admission: name of the policy.
        actors: rollout actors, each a process.
        make: more for `MakeSimulated`.
    """
    buffer: Any = make_buffer(
        folder, groups_per_step=workload.groups_per_step, max_staleness=max_staleness, admission=admission
    )
    learner: Any = (
        ray.remote(SimulatedLearner)
        .options(**FREE)
        .remote(
            buffer=buffer,
            train_seconds=workload.train_seconds,
        )
    )
    producer = MakeSimulated(workload=workload, slots=workload.slots // actors, **make)
    fleet: list[Any] = [
        ray.remote(RolloutActor)
        .options(max_concurrency=2, **FREE)
        .remote(name=f"actor-{n}", buffer=buffer, make=producer)
        for n in range(actors)
    ]
    ray.get([actor.gauges.remote() for actor in fleet])  # all are up
    lives = [actor.run.remote() for actor in fleet]
    try:
        yield SimulatedRun(buffer, learner, fleet)
    finally:
        ray.get(buffer.close.remote())
        for actor in fleet:
            actor.stop.remote()
        ray.get(lives)
        for part in (*fleet, learner, buffer):
            ray.kill(part)
