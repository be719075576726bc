"""Commands about a run that is to be: `train`, `sft`, `plan`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.errors import Stopped, UserError
from learner.options import ConfigFile, DryRun, Overrides, end_dry_run, load

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and the results.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per event, the summary last.")]

app = typer.Typer()


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run: its folder, or its name below runs/.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Warm start, reinforcement learning, evaluation and the Pareto plot.

    Example: diffpo train --config deploy/configs/sudoku.yaml run.name=first
    Example: diffpo train --resume runs/first
    Example: diffpo train -c deploy/configs/sudoku.yaml metrics.trackers=[tensorboard,wandb] --json
    """
    from learner.display import check_mode, early_display, open_display

    check_mode(quiet=quiet, json=json, dry_run=dry_run)
    with early_display(json=json) as early:
        if resume == "":
            raise UserError("--resume is empty; give a run: its folder, or its name below runs/")
        loaded = None if resume else load(config, overrides, dry_run)
        # a job that Ray runs again finds its run there, and goes on with it
        from common.config import IN_RAY_JOB
        from learner.run_directory import RunDirectory

        again = loaded is not None and IN_RAY_JOB in os.environ and RunDirectory(loaded.run_directory).exists()
        if loaded is None or again:
            from learner.resumption import resumed_config

            found = RunDirectory(loaded.run_directory) if loaded is not None else RunDirectory.find(str(resume))
            loaded = resumed_config(found, file=config, overrides=overrides or [])
            end_dry_run(loaded, dry_run)
        with open_display(loaded, quiet=quiet, early=early) as display:
            from learner.driver import train as run

            summary = run(loaded, display.show, resume=resume is not None or again)
            display.finish({**summary, "run_directory": loaded.run_directory})
    if "stopped" in summary:
        raise Stopped(summary["stopped"])


@app.command()
def sft(
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run that was stopped or killed: its folder, or its name.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Supervised training alone; writes RUN/warm_start, which `model.path` takes.

    Example: diffpo sft --config deploy/configs/sudoku.yaml run.name=start warm_start.steps=300
    Example: diffpo sft --resume runs/start
    """
    from learner.display import check_mode, early_display, open_display

    check_mode(quiet=quiet, json=json, dry_run=dry_run)
    with early_display(json=json) as early:
        if resume == "":
            raise UserError("--resume is empty; give a run: its folder, or its name below runs/")
        from learner.run_directory import RunDirectory

        if resume is None:
            loaded = load(config, overrides, dry_run)
            RunDirectory.check_free(loaded.run_directory, "sft")
        else:
            from learner.resumption import resumed_config

            found = RunDirectory.find(resume)
            loaded = resumed_config(found, file=config, overrides=overrides or [])
            end_dry_run(loaded, dry_run)
            if found.has_warm_start():
                raise UserError(
                    f"run {found.name} has finished; start another from it with model.path={found.warm_start}"
                )
        with open_display(loaded, quiet=quiet, early=early) as display:
            from learner.supervised_run import supervised_run

            display.finish(supervised_run(loaded, display.show, resume=resume is not None))


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of one GPU, in GB (10^9 bytes).")] = 80.0,
    dry_run: DryRun = False,
) -> None:
    """What the run would need of memory and GPUs, estimated from the configuration and the model's config.json.

    Example: diffpo plan -c deploy/configs/sudoku.yaml model.path=LLaDA-8B-Instruct --gpu-memory 80
    """
    given = list(overrides or [])
    if config is None and given and given[0].endswith((".yaml", ".yml")):
        config = Path(given.pop(0))
    loaded = load(config, given, dry_run)
    from learner.memory_plan import measure, settings_of
    from learner.plan_display import show
    from learner.text_console import text_console

    model, activations = measure(loaded)
    console = text_console(width=None if sys.stdout.isatty() else 120)
    show(model, activations, settings_of(loaded, model), gpu=gpu_memory * 1e9, console=console)
