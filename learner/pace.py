"""Pace: how fast a run goes and who waits for whom, from counters that only grow.

What a row of `metrics.jsonl` has beside what its part reported (`IN_ROWS`). Prometheus makes rates itself, so these are
not exported.
"""

from collections import deque
from collections.abc import Mapping

WINDOW = 30.0  # seconds over which a rate is taken
COUNTERS = ("rollout_completions", "learner_wait_seconds", "rollout_wait_seconds")
IN_ROWS = {
    "warm_start_tokens_per_second": "Tokens of demonstrations per second, over the last half minute",
    "rollout_completions": "Completions accepted by the buffer since the run began",
    "rollout_completions_per_second": "The same per second, over the last half minute",
    "learner_wait_seconds": "Seconds the learner waited for groups since the run began",
    "learner_wait_share": "Share of the last half minute in which the learner waited for groups",
    "rollout_wait_seconds": "Seconds rollout actors waited for leases since the run began, all added up",
    "rollout_wait_share": "Share of the last half minute in which rollout actors waited for leases, their mean",
    "rollout_actors": "Live rollout actors",
    "rollout_actors_wanted": "Rollout actors that the run shall have",
}
"""Keys and their meaning; a rate is absent until there are two moments to take it between."""


class Rate:
    """How fast one counter grows, per second of the last `window` seconds."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._seen: deque[tuple[float, float]] = deque()

    def see(self, now: float, total: float) -> None:
        """Its value at a moment; moments come in order. One that fell began anew, and so does the rate."""
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, total))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """None before there are two moments."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (start, low), (end, high) = self._seen[0], self._seen[-1]
        return (high - low) / (end - start)


class Pace:
    """Lives as long as a run, in its controller (or in `diffpo sft`)."""

    def __init__(self) -> None:
        self._tokens = Rate()
        self._rates = {name: Rate() for name in COUNTERS}
        self._gauges: dict[str, float] = {}

    def see(self, now: float, gauges: Mapping[str, float]) -> None:
        """Called with the newest gauges of buffer and fleet, in the catalogue's names; others are passed over."""
        self._gauges = {name: value for name, value in gauges.items() if name in IN_ROWS}
        for name, rate in self._rates.items():
            if name in gauges:
                rate.see(now, gauges[name])

    def beside(self, kind: str, values: Mapping[str, float], now: float) -> dict[str, float]:
        """What a report of this kind gets besides its own values."""
        if kind == "warm_start" and "warm_start_tokens" in values:
            self._tokens.see(now, values["warm_start_tokens"])
            return _known({"warm_start_tokens_per_second": self._tokens.per_second})
        if kind != "step":
            return {}
        completions, learner, rollout = (self._rates[name].per_second for name in COUNTERS)
        actors = max(self._gauges.get("rollout_actors", 0.0), 1.0)
        return self._gauges | _known(
            {
                "rollout_completions_per_second": completions,
                "learner_wait_share": None if learner is None else min(learner, 1.0),
                "rollout_wait_share": None if rollout is None else min(rollout / actors, 1.0),
            }
        )


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
