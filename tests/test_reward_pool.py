"""Rewards in processes of their own: scores arrive, and whatever goes wrong costs its group and names its cause."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import pytest
from misbehaving_task import ALPHABET, ON_PROMPTS, BrokenTask, HangingTask, LockedTask, MisbehavingTask

from actors.evaluation import Evaluator, Setting
from actors.group_producer import GroupProducer
from actors.producer import Fault
from actors.reward_pool import RewardError, RewardPool, Score, score
from common.config import Config, ModelConfig, RolloutConfig, ThresholdConfig
from common.errors import RunError
from common.lease import Lease
from common.policy_loading import build_policy
from common.tasks import CountdownTask, SudokuConfig, SudokuTask

PATIENCE = 30.0
TIMEOUT, MEMORY = 2.0, 64 * 2**20
LIMITS = RolloutConfig(reward_timeout=TIMEOUT, reward_memory_bytes=MEMORY)
WEIGHTS = {"cells": 2.0, "exact": 0.5}
TASK = MisbehavingTask(SudokuConfig(reward_weights=WEIGHTS))
EXAMPLE = TASK.example("train", 7)
SOLUTION = EXAMPLE.fields["solution"]
RIGHT = Score({"cells": 1.0, "exact": 1.0, "reward": 2.5}, True)
WRONG = Score({"cells": 0.0, "exact": 0.0, "reward": 0.0}, False)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    opened = RewardPool(TASK, LIMITS)
    yield opened
    opened.close()


def scored(pool: RewardPool, completions: list[str]) -> Any:
    """What `done` is called with."""
    outcome: SimpleQueue[Any] = SimpleQueue()
    pool.submit(EXAMPLE, completions, outcome.put)
    return outcome.get(timeout=PATIENCE)


def alive(pid: int) -> bool:
    return any(child.pid == pid for child in multiprocessing.active_children())


def failure(pool: RewardPool, *completions: str) -> str:
    """How a group fails, in full; the next one is scored."""
    found = scored(pool, list(completions))
    assert isinstance(found, RewardError)
    assert "\n" not in str(found)
    assert scored(pool, [SOLUTION, ""]) == [RIGHT, WRONG]
    return "".join(traceback.format_exception(found))


def test_a_group_is_scored_as_in_this_process(pool: RewardPool) -> None:
    assert scored(pool, [SOLUTION, ""]) == [RIGHT, WRONG] == score(TASK, EXAMPLE, [SOLUTION, ""])
    assert scored(pool, []) == []


def test_more_than_a_pipe_holds_is_scored() -> None:
    limits = LIMITS.model_copy(update={"reward_timeout": PATIENCE})  # it may take long on a busy machine
    pool = RewardPool(TASK, limits)
    many = ["1234" * 50_000] * 8
    try:
        assert scored(pool, many) == score(TASK, EXAMPLE, many)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("string", "reward 'cells' of completion 1 is 'much', not a number; mend the reward function"),
        ("none", "reward 'exact' of completion 1 is None, not a number"),
        ("nan", "reward 'cells' of completion 1 is nan, which is not finite"),
        ("huge", "reward 'cells' of completion 1 is inf, which is not finite"),
        ("array", "reward 'cells' of completion 1 is array([1., 1., 1.]), not a number"),
        ("list", "rewards of completion 1 are [1.0, 1.0]; return a number for each of cells, exact"),
        ("short", "rewards of completion 1 are {'cells': 1.0}; return a number for each of cells, exact"),
        ("verdict", "correct of completion 1 is 'perhaps'; return True or False"),
    ],
)
def test_nonsense_is_named(pool: RewardPool, what: str, said: str) -> None:
    with pytest.raises(ValueError, match="completion 1") as caught:
        score(TASK, EXAMPLE, [SOLUTION, what])
    assert said in str(caught.value)
    told = failure(pool, SOLUTION, what)
    assert f"reward raised ValueError: {said}" in told
    assert "in _score" in told  # with the traceback of the process


def test_a_weighted_sum_that_is_not_finite_is_named() -> None:
    task = SudokuTask(SudokuConfig(reward_weights={"cells": 1.7e308, "exact": 1.7e308}))
    with pytest.raises(ValueError, match="the weighted reward of completion 1 is inf"):
        score(task, EXAMPLE, ["", SOLUTION])


def test_numbers_of_other_types_count() -> None:
    assert [found.rewards for found in score(TASK, EXAMPLE, ["bool", "numpy"])] == [
        {"cells": 1.0, "exact": 0.0, "reward": 2.0},
        {"cells": 0.5, "exact": 0.25, "reward": 1.125},
    ]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "reward raised misbehaving_task.UnpicklableError: 1 and 2"),
        ("silent", "reward raised misbehaving_task.SilentError: <exception str() failed>"),
        ("leave", "reward raised SystemExit: 3"),
    ],
)
def test_an_exception_keeps_its_process(pool: RewardPool, what: str, said: str) -> None:
    [before] = scored(pool, ["pid"])
    told = failure(pool, what)
    assert said in told
    assert "in act" in told
    assert scored(pool, ["pid"]) == [before]


@pytest.mark.parametrize("what", ["memory", "objects", "one array"])
def test_memory_is_limited(pool: RewardPool, what: str) -> None:
    told = failure(pool, what)
    assert f"reward exceeded rollout.reward_memory_bytes={MEMORY}; raise it, or let the reward" in told
    assert "in act" in told


@pytest.mark.parametrize(
    ("what", "said", "traced"),
    [
        ("exit 0", "reward process died: exit code 0", ""),
        ("exit 3", "reward process died: exit code 3", ""),
        ("segfault", "reward process died: signal SIGSEGV", "in act"),
        (
            "killed",
            f"signal SIGKILL (a crash, a kill, or a library that cannot bear rollout.reward_memory_bytes={MEMORY}",
            "",
        ),
    ],
)
def test_a_process_that_dies_says_how(pool: RewardPool, what: str, said: str, traced: str) -> None:
    told = failure(pool, what)
    assert said in told
    assert traced in told


def test_time_is_limited_whatever_the_reward_does(pool: RewardPool) -> None:
    for what in ("hang", "hang deaf"):
        told = failure(pool, what)
        assert "reward exceeded rollout.reward_timeout=2 seconds; raise it, or bound" in told
        assert "in act" in told  # where it hung


def test_a_process_killed_while_idle_or_at_work_is_replaced(pool: RewardPool) -> None:
    [found] = scored(pool, ["pid"])
    os.kill(int(found.rewards["cells"]), signal.SIGKILL)
    until = time.monotonic() + PATIENCE
    while alive(int(found.rewards["cells"])) and time.monotonic() < until:
        time.sleep(0.01)
    assert scored(pool, [SOLUTION]) == [RIGHT]
    [found] = scored(pool, ["pid"])
    outcome: SimpleQueue[Any] = SimpleQueue()
    pool.submit(EXAMPLE, ["hang"], outcome.put)
    time.sleep(0.1)
    os.kill(int(found.rewards["cells"]), signal.SIGKILL)
    assert "reward process died: signal SIGKILL" in str(outcome.get(timeout=PATIENCE))
    assert scored(pool, [SOLUTION]) == [RIGHT]


def test_closing_stops_a_hanging_reward_at_once() -> None:
    outcome: SimpleQueue[Any] = SimpleQueue()
    before = set(multiprocessing.active_children())
    opened = RewardPool(TASK, RolloutConfig(reward_timeout=600, reward_workers=2))
    assert scored(opened, [SOLUTION, SOLUTION]) == [RIGHT, RIGHT]
    for _ in range(4):
        opened.submit(EXAMPLE, ["hang"], outcome.put)
    time.sleep(0.2)
    start = time.monotonic()
    opened.close()
    opened.close()
    assert time.monotonic() - start < 60, "it does not wait for the 600 seconds"
    assert set(multiprocessing.active_children()) <= before
    assert outcome.empty()
    with pytest.raises(RuntimeError, match="closed; open another"):
        opened.submit(EXAMPLE, ["1"], outcome.put)


def test_a_task_that_cannot_cross_or_be_built_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"LockedTask cannot be sent .* \(cannot pickle a lock\); define it at the top"
    ):
        RewardPool(LockedTask(SudokuConfig()), LIMITS)
    broken = RewardPool(BrokenTask(SudokuConfig()), LIMITS)
    try:
        for _ in range(2):
            assert "reward raised LookupError: no data set" in str(scored(broken, [SOLUTION]))
    finally:
        broken.close()


OWNER = """
from queue import SimpleQueue
from actors.reward_pool import RewardPool
from common.config import RolloutConfig
from common.tasks import SudokuConfig
from misbehaving_task import MisbehavingTask

if __name__ == "__main__":
    task, outcome = MisbehavingTask(SudokuConfig()), SimpleQueue()
    pool = RewardPool(task, RolloutConfig(reward_timeout=0.5))
    for what in ("print", "hang deaf"):
        pool.submit(task.example("train", 0), [what], outcome.put)
        outcome.get()
"""


def test_what_a_reward_prints_arrives_and_nothing_outlives_its_owner(tmp_path: Path) -> None:
    """Even if the process dies right after; an owner that forgets to close ends all the same, and so does a child."""
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "said by the reward\n" in done.stdout
    assert "complained of\n" in done.stderr
    child = int(done.stdout.split("child ")[1].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_reward_process_imports_neither_torch_nor_ray() -> None:
    code = "import sys, actors.reward_pool; sys.exit(any(n in sys.modules for n in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_only_built_in_tasks_are_trusted() -> None:
    assert SudokuTask.trusted
    assert CountdownTask.trusted
    assert not MisbehavingTask.trusted  # though it is a sudoku


def evaluator(kind: Callable[[SudokuConfig], SudokuTask], prompts: int, limits: RolloutConfig = LIMITS) -> Evaluator:
    sampler: Any = {"max_prompt_tokens": 32, "max_completion_tokens": 16}
    config = Config(task=SudokuConfig(reward_weights=WEIGHTS), rollout=limits, sampler=sampler)
    model = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32, max_positions=64)
    policy = build_policy(model, ThresholdConfig(), alphabet=ALPHABET, seed=0)
    return Evaluator(policy, kind(SudokuConfig(reward_weights=WEIGHTS)), config, prompts=prompts, split="test")


def test_an_evaluation_loses_the_prompts_whose_reward_fails_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting("chosen", "top_k", 4.0)
    with evaluator(SudokuTask, 12) as sound:
        expected = sound.measure(setting)
        assert sound._pool is None  # built-in tasks are scored in this process
        assert expected.summary()["failed_rewards"] == 0
    with caplog.at_level(logging.WARNING), evaluator(MisbehavingTask, 12) as harmed:
        found = harmed.measure(setting)
        assert harmed._pool is not None
    lost = np.isin(np.arange(12), list(ON_PROMPTS))
    assert found.failed == found.summary()["failed_rewards"] == len(ON_PROMPTS)
    assert not found.correct[lost].any()
    for mine, theirs in [
        (found.reward, expected.reward),
        *zip(found.components.values(), expected.components.values(), strict=True),
    ]:
        np.testing.assert_array_equal(mine, np.where(lost, 0.0, theirs))
    np.testing.assert_array_equal(found.correct, expected.correct & ~lost)
    assert list(found.components) == list(expected.components)
    assert (
        "chosen: the reward of 4 of 12 prompts failed; they count as wrong. Prompt 2: reward exceeded "
        "rollout.reward_timeout=2 seconds"
    ) in caplog.text


def test_an_evaluation_whose_rewards_all_hang_ends_after_a_few() -> None:
    limits = RolloutConfig(reward_timeout=0.1, reward_workers=4)
    with evaluator(HangingTask, 60, limits) as hopeless:
        with pytest.raises(RunError, match=r"ends: 8 rewards in a row took too long, 8 of 60 completions were scored"):
            hopeless.measure(Setting("chosen", "top_k", 16.0))
        assert hopeless._pool is None


def test_a_group_whose_reward_hangs_tells_where_and_on_the_last_line_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.group_producer.build_task", lambda config: HangingTask(config))
    sampler: Any = {"max_prompt_tokens": 32, "max_completion_tokens": 16}
    model = ModelConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32, max_positions=64)
    limits = RolloutConfig(reward_timeout=0.1)
    config = Config(task=SudokuConfig(), rollout=limits, sampler=sampler, model=model)
    producer = GroupProducer(config, "one", lambda: None)
    try:
        producer.start(Lease(number=3, cursor=3, attempt=0, version=0, seconds=60.0))
        until = time.monotonic() + PATIENCE
        while not (ended := producer.step()):
            assert time.monotonic() < until
    finally:
        producer.close()
    [fault] = ended
    assert isinstance(fault, Fault)
    assert "misbehaving_task.py" in fault.reason  # where
    assert fault.reason.splitlines()[-1].startswith("RewardTimeout: reward exceeded rollout.reward_timeout=0.1 seconds")
