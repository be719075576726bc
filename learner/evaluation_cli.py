"""Commands that say how good answers are: `eval` of a policy's, `score` of some that exist already."""

from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import RunError, UserError
from learner.options import POLICY, ConfigFile, DryRun, Overrides, end_dry_run, load

app = typer.Typer()


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

    Example: diffpo eval runs/sudoku/checkpoints/step-000120 -c deploy/configs/sudoku.yaml evaluation.prompts=256
    Example: diffpo eval runs/first/warm_start -c deploy/configs/sudoku.yaml --file puzzles.csv --actors 4
    """
    loaded = _load_for(folder, config, overrides, file=file, actors=actors, dry_run=dry_run)
    from common.place import Place
    from learner.preflight import preflight
    from learner.ray_connection import LOCAL, chosen_address

    elsewhere = loaded.rollout.actors > 1 and chosen_address(loaded.run.ray_address) != LOCAL
    task = preflight(loaded, trains=False, here=not elsewhere)
    from learner.evaluation_record import ShardFolder, write_answers
    from learner.final_evaluation import Evaluation, summarise
    from learner.pareto import draw_pareto
    from learner.run_directory import RunDirectory
    from learner.summary_display import show_evaluation
    from learner.text_console import text_console

    folders = {"before": against, "after": folder} if against else {"policy": folder}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from error
    console = text_console(soft_wrap=True)
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


def _load_for(
    folder: str,
    config: Path | None,
    overrides: list[str] | None,
    *,
    file: Path | None,
    actors: int | None,
    dry_run: bool,
) -> Any:
    """The configuration with the policy of a folder and the questions of a file."""
    given = list(overrides or [])
    given += ["evaluation.split=test"] if file is not None else []
    if actors is not None:  # an evaluation does not scale itself
        given += [f"rollout.actors={actors}", "rollout.min_actors=1", "rollout.max_actors=null"]
    loaded = load(config, given, dry_run=False)
    loaded = loaded.model_copy(update={"model": loaded.model.model_copy(update={"path": folder})})
    if file is not None:
        from learner.evaluation_file import with_file

        loaded = with_file(loaded, file, all_rows=not any(item.startswith("evaluation.prompts=") for item in given))
    end_dry_run(loaded, dry_run)
    return loaded


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
    from common.config_file import load_config
    from common.tasks import build_task
    from learner.answer_display import show
    from learner.answer_file import STOPS, check_out, field_names, judge, read_answers, write_verdicts
    from learner.text_console import text_console

    loaded = load_config(None, ["task.prompt_style=d1", *(overrides or []), f"task.name={task}"])
    built = build_task(loaded.task)
    answers = read_answers(built, file, field_names(fields), stop or STOPS)
    if out is not None:
        check_out(out)
    console = text_console(soft_wrap=True)
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
