"""Fleet: the rollout actors of a run; starts them, notices their deaths, starts them again, adds and drains some.

- An actor that dies (process, node) is infrastructure: its leases go back at once, a replacement starts, up to
  `rollout.max_restarts` deaths for each place.
- An actor that raises, also while it starts, is a defect or a mistake: its error ends the run.
- A place that is drained gets no further lease, finishes what it has, and ends; after `rollout.drain_seconds` its
  leases go back instead. The learner and the other places never notice.
- When the last place has no restart left, the fleet raises: a run is never left waiting for dead producers.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.producer import MakeProducer
from actors.rollout_actor import RolloutActor
from common.config import RolloutConfig
from common.errors import RunError, one_line

ANSWER_SECONDS = 1.0
COUNTERS = (
    *("row_forwards", "token_forwards", "probed_positions", "probed_kl", "probed_flips"),
    *("damaged_weights", "adoptions", "adopt_seconds"),
)

log = logging.getLogger(__name__)


class Fleet:
    """Owned by the controller; `run` ends when every actor has ended."""

    def __init__(self, *, config: RolloutConfig, buffer: Any, make: MakeProducer, progress: Callable[[], None]) -> None:
        self._config = config
        self._buffer = buffer
        self._make = make
        self._progress = progress
        self._actors: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._places: dict[int, asyncio.Task[str | None]] = {}
        self._next_place = 0
        self._draining: set[int] = set()
        self._drains: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.restarts = 0
        self._stopping = False
        self._answered: set[str] = set()
        self._counters: dict[str, dict[str, float]] = {}
        self._of_ended: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)

    async def run(self) -> None:
        """Keep every place filled until its actor ends by itself.

        Raises:
            RunError: when all places are out of restarts; other errors are those that an actor raised.
        """
        self._start_places(self._config.actors)
        causes: list[str] = []
        closed = False
        while self._places:
            self._changed.clear()
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait([*self._places.values(), changed], return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            for place in [place for place, task in self._places.items() if task.done()]:
                cause = self._places.pop(place).result()  # raises what its actor raised
                causes += [cause] if cause else []
                closed = closed or (cause is None and place not in self._draining)
                self._draining.discard(place)
        if not closed:
            raise RunError(f"all {len(causes)} rollout actors are dead and out of restarts; last cause: {causes[-1]}")

    async def scale(self, actors: int) -> int:
        """Called by the controller: how many places there shall be; those that are too many are drained, newest first.

        Returns:
            How many there were, without those that were draining already.
        """
        kept = [place for place in self._places if place not in self._draining]
        self._start_places(actors - len(kept))
        for place in kept[actors:]:
            self._draining.add(place)
            drain = asyncio.ensure_future(self._drain(place))
            self._drains.add(drain)  # the loop itself keeps only a weak reference
            drain.add_done_callback(self._drains.discard)
        return len(kept)

    async def stop(self) -> None:
        """Ask every actor to end at once."""
        self._stopping = True
        for actor in list(self._actors.values()):
            actor.stop.remote()

    @property
    def wanted(self) -> int:
        """Places that are to be filled."""
        return len(self._places) - len(self._draining)

    def _start_places(self, count: int) -> None:
        for _ in range(count):
            self._places[self._next_place] = asyncio.ensure_future(self._keep(self._next_place))
            self._next_place += 1
        self._changed.set()

    async def _drain(self, place: int) -> None:
        name = self._names.get(place, "")
        actor = self._actors.get(name)
        if actor is None:
            return
        if name not in self._answered:  # still waits for its place in the cluster, or starts
            ray.kill(actor)
            return
        await self._buffer.drain.remote(name)
        await asyncio.wait({self._places[place]}, timeout=self._config.drain_seconds)
        if name in self._actors:
            log.warning(
                "%s did not finish within drain_seconds=%g; its leases go back", name, self._config.drain_seconds
            )
            actor.stop.remote()

    async def _keep(self, place: int) -> str | None:
        """One place in the fleet; returns the cause when it is given up, None when its actor ended by itself."""
        cause = ""
        for attempt in range(self._config.max_restarts + 1):
            name = f"rollout-{place}.{attempt}"
            actor = (
                ray.remote(RolloutActor)
                .options(num_cpus=self._config.cpus, num_gpus=self._config.gpus, max_concurrency=2, name=name)
                .remote(name=name, buffer=self._buffer, make=self._make)
            )
            self._actors[name], self._names[place] = actor, name
            try:
                await actor.run.remote()
                return None
            except RayActorError as error:
                if place in self._draining or self._stopping:
                    return None
                # raised inside a living actor (another actor's death), or while this one started: not this death
                if isinstance(error, RayTaskError) or error.actor_init_failed:
                    raise
                cause = one_line(error)
                log.warning("%s died: %s", name, cause)
            finally:
                for key, value in self._counters.pop(name, {}).items():
                    self._of_ended[key] += value
                self._actors.pop(name, None)
                await self._buffer.return_worker.remote(name)
            self.restarts += attempt < self._config.max_restarts
            self._progress()
        return cause

    async def gauges(self) -> dict[str, float]:
        """Sums over the actors that answer; one that is pending or starting does not hold the others up."""
        asked = {asyncio.ensure_future(actor.gauges.remote()): name for name, actor in self._actors.items()}
        done = (await asyncio.wait(asked, timeout=ANSWER_SECONDS))[0] if asked else set()
        alive = []
        for reply in done:
            if reply.exception() is None:
                alive.append(reply.result())
                self._answered.add(asked[reply])
                self._counters[asked[reply]] = {key: alive[-1].get(key, 0.0) for key in COUNTERS}
        total = {key: self._of_ended[key] + sum(own[key] for own in self._counters.values()) for key in COUNTERS}
        probed = total["probed_positions"] or 1.0
        return {
            "rollout_actors": float(len(alive)),
            "rollout_actors_wanted": float(self.wanted),
            "rollout_restarts": float(self.restarts),
            "rollout_row_forwards": total["row_forwards"],
            "rollout_token_forwards": total["token_forwards"],
            "rollout_cache_drift": total["probed_kl"] / probed,
            "rollout_cache_flips": total["probed_flips"] / probed,
            "weights_adopted_version": min((reply["version"] for reply in alive), default=-1.0),
            "rollout_longest_group_seconds": max((reply["longest_group_seconds"] for reply in alive), default=0.0),
            "weights_damaged": total["damaged_weights"],
            "weights_adoptions": total["adoptions"],
            "weights_adopt_seconds": total["adopt_seconds"],
        }
