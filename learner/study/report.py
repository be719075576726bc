"""Report: `docs/studies/NAME.md`, made from the finished runs alone, so it can be made again at any time."""

import math
from pathlib import Path
from statistics import median

from common.place import write_whole
from learner.study.grid import BEFORE, Comparison, Planned, Study
from learner.study.measures import (
    EQUAL,
    Result,
    at_equal,
    before,
    holm,
    interval,
    lookup,
    p_value,
    spent_to_reach,
    verdict,
)
from learner.study.plots import draw

Done = dict[str, Result]
COLUMNS = {
    "area": "test.after.area",
    "accuracy": "test.after.operating.accuracy",
    "NFE": "test.after.operating.nfe",
    "sampled accuracy": "test.after.operating.sampled_accuracy",
    "sampled NFE": "test.after.operating.sampled_nfe",
    "sampled reward": "test.after.operating.sampled_reward_costed",
    "passes saved at equal accuracy": "test.after.saving",
    "step chosen": "selected_step",
    "minutes": "train_seconds",
    "rows forwarded": "last.rows_forwarded",
}
DIGITS = {"selected_step": 0, "train_seconds": 1, "last.rows_forwarded": 0}
ADAPTATION = {
    "rank correlation of gamma with difficulty": "rank_correlation",
    "largest / smallest mean gamma over difficulties": "gamma_ratio",
    "95th / 5th percentile of gamma": "gamma_ratio_prompts",
    "area, learned less constant gamma": "learned_minus_constant",
    "reward that the best gamma per difficulty would add (slack)": "slack",
}
LEVEL = 0.05  # of an adjusted p
LEVEL_SHARE = 0.5  # of the way from the warm start's to the best arm's last sampled validation reward


def write_report(name: str, study: Study, runs: list[Planned], done: Done, out: Path) -> Path:
    """Write report and plots; returns the report's path.

    Args:
        name: short name of the study.
        study: what was asked.
        runs: all runs that are planned.
        done: results by run name.
        out: folder of the reports.
    """
    by_arm = {
        arm: [done[run.name] for run in runs if run.arm == arm and run.name in done]
        for arm in study.arms
        if any(run.arm == arm and run.name in done for run in runs)
    }
    lines = [f"# {study.title}", "", study.question.strip(), ""]
    commits = sorted({str(result.get("commit", "")) for result in done.values()} - {""})
    lines += [
        f"Made by `diffpo study {name}`: {len(done)} of {len(runs)} runs, one thread each{_machines(done)}; "
        f"commits {', '.join(commits) or 'unknown'}. Figures are means over seeds ± half the 95 % t-interval, which "
        "covers seeds of training on one set of prompts, not the choice of prompts; differences are paired by seed. "
        "`area` is the mean greedy exact-solve accuracy over log2(NFE) (`actors/frontier.py`); `reward` "
        f"{_reward(runs)}. `test.after` is the checkpoint that validation chose (column `step chosen`), `last` the "
        "last step. Seconds are indicative: of training without validation, on shared cores.",
        "",
    ]
    lines += _claims(study, by_arm)
    if study.findings:
        lines += ["## What we learned", "", study.findings.strip(), ""]
    lines += _arms(study, by_arm, runs)
    lines += _adaptation(by_arm)
    lines += _spent(by_arm, runs)
    lines += _diagnostics(by_arm)
    if by_arm:
        lines += [f"![{title}]({path.relative_to(out)})\n" for title, path in draw(by_arm, out / name)]
    return write_whole(out / f"{name}.md", "\n".join(lines).encode())


def _machines(done: Done) -> str:
    """On what the runs were made: their seconds depend on it."""
    used = sorted({(result["jobs"], result["cpus"]) for result in done.values() if {"jobs", "cpus"} <= set(result)})
    return "".join(f", {jobs} at once on {cpus} CPUs" for jobs, cpus in used)


def _cost(run: Planned) -> tuple[str, float]:
    learner = run.config.learner
    return learner.cost, learner.speed_weight if learner.cost != "off" else 0.0


def _reward(runs: list[Planned]) -> str:
    """What the word means in a study."""
    costs = {_cost(run) for run in runs}
    if costs == {("off", 0.0)}:
        return "has no cost of forward passes here"
    more = "" if len(costs) == 1 else "; arms with another cost have another reward"
    return f"is what remains after deducting the cost of forward passes{more}"


def number(mean: float, half: float = math.inf, digits: int = 3) -> str:
    """A mean with its half-width, or alone where one seed gives none."""
    shown = f"{mean:.{digits}f}"
    return shown if not math.isfinite(half) else f"{shown} ± {half:.{digits}f}"


def _table(head: list[str], rows: list[list[str]], title: str) -> list[str]:
    if not rows:
        return []
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def differences(comparison: Comparison, by_arm: dict[str, list[Result]]) -> list[float]:
    """The comparison's difference for each seed that both sides have."""
    found = []
    others = {} if comparison.baseline in (BEFORE, None) else by_arm.get(str(comparison.baseline), [])
    baseline = {result["seed"]: result for result in others}
    for result in by_arm.get(comparison.arm, []):
        other_result = baseline.get(result["seed"], {})
        if EQUAL in comparison.measure:
            value, other = at_equal(result, other_result, comparison.measure)
        else:
            value = lookup(result, comparison.measure)
            if comparison.baseline is None:
                other = 0.0
            elif comparison.baseline == BEFORE:
                other = lookup(result, before(comparison.measure))
            else:
                other = lookup(other_result, comparison.measure)
        if value is not None and other is not None:
            found.append(value - other)
    return found


def _claims(study: Study, by_arm: dict[str, list[Result]]) -> list[str]:
    shown = [
        comparison
        for comparison in study.comparisons
        if all(name in by_arm for name in (comparison.arm, comparison.baseline) if name not in (BEFORE, None))
    ]
    found = [differences(comparison, by_arm) for comparison in shown]
    adjusted = iter(holm([*(p_value(values) for values in found if values), *(1.0 for _ in study.withdrawn)]))
    rows = []
    for comparison, values in zip(shown, found, strict=True):
        against = "" if comparison.baseline is None else f" - {comparison.baseline}"
        what = f"{comparison.arm}{against}, `{comparison.measure}`"
        if not values:
            rows.append([comparison.claim, what, "-", "0", "not measured", "-", "-"])
            continue
        (mean, half), holms = interval(values), next(adjusted)
        said = verdict(mean, half, comparison.expected)
        if said in ("holds", "refuted") and holms > LEVEL:
            said += ", not after Holm"
        cells = [number(mean, half), str(len(values)), said, f"{p_value(values):.3f}", f"{holms:.3f}"]
        rows.append([comparison.claim, what, *cells])
    head = ["claim", "difference of", "value", "seeds", "verdict", "p", "p, Holm"]
    lines = _table(head, rows, "Claims")
    measured = sum(map(bool, found))
    note = f"A verdict goes by its own interval; the last column adjusts p for the {measured} claims of this table"
    note += f" and the {len(study.withdrawn)} that are withdrawn:" if study.withdrawn else "."
    gone = ["", *(f"- {claim}" for claim in study.withdrawn)] if study.withdrawn else []
    return [*lines, note, *gone, ""] if lines else []


def _means(results: list[Result], path: str, digits: int = 3) -> str:
    values = [value for value in (lookup(result, path) for result in results) if value is not None]
    if path == "train_seconds":
        values = [value / 60 for value in values]
    return number(*interval(values), digits=digits) if values else "-"


def _arms(study: Study, by_arm: dict[str, list[Result]], runs: list[Planned]) -> list[str]:
    rows = []
    for arm, results in by_arm.items():
        cells = [_means(results, path, digits=DIGITS.get(path, 3)) for path in COLUMNS.values()]
        rows.append([f"`{arm}`", str(len(results)), *cells])
    paths = [before(path) if path.startswith("test") else "" for path in COLUMNS.values()]
    starts: dict[object, list[str]] = {}  # one for each way to sample and reward; it has the seeds of its first arm
    for run in runs:
        results = by_arm.get(run.arm)
        key = (_cost(run), run.config.sampler.rule)
        if results and key not in starts:
            cells = [_means(results, path) if path else "-" for path in paths]
            starts[key] = [f"warm start{f', as `{run.arm}`' if starts else ''}", str(len(results)), *cells]
    rows = [*starts.values(), *rows]
    lines = _table(["arm", "seeds", *COLUMNS], rows, "Arms, on test prompts")
    if lines:
        lines += [*(f"- `{name}`: {arm.about}" for name, arm in study.arms.items() if name in by_arm), ""]
    return lines


def _adaptation(by_arm: dict[str, list[Result]]) -> list[str]:
    rows = [
        [f"`{arm}`", *(_means(results, f"adaptation.{key}") for key in ADAPTATION.values())]
        for arm, results in by_arm.items()
        if any(result.get("adaptation") for result in results)
    ]
    return _table(["arm", *ADAPTATION], rows, "Does the threshold adapt to the prompt?")


def _spent(by_arm: dict[str, list[Result]], runs: list[Planned]) -> list[str]:
    """What each arm spends until its sampled validation reward is half way from its seed's best start to its best end.

    Arms whose reward is another one are left out.
    """
    name = "sampled_reward_costed"
    cost = _cost(runs[0])
    arms = {run.arm: by_arm[run.arm] for run in runs if run.arm in by_arm and _cost(run) == cost}
    first, last = ({} for _ in range(2))
    for result in (result for results in arms.values() for result in results):
        start, end = lookup(result, f"first.{name}"), lookup(result, f"last.{name}")
        if start is not None and end is not None:
            first[result["seed"]] = max(start, first.get(result["seed"], start))
            last[result["seed"]] = max(end, last.get(result["seed"], end))
    level = {seed: start + LEVEL_SHARE * (last[seed] - start) for seed, start in first.items()}
    axes = {"passes": "learner passes by the paper's count", "rows_forwarded": "learner rows", "seconds": "seconds"}
    axes["forwards"] = "rows of rollout and learner"
    rows = []
    for arm, results in arms.items():
        measured = [result for result in results if result["seed"] in level]
        if not measured:
            continue
        cells, reached = [], 0
        for axis in axes:
            spent = [spent_to_reach(r, name, level[r["seed"]], axis) for r in measured]
            reached = sum(value is not None for value in spent)
            values = sorted(math.inf if value is None else value for value in spent)
            middle = median(values)
            cells.append(f"{middle:.0f} ({values[0]:.0f} to {values[-1]:.0f})" if math.isfinite(middle) else "-")
        rows.append([f"`{arm}`", f"{reached} of {len(measured)}", *cells])
    return _table(
        ["arm", "runs that reach it", *axes.values()],
        rows,
        "Spent, median (range), until the sampled validation reward is half way from its seed's best start to best end",
    )


def _diagnostics(by_arm: dict[str, list[Result]]) -> list[str]:
    keys: dict[str, None] = {}
    for results in by_arm.values():
        for result in results:
            keys |= dict.fromkeys(result.get("diagnostics", {}))
    rows = []
    for key in keys:
        cells = []
        for results in by_arm.values():
            values = [result["diagnostics"][key] for result in results if key in result.get("diagnostics", {})]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "-")
        rows.append([f"`{key}`", *cells])
    return _table(["mean over the run", *(f"`{arm}`" for arm in by_arm)], rows, "Diagnostics")
