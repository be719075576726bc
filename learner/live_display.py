"""LiveDisplay: a run on a terminal, drawn anew as it goes on.

Events that are told once stay as lines above; below them are progress, the newest values, and what was wrong last.
Nothing is drawn before the first event, so a command that is refused leaves one line.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from learner.event_lines import line, nfe_of, reward_of, warm_start_note
from learner.summary_display import show_summary

NAMES = {"warm_start": "warm start", "step": "step"}
STEPS = {"warm_start": "warm_start_steps", "step": "learner_steps"}
BARS = "▁▂▃▄▅▆▇█"
POINTS = 24  # of a sparkline: one for each of the last steps
WIDE, NARROW = 104, 76  # columns of a terminal with room for all points; below which values stand one to a line
SPEED_SECONDS = 3600.0  # over which the remaining time is judged: steps may take minutes
REFRESHES = 4  # a second


class LiveDisplay:
    """Takes over the lower part of a terminal from the first event on, until it is left."""

    def __init__(
        self, console: Console, totals: dict[str, int], *, title: str, clock: Callable[[], float] | None = None
    ) -> None:
        """
        Args:
            console: the terminal.
            totals: steps by kind, `warm_start` and `step`.
            title: of the panel.
            clock: seconds; for tests.
        """
        self._console, self._totals, self._title = console, totals, title
        self._phase = ""
        self._values: dict[str, float] = {}
        self._measured = 0.0  # step at which accuracy was
        self._rewards: deque[float] = deque(maxlen=POINTS)
        self._passes: deque[float] = deque(maxlen=POINTS)
        self._warning = ""
        self._tasks: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            get_time=clock,
            speed_estimate_period=SPEED_SECONDS,
        )
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=REFRESHES, vertical_overflow="crop"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller."""
        if not self._live.is_started:
            self._live.start()
        if text := line(kind, values):
            self._console.print(text)
        if kind == "phase":
            self._phase = values["phase"]
        elif kind in ("warning", "quarantine"):
            self._warning = text or ""
        elif kind in STEPS:
            self._take(kind, values)

    def finish(self, summary: dict[str, Any]) -> None:
        """The results, below what was drawn last."""
        self._live.stop()
        show_summary(summary, self._console)

    def _take(self, kind: str, values: dict[str, Any]) -> None:
        self._values |= values
        done = values[STEPS[kind]]
        if kind not in self._tasks:  # the steps of a resumed run took no time that counts
            self._tasks[kind] = self._progress.add_task(NAMES[kind], total=self._totals[kind], completed=int(done))
        self._progress.update(self._tasks[kind], completed=done)
        if kind == "step":
            self._rewards.append(reward_of(values))
            self._passes.append(nfe_of(values))
            self._measured = done if "drift_accuracy" in values else self._measured

    def render(self) -> RenderableType:
        """What is drawn."""
        parts: list[RenderableType] = [self._progress.get_renderable()] if self._tasks else []
        if "learner_loss" in self._values or "step" in self._tasks:
            parts.append(self._training())
        elif "warm_start" in self._tasks:
            parts.append(Text(self._warm_start()))
        if not parts:
            parts.append(Text("nothing is reported yet", style="dim"))
        if self._warning:
            parts.append(Text(self._warning, style="yellow"))
        title = f"{self._title}: {self._phase.replace('_', ' ')}" if self._phase else self._title
        return Panel(Group(*parts), title=Text(title), title_align="left", border_style="dim")

    def _warm_start(self) -> str:
        rate = self._values.get("warm_start_tokens_per_second")
        return warm_start_note(self._values) + (f"  {rate:,.0f} tokens/s" if rate is not None else "")

    def _training(self) -> Table:
        """Pairs of name and value, as the terminal has room for."""
        values, width = self._values, self._console.width
        points = 0 if self._console.options.ascii_only else POINTS if width >= WIDE else POINTS // 2
        rewards, passes = sparkline(self._rewards, points), sparkline(self._passes, points)
        actors, wanted = values.get("rollout_actors"), values.get("rollout_actors_wanted")
        accuracy = values.get("drift_accuracy")
        cells = (
            ("reward", f"{self._rewards[-1]:.3f} {rewards}"),
            ("NFE", f"{self._passes[-1]:.2f} {passes}"),
            ("accuracy", "-" if accuracy is None else f"{accuracy:.3f} (step {self._measured:.0f})"),
            ("TPF", self._shown("rollout_tokens_per_forward", "{:.2f}")),
            ("gamma", self._shown("threshold_gamma", "{:.3g}")),
            ("ESS", self._shown("learner_weight_ess", "{:.2f}")),
            ("staleness", self._shown("replay_staleness_mean", "{:.1f} versions")),
            ("actors", "-" if actors is None else f"{actors:.0f} of {actors if wanted is None else wanted:.0f}"),
            ("learner waits", self._shown("learner_wait_share", "{:.0%}")),
            ("rollout waits", self._shown("rollout_wait_share", "{:.0%}")),
            ("completions", self._shown("rollout_completions_per_second", "{:.1f}/s")),
            ("step takes", self._shown("learner_step_seconds", "{:.2f} s")),
        )
        table = Table.grid(padding=(0, 2, 0, 0))
        beside = 2 if width >= NARROW else 1
        for _ in range(beside):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(no_wrap=True)
        for first in range(0, len(cells), beside):
            table.add_row(*chain.from_iterable(cells[first : first + beside]))
        return table

    def _shown(self, key: str, form: str) -> str:
        value = self._values.get(key)
        return "-" if value is None else form.format(value)


def sparkline(values: Iterable[float], points: int = POINTS) -> str:
    """A bar for each of the last values that are finite; the lowest of them and the highest span its height."""
    finite = [value for value in values if math.isfinite(value)][-points:] if points else []
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    heights = [0.5 if span == 0 else (value - low) / span for value in finite]
    return "".join(BARS[min(int(height * len(BARS)), len(BARS) - 1)] for height in heights)
