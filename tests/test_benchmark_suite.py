"""All benchmarks as one: bounds mean what they say, nothing is measured twice, one that fails stops no other."""

import ast
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from common.errors import RunError, UserError
from learner import benchmarks
from learner.benchmarks import ALL, BENCHMARKS, SEEDED, run_benchmark, suite
from learner.benchmarks.goals import GOALS, Goal, broken, flat

QUIET = Console(quiet=True)


def test_every_benchmark_has_goals_and_a_place_in_the_suite() -> None:
    assert set(GOALS) == set(BENCHMARKS) == set(suite.MEASURED) == set(suite.EXPLAINED)


@pytest.mark.parametrize("name", GOALS)
def test_keys_are_the_modules(name: str) -> None:
    spec = importlib.util.find_spec(BENCHMARKS[name])
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    if name == "learner":
        source += Path(spec.origin).with_name("sized_models.py").read_text()
    described = ast.get_docstring(ast.parse(source)) or ""
    for goal in GOALS[name]:
        stem = re.sub(r"_(after|cv05|cv1|25m|100m)$", "", goal.key)
        assert goal.key in source or stem in described, goal.key


@pytest.mark.parametrize(
    ("goal", "good", "bad", "bound"),
    [
        (Goal("x", "", least=2.0), 2.0, 1.9, ">= 2"),
        (Goal("x", "", most=0.5), 0.5, 0.6, "<= 0.5"),
        (Goal("x", "", 0, 0), 0.0, 1.0, "0"),
        (Goal("x", "", 1, 3), 2.0, float("nan"), ">= 1, <= 3"),
    ],
)
def test_bounds(goal: Goal, good: float, bad: float, bound: str) -> None:
    assert goal.holds(good)
    assert not goal.holds(bad)
    assert goal.bound == bound


def test_only_stable_figures_fail_a_check() -> None:
    result = {"speedup_v32": 1.0, "identical": 0.99, "row_forward_ratio": 1.0}
    assert len(broken("engine", result, stable_only=True)) == 1
    assert len(broken("engine", result, stable_only=False)) == 2


def test_numbers_one_level_deeper_count() -> None:
    assert flat({"commanded": {"groups_lost": 1}, "seeds": 3, "runs": [1]}) == {"groups_lost": 1, "seeds": 3}


@pytest.mark.parametrize("name", [ALL, *BENCHMARKS])
def test_seeds_are_refused_where_they_mean_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    done = SimpleNamespace(run=lambda options: started.append(options.seeds) or {})
    monkeypatch.setattr(benchmarks.importlib, "import_module", lambda _: done)
    given: dict[str, Any] = {"quick": True, "as_json": False, "check": False, "config": None, "overrides": []}
    if name in SEEDED:
        run_benchmark(name, seeds=3, **given)
        run_benchmark(name, seeds=None, **given)
        assert started == [3, 1]
    else:
        with pytest.raises(UserError, match=rf"bench {name} takes no --seeds, given 1; .* that does: chaos, main$"):
            run_benchmark(name, seeds=1, **given)
        assert not started


def test_those_that_take_seeds_use_them() -> None:
    sources = {name: Path(importlib.util.find_spec(module).origin or "") for name, module in BENCHMARKS.items()}  # pyright: ignore
    assert {name for name, path in sources.items() if "options.seeds" in path.read_text()} == set(SEEDED)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the benchmarks that were measured; all answer at once, `chaos` fails, `engine` broke a bound."""
    made: list[str] = []

    def measured(command: list[str]) -> dict[str, Any]:
        made.append(command[0])
        if command[0] == "chaos":
            raise RunError("exit code 1: no luck")
        return {"seconds": 60.0, "result": {"identical": 0.5, "speedup_v32k": 50.0, "speedup_v32k_spread": 1.25}}

    monkeypatch.setattr(suite, "measured", measured)
    monkeypatch.setattr(suite, "measured_commit", lambda: "abc1234")
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return made


def test_the_suite_measures_what_is_missing_and_writes_the_page(calls: list[str]) -> None:
    with pytest.raises(RunError, match=r"engine: identical is 0\.5(.|\n)*chaos: exit code 1"):
        suite.run_suite(quick=False, as_json=False, console=QUIET)
    assert calls == [name for name in suite.MEASURED if name != "gpu"]
    text = suite.PAGE.read_text()
    assert "abc1234" in text
    assert "| `identical` | 1 | **0.5** |" in text
    assert "| `speedup_v32k` | >= 6 | 50 ± 1.25 |" in text
    assert "## chaos" not in text
    assert "Not measured at this commit: `chaos`." in text
    calls.clear()
    with pytest.raises(RunError):
        suite.run_suite(quick=False, as_json=False, console=QUIET)
    assert calls == ["chaos"]


def test_a_quick_suite_leaves_the_page_alone(calls: list[str]) -> None:
    with pytest.raises(RunError):
        suite.run_suite(quick=True, as_json=False, console=QUIET)
    assert not suite.PAGE.exists()


def test_code_that_changed_is_measured_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measured_commit", lambda: "abc1234+")
    for _ in range(2):
        with pytest.raises(RunError):
            suite.run_suite(quick=True, as_json=False, console=QUIET)
    assert calls.count("engine") == 2
