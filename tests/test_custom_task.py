"""A user's own task: what docs/tasks.md shows works, and what is wrong with an object is one line."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from actors.reward_pool import RewardError, RewardPool, score
from common.config import Config, RolloutConfig
from common.config_file import load_config
from common.errors import UserError
from common.tasks import build_task, check_task
from common.tasks.custom import CustomTask
from learner.evaluation_file import with_file
from learner.preflight import preflight

DOCS = Path(__file__).parents[1] / "docs/tasks.md"
MODULE = """
from common.tasks import SudokuConfig, SudokuTask, Task
LIMIT = 3
asked = []
def noted(completion, question):
    asked.append((question, completion))
    return float(len(completion))
def short(completion, ground_truth):
    return len(completion) <= LIMIT and completion == ground_truth
def no_completion(question): return 1.0
def unknown(completion, answer_key): return 1.0
def text(completion): return "good"
def raises(completion): raise KeyError("lost")
def anything(**given): return sorted(given) == ["completion", "ground_truth", "question"]
def optional(completion, *, scale=2): return scale
def no_task(config): return config
def bad_factory(config): raise ValueError("no options")
def two(config, more): return config
def endless(config): return SudokuTask(SudokuConfig())
class Unfinished(Task): pass
class Plain: pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a user's modules and data; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    (tmp_path / "own_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("def reward(:\n")
    (tmp_path / "needy_rewards.py").write_text("import no_such_package\n")
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def configured(*overrides: str) -> Config:
    return load_config(None, ["task.name=custom", "task.data=data.jsonl", *overrides])


def scored(config: Config, completion: str) -> Any:
    task = build_task(config.task)
    pool, outcome = RewardPool(task, RolloutConfig()), SimpleQueue()
    try:
        pool.submit(task.example("train", 0), [completion], outcome.put)
        return outcome.get(timeout=60)
    finally:
        pool.close()


def test_a_reward_function_is_a_task(folder: Path) -> None:
    config = configured("task.reward=own_rewards:short", "task.prompt='Say {question}'")
    check_task(config.task)
    task = build_task(config.task)
    example = task.example("train", 3)
    answer = example.fields["answer"]
    assert example.prompt == f"Say {answer}?"
    assert task.rewards(example, answer) == {"reward": 1.0}
    assert task.rewards(example, answer + "xxx") == {"reward": 0.0}
    assert (task.correct(example, answer), task.correct(example, "")) == (True, False)
    assert task.demonstration(example, 0) == answer
    assert task.size("train") is None
    right = scored(config, build_task(config.task).example("train", 0).fields["answer"])
    assert right[0].correct is True


def test_a_reward_is_called_once_for_each_completion(folder: Path) -> None:
    task = build_task(configured("task.reward=own_rewards:noted", "task.correct_from=2").task)
    first, second = task.posed("1?", 1), task.posed("2?", 1)
    found = score(task, first, ["a", "bb", "a"]) + score(task, second, ["a"])
    assert [(one.rewards["reward"], one.correct) for one in found] == [(1, False), (2, True), (1, False), (1, False)]
    assert sys.modules["own_rewards"].asked == [("1?", "a"), ("1?", "bb"), ("1?", "a"), ("2?", "a")]


@pytest.mark.parametrize(("name", "reward"), [("anything", 1.0), ("optional", 2.0)])
def test_a_reward_takes_what_it_names(folder: Path, name: str, reward: float) -> None:
    task = build_task(configured(f"task.reward=own_rewards:{name}").task)
    assert task.rewards(task.posed("1?", 1), "1") == {"reward": reward}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.reward=no_rewards:short", "no module 'no_rewards' in"),
        ("task.reward=own_rewards.sub:short", "no module 'own_rewards.sub'"),
        ("task.reward=own_rewards:shot", "has no 'shot'; did you mean short?"),
        ("task.reward=own_rewards:LIMIT", "is a int and cannot be called"),
        ("task.reward=own_rewards:no_completion", "does not take the completion; give a function such as"),
        ("task.reward=own_rewards:unknown", "takes 'answer_key', which is none of completion, question, ground_truth"),
        ("task.reward=broken_rewards:reward", "importing broken_rewards failed (SyntaxError: invalid syntax"),
        ("task.reward=needy_rewards:reward", "importing needy_rewards failed (No module named 'no_such_package')"),
        ("task.reward=os:system", "takes 'command', which is none of"),
        ("task.factory=own_rewards:Plain", "is no subclass of common.tasks.task.Task"),
        ("task.factory=own_rewards:Unfinished", "does not define correct, demonstration, example, rewards"),
        ("task.factory=own_rewards:two", "cannot be called with the configuration alone (missing a required argument"),
    ],
)
def test_a_wrong_object_is_one_line_before_anything_starts(folder: Path, override: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_task(configured(override).task)
    message = str(caught.value)
    assert told in message
    assert override.partition(":")[0] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "name one of them, as module:object"),
        (["task.reward=a:b", "task.factory=a:c"], "name one of them, as module:object"),
        (["task.reward=a.b"], "task.reward: 'a.b' is refused; it takes module:object, such as "),
        (["task.reward=a:b", "task.prompt=Go"], "does not say where the question goes"),
        (["task.reward=a:b", "task.reward_weights={correctness: 1}"], "'correctness' is unknown; give one of reward"),
    ],
)
def test_a_wrong_section_is_refused(folder: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(*overrides)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [("no_task", "returned a CustomConfig; return an instance of"), ("bad_factory", "failed (ValueError: no options)")],
)
def test_a_factory_that_builds_no_task_is_one_line(folder: Path, name: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        build_task(configured(f"task.factory=own_rewards:{name}").task)
    assert told in str(caught.value)


@pytest.mark.parametrize("all_rows", [True, False])
def test_a_file_to_evaluate_that_the_task_would_not_read_is_refused(folder: Path, all_rows: bool) -> None:
    own = configured("task.factory=own_rewards:endless", "task.reward_weights={cells: 1}")
    with pytest.raises(UserError, match=r"--file data\.jsonl: the task of task\.factory does not take its"):
        with_file(own, Path("data.jsonl"), all_rows=all_rows)
    config = configured("task.reward=own_rewards:short", "task.data=null")
    read = with_file(config, Path("data.jsonl"), all_rows=all_rows)
    assert (read.evaluation.prompts == 20) == all_rows


@pytest.mark.parametrize(
    ("name", "told"),
    [("text", "returned 'good', a str; return a number"), ("raises", "reward raised KeyError: 'lost'")],
)
def test_a_reward_that_returns_no_number_costs_its_group(folder: Path, name: str, told: str) -> None:
    found = scored(configured(f"task.reward=own_rewards:{name}"), "1")
    assert isinstance(found, RewardError)
    assert told in str(found)


def blocks() -> list[str]:
    """The Python of docs/tasks.md."""
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_the_configuration_of_the_docs_is_one(folder: Path) -> None:
    text, _ = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (folder / "run.yaml").write_text(text)
    config = load_config(folder / "run.yaml", ["task.name=gsm8k", "task.data=gsm8k/main"])
    assert (config.run.name, config.sampler.max_prompt_tokens) == ("first", 512)


def test_the_reward_of_the_docs_works(folder: Path) -> None:
    (folder / "my_rewards.py").write_text(blocks()[0])
    task = build_task(configured("task.reward=my_rewards:reward").task)
    assert isinstance(task, CustomTask)
    example = task.posed("6 times 7?", "42")
    assert task.rewards(example, "it is 42") == {"reward": 1.0}
    assert 0 < task.rewards(example, "it is 42, " + "indeed " * 200)["reward"] < 1.0
    assert task.rewards(example, "it is 41") == {"reward": 0.0}


def test_the_task_of_the_docs_works(folder: Path) -> None:
    (folder / "my_task.py").write_text(blocks()[1])
    config = configured(
        "task.factory=my_task:ReverseTask", "task.options={letters: 3}", "task.reward_weights={right: 1, length: 0.1}"
    )
    check_task(config.task)
    task = build_task(config.task)
    splits = [{task.example(split, index).prompt for index in range(200)} for split in ("train", "validation", "test")]
    assert all(splits)
    assert not splits[0] & splits[1] | splits[0] & splits[2] | splits[1] & splits[2]
    example = task.example("train", 0)
    assert task.example("train", 0) == example
    right = task.demonstration(example, 0)
    assert task.rewards(example, right) == {"right": 1.0, "length": 1.0}
    assert task.correct(example, right)
    assert not task.correct(example, right[1:])
    assert set(example.prompt + right) <= set(task.alphabet)
    assert scored(config, right)[0].rewards["reward"] == pytest.approx(1.1)
    with pytest.raises(
        UserError, match=r"task.reward_weights: reward component 'reward' is unknown; give one of right"
    ):
        build_task(configured("task.factory=my_task:ReverseTask").task)


def test_the_run_of_the_docs_task_passes_every_check(folder: Path) -> None:
    (folder / "my_task.py").write_text(blocks()[1])
    _, text = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (folder / "reverse.yaml").write_text(text)
    assert preflight(load_config(folder / "reverse.yaml", [])).name == "reverse"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("    alphabet = ", "    letters_ = "), "has no `alphabet`"),
        (("return example.fields", "return example.answers"), r"my_task\.py:\d+ \(AttributeError: .*answers"),
        (("        first = {", "        first = {}[split] or {"), r"my_task\.py:\d+ \(KeyError: "),
    ],
)
def test_a_task_that_does_not_work_is_one_line_with_the_place(folder: Path, change: tuple[str, str], told: str) -> None:
    (folder / "my_task.py").write_text(blocks()[1].replace("self.alphabet", "'abc'").replace(*change))
    _, text = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (folder / "reverse.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        preflight(load_config(folder / "reverse.yaml", []))
