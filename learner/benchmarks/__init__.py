"""Benchmarks: every figure that the documentation quotes, as `diffpo bench NAME [--quick] [--json]`.

Each module has `run(options) -> dict` with the JSON keys that the documentation names.
"""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.errors import RunError, UserError
from learner.benchmarks.goals import broken
from learner.text_console import text_console

BENCHMARKS = {
    "async": "learner.benchmarks.asynchrony",
    "chaos": "learner.benchmarks.chaos",
    "engine": "learner.benchmarks.engine",
    "exporter": "learner.benchmarks.exporter",
    "gpu": "learner.benchmarks.gpu",
    "learner": "learner.benchmarks.learner",
    "main": "learner.benchmarks.main_job",
    "report": "learner.benchmarks.report",
    "scaling": "learner.benchmarks.scaling",
}
ALL = "all"
UNCONFIGURED = (ALL, "async", "engine", "exporter", "gpu", "report", "scaling")
SEEDED = ("chaos", "main")


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool
    seeds: int
    config: Path | None
    overrides: list[str]
    console: Console


def run_benchmark(
    name: str, *, quick: bool, as_json: bool, check: bool, seeds: int | None, config: Path | None, overrides: list[str]
) -> None:
    """Run one benchmark; the last line is its JSON object when asked for, a table before it always.

    Raises:
        UserError: for a name that is none, or an option that the benchmark has no use for.
        RunError: with `check`, when a bound is broken that this machine can tell from noise.
    """
    if name not in (*BENCHMARKS, ALL):
        raise UserError(f"benchmark {name!r} is unknown; known: {ALL}, {', '.join(BENCHMARKS)}")
    if name in UNCONFIGURED and (config or overrides):
        given = config or " ".join(overrides)
        raise UserError(f"bench {name} takes no configuration, given {given}; leave it out")
    if name not in SEEDED and seeds is not None:
        raise UserError(
            f"bench {name} takes no --seeds, given {seeds}; leave it out, or choose one that does: {', '.join(SEEDED)}"
        )
    console = text_console(soft_wrap=True)
    console.print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    if name == ALL:
        from learner.benchmarks.suite import run_suite

        run_suite(quick=quick, as_json=as_json, console=console)
        return
    module = importlib.import_module(BENCHMARKS[name])
    result = module.run(Options(quick=quick, seeds=seeds or 1, config=config, overrides=overrides, console=console))
    for key, value in result.items():
        console.print(f"{key}: {value}")
    if as_json:
        console.print(json.dumps(result), soft_wrap=True)
    if check and (wrong := broken(name, result, stable_only=quick)):
        raise RunError("\n".join(wrong))
