"""Countdown: combine given numbers, each exactly once, with + - * / so that they make the target.

- Generated problems are solvable with positive integers at every step; their solution stays in `Example.fields`.
- A problem is the pair (numbers regardless of order, target). Its split is a hash of that pair alone, so splits stay
  disjoint across seeds; problems of `file` are never generated.
- Difficulty is the number of * and / in the stored solution; a benchmark row's solution has as few as possible.
- Component `answer` (d1, arXiv 2504.12216): 1 if the expression uses each given number exactly once and equals the
  target, 0.1 if it uses the numbers but misses, 0 otherwise. Deviation: d1's published training code pays 0.1 for any
  closed `<answer>`, with the wrong numbers or no expression in it too; that rewards the tag, so we do not.
- Component `exact`: 1 if `answer` is 1, else 0.
- LaTeX operators and a closing "= target" are read as people write them; any other text makes the answer invalid.
"""

import hashlib
import json
import re
from itertools import combinations
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from common.errors import UserError
from common.tasks.arithmetic import Term, combine, leaf, render
from common.tasks.expression import ExpressionError, evaluate
from common.tasks.generated_task import GeneratedTask, GeneratedTaskConfig, read_benchmark, row_error
from common.tasks.task import SPLITS, Example, Split, boxed_answer, tagged_answer, tagged_completion

# The search for a benchmark row's solution is exhaustive: 10 ms for 4 numbers, seconds for 5.
MOST_NUMBERS = 4
_FILE_FORMAT = 'one JSON object a line, such as {"input": "30,100,93", "output": "23"}'
_ROW_FORMAT = f"2 to {MOST_NUMBERS} positive integers and a positive target, as {_FILE_FORMAT}"
_TRIES = 100_000
_OPERATORS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "×": "*", "÷": "/", "−": "-"}
_OPERATOR_PATTERN = re.compile("|".join(map(re.escape, _OPERATORS)))

_D1_PROMPT = """\
Using only the numbers {numbers}, write an arithmetic expression whose value is exactly {target}.

Rules:
- Use every number exactly once, and no other number.
- Use only the operations +, -, *, / and parentheses.

Give your reasoning first and then the expression, without the target, inside \\boxed{{}}, in this form:
<reasoning>
your reasoning
</reasoning>
<answer>
\\boxed{{your expression}}
</answer>

Numbers: {numbers}
Target: {target}
"""


class CountdownConfig(GeneratedTaskConfig):
    """Countdown with problems that have a solution in positive integers."""

    components: ClassVar[tuple[str, ...]] = ("answer", "exact")

    name: Literal["countdown"] = "countdown"
    """Selects this task."""
    numbers: int = Field(default=3, ge=2, le=MOST_NUMBERS)
    """How many numbers a generated problem has."""
    number_max: int = Field(default=99, ge=1, le=10_000)
    """Numbers are drawn uniformly from 1 to this."""
    target_min: int = Field(default=1, ge=1)
    """Smallest target."""
    target_max: int = Field(default=99, ge=1)
    """Largest target."""
    reward_weights: dict[str, float] = Field(default={"answer": 1.0})
    """Weight of each component: answer (1, or 0.1 for the right numbers with the wrong value), exact (1 if solved)."""

    @model_validator(mode="after")
    def _range_is_usable(self) -> Self:
        if self.target_min > self.target_max:
            raise ValueError(
                f"target_min {self.target_min} is above target_max {self.target_max}; lower the one or raise the other"
            )
        return self


class CountdownTask(GeneratedTask):
    """See the module's docstring."""

    name = "countdown"
    alphabet = "0123456789+-*/(),="
    trusted = True

    def __init__(self, config: CountdownConfig) -> None:
        rows = None if config.file is None else read_problems(config.file)
        examples = None
        if rows is not None:
            examples = [
                _example(numbers, target, solve(numbers, target), config.prompt_style) for numbers, target in rows
            ]
        super().__init__(config, examples)
        self._countdown = config
        self._excluded = frozenset(_key(numbers, target) for numbers, target in rows or ())
        # A range too narrow to fill every split must be refused now, not in the middle of a run.
        for split in SPLITS:
            self.example(split, 0)

    def answer(self, completion: str) -> str:
        r"""The last `\boxed{...}` of the tagged answer, else the tagged answer; without a tag the last `\boxed{...}`,
        else the whole completion in compact style and nothing in d1 style."""
        tagged = tagged_answer(completion)
        boxed = boxed_answer(completion if tagged is None else tagged)
        return super().answer(completion) if boxed is None else boxed

    def posed(self, question: str, truth: Any) -> Example:
        """The truth is `[[numbers], target]`, also as JSON text."""
        try:
            numbers, target = json.loads(truth) if isinstance(truth, str) else truth
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"ground truth {str(truth)[:60]!r} is not [[numbers], target]") from error
        if not _is_problem(numbers, target):
            raise ValueError(
                f"ground truth {str(truth)[:60]!r} is not [[numbers], target] with positive integers, such as "
                "[[30, 100, 93], 23]"
            )
        return _example(numbers, target, None, self._countdown.prompt_style)

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """`answer` in {0, 0.1, 1} and `exact` in {0, 1}."""
        target = example.fields["target"]
        try:
            value, numbers = evaluate(_plain(self.answer(completion), target))
        except ExpressionError:
            return {"answer": 0.0, "exact": 0.0}
        if sorted(numbers) != sorted(example.fields["numbers"]):
            return {"answer": 0.0, "exact": 0.0}
        return {"answer": 1.0, "exact": 1.0} if value == target else {"answer": 0.1, "exact": 0.0}

    def correct(self, example: Example, completion: str) -> bool:
        """Whether the expression uses each number exactly once and equals the target."""
        return self.rewards(example, completion)["exact"] == 1.0

    def _generate(self, split: Split, rng: np.random.Generator) -> Example:
        config = self._countdown
        for _ in range(_TRIES):
            numbers = rng.integers(1, config.number_max + 1, size=config.numbers).tolist()
            solution = _random_term(numbers, rng)
            target = solution.value
            if not config.target_min <= target <= config.target_max or split_of(numbers, target) != split:
                continue
            if _key(numbers, target) not in self._excluded:
                return _example(numbers, target, solution, config.prompt_style)
        raise UserError(
            f"no {split} problem found in {_TRIES} tries with numbers={config.numbers}, "
            f"number_max={config.number_max}, target {config.target_min}..{config.target_max}; "
            f"widen the targets or raise number_max"
        )

    def _demonstrate(self, example: Example, careful: bool, rng: np.random.Generator) -> str:
        numbers, target = example.fields["numbers"], example.fields["target"]
        expression = example.fields["expression"] if careful else _careless(numbers, rng)
        if expression is None:
            raise UserError(f"{numbers} make {target} in no way that was found; demonstrate generated splits instead")
        if self._countdown.prompt_style == "compact":
            return expression
        return tagged_completion(
            f"I combine the numbers so that {expression} makes {target}.", rf"\boxed{{{expression}}}"
        )


def split_of(numbers: list[int], target: int) -> Split:
    """The only generated split that may hold a problem: a tenth validation, a tenth test, the rest train."""
    digest = hashlib.blake2b(_key(numbers, target).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest) % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def _key(numbers: list[int], target: int) -> str:
    return f"{','.join(map(str, sorted(numbers)))}={target}"


def _random_term(numbers: list[int], rng: np.random.Generator) -> Term:
    """A random tree over the numbers: two random parts are joined by a random operator that fits, until one is left."""
    terms = [leaf(number) for number in numbers]
    while len(terms) > 1:
        left = terms.pop(int(rng.integers(len(terms))))
        right = terms.pop(int(rng.integers(len(terms))))
        choices = combine(left, right)
        terms.append(choices[int(rng.integers(len(choices)))])
    return terms[0]


def solve(numbers: list[int], target: int) -> Term | None:
    """A solution with as few * and / as possible and positive integers at every step, or None."""
    for multiplications in range(len(numbers)):
        found = _search([leaf(number) for number in numbers], target, multiplications)
        if found is not None:
            return found
    return None


def _search(terms: list[Term], target: int, multiplications: int) -> Term | None:
    if len(terms) == 1:
        return terms[0] if terms[0].value == target else None
    for first, second in combinations(range(len(terms)), 2):
        rest = [term for position, term in enumerate(terms) if position not in (first, second)]
        for joined in combine(terms[first], terms[second]):
            if joined.multiplications <= multiplications:
                found = _search([*rest, joined], target, multiplications)
                if found is not None:
                    return found
    return None


def _careless(numbers: list[int], rng: np.random.Generator) -> str:
    """The right numbers in random order under random operators, whatever that comes to."""
    shuffled = [str(number) for number in rng.permutation(numbers)]
    return shuffled[0] + "".join(f"{rng.choice(list('+-*/'))}{number}" for number in shuffled[1:])


def _example(numbers: list[int], target: int, solution: Term | None, style: str) -> Example:
    listed = ",".join(map(str, numbers))
    compact = style == "compact"
    prompt = f"{listed}={target}" if compact else _D1_PROMPT.format(numbers=f"[{listed}]", target=target)
    fields = {"numbers": numbers, "target": target, "expression": None if solution is None else render(solution)}
    # Without a solution in positive integers the row is harder than any that has one.
    return Example(prompt, fields, float(len(numbers) if solution is None else solution.multiplications))


def _plain(expression: str, target: int) -> str:
    """An answer as people write it, in the parser's own characters; the target may be repeated at its end."""
    written = _OPERATOR_PATTERN.sub(lambda match: _OPERATORS[match.group()], expression[:1000])
    left, equals, right = written.rpartition("=")
    return left if equals and right.strip() == str(target) else written


def read_problems(path: str) -> list[tuple[list[int], int]]:
    """(numbers, target) of each row of a d1 evaluation file. Raises UserError for a file or row that is not one."""
    lines = read_benchmark(path, _FILE_FORMAT)
    return [_problem(path, row, line) for row, line in enumerate(lines, start=1) if line.strip()]


def _problem(path: str, row: int, line: str) -> tuple[list[int], int]:
    try:
        fields = json.loads(line)
        numbers = [_positive(number) for number in fields["input"].split(",")]
        target = _positive(str(fields["output"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise row_error(path, row, line, _ROW_FORMAT) from error
    if not 2 <= len(numbers) <= MOST_NUMBERS:
        raise row_error(path, row, line, _ROW_FORMAT)
    return numbers, target


def _is_problem(numbers: Any, target: Any) -> bool:
    def positive(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    return isinstance(numbers, list) and len(numbers) > 1 and all(map(positive, numbers)) and positive(target)


def _positive(text: str) -> int:
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", text):
        raise ValueError(f"{text!r} is not a positive integer")
    return int(text)
