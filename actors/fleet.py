"""Fleet: the rollout actors of a run; starts them, notices their deaths, starts them again.

- An actor that dies (process, node) is infrastructure: its leases go back at once, a replacement starts, up to
  `rollout.max_restarts` deaths for each place.
- An actor that raises, also while it starts, is a defect or a mistake: its error ends the run.
- When the last place has no restart left, the fleet raises: a run is never left waiting for dead producers.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.rollout_actor import RolloutActor
from common.config import Config
from common.errors import RunError, one_line

ANSWER_SECONDS = 1.0
COUNTERS = ("row_forwards", "token_forwards", "probed_positions", "probed_kl", "probed_flips")

log = logging.getLogger(__name__)


class Fleet:
    """Owned by the controller; `run` ends when every actor has ended."""

    def __init__(self, *, config: Config, buffer: Any, progress: Callable[[], None]) -> None:
        self._config = config
        self._buffer = buffer
        self._progress = progress
        self._actors: dict[str, Any] = {}
        self.restarts = 0
        self._stopping = False
        self._counters: dict[str, dict[str, float]] = {}
        self._of_ended: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)

    async def run(self) -> None:
        """Keep every place filled until its actor ends by itself.

        Raises:
            RunError: when all places are out of restarts; other errors are those that an actor raised.
        """
        places = [self._keep(place) for place in range(self._config.rollout.actors)]
        outcomes = await asyncio.gather(*places)
        if all(outcome is not None for outcome in outcomes):
            raise RunError(
                f"all {len(outcomes)} rollout actors are dead and out of restarts; last cause: {outcomes[-1]}"
            )

    async def _keep(self, place: int) -> str | None:
        """One place in the fleet; returns the cause when it is given up, None when its actor ended by itself."""
        cause = ""
        for attempt in range(self._config.rollout.max_restarts + 1):
            name = f"rollout-{place}.{attempt}"
            rollout = self._config.rollout
            actor = (
                ray.remote(RolloutActor)
                .options(num_cpus=rollout.cpus, num_gpus=rollout.gpus, max_concurrency=2, name=name)
                .remote(config=self._config, name=name, buffer=self._buffer)
            )
            self._actors[name] = actor
            try:
                await actor.run.remote()
                return None
            except RayActorError as error:
                # raised inside a living actor (another actor's death), or while this one started: not this death
                if isinstance(error, RayTaskError) or error.actor_init_failed:
                    raise
                cause = one_line(error)
                log.warning("%s died: %s", name, cause)
                if self._stopping:
                    return None
            finally:
                for key, value in self._counters.pop(name, {}).items():
                    self._of_ended[key] += value
                self._actors.pop(name, None)
                await self._buffer.return_worker.remote(name)
            self.restarts += attempt < self._config.rollout.max_restarts
            self._progress()
        return cause

    async def stop(self) -> None:
        """Ask every actor to end at once."""
        self._stopping = True
        for actor in list(self._actors.values()):
            actor.stop.remote()

    async def gauges(self) -> dict[str, float]:
        """Sums over the actors that answer; one that is pending or starting does not hold the others up."""
        asked = {asyncio.ensure_future(actor.gauges.remote()): name for name, actor in self._actors.items()}
        done = (await asyncio.wait(asked, timeout=ANSWER_SECONDS))[0] if asked else set()
        alive = []
        for reply in done:
            if reply.exception() is None:
                alive.append(reply.result())
                self._counters[asked[reply]] = {key: alive[-1][key] for key in COUNTERS}
        total = {key: self._of_ended[key] + sum(own[key] for own in self._counters.values()) for key in COUNTERS}
        probed = total["probed_positions"] or 1.0
        return {
            "rollout_actors": float(len(alive)),
            "rollout_restarts": float(self.restarts),
            "rollout_row_forwards": total["row_forwards"],
            "rollout_token_forwards": total["token_forwards"],
            "rollout_cache_drift": total["probed_kl"] / probed,
            "rollout_cache_flips": total["probed_flips"] / probed,
            "weights_adopted_version": min((reply["version"] for reply in alive), default=-1.0),
        }
