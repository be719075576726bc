"""Suite: all benchmarks one after the other, `docs/benchmarks.md` of what they found, and which bounds are broken.

Each runs in a process of its own, as `diffpo bench NAME` would. What was measured is kept in `build/benchmarks` for as
long as the code is the same, so a repeated call does what is missing.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from common.errors import RunError
from common.place import write_whole
from learner.benchmarks.goals import GOALS, Goal, broken, flat
from learner.study.runner import CODE, commit

ROOT = Path(__file__).parents[2]
KEPT = Path("build/benchmarks")
PAGE = Path("docs/benchmarks.md")
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "numpy")
GIGABYTE = 1e9
MEASURED = {
    "main": "main --seeds 3 task.seed=4",
    "engine": "engine",
    "learner": "learner",
    "async": "async --quick",
    "chaos": "chaos --quick",
    "scaling": "scaling --quick",
    "exporter": "exporter",
    "report": "report",
    "gpu": "gpu",
}
"""What the page quotes; `gpu` where there is one."""
EXPLAINED = {
    "main": "../README.md#what-to-expect",
    "engine": "engine.md#measured",
    "learner": "learner.md#measured",
    "async": "asynchrony.md#measured",
    "chaos": "failures.md#measured",
    "scaling": "cluster.md",
    "exporter": "operations.md#what-watching-costs",
    "report": "report.md",
    "gpu": "gpu.md",
}


def run_suite(*, quick: bool, as_json: bool, console: Console) -> None:
    """Measure what is missing, show all, and write the page (not where `quick`).

    Raises:
        RunError: when a benchmark failed, or a bound is broken; all others are measured first.
    """
    now = measured_commit()
    kept = (KEPT / "quick" if quick else KEPT).resolve()
    kept.mkdir(parents=True, exist_ok=True)
    found, wrong = {}, []
    for name, words in MEASURED.items():
        if name == "gpu" and not torch.cuda.is_available():
            continue
        command = shlex.split(words if not quick else f"{name} --quick")
        file = kept / f"{name}.json"
        one = json.loads(file.read_text()) if file.is_file() else {}
        if one.get("commit") != now or now.endswith("+"):
            console.print(f"diffpo bench {shlex.join(command)}")
            try:
                one = {"commit": now, **measured(command)}
            except RunError as error:
                wrong.append(f"{name}: {error}")
                continue
            write_whole(file, json.dumps(one, indent=1).encode())
        found[name] = one
        wrong += [f"{name}: {line}" for line in broken(name, one["result"], stable_only=quick)]
        show(name, one["result"], console)
    if not quick:
        write_whole(PAGE, page(found, now).encode())
        console.print(f"page: {PAGE}")
    if as_json:
        console.print(json.dumps({name: one["result"] for name, one in found.items()}), soft_wrap=True)
    if wrong:
        raise RunError("\n".join(wrong))


def measured_commit() -> str:
    """The last commit that changed code, with a + where code has changed since: docs alone change no figure."""
    command = ["git", "log", "-1", "--format=%h", "--", *CODE]
    last = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    return last + "+" * commit().endswith("+")


def measured(command: list[str]) -> dict[str, Any]:
    """Result and seconds of one benchmark.

    Raises:
        RunError: when it failed.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "learner", "bench", *command, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        raise RunError(f"exit code {done.returncode}: {' '.join(last)}")
    return {"seconds": time.monotonic() - started, "result": json.loads(last[0])}


def show(name: str, result: dict[str, Any], console: Console) -> None:
    """The figures of a benchmark beside their bounds."""
    table = Table("figure", "key", "bound", "measured", title=name, title_justify="left")
    numbers = flat(result)
    for goal in GOALS[name]:
        if goal.key in numbers:
            style = None if goal.holds(numbers[goal.key]) else "bold red"
            table.add_row(goal.what, goal.key, goal.bound, value(numbers, goal), style=style)
    console.print(table)


def value(numbers: dict[str, float], goal: Goal) -> str:
    """A figure with its spread."""
    spread = numbers.get(f"{goal.key}_spread", 0.0)
    return short(numbers[goal.key]) + (f" ± {short(spread)}" if spread else "")


def short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def machine() -> str:
    """What everything was measured on."""
    model = platform.processor() or platform.machine()
    if (described := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in described.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    memory = psutil.virtual_memory().total / GIGABYTE
    return (
        f"{os.cpu_count()} CPUs ({model}), {memory:.0f} GB of memory{gpu}; {platform.platform()}, "
        f"Python {platform.python_version()}, {packages}"
    )


def page(found: dict[str, dict[str, Any]], now: str) -> str:
    """The page, from results alone."""
    minutes = sum(one["seconds"] for one in found.values()) / 60
    lines = [
        "# Benchmarks",
        "",
        "The figures of the benchmarks, made by one command, which writes this page; those of a GPU are in",
        "[gpu.md](gpu.md):",
        "",
        "```bash",
        "diffpo bench all",
        "```",
        "",
        f"Commit {now}, {time.strftime('%Y-%m-%d')}, {minutes:.0f} minutes in all. Machine: {machine()}.",
        "",
        "Ratios have both sides in the same run. ± is half the distance of the quartiles over repeats, of `main` the",
        "standard deviation over seeds. A figure outside its bound is in bold. `diffpo bench NAME --quick --check`",
        "fails for such a one where a shared machine can tell it from noise; CI runs it for engine, learner, exporter",
        "and report.",
    ]
    missing = [f"`{name}`" for name in MEASURED if name not in found and name != "gpu"]
    if missing:
        lines += ["", f"Not measured at this commit: {', '.join(missing)}."]
    for name, one in found.items():
        numbers = flat(one["result"])
        lines += [
            "",
            f"## {name}",
            "",
            f"`diffpo bench {MEASURED[name]} --json`, {one['seconds'] / 60:.1f} minutes. What it means: "
            f"[{EXPLAINED[name].partition('#')[0].removeprefix('../')}]({EXPLAINED[name]}).",
            "",
            "| what | key | bound | measured |",
            "| --- | --- | --- | --- |",
        ]
        for goal in GOALS[name]:
            if goal.key in numbers:
                said = value(numbers, goal)
                said = said if goal.holds(numbers[goal.key]) else f"**{said}**"
                lines.append(f"| {goal.what.replace('|', chr(92) + '|')} | `{goal.key}` | {goal.bound} | {said} |")
    return "\n".join(lines) + "\n"
