"""LearnerRanks: the actors that a learner consists of, as the controller sees them: one, or one for each rank.

- Rank 0 is the `LearnerActor`, which buffer and controller talk to. The others obey it (`learner.ranked_trainer`)
  and run until it ends.
- They have a placement group of their own, made before any rollout actor starts and kept from life to life, so that
  the fleet never takes their place.
- They live and die together: when one dies, or raises, the others are killed at once, whatever they wait for, and the
  controller starts all of them again from the newest checkpoint.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster_state import why_waiting
from actors.failure import DEATHS, FailureKind, failure_kind
from actors.placement import Demand
from common.config import Config, LearnerConfig
from common.errors import UserError
from learner.learner_actor import LearnerActor
from learner.parts import Parts
from learner.rank_actor import RankActor

T = TypeVar("T")

CAUSE_SECONDS = 5.0  # a rank that died makes the others fail, maybe sooner than Ray tells
NODE_SECONDS = 60.0  # for Ray to find that a node is gone
# Where cores are shared, OpenMP threads that spin while they wait take the time of those who work.
PATIENT_THREADS = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}


def reserved(config: LearnerConfig) -> PlacementGroup | None:
    """A bundle for each rank, near each other; asked for, maybe not there yet. None for ranks that reserve nothing."""
    bundle = {kind: count for kind, count in (("CPU", config.cpus), ("GPU", config.gpus)) if count}
    if not bundle:
        return None
    return placement_group(
        [bundle] * config.ranks, strategy="PACK", bundle_label_selector=[dict(config.labels)] * config.ranks
    )


def unplaced(group: PlacementGroup | None, config: LearnerConfig) -> str:
    """What the learner waits for, as long as it has no nodes; empty once it has."""
    if group is None or placement_group_table(group)["state"] == "CREATED":
        return ""
    return why_waiting(Demand.of(config))


class LearnerRanks:
    """Owned by the controller; one life of the learner."""

    def __init__(
        self, config: Config, directory: str, parts: Parts, controller: Any, group: PlacementGroup | None
    ) -> None:
        """`group` is that of `reserved`."""

        def options(rank: int) -> dict[str, Any]:
            own: dict[str, Any] = {"max_concurrency": 2, "runtime_env": PATIENT_THREADS}
            demand = Demand.of(config.learner)
            if group is None:
                return own | demand.options()
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            return own | {"num_cpus": demand.cpus, "num_gpus": demand.gpus, "scheduling_strategy": place}

        make = parts.trainer if config.learner.ranks == 1 else parts.ranked_trainer
        if make is None:
            raise UserError(f"learner.ranks={config.learner.ranks}: simulated learners have one; set learner.ranks=1")
        self._first: Any = (
            ray.remote(LearnerActor)
            .options(**options(0))
            .remote(config=config, directory=directory, controller=controller, make=make)
        )
        self._others: list[Any] = [
            ray.remote(RankActor).options(**options(rank)).remote(config=config, rank=rank)
            for rank in range(1, config.learner.ranks)
        ]
        self._followed = [asyncio.ensure_future(_answer(other.follow.remote())) for other in self._others]

    async def warm_start(self) -> None:
        """Make or load the weights that training starts from."""
        if self._others:
            await self._together(self._first.lead.remote(self._others))
        await self._together(self._first.warm_start.remote())

    async def run(self, buffer: Any) -> dict[str, float]:
        """The learner's loop; steps and version reached."""
        return await self._together(self._first.run.remote(buffer))

    def doing(self) -> dict[str, Any]:
        """Calls that ask each rank what it does."""
        found = {"learner": self._first.doing.remote()}
        return found | {f"learner rank {n}": other.doing.remote() for n, other in enumerate(self._others, 1)}

    def kill(self) -> None:
        """End all ranks."""
        for follower in self._followed:
            follower.cancel()
        for actor in [self._first, *self._others]:
            ray.kill(actor)

    async def _together(self, call: Awaitable[T]) -> T:
        """Rank 0's answer. Raises what ended one of the ranks; a death rather than what followed from it."""
        first = asyncio.ensure_future(_answer(call))
        pending = {first, *(one for one in self._followed if not one.done())}
        while not first.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(one.exception() is not None for one in done):
                break
        if first.done() and first.exception() is None:
            return first.result()
        everyone = [first, *self._followed]
        until = time.monotonic() + (NODE_SECONDS if any(map(_lost_another, _errors(everyone))) else CAUSE_SECONDS)
        while pending and not any(map(_is_death, _errors(everyone))) and (left := until - time.monotonic()) > 0:
            _, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        errors = _errors(everyone)
        self.kill()
        raise min(errors, key=lambda error: (not _is_death(error), _is_told(error)))


def _errors(calls: Sequence[asyncio.Future[Any]]) -> list[BaseException]:
    return [error for call in calls if call.done() and (error := call.exception()) is not None]


async def _answer(call: Awaitable[T]) -> T:
    return await call


def _lost_another(error: BaseException) -> bool:
    """Whether a rank failed since another did not answer: an order to it, or a collective call."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    words = str(cause).lower()
    return isinstance(cause, DEATHS) or any(word in words for word in ("gloo", "nccl", "connection closed"))


def _is_told(error: BaseException) -> bool:
    """Whether it is what one rank says of another's end, which that one knows better."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, DEATHS)


def _is_death(error: BaseException) -> bool:
    return failure_kind(error) is FailureKind.INFRASTRUCTURE
