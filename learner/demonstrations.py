"""Demonstrations: pairs of prompt and completion that the warm start imitates, from a task or a file.

- Found by position, from 0 on, without end: a function of the run's seed, so that a warm start resumes anywhere.
- A file's rows come once per epoch in an order by seed. Of a conversation with several answers one is learned, drawn
  for each epoch, and what stands before it is the prompt (as in LLaDA, arXiv 2502.09992, appendix B.1).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from common.config import Config, SamplerConfig
from common.errors import UserError
from common.keyed_random import derive
from common.prompt import has_unknown, prompt_ids
from common.tasks.task import Split, Task
from learner.chat import chat_ids
from learner.demonstration_file import DemonstrationFile

CACHED_TEXTS = 100_000
CHECKED_EXAMPLES = 64  # of a task; a bad one after them ends the warm start when it comes
MOST_LEFT_OUT = 10_000  # in a row, of a task, which has no end
FIRST_EXAMPLE = 1 << 32  # reinforcement learning takes the training examples from 0 on: it does not repeat these
HELD_OUT = 2  # first word of the key that draws which rows are held out


class Demonstration(NamedTuple):
    """Token ids of one example; EOS padding is part of the completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


class Demonstrations:
    """Owned by one warm start."""

    def __init__(self, config: Config, task: Task, tokenizer: Any) -> None:
        """Raises UserError for a file that cannot be used."""
        self._config = config
        self._settings = config.warm_start
        self._task, self._tokenizer = task, tokenizer
        file = self._settings.file
        self._file = DemonstrationFile(file) if file is not None else None
        self._kept = self._held = np.zeros(0, dtype=np.int64)
        if self._file is not None:
            rows, count = np.arange(len(self._file)), self._settings.held_out
            if count >= len(rows):
                raise UserError(
                    f"warm_start.held_out={count} leaves nothing of the {len(rows)} demonstrations in {file}; hold out "
                    f"{len(rows) - 1} or less"
                )
            held = np.random.default_rng([config.run.seed, HELD_OUT, count]).permutation(len(rows))[:count]
            self._held, self._kept = np.sort(held), np.delete(rows, held)
        self._epoch = -1
        self._order = self._kept
        self._cached = lru_cache(maxsize=CACHED_TEXTS)(self._encoded)

    @property
    def count(self) -> int | None:
        """How many different ones there are; None where a task makes them without end."""
        return len(self._kept) if self._file is not None else None

    def at(self, position: int) -> Demonstration | None:
        """The demonstration at a position; None when it is too long and `too_long` lets it be left out.

        Raises:
            UserError: for a text that exceeds the limits, or that the tokenizer does not know.
        """
        if self._file is None:
            return self._of_task("train", FIRST_EXAMPLE + position, f"demonstration {position + 1}")
        epoch, index = divmod(position, len(self._kept))
        if epoch != self._epoch:
            shuffled = np.random.default_rng([self._config.run.seed, epoch]).permutation(len(self._kept))
            self._epoch, self._order = epoch, self._kept[shuffled]
        return self._of_row(int(self._order[index]), epoch)

    def fitting(self, position: int) -> tuple[Demonstration, int]:
        """The first demonstration from a position on that is not left out, and its position.

        Raises:
            UserError: as `at`; when all of a file, or `MOST_LEFT_OUT` of a task in a row, are left out.
        """
        count = self.count
        most = MOST_LEFT_OUT if count is None else 2 * count - 1  # so many in a row hold an epoch
        for place in range(position, position + most):
            found = self.at(place)
            if found is not None:
                return found, place
        raise UserError(
            f"none of {count or most} demonstrations fits warm_start.max_tokens={self._settings.max_tokens}; raise it, "
            "or set warm_start.too_long=truncate"
        )

    def held_out(self) -> list[Demonstration]:
        """Those that are never among the others, but for the ones that are too long."""
        if self._file is None:
            count = self._settings.held_out
            found = [self._of_task("validation", i, f"held-out demonstration {i + 1}") for i in range(count)]
        else:
            found = [self._of_row(row, 0) for row in self._held.tolist()]
        return [one for one in found if one is not None]

    def check(self, most: int) -> None:
        """Tokenise at most so many rows of the file, evenly spread, or a task's first ones. Raises as `fitting`."""
        if self._file is not None:
            for row in np.unique(np.linspace(0, len(self._file) - 1, most).astype(int)).tolist():
                self._of_row(row, 0)
        if self._settings.steps:  # else a task need not have any
            for position in range(CHECKED_EXAMPLES if self._file is None else 0):
                self.at(position)
            self.fitting(0)

    def _of_task(self, split: Split, index: int, where: str) -> Demonstration | None:
        example = self._task.example(split, index)
        text = self._task.demonstration(example, derive(self._config.run.seed, index))
        if self._tokenizer.chat_template and self._config.model.chat_template != "off":
            return self._fitted(*self._chat(_pair(example.prompt, text), where), where, (example.prompt, text))
        return self._fitted(self._cached(example.prompt), self._cached(text), where, (example.prompt, text))

    def _of_row(self, row: int, epoch: int) -> Demonstration | None:
        if self._file is None:
            raise RuntimeError("rows are a file's")
        messages, where = self._file[row], self._file.name(row)
        turns = [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]
        turn = turns[derive(self._config.run.seed, epoch, row) % len(turns)]
        chosen = messages[: turn + 1]
        return self._fitted(*self._chat(chosen, where), where, (chosen[0]["content"], chosen[-1]["content"]))

    def _chat(self, messages: list[dict[str, str]], where: str) -> tuple[list[int], list[int]]:
        return chat_ids(self._tokenizer, messages, where, chat_template=self._config.model.chat_template)

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _fitted(
        self, prompt: list[int], completion: list[int], where: str, texts: tuple[str, str]
    ) -> Demonstration | None:
        """Within the limits, and padded with EOS."""
        sampler, limit = self._config.sampler, self._settings.max_tokens
        for ids, text, kind in zip((prompt, completion), texts, ("prompt", "completion"), strict=True):
            check_known(self._tokenizer, ids, text, kind, where)
        if self._tokenizer.mask_token_id in completion:
            raise UserError(
                f"{where}: completion {texts[1][:60]!r} holds {self._tokenizer.mask_token!r}, the MASK token, which is "
                "never predicted; write it otherwise"
            )
        eos = [self._tokenizer.eos_token_id]
        if limit is None:
            check_length(prompt, "prompt", sampler, where)
            check_length(completion, "completion", sampler, where)
            return Demonstration(prompt, completion + eos * (sampler.max_completion_tokens - len(completion)))
        room = limit - len(prompt)
        if len(completion) >= room:  # an EOS has to follow
            if self._settings.too_long == "refuse":
                raise UserError(
                    f"{where}: {len(prompt) + len(completion)} tokens and an EOS exceed warm_start.max_tokens={limit}; "
                    "raise it, or set warm_start.too_long to skip or truncate"
                )
            if self._settings.too_long == "skip" or room < 1:
                return None
            return Demonstration(prompt, completion[:room])
        wanted = min(max(sampler.max_completion_tokens - len(completion), 1), self._settings.eos_padding)
        return Demonstration(prompt, completion + eos * min(wanted, room - len(completion)))


def checked_ids(tokenizer: Any, text: str, kind: str, config: Config, where: str) -> list[int]:
    """Token ids of a prompt (through the chat template) or completion that fits the sampler and the vocabulary.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: what to encode; nothing is added around a completion.
        kind: `prompt` or `completion`.
        config: has the limits.
        where: what to call the text in an error.

    Raises:
        UserError: naming the length and its limit, or the text that the tokenizer does not know.
    """
    if kind == "prompt":
        ids = prompt_ids(tokenizer, text, chat_template=config.model.chat_template)
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
    check_length(ids, kind, config.sampler, where)
    check_known(tokenizer, ids, text, kind, where)
    return ids


def check_length(ids: list[int], kind: str, sampler: SamplerConfig, where: str) -> None:
    """Refuse (UserError) a prompt or completion that is longer than the sampler's limit."""
    limit = sampler.max_prompt_tokens if kind == "prompt" else sampler.max_completion_tokens
    if len(ids) > limit:
        raise UserError(
            f"{where}: {kind} of {len(ids)} tokens exceeds sampler.max_{kind}_tokens={limit}; raise the limit "
            f"or shorten the {kind}"
        )


def check_known(tokenizer: Any, ids: list[int], text: str, kind: str, where: str) -> None:
    """Refuse (UserError) what the tokenizer has no token for."""
    if has_unknown(tokenizer, ids):
        raise UserError(f"{where}: {kind} {text[:60]!r} has characters that the tokenizer does not know; use others")


def _pair(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
