"""Display: what a person, or a program, sees of `diffpo train` and `diffpo sft`.

One interface, four of them: a live view on a terminal, plain lines elsewhere (pipes, job logs), nearly nothing
(`--quiet`), JSON (`--json`). Each is handed the controller's events in order, then how the command ended.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

from rich.console import Console

from common.config import IN_RAY_JOB, Config
from common.errors import UserError
from learner.json_display import JsonDisplay
from learner.live_display import LiveDisplay
from learner.plain_display import PlainDisplay
from learner.quiet_display import QuietDisplay
from learner.text_console import text_console


class Display(Protocol):
    """Lives as long as one command; entered before anything can go wrong, left with the error that ended it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object, /) -> None: ...

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """One event of the controller (`warm_start`, `step`, `phase`, `warning`, ...); those not known are passed
        over."""
        ...

    def finish(self, summary: dict[str, Any]) -> None:
        """Called once at the end of a command that did not fail; `learner.summary_display` says what it may hold."""
        ...


def check_mode(*, quiet: bool, json: bool, dry_run: bool = False) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: when they do.
    """
    if quiet and json:
        raise UserError("--quiet and --json are two ways to print; give one of them")
    if json and dry_run:
        raise UserError("--json and --dry-run: the resolved configuration is YAML; leave --json out")


def early_display(*, json: bool) -> AbstractContextManager[JsonDisplay | None]:
    """That of `--json`, which needs no configuration, and so tells of one that is refused too."""
    return JsonDisplay() if json else nullcontext()


def open_display(
    config: Config, *, quiet: bool = False, early: JsonDisplay | None = None, console: Console | None = None
) -> AbstractContextManager[Display]:
    """The display that fits: `early`, if that is one already. A Ray job's log is no terminal, whatever it claims."""
    totals = {"warm_start": config.warm_start.steps, "step": config.learner.steps}
    if early is not None:
        return nullcontext(early)
    console = console or text_console(soft_wrap=True)
    if quiet:
        return QuietDisplay(console)
    if console.is_terminal and not console.is_dumb_terminal and IN_RAY_JOB not in os.environ:
        return LiveDisplay(console, totals, title=f"{config.task.name}, run {config.run.name}")
    return PlainDisplay(console, totals)
