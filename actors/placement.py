"""Placement: what an actor asks of a node, and why it has none yet.

Who has no node waits in Ray's queue, where Ray's autoscaler, if the cluster has one, sees what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class _Reserves(Protocol):
    """A section of the configuration that says what actors of its kind ask for."""

    cpus: float
    gpus: float
    labels: dict[str, str]


@dataclass(frozen=True)
class Demand:
    """Of one actor."""

    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray node labels that its node must have."""

    @classmethod
    def of(cls, section: _Reserves) -> "Demand":
        return cls(section.cpus, section.gpus, section.labels)

    def options(self) -> dict[str, Any]:
        """Of Ray's `options`."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": dict(self.labels)}

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"] + ([f"{self.gpus:g} GPUs"] if self.gpus else [])
        return ", ".join(parts) + (f" on a node labelled {_shown(self.labels)}" if self.labels else "")


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    labels: Mapping[str, str]
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float

    def room(self, demand: Demand) -> int:
        """How many actors it could hold, were it empty."""
        if not demand.labels.items() <= self.labels.items():
            return 0
        shares = [have / want for have, want in ((self.cpus, demand.cpus), (self.gpus, demand.gpus)) if want]
        return int(min(shares, default=0))


def why_pending(demand: Demand, nodes: Sequence[Node]) -> str:
    """Why an actor that asks for `demand` has no node, as far as the nodes that are there tell; empty where one has
    room for it, and it is being placed."""
    labelled = [node for node in nodes if demand.labels.items() <= node.labels.items()]
    if not labelled:
        return f"waits for a node labelled {_shown(demand.labels)}: none of the {len(nodes)} nodes is ({_known(nodes)})"
    where = f"of the {len(labelled)} nodes labelled {_shown(demand.labels)}" if demand.labels else "of all nodes"
    large = [node for node in labelled if node.cpus >= demand.cpus and node.gpus >= demand.gpus]
    if not large:
        most = f"{max(node.cpus for node in labelled):g} CPUs, {max(node.gpus for node in labelled):g} GPUs"
        return f"waits for {demand}: the largest {where} has {most}"
    if any(node.free_cpus >= demand.cpus and node.free_gpus >= demand.gpus for node in large):
        return ""
    free = f"{max(node.free_cpus for node in large):g} CPUs, {max(node.free_gpus for node in large):g} GPUs"
    return f"waits for {demand}: at most {free} are free on one {where}"


def _shown(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _known(nodes: Sequence[Node]) -> str:
    own = {
        _shown({key: value for key, value in node.labels.items() if not key.startswith("ray.io/")}) for node in nodes
    }
    return f"labels there: {'; '.join(sorted(own - {''})) or 'none'}"
