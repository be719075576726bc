"""deploy/kuberay: valid for KubeRay, names and ports of one file are known to the others, nothing is root."""

import copy
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kustomize_fixtures import Build, build
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN
from typer.testing import CliRunner

from actors.placement import Demand
from common.config import Config, MetricsConfig
from common.config_file import load_config
from learner.cli import app

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "schemas"
OVERLAYS = ["cluster", "job", "trial"]
RUNS = {"base": "sudoku.yaml", "components/gpu": "llada_8b.yaml"}  # and the shipped configuration that each follows
PROMETHEUS_PORTS = ["metrics", "as-metrics", "dash-metrics", "diffpo"]
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


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "deploy/constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


# --- KubeRay's own rules


def strict(schema: Any) -> Any:
    """A CRD's schema under which fields that Kubernetes would silently prune are errors."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if made.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


@cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no {path}: KubeRay's CRDs are not part of the project")
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return jsonschema.Draft202012Validator(schema)


def refusals(resource: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in crd(resource["kind"]).iter_errors(resource)]


@every_overlay
def test_valid_for_the_crds(overlay: str) -> None:
    (top,) = (each for each in built(overlay).objects.values() if each["apiVersion"] == "ray.io/v1")
    assert refusals(top) == []


def test_the_network_policy_is_valid() -> None:
    """A RayCluster may hold rules of the same form, so its CRD has Kubernetes' schema of them."""
    rules = built("cluster").one("NetworkPolicy")["spec"]["ingress"]
    place = {"spec": {"networkPolicy": {"head": {"ingressRules": rules}}}}
    errors = [error.message for error in crd("RayCluster").iter_errors(place) if "ingressRules" in error.json_path]
    assert errors == []
    del rules[0]["from"]
    rules[1]["form"] = []
    assert [error for error in crd("RayCluster").iter_errors(place) if "'form' was unexpected" in error.message]


@pytest.mark.parametrize(
    "path",
    ["minReplica", "template.spec.containers.0.securityContext.readOnlyFilesystem", "template.spec.volumes.0.emptydir"],
)
def test_a_misspelt_field_is_found(path: str) -> None:
    """CRDs drop what they do not know, so a typo would be a setting that is not set."""
    made = built("cluster")
    place: Any = groups(made)["rollout"]
    *above, last = path.split(".")
    for part in above:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = {}
    assert [line for line in refusals(made.one("RayCluster")) if f"'{last}' was unexpected" in line]


@every_overlay
def test_the_operators_rules(overlay: str) -> None:
    """What KubeRay refuses beyond its schema (ray-operator/controllers/ray/utils/validation.go)."""
    made = built(overlay)
    spec = cluster(made)
    assert spec["rayVersion"] == constraint("ray")
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"  # with which label selectors start pods
    assert all(pod["spec"]["restartPolicy"] == "Never" for pod in pods(made))  # v2 refuses others
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert "labels" not in group["rayStartParams"]
    if overlay != "cluster":
        job = made.one("RayJob")["spec"]
        assert job["submissionMode"] == "HTTPMode"
        assert job["backoffLimit"] > 0
        assert "clusterSelector" not in job  # a retry would delete the cluster that is selected
        assert job["shutdownAfterJobFinishes"]
        assert set(yaml.safe_load(job["runtimeEnvYAML"])) == {"env_vars"}  # packages come from the image


# --- the files and what kustomize makes of them


def test_every_file_is_used() -> None:
    used = set().union(*(built(overlay).files for overlay in OVERLAYS))
    assert used == {path for path in KUBERAY.rglob("*") if path.is_file()}
    assert sorted(path.name for path in (KUBERAY / "overlays").iterdir()) == OVERLAYS


@every_overlay
def test_kustomize_builds_the_same(overlay: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here")
    command = [kubectl, "kustomize", str(KUBERAY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    printed = list(yaml.safe_load_all(done.stdout))
    assert {(each["kind"], each["metadata"]["name"]): each for each in printed} == built(overlay).objects


def test_no_secret_is_here() -> None:
    """The token is made by hand, by a command that docs/cluster.md has, under the name that clusters ask for."""
    made = built("cluster")
    assert not [key for key in made.objects if key[0] == "Secret"]
    name = cluster(made)["authOptions"]["secretName"]
    assert cluster(made)["authOptions"]["mode"] == "token"
    page = (ROOT / "docs/cluster.md").read_text()
    assert f"kubectl -n diffpo create secret generic {name} --from-literal=auth_token=" in page


@every_overlay
def test_names_lead_somewhere(overlay: str) -> None:
    made = built(overlay)
    for pod in pods(made):
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in made.objects
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        assert {each["name"] for each in container(pod)["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made.objects
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in made.objects
    head = {each["name"] for each in next(pods(made))["spec"]["volumes"]}
    assert {each["name"] for each in cluster(made)["autoscalerOptions"]["volumeMounts"]} <= head
    spaces = {each["metadata"].get("namespace") for key, each in made.objects.items() if key[0] != "Namespace"}
    assert spaces == {made.one("Namespace")["metadata"]["name"]}


# --- security


@every_overlay
def test_nothing_is_root(overlay: str) -> None:
    """Each pod and container as the `restricted` standard asks, which the namespace enforces, and read-only besides."""
    made = built(overlay)
    assert made.one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [container(pod)["securityContext"] for pod in pods(made)]
    for context in (*contexts, cluster(made)["autoscalerOptions"]["securityContext"]):
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    for pod in pods(made):
        user = pod["spec"]["securityContext"]
        assert user["runAsNonRoot"]
        assert f"USER {user['runAsUser']}:{user['runAsGroup']}\n" in dockerfile
        mounts = {each["mountPath"]: each for each in container(pod)["volumeMounts"]}
        assert all(not mounts[path].get("readOnly") for path in ("/tmp", "/home/diffpo", "/data"))


@every_overlay
def test_only_the_head_speaks_to_kubernetes(overlay: str) -> None:
    made = built(overlay)
    head, *workers = pods(made)
    assert head["spec"]["serviceAccountName"] == "diffpo-head"
    for pod in workers:
        assert pod["spec"]["serviceAccountName"] == "diffpo-worker"
        assert pod["spec"]["automountServiceAccountToken"] is False


@every_overlay
def test_images_are_pinned(overlay: str) -> None:
    """To this version of the package and a target of the Dockerfile."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    targets = re.findall(r"^FROM runtime AS (\w+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(built(overlay)):
        name, tag = container(pod)["image"].rsplit(":", 1)
        assert name == "diffpo"
        assert tag in {f"{version}-{target}" for target in targets}
        needs_gpu = "nvidia.com/gpu" in container(pod)["resources"]["limits"]
        assert tag.endswith("-cuda") == needs_gpu


@every_overlay
def test_who_reaches_what(overlay: str) -> None:
    """The policy and the monitor select every pod; Prometheus gets the ports that the monitor names and no others; GCS
    and the Ray client are for the cluster's own pods."""
    made = built(overlay)
    policy, monitor = made.one("NetworkPolicy")["spec"], made.one("PodMonitor")["spec"]
    for pod in pods(made):
        for selector in (policy["podSelector"], monitor["selector"]):
            assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    own, dashboard, prometheus = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    head, *workers = (ports(pod) for pod in pods(made))
    assert [each["port"] for each in dashboard["ports"]] == [head["dashboard"]]
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == PROMETHEUS_PORTS
    assert [each["port"] for each in prometheus["ports"]] == [head[name] for name in PROMETHEUS_PORTS]
    for worker in workers:
        assert worker == {name: head[name] for name in ("metrics", "diffpo")}
    for rule in (dashboard, prometheus):
        assert all(each.get("podSelector", {}).get("matchLabels") for each in rule["from"])


# --- the run, and what its pods have


@every_overlay
def test_the_exporter_is_where_it_is_looked_for(overlay: str, tmp_path: Path) -> None:
    made = built(overlay)
    metrics = run_config(made, tmp_path).metrics
    assert metrics.host == "0.0.0.0"
    assert all(ports(pod)["diffpo"] == metrics.port for pod in pods(made))
    assert not 10002 <= metrics.port <= 19999  # of which Ray takes ports for its workers


def test_only_here_is_the_exporter_open() -> None:
    for path in (ROOT / "deploy/configs").glob("*.yaml"):
        assert load_config(path).metrics.host == MetricsConfig().host == "127.0.0.1"


@pytest.mark.parametrize(("folder", "shipped"), RUNS.items())
def test_the_run_is_the_shipped_one(folder: str, shipped: str) -> None:
    """`diffpo train --dry-run` takes it, and it differs from deploy/configs only in what concerns the place."""
    path = KUBERAY / folder / "run.yaml"
    answer = CliRunner().invoke(app, ["train", "--config", str(path), "--dry-run"])
    assert answer.exit_code == 0, answer.output
    here, there = (load_config(each).model_dump(mode="json") for each in (path, ROOT / "deploy/configs" / shipped))
    for tree in (here, there):
        del tree["metrics"], tree["run"]["root"], tree["run"]["capacity_timeout"]
        for key in ("actors", "min_actors", "max_actors", "cpus", "labels"):
            del tree["rollout"][key]
        del tree["learner"]["cpus"], tree["learner"]["labels"]
        for section, key in (("model", "path"), ("task", "data"), ("task", "test_data")):
            tree[section][key] = Path(str(tree[section].get(key))).name
    assert here == there


@every_overlay
def test_the_job_reads_the_configuration(overlay: str, tmp_path: Path) -> None:
    """On the head, where drivers run; and the run directory is on the claim, so that a new attempt finds it."""
    made = built(overlay)
    head = next(pods(made))
    mounts = {each["name"]: each["mountPath"] for each in container(head)["volumeMounts"]}
    config = run_config(made, tmp_path)
    if overlay != "cluster":
        entry = made.one("RayJob")["spec"]["entrypoint"]
        assert entry == f"python -m learner train --config {mounts['run']}/run.yaml"
    assert Path(config.run.root).is_relative_to(mounts["data"])
    if config.model.path is not None:
        assert Path(config.model.path).is_relative_to(mounts["data"])


@every_overlay
def test_groups_hold_what_the_run_asks_for(overlay: str, tmp_path: Path) -> None:
    """The learner's pods all ranks, each rollout pod one actor and no second; rollout and rewards start from none."""
    made = built(overlay)
    config, group = run_config(made, tmp_path), groups(made)
    assert set(group) == {"learner", "rollout", "rewards"}
    labels = {"learner": config.learner.labels, "rollout": config.rollout.labels, "rewards": {"gpu": "none"}}
    assert {name: each["labels"] for name, each in group.items()} == labels
    assert group["learner"]["replicas"] == group["learner"]["minReplicas"] == group["learner"]["maxReplicas"]
    for name in ("rollout", "rewards"):
        assert group[name]["minReplicas"] == 0
        assert "replicas" not in group[name]  # applied again, it would undo what the autoscaler did
    assert group["rollout"]["maxReplicas"] == config.rollout.max_actors
    for each in group.values():
        resources = container(each["template"])["resources"]
        assert resources["requests"] == resources["limits"]
    has = {name: container(each["template"])["resources"]["limits"] for name, each in group.items()}
    gpus = {name: int(each.get("nvidia.com/gpu", 0)) for name, each in has.items()}
    cpus = {name: int(each["cpu"]) for name, each in has.items()}
    assert (cpus["rollout"], gpus["rollout"]) == (config.rollout.cpus, config.rollout.gpus)
    ranks = config.learner.ranks
    assert cpus["learner"] * group["learner"]["replicas"] >= ranks * config.learner.cpus
    assert gpus["learner"] * group["learner"]["replicas"] == ranks * config.learner.gpus
    assert gpus["rewards"] == 0
    for each in group.values():
        assert each["template"]["spec"]["terminationGracePeriodSeconds"] > config.rollout.drain_seconds
    assert cluster(made)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


# --- what Ray's own autoscaler makes of it


def started(made: Build, demands: list[tuple[Demand, int]]) -> tuple[dict[str, int], int]:
    """Pods by group that Ray's autoscaler starts in an empty cluster, and how many demands it cannot meet."""
    resource = {"metadata": {"name": "diffpo", "namespace": "diffpo"}, "spec": cluster(made)}
    raw = _derive_autoscaling_config_from_ray_cr(resource)
    known = AutoscalingConfig(raw, skip_content_hash=True)
    wanted = [
        ResourceRequestUtil.make(
            {"CPU": demand.cpus, "GPU": demand.gpus} if demand.gpus else {"CPU": demand.cpus},
            label_selectors=[[(key, LABEL_OPERATOR_IN, [value]) for key, value in demand.labels.items()]],
        )
        for demand, count in demands
        for _ in range(count)
    ]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=known.get_node_type_configs(),
        max_num_nodes=known.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(wanted),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch}, len(reply.infeasible_resource_requests)


@every_overlay
def test_the_autoscaler_starts_what_the_run_waits_for(overlay: str, tmp_path: Path) -> None:
    """Ray's autoscaler v2 on these groups: a pod for each rollout actor up to the maximum, reward pods by their label,
    nothing for who asks in vain, and the learner always."""
    made = built(overlay)
    config = run_config(made, tmp_path)
    rollout, ranks = Demand.of(config.rollout), (Demand.of(config.learner), config.learner.ranks)
    most = config.rollout.max_actors or 0
    assert started(made, []) == ({"learner": 1}, 0)
    assert started(made, [ranks]) == ({"learner": 1}, 0)
    assert started(made, [ranks, (rollout, 3)]) == ({"learner": 1, "rollout": 3}, 0)
    assert started(made, [(rollout, most + 2)]) == ({"learner": 1, "rollout": most}, 2)
    assert started(made, [(Demand(1, labels={"gpu": "none"}), 3)]) == ({"learner": 1, "rewards": 2}, 0)
    assert started(made, [(Demand(1, labels={"gpu": "elsewhere"}), 1)]) == ({"learner": 1}, 1)
