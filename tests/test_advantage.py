"""Advantages inside groups, against a loop."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantage import STD_FLOOR, advantages

BASELINES = ["mean", "leave_one_out"]
groups = st.lists(st.lists(st.floats(-2.0, 2.0), min_size=2, max_size=6), min_size=1, max_size=5)


def loop_advantages(rewards: list[float], baseline: str, scale: bool) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    std = statistics.pstdev(rewards) + STD_FLOOR if scale else 1.0
    found = []
    for index, reward in enumerate(rewards):
        others = rewards[:index] + rewards[index + 1 :]
        found.append((reward - statistics.fmean(rewards if baseline == "mean" else others)) / std)
    return found


@given(groups, st.sampled_from(BASELINES), st.booleans(), st.randoms(use_true_random=False))
def test_advantages_are_the_loops_for_groups_of_any_size_and_order(
    rewards: list[list[float]], baseline: str, scale: bool, shuffle: object
) -> None:
    rows = [
        (number, reward, expected)
        for number, group in enumerate(rewards)
        for reward, expected in zip(group, loop_advantages(group, baseline, scale), strict=True)
    ]
    shuffle.shuffle(rows)  # type: ignore[attr-defined]
    number, reward, expected = zip(*rows, strict=True)
    found = advantages(
        torch.tensor(reward, dtype=torch.float64), torch.tensor(number), baseline=baseline, scale_by_std=scale
    )
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(groups, st.booleans())
def test_leave_one_out_is_the_mean_baseline_stretched(rewards: list[list[float]], scale: bool) -> None:
    group = torch.tensor([number for number, values in enumerate(rewards) for _ in values])
    reward = torch.tensor([value for values in rewards for value in values], dtype=torch.float64)
    size = torch.bincount(group)[group]
    mean, others = (advantages(reward, group, baseline=kind, scale_by_std=scale) for kind in BASELINES)
    torch.testing.assert_close(others, mean * size / (size - 1))


@pytest.mark.parametrize("scale", [False, True])
def test_advantages_of_a_group_sum_to_zero_whatever_the_others_earn(scale: bool) -> None:
    reward = torch.tensor([0.0, 1.0, 5.0, 9.0, 100.0, 100.5], dtype=torch.float64)
    group = torch.tensor([0, 1, 0, 1, 2, 2])
    found = advantages(reward, group, baseline="mean", scale_by_std=scale)
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, group, found)
    assert sums.abs().max() < 1e-9
    assert (found != 0).all()


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7, 1e8])
def test_a_group_without_spread_has_advantage_exactly_zero(baseline: str, scale: bool, value: float) -> None:
    # in float32 the mean of equal numbers need not be that number
    reward, group = torch.full((7,), value), torch.zeros(7, dtype=torch.int64)
    assert advantages(reward, group, baseline=baseline, scale_by_std=scale).tolist() == [0.0] * 7


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("spread", [1e-7, 1e-20, 1e-38])
def test_a_tiny_spread_gives_small_finite_advantages(baseline: str, spread: float) -> None:
    reward = torch.tensor([0.0, spread, 0.0])
    found = advantages(reward, torch.zeros(3, dtype=torch.int64), baseline=baseline, scale_by_std=True)
    assert found.isfinite().all()
    assert found.abs().max() < 0.1


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", [False, True])
def test_a_group_of_one_has_advantage_zero_and_leaves_the_others_alone(baseline: str, scale: bool) -> None:
    reward, group = torch.tensor([5.0, 0.0, 1.0, -3.0]), torch.tensor([0, 1, 1, 2])
    found = advantages(reward, group, baseline=baseline, scale_by_std=scale)
    alone = advantages(reward[1:3], group[1:3] - 1, baseline=baseline, scale_by_std=scale)
    assert found.tolist() == [0.0, *alone.tolist(), 0.0]
    assert alone.tolist()[1] > 0
