"""Rewards in processes of their own: scores arrive, and whatever goes wrong arrives as a failure."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Self

import pytest
from pydantic import model_validator

from actors.reward_pool import RewardPool, score_group
from common.tasks import SudokuConfig, SudokuTask

PATIENCE = 30.0


class MisbehavingConfig(SudokuConfig):
    """Reading it in a reward process, where the task is built from it, does what `file` says."""

    @model_validator(mode="after")
    def _misbehave(self) -> Self:
        if multiprocessing.parent_process() is not None:
            if self.file == "hang":
                time.sleep(600)
            if self.file == "die":
                os._exit(3)
        return self


@contextmanager
def opened(config: SudokuConfig, timeout: float = PATIENCE) -> Iterator[RewardPool]:
    pool = RewardPool(config, workers=1, timeout=timeout)
    try:
        yield pool
    finally:
        pool.close()


def score(pool: RewardPool, cursor: int, completions: list[Any]) -> Any:
    """What `done` is called with."""
    outcome: SimpleQueue[Any] = SimpleQueue()
    pool.submit(cursor, completions, outcome.put)
    return outcome.get(timeout=PATIENCE)


def test_a_group_is_scored_and_a_failure_costs_no_more_than_itself() -> None:
    config = SudokuConfig(reward_weights={"cells": 2.0, "exact": 0.5})
    example = SudokuTask(config).example("train", 7)
    solution = example.fields["solution"]
    with opened(config) as pool:
        expected = [{"cells": 1.0, "exact": 1.0, "reward": 2.5}, {"cells": 0.0, "exact": 0.0, "reward": 0.0}]
        assert score(pool, 7, [solution, ""]) == expected
        failure = score(pool, 7, [solution, None])  # not a text: the reward's code raises
        assert isinstance(failure, Exception)
        assert "score_group" in str(failure.__cause__)  # with the traceback of the process
        assert isinstance(score(pool, -1, [solution]), ValueError)
        assert score(pool, 7, []) == []
        assert score(pool, 7, [solution, ""]) == expected


def test_a_reward_that_is_not_finite_is_a_failure() -> None:
    config = SudokuConfig(reward_weights={"cells": 1.7e308, "exact": 1.7e308})  # their sum is infinite
    solution = SudokuTask(config).example("train", 7).fields["solution"]
    with opened(config) as pool:
        failure = score(pool, 7, ["", solution])
        assert isinstance(failure, ValueError)
        assert "'reward': inf} of completion 1 are not finite; mend the reward function" in str(failure)


@pytest.mark.parametrize(("behaviour", "kind"), [("hang", TimeoutError), ("die", Exception)])
def test_a_reward_that_hangs_or_dies_is_a_failure(behaviour: str, kind: type[Exception]) -> None:
    with opened(MisbehavingConfig(file=behaviour), timeout=0.5) as pool:
        start = time.monotonic()
        assert isinstance(score(pool, 0, ["1"]), kind)
        assert isinstance(score(pool, 1, ["1"]), kind)  # and the next one gets a process again
        assert time.monotonic() - start < PATIENCE


def test_closing_stops_a_hanging_reward_at_once() -> None:
    outcome: SimpleQueue[Any] = SimpleQueue()
    pool = RewardPool(MisbehavingConfig(file="hang"), workers=1, timeout=600)
    before = set(multiprocessing.active_children())
    pool.submit(0, ["1"], outcome.put)
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 10
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(RuntimeError):
        pool.submit(0, ["1"], outcome.put)


def test_the_pool_scores_as_the_task_does() -> None:
    config = SudokuConfig()
    task = SudokuTask(config)
    [scored] = score_group(config.model_dump_json(), SudokuConfig, 3, ["1234"])
    components = task.rewards(task.example("train", 3), "1234")
    assert scored == {**components, "reward": task.reward(components)}


def test_a_reward_process_imports_neither_torch_nor_ray() -> None:
    code = "import sys, actors.reward_pool; sys.exit(any(n in sys.modules for n in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
