"""Commands that look at what a run did: `report`, `view`, `replay`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import RunError, UserError, cause

app = typer.Typer()

OUT = "HTML file to write"


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Runs: their folders, URIs, or names below runs/.")],
    out: Annotated[
        Path | None, typer.Option(help=f"{OUT}; else RUN/report.html, of several runs ./report.html.")
    ] = None,
) -> None:
    """One HTML file on a run, or several compared: curves, frontier, completions as they appear, failures.

    Runs that differ in nothing but their seed are drawn as one line with its interval. A run may still be going.

    Example: diffpo report runs/first
    Example: diffpo report runs/seed0 runs/seed1 runs/other --out compared.html
    """
    from common.place import Place
    from learner.report.page import report_page
    from learner.report.run_data import RunData

    found = [RunData.read(run) for run in dict.fromkeys(runs)]
    page = report_page(found)
    beside = found[0].directory.place if len(found) == 1 else Place(Path())
    _write(page, beside, "report.html", out)


@app.command()
def view(
    run: Annotated[str, typer.Argument(help="A run: its folder, URI, or name below runs/.")],
    group: Annotated[
        int | None, typer.Option(help="Number of a group that the run has recorded; else the newest of them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"{OUT}; else RUN/view-GROUP.html.")] = None,
) -> None:
    """The completions of a group as they appeared, step by step, with what is known of every token.

    Example: diffpo view runs/first --group 812
    """
    from learner.report.completions import recorded_group
    from learner.report.page import view_page
    from learner.report.run_data import RunData

    found = RunData.read(run)
    shown = recorded_group(found, group)
    _write(view_page(shown), found.directory.place, f"view-{shown['group']}.html", out)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="A run: its folder, or its name below runs/.")],
    group: Annotated[int, typer.Argument(help="Number of a group in its segments, set_aside or checkpoints.")],
    weights: Annotated[
        str | None, typer.Option(help="Policy to replay with; else the nearest that the run has.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference that is none, in nats.")] = 1e-3,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Recompute a saved group's log-probs, rewards and loss terms, and say where they differ from its record.

    Example: diffpo replay sudoku 3968
    """
    from json import dumps

    from learner.group_replay import replay_saved
    from learner.replay_display import show
    from learner.run_directory import RunDirectory
    from learner.text_console import text_console

    directory = RunDirectory.find(run)
    source, found = replay_saved(directory, directory.config(), group, weights, tolerance)
    if json:
        typer.echo(dumps({"run": directory.name, "group": group} | source | found.as_dict()))
    else:
        console = text_console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        show(source, found, console)
    if not found.agrees:
        raise RunError(f"group {group}: {found.verdict}")


def _write(page: str, beside: Any, name: str, out: Path | None) -> None:
    """Beside the run, a `Place`, or where the user wants it."""
    from common.location import below
    from common.place import FAILURES, Place

    place, name = (beside, name) if out is None else (Place(out.absolute().parent), out.name)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} cannot be written: there is no folder {out.parent}; make it, or choose another")
    written = below(place.name, name)
    try:
        place.write(name, page.encode())
    except FAILURES as error:
        raise RunError(f"{written} cannot be written: {cause(error)}; choose another with --out") from error
    typer.echo(written)
