"""Countdown: what is generated, how it is split, and how answers score, d1's own verdicts included."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from common.tasks import SPLITS, CountdownConfig, Example, build_task
from common.tasks.arithmetic import render
from common.tasks.countdown import solve, split_of
from common.tasks.expression import evaluate
from common.tasks.task import boxed_answer

BENCHMARKS = Path(__file__).parents[2] / "shared/benchmarks"
PROBLEMS = BENCHMARKS / "countdown_cd3_test.jsonl"
ANSWERS = BENCHMARKS / "llada_answers/countdown.jsonl"
needs_benchmarks = pytest.mark.skipif(not PROBLEMS.exists(), reason="d1's benchmark files are not beside the checkout")

EXAMPLE = Example("30,100,93=23", {"numbers": [30, 100, 93], "target": 23, "expression": "93+30-100"}, 0.0)

# Rows where our verdict differs from d1's, with the reason; none at present.
DISAGREEMENTS: dict[int, str] = {}


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_generated_problems_are_solved_by_their_expression(numbers: int) -> None:
    task = build_task(CountdownConfig(numbers=numbers))
    for split in SPLITS:
        for example in (task.example(split, index) for index in range(50)):
            fields = example.fields
            assert example.prompt == f"{','.join(map(str, fields['numbers']))}={fields['target']}"
            assert len(fields["numbers"]) == numbers
            assert all(1 <= number <= 99 for number in fields["numbers"])
            assert 1 <= fields["target"] <= 99
            value, used = evaluate(fields["expression"])
            assert value == fields["target"]
            assert sorted(used) == sorted(fields["numbers"])
            assert example.difficulty == sum(fields["expression"].count(operator) for operator in "*/")
            assert set(example.prompt + fields["expression"]) <= set(task.alphabet)
            assert json.loads(json.dumps(fields)) == fields
            assert split_of(fields["numbers"], fields["target"]) == split


def test_all_operators_and_difficulties_are_drawn() -> None:
    task = build_task(CountdownConfig())
    examples = [task.example("train", index) for index in range(300)]
    assert set("+-*/(") <= set("".join(example.fields["expression"] for example in examples))
    assert {example.difficulty for example in examples} == {0.0, 1.0, 2.0}


def test_three_two_digit_numbers_fit_ten_characters() -> None:
    task = build_task(CountdownConfig())
    assert max(len(task.demonstration(task.example("train", index), 0)) for index in range(300)) <= 10


def test_an_index_gives_the_same_example_in_any_task_and_order() -> None:
    first, second = build_task(CountdownConfig()), build_task(CountdownConfig())
    forward = [first.example("train", index) for index in range(20)]
    assert forward == [second.example("train", index) for index in reversed(range(20))][::-1]
    assert forward != [build_task(CountdownConfig(seed=1)).example("train", index) for index in range(20)]
    # Pinned: runs resume across versions of this code only while these hold.
    assert [first.example(split, 0).prompt for split in SPLITS] == PINNED


PINNED = ["26,2,79=51", "2,59,44=17", "19,34,91=38"]


@given(st.permutations([3, 50, 7, 7]), st.integers(1, 99))
def test_the_split_of_a_problem_ignores_the_order_of_its_numbers(numbers: list[int], target: int) -> None:
    assert split_of(numbers, target) == split_of([3, 7, 7, 50], target)


def test_about_a_tenth_is_held_out_for_each() -> None:
    splits = [split_of([number, number + 1, 5], target) for number in range(1, 60) for target in range(1, 60)]
    for split in ("validation", "test"):
        assert abs(splits.count(split) / len(splits) - 0.1) < 0.02


@pytest.mark.parametrize("style", ["compact", "d1"])
def test_careful_demonstrations_are_solutions(style: str) -> None:
    task = build_task(CountdownConfig.model_validate({"prompt_style": style}))
    for index in range(50):
        example = task.example("train", index)
        assert task.rewards(example, task.demonstration(example, index)) == {"answer": 1.0, "exact": 1.0}


def test_careless_demonstrations_use_the_right_numbers() -> None:
    task = build_task(CountdownConfig(careful_fraction=0.0))
    solved = 0
    for index in range(200):
        example = task.example("train", index)
        demonstration = task.demonstration(example, 5)
        assert demonstration == task.demonstration(example, 5)
        answer = task.rewards(example, demonstration)["answer"]
        assert answer in (0.1, 1.0)
        solved += answer == 1.0
    assert 0 < solved < 60


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("93+30-100", 1.0),
        ("30 - (100 - 93)", 1.0),
        ("-100+93+30", 1.0),
        ("93+30-100=23", 1.0),
        ("93+30-100=24", 0.0),
        ("93+30-99", 0.0),
        ("93+30", 0.0),
        ("93+30-100+30-30", 0.0),
        ("93*30-100", 0.1),
        ("93+100-30", 0.1),
        ("93 30 100", 0.0),
        ("9330-100", 0.0),
        ("23", 0.0),
        ("", 0.0),
        ("so 93+30-100", 0.0),
        ("<answer>93+30-100</answer>", 1.0),
        ("<answer>1</answer> <answer>\n93+30-100", 1.0),
        ("93+30-100 <answer></answer>", 0.0),
        (r"<answer> $\boxed{93+30-100}$ </answer>", 1.0),
        (r"\boxed{93+30-100}", 1.0),
        (r"\boxed{1} \boxed{93+30-100} \boxed{93", 1.0),
        (r"\boxed{93+30-100} <answer>\boxed{1}</answer>", 0.0),
        (r"\boxed{93 \times 30 \div 100}", 0.1),
        ("93+30**1-100", 0.0),
        ("9**9**9**9", 0.0),
    ],
)
def test_scores(completion: str, answer: float) -> None:
    task = build_task(CountdownConfig())
    assert task.rewards(EXAMPLE, completion) == {"answer": answer, "exact": float(answer == 1.0)}
    assert task.correct(EXAMPLE, completion) == (answer == 1.0)


def test_d1_style_asks_for_a_tag_or_a_box() -> None:
    task = build_task(CountdownConfig(prompt_style="d1"))
    assert task.answer("93+30-100") == ""
    assert task.correct(EXAMPLE, "<answer>93+30-100</answer>")
    assert "Numbers: [26,2,79]\nTarget: 51" in task.example("train", 0).prompt
    assert task.correct(EXAMPLE, r"\boxed{93+30-100}")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("none", None),
        (r"\boxed{}", ""),
        (r"\boxed{a{b}c} d", "a{b}c"),
        (r"\boxed{a} \boxed{b", "a"),
        (r"\boxed{a} {b} }", "a"),
        (r"\boxed{a \boxed{b} c}", "b"),
        ("boxed{a}", None),
    ],
)
def test_the_last_balanced_box_is_read(text: str, content: str | None) -> None:
    assert boxed_answer(text) == content


@settings(max_examples=50)
@given(st.text(max_size=60) | st.text(alphabet="0123456789+-*/()={}\\boxed ", max_size=60))
def test_no_completion_breaks_the_scorer(completion: str) -> None:
    task = build_task(CountdownConfig())
    assert task.rewards(EXAMPLE, completion)["answer"] in (0.0, 0.1, 1.0)


@pytest.mark.parametrize(
    "hostile", [r"\boxed{" * 50_000, "<answer>" * 50_000, "(" * 300_000, "=" * 300_000, "9" * 300_000]
)
def test_hostile_completions_cost_little(hostile: str) -> None:
    task = build_task(CountdownConfig())
    start = time.process_time()
    assert task.rewards(EXAMPLE, hostile)["answer"] == 0.0
    assert time.process_time() - start < 0.5


def test_solutions_use_as_few_multiplications_as_possible() -> None:
    assert [render(found) for found in [solve([30, 100, 93], 23), solve([2, 2, 4], 4)] if found] == [
        "93+30-100",
        "4+2-2",
    ]
    found = solve([3, 7, 9], 30)
    assert found is not None
    assert render(found) == "3*7+9" or render(found) == "7*3+9"
    assert solve([1, 1, 1], 99) is None


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"target_min": 50, "target_max": 40}, "target_min 50 is above target_max 40"),
        ({"numbers": 5}, "less than or equal to 4"),
        ({"reward_weights": {"cells": 1.0}}, "'cells' is unknown; give one of answer, exact"),
        ({"numbres": 3}, "numbres"),
    ],
)
def test_unusable_settings_are_refused(keys: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CountdownConfig.model_validate(keys)


def test_a_range_without_problems_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"number_max=1, .* widen the targets or raise number_max"):
        build_task(CountdownConfig(numbers=2, number_max=1, target_max=1))


def test_a_file_replaces_the_test_split_only(tmp_path: Path) -> None:
    generated = build_task(CountdownConfig()).example("train", 0)
    numbers = ",".join(map(str, sorted(generated.fields["numbers"])))
    file = tmp_path / "test.jsonl"
    lines = [
        '{"input": "30,100,93", "output": "23"}',
        "",
        f'{{"input": "{numbers}", "output": {generated.fields["target"]}}}',
    ]
    file.write_text("\n".join([*lines, '{"input": "1,1", "output": "99"}\n']))
    task = build_task(CountdownConfig(file=str(file)))
    assert task.size("test") == 3
    assert task.example("test", 0) == EXAMPLE
    assert task.example("train", 0).prompt != generated.prompt  # it is a test problem now
    assert task.example("train", 1) == build_task(CountdownConfig()).example("train", 1)
    unsolvable = task.example("test", 2)
    assert unsolvable.fields["expression"] is None
    with pytest.raises(UserError, match=r"\[1, 1\] make 99 in no way"):
        task.demonstration(unsolvable, 0)
    with pytest.raises(UserError, match=r"test example 3 .* has 3 rows \(0 to 2\)"):
        task.example("test", 3)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (" \n", "is empty"),
        ('{"input": "1,2", "output": "3"}\nnot json\n', "row 2: found 'not json'"),
        ('{"input": "1,2"}\n', "row 1"),
        ("[1]\n", "row 1"),
        ('{"input": [1, 2], "output": "3"}\n', "row 1"),
        ('{"input": "1,x", "output": "3"}\n', "row 1"),
        ('{"input": "1,-2", "output": "3"}\n', "row 1"),
        ('{"input": "1,2,3,4,5", "output": "3"}\n', "2 to 4 positive integers"),
        ('{"input": "5", "output": "5"}\n', "2 to 4 positive integers"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "test.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told) as raised:
        build_task(CountdownConfig(file=str(file)))
    assert str(file) in str(raised.value)


@needs_benchmarks
def test_d1_problems_have_solutions_and_are_never_trained_on() -> None:
    task = build_task(CountdownConfig(file=str(PROBLEMS), number_max=100, target_max=100))
    assert task.size("test") == 256
    for index in range(256):
        example = task.example("test", index)
        assert task.rewards(example, task.demonstration(example, 0))["exact"] == 1.0
        assert set(example.prompt) <= set(task.alphabet)


@needs_benchmarks
def test_agreement_with_d1_on_real_answers() -> None:
    task = build_task(CountdownConfig(prompt_style="d1"))
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    verdicts = []
    for row in rows:
        numbers, target = row["ground_truth"]
        example = Example("", {"numbers": numbers, "target": target, "expression": None}, 0.0)
        verdicts.append(task.correct(example, row["completion"]))
    differing = {index for index, row in enumerate(rows) if verdicts[index] != row["correct"]}
    assert differing == set(DISAGREEMENTS)
    assert sum(verdicts) == 7
