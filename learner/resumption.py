"""Resumption: which run goes on, with which configuration.

A run goes on with the configuration that it was started with. Keys that say where and how it runs, but not what it
computes (rounding apart), may be changed (`SAFE`); any other difference is refused and shown.
"""

from pathlib import Path
from typing import Any

from common.config import Config
from common.config_file import load_config
from common.errors import UserError
from learner.run_directory import RunDirectory

SAFE = (
    *(
        "run.root",
        "run.name",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.record_groups",
        "run.stall_timeout",
        "run.capacity_timeout",
        "run.ray_address",
    ),
    *("rollout.actors", "rollout.min_actors", "rollout.max_actors", "rollout.scaling_seconds", "rollout.labels"),
    *("rollout.slots", "rollout.cpus", "rollout.gpus", "rollout.threads", "rollout.max_restarts"),
    *(
        "rollout.reward_workers",
        "rollout.reward_timeout",
        "rollout.reward_cpus",
        "rollout.reward_labels",
        "rollout.reward_memory_bytes",
        "rollout.drain_seconds",
    ),
    *("replay.lease_seconds", "replay.keep_versions", "replay.memory_bytes", "replay.max_restarts"),
    *(
        "learner.steps",
        "learner.max_restarts",
        "learner.max_skipped_steps",
        "learner.ranks",
        "learner.cpus",
        "learner.gpus",
        "learner.labels",
        "learner.threads",
        "learner.micro_batch_tokens",
        "learner.activation_checkpointing",
    ),
    *("evaluation", "metrics"),
)


def resumed_config(run: RunDirectory, *, file: Path | None, overrides: list[str]) -> Config:
    """The configuration with which a run goes on; the driver writes it there.

    Args:
        run: its directory.
        file: a configuration that is said to be the run's; None takes the one that it has.
        overrides: dotted overrides.

    Raises:
        UserError: when there is no run, it has finished, or the configuration differs in what it computes.
    """
    saved = run.config()
    given = load_config(file, overrides) if file is not None else run.config(overrides)
    if saved.run.checkpoints is not None and run.place.last != saved.run.name:
        raise UserError(
            f"run {run.name} was called {saved.run.name}, and its checkpoints are in {saved.run.checkpoints} under "
            "that name; give the folder its name back"
        )
    place = {"root": run.place.parent.name, "name": run.place.last}
    given = given.model_copy(update={"run": given.run.model_copy(update=place)})
    refused = _differences(saved.model_dump(mode="json"), given.model_dump(mode="json"))
    if refused:
        raise UserError(
            f"run {run.name} was started with another configuration: {'; '.join(refused)}; leave these keys as they "
            "were, or start another run"
        )
    done = run.finished_steps()
    if done is not None and done >= given.learner.steps:
        raise UserError(
            f"run {run.name} has finished its {done} steps; give more with learner.steps=N, or start another run.name"
        )
    return given


def _differences(saved: dict[str, Any], given: dict[str, Any], path: str = "") -> list[str]:
    """`key: saved -> given` of every leaf that differs and is not safe."""
    found = []
    for name in sorted(saved.keys() | given.keys()):
        key = f"{path}{name}"
        old, new = saved.get(name), given.get(name)
        if old == new or key in SAFE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{key}.")
        else:
            found.append(f"{key}: {old} -> {new}")
    return found
