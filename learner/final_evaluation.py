"""Final evaluation: policies on the same held-out prompts, by workers side by side, and the results table."""

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.evaluation import Point
from actors.frontier import area, gain
from common.config import IN_RAY_JOB, Config
from common.errors import UserError
from common.place import Place
from learner.evaluation_fleet import Shard, measure_here, measure_on_ray, room_for_workers, shards_of
from learner.evaluation_record import Points, ShardFolder
from learner.ray_connection import LOCAL, chosen_address, connect

DATA = ("data", "validation_data", "test_data", "file")  # keys of a task's section that hold paths


class Evaluation:
    """Shards of policies by settings: what was found, kept on disk at once, and what is missing."""

    def __init__(
        self,
        config: Config,
        folders: Mapping[str, str],
        kept: ShardFolder,
        report: Callable[[str, Point], None] = lambda name, point: None,
    ) -> None:
        """
        Args:
            config: the configuration.
            folders: policies by name.
            kept: where finished shards are, and are put.
            report: called with policy and point of each setting once all of its shards are there.
        """
        self._config = config
        self._kept = kept
        self._report = report
        self._shards = shards_of(config, folders, config.evaluation.shard_prompts)
        self._each = -(-config.evaluation.prompts // config.evaluation.shard_prompts)  # shards of a setting
        read = {number: kept.read(number, shard) for number, shard in enumerate(self._shards)}
        self._found = {number: point for number, point in read.items() if point is not None}

    async def on_ray(self, *, workers: int, listener: Any = None) -> dict[str, list[Point]]:
        """Points of each policy, by workers of the Ray that this process is connected to; `listener` and raises as
        those of `measure_on_ray`."""
        await measure_on_ray(self._config, self._missing(), self._done, workers=workers, listener=listener)
        return self._points()

    def run(self) -> dict[str, list[Point]]:
        """Points of each policy, for a command: with one worker (`rollout.actors`) it is this process, else there are
        as many on the Ray of the configuration or of `RAY_ADDRESS`, or on one that is started for it.

        Raises:
            UserError: when Ray cannot be reached, or has too few CPUs.
            RunError: as `measure_on_ray`.
        """
        for number in range(0, len(self._shards), self._each):
            self._tell(number)
        if self._config.rollout.actors == 1:
            measure_here(self._config, self._missing(), self._done)
        elif self._missing():
            self._config, self._shards = _from_anywhere(self._config, self._shards)
            _connect(self._config)
            try:
                asyncio.run(self.on_ray(workers=self._config.rollout.actors))
            finally:
                ray.shutdown()
        return self._points()

    def _missing(self) -> dict[int, Shard]:
        return {number: shard for number, shard in enumerate(self._shards) if number not in self._found}

    def _done(self, number: int, point: Point) -> None:
        self._kept.write(number, point)
        self._found[number] = point
        self._tell(number)

    def _tell(self, number: int) -> None:
        first = number - number % self._each
        parts = [self._found[one] for one in range(first, first + self._each) if one in self._found]
        if len(parts) == self._each:
            self._report(self._shards[number].name, Point.joined(parts))

    def _points(self) -> dict[str, list[Point]]:
        settings: dict[str, list[Point]] = {}
        for first in range(0, len(self._shards), self._each):
            parts = [self._found[number] for number in range(first, first + self._each)]
            settings.setdefault(self._shards[first].name, []).append(Point.joined(parts))
        return settings


def _from_anywhere(config: Config, shards: list[Shard]) -> tuple[Config, list[Shard]]:
    """The same with absolute paths: workers of a Ray that others started work in other folders than this process.

    Inside a Ray job they stay: there all work in copies of one folder, Ray's `working_dir`.
    """
    if IN_RAY_JOB in os.environ:
        return config, shards
    task = {key: value for key, value in config.task if key in DATA and value in config.task.files}
    absolute = {key: str(Path(value).absolute()) for key, value in task.items()}
    config = config.model_copy(update={"task": config.task.model_copy(update=absolute)})
    return config, [replace(shard, folder=Place(shard.folder).name) for shard in shards]


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
