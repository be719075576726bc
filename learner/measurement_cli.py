"""Commands that measure: `bench`, `study`."""

from pathlib import Path
from typing import Annotated

import typer

from learner.options import ConfigFile, Overrides

app = typer.Typer()


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(help="Which one: all, async, chaos, engine, exporter, gpu, learner, main, report, scaling."),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A small version of the measurement.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Fail where a bound is broken that is no noise; all does it anyway.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Of main and chaos: runs with seeds 0, 1, ...; else one.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Measurements that the documentation quotes.

    Example: diffpo bench main --seeds 3 --json
    """
    from learner.benchmarks import run_benchmark

    run_benchmark(name, quick=quick, as_json=json, check=check, seeds=seeds, config=config, overrides=overrides or [])


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
    from learner.study.grid import load_study
    from learner.study.runner import Runner
    from learner.text_console import text_console

    console = text_console(soft_wrap=True)
    short, loaded = load_study(name, out=out)
    runner = Runner(short, loaded, out=out, console=console, seeds=seeds)
    path = runner.report(runner.finished()) if report else runner.run(jobs=jobs)
    console.print(f"report: {path}")
