"""Micro-batches: how a batch is cut so that one forward and backward pass stays within the token budget."""

import itertools
import math

import torch
from torch import Tensor

from common.config import LearnerConfig
from learner.batch import Batch
from learner.surrogate import most_rows


def micro_batches(batch: Batch, config: LearnerConfig) -> list[Tensor]:
    """Completions `[n]` of each part: groups, cut so that no part exceeds `micro_batch_tokens`.

    A group that exceeds it alone is cut as well; one completion may exceed it.
    """
    sizes = torch.bincount(batch.group)
    width = batch.prompts.shape[1] + batch.length
    together = most_rows(torch.arange(1, int(sizes.max()) + 1), config) * width
    largest = max(1, int((together <= config.micro_batch_tokens).sum()))
    parts = [size for group in sizes.tolist() for size in _even_parts(group, largest)]
    ends = [0, *itertools.accumulate(parts)]
    return [
        torch.arange(ends[low], ends[high], device=batch.group.device)
        for low, high in cuts(most_rows(torch.tensor(parts), config), batch, config.micro_batch_tokens)
    ]


def cuts(rows: Tensor, batch: Batch, tokens: int) -> list[tuple[int, int]]:
    """Ranges of things that need `rows` each, in order, within the token budget where one thing alone is."""
    width = batch.prompts.shape[1] + batch.length
    cuts, first, budget = [], 0, 0
    for number, cost in enumerate((rows * width).tolist()):
        if budget and budget + cost > tokens:
            cuts.append((first, number))
            first, budget = number, 0
        budget += cost
    return [*cuts, (first, len(rows))]


def _even_parts(count: int, largest: int) -> list[int]:
    """As few numbers up to `largest` as add up to `count`, alike to one."""
    parts = math.ceil(count / largest)
    return [count // parts + (number < count % parts) for number in range(parts)]
