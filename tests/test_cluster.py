"""A run on a cluster of several nodes: placed by labels, waiting for nodes and saying so, scaled, drained, bereft."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import state as cluster_state
from ray.cluster_utils import Cluster
from run_fixtures import ENDLESS, ROOT, command, rows, wait_for_step

from learner.capacity import NODE_SECONDS
from learner.ray_connection import _bind

pytestmark = pytest.mark.slow
PATIENCE = 90.0
PREEMPTION = 2  # a reason of Ray's protocol for draining a node


class Nodes:
    """A head that nothing fits on, and what is added to it."""

    def __init__(self) -> None:
        _bind(loopback=False)  # a local Ray of tests before would keep nodes apart
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.address = self._cluster.address
        ray.init(address=self.address, namespace="watcher", log_to_driver=False, configure_logging=False)

    def add(self, label: str, cpus: int = 1) -> Any:
        return self._cluster.add_node(num_cpus=cpus, labels={"gpu": label})

    def kill(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(
            node.node_id, PREEMPTION, "taken away by a test", deadline
        )
        assert accepted, why

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


def lives_on(actor_class: str) -> set[str]:
    """Ids of the nodes on which living actors of a class are."""
    table = cluster_state.actor_table(None, None, None)
    alive = [one for one in table.values() if one["State"] == "ALIVE" and one["ActorClassName"] == actor_class]
    return {one["Address"]["NodeID"] for one in alive}


def asked(name: str, *arguments: str) -> str:
    """What a command that talks to the run answers."""
    done = subprocess.run(
        [sys.executable, "-m", "learner", name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_json(answer: str) -> dict[str, Any]:
    """Of the last line: Ray tells every process of a node that died."""
    return json.loads(answer.splitlines()[-1])


def until(what: Callable[[], bool], process: subprocess.Popen[str], why: str) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{why}: {process.communicate()[0][-3000:]}")
        time.sleep(0.3)


def test_a_run_lives_through_what_a_cluster_does(nodes: Nodes, tmp_path: Path) -> None:
    """Rollout on one node, the learner on another; a third is added, one drained, one killed; nothing is lost."""
    run = tmp_path / "run"
    given = ["learner.labels.gpu=learner", "rollout.labels.gpu=inference", "run.stall_timeout=30"]
    process = subprocess.Popen(
        command("sudoku", tmp_path, ENDLESS, "evaluation.drift_every=0", *given),
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": nodes.address},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def status() -> dict[str, Any]:
        return as_json(asked("status", str(run), "--json"))

    until((run / "controller.json").is_file, process, "no controller")
    until(lambda: "learner" in status()["learner"], process, "no learner asked for")
    learner = "waits for a node labelled gpu=learner: none of the 1 nodes is (labels there: none)"
    until(lambda: status()["learner"]["learner"] == learner, process, "the learner's wait is not told")
    time.sleep(2 * NODE_SECONDS + 1)  # a wait that lasts is told in the run's output too
    home = nodes.add("learner")
    until(lambda: status()["phase"] == "train", process, "the learner was not placed")
    rollout = "waits for a node labelled gpu=inference: none of the 2 nodes is (labels there: gpu=learner)"
    until(lambda: list(status()["rollout_actors"].values()) == [rollout], process, "the actor's wait is not told")
    assert "rollout-0.0: waits for a node labelled gpu=inference" in asked("status", str(run))

    first = nodes.add("inference")
    wait_for_step(process, run, 2)
    assert (lives_on("LearnerActor"), lives_on("RolloutActor")) == ({home.node_id}, {first.node_id})

    second = nodes.add("inference", cpus=2)
    assert "1 -> 2" in asked("scale", str(run), "--actors", "2")
    until(lambda: lives_on("RolloutActor") == {first.node_id, second.node_id}, process, "not on the third node")
    wait_for_step(process, run, len(rows(run)) + 2)

    nodes.drain(first, 20.0)
    until(lambda: lives_on("RolloutActor") == {second.node_id}, process, "the drained node is not left")
    wait_for_step(process, run, len(rows(run)) + 2)
    until(lambda: list(status()["rollout_actors"].values()) == ["working"] * 2, process, "no other came")
    nodes.kill(first)

    nodes.kill(second)
    until(lambda: "labelled gpu=inference" in str(status()["rollout_actors"]), process, "the loss is not told")
    third = nodes.add("inference", cpus=2)
    wait_for_step(process, run, len(rows(run)) + 2)
    assert lives_on("RolloutActor") == {third.node_id}

    assert re.search("stopped|ended", asked("stop", str(run)))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "warning: waiting for nodes: the learner waits for a node labelled gpu=learner" in output
    assert "warning: all have their nodes now" in output
    steps = [row["learner_steps"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1)), "the learner never went back"
    manifest = json.loads((run / "checkpoints" / f"step-{int(steps[-1]):06d}" / "manifest.json").read_text())
    counters = manifest["facts"]["counters"]
    assert counters["lost_groups"] == counters["violations"] == counters["rewound_groups"] == 0


def test_rewards_are_scored_on_nodes_of_their_own_and_survive_their_death(nodes: Nodes, tmp_path: Path) -> None:
    """A run whose rewards want other nodes waits for one, scores there, and loses nothing when a reward actor dies."""
    run = tmp_path / "run"
    nodes.add("both", cpus=2)
    given = ["rollout.labels.gpu=both", "learner.labels.gpu=both", "rollout.reward_labels.gpu=none"]
    process = subprocess.Popen(
        command("sudoku", tmp_path, ENDLESS, "evaluation.drift_every=0", "rollout.reward_cpus=1", *given),
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": nodes.address},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until((run / "controller.json").is_file, process, "no controller")
    why = "rollout actors: each waits for a node labelled gpu=none"
    until(lambda: why in as_json(asked("status", str(run), "--json"))["waiting_for_nodes"], process, "no wait is told")
    assert rows(run) == [], "nothing is trained before there is a node for rewards"
    first = nodes.add("none")
    wait_for_step(process, run, 2)
    assert lives_on("RewardActor") == {first.node_id}
    second = nodes.add("none")
    nodes.kill(first)
    until(lambda: lives_on("RewardActor") == {second.node_id}, process, "rewards did not move")
    wait_for_step(process, run, len(rows(run)) + 3)
    assert re.search("stopped|ended", asked("stop", str(run)))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (run / "quarantine.json").exists(), "a reward actor's death is nobody's fault"
    assert [row["learner_steps"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
