"""Tasks whose problems are generated without end; a benchmark file may replace the test split.

- Generated splits never share a problem; what makes two problems the same is the task's to say.
- With `file`, the test split is that file, row by row, and an index beyond it is refused.
"""

import zlib
from abc import abstractmethod
from pathlib import Path

import numpy as np
from pydantic import Field

from common.errors import UserError
from common.tasks.task import (
    DEMONSTRATION_STREAM,
    HOLDOUT_STREAM,
    PROMPT_STREAM,
    SPLITS,
    BaseTaskConfig,
    Example,
    Split,
    Task,
    check_cursor,
    keyed_generator,
)


class GeneratedTaskConfig(BaseTaskConfig):
    """Keys of a task that generates its problems."""

    careful_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of demonstrations that are solutions; the others are careless, so that RL has something to improve."""
    file: str | None = None
    """A benchmark file of d1 that replaces the generated test split; none: the test split is generated."""

    @property
    def files(self) -> tuple[str, ...]:
        """See `BaseTaskConfig.files`."""
        return () if self.file is None else (self.file,)


class GeneratedTask(Task):
    """Its splits go on without end, but for a test split that is a file."""

    def __init__(self, config: GeneratedTaskConfig, file_examples: list[Example] | None = None) -> None:
        super().__init__(config)
        self._generated = config
        self._file_examples = file_examples

    def size(self, split: Split) -> int | None:
        """The rows of `file` for the test split that it replaces; None for generated splits."""
        return None if split != "test" or self._file_examples is None else len(self._file_examples)

    def example(self, split: Split, index: int) -> Example:
        """See `Task.example`."""
        check_cursor(split, index)
        config = self._generated
        if split != "test" or self._file_examples is None:
            return self._generate(split, keyed_generator(config.seed, PROMPT_STREAM, SPLITS.index(split), index))
        if index >= len(self._file_examples):
            raise UserError(
                f"test example {index} does not exist: {config.file} has {len(self._file_examples)} rows "
                f"(0 to {len(self._file_examples) - 1}); evaluate fewer prompts, or leave `file` out to generate them"
            )
        return self._file_examples[index]

    def demonstration(self, example: Example, key: int) -> str:
        """A completion to imitate in warm start, careful or careless; the same for the same example and key (>= 0)."""
        # The prompt is part of the key: one key for all examples must not make all of them careless at once.
        prompt_hash = zlib.crc32(example.prompt.encode())
        rng = keyed_generator(self._generated.seed, DEMONSTRATION_STREAM, prompt_hash, key)
        careful = bool(rng.random() < self._generated.careful_fraction)
        return self._demonstrate(example, careful, rng)

    @abstractmethod
    def _generate(self, split: Split, rng: np.random.Generator) -> Example:
        """One example of a generated split, a function of `rng` alone."""

    @abstractmethod
    def _demonstrate(self, example: Example, careful: bool, rng: np.random.Generator) -> str:
        """One demonstration, a function of its arguments alone."""


def holdout_generator(seed: int) -> np.random.Generator:
    """The generator that draws which problems are held out from training."""
    return keyed_generator(seed, HOLDOUT_STREAM)


def read_benchmark(path: str, expected: str) -> list[str]:
    """The lines of a benchmark file. Raises UserError, naming what is `expected`, where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(
            f"benchmark file {path} cannot be read ({error}); expected {expected}; correct `file` or leave it out"
        ) from error
    if not any(line.strip() for line in lines):
        raise UserError(f"benchmark file {path} is empty; expected {expected}; correct `file` or leave it out")
    return lines


def row_error(path: str, row: int, found: str, expected: str) -> UserError:
    """The error for a malformed row of a benchmark file; `row` counts the file's lines from 1."""
    shown = found if len(found) <= 80 else found[:80] + "…"
    return UserError(f"{path}, row {row}: found {shown!r}; expected {expected}; mend the row or leave `file` out")
