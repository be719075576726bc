"""Final evaluation: policies on the same held-out prompts, as Ray tasks side by side, and the results table."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

from actors.evaluation import Evaluator, Point, Setting, standard_settings
from actors.frontier import area, gain
from common.config import Config
from common.policy import load_policy
from common.tasks import build_task

Points = Mapping[str, list[Point]]


def evaluate_policy(
    config: Config,
    folder: Path,
    *,
    threads: int = 1,
    settings: list[Setting] | None = None,
    report: Callable[[Point], None] | None = None,
) -> list[Point]:
    """Some settings (all standard ones by default) on the evaluation split, for the policy in a folder."""
    torch.set_num_threads(threads)
    task = build_task(config.task)
    policy = load_policy(folder, config.model, config.sampler.threshold).for_rollout(config.rollout)
    chosen = config.evaluation
    points = []
    with Evaluator(policy, task, config, prompts=chosen.prompts, split=chosen.split) as evaluator:
        for setting in settings or standard_settings(config):
            points.append(evaluator.measure(setting))
            if report is not None:
                report(points[-1])
    return points


async def evaluate_folders(
    config: Config, folders: Mapping[str, Path], progress: Callable[[], None]
) -> dict[str, list[Point]]:
    """Points of each folder's policy, one Ray task for each setting; `progress` is called as they arrive."""
    rollout = config.rollout
    task: Any = ray.remote(num_cpus=rollout.cpus, num_gpus=rollout.gpus, max_retries=1)(evaluate_policy)

    async def measured(folder: Path, setting: Setting) -> Point:
        points = await task.remote(config, folder, threads=rollout.threads, settings=[setting])
        progress()
        return points[0]

    settings = standard_settings(config)
    jobs = [measured(folder, setting) for folder in folders.values() for setting in settings]
    found = await asyncio.gather(*jobs)
    return {name: found[i * len(settings) : (i + 1) * len(settings)] for i, name in enumerate(folders)}


def summarise(config: Config, points: Points) -> dict[str, Any]:
    """What `evaluation.json` holds: a row per setting and policy, areas, and the gain of `after` over `before`."""
    nfe_range = config.evaluation.nfe_range
    results: dict[str, Any] = {
        "task": config.task.name,
        "split": config.evaluation.split,
        "prompts": config.evaluation.prompts,
        "nfe_range": list(nfe_range),
        "settings": {name: [point.summary() for point in found] for name, found in points.items()},
        "area": {name: area(found, nfe_range) for name, found in points.items()},
    }
    if {"before", "after"} <= set(points):
        value, low, high = gain(points["before"], points["after"], nfe_range)
        results["frontier_gain"] = {"gain": value, "low": low, "high": high}
    return results
