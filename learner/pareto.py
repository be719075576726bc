"""Pareto plot: accuracy against NFE of some policies, the frontier joined, learned thresholds marked."""

from collections.abc import Mapping
from io import BytesIO

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from actors.evaluation import Point
from actors.frontier import frontier_points
from actors.reveal_rules import ENTROPY_BOUND
from learner.report.figure import literal

COLOURS = ("#6b7280", "#c2410c", "#1d4ed8", "#15803d")
MARKERS = {"confidence": ("s", "confidence"), "top_k": ("^", "fixed tokens per step")}


def draw_pareto(points: Mapping[str, list[Point]], *, title: str) -> bytes:
    """The plot as PNG; bars are binomial standard errors."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(points.items(), COLOURS, strict=False):
        curve = frontier_points(found)
        axes.errorbar(
            [p.mean_nfe for p in curve],
            [p.accuracy for p in curve],
            yerr=[float(p.summary()["accuracy_se"]) for p in curve],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{name}: entropy bound, fixed gamma",
        )
        for rule in sorted({p.setting.rule for p in found}.difference(ENTROPY_BOUND)):
            other = [p for p in found if p.setting.rule == rule]
            marker, label = MARKERS.get(rule, ("D", rule))
            axes.plot(
                [p.mean_nfe for p in other],
                [p.accuracy for p in other],
                linestyle="none",
                marker=marker,
                markerfacecolor="none",
                color=colour,
                label=f"{name}: {label}",
            )
        learned = [p for p in found if isinstance(p.setting.parameter, str) and p.setting.temperature == 0]
        if learned:
            axes.plot(
                learned[0].mean_nfe,
                learned[0].accuracy,
                "*",
                markersize=15,
                color=colour,
                label=f"{name}: learned gamma",
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("NFE (mean forward passes per completion, greedy)")
    axes.set_ylabel("exact-solve accuracy on held-out prompts")
    axes.set_title(literal(title))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    return drawn.getvalue()
