"""Reveal rules, against loops and brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.reference_sampler import select
from actors.reveal_rules import REVEAL_RULES

# Multiples of 1/16: sums are exact, so the brute force and the rule cannot differ by rounding; and ties are common.
SIXTEENTHS = st.integers(0, 64).map(lambda n: n / 16)
PARAMETERS = {
    "entropy_bound": st.one_of(st.just(0.0), SIXTEENTHS),
    "confidence": st.floats(0, 1),
    "top_k": st.integers(1, 10).map(float),
}
Row = tuple[list[float], list[float], list[bool], float]


@st.composite
def rows(draw: st.DrawFn, rule: str) -> list[Row]:
    """Rows of one length: entropies, top probabilities (few values, so that ties are common), active, parameter."""
    length = draw(st.integers(1, 9))
    tops = st.one_of(st.floats(0.05, 1), st.sampled_from([0.25, 0.5, 1.0]))
    line = st.tuples(
        *(st.lists(kind, min_size=length, max_size=length) for kind in (SIXTEENTHS, tops, st.booleans())),
        PARAMETERS[rule],
    )
    return draw(st.lists(line, min_size=1, max_size=4))


def apply(rule: str, batch: list[Row]) -> Tensor:
    entropies, tops, active, parameter = zip(*batch, strict=True)
    wide = torch.float64
    return REVEAL_RULES[rule](
        torch.tensor(entropies, dtype=wide),
        torch.tensor(tops, dtype=wide),
        torch.tensor(active),
        torch.tensor(parameter, dtype=wide),
    )


@pytest.mark.parametrize("rule", REVEAL_RULES)
@settings(max_examples=100)
@given(data=st.data())
def test_a_rule_does_what_its_loop_does_row_by_row(rule: str, data: st.DataObject) -> None:
    batch = data.draw(rows(rule))
    chosen = apply(rule, batch)
    for (entropies, tops, active, parameter), mine in zip(batch, chosen.tolist(), strict=True):
        where = [at for at, flag in enumerate(active) if flag]
        revealed = [at for at, flag in enumerate(mine) if flag]
        assert set(revealed) <= set(where)
        assert bool(revealed) == bool(where)
        if where:
            expected = select(rule, {a: entropies[a] for a in where}, {a: tops[a] for a in where}, parameter)
            assert revealed == sorted(expected)


@pytest.mark.parametrize("rule", REVEAL_RULES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_bolder_parameter_reveals_a_superset(rule: str, data: st.DataObject) -> None:
    batch = data.draw(rows(rule))
    other = data.draw(PARAMETERS[rule])
    low, high = ([(*row[:3], pick(row[3], other)) for row in batch] for pick in (min, max))
    cautious, bold = (high, low) if rule == "confidence" else (low, high)
    assert not (apply(rule, cautious) & ~apply(rule, bold)).any()


@pytest.mark.parametrize(
    ("gamma", "revealed"),
    [
        (0.0, [1]),  # nothing fits beside the least uncertain one
        (0.0999, [1]),
        (0.11, [1, 3]),  # 0.1 before the last one
        (0.31, [0, 1, 3]),  # 0.1 + 0.2
        (0.61, [0, 1, 3, 4]),  # 0.1 + 0.2 + 0.3; position 2 is not masked
        (100.0, [0, 1, 3, 4]),
    ],
)
def test_entropy_bound_by_hand(gamma: float, revealed: list[int]) -> None:
    row = ([0.3, 0.1, 0.0, 0.2, 0.9], [0.5] * 5, [True, True, False, True, True], gamma)
    assert apply("entropy_bound", [row])[0].nonzero().flatten().tolist() == revealed


@settings(max_examples=50)
@given(entropies=st.lists(st.floats(1e-6, 5), min_size=1, max_size=9))
def test_gamma_zero_reveals_one(entropies: list[float]) -> None:
    size = len(entropies)
    assert int(apply("entropy_bound", [(entropies, [0.5] * size, [True] * size, 0.0)]).sum()) == 1


@pytest.mark.parametrize("rule", ["entropy_bound", "confidence", "top_k"])
def test_ties_go_to_the_leftmost(rule: str) -> None:
    row = ([1.0] * 6, [0.5] * 6, [False, True, True, False, True, True], {"confidence": 0.9, "top_k": 1.0}.get(rule, 0))
    assert apply(rule, [row] * 3).nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
