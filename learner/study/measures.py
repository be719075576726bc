"""Measures: numbers out of a run's JSON, and what several seeds say about them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

Result = dict[str, Any]


def lookup(result: Result, path: str) -> float | None:
    """The number at a dotted path, or None where the run has none.

    `last.NAME` and `first.NAME` are validation measures at the last and first step, `NAME at PASSES` one in between.
    """
    if " at " in path:
        name, _, passes = path.partition(" at ")
        return at_passes(result, name, float(passes))
    curve = result.get("validation") or [{}]
    value: Any = {**result, "last": curve[-1], "first": curve[0]}
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def not_finite(value: Any, path: str = "") -> str | None:
    """The dotted path of the first number that is NaN or infinite; None if there is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (not_finite(part, f"{path}.{key}".removeprefix(".")) for key, part in items)
    return next((where for where in found if where is not None), None)


def before(path: str) -> str:
    """The path of the same measure under the warm start."""
    return path.replace("test.after", "test.before", 1).replace("last.", "first.", 1)


def at_passes(result: Result, name: str, passes: float) -> float | None:
    """A validation measure where the learner had spent that many forward passes, between measurements on a line."""
    points = [(point["passes"], point[name]) for point in result.get("validation", []) if name in point]
    if not points or passes > points[-1][0]:
        return None
    spent, values = zip(*points, strict=True)
    return float(np.interp(passes, spent, values))


def spent_to_reach(result: Result, name: str, level: float, axis: str) -> float | None:
    """What a run had spent on an axis when a validation measure first reached a level; None if it never did."""
    last: dict[str, float] | None = None
    for point in result.get("validation", []):
        if name not in point or axis not in point:
            continue
        if point[name] >= level:
            if last is None or point[name] == last[name]:
                return float(point[axis])
            share = (level - last[name]) / (point[name] - last[name])
            return float(last[axis] + share * (point[axis] - last[axis]))
        last = point
    return None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval over seeds; infinite for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * error


def verdict(mean: float, half: float, expected: str) -> str:
    """What the interval says about a claim of that sign; an interval around 0 never proves that nothing is there."""
    if math.isnan(mean) or math.isnan(half):
        raise ValueError(f"mean={mean} and half={half} say nothing")
    if math.isinf(half):
        return "one seed"
    if expected == "none":
        return "refuted" if abs(mean) > half else "no difference seen"
    sign = 1 if expected == "positive" else -1
    if sign * mean - half > 0:
        return "holds"
    return "refuted" if sign * mean + half < 0 else "undecided"
