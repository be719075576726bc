"""Rewards: scored in processes of their own, with a time limit.

- A reward is the task's code and may hang or crash; it costs one group, never an actor.
- Processes are spawned, import neither torch nor ray by themselves, and build the task once.
"""

import math
import multiprocessing
from collections.abc import Callable
from functools import lru_cache

from pebble import ProcessPool

from common.tasks import TaskConfig, build_task
from common.tasks.task import Example, Task

Scores = list[dict[str, float]]


@lru_cache(maxsize=4)
def _task(serialised: str, kind: type[TaskConfig]) -> Task:
    return build_task(kind.model_validate_json(serialised))


def score(task: Task, example: Example, completions: list[str]) -> Scores:
    """Reward components and their weighted sum (`reward`) of each completion of one prompt.

    Raises:
        ValueError: for a reward that is not finite.
    """
    scores = []
    for index, completion in enumerate(completions):
        components = task.rewards(example, completion)
        scores.append({**components, "reward": task.reward(components)})
        wrong = {name: value for name, value in scores[-1].items() if not math.isfinite(value)}
        if wrong:
            raise ValueError(f"rewards {wrong} of completion {index} are not finite; mend the reward function")
    return scores


def score_group(serialised: str, kind: type[TaskConfig], cursor: int, completions: list[str]) -> Scores:
    """The scores of one training prompt, in a reward process."""
    task = _task(serialised, kind)
    return score(task, task.example("train", cursor), completions)


class RewardPool:
    """Owned by one rollout actor; runs until `close`."""

    def __init__(self, config: TaskConfig, *, workers: int, timeout: float) -> None:
        self._arguments = (config.model_dump_json(), type(config))
        self._timeout = timeout
        self._pool = ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn"))

    def submit(self, cursor: int, completions: list[str], done: Callable[[Scores | BaseException], None]) -> None:
        """Score a group; `done` is called from another thread with the scores or the failure."""
        future = self._pool.schedule(score_group, args=(*self._arguments, cursor, completions), timeout=self._timeout)
        future.add_done_callback(lambda f: None if f.cancelled() else done(f.exception() or f.result()))

    def close(self) -> None:
        """Stop the processes at once."""
        self._pool.stop()
        self._pool.join()
