"""Cluster state: what Ray says of its nodes, and of actors that have none.

Ray has no public calls for some of this; its own libraries use those that are used here.
"""

import math
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import Demand, Node, why_pending


def draining_nodes() -> dict[str, float]:
    """Id -> deadline (Unix seconds) of every node that Ray drains. A deadline of 0 is none: the node goes when it is
    empty."""
    nodes = cluster_state.get_draining_nodes()
    return {node: deadline / 1000 if deadline else math.inf for node, deadline in nodes.items()}


def living_nodes() -> list[Node]:
    """The nodes of the cluster, with what is free on them."""
    free = cluster_state.available_resources_per_node()
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            total, rest = node["Resources"], free.get(node["NodeID"], {})
            room = [of.get(kind, 0.0) for of in (total, rest) for kind in ("CPU", "GPU")]
            found.append(Node(node["Labels"], *room))
    return found


def on_this_node() -> Any:
    """Scheduling strategy of what must live where the caller does, and never on a node that comes and goes."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def pending_of(actor_class: str) -> int:
    """How many actors of a class, of this job, wait for a node, their first or another."""
    job, count = ray.get_runtime_context().get_job_id(), 0
    for state in ("PENDING_CREATION", "RESTARTING"):
        table = cluster_state.actor_table(None, job_id=None, actor_state_name=state)
        mine = [one for one in table.values() if one["ActorClassName"] == actor_class and one["JobID"] == job]
        count += sum(not one["Address"]["Port"] for one in mine)
    return count


def pending(actors: list[Any]) -> list[bool]:
    """Whether each actor, by its handle, still waits for a node."""
    return [_pending(actor) for actor in actors]


def _pending(actor: Any) -> bool:
    known = cluster_state.actor_table(actor._actor_id.hex())
    return (
        bool(known) and known["State"] in ("DEPENDENCIES_UNREADY", "PENDING_CREATION") and not known["Address"]["Port"]
    )


def why_waiting(demand: Demand) -> str:
    """`why_pending` with the nodes as they are now."""
    return why_pending(demand, living_nodes())
