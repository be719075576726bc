"""deploy/kuberay: valid for KubeRay, names and ports of one file are known to the others, nothing is root."""

import re
import shutil
import subprocess
import tomllib
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_fixtures import KUBERAY, OVERLAYS, ROOT, built, cluster, container, every_overlay, groups, pods, ports

SCHEMAS = ROOT.parent / "shared" / "schemas"
PROMETHEUS_PORTS = ["metrics", "as-metrics", "dash-metrics", "diffpo"]


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


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")
def test_the_rules_become_objects_of_the_operator() -> None:
    """By the command that docs/cluster.md has, here without its last part."""
    page = (ROOT / "docs/cluster.md").read_text()
    [command] = re.findall(r"```bash\n(for rules in .*?)\| kubectl apply -f -\n```", page, re.DOTALL)
    done = subprocess.run(["bash", "-ec", command], cwd=ROOT, capture_output=True, text=True, check=True)
    found = [one for one in yaml.safe_load_all(done.stdout) if one]
    monitor = yaml.safe_load((KUBERAY / "components/monitor/pod-monitor.yaml").read_text())
    for each, file in zip(found, ("recording.yml", "alerts.yml"), strict=True):
        assert each["spec"] == yaml.safe_load((ROOT / "deploy/prometheus" / file).read_text())
        assert each["metadata"]["labels"] == monitor["metadata"]["labels"]
    assert {(each["kind"], each["metadata"]["namespace"]) for each in found} == {("PrometheusRule", "diffpo")}


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


@pytest.mark.parametrize("overlay", [each for each in OVERLAYS if each != "trial"])  # which does without Prometheus
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
