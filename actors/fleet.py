"""Fleet: the rollout actors of a run; starts them, notices their deaths, starts them again, adds and drains some.

- An actor that dies (process, node) is infrastructure: its leases go back at once, a replacement starts, up to
  `rollout.max_restarts` deaths for each place. The preemption of its node is none of these deaths.
- An actor that the cluster has no node for waits, and the others work; `doing` says what it waits for.
- An actor that raises, also while it starts, is a defect or a mistake: its error ends the run.
- A place that is drained gets no further lease, finishes what it has, and ends; after `rollout.drain_seconds` its
  leases go back instead and its actor is killed, as is one that still waits for its resources. The learner and the
  other places never notice.
- A node that Ray drains (preemption, scaling down) takes its places with it: they are drained before its deadline, and
  as many start elsewhere. That is no failure and costs no restart.
- A place without a restart left is given up: `given_up` tells, `wanted` is one less, and `scale` fills it again. When
  it was the last one, the fleet raises: a run is never left waiting for dead producers.
- Nothing of the fleet is left after `stop`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from actors.cluster_state import draining_nodes, pending, why_waiting
from actors.failure import DEATHS, FailureKind, cause_line, comes_back, failure_kind
from actors.placement import Demand
from actors.producer import MakeProducer
from actors.rollout_actor import RolloutActor
from common.config import RolloutConfig
from common.errors import RunError, one_line
from common.histogram import reported_keys

ANSWER_SECONDS = 1.0
MUTE_SECONDS = 10.0  # without an answer, after which that is said
STOP_SECONDS = 10.0
RETRY_SECONDS = 0.2
NODE_MARGIN_SECONDS = 2.0  # before its node's deadline, by when an actor gives its leases back
HISTOGRAMS = ("rollout_group_seconds", "weights_adopt_seconds")
HISTOGRAMS += tuple(f"rollout_completion_{kind}" for kind in ("reward", "nfe", "tokens", "gamma"))
BUCKETS = tuple(key for name in HISTOGRAMS for key in reported_keys(name))
COUNTERS = (
    *("row_forwards", "token_forwards", "probed_positions", "probed_kl", "probed_flips"),
    *("damaged_weights", *BUCKETS),
)

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Place:
    """One place in the fleet, and the actor that fills it now."""

    number: int
    task: Any = None
    actor: Any = None
    name: str = ""
    answered: bool = False
    """Its actor has answered: it works, and does not wait for resources or start."""
    asked: Any = None
    """Gauges that its actor was asked for and that are still to come."""
    asked_at: float = 0.0
    gauges: dict[str, float] | None = None
    draining: bool = False
    node: str = ""
    """Where its actor lives; empty until it was asked."""


async def patiently(call: Callable[[], Any]) -> Any:
    """The reply of a buffer that may be dead for the moment; call again until it is back."""
    while True:
        try:
            return await call()
        except ActorUnavailableError as error:
            if not comes_back(error):
                raise
            await asyncio.sleep(RETRY_SECONDS)


class Fleet:
    """Owned by the controller; `run` ends when every actor has ended."""

    def __init__(
        self,
        *,
        config: RolloutConfig,
        buffer: Any,
        make: MakeProducer,
        progress: Callable[[], None],
        actor: type[RolloutActor] = RolloutActor,
    ) -> None:
        self._actor = actor
        self._config = config
        self._demand = Demand.of(config)
        self._buffer = buffer
        self._make = make
        self._progress = progress
        self.asked = config.actors
        """How many places there shall be; `wanted` is without those that were given up since."""
        self.given_up: list[str] = []
        """Name and last death of each actor that got no other life."""
        self._given_up_since = 0
        self._running = False
        self._stopping = False
        self._places: list[_Place] = []
        self._started = 0
        self._changed = asyncio.Event()
        self._drains: set[asyncio.Task[None]] = set()
        self.restarts = self.preemptions = 0
        self.waiting = ""
        """What the actors that have no node wait for; empty while all have one."""
        self._of_ended: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)

    async def run(self) -> None:
        """Keep every place filled until its actor ends by itself.

        Raises:
            RunError: when all places are out of restarts; other errors are those that an actor raised.
        """
        await patiently(lambda: self._buffer.new_fleet.remote())
        if self._stopping:
            return
        self._running = True
        self._start_places(self.asked)
        closed = False
        while self._places:
            self._changed.clear()
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([*(place.task for place in self._places), changed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            for place in [place for place in self._places if place.task.done()]:
                self._places.remove(place)
                cause = place.task.result()  # raises what its actor raised
                if cause:
                    self.given_up.append(f"{place.name}: {cause}")
                    self._given_up_since += 1
                closed = closed or (cause is None and not place.draining)
        if not closed and not self._stopping:
            raise RunError(
                f"all {len(self.given_up)} rollout actors are dead and out of restarts; last cause: {self.given_up[-1]}"
            )

    @property
    def wanted(self) -> int:
        """How many places there shall be, without those that were given up."""
        return self.asked - self._given_up_since

    async def scale(self, actors: int) -> int:
        """Called by the controller: how many places there shall be; those that are too many are drained, newest first.

        Returns:
            How many there should have been until now.
        """
        was, self.asked, self._given_up_since = self.wanted, actors, 0
        if not self._running or self._stopping:
            return was
        kept = [place for place in self._places if not place.draining]
        self._start_places(actors - len(kept))
        for place in kept[actors:]:
            self._begin_drain(place, self._config.drain_seconds)
        return was

    async def stop(self) -> None:
        """End every actor: those that work are asked to, the others are killed; nothing is left afterwards."""
        self._stopping = True
        for place in self._places:
            if place.actor is None:  # between two lives
                continue
            if place.answered:
                place.actor.stop.remote()
            else:
                ray.kill(place.actor)
        tasks = [place.task for place in self._places]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for place in self._places:
            if not place.task.done() and place.actor is not None:
                ray.kill(place.actor)

    def _start_places(self, count: int) -> None:
        for _ in range(count):
            place = _Place(self._started)
            place.task = asyncio.ensure_future(self._keep(place))
            self._places.append(place)
            self._started += 1
        self._changed.set()

    async def leave_drained_nodes(self) -> None:
        """Called by the controller now and then: drains the places whose node is being drained, and starts others."""
        unknown = [place for place in self._places if place.answered and not place.node and place.actor is not None]
        calls = [place.actor.node.remote() for place in unknown]
        replies = await asyncio.gather(*map(self._soon, calls), return_exceptions=True)
        for place, reply in zip(unknown, replies, strict=True):
            if isinstance(reply, str):  # else it is dead meanwhile, which `_keep` sees, or frozen
                place.node = reply
        try:
            deadlines = await asyncio.to_thread(draining_nodes)
        except Exception as error:  # of whatever Ray's state is asked through; the next look is soon
            log.warning("which nodes are being drained cannot be seen: %s", one_line(error))
            return
        leaving = [place for place in self._places if place.node in deadlines and not place.draining]
        for place in leaving:
            seconds = deadlines[place.node] - time.time() - NODE_MARGIN_SECONDS
            log.warning("the node of %s is being drained; it leaves within %.0f s", place.name, max(0.0, seconds))
            self._begin_drain(place, seconds)
        self._start_places(len(leaving))

    @staticmethod
    async def _soon(reply: Any) -> Any:
        return await asyncio.wait_for(reply, ANSWER_SECONDS)

    def _begin_drain(self, place: _Place, seconds: float) -> None:
        place.draining = True
        drain = asyncio.ensure_future(self._drain(place, max(0.0, min(seconds, self._config.drain_seconds))))
        self._drains.add(drain)  # the loop itself keeps only a weak reference
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, place: _Place, seconds: float) -> None:
        name, actor = place.name, place.actor
        if actor is None:  # between two lives: `_keep` begins no other
            return
        await patiently(lambda: self._buffer.drain.remote(name))
        if not await self._answers(place):
            log.info("%s does not answer, or never started; it is killed", name)
        else:
            actor.drain.remote()
            if (await asyncio.wait({place.task}, timeout=seconds))[0]:
                return
            log.warning("%s did not finish within %g s (rollout.drain_seconds, or its node's deadline)", name, seconds)
        await patiently(lambda: self._buffer.return_worker.remote(name))
        ray.kill(actor)

    async def _answers(self, place: _Place) -> bool:
        """Whether the actor of a place says something within `ANSWER_SECONDS`."""
        answer = asyncio.ensure_future(place.actor.gauges.remote())
        done, _ = await asyncio.wait({answer, place.task}, timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()
        return bool(done)

    async def _keep(self, place: _Place) -> str | None:
        """One place in the fleet; returns the cause when it is given up, None when its actor ended by itself."""
        cause, life, deaths = "", 0, 0
        while deaths <= self._config.max_restarts:
            if place.draining or self._stopping:
                return None
            place.name = name = f"rollout-{place.number}.{life}"
            life += 1
            place.answered, place.asked, place.node = False, None, ""
            place.actor = (
                ray.remote(self._actor)
                .options(**self._demand.options(), max_concurrency=2, name=name)
                .remote(name=name, buffer=self._buffer, make=self._make)
            )
            try:
                await place.actor.run.remote()
                return None
            except DEATHS as error:
                if isinstance(error, ActorUnavailableError):  # it may live: never two of one place
                    with suppress(RayError):
                        ray.kill(place.actor)
                if place.draining or self._stopping:
                    return None
                if failure_kind(error) is not FailureKind.INFRASTRUCTURE:
                    raise RunError(f"a rollout actor cannot start: {cause_line(error)}") from error
                cause = one_line(error)
                log.warning("%s died: %s", name, cause)
                preempted = isinstance(error, ActorDiedError) and error.preempted
                self.preemptions += preempted
                deaths += not preempted
                self.restarts += not preempted and deaths <= self._config.max_restarts
            finally:
                place.actor = None
                for key in COUNTERS:
                    self._of_ended[key] += (place.gauges or {}).get(key, 0.0)
                place.gauges = None
                await patiently(lambda name=name: self._buffer.return_worker.remote(name))
            self._progress()
        return None if place.draining else cause

    @property
    def working(self) -> int:
        """Actors that answered, without those that are being drained."""
        return sum(place.answered and not place.draining for place in self._places)

    async def look_for_nodes(self) -> int:
        """Called by the controller now and then: how many actors have no node, and `waiting` says why."""
        quiet = [place.actor for place in self._places if place.actor is not None and not place.answered]
        without = sum(await asyncio.to_thread(pending, quiet)) if quiet else 0
        self.waiting = await asyncio.to_thread(why_waiting, self._demand) if without else ""
        return without if self.waiting else 0

    async def doing(self) -> dict[str, str]:
        """For the watchdog and for `status`: what is known of every place; how long actors wait for leases is in the
        buffer."""
        quiet = [place for place in self._places if place.actor is not None and not place.answered]
        without = await asyncio.to_thread(pending, [place.actor for place in quiet])
        waiting = [place for place, waits in zip(quiet, without, strict=True) if waits]
        why = await asyncio.to_thread(why_waiting, self._demand) if waiting else ""
        return {
            place.name or f"place {place.number}": _state(place, why if place in waiting else "")
            for place in self._places
        }

    async def gauges(self) -> dict[str, float]:
        """Sums over the actors that answer; one that is pending or starting does not hold the others up."""
        for place in self._places:
            if place.asked is None and place.actor is not None:  # never two questions: a pending actor would hoard them
                place.asked = asyncio.ensure_future(place.actor.gauges.remote())
                place.asked_at = time.monotonic()
        asked = [place.asked for place in self._places if place.asked is not None]
        if asked:
            await asyncio.wait(asked, timeout=ANSWER_SECONDS)
        alive = []
        for place in self._places:
            if place.asked is None or not place.asked.done() or place.actor is None:
                continue
            reply, place.asked = place.asked, None
            if reply.exception() is None:
                place.gauges, place.answered = reply.result(), True
                alive.append(reply.result())
        working = [place.gauges for place in self._places if place.gauges is not None]
        total = {key: self._of_ended[key] + sum(own.get(key, 0.0) for own in working) for key in COUNTERS}
        probed = total["probed_positions"] or 1.0
        return {
            "rollout_actors": float(len(alive)),
            "rollout_actors_wanted": float(self.wanted),
            "rollout_restarts": float(self.restarts),
            "rollout_preemptions": float(self.preemptions),
            "rollout_row_forwards": total["row_forwards"],
            "rollout_token_forwards": total["token_forwards"],
            "rollout_cache_drift": total["probed_kl"] / probed,
            "rollout_cache_flips": total["probed_flips"] / probed,
            "weights_adopted_version": min((v for reply in alive if (v := reply["version"]) >= 0), default=-1.0),
            "rollout_longest_group_seconds": max((reply["longest_group_seconds"] for reply in alive), default=0.0),
            "rollout_longest_pause_seconds": max((reply["longest_pause_seconds"] for reply in alive), default=0.0),
            "weights_damaged": total["damaged_weights"],
            **{key: total[key] for key in BUCKETS},
        }


def _state(place: _Place, waiting: str) -> str:
    if place.actor is None:
        return "between two lives"
    asked = place.asked is not None and not place.asked.done()
    if place.answered and asked and (mute := time.monotonic() - place.asked_at) > MUTE_SECONDS:
        return f"has not answered for {mute:.0f} s"
    return "draining" if place.draining else "working" if place.answered else waiting or "starting"
