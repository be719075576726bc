"""Packing: nothing is lost or cut, rows keep their limit, and positions begin anew with each sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.policy import segment_positions
from learner.demonstrations import Demonstration
from learner.packing import micro_batches, packed

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=20)


@given(lengths=LENGTHS, width=st.integers(12, 30))
def test_every_sequence_is_in_one_row_within_the_width(lengths: list[int], width: int) -> None:
    rows = packed(lengths, width)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert sizes[-1] <= width
    if len(sizes) > 1:
        assert sizes[0] + sizes[1] > width  # two rows would have been one


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens does not fit a row of 12"):
        packed([13], 12)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=12),
    width=st.one_of(st.none(), st.integers(12, 30)),
    budget=st.integers(1, 60),
)
def test_rows_hold_the_demonstrations(lengths: list[tuple[int, int]], width: int | None, budget: int) -> None:
    names = iter(range(1000, 10_000))  # every token is another, so it tells where it comes from
    given = [
        Demonstration([next(names) for _ in range(p)], [next(names) for _ in range(c)]) for p, c in lengths
    ]  # fmt: skip
    t = torch.arange(1, len(given) + 1) / len(given)
    noise = torch.arange(sum(c for _, c in lengths)) / 1000
    seen: dict[int, tuple[float, float, float]] = {}
    found: list[list[int]] = []
    for rows in micro_batches(given, t, noise, pad_id=0, width=width, budget=budget):
        assert rows.ids.numel() <= budget or len(rows.ids) == 1
        assert ((rows.segments == 0) == (rows.ids == 0)).all()
        for r in range(len(rows.ids)):
            for number in range(1, int(rows.segments[r].max()) + 1):
                found.append(rows.ids[r][rows.segments[r] == number].tolist())
            for c in range(rows.ids.shape[1]):
                numbers = (rows.rate[r, c], rows.noise[r, c], rows.weight[r, c])
                seen[int(rows.ids[r, c])] = tuple(map(float, numbers))  # pyright: ignore
    assert sorted(found) == sorted([*one.prompt, *one.completion] for one in given)
    drawn = iter(noise.tolist())
    for n, one in enumerate(given):
        assert all(seen[token] == (0, 0, 0) for token in one.prompt)
        for token in one.completion:
            share = 1 / (len(one.completion) * len(given))
            assert seen[token] == pytest.approx((float(t[n]), next(drawn), share))


def test_positions_begin_anew() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
