"""Keyed randomness: uniform, and a function of its key alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.keyed_random import derive, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize("axis", ["seed", "step", "position"])
def test_uniform_numbers_are_uniform_along_every_key_word(axis: str) -> None:
    count, bins = 100_000, 50
    key = {"seed": torch.tensor([derive(3)]), "step": torch.tensor([1]), "position": torch.tensor([0])}
    key[axis] = torch.arange(count)
    u = uniform(**key)
    assert u.dtype == torch.float64
    assert u.shape == (count,)
    assert u.min() > 0
    assert u.max() < 1
    assert float(u.mean()) == pytest.approx(1 / 2, abs=5 * (1 / 12 / count) ** 0.5)
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 * (1 / 180 / count) ** 0.5)
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 5 / count**0.5
    observed = torch.histc(u, bins, 0, 1)
    chi_square = float(((observed - count / bins) ** 2 / (count / bins)).sum())
    assert chi_square < bins - 1 + 5 * (2 * (bins - 1)) ** 0.5


def test_key_words_are_not_interchangeable() -> None:
    key = torch.arange(40)
    cube = uniform(key[:, None, None], key[None, :, None], key[None, None, :])
    assert cube.unique().numel() == 40**3


@given(seed=INT64, step=INT64, position=INT64)
def test_uniform_stays_inside_the_open_interval(seed: int, step: int, position: int) -> None:
    u = float(uniform(torch.tensor(seed), torch.tensor(step), torch.tensor(position)))
    assert 0 < u < 1


@settings(max_examples=25)
@given(keys=st.lists(st.tuples(INT64, st.integers(0, 4096), st.integers(-2, 4096)), min_size=1, max_size=20))
def test_a_batch_gives_what_each_key_gives_alone(keys: list[tuple[int, int, int]]) -> None:
    batch = uniform(*torch.tensor(keys).unbind(1))
    alone = [float(uniform(torch.tensor(seed), step, position)) for seed, step, position in keys]
    assert batch.tolist() == alone
    assert uniform(*torch.tensor(keys[::-1]).unbind(1)).tolist() == alone[::-1]


def reference_bits(*words: int) -> int:
    """The chained finaliser of splitmix64 with unbounded integers."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state


@given(words=st.lists(st.integers(0, 2**63 - 1), min_size=3, max_size=3))
def test_python_and_tensor_hash_are_the_published_one(words: list[int]) -> None:
    bits = reference_bits(*words)
    assert derive(*words) == bits >> 1
    assert float(uniform(*map(torch.tensor, words))) == ((bits >> 12) + 0.5) * 2.0**-52


# First output of splitmix64 from state 0 is e220a8397b1dcdaf; the others pin our chaining.
@pytest.mark.parametrize(
    ("words", "seed"),
    [
        ((0,), 0xE220A8397B1DCDAF >> 1),
        ((0, 0), 6017775124710473527),
        ((7, 3, 1), 8612084309167925299),
        ((1, 3, 7), 8478124552429870026),
        ((0, 1_000_003, 5), 3971637522550048372),
    ],
)
def test_derive_is_pinned(words: tuple[int, ...], seed: int) -> None:
    assert derive(*words) == seed
    assert 0 <= derive(*words) < 2**63
