"""Tasks whose questions come from data: files, folders or a hub, read when the first question is asked for.

- Scoring needs no data: a process that only scores reads none.
- Questions are put to the model as they are (compact) or after an instruction that asks for tags (d1).
"""

import string
from abc import abstractmethod
from functools import cached_property
from typing import Literal

from pydantic import Field

from common.errors import UserError
from common.tasks.question_set import Question, QuestionSet, read_question_set
from common.tasks.rows import Row, is_hub, read_rows
from common.tasks.task import SPLITS, BaseTaskConfig, Example, Split, Task, check_cursor, tagged_completion

D1_PROMPT = """\
You are a math expert. Solve the question below step by step and put the final answer into \\boxed{}.

Give your reasoning first and then only the answer, in this form:
<reasoning>
your reasoning
</reasoning>
<answer>
\\boxed{your answer}
</answer>

"""


class QuestionTaskConfig(BaseTaskConfig):
    """Keys of a task whose questions come from data."""

    prompt_style: Literal["compact", "d1"] = "d1"
    """compact: the bare question; d1: an instruction that asks for <reasoning> and <answer> tags before it."""
    data: str | None = None
    """Training questions: a JSONL, JSON, CSV or Parquet file, a folder of such, or hub:OWNER/NAME[:CONFIG[:SPLIT]]."""
    validation_data: str | None = None
    """Validation questions, as `data`; null holds them out of `data`."""
    test_data: str | None = None
    """Test questions, as `data`; null holds them out of `data`."""
    holdout: float = Field(default=0.05, ge=0, le=0.4)
    """Share of the questions of `data` that each held-out split takes, by a hash of the question keyed by `seed`."""
    question_field: str = "question"
    """Field of a row that holds the question."""
    answer_field: str = "answer"
    """Field of a row that holds the answer."""
    solution_field: str | None = None
    """Field of a row that holds a worked solution, for warm-start demonstrations; null where there is none."""

    @property
    def files(self) -> tuple[str, ...]:
        """See `BaseTaskConfig.files`."""
        sources = (self.data, self.validation_data, self.test_data)
        return tuple(source for source in sources if source is not None and not is_hub(source))


class QuestionTask(Task):
    """Its training split goes round; validation and test end. Subclasses say how a row is read and an answer judged."""

    def __init__(self, config: QuestionTaskConfig) -> None:
        super().__init__(config)
        self._asked = config

    @cached_property
    def questions(self) -> QuestionSet:
        """The splits. Raises UserError for data that is missing or malformed."""
        config = self._asked
        sources: dict[Split, str | None] = {
            "train": config.data,
            "validation": config.validation_data,
            "test": config.test_data,
        }
        if not any(sources.values()):
            raise UserError(
                f"task.data is missing: {self.name} takes its questions from a file, a folder or a hub; give "
                "task.data=FILE, and task.test_data=FILE where the test split has a file of its own"
            )
        return read_question_set(sources, self._read, seed=config.seed, holdout=config.holdout)

    def _read(self, source: str, split: Split) -> list[Question]:
        key = "task.data" if split == "train" else f"task.{split}_data"
        return [self._question(row) for row in read_rows(source, key, split)]

    def _question(self, row: Row) -> Question:
        config = self._asked
        text = row.text(config.question_field, "name the question's field in task.question_field")
        try:
            truth, solution = self.read_answer(row)
        except ValueError as error:
            raise UserError(f"{row.where}: {error}; mend the row or correct task.answer_field") from error
        return Question(text.strip(), truth, solution, row.where)

    def size(self, split: Split) -> int | None:
        """None for training questions, which go round; 0 where there are none."""
        found = len(self.questions.splits[split])
        return None if split == "train" and found else found

    def distinct(self, split: Split) -> int:
        """See `Task.distinct`: training questions too."""
        return len(self.questions.splits[split])

    def example(self, split: Split, index: int) -> Example:
        """See `Task.example`."""
        check_cursor(split, index)
        try:
            question = self.questions.question(split, index)
        except IndexError:
            raise UserError(self._beyond(split, index)) from None
        return self.pose(question.text, question.truth, question.solution)

    def _beyond(self, split: Split, index: int) -> str:
        own = {"train": "data", "validation": "validation_data", "test": "test_data"}[split]
        size, config = len(self.questions.splits[split]), self._asked
        if size == 0:
            more = "" if split == "train" else f", or hold more of task.data out (task.holdout={config.holdout:g})"
            return f"there are no {split} questions; give task.{own}=FILE{more}"
        way_out = f"ask for fewer prompts, or give more in task.{own}"
        return f"{split} example {index} does not exist: there are {size} (0 to {size - 1}); {way_out}"

    def demonstration(self, example: Example, key: int) -> str:
        """The row's worked solution with the answer in tags (d1) or after it (compact); without one, the answer."""
        solution, answer = example.fields["solution"] or "", self.shown_answer(example)
        if self._asked.prompt_style == "compact":
            return f"{solution}\n{answer}" if solution else answer
        return tagged_completion(solution, answer)

    def pose(self, question: str, truth: object, solution: str | None = None) -> Example:
        """The example of a question."""
        prompt = question if self._asked.prompt_style == "compact" else self.instruction + question
        return Example(prompt, {"question": question, "answer": truth, "solution": solution}, float(len(question)))

    instruction = D1_PROMPT
    """What stands before the question in d1 style."""

    @cached_property
    def alphabet(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Printable ASCII and whatever else stands in the questions and demonstrations."""
        texts = {*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"}
        for split in SPLITS:
            for question in self.questions.splits[split]:
                example = self.pose(question.text, question.truth, question.solution)
                texts |= {*example.prompt, *self.demonstration(example, 0)}
        return "".join(sorted(texts))

    @abstractmethod
    def read_answer(self, row: Row) -> tuple[object, str | None]:
        """The ground truth and, where it has one, the worked solution of a row. Raises ValueError, UserError."""

    @abstractmethod
    def shown_answer(self, example: Example) -> str:
        """The right answer as a completion gives it."""
