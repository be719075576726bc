"""The expression evaluator: exact on what it accepts, and quick to refuse everything else."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tasks.arithmetic import Term, combine, leaf, render
from common.tasks.expression import MAX_CHARACTERS, MAX_DEPTH, ExpressionError, evaluate


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        ("30+93-100", 23, (30, 93, 100)),
        (" 2 * ( 3 + 4 )\n", 14, (2, 3, 4)),
        ("10-3-2", 5, (10, 3, 2)),
        ("24/4/2", 3, (24, 4, 2)),
        ("2+3*4", 14, (2, 3, 4)),
        ("1/3", Fraction(1, 3), (1, 3)),
        ("1/3*3", 1, (1, 3, 3)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
        ("-23+29+33", 39, (23, 29, 33)),
        ("5*(-2)", -10, (5, 2)),
        ("0*5", 0, (0, 5)),
    ],
)
def test_values(text: str, value: Fraction, numbers: tuple[int, ...]) -> None:
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "()",
        "(1",
        "1)",
        "1 2",
        "(1)(2)",
        "1+",
        "*1",
        "+1",
        "1--2",
        "2*-3",
        "--1",
        "9**9**9",
        "9//2",
        "9%2",
        "1.5",
        "1e9",
        "0x10",
        "007",
        "1_000",
        "1,2",
        "1=1",
        "2^3",
        "a+1",
        "__import__('os').system('true')",
        "1/0",
        "5/(3-3)",
        "1/(2-4/2)",
        "٣+٤",  # Arabic-Indic digits, which str.isdigit and int accept
        "²",
        "１+１",  # full-width digits
        "1\u00a0+1",
        "1\x00",
        "(" * 10_000,
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "1+" * 100_000 + "1",
        "9" * (MAX_CHARACTERS + 1),
    ],
)
def test_refused_quickly(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ExpressionError):
        evaluate(text)
    assert time.process_time() - start < 0.1


def test_limits_are_reached_without_error() -> None:
    assert evaluate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1
    assert evaluate("9*" * (MAX_CHARACTERS // 2 - 1) + "9").value == 9 ** (MAX_CHARACTERS // 2)


@given(st.text(alphabet="0123456789+-*/() .x²", max_size=40) | st.text(max_size=40))
def test_no_other_error_escapes(text: str) -> None:
    try:
        evaluate(text)
    except ExpressionError:
        return


@st.composite
def python_expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction]:
    """Fully parenthesised text and its value, built beside each other."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 999))
        return str(number), Fraction(number)
    left, left_value = draw(python_expressions(depth - 1))
    right, right_value = draw(python_expressions(depth - 1))
    operator = draw(st.sampled_from("+-*/" if right_value else "+-*"))
    value = {
        "+": lambda: left_value + right_value,
        "-": lambda: left_value - right_value,
        "*": lambda: left_value * right_value,
        "/": lambda: left_value / right_value,
    }[operator]()
    return f"({left}{operator}{right})", value


@given(python_expressions())
def test_agrees_with_the_tree_it_was_written_from(written: tuple[str, Fraction]) -> None:
    text, value = written
    assert evaluate(text).value == value


@st.composite
def terms(draw: st.DrawFn) -> tuple[Term, list[int]]:
    numbers = draw(st.lists(st.integers(1, 99), min_size=1, max_size=5))
    parts = [leaf(number) for number in numbers]
    while len(parts) > 1:
        parts.append(draw(st.sampled_from(combine(parts.pop(0), parts.pop(0)))))
    return parts[0], numbers


@given(terms())
def test_rendering_keeps_value_and_numbers(drawn: tuple[Term, list[int]]) -> None:
    term, numbers = drawn
    text = render(term)
    value, used = evaluate(text)
    assert value == term.value > 0
    assert sorted(used) == sorted(numbers)
    assert sum(text.count(operator) for operator in "*/") == term.multiplications


def test_rendering_is_canonical() -> None:
    a, b, c = leaf(50), leaf(30), leaf(10)

    def joined(left: Term, right: Term, value: int) -> Term:
        return next(term for term in combine(left, right) if term.value == value)

    assert render(joined(a, joined(b, c, 20), 30)) == "50+10-30"  # 50-(30-10)
    assert render(joined(joined(a, c, 60), b, 30)) == "50+10-30"
    assert render(joined(joined(a, c, 500), joined(b, c, 300), 800)) == "50*10+30*10"
    assert render(joined(joined(a, b, 20), c, 2)) == "(50-30)/10"
    assert render(joined(leaf(60), joined(b, c, 3), 20)) == "60*10/30"  # 60/(30/10)
