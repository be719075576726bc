"""Options: what several commands take, and mean the same by."""

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, e.g. deploy/configs/sudoku.yaml.")]
POLICY = "Policy: a checkpoint, RUN/warm_start, or any folder in Hugging Face layout; or its URI."
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. learner.steps=20 run.name=try.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and end.")]


def load(config: Path | None, overrides: list[str] | None, dry_run: bool) -> Any:
    """The configuration that a command was given; ends the command where it was only to be printed."""
    from common.config_file import load_config

    loaded = load_config(config, overrides)
    end_dry_run(loaded, dry_run)
    return loaded


def end_dry_run(loaded: Any, dry_run: bool) -> None:
    """Print a configuration and end, if that was asked for."""
    from common.config_file import dump_config
    from common.tasks import check_task

    if dry_run:
        check_task(loaded.task)
        typer.echo(dump_config(loaded), nl=False)
        raise typer.Exit
