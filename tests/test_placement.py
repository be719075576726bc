"""Placement: what an actor asks of Ray, and the reason that is told while it has no node."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import Demand, Node, why_pending
from common.config import LearnerConfig, RolloutConfig
from common.config_file import load_config
from common.errors import UserError

GPU = {"gpu": "inference"}


def node(labels: dict[str, str] | None = None, *, cpus: float = 8, free: float = 8, gpus: float = 0) -> Node:
    return Node({"ray.io/node-id": "00ff", **(labels or {})}, cpus, gpus, free, gpus)


@pytest.mark.parametrize(
    ("demand", "nodes", "said"),
    [
        (
            Demand(1, labels=GPU),
            [node(), node({"gpu": "learner"})],
            "none of the 2 nodes is (labels there: gpu=learner)",
        ),
        (Demand(1, labels=GPU), [node()], "waits for a node labelled gpu=inference: none of the 1 nodes"),
        (Demand(1, 1, GPU), [node(GPU)], "the largest of the 1 nodes labelled gpu=inference has 8 CPUs, 0 GPUs"),
        (Demand(16), [node(), node(cpus=4)], "waits for 16 CPUs: the largest of all nodes has 8 CPUs, 0 GPUs"),
        (Demand(2, 1), [node(free=1, gpus=4)], "waits for 2 CPUs, 1 GPUs: at most 1 CPUs, 4 GPUs are free"),
        (Demand(2), [node(free=1), node(free=2)], ""),
    ],
)
def test_the_reason_names_what_is_missing(demand: Demand, nodes: list[Node], said: str) -> None:
    found = why_pending(demand, nodes)
    assert said in found
    assert bool(said) == bool(found)


def test_rays_own_labels_are_not_shown() -> None:
    assert "ray.io" not in why_pending(Demand(1, labels=GPU), [node()])


@given(st.floats(0.1, 64), st.floats(0, 8), st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy")))
def test_options_are_the_demand(cpus: float, gpus: float, labels: dict[str, str]) -> None:
    for section in (
        RolloutConfig(cpus=cpus, gpus=gpus, labels=labels),
        LearnerConfig(cpus=cpus, gpus=gpus, labels=labels),
    ):
        assert Demand.of(section).options() == {"num_cpus": cpus, "num_gpus": gpus, "label_selector": labels}


@pytest.mark.parametrize("given", ["rollout.labels.gpu=a b", "rollout.labels.gpu=-x", "learner.labels={'a b': c}"])
def test_what_is_no_label_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=re.escape(given.split("=")[0].split(".gpu")[0])):
        load_config(None, ["task.name=sudoku", given])


def test_bounds_hold_the_number_of_actors() -> None:
    with pytest.raises(UserError, match=r"actors=1 must lie between min_actors=2 and max_actors=4"):
        load_config(None, ["task.name=sudoku", "rollout.min_actors=2", "rollout.max_actors=4"])
