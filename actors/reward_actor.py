"""RewardActor: a reward pool on another node, one for each rollout actor, where `rollout.reward_cpus` is given.

Nodes with GPUs are for generation; what a reward computes may be slow and large and needs none. The actor reserves
CPUs on a node of `rollout.reward_labels`. Should it or its node die, Ray starts it elsewhere and asks again: rewards
have no state.
"""

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.failure import cause_line
from actors.placement import Demand
from actors.reward_pool import Done, RewardError, RewardPool, Scores
from common.config import Config, RolloutConfig
from common.errors import RunError
from common.tasks import Task, TaskConfig, build_task
from common.tasks.task import Example


class RewardActor:
    """Started by the rollout actor that it scores for, and ended with it."""

    def __init__(self, task: TaskConfig, rollout: RolloutConfig) -> None:
        self._pool = RewardPool(build_task(task), rollout)

    def ready(self) -> None:
        """Called by the rollout actor: answers once there is a node for this one."""

    def score(self, example: Example, completions: list[str]) -> Scores:
        """Called by the rollout actor, from as many threads as there are reward processes. Raises RewardError."""
        outcome: SimpleQueue[Scores | Exception] = SimpleQueue()
        self._pool.submit(example, completions, outcome.put)
        found = outcome.get()
        if isinstance(found, Exception):
            raise found
        return found


class DistantRewards:
    """What a `RewardPool` is to its owner, by a reward actor."""

    def __init__(self, config: Config, wake: Callable[[], None]) -> None:
        """`wake` is called, from another thread, once `ready` is true."""
        options = reward_demand(config.rollout).options()
        self._actor: Any = (
            ray.remote(RewardActor)
            .options(**options, max_restarts=-1, max_task_retries=-1, max_concurrency=config.rollout.reward_workers)
            .remote(config.task, config.rollout)
        )
        self.ready = False

        def there(_: Any) -> None:  # or it cannot start, which whoever asks for scores is told
            self.ready = True
            wake()

        self._actor.ready.remote().future().add_done_callback(there)

    def submit(self, example: Example, completions: list[str], done: Done) -> None:
        """Score a group; `done` is called from another thread with the scores or the failure."""
        call = self._actor.score.remote(example, completions)
        call.future().add_done_callback(lambda future: done(_outcome(future.exception(), future.result)))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def rewards_of(config: Config, task: Task, wake: Callable[[], None]) -> RewardPool | DistantRewards:
    """Where a rollout actor has its groups scored; `wake` is called once they can be."""
    return RewardPool(task, config.rollout) if config.rollout.reward_cpus is None else DistantRewards(config, wake)


def reward_demand(rollout: RolloutConfig) -> Demand:
    """Of one reward actor."""
    return Demand(rollout.reward_cpus or 0.0, 0.0, rollout.reward_labels)


def _outcome(error: BaseException | None, result: Callable[[], Scores]) -> Scores | Exception:
    if error is None:
        return result()
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, Exception) else RewardError(str(cause))
    if isinstance(error, RayActorError):  # Ray starts one that dies again, and its calls with it
        return RunError(f"a reward actor cannot start: {cause_line(error)}")
    return error if isinstance(error, Exception) else RewardError(str(error))
