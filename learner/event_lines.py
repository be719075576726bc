"""EventLines: the controller's events as lines of text."""

from typing import Any

FIRST = {  # of phases in which nothing is told for a while, what that is spent on
    "warm_start": " (the learner starts)",
    "train": " (rollout actors start, then generate the groups of the first step)",
    "evaluate": " (workers start, then answer every prompt in every setting)",
}
SCALED = {
    "command": "as asked",
    "learner_waits": "the learner waits for groups",
    "useless": "more of them made hardly more groups",
    "rollout_waits": "they wait for leases",
    "stale": "groups grow too old",
}


def line(kind: str, values: dict[str, Any]) -> str | None:
    """Of an event that is told once; None of those that come with every step, and of others."""
    if kind == "phase":
        return f"phase: {values['phase']}{FIRST.get(values['phase'], '')}"
    if kind == "metrics":
        return f"metrics: http://{values['address']}/metrics"
    if kind == "signal":
        return f"{values['name']}: {_stopping(values['phase'])}"
    if kind == "warning":
        return f"warning: {values['text']}"
    if kind == "scale":
        return f"rollout actors: {values['was']} -> {values['actors']}, {SCALED[values['reason']]}"
    if kind == "quarantine":
        so_far = f"; {values['quarantined']} groups so far, RUN/quarantine.json"
        return f"group {values['group']} quarantined, it failed twice: {values['reason']}{so_far}"
    return None


def _stopping(phase: str) -> str:
    if phase == "train":
        return "stopping, after the step in hand and a checkpoint"
    if phase == "evaluate":
        return "stopping; all steps are trained, --resume goes on with the evaluation"
    return "stopping"


def reward_of(values: dict[str, float]) -> float:
    """Mean task reward of what was generated lately; of the batch where that is not known."""
    return values.get("rollout_generated_reward", values["rollout_reward"])


def nfe_of(values: dict[str, float]) -> float:
    """Mean forward passes of the same."""
    return values.get("rollout_generated_nfe", values["rollout_nfe"])


def step_note(values: dict[str, float]) -> str:
    """A learner step."""
    parts = [
        f"reward {reward_of(values):.3f}",
        f"NFE {nfe_of(values):.2f}",
        f"gamma {values['threshold_gamma']:.3g}",
        f"staleness {values['replay_staleness_mean']:.1f}",
    ]
    if "learner_weight_ess" in values:
        parts.append(f"ESS {values['learner_weight_ess']:.2f}")
    if "drift_nfe" in values:
        parts.append(f"| at gamma_init: accuracy {values['drift_accuracy']:.3f} NFE {values['drift_nfe']:.2f}")
    return "  ".join(parts)


def warm_start_note(values: dict[str, float]) -> str:
    """A supervised step; of values that are measured now and then, the newest."""
    parts = [f"loss {values['warm_start_loss']:.3f}"]
    if "warm_start_held_out_loss" in values:
        parts.append(f"held out {values['warm_start_held_out_loss']:.3f}")
    if values.get("warm_start_skipped", 0):
        parts.append(f"{values['warm_start_skipped']:.0f} too long")
    return "  ".join(parts)
