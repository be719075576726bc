"""Curves: the figures of a report, each over all of its runs.

With one run a figure has several lines of it; with several, one line of each arm: its run, or the mean over its seeds
with an interval. Ids inside of an SVG are made its own, since many stand on one page.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.report.arms import Arm
from learner.report.figure import COLOURS, Figure, band, drawn, line
from learner.report.run_data import RunData

ESS = re.compile(r"learner_weight_ess\{reveal_step=(\d+)\}")


@dataclass(frozen=True)
class Curve:
    """A key of the step rows."""

    key: str
    label: str


PLAIN: list[tuple[str, str, str, list[Curve]]] = [
    (
        "Reward",
        "Mean reward of generated groups, as the task gives it, and of trained ones after the cost of forward passes",
        "reward",
        [Curve("rollout_generated_reward", "generated"), Curve("rollout_reward_costed", "trained, after cost")],
    ),
    (
        "Forward passes",
        "NFE: mean forward passes of a generated completion",
        "NFE",
        [Curve("rollout_generated_nfe", "NFE")],
    ),
    (
        "Tokens per forward",
        "TPF: tokens revealed in a forward pass",
        "TPF",
        [Curve("rollout_tokens_per_forward", "TPF")],
    ),
    (
        "Accuracy at the initial threshold",
        "Validation prompts, decoded greedily with gamma_init: drift of the model apart from the threshold",
        "accuracy",
        [Curve("drift_accuracy", "accuracy")],
    ),
    (
        "Staleness",
        "Versions between the oldest token of a completion and the update it is used in",
        "versions",
        [Curve("replay_staleness_mean", "mean"), Curve("replay_staleness_max", "oldest")],
    ),
    (
        "Effective sample size",
        "ESS of the importance weights, as a share of the tokens: 1 is on-policy",
        "share",
        [Curve("learner_weight_ess", "all tokens")],
    ),
    (
        "Who waits for whom",
        "Share of the last half minute that the learner waited for groups, and rollout actors for leases",
        "share of time",
        [Curve("learner_wait_share", "learner"), Curve("rollout_wait_share", "rollout")],
    ),
    (
        "Throughput",
        "Completions that rollout finished in a second",
        "completions/s",
        [Curve("rollout_completions_per_second", "completions/s")],
    ),
    ("Gradient", "Norm before clipping", "norm", [Curve("learner_gradient_norm", "norm")]),
]


def curves(arms: Sequence[Arm]) -> list[Figure]:
    """All figures over the steps that have anything to show."""
    found = [_plain(arms, *about) for about in PLAIN]
    found[3:3] = [_gamma(arms)]
    if _only(arms) is not None:
        found[7:7] = [_ess_by_reveal_step(arms[0].runs[0])]
    return [_own_ids(figure, f"f{number}") for number, figure in enumerate(found) if figure.said]


def _alone(arms: Sequence[Arm], lines: list[Curve]) -> str:
    """What a caption says besides where there are several runs."""
    which = f"; of several runs the first of these alone: {lines[0].label}" if len(lines) > 1 else ""
    seeds = "; bands are 95 % intervals over seeds" if any(arm.seeds > 1 for arm in arms) else ""
    return which + seeds


def _only(arms: Sequence[Arm]) -> RunData | None:
    """The run, where there is one."""
    return arms[0].runs[0] if len(arms) == len(arms[0].runs) == 1 else None


def _plain(arms: Sequence[Arm], title: str, about: str, unit: str, lines: list[Curve]) -> Figure:
    figure = Figure(title, about if _only(arms) is not None else f"{about}{_alone(arms, lines)}")
    with drawn(figure, y=unit) as axes:
        if (run := _only(arms)) is not None:
            for curve, colour in zip(lines, COLOURS, strict=False):
                line(axes, figure, *run.series(curve.key), curve.label, colour)
        else:
            for number, arm in enumerate(arms):
                colour = COLOURS[number % len(COLOURS)]
                steps, found = arm.series(lines[0].key)
                line(axes, figure, steps, [one.mean for one in found], arm.label, colour)
            for number, arm in enumerate(arms):
                steps, found = arm.series(lines[0].key)
                if arm.seeds > 1:
                    low, high = [one.mean - one.half for one in found], [one.mean + one.half for one in found]
                    band(axes, steps, low, high, COLOURS[number % len(COLOURS)])
    return figure


def _gamma(arms: Sequence[Arm]) -> Figure:
    """Quantiles of the thresholds that were drawn, from the completions; else their mean, from the steps."""
    figure = Figure("Threshold", "Gamma in nats: median of the drawn thresholds, with the middle 80 % of them")
    with drawn(figure, y="gamma (nats)") as axes:
        axes.set_yscale("log")
        for number, arm in enumerate(arms):
            colour, name = COLOURS[number % len(COLOURS)], "gamma" if _only(arms) is not None else arm.label
            records = [run.record.select(["step", "gamma"]) for run in arm.runs]
            step, gamma = (np.concatenate([one[key].to_numpy() for one in records]) for key in ("step", "gamma"))
            gamma = np.where(gamma > 0, gamma, np.nan)
            found = [(one, *np.nanquantile(gamma[step == one], (0.1, 0.5, 0.9))) for one in np.unique(step)]
            if found:
                steps, low, middle, high = (list(column) for column in zip(*found, strict=True))
                line(axes, figure, steps, middle, name, colour)
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            else:
                line(axes, figure, *arm.runs[0].series("threshold_gamma"), name, colour)
    return figure


def _ess_by_reveal_step(run: RunData) -> Figure:
    figure = Figure(
        "ESS by reveal step",
        "Effective sample size of tokens by the step they were revealed in, running means of 11 learner steps: where "
        "the surrogate is furthest off",
    )
    keys = sorted({int(found[1]) for row in run.steps for key in row if (found := ESS.fullmatch(key))})
    with drawn(figure, y="share") as axes:
        for number, low in enumerate(keys):
            label = f"from step {low}"
            steps, values = run.series(f"learner_weight_ess{{reveal_step={low}}}")
            line(axes, figure, steps, _running_mean(values), label, COLOURS[number % len(COLOURS)])
    return figure


def _running_mean(values: list[float]) -> list[float]:
    """Of each value and five neighbours on either side, as far as there are any."""
    return [float(np.mean(values[max(0, at - 5) : at + 6])) for at in range(len(values))]


def frontier_figure(runs: Sequence[RunData]) -> Figure | None:
    """Accuracy against NFE, before and after; None where no run was evaluated."""
    evaluated = [run for run in runs if run.evaluation is not None]
    if not evaluated:
        return None
    about = (
        "Accuracy against mean forward passes on held-out prompts: fixed thresholds, joined; a star is the learned one"
    )
    figure = Figure("Accuracy and forward passes", about)
    with drawn(figure, x="NFE (mean forward passes per completion)", y="accuracy", height=3.8) as axes:
        axes.set_ylim(0, None)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        number = 0
        for run in evaluated:
            for policy in ("before", "after") if len(runs) == 1 else ("after",):
                label, colour = policy if len(runs) == 1 else run.label, COLOURS[number % len(COLOURS)]
                _draw_frontier(axes, figure, run, policy, label, colour)
                number += 1
    return _own_ids(figure, "frontier")


def _draw_frontier(axes: Any, figure: Figure, run: RunData, policy: str, label: str, colour: str) -> None:
    fixed = sorted((r["nfe"], r["accuracy"]) for r in run.settings(policy) if r["setting"].startswith("eb gamma="))
    if fixed:
        nfe, accuracy = zip(*fixed, strict=True)
        line(axes, figure, nfe, accuracy, label, colour, marker="o")
    learned = run.setting(policy, "learned, greedy")
    if learned is not None:
        axes.plot([learned["nfe"]], [learned["accuracy"]], "*", color=colour, markersize=16, linestyle="none")
        figure.said.append(
            f"{label}, learned threshold: accuracy {learned['accuracy']:.3f} at NFE {learned['nfe']:.2f}"
        )


def _own_ids(figure: Figure, prefix: str) -> Figure:
    figure.svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", figure.svg)
    return figure
