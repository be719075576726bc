"""Demonstrations: pairs of prompt and completion that the warm start imitates, from a task or a JSONL file."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from common.config import Config
from common.errors import UserError
from common.keyed_random import derive
from common.prompt import has_unknown, prompt_ids
from common.tasks.task import Task

CACHED_TEXTS = 100_000
FIRST_EXAMPLE = 1 << 32  # reinforcement learning takes the training examples from 0 on: it does not repeat these


def demonstrations(config: Config, task: Task, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Endless stream of (prompt ids, completion ids padded with EOS to L), a function of the run's seed.

    Raises:
        UserError: for a text that exceeds the sampler's limits, or a file that cannot be used.
    """
    if config.warm_start.file is not None:
        pairs = read_demonstrations(config.warm_start.file)
        texts = (pairs[i] for order in _orders(len(pairs), config.run.seed) for i in order)
    else:
        texts = _from_task(task, config.run.seed)
    cache: dict[tuple[str, str], list[int]] = {}
    for number, pair in enumerate(texts, 1):
        ids = []
        for kind, text in zip(("prompt", "completion"), pair, strict=True):
            if (kind, text) not in cache:
                cache[kind, text] = checked_ids(tokenizer, text, kind, config, f"demonstration {number}")
            ids.append(cache[kind, text])
        if len(cache) > CACHED_TEXTS:
            cache.clear()
        prompt, answer = ids
        yield prompt, answer + [tokenizer.eos_token_id] * (config.sampler.max_completion_tokens - len(answer))


def read_demonstrations(path: str) -> list[tuple[str, str]]:
    """Pairs of a JSONL file with `prompt` and `completion`, one for each line that is not blank.

    Raises:
        UserError: naming file and line when something is missing or malformed, or when there is nothing.
    """
    expected = "a JSONL file with the texts `prompt` and `completion` on each line"
    try:
        # not splitlines(): JSON allows U+2028 inside a string
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"warm_start.file={path} cannot be read ({error}); give {expected}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = (row["prompt"], row["completion"])
            json.dumps(pair, ensure_ascii=False).encode()  # half a character is no text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {line[:60]!r} ({error}); give {expected}") from error
        if not all(isinstance(text, str) for text in pair):
            raise UserError(f"{path}, line {number}: {line[:60]!r} holds a value that is no text; give {expected}")
        pairs.append(pair)
    if not pairs:
        raise UserError(f"warm_start.file={path} holds no demonstrations; add lines or leave the key out")
    return pairs


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
    sampler = config.sampler
    if kind == "prompt":
        ids, limit = prompt_ids(tokenizer, text, chat_template=config.model.chat_template), sampler.max_prompt_tokens
    else:
        ids, limit = tokenizer.encode(text, add_special_tokens=False), sampler.max_completion_tokens
    if len(ids) > limit:
        raise UserError(
            f"{where}: {kind} of {len(ids)} tokens exceeds sampler.max_{kind}_tokens={limit}; raise the limit "
            f"or shorten the {kind}"
        )
    if has_unknown(tokenizer, ids):
        raise UserError(f"{where}: {kind} {text[:60]!r} has characters that the tokenizer does not know; use others")
    return ids


def _from_task(task: Task, seed: int) -> Iterator[tuple[str, str]]:
    for index in count(FIRST_EXAMPLE):
        example = task.example("train", index)
        yield example.prompt, task.demonstration(example, derive(seed, index))


def _orders(count: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield np.random.default_rng([seed, epoch]).permutation(count).tolist()
        epoch += 1
