"""What a run of a study leaves: which files are believed, and that claims may name what runs write, nothing else."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from study_fixtures import ROOT, result, study

from common.errors import UserError
from learner.study.grid import load_study
from learner.study.measures import MEASURES, POINTS, SAVING, lookup
from learner.study.result import ADAPTER
from learner.study.runner import Runner

KEPT = sorted((ROOT / "docs/studies").glob("*/*.json"))
PAGES = sorted({path.parent.name for path in KEPT})
Change = Callable[[dict[str, Any]], Any]


def finished(tmp_path: Path, change: Change) -> dict[str, Any]:
    """What a runner takes from a folder with one good result that was changed."""
    runner = Runner("s", study(), out=tmp_path, work=tmp_path, console=Console())
    run = runner.runs[0]
    kept = result(run.arm, run.seed, 0.1, digest=run.digest, diagnostics={"a": 0.5}, cpus=2, jobs=2)
    kept = json.loads(json.dumps(kept))  # its parts share nothing
    changed = change(kept)
    (tmp_path / "s" / f"{run.name}.json").write_text(json.dumps(kept if changed is None else changed))
    return runner.finished()


def put(*path: Any, value: Any) -> Change:
    """Sets what is at a path."""

    def change(kept: dict[str, Any]) -> None:
        for part in path[:-1]:
            kept = kept[part]
        kept[path[-1]] = copy.deepcopy(value)

    return change


def drop(*path: Any) -> Change:
    """Removes what is at a path."""

    def change(kept: dict[str, Any]) -> None:
        for part in path[:-1]:
            kept = kept[part]
        del kept[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: [1], "the file: Input should be"),
        (lambda kept: 5, "the file: Input should be"),
        (put("validation", 1, "accuracy", value=math.nan), "validation.1.accuracy: Input should be a finite number"),
        (drop("seed"), "seed: Field required"),
        (put("seed", value=7), "is of arm one with seed 7"),
        (put("arm", value="other"), "is of arm other with seed 0"),
        (put("validation", value=None), "validation: Input should be a valid list"),
        (put("validation", value=[]), "validation: List should have at least 1 item"),
        (put("test", value=None), "test: Input should be"),
        (put("diagnostics", value=None), "diagnostics: Input should be"),
        (put("diagnostics", "a", value="high"), "diagnostics.a: Input should be a valid number (given high)"),
        (put("cpus", value=None), "cpus: Input should be a valid integer"),
        (drop("test", "after", "frontier", 0, "nfe"), "test.after.frontier.0.nfe: Field required"),
        (put("test", "before", "frontier", 0, "nfe", value=0.0), "nfe: Input should be greater than 0"),
        (drop("curve", 0, "rollout_forwards"), "curve.0.rollout_forwards: Field required"),
        (drop("validation", 0, "seconds"), "validation.0.seconds: Field required"),
    ],
)
def test_a_damaged_result_is_refused_with_the_way_out(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        finished(tmp_path, change)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/s/one-seed0.json: ")
    assert str(refused.value).endswith("; remove it, and the run is done again")


def test_a_good_result_is_taken_as_it_is_and_one_of_another_configuration_is_not(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    assert finished(tmp_path, lambda found: kept.append(found)) == {"one-seed0": kept[0]}
    assert finished(tmp_path, put("digest", value="old")) == {}
    assert finished(tmp_path, drop("digest")) == {}


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    runner = Runner("s", study(), out=tmp_path, work=tmp_path, console=Console())
    for content in ("{", "", "null\0", "[" * 100_000):
        (tmp_path / "s" / "one-seed0.json").write_text(content)
        with pytest.raises(UserError, match=r"one-seed0.json: not JSON.*remove it"):
            runner.finished()


def test_saving_of_a_warm_start_without_fixed_gammas_is_not_measured() -> None:
    kept = result("one", 0, 0.1)
    kept["test"]["before"]["frontier"] = [{"rule": "top_k", "nfe": 2.0, "accuracy": 0.5}]
    assert lookup(kept, SAVING) is None


def test_claims_may_name_what_runs_write() -> None:
    """The types say what `SingleRun` wrote: every kept result is valid, and every name is in one of them."""
    found = [json.loads(path.read_text()) for path in KEPT]
    assert len(found) > 200
    for kept in found:
        assert ADAPTER.validate_python(kept) == kept
    for measure in MEASURES:
        assert any(lookup(kept, measure) is not None for kept in found), measure
    assert set(POINTS) == set(found[0]["validation"][0])


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_its_results_and_its_study_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **named: None)
    shutil.copytree(ROOT / "docs/studies" / name, tmp_path / name)
    short, loaded = load_study(name, out=tmp_path)
    runner = Runner(short, loaded, out=tmp_path, work=tmp_path / "work", console=Console())
    made = runner.report(runner.finished())
    assert made.read_text() == (ROOT / "docs/studies" / f"{name}.md").read_text()
