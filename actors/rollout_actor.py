"""RolloutActor: pulls leases, denoises, has the groups rewarded, hands them in.

One thread runs the loop; everything that arrives from elsewhere (replies of the buffer, rewards, stop) is an event in
one queue. While the engine has rows, the queue is emptied between two steps; when it has none, the loop sleeps on it.

- New weights are noticed on every reply, verified by digest, and adopted between two steps.
- No token is revealed with weights older than its lease's version: the reply that brings a lease brings the weights.
- A reward that fails, or logits that are no numbers, are the prompt's fault (`data`): reported, and the loop goes on.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import ray
import torch

from actors.engine import DenoisingEngine
from actors.group import finished_group, group_requests
from actors.request import Failure
from actors.reward_pool import RewardPool, Scores
from common.config import Config
from common.errors import RunError, UserError
from common.lease import FinishedGroup, Lease, LeaseReply, RenewReply, SubmitReply
from common.policy import open_policy
from common.tasks import build_task
from common.trajectory import Completion
from common.weight_store import Snapshot
from common.weights import digest

RENEWALS_PER_LEASE = 3


@dataclass
class _Group:
    """A leased group while it is generated."""

    lease: Lease
    completions: list[Completion | None]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.completions)


class RolloutActor:
    """Started by the fleet, runs until the buffer closes or it is stopped; its death costs its leases nothing."""

    def __init__(self, *, config: Config, name: str, buffer: Any) -> None:
        torch.set_num_threads(config.rollout.threads)
        self.config = config
        self.name = name
        self._buffer = buffer
        self._task = build_task(config.task)
        self._policy = open_policy(config, self._task).for_rollout(config.rollout)
        self._engine = DenoisingEngine.of(
            self._policy,
            config,
            rule=config.sampler.rule,
            slots=config.rollout.slots,
            fixed_padding=config.deterministic,
        )
        self._engine.version = -1
        self._rewards = RewardPool(
            config.task, workers=config.rollout.reward_workers, timeout=config.rollout.reward_timeout
        )
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # by (number, attempt): a lost lease may come back here while its old rows still run out
        self._groups: dict[tuple[int, int], _Group] = {}
        self._rows: dict[int, tuple[tuple[int, int], int]] = {}
        self._asking = False
        self._ending = False
        self._digest = ""
        self._renewed = time.monotonic()

    def run(self) -> None:
        """Called once by the fleet: the whole life of the actor."""
        try:
            while not (self._ending and not self._groups):
                self._ask_for_leases()
                self._handle_events()
                for handle, outcome in self._engine.step():
                    self._take(handle, outcome)
                self._renew()
        finally:
            self._rewards.close()

    def stop(self) -> None:
        """Called by the fleet, from another thread: end the loop at once; leases go back by `return_worker`."""
        self._events.put(self._abandon)

    def gauges(self) -> dict[str, float]:
        """Called by the fleet, from another thread: counters of this actor."""
        return {
            "row_forwards": float(self._engine.cost.row_forwards),
            "token_forwards": float(self._engine.cost.token_forwards),
            "probed_positions": float(self._engine.cost.probed_positions),
            "probed_kl": self._engine.cost.probed_kl,
            "probed_flips": float(self._engine.cost.probed_flips),
            "version": float(self._engine.version),
            "load": float(self._engine.load),
        }

    def _abandon(self) -> None:
        self._ending = True
        self._groups.clear()

    def _handle_events(self) -> None:
        """All that has arrived; sleeps only when there is nothing to denoise, and never past a renewal."""
        idle = self._engine.idle and not (self._ending and not self._groups)
        wait = self.config.replay.lease_seconds / RENEWALS_PER_LEASE if self._groups else None
        try:
            while True:
                self._events.get(block=idle, timeout=wait)()
                idle = False
        except Empty:
            return

    def _call(self, reference: Any, then: Callable[[Any], None]) -> None:
        """Turn the reply of a buffer call into an event; a failed call ends the loop with its error."""

        def arrived(future: Any) -> None:
            self._events.put(lambda: then(future.result()))

        reference.future().add_done_callback(arrived)

    # -- leases -------------------------------------------------------------------------------------------------

    def _ask_for_leases(self) -> None:
        want = (self.config.rollout.slots - self._engine.load) // self.config.learner.group_size
        if want < 1 or self._asking or self._ending:
            return
        self._asking = True
        self._call(self._buffer.lease.remote(self.name, want), self._leased)

    def _leased(self, reply: LeaseReply) -> None:
        self._asking = False
        self._ending = self._ending or reply.closed
        self._adopt(reply.snapshot)
        for lease in reply.leases:
            self._start(lease)

    def _start(self, lease: Lease) -> None:
        """Queue the completions of one lease; a prompt that cannot be served is the data's fault."""
        config = self.config
        try:
            example = self._task.example("train", lease.cursor)
            prompt = tuple(self._policy.encode(example.prompt))
            self._engine.check_prompt(prompt)
        except UserError as error:
            self._fail(lease, str(error))
            return
        key = (lease.number, lease.attempt)
        self._groups[key] = _Group(lease, [None] * config.learner.group_size)
        for index, request in enumerate(group_requests(config, prompt, cursor=lease.cursor, number=lease.number)):
            self._rows[self._engine.submit(request)] = (key, index)

    def _renew(self) -> None:
        now = time.monotonic()
        if self._groups and now - self._renewed > self.config.replay.lease_seconds / RENEWALS_PER_LEASE:
            self._renewed = now
            self._call(self._buffer.renew.remote(self.name, [number for number, _ in self._groups]), self._renewal)

    def _renewal(self, reply: RenewReply) -> None:
        self._adopt(reply.snapshot)
        for key in [key for key in self._groups if key[0] in reply.lost]:
            del self._groups[key]  # its rows run out unseen

    def _adopt(self, snapshot: Snapshot) -> None:
        if snapshot.version <= self._engine.version:
            return
        payload: Any = snapshot.payload
        flat: Any = ray.get(payload[0])
        if digest(flat) != snapshot.digest:
            raise RunError(f"weights of version {snapshot.version} arrived with another digest than was published")
        self._engine.adopt(flat, snapshot.version)
        self._digest = snapshot.digest

    # -- groups -------------------------------------------------------------------------------------------------

    def _take(self, handle: int, outcome: Completion | Failure) -> None:
        key, index = self._rows.pop(handle)
        group = self._groups.get(key)
        if group is None:
            return
        if isinstance(outcome, Failure):
            del self._groups[key]  # its other rows run out unseen
            self._fail(group.lease, outcome.reason)
            return
        group.completions[index] = outcome
        group.missing -= 1
        if group.missing == 0:
            self._score(group)

    def _score(self, group: _Group) -> None:
        texts = [self._policy.decode(c.completion_ids.tolist()) for c in group.completions if c is not None]

        def done(outcome: Scores | BaseException) -> None:
            self._events.put(lambda: self._scored(group, outcome))

        self._rewards.submit(group.lease.cursor, texts, done)

    def _scored(self, group: _Group, outcome: Scores | BaseException) -> None:
        lease = group.lease
        if self._groups.pop((lease.number, lease.attempt), None) is None:
            return
        if isinstance(outcome, BaseException):
            self._fail(lease, "".join(traceback.format_exception(outcome)))
            return
        self._call(self._buffer.submit.remote(self.name, [self._finished(group, outcome)]), self._submitted)

    def _fail(self, lease: Lease, reason: str) -> None:
        """Give a lease up through its own data's fault."""
        self._call(self._buffer.fail.remote(self.name, lease.number, lease.attempt, reason, True), lambda _: None)

    def _submitted(self, reply: SubmitReply) -> None:
        self._adopt(reply.snapshot)

    def _finished(self, group: _Group, scores: Scores) -> FinishedGroup:
        return finished_group(
            self.config,
            [c for c in group.completions if c is not None],
            scores,
            number=group.lease.number,
            cursor=group.lease.cursor,
            attempt=group.lease.attempt,
            worker=self.name,
            model_digest=self._digest,
        )
