"""Evaluation fleet: workers that answer shards of prompts, in this process or as Ray actors side by side.

- A shard is one policy, one setting and some prompts. How prompts are cut into shards does not depend on the number of
  workers, and every draw is keyed by its prompt, so neither does what they find.
- A worker holds one policy at a time. One that dies is started again, within `rollout.max_restarts`, and its shard is
  done again, by whoever is free.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster_state import living_nodes
from actors.evaluation import Evaluator, Point, Setting, standard_settings
from actors.failure import FailureKind, cause_line, failure_kind
from actors.placement import Demand
from common.config import Config
from common.errors import RunError, UserError, one_line
from common.policy_loading import load_policy, on_cpu
from common.tasks import build_task

Done = Callable[[int, Point], None]
TELL_SECONDS = 1.0  # between two words of a worker on what it does


@dataclass(frozen=True)
class Shard:
    """What a worker does at a time."""

    name: str
    """Of the policy, e.g. before, after."""
    folder: str
    """Its path or URI."""
    setting: Setting
    prompts: range


def shards_of(config: Config, folders: Mapping[str, str], size: int) -> list[Shard]:
    """All shards of an evaluation, of at most `size` prompts; those of one policy stand together."""
    prompts = config.evaluation.prompts
    return [
        Shard(name, folder, setting, range(start, min(start + size, prompts)))
        for name, folder in folders.items()
        for setting in standard_settings(config)
        for start in range(0, prompts, size)
    ]


class EvaluationWorker:
    """Measures shards, one after the other, until `close`."""

    def __init__(self, config: Config, tell: Callable[[str], Any] = lambda doing: None) -> None:
        """`tell` is called with what is being done, now and then, as long as it goes on."""
        self._config = config
        self._task = build_task(config.task)
        self._folder: str | None = None
        self._evaluator: Evaluator | None = None
        self._tell = tell
        self._told = 0.0
        torch.set_num_threads(config.rollout.threads)

    def ready(self) -> None:
        """Answers once the worker is there."""

    def measure(self, shard: Shard) -> Point:
        """Raises UserError, RunError: when the policy cannot be loaded, or the evaluation is hopeless."""
        if self._evaluator is None or self._folder != shard.folder:
            self.close()
            self._tell(f"loads policy {shard.name}")
            config, chosen = self._config, self._config.evaluation
            policy = load_policy(
                shard.folder, on_cpu(config).model, config.sampler.threshold
            )  # narrowed before it moves
            policy = policy.for_rollout(config.rollout).to(config.model.device)
            self._evaluator = Evaluator(policy, self._task, config, prompts=chosen.prompts, split=chosen.split)
            self._folder = shard.folder

        def progress(doing: str) -> None:
            if time.monotonic() - self._told >= TELL_SECONDS:
                self._told = time.monotonic()
                self._tell(f"{shard.name}: {shard.setting.name}: {doing}")

        return self._evaluator.measure(shard.setting, prompts=shard.prompts, progress=progress)

    def close(self) -> None:
        """Stop the reward processes and let go of the policy."""
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None


def measure_here(config: Config, shards: Mapping[int, Shard], done: Done) -> None:
    """All shards, in this process; `done` is called with the number of each."""
    worker = EvaluationWorker(config)
    try:
        for number, shard in shards.items():
            done(number, worker.measure(shard))
    finally:
        worker.close()


async def measure_on_ray(
    config: Config, shards: Mapping[int, Shard], done: Done, *, workers: int, listener: Any = None
) -> None:
    """All shards, by actors of the Ray that this process is connected to; `done` is called with the number of each.

    Args:
        config: the run's configuration; `rollout` says what a worker reserves, and how often one may die.
        shards: what to measure, by number.
        done: called in this process.
        workers: how many; those that find no room in the cluster wait, and the others do their part.
        listener: an actor whose `evaluating(worker, doing)` hears what each of them does, and nothing of one that is
            gone; None is nobody.

    Raises:
        UserError, RunError: as `EvaluationWorker.measure`; RunError when a worker dies too often.
    """
    waiting: asyncio.Queue[int] = asyncio.Queue()
    for number in shards:
        waiting.put_nowait(number)
    missing = len(shards)
    ended = asyncio.Event()

    async def work(place: int) -> None:
        nonlocal missing
        deaths, number, most = 0, None, config.rollout.max_restarts
        while True:
            worker = _start(config, partial(_tell, listener, place) if listener is not None else None)
            try:
                await worker.ready.remote()
                while True:
                    number = await waiting.get()
                    done(number, await worker.measure.remote(shards[number]))
                    number = None
                    missing -= 1
                    if not missing:
                        ended.set()
            except RayTaskError as error:
                known = isinstance(error.cause, UserError | RunError)
                raise (error.cause if known else RunError(f"evaluation: {one_line(error.cause)}")) from error
            except RayError as error:
                deaths += 1
                _check_death(error, deaths, most)
                if number is not None:
                    waiting.put_nowait(number)
                    number = None
            finally:
                if listener is not None:
                    listener.evaluating.remote(place, "")
                with suppress(RayError):
                    ray.kill(worker)

    if not shards:
        return
    everyone = [asyncio.create_task(work(place)) for place in range(min(workers, len(shards)))]
    over = asyncio.create_task(ended.wait())
    try:
        await asyncio.wait([*everyone, over], return_when=asyncio.FIRST_COMPLETED)
        for one in everyone:
            if one.done():
                one.result()  # raises: nobody returns
    finally:
        over.cancel()
        for one in everyone:
            one.cancel()
        await asyncio.gather(*everyone, return_exceptions=True)


def _check_death(error: RayError, deaths: int, most: int) -> None:
    """Raises RunError unless the worker that died may be started again."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        raise RunError(f"an evaluation worker cannot start: {cause_line(error)}") from error
    if failure_kind(error) is not FailureKind.INFRASTRUCTURE or deaths > most:
        raise RunError(
            f"an evaluation worker died {deaths} times (rollout.max_restarts={most}); the last: {one_line(error)}"
        ) from error


def _tell(listener: Any, place: int, doing: str) -> None:
    listener.evaluating.remote(place, doing)


def _start(config: Config, tell: Callable[[str], None] | None) -> Any:
    options = Demand.of(config.rollout).options() | {"max_restarts": 0}
    given = (config,) if tell is None else (config, tell)
    return ray.remote(EvaluationWorker).options(**options).remote(*given)


def room_for_workers(config: Config) -> int:
    """How many workers the nodes with the labels of rollout actors have room for, at least 1."""
    demand = Demand.of(config.rollout)
    rooms = [node.room(demand) for node in living_nodes()]
    return max(1, sum(rooms))
