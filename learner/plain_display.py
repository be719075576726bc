"""PlainDisplay: lines of text, for pipes, files and job logs."""

import time
from typing import Any, Self

from rich.console import Console

from learner.event_lines import line, step_note, warm_start_note
from learner.summary_display import show_summary

LINE_SECONDS = 10.0  # between two lines of progress


class PlainDisplay:
    """A line for every event, and one of progress now and then."""

    def __init__(self, console: Console, totals: dict[str, int]) -> None:
        """`totals`: steps by kind, `warm_start` and `step`."""
        self._console, self._totals = console, totals
        self._printed = 0.0
        self._warm_start: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller."""
        if kind == "warm_start":
            self._warm_start |= values
            self._advance("warm start", kind, values["warm_start_steps"], warm_start_note(self._warm_start))
        elif kind == "step":
            self._advance("step", kind, values["learner_steps"], step_note(values), important="drift_nfe" in values)
        elif text := line(kind, values):
            self._console.print(text)

    def _advance(self, word: str, kind: str, done: float, note: str, *, important: bool = False) -> None:
        now, total = time.monotonic(), self._totals[kind]
        if now - self._printed >= LINE_SECONDS or done in (1, total) or important:
            self._printed = now
            self._console.print(f"{word} {done:.0f}/{total}: {note}")

    def finish(self, summary: dict[str, Any]) -> None:
        """The results."""
        show_summary(summary, self._console)
