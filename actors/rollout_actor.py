"""RolloutActor: pulls leases, has them generated, hands the groups in.

One thread runs the loop; everything that arrives from elsewhere (replies of the buffer, rewards, stop) is an event in
one queue. While the producer has work the queue is emptied between two steps; when it has none, the loop sleeps on it.

- New weights are noticed on every reply, verified by digest, and adopted between two steps.
- No token is revealed with weights older than its lease's version: the reply that brings a lease brings the weights.
  Weights that arrive damaged are counted and fetched again; the actor keeps its old ones, and gives leases that need
  newer ones back.
- The buffer may die and come back: the actor tells it first which leases it holds, then makes its call again. Weights
  whose owner died are waited for like damaged ones.
- What the producer says is the data's fault is reported as that, and the loop goes on.
- A reply that is marked closed brought the last leases: the actor finishes what it has and ends, once the buffer has
  answered for every group: an actor that is gone loses its leases, those of groups under way to their file too.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError

from actors.failure import comes_back
from actors.producer import Fault, MakeProducer
from common.histogram import Histogram
from common.lease import FinishedGroup, Lease, LeaseReply, RenewReply, SubmitReply
from common.weight_store import Snapshot, digest

RENEWALS_PER_LEASE = 3
FETCHES = 3  # of one version's weights in a row, while they arrive damaged
DAMAGED_SECONDS = 1.0  # before the next try after that
LOST_SECONDS = 30.0  # at most, while the learner that has them is gone
RETRY_SECONDS = 0.2  # after which a call that found the buffer dead is made again

log = logging.getLogger(__name__)


class RolloutActor:
    """Started by the fleet, runs until the buffer closes or it is stopped; its death costs its leases nothing."""

    def __init__(self, *, name: str, buffer: Any, make: MakeProducer) -> None:
        self.name = name
        self._buffer = buffer
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._producer = make(name, lambda: self._events.put(lambda: None))
        self._leases: dict[tuple[int, int], Lease] = {}
        self._unanswered: dict[tuple[int, int], Lease] = {}  # handed in, and maybe not in a file yet
        self._since: dict[tuple[int, int], float] = {}
        self._longest = self._pause = 0.0
        self._group_seconds = Histogram("rollout_group_seconds")
        self._adopt_seconds = Histogram("weights_adopt_seconds")
        self._asking = False
        self._ending = self._stopped = False
        self._renewed = self._patient_until = time.monotonic()
        self._patience = DAMAGED_SECONDS
        self._damaged = 0
        self._base = ""  # digest of the frozen weights that its producer has

    def run(self) -> None:
        """Called once by the fleet: the whole life of the actor."""
        try:
            while not self._done():
                self._ask_for_leases()
                self._handle_events()
                busy = time.monotonic()
                self._hand_in(self._producer.step())
                self._pause = max(self._pause, time.monotonic() - busy)
                self._renew()
        finally:
            self._producer.close()

    def stop(self) -> None:
        """Called by the fleet, from another thread: end the loop at once; leases go back by `return_worker`."""
        self._events.put(self._abandon)

    def drain(self) -> None:
        """Called by the fleet, from another thread: end once the leases that it has are done."""
        self._events.put(self._retire)

    def node(self) -> str:
        """Called by the fleet, from another thread: the id of the node that it lives on."""
        return ray.get_runtime_context().get_node_id()

    def gauges(self) -> dict[str, float]:
        """Called by the fleet, from another thread: counters of this actor."""
        return self._producer.gauges() | {
            "version": float(self._producer.version),
            "damaged_weights": float(self._damaged),
            "longest_group_seconds": self._longest,
            "longest_pause_seconds": self._pause,
            **self._group_seconds.values(),
            **self._adopt_seconds.values(),
        }

    def _abandon(self) -> None:
        self._ending = self._stopped = True
        for held in (self._leases, self._since, self._unanswered):
            held.clear()

    def _retire(self) -> None:
        self._ending = True

    def _done(self) -> bool:
        return self._ending and not self._leases and not self._unanswered

    def _handle_events(self) -> None:
        """All that has arrived; sleeps only while there is nothing to do, and never past a renewal."""
        wait = self._wait()
        try:
            while True:
                self._events.get(block=wait != 0, timeout=wait)()
                wait = 0.0
        except Empty:
            return

    def _wait(self) -> float | None:
        """Seconds for which only an event can bring work; None is for ever."""
        if self._done():
            return 0.0
        now, waits = time.monotonic(), [self._producer.rest()]
        if self._leases or self._unanswered:
            waits.append(max(0.0, self._renewed + self._renewal_seconds() - now))
        if self._patient_until > now:
            waits.append(self._patient_until - now)
        return min((wait for wait in waits if wait is not None), default=None)

    def _call(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Turn the reply of a buffer call into an event; a failed call ends the loop with its error.

        A call that a dead buffer did not answer is made again once the buffer, started anew, knows our leases.
        """

        def handle(future: Any) -> None:
            try:
                reply = future.result()
            except ActorUnavailableError as error:
                if not comes_back(error):
                    raise
                again = threading.Timer(RETRY_SECONDS, lambda: self._events.put(lambda: self._reattach(call, then)))
                again.daemon = True
                again.start()
                return
            then(reply)

        call().future().add_done_callback(lambda future: self._events.put(lambda: handle(future)))

    def _reattach(self, call: Callable[[], Any], then: Callable[[Any], None]) -> None:
        if self._stopped:
            return
        held = [*self._leases, *self._unanswered]
        self._call(lambda: self._buffer.reattach.remote(self.name, held), lambda _: self._call(call, then))

    # -- leases -------------------------------------------------------------------------------------------------

    def _ask_for_leases(self) -> None:
        want = self._producer.room
        if want < 1 or self._asking or self._ending or time.monotonic() < self._patient_until:
            return
        self._asking = True
        self._call(lambda: self._buffer.lease.remote(self.name, want), self._leased)

    def _leased(self, reply: LeaseReply) -> None:
        self._asking = False
        if self._stopped:  # while it asked: what was granted goes back with the rest
            return
        self._ending = self._ending or reply.closed
        self._adopt(reply.snapshot)
        for lease in reply.leases:
            if lease.version > self._producer.version:
                self._give_back(lease, f"weights of version {lease.version} are damaged or lost", data=False)
                continue
            now = time.monotonic()
            if not self._leases:
                self._renewed = now
            self._leases[lease.number, lease.attempt] = lease
            self._since[lease.number, lease.attempt] = now
            self._producer.start(lease)

    def _renewal_seconds(self) -> float:
        leases = (self._leases | self._unanswered).values()
        return min(lease.seconds for lease in leases) / RENEWALS_PER_LEASE

    def _renew(self) -> None:
        now, held = time.monotonic(), [*self._leases, *self._unanswered]
        if held and now - self._renewed >= self._renewal_seconds():
            self._renewed = now
            self._call(lambda: self._buffer.renew.remote(self.name, held), self._renewal)

    def _renewal(self, reply: RenewReply) -> None:
        self._adopt(reply.snapshot)
        for key in [key for key in self._leases if key in reply.lost]:
            del self._since[key]
            self._producer.drop(self._leases.pop(key))

    def _give_back(self, lease: Lease | Fault, reason: str, *, data: bool) -> None:
        key = (lease.number, lease.attempt)
        self._call(lambda: self._buffer.fail.remote(self.name, *key, reason, data), lambda _: None)

    # -- weights ------------------------------------------------------------------------------------------------

    def _adopt(self, snapshot: Snapshot) -> None:
        if snapshot.version <= self._producer.version:
            return
        started, payload = time.monotonic(), cast(list[Any], snapshot.payload)
        for _ in range(FETCHES):
            try:
                flat: Any = ray.get(payload[0])
                base: Any = ray.get(payload[1]) if snapshot.base != self._base else None
            except ObjectLostError:  # the learner that owned them died; the next one publishes anew
                if (now := time.monotonic()) >= self._patient_until:
                    self._patient_until = now + self._patience
                    self._patience = min(2 * self._patience, LOST_SECONDS)
                return
            if digest(flat) == snapshot.digest and (base is None or digest(*base) == snapshot.base):
                if base is not None:
                    self._producer.adopt_base(base)
                    self._base = snapshot.base
                self._producer.adopt(flat, snapshot)
                self._patience, self._patient_until = DAMAGED_SECONDS, time.monotonic()
                self._adopt_seconds.observe(time.monotonic() - started)
                return
            self._damaged += 1
        log.warning(
            "weights of version %d arrived %d times with another digest than was published; generating with version "
            "%d, next try in %g s",
            snapshot.version,
            FETCHES,
            self._producer.version,
            DAMAGED_SECONDS,
        )
        self._patient_until = time.monotonic() + DAMAGED_SECONDS

    # -- groups -------------------------------------------------------------------------------------------------

    def _hand_in(self, ended: list[FinishedGroup | Fault]) -> None:
        """Report what ended, unless its lease was lost meanwhile."""
        finished: dict[tuple[int, int], FinishedGroup] = {}
        for outcome in ended:
            key = (outcome.number, outcome.attempt)
            if key not in self._leases:
                continue
            lease = self._leases.pop(key)
            seconds = time.monotonic() - self._since.pop(key)
            self._longest = max(self._longest, seconds)
            self._group_seconds.observe(seconds)
            if isinstance(outcome, Fault):
                self._give_back(outcome, outcome.reason, data=True)
            else:
                finished[key], self._unanswered[key] = outcome, lease
        if finished:
            groups = list(finished.values())
            self._call(
                lambda: self._buffer.submit.remote(self.name, groups),
                lambda reply: self._submitted(list(finished), reply),
            )

    def _submitted(self, keys: list[tuple[int, int]], reply: SubmitReply) -> None:
        for key in keys:
            self._unanswered.pop(key, None)
        self._adopt(reply.snapshot)
