"""Frontier: the area against values computed by hand, and the paired gain."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.evaluation import Point, Setting
from actors.frontier import area, frontier_area, frontier_points, gain

RANGE = (2.0, 16.0)


def point(nfe: list[int], correct: list[bool], gamma: float = 0.1, **keys: object) -> Point:
    setting = Setting(**({"name": "eb", "rule": "entropy_bound", "parameter": gamma, "temperature": 0.0} | keys))
    size = len(nfe)
    reward = np.array(correct, dtype=float)
    return Point(setting, np.array(correct), np.array(nfe), reward, reward, {}, np.full(size, gamma))


@pytest.mark.parametrize(
    ("nfe", "accuracy", "expected"),
    [
        ([4.0], [0.6], 0.6),  # one point: constant on both sides
        ([2.0, 16.0], [0.2, 0.8], 0.5),  # a straight line over log2(NFE)
        ([2.0, 4.0, 16.0], [0.0, 0.6, 0.6], (0.3 + 0.6 + 0.6) / 3),  # octaves 2-4, 4-8, 8-16
        ([4.0, 8.0], [0.3, 0.9], (0.3 + 0.6 + 0.9) / 3),  # constant before the first and after the last
        ([1.0, 4.0], [0.0, 0.8], (0.6 + 0.8 + 0.8) / 3),  # a point below the range counts by its line
        ([8.0, 64.0], [0.5, 0.8], (0.5 + 0.5 + 0.55) / 3),
        ([2.0, 2.0 * math.sqrt(2), 4.0, 16.0], [0.0, 0.8, 0.0, 0.0], 0.4 / 3),
    ],
)
def test_area_by_hand(nfe: list[float], accuracy: list[float], expected: float) -> None:
    assert frontier_area(nfe, accuracy, RANGE) == pytest.approx(expected, abs=1e-3)


def test_area_over_another_range() -> None:
    assert frontier_area([2.0, 16.0], [0.2, 0.8], (2.0, 4.0)) == pytest.approx(0.3, abs=1e-3)


def test_the_frontier_is_greedy_fixed_entropy_bound_by_nfe() -> None:
    slow, fast = point([8, 8], [True, True], 0.0), point([2, 4], [True, False], 1.0)
    others = [
        point([1, 1], [True, True], rule="confidence"),
        point([1, 1], [True, True], parameter="mean"),
        point([1, 1], [True, True], parameter="sample"),
        point([1, 1], [True, True], temperature=1.0),
    ]
    assert frontier_points([slow, *others, fast]) == [fast, slow]
    assert area([slow, *others, fast], RANGE) == frontier_area([3.0, 8.0], [0.5, 1.0], RANGE)


def sweep(rng: np.random.Generator, prompts: int = 60) -> list[Point]:
    """A plausible sweep: bolder gammas take fewer steps and are right less often."""
    points = []
    for nfe, share in ((16, 0.9), (9, 0.8), (5, 0.6), (2, 0.3)):
        steps = rng.integers(max(nfe - 1, 1), nfe + 2, prompts)
        points.append(point(steps.tolist(), (rng.random(prompts) < share).tolist(), 1 / nfe))
    return points


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_area_does_not_depend_on_the_order_of_the_points(seed: int) -> None:
    points = sweep(np.random.default_rng(seed))
    shuffled = random.Random(seed).sample(points, len(points))
    assert area(shuffled, RANGE) == area(points, RANGE)


@pytest.mark.parametrize("nfe", [4, 16])
def test_nor_does_it_where_two_points_have_the_same_nfe(nfe: int) -> None:
    """As where two large gammas both reveal a whole block at once."""
    points = [point([nfe] * 4, [True] * 4, 10.0), point([nfe] * 4, [True] + [False] * 3, 30.0)]
    assert area(points[::-1], RANGE) == area(points, RANGE)


def test_gain_of_a_policy_over_itself_is_nothing() -> None:
    points = sweep(np.random.default_rng(1))
    assert gain(points, points[::-1], RANGE, resamples=50) == (0.0, 0.0, 0.0)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_the_interval_contains_the_observed_gain_and_turns_with_its_sign(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = sweep(rng), sweep(rng)
    observed, low, high = gain(before, after, RANGE, resamples=100)
    assert low < observed < high
    assert observed == pytest.approx(area(after, RANGE) - area(before, RANGE))
    assert gain(after, before, RANGE, resamples=100) == pytest.approx((-observed, -high, -low))


def test_pairing_by_prompt_narrows_the_interval() -> None:
    """`after` is `before` with a few prompts more right: the spread between prompts must cancel."""
    before = sweep(np.random.default_rng(2), prompts=200)
    lucky = np.arange(200) % 20 == 0
    better = [point(p.nfe.tolist(), (p.correct | lucky).tolist()) for p in before]
    other = [point(p.nfe[::-1].tolist(), (p.correct | lucky)[::-1].tolist()) for p in before]  # other prompts
    paired, unpaired = (gain(before, after, RANGE, resamples=200) for after in (better, other))
    assert paired[0] == pytest.approx(unpaired[0])
    assert paired[1] > 0
    assert paired[2] - paired[1] < 0.75 * (unpaired[2] - unpaired[1])
