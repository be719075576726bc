"""Plots of a study: frontiers, learning curves on three axes, drift. Lines are means over seeds, bands 95 %."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from learner.study.measures import Result, interval

COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7c3aed", "#0e7490", "#be185d", "#a16207", "#475569")
AXES = {"passes": "learner forward passes, paper's count", "rows_forwarded": "rows really forwarded", "seconds": "s"}
Arms = dict[str, list[Result]]


def draw(by_arm: Arms, folder: Path) -> list[tuple[str, Path]]:
    """Write the plots that the runs have data for; their titles and paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "Greedy frontier on test prompts, entropy bound with fixed gammas": _frontier(by_arm),
        "Sampled validation reward (cost taken off) against what was spent": _curves(by_arm),
        "Drift: greedy accuracy and NFE at the initial gamma, and at the operating point": _drift(by_arm),
    }
    written = []
    for number, (title, figure) in enumerate(plots.items()):
        path = folder / f"{('frontier', 'curves', 'drift')[number]}.png"
        figure.savefig(path, dpi=55)
        written.append((title, path))
    return written


def _frontier(by_arm: Arms) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    start = next(iter(by_arm.values()))
    _curve(axes, _tests(start, "before"), "#6b7280", "warm start", "--")
    for (arm, results), colour in zip(by_arm.items(), COLOURS * 3, strict=False):
        _curve(axes, _tests(results, "after"), colour, arm, "-")
        points = [test["operating"] for test in _tests(results, "after") if "operating" in test]
        axes.plot([p["nfe"] for p in points], [p["accuracy"] for p in points], "*", color=colour, markersize=9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("NFE; stars are the operating points of single seeds")
    axes.set_ylabel("exact-solve accuracy")
    _finish(axes)
    return figure


def _tests(results: list[Result], when: str) -> list[Result]:
    found = [result.get("test", {}).get(when) for result in results]
    return [test for test in found if test is not None]


def _curve(axes: Axes, tests: list[Result], colour: str, label: str, style: str) -> None:
    curves = [
        [(p["nfe"], p["accuracy"]) for p in test.get("frontier", ()) if p["rule"] == "entropy_bound"] for test in tests
    ]
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    count = min(map(len, curves))
    points = np.array([curve[:count] for curve in curves])
    axes.plot(*points.mean(0).T, style, color=colour, label=label, marker="o", markersize=3)


def _curves(by_arm: Arms) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(1, 3), AXES.items(), strict=True):
        for (arm, results), colour in zip(by_arm.items(), COLOURS * 3, strict=False):
            _band(axes, results, axis, "sampled_reward_costed", colour, arm)
        axes.set_xlabel(label if axis != "seconds" else "seconds of training (rollout and learner), one thread")
        axes.set_ylabel("sampled reward, cost taken off")
        _finish(axes)
    return figure


def _drift(by_arm: Arms) -> Figure:
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    names = {
        "drift_accuracy": "accuracy at the initial gamma",
        "drift_nfe": "NFE at the initial gamma",
        "accuracy": "accuracy at the operating point",
        "nfe": "NFE at the operating point",
    }
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, names.items(), strict=True):
        for (arm, results), colour in zip(by_arm.items(), COLOURS * 3, strict=False):
            _band(axes, results, "step", name, colour, arm)
        axes.set_xlabel("learner step")
        axes.set_ylabel(label)
        _finish(axes)
    return figure


def _band(axes: Axes, results: list[Result], axis: str, name: str, colour: str, label: str) -> None:
    curves = [[(p[axis], p[name]) for p in r.get("validation", ()) if {axis, name} <= set(p)] for r in results]
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    count = min(map(len, curves))
    points = np.array([curve[:count] for curve in curves])
    x, mean = points.mean(0).T
    axes.plot(x, mean, color=colour, label=label, marker="o", markersize=2.5)
    if len(curves) > 1:
        half = np.array([interval(points[:, n, 1].tolist())[1] for n in range(count)])
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
