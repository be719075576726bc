"""The command `diffpo doctor`."""

import sys
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def doctor(
    start_ray: Annotated[bool, typer.Option("--start-ray", help="Start a local Ray too, or join RAY_ADDRESS.")] = False,
    root: Annotated[str, typer.Option(help="Where runs shall lie: a folder, or a URI.")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What of this machine and its packages a run needs; 1 when something is missing. Put it into bug reports.

    Example: diffpo doctor
    Example: diffpo doctor --start-ray --json
    """
    from json import dumps

    from learner.doctor import checks, examine
    from learner.doctor_display import as_dict, show
    from learner.text_console import text_console

    findings = examine(checks(root=root, starts_ray=start_ray))
    found = as_dict(findings)
    if json:
        typer.echo(dumps(found))
    else:
        show(findings, text_console(width=None if sys.stdout.isatty() else 120))
    if not found["ok"]:
        raise typer.Exit(1)
