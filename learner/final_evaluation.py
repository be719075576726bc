"""Final evaluation: policies on the same held-out prompts, by workers side by side, and the results table."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from actors.evaluation import Point
from actors.frontier import area, gain
from common.config import Config
from common.errors import UserError
from learner.evaluation_fleet import Shard, measure_here, measure_on_ray, room_for_workers, shards_of
from learner.evaluation_record import Points, ShardFolder
from learner.ray_connection import LOCAL, chosen_address, connect


async def evaluate_folders(
    config: Config, folders: Mapping[str, Path], progress: Callable[[], None]
) -> dict[str, list[Point]]:
    """Points of each folder's policy, at the end of a run, on its Ray; `progress` is called as they arrive."""
    shards = shards_of(config, folders, config.evaluation.prompts)
    found: dict[int, Point] = {}

    def done(number: int, point: Point) -> None:
        found[number] = point
        progress()

    await measure_on_ray(config, dict(enumerate(shards)), done, workers=room_for_workers(config))
    return _joined(shards, found)


def evaluate_kept(
    config: Config, folders: Mapping[str, Path], kept: ShardFolder, report: Callable[[str, Point], None]
) -> dict[str, list[Point]]:
    """Points of each folder's policy, for `diffpo eval`: shard by shard, those that are kept already left out.

    With one worker (`rollout.actors`) it is this process, else there are as many on the Ray of the configuration or of
    `RAY_ADDRESS`, or on one that is started for it.

    Args:
        config: the configuration.
        folders: policies by name.
        kept: where finished shards are, and are put.
        report: called with policy and point of each setting once all of its shards are there.

    Raises:
        UserError: when Ray cannot be reached, or has too few CPUs.
        RunError: as `measure_on_ray`.
    """
    shards = shards_of(config, folders, config.evaluation.shard_prompts)
    read = {number: kept.read(number, shard) for number, shard in enumerate(shards)}
    found = {number: point for number, point in read.items() if point is not None}
    each = -(-config.evaluation.prompts // config.evaluation.shard_prompts)  # shards of a setting

    def tell(number: int) -> None:
        first = number - number % each
        parts = [found[one] for one in range(first, first + each) if one in found]
        if len(parts) == each:
            report(shards[number].name, Point.joined(parts))

    def done(number: int, point: Point) -> None:
        kept.write(number, point)
        found[number] = point
        tell(number)

    for number in range(0, len(shards), each):
        tell(number)
    missing = {number: shard for number, shard in enumerate(shards) if number not in found}
    if config.rollout.actors == 1:
        measure_here(config, missing, done)
    elif missing:
        _connect(config)
        try:
            asyncio.run(measure_on_ray(config, missing, done, workers=config.rollout.actors))
        finally:
            ray.shutdown()
    return _joined(shards, found)


def _connect(config: Config) -> None:
    address = chosen_address(config.run.ray_address)
    connect(address, way_out="start it (`ray start --head`), correct run.ray_address, or leave it out for a local one")
    actors, cpus, room = config.rollout.actors, config.rollout.cpus, room_for_workers(config)
    if actors > room and address == LOCAL:
        ray.shutdown()
        raise UserError(
            f"{actors} evaluation workers x {cpus:g} CPUs (rollout.cpus), {config.rollout.gpus:g} GPUs (rollout.gpus) "
            f"exceed this machine, which has room for {room}; give --actors {room}"
        )


def _joined(shards: list[Shard], found: Mapping[int, Point]) -> dict[str, list[Point]]:
    parts: dict[str, list[list[Point]]] = {}
    for number, shard in enumerate(shards):
        settings = parts.setdefault(shard.name, [])
        if shard.prompts.start == 0:
            settings.append([])
        settings[-1].append(found[number])
    return {name: [Point.joined(points) for points in settings] for name, settings in parts.items()}


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
