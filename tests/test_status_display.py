"""Status display: of a run that is going, and of one that is not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config_file import load_config
from common.errors import UserError
from learner.cli import app
from learner.run_directory import EVALUATION, RunDirectory
from learner.status_display import ended, show
from learner.text_console import text_console

GOING = {
    "run": "first",
    "directory": "/data/runs/first",
    "phase": "train",
    "stopping": "SIGTERM",
    "seconds": 12.4,
    "idle_seconds": 3.0,
    "steps": 40,
    "metrics": "127.0.0.1:9464",
    "waiting_for_nodes": "1 rollout actors: each waits for 1 CPUs",
    "learner": {"learner": "trains for 1 s", "learner rank 1": "obeys: train for 1 s"},
    "actors_wanted": 2,
    "rollout_actors": {"rollout-0.0": "working", "rollout-1.0": "waits for 1 CPUs"},
    "evaluation_workers": {},
    "last_step": {"learner_steps": 7.0, "threshold_gamma": 0.25},
}


def test_a_run_that_is_going(capsys: pytest.CaptureFixture[str]) -> None:
    show(GOING | {"phase": "[/x] 1:100:2"}, text_console(soft_wrap=True))
    assert capsys.readouterr().out.splitlines() == [
        "run first: [/x] 1:100:2, step 7 of 40, 12 s; last progress 3 s ago; stopping (SIGTERM)",
        "directory: /data/runs/first",
        "metrics: http://127.0.0.1:9464/metrics",
        "waiting for nodes: 1 rollout actors: each waits for 1 CPUs",
        "learner: trains for 1 s",
        "learner rank 1: obeys: train for 1 s",
        "rollout actors: 1 of 2 work",
        "  rollout-0.0: working",
        "  rollout-1.0: waits for 1 CPUs",
        "last step: gamma 0.25",
    ]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    given = ["task.name=sudoku", f"run.root={tmp_path}", "run.name=first", "learner.steps=40"]
    return RunDirectory.create(load_config(None, given))


def test_a_run_that_is_not_going_says_how_to_go_on(run: RunDirectory) -> None:
    answer = CliRunner().invoke(app, ["status", str(run.path)])
    assert answer.exit_code == 0, answer.output
    assert "run first: not going, 0 of 40 steps are in its newest checkpoint" in answer.output
    assert f"go on with: diffpo train --resume {run.path}" in answer.output
    store = run.checkpoint_store(load_config(run.path / "config.yaml"))
    store.begin(20).commit(version=20, journal_index=0)
    assert ended(run)["checkpoint_step"] == 20


def test_a_run_that_has_finished_says_so(run: RunDirectory) -> None:
    run.write_json(EVALUATION, {"steps": 40})
    found = json.loads(CliRunner().invoke(app, ["status", str(run.path), "--json"]).output)
    assert (found["phase"], found["steps"]) == ("finished", 40)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run directory: it has no config\.yaml"):
        ended(RunDirectory(tmp_path))
