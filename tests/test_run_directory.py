"""RunDirectory: nothing is overwritten, a reader never sees half a file, and one driver at a time works on a run."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import Config
from common.config_file import load_config
from common.errors import UserError
from learner.run_directory import RunDirectory


def config_for(root: Path, name: str = "first") -> Config:
    return load_config(None, ["task.name=sudoku", f"run.root={root}", f"run.name={name}"])


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(config_for(tmp_path))


def test_a_new_directory_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = config_for(tmp_path / "deep/er")
    directory = RunDirectory.create(config)
    assert directory.path == tmp_path / "deep/er/first"
    assert load_config(directory.path / "config.yaml") == config


def test_an_existing_directory_is_refused_and_left_alone_with_a_free_name(tmp_path: Path) -> None:
    for name in ("first", "first-2"):
        RunDirectory.create(config_for(tmp_path, name))
    (tmp_path / "first/metrics.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match=r"first exists; go on with it .*run.name=first-3 is free") as refused:
        RunDirectory.create(config_for(tmp_path))
    assert f"diffpo train --resume {tmp_path / 'first'}" in str(refused.value)
    assert (tmp_path / "first/metrics.jsonl").read_text() == "precious\n"
    RunDirectory.create(config_for(tmp_path, "first-3"))


def test_a_root_that_cannot_hold_directories_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: .*; choose another run\.root"):
        RunDirectory.create(config_for(tmp_path / "file"))


def test_a_root_that_cannot_hold_directories_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for root in ("file", "file/deeper"):
        with pytest.raises(UserError, match=r"cannot be made: .*/file is a file; choose another run\.root"):
            RunDirectory.check_free(tmp_path / root / "first")
    RunDirectory.check_free(tmp_path / "new/first")
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=rf"cannot be made: {tmp_path} cannot be written to; choose another run\.root"):
        RunDirectory.check_free(tmp_path / "new/first")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_directory_that_could_not_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"No space left on device: '.*first/config\.yaml'; make room there"):
            RunDirectory.create(config_for(tmp_path))
    assert RunDirectory.create(config_for(tmp_path)).path.is_dir()


def test_metrics_are_appended_line_by_line(directory: RunDirectory) -> None:
    rows = [{"kind": "step", "learner_steps": 1.0}, {"kind": "step", "learner_loss": -0.5}]
    for row in rows:
        directory.append_metrics(row)
    assert [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()] == rows


def test_half_a_line_of_metrics_costs_no_other(directory: RunDirectory) -> None:
    (directory.path / "metrics.jsonl").write_text('{"kind": "step"}\n{"kind": "st')  # killed, or a full disk
    directory.append_metrics({"kind": "started"})
    assert [row["kind"] for row in directory.read_metrics()] == ["step", "started"]


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


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        (None, None),
        ('{"steps": 6, "area": 1.0}', 6),
        ('{"area": 1.0}', None),
        ('{"steps": null}', None),
        ('{"steps": 6', None),
        ("[6]", None),
    ],
)
def test_a_run_has_finished_once_it_was_evaluated(
    directory: RunDirectory, content: str | None, steps: int | None
) -> None:
    if content is not None:
        (directory.path / "evaluation.json").write_text(content)
    assert directory.finished_steps() == steps


def test_a_run_is_found_by_its_folder_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root, name in (("runs", "one"), ("runs", "two"), ("elsewhere", "three")):
        RunDirectory.create(config_for(Path(root), name))
    (tmp_path / "runs/no-run").mkdir()
    assert RunDirectory.find("one").path == tmp_path / "runs/one"
    assert RunDirectory.find("elsewhere/three").path == tmp_path / "elsewhere/three"
    with pytest.raises(UserError, match=r"run 'three': no folder of that name, nor runs/three; runs: one, two"):
        RunDirectory.find("three")


def test_one_driver_at_a_time_works_on_a_run(directory: RunDirectory) -> None:
    refused = f"run {re.escape(str(directory.path))} is going on in another process; stop that one first"
    with directory.lock(), pytest.raises(UserError, match=refused), RunDirectory(directory.path).lock():
        pytest.fail("both hold it")
    with directory.lock():
        pass


def test_the_lock_ends_with_the_process_that_held_it(directory: RunDirectory) -> None:
    hold = "import sys, pathlib; from learner.run_directory import RunDirectory\n"
    hold += "with RunDirectory(pathlib.Path(sys.argv[1])).lock(): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(directory.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process"), directory.lock():
        pytest.fail("both hold it")
    holder.kill()
    holder.communicate(timeout=30)
    with directory.lock():
        pass


def test_targets_of_runs_lie_in_one_folder_until_they_end_as_they_should(tmp_path: Path) -> None:
    targets = tmp_path / "_targets"
    one, other = (RunDirectory.create(config_for(tmp_path, name)) for name in ("one", "other"))
    for directory in (one, other):
        directory.announce([{"targets": ["127.0.0.1:7"], "labels": {"run": directory.path.name}}])
    for name in ("one", "other"):
        assert json.loads((targets / f"{name}.json").read_text())[0]["labels"] == {"run": name}
        assert json.loads((tmp_path / name / "metrics_target.json").read_text())[0]["targets"] == ["127.0.0.1:7"]
    one.withdraw()
    one.withdraw()
    assert [path.name for path in targets.iterdir()] == ["other.json"]
    assert (tmp_path / "one" / "metrics_target.json").exists()
    with pytest.raises(UserError, match=r"run\.name"):
        config_for(tmp_path, "_targets")  # no run can have the folder's name
