r"""MATH-500 (arXiv 2305.20050) and MATH (arXiv 2103.03874): competition problems with an answer in LaTeX.

- A row has `problem`, `answer` and `solution`; without an `answer`, it is the last `\boxed{…}` of the solution.
- What a completion answers: the last `\boxed{…}` of the tagged answer, else the last box anywhere, else the tagged
  answer as it is. A box that is empty or never closed is none.
- Components (d1, arXiv 2504.12216): `correctness` 1 if it is the same answer (`common.tasks.math_answer`); `boxed` 0.5
  for a closed `<answer>`, 1 with a box in it; `soft_format`, `strict_format`, `xml_count` as for gsm8k, of weight 0.
- Deviations from d1's evaluation, which compares normalised texts: the order of a set, of a sum and the like do not
  count, equal numbers count (see `math_answer` for what does not), an answer in tags without a box counts.
"""

import math
import re
from decimal import Decimal
from typing import Any, ClassVar, Literal

from pydantic import Field

from common.tasks import math_answer
from common.tasks.answer_format import boxed_in_answer, soft_format, strict_format, xml_count
from common.tasks.question_task import QuestionTask, QuestionTaskConfig
from common.tasks.rows import Row
from common.tasks.task import Example, boxed_answer, boxed_answers, kept, tagged_answer

_UNBRACED = re.compile(r"\\boxed\s+([^\s{$\\][^$\n]*)|\\boxed([0-9])")
_EMPTY_BOX = re.compile(r"\\boxed.*", re.DOTALL)


class Math500Config(QuestionTaskConfig):
    """Competition mathematics with an answer in LaTeX."""

    components: ClassVar[tuple[str, ...]] = ("correctness", "boxed", "soft_format", "strict_format", "xml_count")

    name: Literal["math500"] = "math500"
    """Selects this task."""
    question_field: str = "problem"
    """Field of a row that holds the question."""
    solution_field: str | None = "solution"
    """Field of a row that holds a worked solution, for demonstrations and for an answer that has no field."""
    reward_weights: dict[str, float] = Field(default={"correctness": 2.0, "boxed": 1.0})
    """Weight of each component: correctness (0 or 1), boxed (0, 0.5, 1), soft_format, strict_format, xml_count."""


class Math500Task(QuestionTask):
    """See the module's docstring."""

    name = "math500"

    def prepare(self) -> None:
        """See `Task.prepare`."""
        math_answer.prepare()

    def answer(self, completion: str) -> str:
        """The answer in LaTeX, as it is written; empty where nothing is answered."""
        tagged = tagged_answer(completion)
        for text in (tagged, completion):
            boxed = next((box for box in boxed_answers(text or "") if box.strip(" .…")), None)
            if boxed is not None:
                return boxed
        unbraced = _UNBRACED.findall(completion)
        if unbraced:
            return "".join(unbraced[-1]).strip().removesuffix("</answer>").strip()
        return _EMPTY_BOX.sub("", super().answer(completion)).strip()

    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """Every component; see the module's docstring."""
        return {
            "correctness": float(self.correct(example, completion)),
            "boxed": boxed_in_answer(completion),
            "soft_format": soft_format(completion),
            "strict_format": strict_format(completion),
            "xml_count": xml_count(completion),
        }

    @kept
    def correct(self, example: Example, completion: str) -> bool:
        """Whether it is the row's answer."""
        fields = example.fields
        return math_answer.same_answer(fields["answer"], self.answer(completion), fields["question"])

    def posed(self, question: str, truth: Any) -> Example:
        """The truth is text in LaTeX, or a number."""
        return self.pose(question, _as_text(truth))

    def read_answer(self, row: Row) -> tuple[str, str | None]:
        """The answer's field, else the last box of the solution; and the solution."""
        config = self._asked
        solution = row.values.get(config.solution_field) if config.solution_field else None
        solution = solution if isinstance(solution, str) and solution.strip() else None
        given = row.values.get(config.answer_field)
        if solution is not None and (given is None or (isinstance(given, str) and not given.strip())):
            boxed = boxed_answer(solution)
            if not boxed:
                raise ValueError(f"no field {config.answer_field!r}, and the solution has no \\boxed{{…}}")
            return boxed, solution
        return _as_text(row.value(config.answer_field, "name the answer's field in task.answer_field")), solution

    def shown_answer(self, example: Example) -> str:
        """The answer in a box."""
        return rf"\boxed{{{example.fields['answer']}}}"


def _as_text(truth: Any) -> str:
    number = isinstance(truth, int | float | Decimal) and not isinstance(truth, bool) and math.isfinite(truth)
    if number or (isinstance(truth, str) and truth.strip()):
        return str(truth)
    raise ValueError(f"ground truth {str(truth)[:60]!r} is neither text nor a number")
