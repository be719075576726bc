"""A run whose directory is in an object store: real S3 calls of pyarrow against a server of this machine (moto)."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from run_fixtures import ENDLESS, ROOT, TINY

from common.checkpoint_store import CheckpointDamaged, CheckpointStore
from common.config import IN_RAY_JOB, Config
from common.config_file import load_config
from common.errors import RunError, UserError
from common.local_copy import KEEP_SECONDS, cache_folder, local_copy
from common.location import above, below
from common.place import Place
from learner import run_directory, run_lock
from learner.cli import main
from learner.resumption import resumed_config
from learner.run_directory import RunDirectory
from learner.run_lock import RunLock
from learner.run_record import read_record

BUCKET = "runs"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment of those who use it."""
    started = ThreadedMotoServer("127.0.0.1", 0)
    started.start()
    host, port = started.get_host_and_port()
    found = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in found.items():
            patched.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield found
    started.stop()


@pytest.fixture
def root(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """A folder of its own, and a machine that has no copies of anything."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(IN_RAY_JOB, raising=False)
    monkeypatch.chdir(tmp_path)
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def config_in(root: str, *overrides: str) -> Config:
    return load_config(None, ["task.name=sudoku", f"run.root={root}", "run.name=one", *overrides])


def diffpo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says, in this process."""
    with pytest.MonkeyPatch.context() as patched, suppress(SystemExit):
        patched.setattr("sys.argv", ["diffpo", *arguments])
        main()
    return "".join(capsys.readouterr())


# -- places -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["/a/b", "s3://b/a", "s3://b/a?region=x&scheme=http"])
def test_what_lies_in_a_folder_keeps_its_options(where: str) -> None:
    inside = below(where, "c")
    assert above(inside) == (where, "c")
    assert inside.endswith("?region=x&scheme=http") == ("?" in where)
    base, mark, options = where.partition("?")
    assert below(f"{base}/{mark}{options}", "c") == inside, "a slash at the end means nothing"


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_files_of_a_place(kind: str, root: str, tmp_path: Path) -> None:
    place = Place(root if kind == "remote" else tmp_path / "place") / "deep"
    assert (place.exists(), place.folders(), list(place.files()), place.holds("a")) == (False, [], [], False)
    with pytest.raises(FileNotFoundError):
        place.read("a")
    place.filesystem.create_dir(place.path, recursive=True)
    place.write("a", b"first")
    place.write("a", b"second")
    (place / "in").filesystem.create_dir(f"{place.path}/in", recursive=True)
    (place / "in").write("b", b"")
    assert (place.read("a"), place.holds("a"), place.holds("in"), place.folders()) == (b"second", True, False, ["in"])
    assert [(name, size) for name, size, _ in place.files()] == [("a", 6), ("in/b", 0)]
    assert (place.parent.folders(), place.last) == (["deep"], "deep")
    place.remove("a")
    place.remove("a")
    assert not place.holds("a")
    place.remove_all()
    place.remove_all()
    assert not place.exists()


def test_a_copy_is_made_once_for_every_state_of_a_folder(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_copy(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"nothing is empty or not there"):
        local_copy(f"{root}/nothing")
    place = Place(root) / "model"
    (tmp_path / "made/inner").mkdir(parents=True)
    (tmp_path / "made/inner/x").write_text("x")
    (tmp_path / "made/last").write_text("one")
    place.upload(tmp_path / "made", last="last")
    first = local_copy(place)
    assert ((first / "inner/x").read_text(), (first / "last").read_text()) == ("x", "one")
    with monkeypatch.context() as patched:
        patched.setattr(Place, "download", lambda *_: pytest.fail("it is there"))
        assert local_copy(place.name) == first
    old = time.time() - KEEP_SECONDS - 1
    os.utime(first, (old, old))
    place.write("last", b"other")
    second = local_copy(place)
    assert local_copy(Path("a/relative")) == Path("a/relative")
    assert ((second / "last").read_text(), first.exists()) == ("other", False)


def test_a_checkpoint_that_is_not_what_was_committed_is_no_copy(root: str) -> None:
    store = CheckpointStore(f"{root}/checkpoints")
    draft = store.begin(3)
    (draft.path / "state").write_bytes(b"state")
    written = draft.commit(version=3, journal_index=0)
    assert (local_copy(store.location(written)) / "state").read_bytes() == b"state"
    (Place(root) / "checkpoints" / written.name).write("state", b"damaged")
    with pytest.raises(CheckpointDamaged, match="has 7 bytes instead of 5"):
        local_copy(store.location(written))
    assert len([path for path in cache_folder().iterdir() if path.is_dir()]) == 1


# -- run directory ------------------------------------------------------------------------------------------------


def test_a_run_directory_is_made_once(root: str) -> None:
    config = config_in(root)
    assert config.run_directory == f"{root}/one"
    RunDirectory.check_free(config.run_directory)
    with pytest.raises(UserError, match="nothing; give"):
        RunDirectory.find(config.run_directory)
    made = RunDirectory.create(config)
    assert made.config() == RunDirectory.find(f"{root}/one").config() == config
    with pytest.raises(UserError, match=r"--resume s3://runs/.*/one\), .* \(run\.name=one-2 is free\)"):
        RunDirectory.create(config)
    assert resumed_config(made, file=None, overrides=["learner.steps=3"]).run_directory == f"{root}/one"
    with pytest.raises(RunError, match="is in an object store; this needs"):
        _ = made.path


@pytest.mark.parametrize("where", ["s3://nowhere-at-all/x", "none://x/y"])
def test_a_store_that_does_not_take_it_is_named(where: str, root: str) -> None:
    with pytest.raises(UserError, match=rf"run directory {where}/one cannot be .*run\.root"):
        RunDirectory.create(config_in(where))


def test_metrics_are_uploaded_now_and_then(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunDirectory.create(config_in(root))
    (Place(root) / "one").write("metrics.jsonl", b'{"kind": "step", "learner_steps": 0}\n')
    for step in (1, 2):
        made.append_metrics({"kind": "step", "learner_steps": step})
        made.flush_metrics(now=False)
    assert [row["learner_steps"] for row in RunDirectory(made.name).read_metrics()] == [0, 1]
    made.flush_metrics()
    assert [row["learner_steps"] for row in RunDirectory(made.name).read_metrics()] == [0, 1, 2]
    monkeypatch.setattr(run_directory, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(run_directory, "FLUSH_PAUSE", 0.0)
    made.flush_metrics()
    made.append_metrics({"kind": "step", "learner_steps": 3})
    made.flush_metrics(now=False)
    assert len(RunDirectory(made.name).read_metrics()) == 4


def test_the_warm_start_is_there_as_a_whole_or_not(root: str) -> None:
    made = RunDirectory.create(config_in(root))
    folder = made.warm_start_here()
    made.keep_warm_start(folder)
    assert (made.has_warm_start(), list(folder.iterdir())) == (False, []), "nothing was made"
    (folder / "model").write_text("weights")
    made.keep_warm_start(folder)
    assert not made.has_warm_start(), "half of it"
    (folder / "threshold.json").write_text("{}")
    made.keep_warm_start(folder)
    assert made.has_warm_start()
    assert not folder.exists()
    assert (RunDirectory(made.name).warm_start_here() / "model").read_text() == "weights"


def test_prometheus_finds_the_run_in_a_folder_of_this_machine(root: str, tmp_path: Path) -> None:
    made = RunDirectory.create(config_in(root))
    target = [{"targets": ["h:1"], "labels": {"run": "one"}}]
    made.announce(target)
    listed = tmp_path / "runs/_targets/one.json"
    assert json.loads(listed.read_text()) == made.read_json("metrics_target.json") == target
    made.withdraw()
    assert not listed.exists()


def test_what_is_said_of_a_run_with_options_can_be_typed(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = RunDirectory.create(config_in(f"{root}/?region=us-east-1"))
    with pytest.raises(UserError, match=r"--resume 's3://runs/.*/one\?region=us-east-1'\)"):
        RunDirectory.check_free(made.name)
    assert "go on with: diffpo train --resume 's3://" in diffpo(capsys, "status", made.name)
    assert diffpo(capsys, "report", made.name).strip() == f"{root}/one/report.html?region=us-east-1"
    assert made.place.holds("report.html")


# -- lock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BEAT": 0.1, "DEAD": 1.5, "SETTLE": 0.1, "WATCH": 0.1}.items():
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)


@pytest.mark.usefixtures("quick")
def test_one_driver_at_a_time(root: str) -> None:
    refused = pytest.raises(UserError, match=rf"is going on in process {os.getpid()} on .*; stop that one first")
    with RunLock(Place(root)).held(), refused, RunLock(Place(root)).held():
        pytest.fail("two hold it")
    assert not Place(root).holds("lock")
    with RunLock(Place(root)).held():
        pass


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("host", ["here", "elsewhere", "namesake", "container"])
def test_a_lock_whose_owner_is_gone_is_taken(root: str, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if host == "here":
        monkeypatch.setattr(run_lock, "DEAD_SECONDS", 60.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = RunLock(Place(root))
    owner = mine._owner | {"pid": gone.pid, "token": "x", "beats": 7}
    if host != "here":
        key = {"elsewhere": "host", "namesake": "boot", "container": "pids"}[host]
        owner |= {key: "another"}
    Place(root).write("lock", json.dumps(owner).encode())
    started = time.monotonic()
    with mine.held():
        assert (time.monotonic() - started > run_lock.DEAD_SECONDS) == (host != "here"), "it is watched"


@pytest.mark.usefixtures("quick")
def test_of_two_who_take_it_at_once_one_has_it(root: str) -> None:
    ended: list[str] = []
    together, refused = threading.Barrier(2), threading.Event()

    def take() -> None:
        together.wait()
        try:
            with RunLock(Place(root)).held():
                refused.wait(60)
                ended.append("had it")
        except UserError:
            ended.append("refused")
            refused.set()

    both = [threading.Thread(target=take) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(ended) == ["had it", "refused"]


@pytest.mark.usefixtures("quick")
def test_an_owner_that_was_replaced_notices(root: str) -> None:
    mine = RunLock(Place(root))
    with mine.held():
        mine.check()
        Place(root).write("lock", b'{"host": "other", "pid": 1, "token": "theirs", "beats": 1}')
        until = time.monotonic() + 10
        while not mine.lost and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(RunError, match="was taken over by process 1 on other"):
            mine.check()
    assert Place(root).holds("lock"), "it is theirs"


# -- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed, and gone on with where nothing of it is but the object store."""
    train = [sys.executable, "-m", "learner", "train"]
    given = ["--config", "deploy/configs/sudoku.yaml", *TINY, f"run.root={root}", "run.name=one"]
    given += ["run.checkpoint_every=2", "replay.memory_bytes=0", "evaluation.prompts=2"]

    def machine(name: str) -> dict[str, str]:
        return {**os.environ, "HOME": str(tmp_path / name), "XDG_CACHE_HOME": str(tmp_path / name / "cache")}

    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    first = subprocess.Popen([*train, *given, ENDLESS], cwd=ROOT, env=machine("a"), text=True, **pipes)
    run = RunDirectory(f"{root}/one")

    def steps() -> list[float]:
        return [row["learner_steps"] for row in run.read_metrics() if row["kind"] == "step"]

    until = time.monotonic() + 120
    while len(steps()) < 5:
        if first.poll() is not None or time.monotonic() > until:
            first.kill()
            pytest.fail(f"run ended or hung before step 5: {first.communicate()[0][-3000:]}")
        time.sleep(0.5)
    first.kill()
    first.wait()
    newest = max(one.step for one in run.checkpoint_store(run.config()).checkpoints())
    more = [*train, "--resume", run.name, f"learner.steps={newest + 4}"]
    second = subprocess.run(more, cwd=ROOT, env=machine("b"), text=True, capture_output=True, timeout=240)
    assert second.returncode == 0, second.stderr[-3000:]
    assert run.finished_steps() == newest + 4
    found = steps()
    assert found[-1] == newest + 4
    missing = set(range(1, newest + 5)) - set(found)
    assert len(missing) <= 4, "of two checkpoints, whose rows were not uploaded when the process was killed"
    recorded = read_record(run.place, columns=["step"])[0]["step"].to_pylist()
    assert sorted(set(recorded)) == list(range(1, newest + 5))
    assert run.place.read("pareto.png").startswith(b"\x89PNG")
    assert not (run.place / "shards").exists()
    assert not run.place.holds("lock")
    assert not (tmp_path / "b" / "runs").exists()
    assert "run one: finished" in diffpo(capsys, "status", run.name)
    group = re.search(r"segments: (\d+)", diffpo(capsys, "replay", run.name, "0"))
    assert group, "a group that was trained is in no file, and the message lists those that are"
    assert "error" not in diffpo(capsys, "replay", run.name, group[1])
    checkpoint = run.checkpoint_store(run.config()).location(run.checkpoint_store(run.config()).checkpoints()[-1])
    assert "NFE" in diffpo(capsys, "generate", checkpoint, "1004040003104001")
    assert f"{run.name}/report.html" in diffpo(capsys, "report", run.name)
    assert run.place.read("report.html").startswith(b"<!doctype html>")
