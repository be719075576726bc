r"""GSM8K (arXiv 2110.14168): word problems whose answer is one number.

- A row's answer ends in `#### 42`; what stands before is its worked solution, without the `<<…>>` of the calculator.
- What a completion answers: the last `\boxed{…}` with something in it of the tagged answer, else the last number of the
  tagged answer, else the last such box anywhere, else (compact style) the last number of the completion. In a box the
  number is all of it, else the first number after its last "=", or where none stands there what stands before it.
- Numbers are decimals, fractions and mixed numbers, times a hundred to a trillion that follows (`common.tasks.number`).
- Components (d1, arXiv 2504.12216): `correctness` 1 if that number equals the row's; `integer` 1 if the answer is a
  whole number, with commas before groups of three digits or none, and nothing else; `soft_format`, `strict_format`,
  `xml_count`: see `common.tasks.answer_format`. The default weights are d1's.
- Deviations from d1's evaluation, each a number that it misreads: 1,200 is not 1; 3/4 is not 3; of several boxes the
  last counts, not the first; an `<answer>` that the stop token closes counts.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field

from common.tasks.answer_format import soft_format, strict_format, xml_count
from common.tasks.number import numbers_in, plain, read_number
from common.tasks.question_task import QuestionTask, QuestionTaskConfig
from common.tasks.rows import Row
from common.tasks.task import Example, boxed_answers, kept, tagged_answer

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_INTEGER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_DOTS = re.compile(r"[.\s…]*")


class Gsm8kConfig(QuestionTaskConfig):
    """Grade-school word problems with a number for an answer."""

    components: ClassVar[tuple[str, ...]] = ("correctness", "integer", "soft_format", "strict_format", "xml_count")

    name: Literal["gsm8k"] = "gsm8k"
    """Selects this task."""
    reward_weights: dict[str, float] = Field(
        default={"correctness": 2.0, "integer": 0.5, "soft_format": 0.5, "strict_format": 0.5, "xml_count": 1.0}
    )
    """Weight of each component: correctness, integer, soft_format, strict_format (0 or 1), xml_count (0 to 0.5)."""


class Gsm8kTask(QuestionTask):
    """See the module's docstring."""

    name = "gsm8k"

    def answer(self, completion: str) -> str:
        """What the number is read from, as it is written; empty where nothing is answered."""
        tagged = tagged_answer(completion)
        if tagged is not None:
            boxed = next((box for box in boxed_answers(tagged) if not _DOTS.fullmatch(box)), None)
            if boxed is not None or numbers_in(tagged):
                return tagged if boxed is None else boxed
        boxed = next((box for box in boxed_answers(completion) if not _DOTS.fullmatch(box)), None)
        return super().answer(completion) if boxed is None else boxed

    def number(self, completion: str) -> Fraction | None:
        """The number that a completion answers; None without one."""
        answer = self.answer(completion)
        is_boxed = any(box == answer for box in boxed_answers(completion))
        *before, said = plain(answer).split("=") if is_boxed else [answer]
        whole = read_number(said)
        if whole is not None:
            return whole.value
        found = numbers_in(said)
        if found:
            return found[0] if is_boxed else found[-1]
        whole = read_number(before[-1]) if before else None
        return None if whole is None else whole.value

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """Every component; see the module's docstring."""
        return {
            "correctness": float(self.correct(example, completion)),
            "integer": float(_INTEGER.fullmatch(plain(self.answer(completion))) is not None),
            "soft_format": soft_format(completion),
            "strict_format": strict_format(completion),
            "xml_count": xml_count(completion),
        }

    @kept
    def correct(self, example: Example, completion: str) -> bool:
        """Whether the number is the row's, exactly."""
        return self.number(completion) == _number(example.fields["answer"])

    def posed(self, question: str, truth: Any) -> Example:
        """The truth is a number, or text that ends in `#### number` or is one."""
        _number(truth)
        return self.pose(question, truth)

    def read_answer(self, row: Row) -> tuple[str, str | None]:
        """The number after the last `####` and what stands before it, or an answer that is just the number."""
        field = self._asked.solution_field
        written = str(row.value(self._asked.answer_field, "name the answer's field in task.answer_field"))
        solution, marked, truth = written.rpartition("####")
        _number(truth)
        if field is not None:
            solution, marked = row.text(field, "name the solution's field in task.solution_field"), "####"
        return truth.strip(), _CALCULATOR.sub("", solution).strip() if marked else None

    def shown_answer(self, example: Example) -> str:
        r"""The number in a box (d1) or bare."""
        answer = str(example.fields["answer"])
        return answer if self._asked.prompt_style == "compact" else rf"\boxed{{{answer}}}"


def _number(truth: Any) -> Fraction:
    found = None
    if isinstance(truth, str):
        found = read_number(truth.rpartition("####")[2].strip())
    elif isinstance(truth, int | float) and not isinstance(truth, bool):
        found = read_number(f"{Decimal(repr(truth)):f}")
    if found is None:
        raise ValueError(f"answer {str(truth)[:60]!r} is no number and does not end in `#### number`")
    return found.value
