"""Benchmarks: every figure that the documentation quotes, as `diffpo bench NAME [--quick] [--json]`.

Each module has `run(options) -> dict` with the JSON keys that the documentation names.
"""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.errors import UserError

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
UNCONFIGURED = ("async", "engine", "exporter", "gpu", "report", "scaling")


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool
    seeds: int
    config: Path | None
    overrides: list[str]
    console: Console


def run_benchmark(
    name: str, *, quick: bool, as_json: bool, seeds: int, config: Path | None, overrides: list[str]
) -> None:
    """Run one benchmark; the last line is its JSON object when asked for, a table before it always."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is unknown; known: {', '.join(BENCHMARKS)}")
    if name in UNCONFIGURED and (config or overrides):
        given = config or " ".join(overrides)
        raise UserError(f"bench {name} takes no configuration, given {given}; leave it out")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    module = importlib.import_module(BENCHMARKS[name])
    result = module.run(Options(quick=quick, seeds=seeds, config=config, overrides=overrides, console=console))
    for key, value in result.items():
        console.print(f"{key}: {value}")
    if as_json:
        console.print(json.dumps(result), soft_wrap=True)
