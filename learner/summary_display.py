"""SummaryDisplay: how a command ended, for people.

A summary may hold `evaluation` (what `evaluation.json` holds), `pareto` (the plot), `stopped` (a signal's name) with
`steps`, `model` (a folder), and `run_directory`.
"""

from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """The last lines of `diffpo train` and `diffpo sft`."""
    where = summary.get("run_directory", "")
    if "stopped" in summary:
        console.print(f"stopped by {summary['stopped']} after {summary['steps']:.0f} steps; run directory {where}")
        console.print(f"go on with: diffpo train --resume {quote(where)}")
        return
    if "evaluation" in summary:
        show_evaluation(summary["evaluation"], console)
        console.print(f"plot: {summary['pareto']}\nrun directory: {where}\nlook at it: diffpo report {quote(where)}")
    if "model" in summary:
        console.print(f"model: {summary['model']}")


def show_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """The table of an evaluation: one row per setting, one pair of columns per policy."""
    names = list(evaluation["settings"])
    table = Table(
        title=f"{evaluation['task']}: {evaluation['prompts']} {evaluation['split']} prompts; "
        "reward with the cost of forward passes taken off"
    )
    table.add_column("setting")
    for name in names:
        for column in ("accuracy", "NFE", "reward"):
            table.add_column(f"{name}\n{column}", justify="right")
    for rows in zip(*evaluation["settings"].values(), strict=True):
        cells = [f"{row['accuracy']:.3f} {row['nfe']:.2f} {row['reward_costed']:.3f}".split() for row in rows]
        table.add_row(rows[0]["setting"], *(cell for triple in cells for cell in triple))
    console.print(table)
    low, high = evaluation["nfe_range"]
    for name, value in evaluation["area"].items():
        console.print(f"area under the frontier, NFE {low:g} to {high:g}, {name}: {value:.4f}")
    if "frontier_gain" in evaluation:
        gain = evaluation["frontier_gain"]
        console.print(
            f"frontier gain: {gain['gain']:+.4f} (95 % over prompts: {gain['low']:+.4f} to {gain['high']:+.4f})"
        )
