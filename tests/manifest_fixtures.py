"""The overlays of deploy/kuberay, and what is looked for in them."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from kustomize_fixtures import Build, build

from common.config import Config
from common.config_file import load_config

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = ["cluster", "job", "trial"]
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def _built(overlay: str) -> Build:
    return build(KUBERAY / "overlays" / overlay)


def built(overlay: str) -> Build:
    return copy.deepcopy(_built(overlay))


def cluster(made: Build) -> dict[str, Any]:
    """The specification of the cluster, of its own or of a job."""
    (top,) = (each for each in made.objects.values() if each["apiVersion"] == "ray.io/v1")
    return top["spec"] if top["kind"] == "RayCluster" else top["spec"]["rayClusterSpec"]


def groups(made: Build) -> dict[str, dict[str, Any]]:
    """Worker groups by name."""
    return {each["groupName"]: each for each in cluster(made)["workerGroupSpecs"]}


def pods(made: Build) -> Iterator[dict[str, Any]]:
    """Templates of the pods: the head's first."""
    spec = cluster(made)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return only


def ports(pod: dict[str, Any]) -> dict[str, int]:
    return {each["name"]: each["containerPort"] for each in container(pod)["ports"]}


def run_config(made: Build, folder: Path) -> Config:
    """The configuration in the ConfigMap, read as the job reads it."""
    path = folder / "run.yaml"
    path.write_text(made.one("ConfigMap")["data"]["run.yaml"])
    return load_config(path)
