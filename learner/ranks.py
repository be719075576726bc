"""Ranks: the processes that train one model together, by `torch.distributed` and FSDP2.

    what                            on each rank
    weights, gradients, optimizer   a shard of every parameter; output head, threshold head and calibration whole
    batch                           all groups, for means and metrics; only its own share is scored
    gradient                        the mean over ranks of `count` times the own share's, so the whole batch's
    publication, checkpoint         every parameter is gathered in turn; rank 0 keeps it, in the buffer or file

- Everything here is called by all ranks in the same order. Alone (`count` 1) nothing is sharded or sent, and a step
  computes the very numbers of a learner without ranks.
- Whatever decides how many passes are made, or whether a batch is refused, is agreed on first. What is called another
  number of times by each rank is never sharded: the output head, once for each piece of logits.
- A rank that dies makes the others' calls fail, or time out; `learner.learner_ranks` ends them then.
"""

import copy
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from common.adapter import learned_state
from common.config import Config
from common.errors import UserError
from common.policy import Policy
from common.weights import local_part, sharded, whole

PATIENCE = 10.0  # of a rank that waits in a call for the others, as a multiple of `run.stall_timeout`
LOOPBACK = "127.0.0.1"
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Ranks:
    """One of them, as it sees the others."""

    def __init__(self, rank: int = 0, count: int = 1, mesh: Any = None) -> None:
        self.rank, self.count = rank, count
        self._mesh: Any = mesh

    @staticmethod
    def store(host: str, port: int, count: int) -> Any:
        """Where `count` ranks meet; port 0 opens one at this address, whose `port` the others are told."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]: documented

        listener = None
        if port == 0:  # torch's own would listen on all addresses
            server = socket.create_server((host, 0))
            port, listener = server.getsockname()[1], server.detach()
        return TCPStore(
            host, port, count, is_master=listener is not None, wait_for_workers=False, master_listen_fd=listener
        )

    @classmethod
    def join(cls, store: Any, rank: int, config: Config) -> Self:
        """Meet the others; returns when all are there. Each must make every call within `PATIENCE` stall timeouts.

        Raises:
            UserError: on a device that has no collective calls.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        count, kind = config.learner.ranks, torch.device(config.model.device).type
        if kind not in BACKENDS:
            raise UserError(f"learner.ranks={count} on model.device={config.model.device}; use cpu or cuda")
        if store.host == LOOPBACK:  # as a local Ray: gloo as well
            names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        patience = timedelta(seconds=PATIENCE * config.run.stall_timeout)
        dist.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=count, timeout=patience)
        return cls(rank, count, init_device_mesh(kind, (count,)))

    def leave(self) -> None:
        """The last call; waits for nobody."""
        if self._mesh is not None:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._mesh = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # -- weights ----------------------------------------------------------------------------------------------------

    def shard(self, policy: Policy) -> None:
        """Leave of the model's parameters this rank's shard, of the weights that rank 0 has; others' may be anything.

        The layers, and what surrounds them, are gathered and freed one after the other. The output head stays whole,
        also where the input shares its weights. The parameters may be on the CPU, whose memory is read and left as it
        is; the ranks' device gets one part of the model after the other.
        """
        if self.count == 1:
            return
        from torch.distributed.fsdp import fully_shard

        given = {name: value.detach() for name, value in policy.named_parameters()} if self.leads else {}
        given |= {name: value.detach() for name, value in policy.named_buffers()} if self.leads else {}
        model, head = policy.model, policy.model.get_output_embeddings()
        trunk = model.base_model
        kept = set(head.parameters()) if head is not None else set()
        names = set(model._no_split_modules or ())
        for layer in [part for part in trunk.modules() if type(part).__name__ in names]:
            fully_shard(layer, mesh=self._mesh, reshard_after_forward=True, ignored_params=kept)
        fully_shard(trunk, mesh=self._mesh, reshard_after_forward=True, ignored_params=kept)
        for name, value in [*policy.named_parameters(), *policy.named_buffers()]:
            if not sharded(value):
                value.data = value.data.to(self._mesh.device_type, copy=True)
            self.place(given.pop(name, None), value)

    def load(self, policy: Policy, state: dict[str, Tensor] | None) -> None:
        """Overwrite what learns by `learned_state` of a policy, which rank 0 alone is given.

        Raises:
            RuntimeError: when it is another policy's.
        """
        own = learned_state(policy)
        if state is not None:
            odd = [name for name in own.keys() | state.keys() if _shape(own, name) != _shape(state, name)]
            if odd:
                name = min(odd)
                raise RuntimeError(f"{name} has shape {_shape(state, name)} there, and {_shape(own, name)} here")
        for name, value in own.items():
            self.place(None if state is None else state[name], value)

    @torch.no_grad()
    def place(self, whole: Tensor | None, into: Tensor) -> None:
        """Copy rank 0's `whole` tensor into `into`, which is sharded, or whole on every rank."""
        if self.count == 1:
            if whole is None:
                raise RuntimeError("rank 0 has nothing to place")
            into.copy_(whole)
            return
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, distribute_tensor

        value = torch.empty(into.shape, dtype=into.dtype, device=into.device)
        if whole is not None:
            value.copy_(whole)
        dist.broadcast(value, src=0)
        if isinstance(into, DTensor):
            value = distribute_tensor(value, into.device_mesh, into.placements, src_data_rank=None)
        into.copy_(value)

    def kept(self, state: Any) -> Any:
        """A tree's tensors whole and copied to the CPU, one after the other; None in their place where not rank 0."""
        if isinstance(state, Tensor):
            value = whole(state.detach())
            return value.to("cpu", copy=True) if self.leads else None
        if isinstance(state, dict):
            return {key: self.kept(item) for key, item in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.kept(item) for item in state)
        return state

    def optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> dict[str, Any]:
        """What `optimizer.load_state_dict` takes on this rank, of what rank 0 was given: `kept` of a `state_dict`."""
        if self.count == 1:
            return state or {}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = {n: {k: v for k, v in one.items() if v.dim()} for n, one in state["state"].items()} if state else {}
        names = self.agreed({n: list(one) for n, one in moments.items()})
        rest = self.agreed(
            {
                "state": {n: {k: v for k, v in one.items() if not v.dim()} for n, one in state["state"].items()},
                "param_groups": state["param_groups"],
            }
            if state
            else None
        )
        for number, keys in names.items():
            for key in keys:
                own = torch.zeros_like(parameters[number])
                self.place(moments[number][key] if moments else None, own)
                rest["state"][number][key] = own
        return rest

    # -- one step ---------------------------------------------------------------------------------------------------

    def share(self, costs: Tensor) -> Tensor:
        """Which of `M` groups are this rank's, bool; shares cost about the same. The same on every rank."""
        loads = [0] * self.count
        owner = torch.zeros(len(costs), dtype=torch.int64, device=costs.device)
        for group in costs.argsort(descending=True, stable=True).tolist():
            least = loads.index(min(loads))
            owner[group] = least
            loads[least] += int(costs[group])
        return owner == self.rank

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.gathered(number))

    def sum(self, *numbers: float) -> list[float]:
        """Of each number, the sum over ranks; NaN if one is."""
        return [sum(column) for column in zip(*self.gathered(numbers), strict=True)]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in their order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def agreed(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gathered(value if self.leads else None)[0]

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Average what FSDP does not average, and scale all gradients so that their common norm is at most `limit`.

        Returns:
            The norm before.
        """
        if self.count == 1:
            return float(clip_grad_norm_(parameters, limit))
        import torch.distributed as dist

        squares: list[Tensor] = []
        total = 0.0
        gradients = []
        for parameter in parameters:
            if not sharded(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.count)
            if parameter.grad is None:
                continue
            local = local_part(parameter.grad)
            gradients.append(local)
            square = torch.linalg.vector_norm(local).double().square()
            if sharded(parameter):
                squares.append(square)
            else:
                total += float(square)
        own = float(torch.stack(squares).sum()) if squares else 0.0
        norm = (self.sum(own)[0] + total) ** 0.5
        scale = min(1.0, limit / (norm + 1e-6))  # as torch's
        for gradient in gradients:
            gradient.mul_(scale)
        return norm


def _shape(state: dict[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None


def cloned(state: Any) -> Any:
    """A tree with copies of its tensors, sharded as they are."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: cloned(item) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(cloned(item) for item in state)
    return copy.deepcopy(state)
