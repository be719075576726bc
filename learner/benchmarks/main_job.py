"""Benchmark `main`: the main job itself is the measurement.

Keys, each a mean over seeds with `_spread` (standard deviation over seeds; 0 for one seed) beside it:

- `minutes_to_plot`: from the driver's start to `pareto.png`, installation not included.
- `reward_before`, `reward_after`, `nfe_before`, `nfe_after`: sampled at the training temperature with the learned
  gamma, on held-out prompts; the reward has its cost of forward passes taken off.
- `accuracy_before`, ...: exact-solve accuracy of those samples.
- `greedy_accuracy_before`, `greedy_nfe_before`, `greedy_cells_before` (d1's metric), ...: the same at temperature 0.
- `frontier_gain`: area after minus area before (`actors.frontier`), on the same prompts.

`runs` has one entry per seed. `--quick` trains 10 steps: it shows that the machinery runs, not that it learns.
"""

import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common.config_file import load_config
from common.errors import Stopped
from learner.benchmarks import Options
from learner.display import open_display
from learner.driver import train
from learner.summary_display import show_evaluation

CONFIG = Path("deploy/configs/sudoku.yaml")
QUICK = ["learner.steps=10", "warm_start.steps=100", "evaluation.prompts=64"]


def run(options: Options) -> dict[str, Any]:
    """The main job once per seed."""
    runs = []
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for seed in range(options.seeds):
        overrides = [*(QUICK if options.quick else []), *options.overrides]
        overrides += [f"run.seed={seed}", f"run.name=bench-main-{stamp}-seed{seed}"]
        config = load_config(options.config or CONFIG, overrides)
        started = time.monotonic()
        with open_display(config) as display:
            summary = train(config, display.show)
        minutes = (time.monotonic() - started) / 60
        if "stopped" in summary:
            raise Stopped(summary["stopped"])
        show_evaluation(summary["evaluation"], options.console)
        runs.append({"seed": seed, "minutes_to_plot": minutes, **measures(summary["evaluation"])})
        options.console.print(runs[-1])
    result: dict[str, Any] = {"seeds": options.seeds}
    for key in runs[0]:
        values = [run[key] for run in runs]
        if key != "seed":
            result[key] = mean(values)
            result[f"{key}_spread"] = stdev(values) if len(values) > 1 else 0.0
    return {**result, "runs": runs}


def measures(evaluation: dict[str, Any]) -> dict[str, float]:
    """The benchmark's keys from an `evaluation.json`."""
    found: dict[str, float] = {}
    for when in ("before", "after"):
        rows = {row["setting"]: row for row in evaluation["settings"][when]}
        sampled, greedy = rows["learned, sampled"], rows["learned, greedy"]
        found[f"reward_{when}"] = sampled["reward_costed"]
        found[f"nfe_{when}"] = sampled["nfe"]
        found[f"accuracy_{when}"] = sampled["accuracy"]
        found[f"greedy_accuracy_{when}"] = greedy["accuracy"]
        found[f"greedy_nfe_{when}"] = greedy["nfe"]
        if "cells" in greedy["components"]:
            found[f"greedy_cells_{when}"] = greedy["components"]["cells"]
    found["frontier_gain"] = evaluation["frontier_gain"]["gain"]
    return found
