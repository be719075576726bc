"""BufferGauges: what the replay buffer's gauges say of a run while it trains, reading by reading."""

from collections.abc import Mapping

from common.errors import RunError
from common.histogram import reported_keys
from common.metrics import CATALOGUE

MOST_QUARANTINED = 100  # groups in a row: then it is not the prompts
# buffer gauge -> catalogue name
METRICS = {
    "tickets": "replay_tickets",
    "fill": "replay_fill",
    "held_bytes": "replay_held_bytes",
    "spilled_bytes": "replay_spilled_bytes",
    "segments": "replay_segments",
    "segment_bytes": "replay_segment_bytes",
    "staleness_bound": "replay_staleness_bound",
    "violations": "replay_staleness_violations",
    "no_spread_discards": "replay_no_spread",
    "stale_discards": "replay_stale",
    "late_results": "replay_late_results",
    "failed_leases": "replay_failed_leases",
    "expired_leases": "replay_expired_leases",
    "returned_leases": "replay_returned_leases",
    "wasted_groups": "replay_wasted_groups",
    "lost_groups": "replay_lost_groups",
    "rewound_groups": "replay_rewound_groups",
    "skipped_groups": "replay_skipped_groups",
    "completions": "rollout_completions",
    "sample_wait_seconds": "learner_wait_seconds",
    "lease_wait_seconds": "rollout_wait_seconds",
}
COUNTERS = frozenset(name for name in METRICS.values() if CATALOGUE[name].kind == "counter")
STALENESS_KEYS = reported_keys("replay_group_staleness")
STATE = "groups_"  # and a state: how many groups are in it


def in_catalogue(gauges: Mapping[str, float]) -> dict[str, float]:
    """Those that are exported, in the catalogue's names."""
    named = {METRICS[key]: value for key, value in gauges.items() if key in METRICS}
    ages = {key: gauges[key] for key in STALENESS_KEYS if key in gauges}
    states = {key.removeprefix(STATE): value for key, value in gauges.items() if key.startswith(STATE)}
    return named | ages | {f"replay_groups{{state={state}}}": value for state, value in states.items()}


class BufferGauges:
    """Sees every reading of a run's gauges, in order; its attributes say what the newest showed."""

    def __init__(self, *, reported: int = 0) -> None:
        """`reported`: quarantined groups that a report of an earlier controller names."""
        self.progressed = False
        """Groups that can be trained were finished, taken or trained since the reading before."""
        self.failed = False
        """Groups were quarantined that are not in a report (`reported`)."""
        self.lost = 0.0
        """How many finished groups have no bytes any more, where that is new; else 0."""
        self.untrainable = ""
        """How many groups could not be trained since the last progress, and why; empty while all could."""
        self.restarts = 0.0
        """Deaths of the buffer that this controller has started."""
        self._born: float | None = None
        self._mark: tuple[float, ...] = ()
        self._quarantined = self._quarantined_before = self._lost = self._expired = self._no_spread_before = 0.0
        self._reported = float(reported)
        self._told_of_deadline = False

    def see(self, gauges: Mapping[str, float]) -> None:
        """Take the next reading."""
        mark = tuple(gauges[f"{STATE}{state}"] for state in ("finished", "sampled", "trained"))
        quarantined, lost = gauges["groups_quarantined"], gauges["lost_groups"]
        if self._born is None:
            self._lost = gauges["lost_before"]  # an earlier controller told of these
        self.progressed = mark != self._mark
        if self.progressed:
            self._mark, self._quarantined_before = mark, quarantined
            self._no_spread_before = gauges["no_spread_discards"]
        self._quarantined = max(self._quarantined, quarantined)
        self.failed = self._quarantined > self._reported
        self.lost = lost if lost > self._lost else 0.0
        self._lost = max(self._lost, lost)
        self._expired = gauges["expired_leases"]
        self.restarts += self._born is not None and gauges["born"] != self._born
        self._born = gauges["born"]
        no_spread = gauges["no_spread_discards"] - self._no_spread_before
        failed = self._quarantined - self._quarantined_before
        self.untrainable = (
            f": {no_spread:.0f} groups were discarded since for equal rewards (a longer warm start, another reward, or "
            f"replay.drop_no_spread=false) and {failed:.0f} quarantined for failing rewards or logits "
            "(RUN/quarantine.json)"
            if no_spread + failed > 0
            else ""
        )

    def reported(self) -> None:
        """Called when all that were quarantined by the newest reading are in a report."""
        self._reported = self._quarantined

    def check_failures(self, last: str) -> None:
        """Called when groups were quarantined, the `last` for this reason.

        Raises:
            RunError: once so many failed in a row that it is not their prompts.
        """
        in_row = self._quarantined - self._quarantined_before
        if in_row >= MOST_QUARANTINED:
            raise RunError(
                f"{in_row:.0f} groups in a row failed, so it is not their prompts; the last: {last} "
                "(RUN/quarantine.json); mend the reward function, or where logits are not finite start another run "
                "with model.path=RUN/checkpoints/STEP and a lower learner.learning_rate"
            )

    def late_renewals(self, fleet: Mapping[str, float], *, deadline: float) -> str:
        """What is to be said, once, when leases ran out since actors that live could not renew in time; else nothing.

        Args:
            fleet: gauges of the fleet; looked at when leases ran out.
            deadline: `replay.lease_seconds`.
        """
        if self._told_of_deadline or self._expired <= 0:
            return ""
        pause, longest = fleet["rollout_longest_pause_seconds"], fleet["rollout_longest_group_seconds"]
        if pause <= deadline / 2:
            return ""
        self._told_of_deadline = True
        return (
            f"{self._expired:.0f} leases ran out: replay.lease_seconds is {deadline:g}, and an actor was busy for up "
            f"to {pause:.2g} s between two renewals (a group took up to {longest:.2g} s); give {3 * pause:.2g} or more"
        )
