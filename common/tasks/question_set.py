"""Question set: questions from files, in splits that never share one.

- Each split has a source of its own, or is held out of the training source: a question's split is then a keyed hash of
  its normalised text alone, so it does not change when rows are added.
- Questions are the same when their normalised texts are (Unicode NFKC, no case, single spaces). One that stands in test
  is left out of validation, one that stands in either is left out of training; `removed` counts them.
- Training goes round and round: each epoch is a keyed permutation, so an index alone finds its question.
"""

import hashlib
import logging
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from common.errors import UserError
from common.tasks.task import EPOCH_STREAM, Split, keyed_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One row, read."""

    text: str
    truth: Any
    """The answer that counts as right, as the task writes it; plain JSON."""
    solution: str | None
    """Worked solution, where the row has one."""
    where: str
    """File and row."""


class QuestionSet:
    """Immutable once read."""

    def __init__(self, splits: dict[Split, list[Question]], *, seed: int, removed: dict[Split, int]) -> None:
        self.splits = splits
        self.removed = removed
        """Questions of each split that were left out because a later one holds them."""
        self._seed = seed
        self._order = lru_cache(maxsize=4)(self._permutation)

    def question(self, split: Split, index: int) -> Question:
        """The question under the cursor. Raises IndexError beyond validation and test, and in an empty split."""
        questions = self.splits[split]
        if split != "train" or not questions:
            return questions[index]
        epoch, position = divmod(index, len(questions))
        return questions[self._order(epoch)[position]]

    def _permutation(self, epoch: int) -> list[int]:
        return keyed_generator(self._seed, EPOCH_STREAM, epoch).permutation(len(self.splits["train"])).tolist()


def read_question_set(
    sources: dict[Split, str | None], read: Callable[[str, Split], list[Question]], *, seed: int, holdout: float
) -> QuestionSet:
    """The splits of some sources.

    Args:
        sources: where each split comes from; None holds validation or test out of the training source.
        read: the questions of a source and split, in the source's order.
        seed: of the hold-out and of the epochs.
        holdout: share of the training source's questions that each held-out split takes.

    Raises:
        UserError: when nothing is left to train on.
    """
    found: dict[Split, list[Question]] = {
        split: [] if source is None else read(source, split) for split, source in sources.items()
    }
    given = len(found["train"])
    training: list[Question] = []
    for question in found["train"]:
        split = _held_out(question.text, seed, holdout)
        if split != "train" and sources[split] is None:
            found[split].append(question)
        else:
            training.append(question)
    found["train"] = training
    taken: set[str] = set()
    removed: dict[Split, int] = {}
    splits: dict[Split, list[Question]] = {}
    for split in ("test", "validation", "train"):
        kept = [question for question in found[split] if normalised(question.text) not in taken]
        removed[split] = len(found[split]) - len(kept)
        splits[split] = kept
        taken |= {normalised(question.text) for question in kept}
        if removed[split]:
            log.warning("%d %s questions stand in another split too and are left out", removed[split], split)
    if given and not splits["train"]:
        raise UserError(
            f"none of the {given} questions of task.data={sources['train']} is left for training: {removed['train']} "
            "stand in validation or test too, the others are held out; give files that differ, or lower task.holdout"
        )
    return QuestionSet(splits, seed=seed, removed=removed)


def normalised(text: str) -> str:
    """What makes two questions the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _held_out(text: str, seed: int, holdout: float) -> Split:
    key = np.uint64(seed % 2**64).tobytes()
    digest = hashlib.blake2b(normalised(text).encode(errors="replace"), digest_size=8, key=key).digest()
    share = int.from_bytes(digest) / 2**64
    return "validation" if share < holdout else "test" if share < 2 * holdout else "train"
