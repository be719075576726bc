"""Arms: runs that differ in nothing but their seed, and what they have in common: means with intervals over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from learner.report.run_data import RunData
from learner.study.measures import interval

APART = ("run", "metrics", "evaluation.prompts")  # says where a run is, not what it computes
LONGEST_LABEL = 60


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half of its interval; that is NaN of one seed."""

    mean: float
    half: float
    count: int = 1
    """Of the seeds."""

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.half:.2g}" if self.half == self.half else "")


@dataclass(frozen=True)
class Arm:
    """Runs with one configuration."""

    label: str
    runs: list[RunData]

    @property
    def seeds(self) -> int:
        """How many different ones its runs have."""
        return len({_seed(run) for run in self.runs})

    def estimate(self, value: Callable[[RunData], float | None]) -> Estimate | None:
        """Of the runs that have a value, runs of one seed by their mean; None if none has."""
        found = [(_seed(run), one) for run in self.runs if (one := value(run)) is not None]
        return _over_seeds(found) if found else None

    def series(self, key: str) -> tuple[list[float], list[Estimate]]:
        """Steps that all runs of the arm which have the key have, and the estimate at each."""
        known = [(_seed(run), dict(zip(*run.series(key), strict=True))) for run in self.runs]
        known = [(seed, values) for seed, values in known if values]
        steps = sorted(set.intersection(*(set(values) for _, values in known))) if known else []
        return steps, [_over_seeds([(seed, values[step]) for seed, values in known]) for step in steps]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half of Student's interval."""
    mean, half = interval(values)
    return Estimate(mean, half if len(values) > 1 else float("nan"), len(values))


def _over_seeds(values: Sequence[tuple[object, float]]) -> Estimate:
    by_seed: dict[object, list[float]] = {}
    for seed, value in values:
        by_seed.setdefault(seed, []).append(value)
    return estimate([sum(same) / len(same) for same in by_seed.values()])


def _seed(run: RunData) -> object:
    return run.config.get("run", {}).get("seed", 0)


def arms(runs: Sequence[RunData]) -> list[Arm]:
    """Runs by what they compute, in the order that they were given."""
    flat = [_flat(run.config) for run in runs]
    computes = [{key: value for key, value in one.items() if not key.startswith(APART)} for one in flat]
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(computes):
        groups.setdefault(repr(sorted(one.items())), []).append(number)
    first = [computes[numbers[0]] for numbers in groups.values()]
    different = sorted(key for key in set().union(*first) if len({repr(one.get(key)) for one in first}) > 1)
    found = []
    for numbers in groups.values():
        members = [runs[number] for number in numbers]
        said = ", ".join(f"{key}={computes[numbers[0]].get(key)}" for key in different)
        label = members[0].label if len(members) == 1 else said or ", ".join(one.label for one in members)
        found.append(Arm(label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…", members))
    return found


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Keys in which runs differ, with the value of each run; names and places left out."""
    flat = [_flat(run.config) for run in runs]
    keys = sorted(key for key in set().union(*flat) if key not in ("run.name", "run.root"))
    found = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, values) for key, values in found if len({repr(value) for value in values}) > 1]


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return found
