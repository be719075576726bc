"""A tiny main job as a user starts it: for tests that run the command line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from learner.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
TINY = [
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.intermediate_size=64",
    "warm_start.steps=5",
    "warm_start.batch_size=16",
    "warm_start.threads=1",
    "learner.groups_per_step=4",
    "learner.group_size=4",
    "rollout.slots=32",
    "replay.drop_no_spread=false",
    "evaluation.prompts=8",
    "evaluation.gammas=[0.1,3]",
    "evaluation.drift_every=2",
    "evaluation.drift_prompts=8",
]
ENDLESS = "learner.steps=100000"


def command(config: str, root: Path, *overrides: str) -> list[str]:
    """The main job on a tiny model."""
    base = [sys.executable, "-m", "learner", "train", "--config", f"deploy/configs/{config}.yaml"]
    return [*base, *TINY, f"run.root={root}", "run.name=run", *overrides]


def start(config: str, root: Path, *overrides: str) -> subprocess.Popen[str]:
    """The main job in the background."""
    return subprocess.Popen(
        command(config, root, *overrides), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def rows(run: Path) -> list[dict[str, float]]:
    """Learner steps in a run's `metrics.jsonl`."""
    found = RunDirectory(run).read_metrics() if (run / "metrics.jsonl").exists() else []
    return [row for row in found if row["kind"] == "step"]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int, seconds: float = 120) -> None:
    """Until the learner has done `step` steps; fails with the run's output when it ends before."""
    deadline = time.monotonic() + seconds
    while len(rows(run)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"run ended or hung before step {step}: {process.communicate()[0][-3000:]}")
        time.sleep(0.2)
