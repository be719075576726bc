"""Doctor: what it says of this machine, and of machines that lack something."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_cli import Diffpo, diffpo  # noqa: F401

import learner.ray_connection
from common.errors import UserError
from learner import doctor as doctor_module
from learner.doctor import GIGABYTE, Check, Finding, State, checks, examine
from learner.doctor_display import as_dict, show

Usage = namedtuple("Usage", "total used free")
Patch = pytest.MonkeyPatch


def found(check: Check, name: str) -> Finding:
    [one] = [one for one in examine([check]) if name in one.name]
    return one


def test_this_machine_is_well(diffpo: Diffpo) -> None:  # noqa: F811
    ended = diffpo("doctor", "--json")
    said = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert said["ok"] is True
    assert {"system", "packages", "optional", "torch", "GPU", "Ray", "ports", "disk"} == {
        one["part"] for one in said["findings"]
    }
    by_name = {one["name"]: one for one in said["findings"]}
    assert by_name["torch"]["found"] == torch.__version__
    assert by_name["Python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert by_name["HF_HUB_OFFLINE"]["found"].startswith(os.environ["HF_HUB_OFFLINE"])

    ended = diffpo("doctor")
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "runs can start here"
    assert "transformers" in ended.out


def test_what_is_missing_ends_with_one_and_says_what_to_do(diffpo: Diffpo, monkeypatch: Patch) -> None:  # noqa: F811
    real = doctor_module.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return "2.0.0" if name == "ray" else real(name)

    monkeypatch.setattr(doctor_module, "version", without_peft)
    ended = diffpo("doctor")
    assert ended.code == 1
    assert "missing: peft: not installed -> pip install 'peft>=0.17'" in ended.out
    assert "missing: ray: 2.0.0, and <2.61,>=2.60 is needed -> pip install 'ray<2.61,>=2.60'" in ended.out
    assert ended.out.splitlines()[-1] == "2 missing: runs cannot start here"
    ended = diffpo("doctor", "--json")
    assert (ended.code, json.loads(ended.out)["ok"]) == (1, False)


def test_a_check_that_fails_hides_no_other() -> None:
    def broken_package() -> list[Finding]:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    def fine() -> list[Finding]:
        return [Finding("system", "OS", "Linux")]

    first, second = examine([broken_package, fine])
    assert (first.state, first.name) == (State.MISSING, "broken package")
    assert "ImportError: libcudart.so.12" in first.found
    assert second == Finding("system", "OS", "Linux")


def test_an_old_python_is_missing(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor_module, "OLDEST_PYTHON", (3, 99))
    one = found(doctor_module.python, "Python")
    assert (one.state, "Python 3.99 or newer" in one.advice) == (State.MISSING, True)


@pytest.mark.parametrize(
    ("soft", "state"),
    [(64, State.MISSING), (512, State.NOTE), (4096, State.OK), (resource.RLIM_INFINITY, State.OK)],
)
def test_few_open_files(monkeypatch: Patch, soft: int, state: State) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 8192))
    one = found(doctor_module.machine, "open files")
    assert one.state is state
    assert ("ulimit -n" in one.advice) == (state is not State.OK)


@pytest.mark.parametrize(
    ("usage", "state"),
    [
        (Usage(100 * GIGABYTE, 50 * GIGABYTE, 50 * GIGABYTE), State.OK),
        (Usage(100 * GIGABYTE, 92 * GIGABYTE, 8 * GIGABYTE), State.NOTE),
        (Usage(1000 * GIGABYTE, 960 * GIGABYTE, 40 * GIGABYTE), State.NOTE),
        (Usage(100 * GIGABYTE, 99.5 * GIGABYTE, 0.5 * GIGABYTE), State.MISSING),
    ],
)
def test_little_room_on_disk(monkeypatch: Patch, tmp_path: Path, usage: Usage, state: State) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    one = found(lambda: doctor_module.disk(tmp_path / "runs" / "deep"), str(tmp_path))
    assert one.state is state
    assert ("choose another run.root" in one.advice) == (state is not State.OK)


def test_little_shared_memory(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIGABYTE / 16, 0, GIGABYTE / 16))
    one = found(lambda: doctor_module.disk(tmp_path), "/dev/shm")
    assert (one.state, "--shm-size" in one.advice) == (State.NOTE, True)


def test_a_folder_that_cannot_be_written_to(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    one = found(lambda: doctor_module.disk(tmp_path), "runs")
    assert (one.state, one.found) == (State.MISSING, "cannot be written to")


def test_a_ray_that_does_not_answer(monkeypatch: Patch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    one = found(doctor_module.ray_cluster, "address")
    assert one.state is State.MISSING
    assert address in one.found
    assert "RAY_ADDRESS" in one.advice


@pytest.mark.parametrize("address", ["garbage", " ", "LOCAL", "ray://", "head:", "head:6379:", "head:²"])
def test_an_address_that_is_none_does_not_answer(monkeypatch: Patch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    one = found(doctor_module.ray_cluster, "address")
    assert (one.state, "no host:port" in one.found) == (State.MISSING, True)


@pytest.mark.parametrize(
    ("root", "said"),
    [("s3://KEY:OPEN-SESAME@bucket/runs", "s3://***@bucket/runs"), ("x" * 5000, "runs"), ("a\0b", "runs")],
)
def test_a_root_that_is_no_folder_here(root: str, said: str) -> None:
    [check] = [one for one in checks(root=root) if one.__name__ == "room"]
    findings = examine([check])
    assert said in findings[0].name
    assert all(one.part == "disk" for one in findings), "none stumbled"
    assert "SESAME" not in str(findings)


def test_a_ray_that_answers(monkeypatch: Patch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        one = found(doctor_module.ray_cluster, "address")
    assert (one.state, "answers" in one.found) == (State.OK, True)


def test_a_ray_that_does_not_start(monkeypatch: Patch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise UserError("a local Ray does not start (no room); try again when this machine has less to do")

    monkeypatch.setattr(learner.ray_connection, "connect", fails)
    assert doctor_module.start_of_ray not in checks(root=Path("runs"))
    [check] = [one for one in checks(root=Path("runs"), starts_ray=True) if one is doctor_module.start_of_ray]
    one = found(check, "start")
    assert (one.state, one.found) == (State.MISSING, "a local Ray does not start (no room)")
    assert one.advice == "try again when this machine has less to do"


def test_no_free_ports(monkeypatch: Patch) -> None:
    class Refusing(socket.socket):
        def bind(self, *_: Any) -> None:
            raise OSError(13, "Permission denied")

    monkeypatch.setattr(doctor_module.socket, "socket", Refusing)
    one = found(doctor_module.ports, "metrics")
    assert (one.state, "Permission denied" in one.found) == (State.MISSING, True)


def test_a_gpu_that_torch_can_use_and_one_that_it_cannot(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    monkeypatch.setattr(torch.version, "cuda", None)
    one = found(doctor_module.gpu, "NVIDIA")
    assert (one.state, "without CUDA" in one.found) == (State.NOTE, True)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    known = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIGABYTE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: known)
    monkeypatch.setattr("common.autocast.has_bfloat16", lambda _: True)
    assert found(doctor_module.gpu, "cuda:0").found == "NVIDIA H100, 80.0 GB, bfloat16"


def test_the_table_is_whole_and_takes_brackets_as_they_are() -> None:
    findings = [
        Finding("optional", "hub: datasets", "pip install 'diffpo[hub]'"),
        Finding("disk", "runs", "0.5 of 1.0 GB free", State.MISSING, "make 1 GB free"),
    ]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(findings, console)
    text = console.export_text()
    assert "pip install 'diffpo[hub]'" in text
    assert "missing: runs: 0.5 of 1.0 GB free -> make 1 GB free" in text
    assert as_dict(findings)["findings"][1]["state"] == "missing"


def test_a_module_that_is_no_longer_there_is_found_by_a_fresh_process(tmp_path: Path) -> None:
    """A torch that cannot be imported: the report is made all the same, and ends with 1."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: file too short')\n")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "learner", "doctor", "--json"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    broken = [one for one in json.loads(done.stdout)["findings"] if one["state"] == "missing"]
    assert {one["name"] for one in broken} >= {"torch build", "gpu"}
    assert all("libtorch_cpu.so: file too short" in one["found"] for one in broken)
