"""Scaling policy: how many rollout actors a run should have, from who waits for whom. *(ours)*

    the learner waits, and no batch is ready                   more: `actors / (1 - share of time that it waits)`
    it never waits, and actors stand still for leases          one fewer
    groups grow too old to be trained (drop_when_stale)        one fewer

- Judged over windows in which all wanted actors worked throughout: those that wait for nodes, or start, produce
  nothing yet, and asking for more would not help.
- At most twice as many at a time. A number that was left since the learner waited there is not tried again for some
  windows, so that it does not swing.

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
REMEMBER = 10  # windows for which a number that was too few is not tried again

Reason = Literal["learner_waits", "rollout_waits", "stale"]


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
        self._too_few: dict[int, int] = {}
        self._windows = 0

    def propose(self, now: Reading) -> tuple[int, Reason] | None:
        """How many actors there should be, and why; None while nothing should change."""
        first = self._first
        if now.working < now.wanted or first is None or first.wanted != now.wanted:
            self._first = now if now.working >= now.wanted else None
            return None
        seconds = now.seconds - first.seconds
        if seconds < self._window:
            return None
        self._first = now
        self._windows += 1
        starved = (now.sample_wait_seconds - first.sample_wait_seconds) / seconds
        blocked = (now.lease_wait_seconds - first.lease_wait_seconds) / (seconds * now.wanted)
        stale = (now.stale - first.stale) / max(1.0, now.finished - first.finished)
        return self._judged(now.wanted, starved=starved, blocked=blocked, stale=stale, ready=now.ready)

    def _judged(
        self, actors: int, *, starved: float, blocked: float, stale: float, ready: float
    ) -> tuple[int, Reason] | None:
        if starved > STARVES and ready < 1:
            self._too_few[actors] = self._windows
            needed = math.ceil(actors / max(1 - starved, 0.5))
            more = min(max(needed, actors + 1), self._most)
            return (more, "learner_waits") if more > actors else None
        fewer = actors - 1
        if fewer < self._least or self._windows - self._too_few.get(fewer, -REMEMBER) < REMEMBER:
            return None
        if stale > STALE:
            return fewer, "stale"
        if starved < CONTENT and blocked > BLOCKED:
            return fewer, "rollout_waits"
        return None
