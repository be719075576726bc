"""Behaviour distribution: exact softmax without MASK, and draws that follow it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_sampler import entropy_of, inverse_cdf, softmax
from torch import Tensor

from common.behaviour import behaviour_log_probs, draw, entropy, reveal_log_probs
from common.keyed_random import uniform

TEMPERATURES = [0.3, 0.7, 1.0, 2.5]
MASK = 5
# The smallest and largest numbers that `uniform` can return, what rounding may make of them, and an ordinary one.
EDGES = [0.0, 2.0**-53, 1 - 2.0**-53, 1.0, 0.5]


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_probs_are_the_softmax_without_mask(temperature: float) -> None:
    logits = random_logits(6, 12)
    log_probs = behaviour_log_probs(logits, torch.full((6,), temperature, dtype=torch.float64), MASK)
    expected = torch.tensor([softmax(row, MASK, temperature) for row in logits.tolist()], dtype=torch.float64)
    assert log_probs.dtype == torch.float64
    torch.testing.assert_close(log_probs.exp(), expected, rtol=0, atol=1e-14)
    assert (log_probs[:, MASK] == -torch.inf).all()


def test_every_row_has_its_own_temperature_and_zero_means_one() -> None:
    logits = random_logits(3, 12)
    mixed = behaviour_log_probs(logits, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), MASK)
    plain = reveal_log_probs(logits, MASK)
    assert torch.equal(mixed[:2], plain[:2])
    torch.testing.assert_close(mixed[2], reveal_log_probs(logits[2] / 2, MASK))
    assert not torch.allclose(mixed[2], plain[2])


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_precision_is_fp32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits = random_logits(2, 12, dtype)
    log_probs = behaviour_log_probs(logits, torch.ones(2), MASK)
    assert log_probs.dtype == reveal_log_probs(logits, MASK).dtype == wide
    expected = torch.tensor([softmax(row, MASK, 1.0) for row in logits.double().tolist()])
    torch.testing.assert_close(log_probs.exp().float(), expected.float(), rtol=1e-5, atol=1e-7)


def test_mask_has_no_mass_even_where_its_logit_is_largest() -> None:
    logits = random_logits(4, 12)
    logits[:, MASK] = 1e4
    before = logits.clone()
    for log_probs in (reveal_log_probs(logits, MASK), behaviour_log_probs(logits, torch.ones(4), MASK)):
        assert (log_probs[:, MASK] == -torch.inf).all()
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_draws_have_the_frequencies_of_the_softmax(temperature: float) -> None:
    count = 100_000
    logits = torch.linspace(-1.5, 1.5, 10, dtype=torch.float64)[[3, 7, 0, 9, 5, 1, 8, 2, 6, 4]]
    log_probs = behaviour_log_probs(logits, torch.tensor(temperature), MASK)
    ids = draw(log_probs.expand(count, -1), uniform(torch.arange(count), 1, 0))
    observed = torch.bincount(ids, minlength=10).double()
    expected = count * torch.tensor(softmax(logits.tolist(), MASK, temperature), dtype=torch.float64)
    assert observed[MASK] == 0
    kept = torch.arange(10) != MASK
    chi_square = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 8 + 5 * math.sqrt(2 * 8)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-3, 3), min_size=3, max_size=12),
    u=st.floats(2.0**-53, 1 - 2.0**-53),
    mask=st.integers(0, 2),
)
def test_a_draw_is_the_inverse_cdf_by_loop(logits: list[float], u: float, mask: int) -> None:
    probabilities = softmax(logits, mask, 1.0)
    cdf = [sum(probabilities[: n + 1]) for n in range(len(logits))]
    if min(abs(u - edge) for edge in cdf) < 1e-12:
        return  # rounding may decide either way
    drawn = draw(reveal_log_probs(torch.tensor([logits], dtype=torch.float64), mask), torch.tensor([u]).double())
    assert drawn.tolist() == [inverse_cdf(probabilities, u)]


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (0.25, 1), (0.5, 3), (0.75, 3), (1.0, 3)])
def test_a_draw_on_an_edge_goes_to_the_next_id_with_mass(u: float, expected: int) -> None:
    log_probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).log()
    assert draw(log_probs, torch.tensor([u], dtype=torch.float64)).tolist() == [expected]


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.one_of(st.floats(-1e4, 1e4), st.just(-math.inf), st.just(0.0)), min_size=2, max_size=40),
    u=st.one_of(st.sampled_from(EDGES), st.floats(2.0**-53, 1 - 2.0**-53)),
    data=st.data(),
    wide=st.booleans(),
)
def test_a_drawn_id_has_mass(logits: list[float], u: float, data: st.DataObject, wide: bool) -> None:
    mask = data.draw(st.integers(0, len(logits) - 1))
    if all(value == -math.inf for token, value in enumerate(logits) if token != mask):
        return  # no distribution: the engine refuses it
    dtype = torch.float64 if wide else torch.float32
    log_probs = reveal_log_probs(torch.tensor([logits], dtype=dtype), mask)
    drawn = int(draw(log_probs, torch.tensor([u], dtype=torch.float64)))
    assert drawn != mask
    assert log_probs.exp()[0, drawn] > 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_a_drawn_id_has_mass_at_the_vocabulary_of_llada(scale: float) -> None:
    """In fp32 the cumulative sum of 126k probabilities misses 1 by 1e-6, and plain search lands on empty ids."""
    vocabulary, mask = 126_464, 126_336
    logits = scale * torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(2))
    logits[:, mask] = 50.0
    logits[:, mask - 200 : mask] = -300.0  # empty ids before MASK, and in some rows after it and at the front
    logits[::2, mask:] = -torch.inf
    logits[1::2, :300] = -torch.inf
    log_probs = behaviour_log_probs(logits, torch.ones(8), mask)
    cdf = log_probs.exp().cumsum(-1)
    around_mask = cdf[:, mask].double()
    uniforms = [torch.full((8,), u, dtype=torch.float64) for u in EDGES]
    uniforms += [around_mask, around_mask / cdf[:, -1], (around_mask - 2.0**-30), (around_mask + 2.0**-30)]
    uniforms += [uniform(torch.arange(8), 1, at) for at in range(4)]
    for u in uniforms:
        ids = draw(log_probs, u.clamp(2.0**-53, 1 - 2.0**-53))
        assert (ids != mask).all()
        assert (log_probs.exp().gather(-1, ids.unsqueeze(-1)) > 0).all()


def test_entropy_is_in_nats_and_empty_ids_count_nothing() -> None:
    logits = random_logits(5, 12)
    logits[0, :3] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 2] = 1.0
    logits[2] = 0.0
    values = entropy(reveal_log_probs(logits, MASK))
    expected = [entropy_of(softmax(row, MASK, 1.0)) for row in logits.tolist()]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert values[1] == 0
    assert float(values[2]) == pytest.approx(math.log(11))
