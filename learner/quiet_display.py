"""QuietDisplay: `--quiet`. What is wrong, and the results."""

from typing import Any, Self

from rich.console import Console

from learner.event_lines import line
from learner.summary_display import show_summary

WORTH_A_LINE = ("warning", "quarantine", "signal")


class QuietDisplay:
    """Says nothing as long as all is well."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller."""
        if kind in WORTH_A_LINE:
            self._console.print(line(kind, values))

    def finish(self, summary: dict[str, Any]) -> None:
        """The results."""
        show_summary(summary, self._console)
