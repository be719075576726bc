"""Behaviour distribution: exact softmax without MASK, and draws that follow it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.reference_sampler import entropy_of, inverse_cdf, softmax
from common import behaviour
from common.behaviour import behaviour_log_probs, draw, draw_tokens, reveal_log_probs, reveal_statistics
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


@settings(max_examples=60)
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


@settings(max_examples=150)
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


@pytest.mark.parametrize("empty", [2, 7])
def test_a_sum_that_rises_over_an_empty_id_does_not_let_it_be_drawn(
    empty: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a parallel scan's may, by a rounding."""
    log_probs = torch.full((1, 8), 1 / 8).log()
    log_probs[0, [0, empty]] = -torch.inf
    plain = torch.Tensor.cumsum
    rise = torch.zeros(8).index_fill(0, torch.tensor([empty]), 1e-6)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *given: plain(*given) + rise)
    inside = plain(log_probs.exp(), -1)[0, empty] + 5e-7
    total = log_probs.exp().sum() + (1e-6 if empty == 7 else 0.0)
    assert draw(log_probs, (inside / total).unsqueeze(0).double()).tolist() == [empty - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 3.0, 40.0])
def test_where_the_sum_never_falls_a_draw_is_the_searched_id_or_the_last_with_mass(
    scale: float, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(3)
    for vocabulary in (2, 12, 1000):
        logits = (scale * torch.randn(400, vocabulary, generator=rng)).to(dtype)
        logits[torch.rand(logits.shape, generator=rng) < torch.rand(400, 1, generator=rng)] = -torch.inf
        logits[:, -1] = 0.0
        log_probs = reveal_log_probs(logits, 0)
        probs = log_probs.exp()
        cdf = probs.cumsum(-1)
        last = torch.where(probs > 0, torch.arange(vocabulary), 0).amax(-1)
        for u in (uniform(torch.arange(400), 1, 0), *(torch.full((400,), edge, dtype=torch.float64) for edge in EDGES)):
            found = torch.searchsorted(cdf, u.to(dtype).unsqueeze(-1) * cdf[:, -1:], right=True).squeeze(-1)
            assert torch.equal(draw(log_probs, u), torch.minimum(found, last))


# -- what the sampler does with the logits of a step -------------------------------------------------------------------


def assert_statistics(logits: Tensor, atol: float = 1e-13) -> None:
    entropy, top = reveal_statistics(logits, MASK)
    rows = [softmax(row, MASK, 1.0) for row in logits.double().tolist()]
    assert entropy.dtype == top.dtype == torch.promote_types(logits.dtype, torch.float32)
    expected = torch.tensor([[entropy_of(row), max(row)] for row in rows], dtype=torch.float64).reshape(-1, 2)
    torch.testing.assert_close(torch.stack([entropy, top], -1).double(), expected, rtol=0, atol=atol)


def test_statistics_are_entropy_in_nats_and_top_probability_without_mask() -> None:
    logits = random_logits(6, 12)
    logits[0, MASK] = 1e4
    logits[1, MASK] = torch.nan
    logits[2] = 0.0
    before = logits.clone()
    assert_statistics(logits)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    assert float(reveal_statistics(logits, MASK)[0][2]) == pytest.approx(math.log(11))


def test_statistics_of_empty_ids_and_of_huge_logits() -> None:
    logits = random_logits(6, 12)
    logits[0, :3] = -torch.inf
    logits[1] = -torch.inf
    logits[1, 2] = 1.0  # one id has all the mass
    logits[2] += 1e6
    logits[3] *= 1e6
    logits[4] -= 1e300
    logits[5, 1:] = -1e300
    assert_statistics(logits, atol=1e-9)
    entropy, top = reveal_statistics(logits, MASK)
    assert entropy[[1, 3, 5]].tolist() == [0, 0, 0]
    assert top[[1, 3, 5]].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_and_draws_of_narrow_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = random_logits(5, 12, dtype)
    assert_statistics(logits, atol=2e-6)
    ids, scores = draw_tokens(logits, torch.ones(5), torch.full((5,), 0.4, dtype=torch.float64), MASK)
    expected = [math.log(softmax(row, MASK, 1.0)[token]) for row, token in zip(logits.tolist(), ids, strict=True)]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_of_broken_logits_are_not_a_number_in_that_row_alone(bad: float) -> None:
    logits = random_logits(4, 12)
    good = reveal_statistics(logits, MASK)
    logits[1, 3] = bad
    logits[2] = -torch.inf  # no distribution at all
    for value, before in zip(reveal_statistics(logits, MASK), good, strict=True):
        assert value.isnan().tolist() == [False, True, True, False]
        assert torch.equal(value[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_drawn_tokens_are_the_inverse_cdf_and_their_tempered_log_probability(temperature: float) -> None:
    logits, uniforms = random_logits(40, 12), uniform(torch.arange(40), 1, 0)
    ids, scores = draw_tokens(logits, torch.full((40,), temperature, dtype=torch.float64), uniforms, MASK)
    rows = [softmax(row, MASK, temperature) for row in logits.tolist()]
    assert ids.tolist() == [inverse_cdf(row, float(u)) for row, u in zip(rows, uniforms, strict=True)]
    expected = [math.log(row[token]) for row, token in zip(rows, ids.tolist(), strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_temperature_zero_takes_the_best_token_but_mask_with_log_probability_zero() -> None:
    logits = random_logits(6, 12)
    logits[:, MASK] = 1e4
    allowed = logits.clone()
    allowed[:, MASK] = -torch.inf
    temperature = torch.tensor([0.0, 1.0] * 3)
    ids, scores = draw_tokens(logits, temperature, torch.full((6,), 1 - 2.0**-53).double(), MASK)
    assert torch.equal(ids[::2], allowed.argmax(-1)[::2])
    assert (ids[1::2] == 11).all()  # a uniform close to 1 is the last id
    assert (scores[::2] == 0).all()
    assert (scores[1::2] < 0).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("piece", [1, 12, 25, 36])
def test_rows_in_pieces_are_the_rows_at_once(rows: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniforms = random_logits(rows, 12), uniform(torch.arange(rows), 1, 0)
    temperature = torch.linspace(0.0, 2.0, rows, dtype=torch.float64)

    def everything() -> list[Tensor]:
        return [*reveal_statistics(logits, MASK), *draw_tokens(logits, temperature, uniforms, MASK)]

    whole = everything()
    monkeypatch.setattr(behaviour, "PIECE", piece)
    for one, other in zip(everything(), whole, strict=True):
        assert one.shape == (rows,)
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    assert_statistics(logits)
