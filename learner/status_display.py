"""Status display: what `diffpo status` prints of a run."""

from shlex import quote
from typing import Any

from rich.console import Console

from learner.run_directory import RunDirectory

SHOWN = {
    "rollout_generated_reward": "reward",
    "rollout_generated_nfe": "NFE",
    "threshold_gamma": "gamma",
    "replay_staleness_mean": "staleness",
    "learner_weight_ess": "ESS",
}


def show(status: dict[str, Any], console: Console) -> None:
    """Of a run that is going; `status` is `Controller.status`."""
    last = status["last_step"]
    done = f"step {last.get('learner_steps', 0):.0f} of {status['steps']}"
    console.print(
        f"run {status['run']}: {status['phase']}, {done}, {status['seconds']:.0f} s; last progress "
        f"{status['idle_seconds']:.0f} s ago" + (f"; stopping ({status['stopping']})" if status["stopping"] else "")
    )
    console.print(f"directory: {status['directory']}")
    if status["metrics"]:
        console.print(f"metrics: http://{status['metrics']}/metrics")
    if status["waiting_for_nodes"]:
        console.print(f"waiting for nodes: {status['waiting_for_nodes']}")
    for name, doing in status["learner"].items():
        console.print(f"{name}: {doing}")
    actors = status["rollout_actors"]
    if actors:
        working = sum(doing == "working" for doing in actors.values())
        console.print(f"rollout actors: {working} of {status['actors_wanted']} work")
    for name, doing in sorted({**actors, **status["evaluation_workers"]}.items(), key=str):
        console.print(f"  {name}: {doing}")
    values = [f"{word} {last[key]:.3g}" for key, word in SHOWN.items() if key in last]
    if values:
        console.print(f"last step: {', '.join(values)}")


def ended(directory: RunDirectory) -> dict[str, Any]:
    """What the folder of a run that is not going says.

    Raises:
        UserError: when it is no run's.
    """
    config = directory.config()
    finished = directory.finished_steps()
    checkpoints = directory.checkpoint_store(config).checkpoints()
    return {
        "run": config.run.name,
        "directory": directory.name,
        "phase": "finished" if finished is not None and finished >= config.learner.steps else "not going",
        "steps": config.learner.steps,
        "checkpoint_step": max((one.step for one in checkpoints), default=-1),
    }


def show_ended(status: dict[str, Any], console: Console) -> None:
    """Of a run that is not going; `status` is that of `ended`."""
    done = max(status["checkpoint_step"], 0)
    console.print(
        f"run {status['run']}: {status['phase']}, {done} of {status['steps']} steps are in its newest checkpoint"
    )
    console.print(f"directory: {status['directory']}")
    if status["phase"] == "finished":
        return
    console.print(f"go on with: diffpo train --resume {quote(status['directory'])}")
