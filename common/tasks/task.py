"""What every task offers, and what all tasks share: keyed randomness, answer extraction, weights.

- An example is found by the *prompt cursor* (split, index): no state, no global generator, so a run resumes anywhere.
- Splits never share a problem; what makes two problems the same is the task's to say.
- A completion is decoded text without special tokens; text after the stop token is the caller's to cut.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import numpy as np
from pydantic import Field, model_validator

from common.section import Section

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Found = TypeVar("Found")

# An opening brace, with the box that it opens, or a closing one.
_BRACE = re.compile(r"(?:\\boxed|\\fbox)?\{|\}")
# First word of every generator key: keeps the streams of prompts, demonstrations, hold-outs and epochs apart.
PROMPT_STREAM, DEMONSTRATION_STREAM, HOLDOUT_STREAM, EPOCH_STREAM = 0, 1, 2, 3


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

    @property
    def files(self) -> tuple[str, ...]:
        """Every data file or folder that the section names."""
        return ()

    @model_validator(mode="after")
    def _weights_are_usable(self) -> Self:
        check_weights(self.reward_weights, self.components)
        return self


def check_weights(weights: dict[str, float], components: Sequence[str]) -> None:
    """Refuse (ValueError) weights of unknown components, and weights that are all 0."""
    for name in weights:
        if name not in components:
            raise ValueError(f"reward component {name!r} is unknown; give one of {', '.join(components)}")
    if not any(weights.values()):
        raise ValueError(f"reward weights {weights} make every reward 0; weigh one of {', '.join(components)}")


class Task(ABC):
    """Lives as long as a run; holds its configuration and, where they come from files, its examples."""

    name: str
    alphabet: str = ""
    """Every character that compact prompts and completions can contain: a model that the run builds needs it."""
    trusted: ClassVar[bool] = False
    """Whether evaluation may score in its own process: for rewards that are fast and never fail. Not inherited."""

    def __init_subclass__(cls) -> None:
        cls.trusted = cls.__dict__.get("trusted", False)

    def __init__(self, config: BaseTaskConfig) -> None:
        self._config = config

    def __reduce__(self) -> tuple[Any, ...]:
        """A task crosses processes as its class and its configuration, and is built anew."""
        return type(self), (self._config,)

    def prepare(self) -> None:
        """Called once in a process that scores, before its limits hold: the place to import what is slow to import."""
        return None

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the reward components."""
        return self._config.components

    def size(self, split: Split) -> int | None:
        """How far the cursor of a split goes; None: without end. Raises UserError for data that cannot be used."""
        return None

    def distinct(self, split: Split) -> int | None:
        """How many of a split's examples, its first ones, are all that there are; None: it makes others without end."""
        return self.size(split)

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """The example under the prompt cursor; the same in every process.

        Raises UserError for an index beyond the split's size, ValueError for an unknown split or a negative index.
        """

    @abstractmethod
    def demonstration(self, example: Example, key: int) -> str:
        """A completion to imitate in warm start; the same for the same example and key (>= 0)."""

    def posed(self, question: str, truth: Any) -> Example:
        """The example of a recorded question and its ground truth, for scoring answers that exist already.

        Raises ValueError that says what the question or the ground truth should be.
        """
        raise ValueError(f"task {self.name} scores no recorded answers; define `posed` in {type(self).__name__}")

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


def kept(method: Callable[[Any, Example, str], Found]) -> Callable[[Any, Example, str], Found]:
    """A method that keeps its last answer: rewards and verdict of a completion are asked for one after the other."""
    key = f"_kept_{method.__qualname__}"

    @wraps(method)
    def answer(self: Any, example: Example, completion: str) -> Found:
        last = vars(self).get(key)
        if last is None or last[0] is not example or last[1] != completion:
            last = vars(self)[key] = (example, completion, method(self, example, completion))
        return last[2]

    return answer


def check_cursor(split: Split, index: int) -> None:
    """Refuse (ValueError) a split or an index that no task has."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; give one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index {index} is negative; the prompt cursor starts at 0")


def keyed_generator(seed: int, *key: int) -> np.random.Generator:
    """The generator of a seed and a key whose first word is one of the streams above."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def tagged_answer(completion: str) -> str | None:
    """The stripped text after the last `<answer>`, up to `</answer>` or the end; None without the tag."""
    start = completion.rfind("<answer>")
    if start < 0:
        return None
    return completion[start + len("<answer>") :].partition("</answer>")[0].strip()


def boxed_answer(text: str) -> str | None:
    r"""The stripped content of the last `\boxed{...}` whose braces balance; None without one."""
    return next(boxed_answers(text), None)


def boxed_answers(text: str) -> Iterator[str]:
    r"""The stripped content of every `\boxed{...}` (or `\fbox`) whose braces balance, the last one first."""
    # One pass with a stack: a hostile answer full of openings must not cost the square of its length.
    openings: list[int] = []
    closed: list[tuple[int, int]] = []
    for match in _BRACE.finditer(text):
        if match.group() == "}":
            if openings and (opening := openings.pop()) >= 0:
                closed.append((opening, match.start()))
        else:
            openings.append(match.end() if len(match.group()) > 1 else -1)
    for opening, closing in sorted(closed, reverse=True):
        yield text[opening:closing].strip()


def tagged_completion(reasoning: str, answer: str) -> str:
    """A completion in the form that d1's prompts ask for."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
