"""LearnerLives: the learner of a run, started again when it dies, up to `learner.max_restarts` times."""

from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.failure import DEATHS, FailureKind, cause_line, failure_kind
from common.config import Config
from common.errors import RunError, one_line
from learner.capacity import Capacity
from learner.event_log import EventLog
from learner.learner_ranks import LearnerRanks
from learner.parts import Parts
from learner.reply import reply_of

UnlessStopped = Callable[[Awaitable[LearnerRanks]], Awaitable[LearnerRanks | None]]


def buffer_death(config: Config, error: RayError) -> RunError:
    """What ends a run whose replay buffer is gone: it could not start, or died too often."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return RunError(f"the replay buffer cannot start: {cause_line(error)}")
    most = config.replay.max_restarts
    return RunError(
        "the replay buffer died (killed, or out of memory) and does not come back "
        f"(replay.max_restarts={most}): {cause_line(error)}"
    )


class LearnerLives:
    """Owned by the controller; one life at a time, each from the newest checkpoint."""

    def __init__(
        self,
        config: Config,
        directory: str,
        parts: Parts,
        capacity: Capacity,
        events: EventLog,
        *,
        progress: Callable[[], None],
    ) -> None:
        """`capacity` has its place; `progress` is called when another life begins."""
        self._config, self._directory, self._parts = config, directory, parts
        self._capacity, self._events, self._progress = capacity, events, progress
        self._ranks: LearnerRanks | None = None
        self.deaths = 0

    async def start(self) -> LearnerRanks:
        """A learner with the weights of the warm start; again, should it die over them.

        Raises:
            RunError: when it cannot start, or dies too often.
        """
        while True:
            controller = ray.get_runtime_context().current_actor
            self._ranks = ranks = LearnerRanks(
                self._config, self._directory, self._parts, controller, self._capacity.group
            )
            try:
                await ranks.warm_start()
                return ranks
            except DEATHS as error:
                await self.died(error)

    async def learn(self, buffer: Any, unless_stopped: UnlessStopped) -> dict[str, float] | None:
        """Steps and version reached by the learner that was started; again from the newest checkpoint, should it die.
        None when the run is stopped while there is none.

        Args:
            buffer: the replay buffer.
            unless_stopped: awaits another learner, or gives None when a stop comes first.

        Raises:
            RunError: as `start`, and when the buffer is what died.
        """
        ranks = self._ranks or await self.start()
        while True:
            try:
                return await ranks.run(buffer)
            except DEATHS as error:
                await self.died(error)
            ranks = await unless_stopped(self.start())
            if ranks is None:
                return None

    async def died(self, error: RayError) -> None:
        """Raises RunError unless another learner may be started."""
        if isinstance(error, RayTaskError):  # the learner lives, and raises what it saw
            raise buffer_death(self._config, error) from error
        if failure_kind(error) is not FailureKind.INFRASTRUCTURE:
            raise RunError(f"the learner cannot start: {cause_line(error)}") from error
        most = self._config.learner.max_restarts
        self.deaths += 1
        if self.deaths > most:
            raise RunError(
                f"the learner died {self.deaths} times (learner.max_restarts={most}); the last: {one_line(error)}"
            ) from error
        self._progress()
        await self._events.warn(f"the learner died and is started again: {one_line(error)}")

    async def doing(self) -> dict[str, Any]:
        """For the watchdog and for `status`: what each rank does; nothing while there is no learner."""
        calls = self._ranks.doing() if self._ranks is not None else {}
        return {name: await reply_of(call) for name, call in calls.items()}

    def end(self) -> None:
        """Kill the learner that is there."""
        if self._ranks is not None:
            self._ranks.kill()
            self._ranks = None
