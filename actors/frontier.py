"""Frontier: accuracy against NFE, and the area under it.

Definition: the points of one fixed grid of gammas under greedy entropy-bound sampling, ordered by mean NFE, joined by
straight lines over log2(NFE), and held constant beyond the first and last point; of points with equal NFE the most
accurate counts. The area is the mean of that curve
over `nfe_range` on the log2 axis, so it is an accuracy; the gain of one policy over another is the difference of two
areas on the same prompts. *(ours)*
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from actors.evaluation import Point

SAMPLES = 2001


def frontier_points(points: Sequence[Point]) -> list[Point]:
    """The points that make the frontier: greedy, entropy-bound, fixed gamma; by ascending NFE."""
    fixed = [
        point
        for point in points
        if point.setting.rule == "entropy_bound"
        and point.setting.temperature == 0
        and not isinstance(point.setting.parameter, str)
    ]
    return sorted(fixed, key=lambda point: point.mean_nfe)


def frontier_area(nfe: ArrayLike, accuracy: ArrayLike, nfe_range: tuple[float, float]) -> float:
    """Mean accuracy over log2(NFE) in a range.

    Args:
        nfe: mean NFE of each point, in any order.
        accuracy: accuracy of each point.
        nfe_range: lowest and highest NFE.
    """
    cost, first = np.unique(np.asarray(nfe, dtype=float), return_inverse=True)
    best = np.full(cost.shape, -np.inf)
    np.maximum.at(best, first, np.asarray(accuracy, dtype=float))
    axis = np.linspace(np.log2(nfe_range[0]), np.log2(nfe_range[1]), SAMPLES)
    return float(np.interp(axis, np.log2(cost), best).mean())


def area(points: Sequence[Point], nfe_range: tuple[float, float]) -> float:
    """Area under the frontier of some points."""
    chosen = frontier_points(points)
    return frontier_area([p.mean_nfe for p in chosen], [p.accuracy for p in chosen], nfe_range)


def gain(
    before: Sequence[Point], after: Sequence[Point], nfe_range: tuple[float, float], *, resamples: int = 1000
) -> tuple[float, float, float]:
    """Difference of areas with a paired bootstrap interval over prompts.

    Returns:
        (gain, lower, upper) of the 95 % percentile interval; it covers the choice of prompts, not of training seeds,
        and is too narrow where prompts repeat (countdown).
    """
    old, new = frontier_points(before), frontier_points(after)
    observed = area(after, nfe_range) - area(before, nfe_range)
    generator = np.random.default_rng(0)
    prompts = len(old[0].correct)
    draws = []
    for _ in range(resamples):
        rows = generator.integers(0, prompts, prompts)
        areas = []
        for points in (old, new):
            nfes = np.array([p.nfe[rows].mean() for p in points])
            values = np.array([p.correct[rows].mean() for p in points])
            areas.append(frontier_area(nfes, values, nfe_range))
        draws.append(areas[1] - areas[0])
    low, high = np.percentile(draws, [2.5, 97.5])
    return observed, float(low), float(high)
