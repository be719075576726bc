"""RunDirectory and checkpoints: nothing is overwritten, and a reader never sees half of one."""

import json
import os
from pathlib import Path

import pytest
import torch
from learner_fixtures import MODEL, generate_batch, learner_config, parameters, tiny_policy

from common.config import Config, ThresholdConfig
from common.config_file import load_config
from common.errors import UserError
from common.policy import load_policy
from learner.checkpoint import LEARNER_STATE, write_checkpoint
from learner.learner import Learner
from learner.run_directory import MANIFEST, RunDirectory


def config_for(root: Path, name: str = "first") -> Config:
    return load_config(None, ["task.name=sudoku", f"run.root={root}", f"run.name={name}"])


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(config_for(tmp_path))


@pytest.fixture(scope="module")
def learner() -> Learner:
    """After one step, so that the optimizer has a state."""
    policy = tiny_policy(double=False)
    found = Learner(policy, learner_config())
    found.step(generate_batch(policy), version=0)
    return found


def test_a_new_directory_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = config_for(tmp_path / "deep/er")
    directory = RunDirectory.create(config)
    assert directory.path == tmp_path / "deep/er/first"
    assert load_config(directory.path / "config.yaml") == config


def test_an_existing_directory_is_refused_and_left_alone_with_a_free_name(tmp_path: Path) -> None:
    for name in ("first", "first-2"):
        RunDirectory.create(config_for(tmp_path, name))
    (tmp_path / "first/metrics.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"first exists; choose another run\.name \(run\.name=first-3 is free\)"):
        RunDirectory.create(config_for(tmp_path))
    assert (tmp_path / "first/metrics.jsonl").read_text() == "precious\n"
    RunDirectory.create(config_for(tmp_path, "first-3"))


def test_a_root_that_cannot_hold_directories_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: .*; choose another run\.root"):
        RunDirectory.create(config_for(tmp_path / "file"))


def test_metrics_are_appended_line_by_line(directory: RunDirectory) -> None:
    rows = [{"kind": "step", "learner_steps": 1.0}, {"kind": "step", "learner_loss": -0.5}]
    for row in rows:
        directory.append_metrics(row)
    assert [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()] == rows


def test_json_is_written_as_a_whole(directory: RunDirectory) -> None:
    for value in ({"a": [1, 2]}, {"b": None}):
        directory.write_json("some.json", value)
        assert directory.read_json("some.json") == value
    with pytest.raises(TypeError):
        directory.write_json("some.json", {"c": object()})
    assert directory.read_json("some.json") == {"b": None}
    assert sorted(p.name for p in directory.path.iterdir()) == ["config.yaml", "some.json"]


def test_two_processes_that_write_one_file_do_not_share_a_partial_one(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, replace = set(), os.replace

    def seen(partial: Path, target: Path) -> None:
        written.add(partial)
        replace(partial, target)

    monkeypatch.setattr(os, "replace", seen)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        directory.write_json("some.json", process)
    assert len(written) == 2


def test_what_cannot_be_written_leaves_nothing(directory: RunDirectory) -> None:
    (directory.path / "some.json").mkdir()
    with pytest.raises(OSError, match=r"some\.json"):
        directory.write_json("some.json", 1)
    assert not list(directory.path.glob("*.partial"))


def fake_checkpoint(directory: RunDirectory, step: int, *, complete: bool = True) -> Path:
    folder = directory.checkpoint_path(step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("")
    if complete:
        (folder / MANIFEST).write_text("{}")
    return folder


def test_only_folders_with_a_manifest_are_checkpoints_oldest_first(directory: RunDirectory) -> None:
    assert directory.checkpoints() == []
    wanted = [fake_checkpoint(directory, step) for step in (100, 9, 20)]
    fake_checkpoint(directory, 50, complete=False)
    assert directory.checkpoints() == [wanted[1], wanted[2], wanted[0]]


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (9, [10, 20, 30])])
def test_pruning_keeps_the_newest(directory: RunDirectory, keep: int, left: list[int]) -> None:
    for step in (10, 20, 30):
        fake_checkpoint(directory, step)
    unfinished = fake_checkpoint(directory, 25, complete=False)
    directory.prune_checkpoints(keep)
    assert directory.checkpoints() == [directory.checkpoint_path(step) for step in left]
    assert unfinished.exists()


def test_a_checkpoint_that_was_not_renamed_is_not_listed(directory: RunDirectory) -> None:
    whole = fake_checkpoint(directory, 10)
    half = directory.checkpoint_path(20)
    fake_checkpoint(directory, 20).rename(half.with_name(f"partial-{half.name}"))
    assert directory.checkpoints() == [whole]


def test_the_newest_of_seven_digits_is_newest(directory: RunDirectory) -> None:
    wanted = [fake_checkpoint(directory, step) for step in (999_999, 1_000_000)]
    assert directory.checkpoints() == wanted


def test_a_checkpoint_is_a_policy_and_the_learners_state(learner: Learner, directory: RunDirectory) -> None:
    folder = write_checkpoint(learner, directory.checkpoint_path(learner.steps_done), version=5)
    assert directory.checkpoints() == [folder]
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["step"], manifest["version"]) == (1, 5)
    assert {*manifest["files"], MANIFEST} == {path.name for path in folder.iterdir()}

    other_threshold = ThresholdConfig(gamma_grid=(0.1, 0.2))  # the head beside the model wins
    loaded = load_policy(folder, MODEL, other_threshold)
    assert (parameters(loaded) == parameters(learner.policy)).all()
    assert loaded.vocabulary == learner.policy.vocabulary
    assert loaded.head.config == learner.policy.head.config
    assert loaded.head.config.gamma_grid != other_threshold.gamma_grid

    state = torch.load(folder / LEARNER_STATE, weights_only=True)
    assert (state["steps_done"], state["updates_done"]) == (1, 1)
    fresh = Learner(loaded, learner_config())
    fresh.optimizer.load_state_dict(state["optimizer"])
    moments = learner.optimizer.state_dict()["state"]
    for index, moment in fresh.optimizer.state_dict()["state"].items():
        assert torch.equal(moment["exp_avg"], moments[index]["exp_avg"])


def test_what_a_killed_writer_left_is_replaced(learner: Learner, directory: RunDirectory) -> None:
    folder = directory.checkpoint_path(1)
    partial = folder.with_name(f"partial-{folder.name}")
    partial.mkdir(parents=True)
    (partial / "left over").write_text("")
    write_checkpoint(learner, folder, version=1)
    assert not (folder / "left over").exists()
    assert not partial.exists()


def test_an_incomplete_checkpoint_is_replaced_as_the_docstring_says(learner: Learner, directory: RunDirectory) -> None:
    folder = fake_checkpoint(directory, 1, complete=False)
    write_checkpoint(learner, folder, version=1)
    assert directory.checkpoints() == [folder]
