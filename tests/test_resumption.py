"""Resumption: which keys may change when a run goes on, and which runs do not."""

import json
import shutil
from pathlib import Path

import pytest

from common.config import Config
from common.config_file import dump_config, load_config
from common.errors import UserError
from learner.resumption import SAFE, resumed_config
from learner.run_directory import CONFIG_FILE, EVALUATION, RunDirectory

STARTED = ["task.name=sudoku", "run.name=first", "learner.steps=20", "metrics.port=0"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return RunDirectory.create(load_config(None, [*STARTED, f"run.root={tmp_path}"])).path


def saved(run: Path) -> Config:
    return load_config(run / CONFIG_FILE)


def finish(run: Path, steps: int) -> None:
    (run / EVALUATION).write_text(json.dumps({"steps": steps}))


def leaves(described: dict, path: str = "") -> list[str]:
    """Dotted names of all values."""
    found = []
    for name, value in described.items():
        found += leaves(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]
    return found


def test_a_run_goes_on_as_it_was_started(run: Path) -> None:
    before = (run / CONFIG_FILE).read_text()
    assert resumed_config(RunDirectory(run), file=None, overrides=[]) == saved(run)
    assert (run / CONFIG_FILE).read_text() == before


def test_safe_keys_change_and_are_written_down(run: Path) -> None:
    overrides = ["learner.steps=40", "rollout.actors=3", "replay.lease_seconds=7", "metrics.port=-1"]
    overrides += ["evaluation.prompts=5", "run.checkpoint_every=2", "learner.max_restarts=9"]
    overrides += ["learner.micro_batch_tokens=1024", "learner.activation_checkpointing=true"]
    given = resumed_config(RunDirectory(run), file=None, overrides=overrides)
    RunDirectory(run).write_config(given)
    assert (given.learner.steps, given.rollout.actors, given.replay.lease_seconds) == (40, 3, 7.0)
    assert (given.metrics.port, given.evaluation.prompts, given.run.checkpoint_every) == (-1, 5, 2)
    assert (given.learner.micro_batch_tokens, given.learner.activation_checkpointing) == (1024, True)
    assert saved(run) == given
    assert resumed_config(RunDirectory(run), file=None, overrides=["rollout.actors=2"]).learner.steps == 40
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("run.seed=7", "run.seed: 0 -> 7"),
        ("task.seed=3", "task.seed: 0 -> 3"),
        ("model.hidden_size=48", "model.hidden_size: 128 -> 48"),
        ("sampler.rule=sampled_entropy_bound", "sampler.rule: entropy_bound -> sampled_entropy_bound"),
        ("sampler.threshold.gamma_init=0.5", "sampler.threshold.gamma_init: "),
        ("learner.groups_per_step=5", "learner.groups_per_step: "),
        ("learner.learning_rate=0.5", "learner.learning_rate: "),
        ("replay.max_staleness=7", "replay.max_staleness: "),
        ("warm_start.steps=1", "warm_start.steps: "),
        ("rollout.precision=bfloat16", "rollout.precision: "),
    ],
)
def test_what_a_run_computes_does_not_change(run: Path, override: str, difference: str) -> None:
    before = (run / CONFIG_FILE).read_text()
    with pytest.raises(UserError) as refused:
        resumed_config(RunDirectory(run), file=None, overrides=[override, "learner.steps=40"])
    assert f"run {run} was started with another configuration: {difference}" in str(refused.value)
    assert f" -> {override.partition('=')[2]}" in str(refused.value)
    assert "learner.steps" not in str(refused.value)
    assert (run / CONFIG_FILE).read_text() == before


def test_all_that_differs_is_shown(run: Path) -> None:
    with pytest.raises(UserError, match=r"learner\.clip_low: 0\.2 -> 0\.3; replay\.max_staleness: \d+ -> 9; run\.seed"):
        resumed_config(
            RunDirectory(run), file=None, overrides=["run.seed=1", "replay.max_staleness=9", "learner.clip_low=0.3"]
        )


def test_another_task_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(dump_config(load_config(None, ["task.name=countdown", "learner.steps=20"])))
    with pytest.raises(UserError, match=r"task\.blanks_max: \d+ -> None; .*task\.name: sudoku -> countdown"):
        resumed_config(RunDirectory(run), file=file, overrides=[])


def test_a_file_that_is_said_to_be_the_runs_is_compared(run: Path, tmp_path: Path) -> None:
    """What Ray's job server gives when it runs a job again: the file and the overrides of the first time."""
    file = tmp_path / "given.yaml"
    file.write_text(dump_config(load_config(None, ["task.name=sudoku", "learner.steps=20"])))
    same = resumed_config(
        RunDirectory(run), file=file, overrides=["metrics.port=0", f"run.root={tmp_path}", "run.name=first"]
    )
    assert same == saved(run)
    file.write_text(dump_config(load_config(None, ["task.name=sudoku", "learner.steps=20", "run.seed=4"])))
    with pytest.raises(UserError, match=r"run\.seed: 0 -> 4"):
        resumed_config(RunDirectory(run), file=file, overrides=[])


def test_a_run_that_was_moved_goes_on_where_it_is(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "else/where"
    shutil.copytree(run, moved)
    given = resumed_config(RunDirectory(moved), file=None, overrides=["run.root=/nowhere", "run.name=other"])
    assert given.run_directory == str(moved)


def test_a_run_whose_checkpoints_are_elsewhere_keeps_its_name(run: Path, tmp_path: Path) -> None:
    RunDirectory(run).write_config(load_config(run / CONFIG_FILE, [f"run.checkpoints={tmp_path / 'store'}"]))
    assert resumed_config(RunDirectory(run), file=None, overrides=[]).run.name == run.name
    shutil.copytree(run, tmp_path / "else/where")
    with pytest.raises(UserError, match="give the folder its name back"):
        resumed_config(RunDirectory(tmp_path / "else/where"), file=None, overrides=[])


def test_a_finished_run_is_refused_unless_it_shall_go_further(run: Path) -> None:
    finish(run, 20)
    for overrides in ([], ["learner.steps=20"], ["learner.steps=10"]):
        with pytest.raises(UserError, match=r"has finished its 20 steps; give more with learner\.steps=N"):
            resumed_config(RunDirectory(run), file=None, overrides=overrides)
    assert resumed_config(RunDirectory(run), file=None, overrides=["learner.steps=30"]).learner.steps == 30


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "folder"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match=r"folder is no run directory: it has no config\.yaml; start a run with"):
        resumed_config(RunDirectory(folder), file=None, overrides=[])


def test_a_damaged_configuration_is_named(run: Path) -> None:
    (run / CONFIG_FILE).write_text("learner: {steps: many}\n")
    with pytest.raises(UserError, match=r"steps"):
        resumed_config(RunDirectory(run), file=None, overrides=[])


def test_every_safe_key_is_one_of_the_configuration() -> None:
    described = load_config(None, STARTED).model_dump(mode="json")
    mappings = {f"{section}.{key}" for section, tree in described.items() for key in tree if tree[key] == {}}
    known = {*leaves(described), *described, *mappings}
    assert [key for key in SAFE if key not in known] == []
