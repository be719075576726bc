"""Remote job: what a command prints on a cluster, and what is said when it cannot be run there."""

from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from common.errors import RunError, UserError
from learner import remote_job
from learner.cli import app
from learner.remote_job import run_remotely

RAYS = "2026-11-25 INFO job_manager.py:581 -- Runtime env is setting up.\n"
BEGIN = "Running entrypoint for job raysubmit_x: python -m learner status first\n"


class Server:
    """A job server on which a command ends as it was told to."""

    def __init__(self, status: JobStatus, logs: str) -> None:
        self._states = [JobStatus.PENDING, JobStatus.RUNNING, status]
        self.logs, self.submitted, self.stopped = RAYS + BEGIN + logs, {}, False

    def submit_job(self, **given: Any) -> str:
        self.submitted = given
        return "raysubmit_x"

    def get_job_status(self, job: str) -> JobStatus:
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]

    def get_job_logs(self, job: str) -> str:
        return self.logs

    def get_job_info(self, job: str) -> Any:
        raise AssertionError("the log says enough")

    def stop_job(self, job: str) -> None:
        self.stopped = True


def serve(monkeypatch: pytest.MonkeyPatch, status: JobStatus, logs: str) -> Server:
    server = Server(status, logs)
    monkeypatch.setattr(remote_job, "JobSubmissionClient", lambda address: server)
    monkeypatch.setattr(remote_job, "POLL_SECONDS", 0.0)
    return server


def test_only_what_the_command_printed_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = serve(monkeypatch, JobStatus.SUCCEEDED, "run first: train\nlearner: trains\n")
    assert run_remotely("http://h:8265", ["status", "first; rm -rf /"], tmp_path) == "run first: train\nlearner: trains"
    assert server.submitted["entrypoint"] == "python -m learner status 'first; rm -rf /'", "it is a shell's line"
    assert server.submitted["runtime_env"] == {"working_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("logs", "kind", "said"),
    [
        ("noise\nerror: run 'x': no folder of that name\n", UserError, "run 'x': no folder of that name"),
        ("run failed: run x ended meanwhile\n", RunError, "run x ended meanwhile"),
        ("/usr/bin/python: No module named learner\n", RunError, "No module named learner; where its Python has no"),
    ],
)
def test_what_went_wrong_there_is_said_here(
    monkeypatch: pytest.MonkeyPatch, logs: str, kind: type[Exception], said: str
) -> None:
    serve(monkeypatch, JobStatus.FAILED, logs)
    with pytest.raises(kind, match=said):
        run_remotely("http://h:8265", ["status", "x"], None)


def test_a_job_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(monkeypatch, JobStatus.PENDING, "")
    monkeypatch.setattr(remote_job, "PATIENCE", 0.0)
    with pytest.raises(RunError, match=r"job raysubmit_x at http://h:8265 is PENDING after 0 s"):
        run_remotely("http://h:8265", ["status", "x"], None)
    assert server.stopped


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "ftp://x"])
def test_a_server_that_is_not_there_is_named(address: str) -> None:
    with pytest.raises(UserError, match=rf"job server {address} cannot be used .*give --address http://HOST:8265"):
        run_remotely(address, ["status", "x"], None)


def test_a_working_dir_goes_with_an_address() -> None:
    answer = CliRunner().invoke(app, ["status", "x", "--working-dir", "."])
    assert isinstance(answer.exception, UserError)
    assert "--working-dir . goes with --address" in str(answer.exception)
