"""The runs of deploy/kuberay: shipped configurations, in pods that hold them, started by Ray's own autoscaler."""

from pathlib import Path

import pytest
from kustomize_fixtures import Build
from manifest_fixtures import KUBERAY, ROOT, built, cluster, container, every_overlay, groups, pods, ports, run_config
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN
from typer.testing import CliRunner

from actors.fleet import NODE_MARGIN_SECONDS
from actors.placement import Demand
from actors.reward_actor import reward_demand
from common.config import MetricsConfig
from common.config_file import load_config
from learner.cli import app

RUNS = {"base": "sudoku.yaml", "components/gpu": "llada_8b.yaml"}  # and the shipped configuration that each follows


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
        for key in ("actors", "min_actors", "max_actors", "cpus", "labels", "reward_cpus", "reward_labels"):
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
        given = {one["name"]: one["value"] for one in container(each["template"])["env"]}
        drain = float(given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        grace = each["template"]["spec"]["terminationGracePeriodSeconds"]
        assert config.rollout.drain_seconds + NODE_MARGIN_SECONDS < drain < grace
    assert cluster(made)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


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
    pods, unmet = started(made, [(rollout, most), (reward_demand(config.rollout), most)])
    assert (pods["rollout"], unmet) == (most, 0), (
        "every rollout actor has its rewards, up to the most that there may be"
    )
    assert started(made, [(Demand(1, labels={"gpu": "elsewhere"}), 1)]) == ({"learner": 1}, 1)
