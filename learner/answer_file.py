"""Answer file: completions that exist already, scored by a task, with a verdict for every row.

- A row has a question, a completion and a ground truth, under names that the user may give.
- A completion ends at the first stop token that stands in it as text: one of `STOPS`, or of the user's own choice.
- Rewards run in processes of their own, one row at a time; one that hangs, crashes or raises costs its row, which
  counts as wrong, and is counted itself.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from actors.reward_pool import RewardPool, Score, score
from common.config import RolloutConfig
from common.errors import RunError, UserError, cause, one_line
from common.tasks import Task
from common.tasks.rows import Row, read_rows
from common.tasks.task import Example

FIELDS = ("question", "completion", "ground_truth")
STOPS = ("<|eot_id|>", "<|endoftext|>", "<|im_end|>", "<|mdm_mask|>", "</s>", "[EOS]", "<eos>")


class Answer(NamedTuple):
    """One row, ready to be scored."""

    where: str
    example: Example
    question: str
    completion: str
    truth: Any


class Verdict(NamedTuple):
    """What a row got."""

    correct: bool
    rewards: dict[str, float]
    """Every component, and their weighted sum under `reward`; all 0 for a row that could not be scored."""
    error: str | None


def field_names(given: str | None) -> dict[str, str]:
    """`question=Q,completion=C,ground_truth=G` as a mapping; what is not named keeps its name. Raises UserError."""
    names = {name: name for name in FIELDS}
    for item in (given or "").split(",") if given else []:
        name, equals, field = item.partition("=")
        if name.strip() not in names or not equals or not field.strip():
            raise UserError(
                f"--fields {item!r} is not of the form NAME=FIELD with NAME one of {', '.join(FIELDS)}; give e.g. "
                "question=prompt,completion=response"
            )
        names[name.strip()] = field.strip()
    return names


def read_answers(task: Task, path: Path, names: dict[str, str], stops: Sequence[str] = STOPS) -> list[Answer]:
    """The rows of a file, a question that the task understands in each. Raises UserError with file and row."""
    return [_answer(task, row, names, stops) for row in read_rows(str(path), "answer file")]


def _answer(task: Task, row: Row, names: dict[str, str], stops: Sequence[str]) -> Answer:
    texts = []
    for name in ("question", "completion"):
        found = row.value(names[name], f"name the field with --fields {name}=FIELD")
        if not isinstance(found, str):
            raise UserError(f"{row.where}: {name} {str(found)[:60]!r} is no text; name another with --fields {name}=")
        texts.append(found)
    question, completion = texts
    truth = row.value(names["ground_truth"], "name the field with --fields ground_truth=FIELD")
    try:
        example = task.posed(question, truth)
    except ValueError as error:
        raise UserError(f"{row.where}: {one_line(error)}; mend the row, or name other fields with --fields") from error
    return Answer(row.where, example, question, until_stop(completion, stops), truth)


def until_stop(completion: str, stops: Sequence[str] = STOPS) -> str:
    """A completion up to the first stop token that was decoded with it; an empty text is none."""
    ends = [position for stop in stops if stop and (position := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def judge(task: Task, answers: list[Answer], limits: RolloutConfig, report: Callable[[int], None]) -> list[Verdict]:
    """A verdict for every row, in order. `report` is called with the number of rows that are done.

    Raises:
        RunError: when one reward after the other takes too long.
    """
    outcomes: list[Score | Exception] = []
    if task.trusted:
        outcomes += [score(task, answer.example, [answer.completion])[0] for answer in answers]
    else:
        pool = RewardPool(task, limits)
        try:
            outcomes += pool.score_each([(answer.example, answer.completion) for answer in answers], report)
        finally:
            pool.close()
    return [_verdict(task, one) for one in outcomes]


def _verdict(task: Task, outcome: Score | Exception) -> Verdict:
    if isinstance(outcome, Exception):
        return Verdict(False, dict.fromkeys([*task.components, "reward"], 0.0), one_line(outcome))
    return Verdict(outcome.correct, outcome.rewards, None)


def check_out(path: Path) -> None:
    """Refuse a place where no file can be written, before anything is scored."""
    there = os.path.lexists(path)
    try:
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({cause(error)}); choose another file") from error


def write_verdicts(path: Path, answers: list[Answer], verdicts: list[Verdict]) -> None:
    """One row for each answer: its texts, the verdict, every component, the error if any. Raises RunError."""
    table: dict[str, list[Any]] = {
        "row": [answer.where for answer in answers],
        "question": [answer.question for answer in answers],
        "completion": [answer.completion for answer in answers],
        "ground_truth": [json.dumps(answer.truth, ensure_ascii=False, default=str) for answer in answers],
        "correct": [verdict.correct for verdict in verdicts],
        "error": [verdict.error for verdict in verdicts],
    }
    for name in verdicts[0].rewards:
        table[f"reward_{name}" if name in table else name] = [verdict.rewards[name] for verdict in verdicts]
    schema = {"correct": pa.bool_(), "error": pa.string()}
    columns = {name: pa.array(values, schema.get(name)) for name, values in table.items()}
    try:
        pq.write_table(pa.table(columns), path)
    except OSError as error:
        raise RunError(f"--out {path} cannot be written ({cause(error)}); choose another file") from error
