"""Scaling policy: how many rollout actors a run should have, from who waits for whom. *(ours)*

    the learner waits, and no batch is ready                   more: `actors / (1 - share of time that it waits)`
    more were asked for, and hardly more groups came           back to as many as there were
    it never waits, and actors stand still for leases          one fewer
    groups grow too old to be trained (drop_when_stale)        one fewer

- Judged over windows in which all wanted actors worked throughout: those that wait for nodes, or start, produce
  nothing yet, and asking for more would not help. The first window after a change is left out: new actors hand in
  nothing before their first groups are done.
- At most twice as many at a time. A number that was left since the learner waited there is not tried again for some
  windows, nor one that was too many, so that it does not swing.
- A learner can wait for groups that more actors would not bring sooner: the staleness bound may allow no more of them
  at once (with a bound of 0 it always waits), or rewards, or a disk, may be what takes long.

Waiting for leases is no reason by itself to have fewer: under admission by tickets actors wait whenever they could take
one more group than the staleness bound lets them, though they are busy.
"""

import math
from dataclasses import dataclass
from typing import Literal

STARVES = 0.1  # share of its time that the learner waits, above which it wants more actors
CONTENT = 0.02  # below which it could do with fewer
BLOCKED = 0.5  # share of their time that actors wait for a lease
STALE = 0.05  # share of finished groups that were discarded as too old
WORTH = 0.25  # of the groups that as many more actors should bring, that they must bring to stay
REMEMBER = 10  # windows for which a number that was too few, or too many, is not tried again

Reason = Literal["learner_waits", "useless", "rollout_waits", "stale"]


@dataclass(frozen=True)
class Reading:
    """Counters of a run at one moment; they only grow, but for the last three."""

    seconds: float
    """Of a monotonic clock."""
    sample_wait_seconds: float
    """The learner's, for a batch."""
    lease_wait_seconds: float
    """All actors', for leases."""
    finished: float
    """Groups handed in."""
    stale: float
    """Groups discarded since they grew too old."""
    ready: float
    """Groups that wait to be trained, over those of a batch."""
    working: int
    wanted: int


class ScalingPolicy:
    """Owned by the controller; takes a reading every now and then."""

    def __init__(self, *, least: int, most: int, window: float) -> None:
        """
        Args:
            least: fewest actors.
            most: most actors.
            window: seconds over which is judged.
        """
        self._least, self._most, self._window = least, most, window
        self._first: Reading | None = None
        self._settled = False
        self._fewer: tuple[int, float] | None = None  # from how many it was raised, and the groups a second of these
        self._too_few: dict[int, int] = {}
        self._enough: dict[int, int] = {}
        self._windows = 0

    def propose(self, now: Reading) -> tuple[int, Reason] | None:
        """How many actors there should be, and why; None while nothing should change."""
        first = self._first
        if now.working < now.wanted or first is None or first.wanted != now.wanted:
            self._first = now if now.working >= now.wanted else None
            self._settled = False
            return None
        seconds = now.seconds - first.seconds
        if seconds < self._window:
            return None
        self._first = now
        if not self._settled:
            self._settled = True
            return None
        self._windows += 1
        rate = (now.finished - first.finished) / seconds
        fewer, self._fewer = self._fewer, None
        if fewer is not None and now.wanted > fewer[0]:
            actors, before = fewer
            if rate < before * (1 + WORTH * (now.wanted / actors - 1)):
                self._enough[actors] = self._windows
                return actors, "useless"
        starved = (now.sample_wait_seconds - first.sample_wait_seconds) / seconds
        blocked = (now.lease_wait_seconds - first.lease_wait_seconds) / (seconds * now.wanted)
        stale = (now.stale - first.stale) / max(1.0, now.finished - first.finished)
        proposal = self._judged(now.wanted, starved=starved, blocked=blocked, stale=stale, ready=now.ready)
        if proposal is not None and proposal[0] > now.wanted:
            self._fewer = now.wanted, rate
        return proposal

    def _judged(
        self, actors: int, *, starved: float, blocked: float, stale: float, ready: float
    ) -> tuple[int, Reason] | None:
        if starved > STARVES and ready < 1:
            self._too_few[actors] = self._windows
            needed = math.ceil(actors / max(1 - starved, 0.5))
            more = min(max(needed, actors + 1), self._most)
            return (more, "learner_waits") if more > actors and not self._lately(self._enough, actors) else None
        fewer = actors - 1
        if fewer < self._least or self._lately(self._too_few, fewer):
            return None
        if stale > STALE:
            return fewer, "stale"
        if starved < CONTENT and blocked > BLOCKED:
            return fewer, "rollout_waits"
        return None

    def _lately(self, noted: dict[int, int], actors: int) -> bool:
        return self._windows - noted.get(actors, -REMEMBER) < REMEMBER
