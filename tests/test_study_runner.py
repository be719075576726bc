"""The runner of studies: what is refused before Ray starts, what is run again, and what a failure leaves."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import study_fixtures
import torch
from ray import cloudpickle
from rich.console import Console
from study_fixtures import ROOT, STUDY, result, study

from common.config import Config
from common.errors import RunError, UserError
from common.tasks import math_answer
from learner import ray_connection
from learner.cli import main
from learner.study import runner as runner_module
from learner.study import single_run, warm_starts
from learner.study.grid import Planned, Study, plan
from learner.study.runner import Runner, bounded
from learner.study.warm_starts import WarmStarts


def fake_warm(config: Config) -> np.ndarray:
    return np.full(3, float(config.run.seed))


def fake_train(config: Config, start: np.ndarray, staleness: int) -> dict[str, Any]:
    if config.run.seed == 1 and config.learner.learning_rate == 1e-3:
        raise ValueError("no such luck")
    if config.run.seed == 1:
        return result("", 0, math.nan)
    return result("", 0, float(start.sum()) / 100)


def healed_train(config: Config, start: np.ndarray, staleness: int) -> dict[str, Any]:
    return result("", 0, 0.5)


def hanging_train(config: Config, start: np.ndarray, staleness: int) -> dict[str, Any]:
    while config.run.seed == 1 and config.learner.learning_rate == 1e-3:
        with contextlib.suppress(ValueError):
            time.sleep(60)
    return result("", 0, 0.5)


@pytest.fixture(autouse=True)
def functions_travel_by_value() -> None:
    """Workers do not have the tests on their path."""
    for module in (sys.modules[__name__], study_fixtures):
        cloudpickle.register_pickle_by_value(module)


def test_a_failed_run_is_named_the_others_go_on_and_only_it_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_starts, "start_size", lambda config: 3)
    console = Console(width=200)

    def runner(train: Any, given: Study) -> Runner:
        return Runner(
            "s", given, out=tmp_path / "out", work=tmp_path / "work", console=console, train=train, warm=fake_warm
        )

    with pytest.raises(RunError, match=r"2 of 4 runs failed") as failed:
        runner(fake_train, study()).run(jobs=2)
    assert "other-seed1: no such luck" in str(failed.value)
    assert "one-seed1: validation.1.accuracy of its result is not finite" in str(failed.value)
    assert "2 of 4 runs" in (tmp_path / "out" / "s.md").read_text()
    assert not list((tmp_path / "work").glob("partial*"))
    kept = json.loads((tmp_path / "out/s/other-seed0.json").read_text())
    assert (kept["jobs"], kept["overrides"][0]) == (2, "learner.learning_rate=1e-3")
    assert runner(healed_train, study()).run(jobs=2) == tmp_path / "out" / "s.md"
    areas = {name: found["test"]["after"]["area"] for name, found in runner(healed_train, study()).finished().items()}
    assert areas == pytest.approx({"one-seed0": 0.2, "other-seed0": 0.2, "one-seed1": 0.7, "other-seed1": 0.7})
    assert len(list((tmp_path / "work").glob("warm_start-*.npy"))) == 2
    with pytest.raises(RunError, match=r"1 of 4 runs failed.*other-seed1: took longer than run_minutes=0.05"):
        runner(hanging_train, study(run_minutes=0.05, overrides=["learner.steps=9"])).run(jobs=2)
    capsys.readouterr()
    changed = runner(healed_train, study(overrides=["learner.steps=7"]))
    assert changed.finished() == {}
    assert "its configuration has changed" in capsys.readouterr().out


def hangs_after_math_verify() -> None:
    """It has used, and stopped, the only alarm clock of this process."""
    math_answer.prepare()
    time.sleep(30)


def hangs_in_a_regular_expression() -> None:
    """It lets no other thread run."""
    re.fullmatch("(a+)+", "a" * 40 + "b")


@pytest.mark.parametrize("work", [hangs_after_math_verify, hangs_in_a_regular_expression])
def test_a_reward_that_hangs_is_ended(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"took longer than run_minutes=0\.05; mend a reward that hangs, or raise it"):
        bounded(work, 0.05)()


def test_what_is_done_in_time_is_left_alone() -> None:
    started = time.monotonic()
    assert bounded(lambda one, other: one + other, 60.0)(1, 2) == 3
    assert time.monotonic() - started < 30, "nobody waits for the clock"


def test_what_passes_over_its_end_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    deaf = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    deaf.stdout.readline()
    told = runner_module.CLOCK.replace("* 60", "* 2")
    with subprocess.Popen([sys.executable, "-c", told, str(deaf.pid), "0.1"], stdin=subprocess.PIPE):
        assert deaf.wait(timeout=30) == -signal.SIGKILL


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `diffpo study` with some arguments."""
    monkeypatch.setattr(sys, "argv", ["diffpo", "study", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_the_command_reports_without_ray_and_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(json.dumps(STUDY))
    assert command(monkeypatch, "mine.yaml", "--report", "--seeds", "1", "--out", "there") == 0
    assert "0 of 2 runs" in Path("there/mine.md").read_text()
    capsys.readouterr()
    assert command(monkeypatch, "nowhere") == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: study 'nowhere': no file")
    assert refused.count("\n") == 1
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nothing answers there
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        assert command(monkeypatch, "mine.yaml") == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert not ray.is_initialized()


def test_a_full_folder_loses_no_finished_run_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "out/s/one-seed0.json").mkdir(parents=True)  # no file can be put there
    (tmp_path / "out/s.md").mkdir()
    console = Console(width=200)
    folders = {"out": tmp_path / "out", "work": tmp_path / "work"}
    runner = Runner("s", study(seeds=1), console=console, train=healed_train, warm=fake_warm, **folders)
    with pytest.raises(RunError, match="1 of 2 runs failed") as failed:
        runner.run(jobs=1)
    (spare,) = tmp_path.glob("diffpo-study-*/one-seed0.json")
    assert json.loads(spare.read_text())["arm"] == "one"
    assert f"make room, and move {spare} there" in str(failed.value)
    assert f"the report in {tmp_path}/out cannot be written" in str(failed.value)
    assert (tmp_path / "out/s/other-seed0.json").is_file()
    assert not list((tmp_path / "out").rglob("*.partial"))
    (tmp_path / "out/s/one-seed0.json").rmdir()
    shutil.copy(spare, tmp_path / "out/s")
    (tmp_path / "out/s.md").rmdir()
    assert runner.run() == tmp_path / "out/s.md"  # nothing is left to do


def test_a_report_that_fails_does_not_end_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(runner_module, "write_report", broken)
    runner = Runner("s", study(), out=tmp_path, work=tmp_path, console=Console())
    runner._report_so_far({})
    assert "no report yet: a bug" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_study_in_one_line(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(STUDY))
    process = subprocess.Popen(
        [sys.executable, "-m", "learner", "study", "mine.yaml", "--jobs", "1", "--out", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        while "running: one-seed0 (warm start)" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    last = output.splitlines()[-1]
    assert last == f"stopped by {number.name}: 0 of 4 runs are finished; the same command goes on"
    assert "Traceback" not in errors
    assert "***" not in errors  # what Ray's own handler prints above its stack


# -- before Ray starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.max_prompt_tokens=4", "arm other: train example 0: prompt of 16 tokens exceeds"),
        ("model.device=cudda", "arm other: model.device='cudda' cannot be used here"),
        ("model.path=/nope", "arm other: model /nope: no config.json there"),
        ("warm_start.file=/nope.jsonl", "arm other: warm_start.file=/nope.jsonl cannot be read"),
        ("task.file=/nope.csv", "arm other: "),
    ],
)
def test_arms_that_cannot_train_are_refused_before_ray_starts(
    override: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    arms = STUDY["arms"] | {"other": {"about": "", "overrides": [override]}}
    Path("mine.yaml").write_text(json.dumps(STUDY | {"arms": arms}))
    assert command(monkeypatch, "mine.yaml", "--out", "out") == 2
    refused = capsys.readouterr().err
    assert refused.startswith(f"error: {message}")
    assert refused.count("\n") == 1
    assert command(monkeypatch, "mine.yaml", "--out", "out", "--report") == 0  # what was done stays readable


def test_a_folder_that_cannot_be_written_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr(runner_module, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*; choose another --out, or make room"):
        Runner("s", study(), out=tmp_path, work=tmp_path, console=Console()).run()


def test_reports_are_not_written_over_by_fewer_seeds_or_by_another_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").write_text(json.dumps(STUDY))
    assert command(monkeypatch, "quick.yaml", "--report") == 2
    assert "quick is the name of deploy/studies/quick.yaml" in capsys.readouterr().err
    assert command(monkeypatch, "quick.yaml", "--report", "--out", "own") == 0
    assert command(monkeypatch, "deploy/studies/quick.yaml", "--report") == 0
    Path("own/quick/one-seed1.json").write_text("{}")
    assert command(monkeypatch, "quick.yaml", "--report", "--out", "own", "--seeds", "1") == 2
    refused = capsys.readouterr().err
    assert "--seeds 1 would leave 1 finished runs (one-seed1, ...) out" in refused
    assert "leave --seeds out, or" in refused
    Path("own/quick/other-seed4.json").write_text("{}")  # `--seeds 5` has been here
    Path("own/quick/gone-seed9.json").write_text("{}")  # of an arm that the study has no more
    for given, said in (([], "the study's own seeds"), (["--seeds", "3"], "--seeds 3")):
        assert command(monkeypatch, "quick.yaml", "--report", "--out", "own", *given) == 2
        refused = capsys.readouterr().err
        assert f"{said} would leave 1 finished runs (other-seed4, ...) out" in refused
        assert "; give --seeds 5, or" in refused
    assert command(monkeypatch, "quick.yaml", "--report", "--out", "own", "--seeds", "5") == 0


@pytest.mark.parametrize(
    ("address", "message"),
    [("local", r"a local Ray does not start \(.*timed out.*RAY_ADDRESS"), ("auto", r"Ray at 'auto' cannot.*\); do so")],
)
def test_a_ray_that_does_not_start_is_one_line(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=message):
        ray_connection.connect(address, way_out="do so")


# -- warm starts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def planned() -> Planned:
    small = ["model.hidden_size=16", "model.layers=1", "model.heads=2", "model.intermediate_size=32"]
    return plan(study(overrides=small))[0]


def test_a_kept_warm_start_is_used_and_a_damaged_one_is_made_again(
    planned: Planned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = WarmStarts(tmp_path, Console(width=300))
    assert kept.kept(planned) is None
    size = single_run.start_size(planned.config)
    assert size is not None
    good = np.linspace(0, 1, size, dtype=np.float32)
    kept.keep(planned, good)
    (path,) = tmp_path.iterdir()
    assert np.array_equal(kept.kept(planned), good)
    assert capsys.readouterr().out == ""
    content = path.read_bytes()
    for damaged in (content[:-4], content[:20], b"", b"no array"):
        path.write_bytes(damaged)
        assert kept.kept(planned) is None
        assert capsys.readouterr().out.startswith(f"{path}: damaged (")
    for other, said in (
        (good[:100], f"100 numbers for a model of {size}"),
        (np.full_like(good, np.nan), "not all numbers are finite"),
    ):
        np.save(path, other)
        assert kept.kept(planned) is None
        assert said in capsys.readouterr().out
    for other in (np.zeros((2, 2)), np.array(["a"])):
        np.save(path, other)
        assert kept.kept(planned) is None
        assert "no vector of numbers" in capsys.readouterr().out


def test_a_warm_start_without_room_is_used_without_being_kept(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    WarmStarts(tmp_path, Console(width=300)).keep(planned, np.zeros(3))
    assert "cannot be written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_deterministic_run_leaves_nothing_to_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deterministic:
        def __init__(self, *_: Any, staleness: int) -> None:
            torch.use_deterministic_algorithms(True)

        def run(self) -> dict[str, Any]:
            raise RunError("it fails")

    monkeypatch.setattr(single_run, "SingleRun", Deterministic)
    with pytest.raises(RunError, match="it fails"):
        single_run.run_arm(plan(study())[0].config, np.zeros(3), 0)
    assert not torch.are_deterministic_algorithms_enabled()
