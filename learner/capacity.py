"""Capacity: the nodes that a run wants, whether it has them, and how many rollout actors it should have.

- The learner's place is reserved first, and until training ends.
- A run without a node for its learner, or for any of its rollout actors, waits for up to `run.capacity_timeout`: a
  cluster that scales itself may take minutes. It says what it waits for.
- Where `rollout.max_actors` is given, `actors.scaling_policy` decides how many actors there are.
"""

import asyncio
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.cluster_state import pending_of, why_waiting
from actors.fleet import Fleet
from actors.placement import Demand
from actors.reward_actor import RewardActor, reward_demand
from actors.scaling_policy import Reading, Reason, ScalingPolicy
from common.config import Config
from common.errors import UserError, one_line
from common.metrics import CATALOGUE
from learner.event_log import EventLog
from learner.learner_ranks import reserved, unplaced

MOST_ACTORS = 500  # half of `BUFFER_CALLS`: each may block one
EVALUATION_WORKER = "EvaluationWorker"  # its module takes torch, and this one is imported before a run begins
NODE_SECONDS = 3.0  # between two looks for nodes


class Capacity:
    """Owned by the controller, lives as long as it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        rollout = config.rollout
        most = rollout.max_actors
        self._policy = (
            ScalingPolicy(least=rollout.min_actors, most=most, window=rollout.scaling_seconds) if most else None
        )
        self.group: PlacementGroup | None = None
        """The learner's place, once it was asked for."""
        self.scalings: dict[str, float] = {reason: 0.0 for (reason,) in CATALOGUE["rollout_scalings"].values}
        self.pending = 0
        """Rollout actors without a node."""
        self.learner = ""
        """What the learner waits for; empty once it has its nodes."""
        self.lacking = ""
        """What the run cannot go on without; empty while it can."""
        self.wanting = ""
        """What it does without, or cannot go on without."""

    def reserve(self) -> None:
        """Ask for the learner's place."""
        self.group = reserved(self._config.learner)

    def release(self) -> None:
        """Give the learner's place back; called once no learner comes any more, since others wait for it."""
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    async def keep_looking(
        self,
        fleet: Callable[[], Fleet | None],
        evaluating: Callable[[], int | None],
        events: EventLog,
        progress: Callable[[], None],
    ) -> None:
        """Look again and again; tell who waits when it lasts, and once there are enough nodes again, which is progress.

        Args:
            fleet: the rollout actors, while there are some.
            evaluating: evaluation workers that have begun and live; None where none are wanted.
            events: told.
            progress: called.
        """
        told = before = lacked = ""
        blind = False
        while True:
            await asyncio.sleep(NODE_SECONDS)
            try:
                await self.look(fleet(), evaluating())
            except Exception as error:  # of whatever Ray's state is asked through; the run itself needs none of it
                if not blind:
                    blind = True
                    await events.warn(f"who waits for nodes cannot be seen: {one_line(error)}")
                continue
            blind = False
            if lacked and not self.lacking:
                progress()
            lacked = self.lacking
            if told and not self.wanting:
                await events.warn("all have their nodes now")
                told = ""
            elif self.wanting and not told and before:
                told = self.wanting
                await events.warn(f"waiting for nodes: {told}")
            before = self.wanting

    async def look(self, fleet: Fleet | None, evaluating: int | None = None) -> None:
        """See who waits for nodes now; `evaluating` as in `keep_looking`."""
        self.learner = await asyncio.to_thread(unplaced, self.group, self._config.learner)
        self.pending = await fleet.look_for_nodes() if fleet is not None else 0
        rewards, mute = "", 0
        if self._config.rollout.reward_cpus is not None:
            mute = await asyncio.to_thread(pending_of, RewardActor.__name__)
        if mute:
            why = await asyncio.to_thread(why_waiting, reward_demand(self._config.rollout))
            rewards = f"rewards of {mute} rollout actors: each {why}" if why else ""
        rollout = f"{self.pending} rollout actors: each {fleet.waiting}" if fleet is not None and self.pending else ""
        learner = f"the learner {self.learner}" if self.learner else ""
        workers = ""
        if evaluating is not None and (waiting := await asyncio.to_thread(pending_of, EVALUATION_WORKER)):
            why = await asyncio.to_thread(why_waiting, Demand.of(self._config.rollout))
            workers = f"{waiting} evaluation workers: each {why}" if why else ""
        working = fleet.working if fleet is not None else 0
        self.lacking = learner or (rollout if fleet is not None and not working else "")
        self.lacking = self.lacking or (rewards if mute >= working else "")  # else some work, and the others wait
        self.lacking = self.lacking or (workers if not evaluating else "")
        self.wanting = "; ".join(filter(None, (learner, rollout, rewards, workers)))

    def check(self, actors: int) -> None:
        """Raises UserError for a number of rollout actors that a person may not ask for."""
        if not 1 <= actors <= MOST_ACTORS:
            raise UserError(
                f"{actors} rollout actors; a run needs at least 1 (to end it, stop it) and can have {MOST_ACTORS}"
            )
        least, most = self._config.rollout.min_actors, self._config.rollout.max_actors
        if most is not None and not least <= actors <= most:
            raise UserError(
                f"{actors} rollout actors; this run scales itself between rollout.min_actors={least} and "
                f"rollout.max_actors={most}; stop it and resume it with other bounds"
            )

    def shortage(self, actors: int) -> str:
        """What is to be said where the cluster has too few CPUs for so many rollout actors; else nothing."""
        rollout, learner = self._config.rollout, self._config.learner
        wanted = actors * (rollout.cpus + (rollout.reward_cpus or 0.0)) + learner.ranks * learner.cpus
        cpus = ray.cluster_resources().get("CPU", 0.0)
        few = f"; they and the learner want {wanted:g} CPUs of {cpus:g}, so some wait until there are more"
        return few if wanted > cpus else ""

    def propose(self, gauges: dict[str, float], fleet: Fleet, now: float) -> tuple[int, Reason] | None:
        """How many actors there should be, and why, by the buffer's gauges; None while nothing should change."""
        if self._policy is None:
            return None
        reading = Reading(
            seconds=now,
            sample_wait_seconds=gauges["sample_wait_seconds"],
            lease_wait_seconds=gauges["lease_wait_seconds"],
            finished=sum(gauges[f"groups_{state}"] for state in ("finished", "sampled", "trained", "discarded")),
            stale=gauges["stale_discards"],
            ready=gauges["groups_finished"] / self._config.learner.groups_per_step,
            working=fleet.working,
            wanted=fleet.wanted,
        )
        return self._policy.propose(reading)

    def gauges(self, wanted: int) -> dict[str, float]:
        """For the exporter; `wanted` rollout actors there shall be."""
        given = {f"rollout_scalings{{reason={reason}}}": count for reason, count in self.scalings.items()}
        least = self._config.rollout.min_actors if self._policy is not None else wanted
        return {"rollout_min_actors": float(least), **given}
