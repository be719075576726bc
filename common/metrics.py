"""Metrics: the catalogue of everything a run exports, and nothing else is exported.

- Names here are without the prefix `diffpo_`; counters get `_total` from the Prometheus client, histograms `_bucket`,
  `_sum` and `_count`.
- The docs table is made from this module (`diffpo metrics`), the exporter refuses names that are not in it, and values
  of labels that are not in it: the number of series has a bound that depends on no run.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

from common.ledger import GroupState

PREFIX = "diffpo_"
STEP_BUCKETS = (1, 2, 4, 8)
"""First reveal steps of the buckets by which the learner reports."""
MOST_STALENESS = 16
"""The label `staleness` has no larger value; it stands for all that are."""

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
POWERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0)
PASSES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0, 512.0)
GAMMAS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
REWARDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0)
VERSIONS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)


@dataclass(frozen=True)
class Metric:
    """One exported time series family."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    """All values that the labels can have, in their order; none for labels that are constant in a run."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending; there is one more for what lies above."""

    @property
    def exported(self) -> str:
        """Its name as Prometheus has it; of a histogram what its samples' names begin with."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def samples(self) -> tuple[str, ...]:
        """Names that a scrape has of it."""
        parts = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return tuple(self.exported + part for part in parts)


def _each(*values: object) -> tuple[tuple[str, ...], ...]:
    return tuple((str(value),) for value in values)


WEIGHT_BUCKETS = (
    ("all", "all"),
    *(("reveal_step", str(step)) for step in STEP_BUCKETS),
    *(("staleness", str(age)) for age in range(MOST_STALENESS + 1)),
)

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("run_info", "gauge", "1; its labels say what runs", ("name", "version", "task", "learns")),
        Metric(
            "run_phase",
            "gauge",
            "1 for the phase the run is in",
            ("phase",),
            _each("warm_start", "train", "evaluate", "finished", "stopped", "failed"),
        ),
        Metric("run_seconds", "gauge", "Seconds since the controller started"),
        Metric("run_idle_seconds", "gauge", "Seconds since anything made progress; the stall watchdog acts on it"),
        Metric("run_stall_seconds", "gauge", "Idle seconds at which the watchdog ends the run (run.stall_timeout)"),
        Metric(
            "run_waiting_for_nodes", "gauge", "1 while the run lacks nodes to go on; run.capacity_timeout counts then"
        ),
        Metric("warm_start_steps", "gauge", "Supervised steps done"),
        Metric("warm_start_loss", "gauge", "Supervised loss, nats per token, of the last step"),
        Metric("warm_start_held_out_loss", "gauge", "Supervised loss of held-out demonstrations, nats per token"),
        Metric("warm_start_tokens", "counter", "Tokens of the demonstrations that supervised steps took"),
        Metric("warm_start_skipped", "counter", "Demonstrations left out since they are too long"),
        Metric("learner_steps", "counter", "Learner steps done"),
        Metric(
            "learner_step_seconds", "histogram", "Seconds of learner steps, without waiting for groups", bounds=SECONDS
        ),
        Metric("learner_loss", "gauge", "Negative objective of the last update"),
        Metric("learner_gradient_norm", "gauge", "Gradient norm of the last update, before clipping"),
        Metric("learner_learning_rate", "gauge", "Learning rate of the model (of the head when only it learns)"),
        Metric("learner_clip_fraction", "gauge", "Share of tokens whose ratio lies outside the clip range"),
        Metric(
            "learner_kl",
            "gauge",
            "k3 estimate of KL from policy to warm start, nats per token; 0 when off",
        ),
        Metric("learner_scored_completions", "gauge", "Completions of the last batch that carry gradient"),
        Metric("learner_flat_groups", "gauge", "Groups of the last batch without advantage: equal rewards, or size 1"),
        Metric(
            "learner_rows_forwarded",
            "gauge",
            "Rows forwarded for the last step: all updates, with passes that have no gradient",
        ),
        Metric(
            "learner_surrogate_kl",
            "gauge",
            "KL(exact || m-times mean field), nats per token, every `diagnostics_every` steps, before the updates",
            ("passes", "reveal_step"),
            tuple(product(("1", "2", "4"), map(str, STEP_BUCKETS))),
        ),
        Metric(
            "learner_weight_mean", "gauge", "Mean untruncated importance weight", ("bucket", "value"), WEIGHT_BUCKETS
        ),
        Metric(
            "learner_weight_ess",
            "gauge",
            "Effective sample size of the weights, share",
            ("bucket", "value"),
            WEIGHT_BUCKETS,
        ),
        Metric("learner_restarts", "counter", "Deaths of the learner after which another one was started"),
        Metric(
            "learner_skipped_steps",
            "counter",
            "Batches set aside: the loss, a gradient or an importance weight not finite",
        ),
        Metric("checkpoint_step", "gauge", "Step of the newest durable checkpoint; -1 before the first"),
        Metric("checkpoint_timestamp_seconds", "gauge", "Unix time of that (of the start in a run that was resumed)"),
        Metric("checkpoint_blocked_seconds", "counter", "Seconds the learner stood still for checkpoints"),
        Metric("checkpoint_write_seconds", "gauge", "Seconds that the last checkpoint took to be durable"),
        Metric("checkpoint_failures", "counter", "Checkpoints that could not be written"),
        Metric("learner_wait_seconds", "counter", "Seconds the learner waited for groups"),
        Metric(
            "rollout_reward",
            "gauge",
            "Mean task reward of the last batch, without cost; it holds only groups with spread",
        ),
        Metric("rollout_reward_costed", "gauge", "Mean reward of the last batch, cost of forward passes included"),
        Metric("rollout_nfe", "gauge", "Mean forward passes per completion in the last batch"),
        Metric(
            "rollout_generated_reward",
            "gauge",
            "Mean task reward, without cost, of groups accepted lately: a batch or more, discarded ones included",
        ),
        Metric("rollout_generated_nfe", "gauge", "Mean forward passes per completion of those groups"),
        Metric(
            "rollout_completion_reward", "histogram", "Task reward of every completion, without cost", bounds=REWARDS
        ),
        Metric("rollout_completion_nfe", "histogram", "Forward passes of every completion", bounds=PASSES),
        Metric("rollout_completion_tokens", "histogram", "Revealed tokens of every completion", bounds=POWERS),
        Metric(
            "rollout_completion_gamma",
            "histogram",
            "Threshold of every completion (another rule: its parameter)",
            bounds=GAMMAS,
        ),
        Metric("rollout_tokens_per_forward", "gauge", "Mean revealed tokens per forward pass (TPF) in the last batch"),
        Metric("rollout_token_entropy", "gauge", "Mean entropy of tokens when revealed, nats"),
        Metric("rollout_completions", "counter", "Completions accepted by the buffer"),
        Metric("rollout_row_forwards", "counter", "Rows forwarded by rollout actors"),
        Metric("rollout_token_forwards", "counter", "Columns forwarded by rollout actors, padding included"),
        Metric("rollout_cache_drift", "gauge", "Mean KL(exact || cached) per masked position, nats; 0 without a cache"),
        Metric("rollout_cache_flips", "gauge", "Share of those positions whose most probable token a cache changes"),
        Metric("rollout_actors", "gauge", "Live rollout actors"),
        Metric("rollout_actors_wanted", "gauge", "Rollout actors that the run shall have"),
        Metric("rollout_pending_actors", "gauge", "Rollout actors that wait for a node"),
        Metric("rollout_min_actors", "gauge", "Fewest rollout actors that the run may have"),
        Metric(
            "rollout_scalings",
            "counter",
            "Changes of how many rollout actors there shall be",
            ("reason",),
            _each("command", "learner_waits", "useless", "rollout_waits", "stale"),
        ),
        Metric("rollout_preemptions", "counter", "Rollout actors whose node was taken away; no restarts"),
        Metric("learner_pending", "gauge", "1 while the learner waits for its nodes"),
        Metric("rollout_restarts", "counter", "Rollout actors started again after a failure"),
        Metric("rollout_group_seconds", "histogram", "Seconds from lease to hand-in of a group", bounds=SECONDS),
        Metric("rollout_longest_group_seconds", "gauge", "Longest time from lease to hand-in, of live actors"),
        Metric("rollout_longest_pause_seconds", "gauge", "Longest step of live actors; leases are renewed between two"),
        Metric("rollout_wait_seconds", "counter", "Seconds rollout actors waited for leases"),
        Metric(
            "threshold_gamma",
            "gauge",
            "Geometric mean of the thresholds (another rule: its parameters) of the last batch",
        ),
        Metric("threshold_gamma_spread", "gauge", "Standard deviation of ln(gamma) in the last batch"),
        Metric(
            "threshold_gamma_by_difficulty",
            "gauge",
            "The same by thirds of the last batch's groups, ordered by mean task reward: low, middle, high",
            ("group_reward",),
            _each("low", "middle", "high"),
        ),
        Metric("threshold_scale", "gauge", "Factor that hold_nfe puts on gamma; 1 without it"),
        Metric("threshold_reveal_temperature", "gauge", "Temperature that hold_entropy gives the reveal rule"),
        Metric("threshold_entropy", "gauge", "Mean entropy of the threshold policy, nats"),
        Metric("drift_nfe", "gauge", "Greedy NFE at gamma_init on validation prompts: rises or falls show drift"),
        Metric("drift_accuracy", "gauge", "Greedy exact-solve accuracy at gamma_init on validation prompts"),
        Metric("replay_groups", "gauge", "Groups per state", ("state",), _each(*GroupState)),
        Metric("replay_tickets", "gauge", "Tickets in use"),
        Metric("replay_fill", "gauge", "Share of tickets held by groups that wait for the learner or are in its batch"),
        Metric("replay_held_bytes", "gauge", "Bytes of finished groups in memory"),
        Metric("replay_spilled_bytes", "gauge", "Bytes of finished groups that are only in their segment files"),
        Metric("replay_segments", "gauge", "Segment files that still hold a group"),
        Metric("replay_segment_bytes", "counter", "Bytes written to segment files"),
        Metric("replay_staleness_mean", "gauge", "Mean staleness of the last batch, versions"),
        Metric("replay_staleness_max", "gauge", "Largest staleness in the last batch, versions"),
        Metric("replay_group_staleness", "histogram", "Staleness of sampled groups, versions", bounds=VERSIONS),
        Metric("replay_staleness_bound", "gauge", "Bound on staleness that admission guarantees, versions; -1 is none"),
        Metric("replay_staleness_violations", "counter", "Groups beyond the bound; more than 0 is a defect"),
        Metric("replay_restarts", "counter", "Deaths of the replay buffer that this controller has seen"),
        Metric("replay_lost_groups", "counter", "Groups that were acknowledged and whose bytes are in no file"),
        Metric("replay_rewound_groups", "counter", "Trained groups that a learner's return made finished again"),
        Metric("replay_skipped_groups", "counter", "Groups set aside because their batch could not be trained on"),
        Metric("replay_no_spread", "counter", "Groups discarded because their rewards were all equal"),
        Metric("replay_stale", "counter", "Groups discarded because they had grown too old (drop_when_stale)"),
        Metric("replay_late_results", "counter", "Results of leases that were not current any more"),
        Metric("replay_failed_leases", "counter", "Leases whose prompt or reward failed; twice is quarantine"),
        Metric("replay_expired_leases", "counter", "Leases that ran out"),
        Metric("replay_returned_leases", "counter", "Leases returned by death or drain"),
        Metric("replay_wasted_groups", "counter", "Leases that had to be granted again"),
        Metric("weights_version", "gauge", "Newest published version"),
        Metric("weights_adopted_version", "gauge", "Oldest version that a live actor generates with"),
        Metric("weights_damaged", "counter", "Times that weights arrived with another digest than was published"),
        Metric(
            "weights_adopt_seconds",
            "histogram",
            "Seconds in which an actor adopted new weights: fetch, digest, copy; its rollout stands",
            bounds=SHORT_SECONDS,
        ),
        Metric("weights_bytes", "gauge", "Bytes of one published version"),
    )
}


def split_labels(key: str) -> tuple[str, tuple[str, ...]]:
    """`name{label=value,...}` -> name and label values in the catalogue's order, as parts report labelled values.

    A metric with labels (bucket, value) is written `name{bucket=value}`, the kind of bucket standing for the label, and
    without labels it is that of everything. A histogram's buckets and sum (`common.histogram`) are `name_bucket{le=1}`
    and `name_sum`; they come as its name and the label `1` or `sum`.

    Raises:
        KeyError: for a name that the catalogue does not have, labels that are not the metric's, or other values.
    """
    name, _, rest = key.partition("{")
    given = dict(pair.split("=", 1) for pair in rest.rstrip("}").split(",")) if rest else {}
    base = name.removesuffix("_bucket" if given else "_sum")
    if base != name and base in CATALOGUE and CATALOGUE[base].kind == "histogram":
        if given and set(given) != {"le"}:
            raise KeyError(f"{key}: buckets of {base} have the label le alone")
        return base, (given.get("le", "sum"),)
    if name not in CATALOGUE:
        raise KeyError(f"metric {name!r} is not in common.metrics.CATALOGUE")
    metric = CATALOGUE[name]
    if metric.labels == ("bucket", "value") and len(given) < 2:
        found = next(iter(given.items()), ("all", "all"))
    else:
        found = tuple(given[label] for label in metric.labels) if set(given) == set(metric.labels) else None
    if found is None or (metric.values and found not in metric.values):
        raise KeyError(f"{key}: the labels of {name} are {list(metric.labels)}, their values {metric.values}")
    return name, found


def markdown_table() -> str:
    """The catalogue as the table in `docs/metrics.md`."""
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in CATALOGUE.values():
        rows.append(f"| `{metric.exported}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.meaning} |")
    return "\n".join(rows) + "\n"
