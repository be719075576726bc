"""Packing: demonstrations as rows of token ids, several to a row where the model allows it, and rows as micro-batches.

What a token loses does not depend on where its demonstration stands: masking probability and noise are drawn for
demonstrations, before they are laid out, and sequences of one row see nothing of each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from torch import Tensor

from learner.demonstrations import Demonstration


@dataclass(frozen=True)
class Rows:
    """One micro-batch; all `[R, T]`."""

    ids: Tensor
    segments: Tensor
    """int64: 1, 2, ... for the sequences of a row from left to right, 0 for padding, which is on the right."""
    rate: Tensor
    """Masking probability t of a completion's tokens; 0 elsewhere, so nothing else is masked."""
    noise: Tensor
    """Uniforms in [0, 1); a token is masked where `noise < rate`."""
    weight: Tensor
    """Share of a completion's token in the step's loss: one over (the completion's length x demonstrations)."""

    @property
    def several(self) -> bool:
        """Whether any row holds more than one sequence."""
        return bool((self.segments > 1).any())

    def to(self, device: torch.device) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


def micro_batches(
    demonstrations: Sequence[Demonstration],
    t: Tensor,
    noise: Tensor,
    *,
    pad_id: int,
    width: int | None,
    budget: int,
) -> Iterator[Rows]:
    """The demonstrations of one step as rows, longest first.

    Args:
        demonstrations: N of them.
        t: `[N]` in (0, 1], their masking probabilities.
        noise: uniforms, as many as the completions have tokens, in order.
        pad_id: id of padding.
        width: tokens of a packed row; None puts each demonstration into a row of its own.
        budget: most tokens of a micro-batch, padding included; a single row may exceed it.
    """
    lengths = [one.tokens for one in demonstrations]
    rows = packed(lengths, width) if width is not None else [[index] for index in range(len(lengths))]
    rows.sort(key=lambda row: -sum(lengths[index] for index in row))
    firsts = np.concatenate([[0], np.cumsum([len(one.completion) for one in demonstrations])])
    uniforms, rates = noise.numpy(), t.numpy()
    while rows:
        longest = sum(lengths[index] for index in rows[0])
        count = max(1, budget // longest)
        chosen, rows = rows[:count], rows[count:]
        shape = (len(chosen), longest)
        ids = np.full(shape, pad_id, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        rate, drawn, weight = (np.zeros(shape, dtype=np.float32) for _ in range(3))
        for place, row in enumerate(chosen):
            start = 0
            for number, index in enumerate(row, 1):
                prompt, completion = demonstrations[index]
                middle, end = start + len(prompt), start + lengths[index]
                ids[place, start:middle], ids[place, middle:end] = prompt, completion
                segments[place, start:end] = number
                rate[place, middle:end] = rates[index]
                drawn[place, middle:end] = uniforms[firsts[index] : firsts[index + 1]]
                weight[place, middle:end] = 1 / (len(completion) * len(demonstrations))
                start = end
        yield Rows(*map(torch.from_numpy, (ids, segments, rate, drawn, weight)))


def packed(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of `lengths` in as few rows of at most `width` as first fit, longest first, finds.

    Raises:
        ValueError: for a length beyond the width.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > width:
            raise ValueError(f"a sequence of {lengths[index]} tokens does not fit a row of {width}")
        fits = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if fits is None:
            rows.append([])
            room.append(width)
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= lengths[index]
    return rows
