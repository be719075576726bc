"""The objective's pure functions and the cost, each against a loop, and their gradients against finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.cost import with_cost
from learner.objective import (
    clipped_objective,
    effective_sample_share,
    importance_weight,
    kl_k3,
    log_ratio,
    token_mean,
)

logs = st.floats(-8.0, 0.0)
pairs = st.lists(st.tuples(logs, logs), min_size=1, max_size=12)
FORMS = ["multiplicative", "additive", "off"]


def columns(rows: list[tuple[float, ...]]) -> list[Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]


@given(pairs, st.floats(0.1, 5.0))
def test_weight_is_the_truncated_ratio(rows: list[tuple[float, float]], cap: float) -> None:
    proximal, behaviour = columns(rows)
    expected = [min(cap, math.exp(a) / math.exp(b)) for a, b in rows]
    found = importance_weight(proximal, behaviour, cap=cap, kind="truncated")
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert importance_weight(proximal, behaviour, cap=cap, kind="none").tolist() == [1.0] * len(rows)


KINDS = ["truncated", "none", "self_normalised"]


@given(pairs, st.floats(0.1, 5.0))
def test_self_normalised_weights_are_the_truncated_ones_over_their_mean(
    rows: list[tuple[float, float]], cap: float
) -> None:
    truncated = [min(cap, math.exp(a - b)) for a, b in rows]
    mean = sum(truncated) / len(truncated)
    found = importance_weight(*columns(rows), cap=cap, kind="self_normalised", mean=mean)
    assert found.tolist() == pytest.approx([weight / mean for weight in truncated], rel=1e-9)
    assert float(found.mean()) == pytest.approx(1.0)
    # without a mean, as a threshold's one draw per completion has it
    assert importance_weight(*columns(rows), cap=cap, kind="self_normalised").tolist() == pytest.approx(truncated)


def proximal_behaviour_scored(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    proximal, behaviour = -torch.rand(2, rows, 6, generator=generator, dtype=torch.float64)
    scored = torch.rand(rows, 6, generator=generator) < 0.6
    scored[0], scored[1] = False, torch.arange(6) == 0
    behaviour = behaviour.masked_fill(~scored, torch.nan)  # what is not scored must not matter
    return proximal, behaviour, scored


@pytest.mark.parametrize("cap", [0.9, 5.0])
def test_the_weight_of_a_sequence_is_the_product_over_its_scored_tokens_truncated(cap: float) -> None:
    proximal, behaviour, scored = proximal_behaviour_scored()
    found = importance_weight(proximal, behaviour, cap=cap, kind="truncated", level="sequence", scored=scored)
    for n, row in enumerate(scored.tolist()):
        positions = [position for position, yes in enumerate(row) if yes]
        product = math.prod(math.exp(proximal[n, i] - behaviour[n, i]) for i in positions)
        assert found[n, positions].tolist() == pytest.approx([min(cap, product)] * len(positions), rel=1e-12)
    assert found.isfinite().all()


def test_the_log_ratio_of_tokens_is_theirs_and_nought_elsewhere() -> None:
    proximal, behaviour, scored = proximal_behaviour_scored()
    found = log_ratio(proximal, behaviour, scored=scored)
    assert (found[scored] == (proximal - behaviour)[scored]).all()
    assert (found[~scored] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_weight_is_silently_lost_at_the_ends_of_the_range(kind: str, level: str) -> None:
    """Ratios that overflow are truncated, those that underflow are 0; only what is NaN already stays NaN."""
    scored = torch.ones(2, 3, dtype=torch.bool)
    proximal = torch.tensor([[-1e4, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    for one, other in ((proximal, proximal.flip(0)), (proximal.flip(0), proximal)):
        for mean in (1.0, 1e-300, 0.0):
            found = importance_weight(one, other, cap=2.0, kind=kind, level=level, scored=scored, mean=mean)
            assert not found.isnan().any()
    vanished = importance_weight(
        torch.full((2, 3), -1e4), torch.zeros(2, 3), cap=2.0, kind="self_normalised", mean=0.0, scored=scored
    )
    assert (vanished == 0).all()
    if kind != "none":
        broken = torch.tensor([[math.nan, -1.0, -1.0], [-1.0, -1.0, -1.0]])
        assert importance_weight(proximal, broken, cap=2.0, kind=kind, level=level, scored=scored)[0, 0].isnan()
    missing = importance_weight(proximal, proximal, cap=2.0, kind="self_normalised", mean=math.nan)
    assert missing.isnan().all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_have_weight_one(kind: str, level: str) -> None:
    proximal, _, scored = proximal_behaviour_scored()
    found = importance_weight(proximal, proximal, cap=2.0, kind=kind, level=level, scored=scored)
    assert (found == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_a_constant_for_the_gradient(kind: str) -> None:
    proximal = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not importance_weight(proximal, torch.tensor([-1.5, -1.5]), cap=2.0, kind=kind).requires_grad


@given(
    st.lists(st.tuples(logs, logs, st.floats(0.0, 3.0), st.floats(-2.0, 2.0)), min_size=1, max_size=12),
    st.floats(0.05, 0.9),
    st.floats(0.05, 2.0),
)
def test_clipped_objective_is_ppos_with_two_clips(
    rows: list[tuple[float, float, float, float]], clip_low: float, clip_high: float
) -> None:
    expected = []
    for current, proximal, weight, advantage in rows:
        ratio = math.exp(current - proximal)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        expected.append(weight * min(ratio * advantage, clipped * advantage))
    found = clipped_objective(*columns(rows), clip_low=clip_low, clip_high=clip_high)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.0, 1.0, True),
        (1.25, 1.0, True),  # inside the upper clip
        (1.35, 1.0, False),
        (0.5, 1.0, True),  # below, but the advantage pulls it back
        (0.85, -1.0, True),  # inside the lower clip
        (0.75, -1.0, False),
        (1.5, -1.0, True),
    ],
)
def test_the_clip_stops_the_gradient_on_its_own_side_only(ratio: float, advantage: float, flows: bool) -> None:
    current = torch.tensor(math.log(ratio) - 1.0, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    clipped_objective(current, -one, one, advantage * one, clip_low=0.2, clip_high=0.3).backward()
    assert current.grad is not None
    assert float(current.grad) == pytest.approx(ratio * advantage if flows else 0.0, abs=1e-12)


def test_gradient_of_the_objective_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    current = (-torch.rand(5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    proximal = current.detach() + 0.3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    advantage = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    reference = proximal.roll(1)
    scored = torch.rand(5, 7, generator=generator) < 0.6

    def objective(values: Tensor) -> Tensor:
        inner = clipped_objective(values, proximal, weight, advantage, clip_low=0.2, clip_high=0.4)
        return token_mean(inner - 0.3 * kl_k3(values, reference), scored, kind="completion", completions=9, tokens=40)

    assert torch.autograd.gradcheck(objective, (current,), eps=1e-6, atol=1e-7)


def test_on_policy_gradient_is_weight_times_advantage() -> None:
    """Weight and proximal made of the differentiated tensor itself: neither may pass a gradient on."""
    current = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-1.2, -0.4, -0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weight = importance_weight(current, behaviour, cap=2.0, kind="truncated")
    clipped_objective(current, current, weight, advantage, clip_low=0.2, clip_high=0.2).sum().backward()
    expected = (current - behaviour).detach().exp().clamp(max=2.0) * advantage
    torch.testing.assert_close(current.grad, expected)


def values_and_scored(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scored = torch.rand(rows, 6, generator=generator) < 0.5
    scored[0] = False
    scored[1] = True
    values = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return values.masked_fill(~scored, torch.nan), scored  # what is not scored must not matter


def loop_mean(values: Tensor, scored: Tensor, kind: str) -> float:
    inside = [[v for v, s in zip(*row, strict=True) if s] for row in zip(values.tolist(), scored.tolist(), strict=True)]
    if kind == "token":
        return sum(map(sum, inside)) / sum(map(len, inside))
    return sum(sum(row) / len(row) for row in inside if row) / len(inside)


@pytest.mark.parametrize("kind", ["completion", "token"])
def test_token_mean_is_the_loops_and_parts_add_up(kind: str) -> None:
    values, scored = values_and_scored(9)
    totals = {"completions": 9.0, "tokens": float(scored.sum())}
    whole = token_mean(values, scored, kind=kind, **totals)
    assert float(whole) == pytest.approx(loop_mean(values, scored, kind), rel=1e-12)
    parts = [token_mean(values[a:b], scored[a:b], kind=kind, **totals) for a, b in [(0, 2), (2, 3), (3, 9)]]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("kind", ["completion", "token"])
def test_a_batch_in_which_nothing_is_scored_has_mean_zero(kind: str) -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert float(token_mean(torch.ones(2, 3), nothing, kind=kind, completions=2.0, tokens=0.0)) == 0.0


@given(pairs)
def test_k3_is_never_negative_and_zero_only_where_both_agree(rows: list[tuple[float, float]]) -> None:
    current, reference = columns(rows)
    found = kl_k3(current, reference)
    expected = [math.exp(b - a) - (b - a) - 1 for a, b in rows]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (found >= -1e-15).all()
    assert kl_k3(current, current).tolist() == [0.0] * len(rows)


def test_k3_is_unbiased_under_the_current_policy() -> None:
    generator = torch.Generator().manual_seed(1)
    current, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (current.exp() * (current - reference)).sum()
    torch.testing.assert_close((current.exp() * kl_k3(current, reference)).sum(), exact)


def test_k3_passes_no_gradient_to_the_reference() -> None:
    current = torch.tensor([-1.0], requires_grad=True)
    reference = torch.tensor([-2.0], requires_grad=True)
    kl_k3(current, reference).sum().backward()
    assert reference.grad is None
    assert float(current.grad) == pytest.approx(1 - math.exp(-1.0))  # type: ignore[arg-type]


@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=20))
def test_effective_sample_share_is_the_loops(weights: list[float]) -> None:
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    found = float(effective_sample_share(torch.tensor(weights, dtype=torch.float64)))
    assert found == pytest.approx(expected)
    assert 1 / len(weights) - 1e-9 <= found <= 1 + 1e-9


def test_effective_sample_share_does_not_depend_on_the_weights_scale() -> None:
    assert float(effective_sample_share(torch.full((8,), 1e-8, dtype=torch.float64))) == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.floats(-3.0, 3.0), st.integers(1, 16)), min_size=1, max_size=8),
    st.floats(0.0, 1.0),
    st.sampled_from(FORMS),
)
def test_cost_is_the_loops(rows: list[tuple[float, int]], speed_weight: float, form: str) -> None:
    expected = []
    for reward, nfe in rows:
        share = speed_weight * nfe / 16
        if form == "multiplicative":
            expected.append(reward * (1 - share) if reward > 0 else reward)
        else:
            expected.append(reward - share if form == "additive" else reward)
    reward, nfe = columns(rows)
    found = with_cost(reward, nfe.long(), length=16, speed_weight=speed_weight, form=form)
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(-3.0, 3.0), st.integers(1, 16), st.integers(1, 16), st.floats(0.0, 1.0), st.sampled_from(FORMS))
def test_no_form_of_cost_rewards_slowness(reward: float, one: int, other: int, speed_weight: float, form: str) -> None:
    nfe = torch.tensor(sorted((one, other)))
    rewards = torch.full((2,), reward, dtype=torch.float64)
    fast, slow = with_cost(rewards, nfe, length=16, speed_weight=speed_weight, form=form).tolist()
    assert slow <= fast


def test_fast_and_wrong_earns_nothing_in_the_multiplicative_form() -> None:
    reward, nfe = torch.zeros(3), torch.tensor([1, 8, 16])
    assert with_cost(reward, nfe, length=16, speed_weight=1.0, form="multiplicative").tolist() == [0.0] * 3
