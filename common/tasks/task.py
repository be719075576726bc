"""What every task offers, and what all tasks share: keyed randomness, answer extraction, weights, benchmark files.

- An example is found by the *prompt cursor* (split, index): no state, no global generator, so a run resumes anywhere.
- Generated splits never share a problem; what makes two problems the same is the task's to say.
- With `file`, the test split is that file, row by row, and an index beyond it is refused.
- A completion is decoded text without special tokens; text after the stop token is the caller's to cut.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from pydantic import Field, model_validator

from common.errors import UserError
from common.section import Section

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# First word of every generator key: keeps the streams of prompts, demonstrations and hold-outs apart.
_PROMPT_STREAM, _DEMONSTRATION_STREAM, _HOLDOUT_STREAM = 0, 1, 2


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads and what the scorer needs."""

    prompt: str
    """Text of the prompt, before any chat template."""
    fields: dict[str, Any]
    """Ground truth; plain JSON values, so that it crosses processes and is logged."""
    difficulty: float
    """How hard the problem is, on the task's own scale; for reports and for prompt-aware thresholds."""


class BaseTaskConfig(Section):
    """Keys that every task has."""

    components: ClassVar[tuple[str, ...]] = ()

    seed: int = Field(default=0, ge=0)
    """Seed of the prompts, the demonstrations and (where drawn) the hold-out. Independent of the run's seed."""
    prompt_style: Literal["compact", "d1"] = "compact"
    """compact: the bare problem, for a character tokenizer; d1: an instruction that asks for <answer> tags."""
    reward_weights: dict[str, float]
    """Weight of each reward component in the reward; a component that is not named counts nothing."""
    careful_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of demonstrations that are solutions; the others are careless, so that RL has something to improve."""
    file: str | None = None
    """A benchmark file of d1 that replaces the generated test split; none: the test split is generated."""

    @model_validator(mode="after")
    def _weights_are_usable(self) -> Self:
        check_weights(self.reward_weights, self.components)
        return self


def check_weights(weights: dict[str, float], components: Sequence[str]) -> None:
    """Refuse (ValueError) weights of unknown components, weights that are not finite, and weights that are all 0."""
    for name, weight in weights.items():
        if name not in components:
            raise ValueError(f"reward component {name!r} is unknown; give one of {', '.join(components)}")
        if not math.isfinite(weight):
            raise ValueError(f"reward weight {name}={weight} is not finite; give a number such as 1.0")
    if not any(weights.values()):
        raise ValueError(f"reward weights {weights} make every reward 0; weigh one of {', '.join(components)}")


class Task(ABC):
    """Lives as long as a run; holds its configuration and, where a file is given, the file's examples."""

    name: str
    alphabet: str
    """Every character that compact prompts and completions can contain, for a character tokenizer."""
    trusted: ClassVar[bool] = False
    """Whether evaluation may score in its own process: for rewards that are fast and never fail. Not inherited."""

    def __init_subclass__(cls) -> None:
        cls.trusted = cls.__dict__.get("trusted", False)

    def __init__(self, config: BaseTaskConfig, file_examples: list[Example] | None = None) -> None:
        self._config = config
        self._file_examples = file_examples

    def __reduce__(self) -> tuple[Any, ...]:
        """A task crosses processes as its class and its configuration, and is built anew."""
        return type(self), (self._config,)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the reward components."""
        return self._config.components

    @property
    def test_size(self) -> int | None:
        """Number of test examples; None where they are generated without end."""
        return None if self._file_examples is None else len(self._file_examples)

    def example(self, split: Split, index: int) -> Example:
        """The example under the prompt cursor; the same in every process.

        Raises UserError for an index beyond the benchmark file, ValueError for an unknown split or a negative index.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; give one of {', '.join(SPLITS)}")
        if index < 0:
            raise ValueError(f"index {index} is negative; the prompt cursor starts at 0")
        if split != "test" or self._file_examples is None:
            return self._generate(split, _generator(self._config.seed, _PROMPT_STREAM, SPLITS.index(split), index))
        if index >= len(self._file_examples):
            raise UserError(
                f"test example {index} does not exist: {self._config.file} has {len(self._file_examples)} rows "
                f"(0 to {len(self._file_examples) - 1}); evaluate fewer prompts, or leave `file` out to generate them"
            )
        return self._file_examples[index]

    def demonstration(self, example: Example, key: int) -> str:
        """A completion to imitate in warm start, careful or careless; the same for the same example and key (>= 0)."""
        # The prompt is part of the key: one key for all examples must not make all of them careless at once.
        prompt_hash = zlib.crc32(example.prompt.encode())
        rng = _generator(self._config.seed, _DEMONSTRATION_STREAM, prompt_hash, key)
        careful = bool(rng.random() < self._config.careful_fraction)
        return self._demonstrate(example, careful, rng)

    def answer(self, completion: str) -> str:
        """What the completion gives as its answer, stripped: the last `<answer>`, closed or cut off by the length.

        Without the tag it is the whole completion in compact style, and nothing in d1 style, which asks for the tag.
        """
        tagged = tagged_answer(completion)
        if tagged is not None:
            return tagged
        return completion.strip() if self._config.prompt_style == "compact" else ""

    def reward(self, components: dict[str, float]) -> float:
        """Weighted sum of the reward components."""
        return sum(weight * components[name] for name, weight in self._config.reward_weights.items())

    @abstractmethod
    def rewards(self, example: Example, completion: str) -> dict[str, float]:
        """A finite number for every one of `components`. Should not raise on account of the completion."""

    @abstractmethod
    def correct(self, example: Example, completion: str) -> bool:
        """Whether the completion solves the example exactly; what evaluation counts."""

    @abstractmethod
    def _generate(self, split: Split, rng: np.random.Generator) -> Example:
        """One example of a generated split, a function of `rng` alone."""

    @abstractmethod
    def _demonstrate(self, example: Example, careful: bool, rng: np.random.Generator) -> str:
        """One demonstration, a function of its arguments alone."""


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def holdout_generator(seed: int) -> np.random.Generator:
    """The generator that draws which problems are held out from training."""
    return _generator(seed, _HOLDOUT_STREAM)


def tagged_answer(completion: str) -> str | None:
    """The stripped text after the last `<answer>`, up to `</answer>` or the end; None without the tag."""
    start = completion.rfind("<answer>")
    if start < 0:
        return None
    return completion[start + len("<answer>") :].partition("</answer>")[0].strip()


def boxed_answer(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}` whose braces balance; None without one."""
    # One pass with a stack: a hostile answer full of openings must not cost the square of its length.
    openings: list[int] = []
    last, content = -1, None
    for position, character in enumerate(text):
        if character == "{":
            openings.append(position)
        elif character == "}" and openings:
            opening = openings.pop()
            if opening > last and text.startswith(r"\boxed", max(opening - len(r"\boxed"), 0), opening):
                last, content = opening, text[opening + 1 : position].strip()
    return content


def tagged_completion(reasoning: str, answer: str) -> str:
    """A completion in the form that d1's prompts ask for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


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
