"""Command line: `diffpo` and `python -m learner`.

- `diffpo --help` imports neither torch nor ray; each command imports what it needs.
- How it ended is the exit code (`EXIT_CODES`, which `--help` shows).
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import RunError, Stopped, UserError, is_out_of_memory, one_line, shown
from learner import control_cli, doctor_cli, report_cli

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

app.add_typer(control_cli.app)
app.add_typer(report_cli.app)
app.add_typer(doctor_cli.app)

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, e.g. deploy/configs/sudoku.yaml.")]
POLICY = "Policy: a checkpoint, RUN/warm_start, or any folder in Hugging Face layout; or its URI."
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. learner.steps=20 run.name=try.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and end.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and the results.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per event, the summary last.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"diffpo {version('diffpo')}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None: ...


def _load(config: Path | None, overrides: list[str] | None, dry_run: bool) -> Any:
    from common.config_file import load_config

    loaded = load_config(config, overrides)
    _end_dry_run(loaded, dry_run)
    return loaded


def _end_dry_run(loaded: Any, dry_run: bool) -> None:
    from common.config_file import dump_config
    from common.tasks import check_task

    if dry_run:
        check_task(loaded.task)
        typer.echo(dump_config(loaded), nl=False)
        raise typer.Exit


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
    from learner.display import check_mode, open_display

    check_mode(quiet=quiet, json=json, dry_run=dry_run)
    if resume == "":
        raise UserError("--resume is empty; give a run: its folder, or its name below runs/")
    loaded = None if resume else _load(config, overrides, dry_run)
    # a job that Ray runs again finds its run there, and goes on with it
    from common.config import IN_RAY_JOB
    from learner.run_directory import RunDirectory

    again = loaded is not None and IN_RAY_JOB in os.environ and RunDirectory(loaded.run_directory).exists()
    if loaded is None or again:
        from learner.resumption import resumed_config

        found = RunDirectory(loaded.run_directory) if loaded is not None else RunDirectory.find(str(resume))
        loaded = resumed_config(found, file=config, overrides=overrides or [])
        _end_dry_run(loaded, dry_run)
    with open_display(loaded, quiet=quiet, json=json) as display:
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
    from learner.display import check_mode, open_display

    check_mode(quiet=quiet, json=json, dry_run=dry_run)
    if resume == "":
        raise UserError("--resume is empty; give a run: its folder, or its name below runs/")
    from learner.run_directory import RunDirectory

    if resume is None:
        loaded = _load(config, overrides, dry_run)
        RunDirectory.check_free(loaded.run_directory, "sft")
    else:
        from learner.resumption import resumed_config

        found = RunDirectory.find(resume)
        loaded = resumed_config(found, file=config, overrides=overrides or [])
        _end_dry_run(loaded, dry_run)
        if found.has_warm_start():
            raise UserError(f"run {found.name} has finished; start another from it with model.path={found.warm_start}")
    with open_display(loaded, quiet=quiet, json=json) as display:
        from learner.supervised_run import supervised_run

        display.finish(supervised_run(loaded, display.show, resume=resume is not None))


@app.command("eval")
def evaluate(
    folder: Annotated[str, typer.Argument(help=POLICY)],
    config: ConfigFile = None,
    overrides: Overrides = None,
    against: Annotated[str | None, typer.Option(help="A second policy, drawn as `before`.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Questions in place of the task's test split: all rows of this file.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Workers side by side, on Ray; else rollout.actors. 1 is this process.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evaluation"),
    dry_run: DryRun = False,
) -> None:
    """Accuracy and NFE on held-out prompts: fixed gammas, the other reveal rules, and the learned threshold.

    The same command goes on with an evaluation that was killed.

    Example: diffpo eval runs/first/checkpoints/step-000200 -c deploy/configs/sudoku.yaml evaluation.prompts=256
    Example: diffpo eval runs/first/warm_start -c deploy/configs/sudoku.yaml --file puzzles.csv --actors 4
    """
    given = list(overrides or [])
    given += ["evaluation.split=test"] if file is not None else []
    given += [f"rollout.actors={actors}"] if actors is not None else []
    loaded = _load(config, given, dry_run and file is None)
    loaded = loaded.model_copy(update={"model": loaded.model.model_copy(update={"path": folder})})
    if file is not None:
        from learner.evaluation_file import with_file

        loaded = with_file(loaded, file, all_rows=not any(item.startswith("evaluation.prompts=") for item in given))
        _end_dry_run(loaded, dry_run)
    from common.place import Place
    from learner.preflight import preflight

    task = preflight(loaded, trains=False)
    from rich.console import Console

    from learner.evaluation_record import ShardFolder, write_answers
    from learner.final_evaluation import Evaluation, summarise
    from learner.pareto import draw_pareto
    from learner.run_directory import RunDirectory
    from learner.summary_display import show_evaluation

    folders = {"before": against, "after": folder} if against else {"policy": folder}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from error
    console = Console(soft_wrap=True, highlight=False)
    kept = ShardFolder(Place(out), loaded, folders)
    evaluation = Evaluation(
        loaded,
        folders,
        kept,
        lambda name, point: console.print(
            f"{name}: {point.setting.name}: accuracy {point.accuracy:.3f} NFE {point.mean_nfe:.2f}"
        ),
    )
    points = evaluation.run()
    results = summarise(loaded, points)
    RunDirectory(out).write_json("evaluation.json", results)
    (out / "pareto.png").write_bytes(draw_pareto(points, title=f"{loaded.task.name}: {folder}"))
    written = write_answers(out, loaded, task, points)
    kept.remove()
    show_evaluation(results, console)
    console.print(f"plot: {out / 'pareto.png'}")
    console.print(f"answers: {', '.join(map(str, written))}")


@app.command("score")
def score_answers(
    task: Annotated[str, typer.Option(help="countdown, custom, gsm8k, math500 or sudoku; see docs/tasks.md.")],
    file: Annotated[Path, typer.Argument(help="Completions: JSONL, JSON, CSV or Parquet.")],
    overrides: Overrides = None,
    fields: Annotated[
        str | None, typer.Option(help="Names of the fields, e.g. question=q,completion=text,ground_truth=answer.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the verdict of every row.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a completion, in place of docs/tasks.md's; may be repeated, '' is none."),
    ] = None,
) -> None:
    """Accuracy and every reward component of completions that exist already.

    Example: diffpo score --task gsm8k answers.jsonl --out verdicts.parquet
    """
    from rich.console import Console

    from common.config_file import load_config
    from common.tasks import build_task
    from learner.answer_display import show
    from learner.answer_file import STOPS, check_out, field_names, judge, read_answers, write_verdicts

    loaded = load_config(None, ["task.prompt_style=d1", *(overrides or []), f"task.name={task}"])
    built = build_task(loaded.task)
    answers = read_answers(built, file, field_names(fields), stop or STOPS)
    if out is not None:
        check_out(out)
    console = Console(highlight=False, soft_wrap=True)
    with console.status("scoring") as status:
        verdicts = judge(
            built, answers, loaded.rollout, lambda done: status.update(f"{done} of {len(answers)} rows scored")
        )
    show(verdicts, f"{task}: {file}", console)
    if out is not None:
        write_verdicts(out, answers, verdicts)
        console.print(f"verdicts: {out}")
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if len(errors) == len(verdicts):
        raise RunError(f"none of the {len(errors)} rows could be scored; the first: {errors[0]}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=POLICY)],
    prompt: Annotated[str, typer.Argument(help="What to complete.")],
    tokens: Annotated[int, typer.Option(help="Length of the completion.")] = 16,
    block: Annotated[int | None, typer.Option(help="Block length; a divisor of the tokens.")] = None,
    rule: Annotated[str, typer.Option(help="Reveal rule, a name of docs/engine.md.")] = "entropy_bound",
    threshold: Annotated[float | None, typer.Option(help="The rule's parameter; else the learned threshold.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    cache: Annotated[str, typer.Option(help="none, prefix or dual.")] = "none",
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the tokenizer's chat template.")] = False,
    steps: Annotated[bool, typer.Option(help="Show the completion appear step by step.")] = True,
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """One completion, how it appears, and what it cost (NFE, tokens per forward).

    Example: diffpo generate runs/sudoku/checkpoints/step-000120 "1004040003104001"
    """
    from rich.console import Console

    from common.local_copy import local_copy
    from learner.generation import Choice
    from learner.generation import generate as run

    choice = Choice(
        prompt=prompt,
        tokens=tokens,
        block=block,
        rule=rule,
        threshold=threshold,
        temperature=temperature,
        seed=seed,
        cache=cache,
        device=device,
        raw=raw,
        mask_token=mask_token,
    )
    run(local_copy(model), choice, Console(highlight=False, soft_wrap=True), show_steps=steps)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of a family of docs/models.md, as it is published.")],
    target: Annotated[Path, typer.Argument(help="Folder to be made, in Hugging Face layout.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else what each parameter has.")
    ] = None,
    shift: Annotated[
        int | None, typer.Option(help="1 where position l is predicted at column l-1; else the family's.", min=0, max=1)
    ] = None,
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """A checkpoint as a standard Hugging Face folder, shard by shard, and what was recognised.

    Example: diffpo convert LLaDA-8B-Instruct llada --dtype bfloat16
    """
    from common.conversion import convert as run
    from learner.conversion_display import lines

    found = run(source, target, dtype=dtype, shift=shift, mask_token=mask_token)
    for line in lines(found):
        typer.echo(line)
    typer.echo(f"model: {target}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help=POLICY)],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add an adapter to its base; else it is written alone.")
    ] = False,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of the written weights.")] = "float32",
    mask_token: Annotated[str | None, typer.Option(help="MASK, where the folder does not name it.")] = None,
) -> None:
    """A policy as a plain Hugging Face folder, for other programs: model or adapter, and tokenizer.

    Example: diffpo export runs/first/checkpoints/step-000200 first-merged --merge
    """
    from common.local_copy import local_copy
    from learner.export import export as run

    typer.echo(run(local_copy(checkpoint), out, merge=merge, precision=precision, mask_token=mask_token))


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

    from rich.console import Console

    from learner.group_replay import replay_saved
    from learner.replay_display import show
    from learner.run_directory import RunDirectory

    directory = RunDirectory.find(run)
    source, found = replay_saved(directory, directory.config(), group, weights, tolerance)
    if json:
        typer.echo(dumps({"run": directory.name, "group": group} | source | found.as_dict()))
    else:
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        show(source, found, console)
    if not found.agrees:
        raise RunError(f"group {group}: {found.verdict}")


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="Which measurement: async, chaos, engine, exporter, learner, main, report, scaling.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A small version of the measurement.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with seeds 0, 1, ...")] = 1,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Measurements that the documentation quotes.

    Example: diffpo bench main --seeds 3 --json
    """
    from learner.benchmarks import run_benchmark

    run_benchmark(name, quick=quick, as_json=json, seeds=seeds, config=config, overrides=overrides or [])


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
    loaded = _load(config, given, dry_run)
    from rich.console import Console

    from learner.memory_plan import measure, settings_of
    from learner.plan_display import show

    model, activations = measure(loaded)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    show(model, activations, settings_of(loaded, model), gpu=gpu_memory * 1e9, console=console)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A study of deploy/studies, or a YAML file.")],
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of every arm, in place of the study's.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at once; else one for every CPU.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the report of what is finished.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of reports and results.")] = Path("docs/studies"),
) -> None:
    """A grid of arms and seeds, in parallel, resumed where it stopped; writes docs/studies/NAME.md.

    Example: diffpo study quick
    """
    from rich.console import Console

    from learner.study.grid import load_study
    from learner.study.runner import Runner

    console = Console(soft_wrap=True, highlight=False)
    short, loaded = load_study(name, out=out)
    runner = Runner(short, loaded, out=out, console=console, seeds=seeds)
    path = runner.report(runner.finished()) if report else runner.run(jobs=jobs)
    console.print(f"report: {path}")


@app.command()
def metrics() -> None:
    """The metric catalogue as the Markdown table of docs/metrics.md.

    Example: diffpo metrics
    """
    from common.metrics import markdown_table

    typer.echo(markdown_table(), nl=False)


@app.command("config")
def keys() -> None:
    """Every key of the configuration as the Markdown tables of docs/configuration.md.

    Example: diffpo config
    """
    from common.config_reference import markdown_tables

    typer.echo(markdown_tables(), nl=False)


def main() -> None:
    """Entry point; mistakes and failures are one line on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {shown(error)}", err=True)
        sys.exit(2)
    except (RunError, OSError, MemoryError) as error:  # the last two: the machine has no room, or a file went away
        typer.echo(f"run failed: {shown(error) or type(error).__name__}", err=True)
        sys.exit(1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        typer.echo(f"run failed: too little memory ({one_line(error)}); diffpo plan says what it takes", err=True)
        sys.exit(1)
    except Stopped as stop:
        sys.exit(128 + signal.Signals[str(stop)].value)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
