"""Imports run one way, and what must start fast or be tested without Ray imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("common", "actors", "learner")  # each may import itself and those left of it
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
HEAVY = ("torch", "ray", "transformers")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def test_every_layer_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_learner_to_actors_to_common(path: Path) -> None:
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    above = set(LAYERS[layer + 1 :]) | {"tests"}
    assert not {name for name in imported(path) if name.partition(".")[0] in above}


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_is_loaded_is_noticed() -> None:
    assert loaded_after("sys.modules['ray'] = sys") == {"ray"}


def test_configuration_tasks_and_replay_load_nothing_heavy() -> None:
    """One interpreter for all that must stay light: any of them would spoil it."""
    light = ["common.tasks", "common.config", "common.replay_buffer", "common.ledger", "common.admission"]
    light += ["common.lease", "common.trajectory", "common.metrics", "learner.cli", "learner.run_directory"]
    assert loaded_after(f"import {', '.join(light)}") == set()


def reached(module: str, seen: set[str] | None = None) -> set[str]:
    """Every module that a module of ours imports, through others of ours too."""
    seen = set() if seen is None else seen
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module in seen or not path.is_file():
        return seen | {module}
    seen.add(module)
    for name in imported(path):
        seen |= reached(name, seen)
    return seen


PURE = [
    *("actors.reveal_rules", "actors.engine", "actors.evaluation"),
    *("learner.surrogate", "learner.objective", "learner.advantage", "learner.batch", "learner.learner"),
    *("learner.warm_start", "learner.checkpoint", "learner.synchronous_rollout", "learner.reference_loop"),
    *("common.behaviour", "common.ledger", "common.admission", "common.replay_buffer", "common.tasks"),
    "common.segment_store",
]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_not_reach_ray(module: str) -> None:
    names = reached(module)
    assert module in names
    assert not {name for name in names if name.partition(".")[0] == "ray"}


def test_ray_is_noticed_through_other_modules() -> None:
    assert "ray" in reached("learner.driver")
    assert {"learner.surrogate", "common.policy", "torch"} <= reached("learner.learner")
