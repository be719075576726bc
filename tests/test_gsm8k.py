"""GSM8K: how numbers are read, how rows become examples, and how answers score, d1's own verdicts included."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from d1_verdicts import check_agreement
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.tasks import Gsm8kConfig, build_task
from common.tasks.answer_format import soft_format, strict_format, xml_count
from common.tasks.gsm8k import Gsm8kTask
from common.tasks.number import numbers_in, read_number
from common.tasks.task import tagged_completion

# Rows of the whole file where our verdict differs from d1's, each read.
DISAGREEMENTS = {
    34: "\\boxed{6,277} for 6277: d1 reads 6",
    127: "\\boxed{6,250} for 6250: d1 reads 6",
    129: "\\boxed{14,000} for 14000: d1 reads 14",
    202: "\\boxed{120 with its brace after a line break, in tags: d1 reads nothing",
}
PIECES = (r"\boxed{", "<answer>", "</answer>", r"\frac")
TASK = Gsm8kTask(Gsm8kConfig())


def says(completion: str, truth: object) -> bool:
    return TASK.correct(TASK.posed("How many?", truth), completion)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            ("1,234", 1234),
            ("1{,}234", 1234),
            (r"14\,000", 14000),
            ("-.5", Fraction(-1, 2)),
            ("−3", -3),
            ("$18.90", 18.9),
        ),
        *((r"\$4", 4), (r"20\%", 20), ("330 miles", 330), (r"5\text{ cm}^2", 5), ("12th grade", 12), ("3/4", 0.75)),
        *((r"\dfrac{3}{4}", 0.75), (r"\frac34", 0.75), (r"-\frac{1}{2}", -0.5), (r"2\frac{1}{2}", 2.5), ("2 1/2", 2.5)),
        *((r"1.2\times10^5", 120000), (r"180^\circ", 180), (r"\text{5 inches}", 5)),
        *(("1/0", None), ("5x", None), ("2k", None), (r"5\pi", None), ("", None), (".", None), ("3 and 5", None)),
        *(
            ("5 million", 5_000_000),
            (r"5\text{ hundred thousand dollars}", 500_000),
            ("(12)", 12),
            (r"12\text{ m/s}", 12),
        ),
        *(
            ("3 squared", None),
            ("12 point five", None),
            ("12 over seven", None),
            (r"2\mathrm{i}", None),
            ("(1)(2)", None),
        ),
        *((r"\frac{1}{-2}", -0.5), ("6 dozen", 6), ("5 times", 5)),
        *(("٣", None), ("9" * 100, None), ("1.2.3", None)),
    ],
)
def test_numbers_as_people_write_them(text: str, value: float | None) -> None:
    found = read_number(text)
    assert (None if found is None else float(found.value)) == value


@pytest.mark.parametrize(
    ("completion", "truth", "right"),
    [
        (r"so \boxed{5}, no: <answer>\boxed{7}</answer>", 7, True),
        (r"<answer>\boxed{7}</answer> and then \boxed{5}", 7, True),
        (r"\boxed{5} is half, so \boxed{10}", 10, True),
        (r"\boxed{10} <answer></answer>", 10, True),
        (r"\boxed{10} <answer>\boxed{...}</answer>", 10, True),
        (r"<answer>\boxed{20 - 5 = 15}</answer>", 15, True),
        (r"<answer>\boxed{x = 15}</answer>", 15, True),
        (r"<answer>\boxed{\text{15 apples}}</answer>", 15, True),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", 0.5, True),
        ("<answer>\nShe has 15 apples.\n</answer>", 15, True),
        ("<answer>\nboxed{15}\n</answer>", 15, True),
        ("<answer>\n15", 15, True),
        ("The answer is 15.", 15, False),
        (r"<answer>\boxed{15", 15, True),
        (r"\boxed{15", 15, False),
        (r"\boxed{1,500}", 1500, True),
        (r"\boxed{1500.00}", "1,500", True),
        (r"\boxed{}", 0, False),
        ("<answer>The answer is 3/4</answer>", 0.75, True),
        ("<answer>The answer is 3/4</answer>", 4, False),
        ("<answer>It takes 3 1/2 hours</answer>", 3.5, True),
        (r"<answer>She ate 2\frac{1}{2} pies</answer>", 2.5, True),
        ("<answer>She won 1.5 million dollars</answer>", 1_500_000, True),
        ("<answer>It was on 3/4/2020</answer>", 2020, True),
        ("<answer>From 15 to 1/0</answer>", 0, True),
        (r"\boxed{5 million}", 5, False),
        (r"\boxed{18 = x}", 18, True),
        (r"\boxed{9 + 9 = 18 = x}", 18, True),
        (r"\boxed{x = 18 = 20}", 18, False),
        (r"\boxed{3 or 4}", 4, False),
        (r"\boxed{5 + 3 = ?}", 5, False),
        (r"\boxed{8 = ?}", 8, True),
        (r"\boxed{3 hundred-dollar bills}", 3, True),
        (r"\boxed{3 hundred-thousand}", 300_000, True),
        ("", 0, False),
    ],
)
def test_which_number_counts(completion: str, truth: object, right: bool) -> None:
    assert says(completion, truth) is right


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${}$", r"\${}", "{}.00", "{} apples", "{}."]))
def test_one_number_counts_in_every_way_to_write_it(number: int, form: str) -> None:
    written = form.format(number)
    assert says(rf"<answer>\boxed{{{written}}}</answer>", number)
    assert not says(rf"<answer>\boxed{{{written}}}</answer>", number + 1)
    assert says(f"<answer>{written}</answer>", float(number))


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*"0123456789.,-/{}$%\\ =x\n", *PIECES])).map("".join))
@example("-\n0")
def test_no_completion_breaks_the_scorer(completion: str) -> None:
    rewards = TASK.rewards(TASK.posed("How many?", 3), completion)
    assert all(0.0 <= value <= 1.0 for value in rewards.values())
    assert set(rewards) == set(TASK.components)
    numbers_in(completion)


@pytest.mark.parametrize(
    ("answer", "earned"),
    [
        *(("1200", 1), ("1,200", 1), ("-3", 1), ("1,234,567", 1), (r"1{,}200", 1), (r"\(12\)", 1)),
        *(("1,8", 0), ("1,2,0,0", 0), ("1200,", 0), ("12,00", 0), ("1,2000", 0), ("3/4", 0), ("12 apples", 0), ("", 0)),
    ],
)
def test_what_counts_as_a_whole_number(answer: str, earned: float) -> None:
    assert TASK.rewards(TASK.posed("How many?", 3), rf"<answer>\boxed{{{answer}}}</answer>")["integer"] == earned


def test_a_demonstration_earns_everything() -> None:
    example = TASK.pose("How many?", "42", "6 times 7 is 42.")
    completion = TASK.demonstration(example, 0)
    assert completion == tagged_completion("6 times 7 is 42.", r"\boxed{42}")
    rewards = TASK.rewards(example, completion)
    assert rewards == {"correctness": 1, "integer": 1, "soft_format": 1, "strict_format": 1, "xml_count": 0.5}
    assert TASK.reward(rewards) == 4.0  # what d1 pays at most


def test_format_components_see_what_they_are_for() -> None:
    good = tagged_completion("a\nb", "42")
    assert (soft_format(good), strict_format(good), xml_count(good)) == (1, 1, 0.5)
    assert (soft_format(good + "\n"), strict_format(good + "\n")) == (1, 1)
    flat = good.replace("\n", " ")
    assert (soft_format(flat), strict_format(flat), xml_count(flat)) == (1, 0, 0)
    assert strict_format("so\n" + good) == soft_format("so\n" + good) == strict_format(good + "\nmore") == 0
    assert xml_count(good + "x" * 100) == pytest.approx(0.4)
    assert xml_count(good + "x" * 5000) == 0
    assert strict_format(tagged_completion("<answer>\n1\n</answer>", "2")) == 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "How many?"}, "no value in field 'answer'; the row has 'question'; name the answer's field"),
        ({"question": " ", "answer": "#### 3"}, "field 'question' holds ' ', which is no text"),
        ({"question": 7, "answer": "#### 3"}, "field 'question' holds '7', which is no text"),
        ({"question": "How many?", "answer": "many"}, "answer 'many' is no number and does not end in `#### number`"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row: dict[str, object], told: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "One?", "answer": "#### 1"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        build_task(Gsm8kConfig(data=str(file))).example("train", 0)
    assert f"{file}, row 3: " in str(caught.value)
    assert told in str(caught.value)


def test_a_row_gives_prompt_answer_and_solution(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "How many {x}?", "answer": "6*7=<<6*7=42>>42\n#### 1,042"}))
    task = build_task(Gsm8kConfig(data=str(file), test_data=None, holdout=0))
    example = task.example("train", 5)
    assert example.fields == {"question": "How many {x}?", "answer": "1,042", "solution": "6*7=42"}
    assert "<reasoning>" in example.prompt
    assert example.prompt.endswith("How many {x}?")
    compact = build_task(Gsm8kConfig(data=str(file), holdout=0, prompt_style="compact"))
    assert compact.example("train", 0).prompt == "How many {x}?"
    assert compact.demonstration(compact.example("train", 0), 0) == "6*7=42\n1,042"
    assert compact.correct(compact.example("train", 0), "6*7=42\n1,042")
    assert set(compact.demonstration(compact.example("train", 0), 0)) <= set(compact.alphabet)


def test_agreement_with_d1_on_real_answers() -> None:
    check_agreement(TASK, DISAGREEMENTS)
