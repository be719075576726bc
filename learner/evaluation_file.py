"""Evaluation file: the questions of `diffpo eval --file`, in place of the task's test split."""

from pathlib import Path

from common.config import Config
from common.errors import UserError
from common.tasks import build_task

KEYS = ("file", "test_data")  # what a task's section calls the file of its test split


def with_file(config: Config, file: Path, *, all_rows: bool) -> Config:
    """The configuration with a file as its test split.

    Args:
        config: the configuration.
        file: the questions.
        all_rows: whether `evaluation.prompts` becomes the number of its rows.

    Raises:
        UserError: for a file that the task cannot use, or a task of the user's own that takes none.
    """
    section = config.task
    key = next(key for key in KEYS if key in type(section).model_fields)
    values = section.model_dump() | {key: str(file)}
    if key == "test_data" and getattr(section, "factory", None) is None:
        values |= {"data": None, "validation_data": None}  # nothing learns: they may be the same questions
    task = type(section).model_validate(values)
    size = build_task(task).size("test")
    if size is None:
        raise UserError(
            f"--file {file}: the task of task.factory does not take its test questions from task.{key}, its test split "
            "has no end; leave --file out, or let the task read that file and say its size"
        )
    evaluation = config.evaluation
    if all_rows:
        evaluation = evaluation.model_copy(update={"prompts": size})
    return config.model_copy(update={"task": task, "evaluation": evaluation})
