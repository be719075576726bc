"""Report: `docs/studies/NAME.md`, made from the finished runs alone, so it can be made again at any time."""

import math
from pathlib import Path

from learner.study.grid import BEFORE, Comparison, Planned, Study
from learner.study.measures import Result, before, interval, lookup, spent_to_reach, verdict
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
        f"commits {', '.join(commits) or 'unknown'}. Figures are means over seeds ± half the 95 % t-interval; "
        "differences are paired by seed. `area` is the mean greedy exact-solve accuracy over log2(NFE) "
        "(`actors/frontier.py`); `reward` has the cost of forward passes taken off.",
        "",
    ]
    lines += _claims(study, by_arm)
    if study.findings:
        lines += ["## What we learned", "", study.findings.strip(), ""]
    lines += _arms(study, by_arm)
    lines += _adaptation(by_arm)
    lines += _spent(by_arm)
    lines += _diagnostics(by_arm)
    if by_arm:
        lines += [f"![{title}]({path.relative_to(out)})\n" for title, path in draw(by_arm, out / name)]
    path = out / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def _machines(done: Done) -> str:
    """On what the runs were made: their seconds depend on it."""
    used = sorted({(result["jobs"], result["cpus"]) for result in done.values() if {"jobs", "cpus"} <= set(result)})
    return "".join(f", {jobs} at once on {cpus} CPUs" for jobs, cpus in used)


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
        value = lookup(result, comparison.measure)
        if comparison.baseline is None:
            other: float | None = 0.0
        elif comparison.baseline == BEFORE:
            other = lookup(result, before(comparison.measure))
        else:
            other = lookup(baseline.get(result["seed"], {}), comparison.measure)
        if value is not None and other is not None:
            found.append(value - other)
    return found


def _claims(study: Study, by_arm: dict[str, list[Result]]) -> list[str]:
    rows = []
    for comparison in study.comparisons:
        values = differences(comparison, by_arm)
        sides = [name for name in (comparison.arm, comparison.baseline) if name not in (BEFORE, None)]
        if not all(side in by_arm for side in sides):
            continue
        against = "" if comparison.baseline is None else f" - {comparison.baseline}"
        if not values:
            what = f"{comparison.arm}{against}, `{comparison.measure}`"
            rows.append([comparison.claim, what, "-", "0", "not measured"])
            continue
        mean, half = interval(values)
        rows.append(
            [
                comparison.claim,
                f"{comparison.arm}{against}, `{comparison.measure}`",
                number(mean, half),
                str(len(values)),
                verdict(mean, half, comparison.expected),
            ]
        )
    return _table(["claim", "difference of", "value", "seeds", "verdict"], rows, "Claims")


def _means(results: list[Result], path: str, digits: int = 3) -> str:
    values = [value for value in (lookup(result, path) for result in results) if value is not None]
    if path == "train_seconds":
        values = [value / 60 for value in values]
    return number(*interval(values), digits=digits) if values else "-"


def _arms(study: Study, by_arm: dict[str, list[Result]]) -> list[str]:
    rows = []
    for arm, results in by_arm.items():
        cells = [_means(results, path, digits=DIGITS.get(path, 3)) for path in COLUMNS.values()]
        rows.append([f"`{arm}`", str(len(results)), *cells])
    if by_arm:
        first = next(iter(by_arm.values()))
        paths = [before(path) if path.startswith("test") else "" for path in COLUMNS.values()]
        cells = [_means(first, path) if path else "-" for path in paths]
        rows.insert(0, ["warm start", str(len(first)), *cells])
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


def _spent(by_arm: dict[str, list[Result]]) -> list[str]:
    """What each arm spends until its sampled validation reward is half way to the best arm's last."""
    name = "sampled_reward_costed"
    found = [lookup(result, f"first.{name}") for results in by_arm.values() for result in results]
    starts = [value for value in found if value is not None]
    if not starts:
        return []
    start = sum(starts) / len(starts)
    lasts = [[v for r in results if (v := lookup(r, f"last.{name}")) is not None] for results in by_arm.values()]
    best = max(sum(values) / len(values) for values in lasts if values)
    level = start + LEVEL_SHARE * (best - start)
    axes = {"passes": "forward passes by the paper's count", "rows_forwarded": "rows forwarded", "seconds": "seconds"}
    rows = []
    for arm, results in by_arm.items():
        cells = []
        for axis in axes:
            reached = [spent_to_reach(result, name, level, axis) for result in results]
            values = [value for value in reached if value is not None]
            cells.append(number(*interval(values), digits=0) if values else "-")
        never = [str(r.get("seed", "?")) for r in results if spent_to_reach(r, name, level, "passes") is None]
        count = f"{len(results) - len(never)} of {len(results)}" + (f" (not seed {', '.join(never)})" if never else "")
        rows.append([f"`{arm}`", count, *cells])
    return _table(
        ["arm", "runs that reach it", *axes.values()], rows, f"Spent until the sampled validation reward is {level:.3f}"
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
