"""Commands that talk to a run that is going: `status`, `scale`, `stop`.

They reach its controller through the run's folder, inside a Ray job through the job's cluster, and with `--address`
as a short Ray job on that cluster.
"""

import os
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from common.errors import RunError, UserError

app = typer.Typer()

Run = Annotated[
    str, typer.Argument(help="A run: its folder, or its name below runs/; its name where --address is given.")
]
Address = Annotated[
    str | None,
    typer.Option(help="Job server of the run's cluster, http://HOST:8265; else the run's folder says where."),
]
WorkingDir = Annotated[
    Path | None,
    typer.Option(help="With --address: a checkout to send along, where the cluster's Python has no DiFFPO."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object, on the last line.")]
STOP_SECONDS = 600.0


@app.command()
def status(run: Run, address: Address = None, working_dir: WorkingDir = None, json: Json = False) -> None:
    """Phase, step, and what learner and rollout actors do or wait for.

    Example: diffpo status first
    Example: diffpo status first --address http://127.0.0.1:8265
    """
    if _remotely(address, working_dir, ["status", run, *(["--json"] if json else [])]):
        return
    from json import dumps

    from learner.remote_control import NotGoing, controller_of
    from learner.run_directory import RunDirectory
    from learner.status_display import ended, show, show_ended
    from learner.text_console import text_console

    found: dict[str, Any]
    display = show
    try:
        with controller_of(run) as call:
            found = call("status")
    except NotGoing:
        found, display = ended(RunDirectory.find(run)), show_ended
    if json:
        typer.echo(dumps(found))
    else:
        display(found, text_console(soft_wrap=True))


@app.command()
def scale(
    run: Run,
    actors: Annotated[int, typer.Option(help="Rollout actors that it shall have.")],
    address: Address = None,
    working_dir: WorkingDir = None,
) -> None:
    """Add or drain rollout actors of a run while it trains; drained ones finish or return their leases.

    Example: diffpo scale sudoku --actors 4
    """
    if _remotely(address, working_dir, ["scale", run, "--actors", str(actors)]):
        return
    from learner.remote_control import controller_of

    with controller_of(run) as call:
        answer = call("scale", actors)
    typer.echo(f"{run}: {answer['was']} -> {answer['actors']} rollout actors{answer['note']}")


@app.command()
def stop(
    run: Run,
    address: Address = None,
    working_dir: WorkingDir = None,
    wait: Annotated[bool, typer.Option(help="Return once the run has ended.")] = True,
) -> None:
    """End a run in good order: the learner finishes its step and writes a checkpoint; `--resume` goes on from there.

    Example: diffpo stop sudoku
    """
    if _remotely(address, working_dir, ["stop", run, *([] if wait else ["--no-wait"])], seconds=STOP_SECONDS):
        return
    from learner.remote_control import RunEnded, controller_of

    where, phase = run, "ended" if wait else "stopping"
    with suppress(RunEnded), controller_of(run) as call:
        where = call("directory")
        call("stop", "SIGTERM")
        if wait:
            phase = call("until_ended", seconds=STOP_SECONDS)
    if phase == "failed":
        raise RunError(f"{run} failed before it had stopped; its output names the cause")
    way_on = "" if phase == "finished" else f"; go on with: diffpo train --resume {quote(where)}"
    typer.echo(f"{run}: {phase}{way_on}")


def _remotely(address: str | None, working_dir: Path | None, arguments: list[str], *, seconds: float = 0.0) -> bool:
    """Whether the command was done on a cluster; it may take so many seconds there."""
    # before Ray is imported: it looks once
    os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE") or "token"
    if address is None:
        if working_dir is not None:
            raise UserError(f"--working-dir {working_dir} goes with --address; give both, or neither")
        return False
    from learner.remote_job import run_remotely

    typer.echo(run_remotely(address, arguments, working_dir, seconds=seconds))
    return True
