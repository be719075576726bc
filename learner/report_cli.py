"""Commands that draw what a run did: `report`, `view`."""

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
