"""What goes to a cluster: the image, what a job uploads, the runtime environment, the launcher's file."""

import json
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("cpu", "cuda")
LARGEST_UPLOAD = 3_000_000  # bytes; Ray refuses 100 MiB, and each node fetches it


def instructions() -> list[tuple[str, list[tuple[str, str]]]]:
    """Stages of the Dockerfile, each its FROM line and its instructions (word, rest)."""
    stages: list[tuple[str, list[tuple[str, str]]]] = []
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    for line in filter(None, joined.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stages.append((rest, []))
        elif stages:
            stages[-1][1].append((word, rest))
    return stages


def stage(name: str) -> list[tuple[str, str]]:
    (found,) = (body for head, body in instructions() if head.endswith(f" AS {name}"))
    return found


def test_the_base_is_pinned() -> None:
    """One image under all stages, of a patch version; every other stage builds on a stage."""
    assert re.search(r"^ARG PYTHON=python:3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    names = {head.split(" AS ")[1] for head, _ in instructions()}
    assert {head.split(" AS ")[0] for head, _ in instructions()} <= {"${PYTHON}", *names}
    assert "latest" not in DOCKERFILE


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_no_root_and_has_its_packages(target: str) -> None:
    body = stage(target)
    assert [rest for word, rest in body if word == "USER"] == ["1000:1000"]
    assert [word for word, _ in body].index("USER") > max(
        i for i, (word, _) in enumerate(body) if word in {"RUN", "COPY"}
    )
    assert ("COPY", f"--from=build-{target} /usr/local /usr/local") in body


@pytest.mark.parametrize("target", TARGETS)
def test_every_installation_is_constrained(target: str) -> None:
    installed = [rest for word, rest in stage(f"build-{target}") if word == "RUN"]
    assert len(installed) == 2
    assert all(rest.startswith("pip install -c deploy/constraints.txt ") for rest in installed)
    assert ("download.pytorch.org/whl/cpu" in installed[0]) == (target == "cpu")


def test_what_is_copied_exists_and_is_let_through() -> None:
    """`.dockerignore` refuses everything but what the Dockerfile copies."""
    copied = {
        name
        for _, body in instructions()
        for word, rest in body
        if word == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_launcher_finds_the_home() -> None:
    """Ray's launcher reads HOME from the image's environment, and mounts the token below it."""
    environment = dict(pair.split("=", 1) for word, rest in stage("runtime") if word == "ENV" for pair in rest.split())
    assert environment["HOME"] == "/home/diffpo"
    assert environment["RAY_AUTH_MODE"] == "token"


def test_an_upload_is_small_and_enough(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` sends, packed by Ray itself."""
    packed = tmp_path / "packed.zip"
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(str(ROOT), packed, include_gitignore=True, excludes=excludes)
    names = zipfile.ZipFile(packed).namelist()
    assert packed.stat().st_size < LARGEST_UPLOAD
    for needed in ("learner/__main__.py", "common/config.py", "actors/engine.py", "deploy/configs/sudoku.yaml"):
        assert needed in names
    assert "deploy/constraints.txt" in names  # deploy/runtime-env.yaml reads it there
    assert not [name for name in names if name.split("/")[0] in {"docs", "tests", "runs", ".git", ".venv", ".ci"}]


def test_the_runtime_environment_has_every_dependency() -> None:
    """All of pyproject.toml but Ray, which a node has, in the versions that were tested together."""
    given = yaml.safe_load((ROOT / "deploy/runtime-env.yaml").read_text())
    constraints, *packages = given["pip"]["packages"]
    assert constraints == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/deploy/constraints.txt"
    assert packages == [each for each in PROJECT["dependencies"] if not each.startswith("ray[")]
    assert RuntimeEnv(**given)["pip"] == given["pip"]


def launcher() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/ray-cluster.yaml").read_text())


def test_the_launchers_file_fits_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(launcher())] == []


def test_the_launchers_nodes() -> None:
    """Those of deploy/kuberay: a fixed learner, rollout and rewards from none, the same labels; a token everywhere."""
    given = launcher()
    nodes = given["available_node_types"]
    assert {name: each["labels"]["gpu"] for name, each in nodes.items() if name != given["head_node_type"]} == {
        "learner": "learner",
        "rollout": "inference",
        "rewards": "none",
    }
    assert nodes["learner"]["min_workers"] == nodes["learner"]["max_workers"] == 1
    assert nodes["rollout"]["min_workers"] == nodes["rewards"]["min_workers"] == 0
    assert given["max_workers"] == sum(each.get("max_workers", 0) for each in nodes.values())
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert given["docker"]["image"].endswith(f"/diffpo:{PROJECT['version']}-cuda")
    assert given["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in given["head_start_ray_commands"][-1]
    for rule in given["provider"]["security_group"]["IpPermissions"]:
        assert all(not each["CidrIp"].endswith("/0") for each in rule["IpRanges"])
