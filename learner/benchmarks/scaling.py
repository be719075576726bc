"""Benchmark `scaling`: what a run loses, and how long its learner stands still, when rollout actors come and go.

Real are driver, Ray, controller, fleet, replay buffer, learner actor and checkpoints; generation and training only take
their time (`chaos_parts`).

- `commanded`: a run that one actor can feed is scaled 1 -> 4 -> 1 by `diffpo scale`, as often as `rounds`.
  `groups_lost`, `groups_twice`, `regenerated`: as in `diffpo bench chaos`. `learner_pauses`: intervals between two
  learner steps, within `SETTLE` s after a command, of more than `PAUSE` times the longest one in stretches of the same
  length before the commands: a machine that is shared pauses by itself. `longest_s`, `longest_without_s`: the longest
  of each; `step_s`: the median.
- `by_itself`: a run with `rollout.max_actors` begins with one actor. `changes`: how many it has after each change;
  `actors`: at the end. `step_s_first`, `step_s_last`: mean seconds of a step over its first and its last windows;
  `step_s_of_most`: with `most` actors from the beginning; `speed_vs_most`: how near to that it comes.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from common.errors import RunError
from learner.benchmarks import Options
from learner.benchmarks.chaos import ChaosRun, account, simulated
from learner.benchmarks.chaos_parts import TRAIN_SECONDS

SETTLE = 4.0  # seconds after a command
PAUSE = 1.5  # times the longest interval without a command
STALENESS = 8  # so that its bound is not what limits the actors
MOST = 8
WINDOW = 4.0


def run(options: Options) -> dict[str, Any]:
    """Both measurements; each is printed as it comes."""
    folder = Path(tempfile.mkdtemp(prefix="diffpo-scaling-"))
    result: dict[str, Any] = {}
    for measure in (_commanded, _by_itself):
        found = measure(folder, options)
        options.console.print(found)
        result |= found
    shutil.rmtree(folder)
    return result


def _commanded(folder: Path, options: Options) -> dict[str, Any]:
    rounds = 1 if options.quick else 4
    steps = round((4 * SETTLE * rounds + 5) / TRAIN_SECONDS)
    tree = simulated(steps, actors=1, slots=128)
    tree["replay"]["max_staleness"] = STALENESS
    run = ChaosRun(folder, "commanded", "simulated", tree)
    run.wait_for("some steps", lambda: run.steps() > 20)
    stretches: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for actors in (4, 1) * rounds:
        for command in (False, True):
            started = time.time()
            if command:
                _scale(run, actors)
            time.sleep(SETTLE)
            stretches[command].append((started, time.time()))
    if run.end() != 0:
        raise RunError(f"bench scaling: the run did not end well; its log: {run.log.read_text()[-1500:]}")
    ends = step_ends(run)
    intervals = {
        command: [b - a for a, b in pairwise(ends) if any(s <= b <= e for s, e in windows)]
        for command, windows in stretches.items()
    }
    usual = max(intervals[False])
    found = account(run)
    return {
        **{key: found[key] for key in ("groups", "groups_lost", "groups_twice", "regenerated")},
        "rounds": rounds,
        "learner_pauses": sum(one > PAUSE * usual for one in intervals[True]),
        "longest_s": max(intervals[True]),
        "longest_without_s": usual,
        "step_s": median(intervals[False]),
    }


def _scale(run: ChaosRun, actors: int) -> None:
    command = [sys.executable, "-m", "learner", "scale", str(run.path), "--actors", str(actors)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def step_ends(run: ChaosRun) -> list[float]:
    """When each learner step was reported, in seconds of the controller's clock, put on the wall's."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    ended = (run.path / "metrics.jsonl").stat().st_mtime
    seconds = [row["seconds"] for row in rows if row["kind"] == "step"]
    return [ended - seconds[-1] + one for one in seconds]


def _by_itself(folder: Path, options: Options) -> dict[str, Any]:
    steps = 300 if options.quick else 1500
    found = _finished(folder, "by-itself", steps, actors=1, scaling_seconds=WINDOW, max_actors=MOST)
    most = _finished(folder, "most", 150, actors=MOST)
    changes = [int(after) for after in re.findall(r"\nscale .*'actors': (\d+)", found.log.read_text())]
    ends, of_most = step_ends(found), step_ends(most)
    span = 3 * WINDOW
    first = _step([one for one in ends if one <= ends[0] + span])
    last = _step([one for one in ends if one >= ends[-1] - span])
    best = _step(of_most[len(of_most) // 3 :])
    return {
        "most": MOST,
        "actors": changes[-1] if changes else 1,
        "changes": changes,
        "step_s_first": first,
        "step_s_last": last,
        "step_s_of_most": best,
        "speed_vs_most": best / last,
    }


def _finished(folder: Path, name: str, steps: int, **rollout: Any) -> ChaosRun:
    tree = simulated(steps, slots=16, **rollout)
    tree["replay"]["max_staleness"] = STALENESS
    run = ChaosRun(folder, name, "simulated", tree)
    if run.end() != 0:
        raise RunError(f"bench scaling: the run did not end well; its log: {run.log.read_text()[-1500:]}")
    return run


def _step(ends: list[float]) -> float:
    """Mean seconds of a step."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)
