"""Display: what a person sees of a run. A progress bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

SCALED = {
    "command": "as asked",
    "learner_waits": "the learner waits for groups",
    "useless": "more of them made hardly more groups",
    "rollout_waits": "they wait for leases",
    "stale": "groups grow too old",
}
PLAIN_SECONDS = 10.0  # between lines, where there is no terminal to redraw


class Display:
    """Lives as long as one command; `show` takes the controller's events."""

    def __init__(self, *, warm_start_steps: int, learner_steps: int) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self._totals = {"warm_start": warm_start_steps, "step": learner_steps}
        self._progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bars: dict[str, Any] = {}
        self._printed = 0.0
        self._held_out = ""

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller."""
        if kind == "phase":
            self.console.print(f"phase: {values['phase']}")
        elif kind == "metrics":
            self.console.print(f"metrics: http://{values['address']}/metrics")
        elif kind == "signal":
            self.console.print(f"{values['name']}: {_stopping(values['phase'])}")
        elif kind == "warning":
            self.console.print(f"warning: {values['text']}")
        elif kind == "scale":
            why = SCALED[values["reason"]]
            self.console.print(f"rollout actors: {values['was']} -> {values['actors']}, {why}")
        elif kind == "quarantine":
            so_far = f"; {values['quarantined']} groups so far, RUN/quarantine.json"
            self.console.print(f"group {values['group']} quarantined, it failed twice: {values['reason']}{so_far}")
        elif kind == "warm_start":
            self._advance(kind, values["warm_start_steps"], self._warm_start_note(values))
        elif kind == "step":
            self._advance(kind, values["learner_steps"], _step_note(values), important="drift_nfe" in values)

    def _warm_start_note(self, values: dict[str, float]) -> str:
        if "warm_start_held_out_loss" in values:
            self._held_out = f"  held out {values['warm_start_held_out_loss']:.3f}"
        skipped = values.get("warm_start_skipped", 0)
        left_out = f"  {skipped:.0f} too long" if skipped else ""
        return f"loss {values['warm_start_loss']:.3f}{self._held_out}{left_out}"

    def _advance(self, kind: str, done: float, note: str, *, important: bool = False) -> None:
        total = self._totals[kind]
        if not self.console.is_terminal:
            now = time.monotonic()
            if now - self._printed >= PLAIN_SECONDS or done in (1, total) or important:
                self._printed = now
                self.console.print(f"{kind.replace('_', ' ')} {done:.0f}/{total}: {note}")
            return
        if kind not in self._bars:
            self._bars[kind] = self._progress.add_task(kind.replace("_", " "), total=total, note="")
        self._progress.update(self._bars[kind], completed=done, note=note)

    def results(self, evaluation: dict[str, Any]) -> None:
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
        self.console.print(table)
        low, high = evaluation["nfe_range"]
        for name, value in evaluation["area"].items():
            self.console.print(f"area under the frontier, NFE {low:g} to {high:g}, {name}: {value:.4f}")
        if "frontier_gain" in evaluation:
            gain = evaluation["frontier_gain"]
            self.console.print(
                f"frontier gain: {gain['gain']:+.4f} (95 % over prompts: {gain['low']:+.4f} to {gain['high']:+.4f})"
            )


def _stopping(phase: str) -> str:
    if phase == "train":
        return "stopping, after the step in hand and a checkpoint"
    if phase == "evaluate":
        return "stopping; all steps are trained, --resume goes on with the evaluation"
    return "stopping"


def _step_note(values: dict[str, float]) -> str:
    parts = [
        f"reward {values.get('rollout_generated_reward', values['rollout_reward']):.3f}",
        f"NFE {values.get('rollout_generated_nfe', values['rollout_nfe']):.2f}",
        f"gamma {values['threshold_gamma']:.3g}",
        f"staleness {values['replay_staleness_mean']:.1f}",
    ]
    if "learner_weight_ess" in values:
        parts.append(f"ESS {values['learner_weight_ess']:.2f}")
    if "drift_nfe" in values:
        parts.append(f"| at gamma_init: accuracy {values['drift_accuracy']:.3f} NFE {values['drift_nfe']:.2f}")
    return "  ".join(parts)
