"""Measures: numbers out of a run's JSON, and what several seeds say about them."""

import difflib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from scipy.stats import t as student

from learner.study.result import Spent, Trained, ValidationPoint

Result = dict[str, Any]
AT = " at "  # NAME at PASSES
EQUAL = " at equal "  # NAME at equal AXIS: where both sides of a pair had spent as much as the one that spent less
FORWARDS = "forwards"  # rows forwarded by rollout and learner
SAVING = "test.after.saving"


def _numbers(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the numbers in a type of `result`; lists and free names are none."""
    for name, hint in get_type_hints(kind).items():
        part = next((arm for arm in get_args(hint) if arm is not type(None)), hint)
        if get_origin(hint) in (list, dict):
            continue
        if part in (int, float):
            yield prefix + name
        elif hasattr(part, "__required_keys__"):
            yield from _numbers(part, f"{prefix}{name}.")


POINTS = tuple(_numbers(ValidationPoint))
AXES = (*(axis for axis in _numbers(Spent) if axis != "step"), FORWARDS)
MEASURES = (SAVING, *_numbers(Trained), *(f"{when}.{name}" for when in ("first", "last") for name in POINTS))


def check_measure(measure: str) -> None:
    """Refuse a measure that no run will ever have.

    Raises:
        ValueError: naming what there is.
    """
    name, at, amount = measure.partition(AT)
    names = POINTS if at else MEASURES
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        heads = dict.fromkeys(known.partition(".")[0] for known in names)
        way = f"did you mean {near[0]}?" if near else f"they begin with {', '.join(heads)}, e.g. {names[0]}"
        raise ValueError(f"measure {measure!r}: no run has {name!r}; {way}")
    if EQUAL in measure:
        axis = measure.partition(EQUAL)[2]
        if axis not in AXES:
            raise ValueError(f"measure {measure!r}: no axis {axis!r}; one of {', '.join(AXES)}")
    elif at and not _positive(amount):
        raise ValueError(
            f"measure {measure!r}: {amount!r} is no number of forward passes; e.g. {name} at 3000, or {name} at equal "
            "seconds"
        )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def lookup(result: Result, path: str) -> float | None:
    """The number at a dotted path, or None where the run has none.

    `last.NAME` and `first.NAME` are validation measures at the last and first step, `NAME at PASSES` one in between;
    `test.after.saving` is worked out from the frontier of the warm start.
    """
    if path == SAVING:
        test = result.get("test", {})
        rows, point = test.get("before", {}).get("frontier", []), test.get("after", {}).get("operating")
        return saving(rows, point) if point and any(row["rule"] == "entropy_bound" for row in rows) else None
    if AT in path:
        name, _, passes = path.partition(AT)
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
    return at_spent(result, name, "passes", passes)


def at_spent(result: Result, name: str, axis: str, amount: float) -> float | None:
    """A validation measure where a run had spent that much on an axis; None where it never spent so much."""
    points = [(spent(result, p, axis), p[name]) for p in result.get("validation", []) if name in p]
    if not points or amount > points[-1][0]:
        return None
    amounts, values = zip(*points, strict=True)
    return float(np.interp(amount, amounts, values))


def at_equal(result: Result, other: Result, measure: str) -> tuple[float | None, float | None]:
    """`NAME at equal AXIS` of two runs."""
    name, _, axis = measure.partition(EQUAL)
    sides = (result, other)
    if not all(side.get("validation") for side in sides):
        return None, None
    amount = min(spent(side, side["validation"][-1], axis) for side in sides)
    return at_spent(result, name, axis, amount), at_spent(other, name, axis, amount)


def spent(result: Result, point: dict[str, float], axis: str) -> float:
    """What a run had spent on an axis at a validation point; `forwards` adds the rollouts' rows, from the curve."""
    if axis != FORWARDS:
        return point[axis]
    steps = [0.0, *(curve["step"] for curve in result["curve"])]
    rows = [0.0, *(curve["rollout_forwards"] for curve in result["curve"])]
    return point["rows_forwarded"] + float(np.interp(point["step"], steps, rows))


def saving(base: list[dict[str, Any]], operating: dict[str, float]) -> float:
    """Share of forward passes that an operating point saves against the cheapest point of equal accuracy of the warm
    start's fixed gammas; where those never get so far, against the cheapest of the most accurate. *(ours)*

    A gamma counts only if no cheaper one is as accurate (the upper envelope).

    Args:
        base: rows with `rule`, `nfe` and `accuracy`; joined over log2(NFE).
        operating: with `nfe` and `accuracy`.
    """
    points: list[tuple[float, float]] = []
    for nfe, accuracy in sorted((row["nfe"], row["accuracy"]) for row in base if row["rule"] == "entropy_bound"):
        if not points or accuracy > points[-1][1]:
            points.append((nfe, accuracy))
    wanted = min(operating["accuracy"], points[-1][1])
    cost = points[0][0]
    for (low, worse), (high, better) in pairwise(points):
        if worse < wanted:
            share = min(1.0, (wanted - worse) / (better - worse))
            cost = low * (high / low) ** share
    return 1 - operating["nfe"] / cost


def spent_to_reach(result: Result, name: str, level: float, axis: str) -> float | None:
    """What a run had spent on an axis when a validation measure first reached a level; None if it never did."""
    last: tuple[float, float] | None = None  # spent, value
    for point in result.get("validation", []):
        if name not in point:
            continue
        here, value = spent(result, point, axis), point[name]
        if value >= level:
            if last is None or value == last[1]:
                return here
            return last[0] + (level - last[1]) / (value - last[1]) * (here - last[0])
        last = here, value
    return None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval over seeds; infinite for a single one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * error


def p_value(values: Sequence[float]) -> float:
    """Two-sided t-test of a mean of 0 over seeds; 1 where a single seed, or none that differs, says nothing."""
    mean, half = interval(values)
    if not math.isfinite(half) or (half == 0 and mean == 0):
        return 1.0
    error = half / float(student.ppf(0.975, len(values) - 1))
    return float(2 * student.sf(abs(mean) / error, len(values) - 1)) if error else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(mean: float, half: float, expected: str) -> str:
    """What the interval says about a claim of that sign; an interval around 0 never proves that nothing is there."""
    if math.isnan(mean) or math.isnan(half):
        raise ValueError(f"mean={mean} and half={half} say nothing")
    if math.isinf(half):
        return "one seed"
    if expected == "none":
        return "refuted" if abs(mean) > half else "no difference seen"
    if expected == "any":
        return "holds" if abs(mean) > half else "undecided"
    sign = 1 if expected == "positive" else -1
    if sign * mean - half > 0:
        return "holds"
    return "refuted" if sign * mean + half < 0 else "undecided"
