"""Event model: what an admission policy yields when messages, weights and everything but time cost nothing.

A discrete-event simulation over the real ledger and the real admission policy: `slots` places generate one group each,
the learner trains `P` groups at a time. The benchmark holds the real system to it, draw by draw.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.admission import Admission
from common.ledger import GroupState, Ledger


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated and trained; times in seconds."""

    groups_per_step: int = 32
    slots: int = 32
    """Groups that are generated at once."""
    generation_seconds: float
    """Mean time that one group takes in its slot."""
    cv: float
    """Coefficient of variation of that time (gamma distribution; 0 is constant)."""
    train_seconds: float
    """Time of one learner step."""
    steps: int
    seed: int = 0

    def draw(self, number: int) -> float:
        """Seconds that the group of this number takes, whoever generates it."""
        if self.cv == 0:
            return self.generation_seconds
        shape = 1 / self.cv**2
        return float(np.random.default_rng((self.seed, number)).gamma(shape, self.generation_seconds / shape))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of a workload gave, modelled or real."""

    seconds: float
    """From the first weights to the last publication."""
    idle: float
    """Share of the time after the first step in which the learner waited for groups."""
    staleness: list[int]
    """Of every trained group, in versions."""
    dropped: int
    """Groups that were generated and given up as stale."""

    @property
    def wasted(self) -> float:
        """Share of the generated groups that was given up."""
        return self.dropped / max(1, self.dropped + len(self.staleness))


def simulate(admission: Admission, workload: Workload, draw: Callable[[int], float] | None = None) -> Outcome:
    """The outcome of a workload under a policy; `draw` replaces the workload's own times."""
    return _Model(admission, workload, draw or workload.draw).run()


class _Model:
    """The state of one simulation."""

    def __init__(self, admission: Admission, workload: Workload, draw: Callable[[int], float]) -> None:
        self._admission, self._workload, self._draw = admission, workload, draw
        self._ledger = Ledger()
        self._now = 0.0
        self._version = 0
        self._generating: list[tuple[float, int]] = []
        self._batch: list[int] = []
        self._trained_at = 0.0
        self._staleness: list[int] = []
        self._dropped = 0
        self._idle = 0.0
        self._waits_since = 0.0

    def run(self) -> Outcome:
        """Events in order of time until the last step is published."""
        first = 0.0
        while self._version < self._workload.steps:
            self._lease()
            self._sample()
            if self._batch and (not self._generating or self._trained_at <= self._generating[0][0]):
                self._now = self._trained_at
                self._publish()
                first = first or self._now
            else:
                self._now, number = heapq.heappop(self._generating)
                self._ledger.finish(number)
        return Outcome(
            seconds=self._now,
            idle=self._idle / max(1e-9, self._now - first),
            staleness=self._staleness,
            dropped=self._dropped,
        )

    def _lease(self) -> None:
        while len(self._generating) < self._workload.slots and self._admission.admit(self._ledger.active_count):
            number = self._ledger.next_number
            self._ledger.lease(number, worker="", deadline=0.0, version=self._version)
            heapq.heappush(self._generating, (self._now + self._draw(number), number))

    def _sample(self) -> None:
        if self._batch:
            return
        finished = self._ledger.numbers(GroupState.FINISHED)
        age = {number: self._version - self._ledger.record(number).version for number in finished}
        evicted = self._admission.evict(age)
        for number in evicted:
            self._ledger.discard(number, reason="stale")
        self._dropped += len(evicted)
        if evicted:
            self._lease()
        batch = self._admission.select(self._ledger.numbers(GroupState.FINISHED), self._ledger.head())
        if not batch:
            return
        for number in batch:
            self._ledger.sample(number)
        self._staleness += [age[number] for number in batch]
        if self._version:
            self._idle += self._now - self._waits_since
        self._batch, self._trained_at = batch, self._now + self._workload.train_seconds

    def _publish(self) -> None:
        for number in self._batch:
            self._ledger.train(number)
        self._batch = []
        self._version += 1
        self._waits_since = self._now
