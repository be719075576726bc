"""Command line: `diffpo` and `python -m learner`.

- Commands are in the files named after what they are about (`learner/*_cli.py`).
- `diffpo --help` imports neither torch nor ray; each command imports what it needs.
- How it ended is the exit code (`EXIT_CODES`, which `--help` shows).
"""

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from common.errors import RunError, Stopped, UserError, is_out_of_memory, one_line, shown
from learner import (
    catalogue_cli,
    control_cli,
    doctor_cli,
    evaluation_cli,
    measurement_cli,
    policy_cli,
    report_cli,
    training_cli,
)
from learner.text_console import without_controls

EXIT_CODES = (
    "Exit codes: 0 done; 1 the run failed, or something that was checked is not as it should be: the last line names "
    "the cause; 2 something given was wrong, nothing was started; 130 and 143 stopped by Ctrl-C and SIGTERM, --resume "
    "goes on.\n\nEvery command has help of its own, with examples: diffpo COMMAND --help. Completion by Tab: diffpo "
    "--install-completion."
)

app = typer.Typer(
    name="diffpo",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Train masked diffusion language models by asynchronous reinforcement learning.",
    epilog=EXIT_CODES,
)

for part in (
    *(training_cli, evaluation_cli, policy_cli, measurement_cli),
    *(catalogue_cli, control_cli, report_cli, doctor_cli),
):
    app.add_typer(part.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from common.release import release

        typer.echo(f"diffpo {release()}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point; mistakes and failures are one line on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {without_controls(shown(error))}", err=True)
        sys.exit(2)
    except (RunError, OSError, MemoryError) as error:  # the last two: the machine has no room, or a file went away
        typer.echo(f"run failed: {without_controls(shown(error)) or type(error).__name__}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        typer.echo(f"run failed: too little memory ({one_line(error)}); diffpo plan says what it takes", err=True)
        sys.exit(1)
    except SystemExit as ended:  # Ray's own handler, before and after a run's, ends with the number of the signal
        sys.exit(128 + signal.SIGTERM if ended.code == signal.SIGTERM else ended.code)
    except Stopped as stop:
        sys.exit(128 + signal.Signals[str(stop)].value)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
