"""The fleet without Ray: deaths, scaling, drains of actors that work, hang, wait or die, and that nothing is left."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from actors import fleet as module
from actors.fleet import Fleet
from common.config import RolloutConfig
from common.errors import RunError
from common.histogram import Histogram


class Actor:
    """Stands for an actor: works, or waits for resources, or hangs, until it is drained, stopped or killed."""

    def __init__(self, stage: "Stage", name: str) -> None:
        self.stage, self.name = stage, name
        self.pending = self.hanging = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.group_seconds = Histogram("rollout_group_seconds")
        self.group_seconds.observe(2.0)

    def end(self, error: Exception | None = None) -> None:
        if not self.over.done():
            self.over.set_exception(error) if error else self.over.set_result(None)

    def call_run(self) -> Any:
        return self.over

    def call_stop(self) -> Any:
        if not (self.pending or self.hanging):
            self.end()

    def call_drain(self) -> None:
        """The buffer does it here: `Stage.drain`."""

    def call_node(self) -> Any:
        reply = asyncio.get_running_loop().create_future()
        reply.set_result(f"node of {self.name}")
        return reply

    def call_gauges(self) -> Any:
        reply = asyncio.get_running_loop().create_future()
        self.stage.asked[self.name] = self.stage.asked.get(self.name, 0) + 1
        if not (self.pending or self.hanging):
            reply.set_result(
                {"version": 0.0, "row_forwards": 100.0, "longest_group_seconds": 1.0, "longest_pause_seconds": 0.0}
                | self.group_seconds.values()
            )
        return reply


class Calls:
    """Turns `handle.name.remote(...)` into a call of `name`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Handle:
    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Calls:
        return Calls(getattr(self.actor, f"call_{name}"))


class Stage:
    """What Ray and the buffer are to the fleet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: dict[str, Actor] = {}
        self.asked: dict[str, int] = {}
        self.killed: list[str] = []
        self.returned: list[str] = []
        self.finishes = True  # a drained actor ends by itself
        self.pending = False
        monkeypatch.setattr(module.ray, "remote", lambda kind: self)
        monkeypatch.setattr(module.ray, "kill", self.kill)
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.02)
        monkeypatch.setattr(module, "STOP_SECONDS", 0.2)

    def options(self, **options: Any) -> "Stage":
        return self

    def remote(self, *, name: str, **_: Any) -> Handle:
        self.actors[name] = Actor(self, name)
        self.actors[name].pending = self.pending
        return Handle(self.actors[name])

    def kill(self, handle: Handle) -> None:
        self.killed.append(handle.actor.name)
        handle.actor.end(RayActorError())

    @property
    def new_fleet(self) -> Calls:
        async def new_fleet() -> None:
            assert not self.actors, "it comes before the first actor"

        return Calls(new_fleet)

    @property
    def drain(self) -> Calls:
        async def drain(name: str) -> None:
            actor = self.actors[name]
            if self.finishes and not actor.hanging and not actor.pending:
                actor.end()

        return Calls(drain)

    @property
    def return_worker(self) -> Calls:
        async def return_worker(name: str) -> None:
            self.returned.append(name)

        return Calls(return_worker)

    def alive(self) -> list[str]:
        return [name for name, actor in self.actors.items() if not actor.over.done()]


def make(stage: Stage, **config: Any) -> Fleet:
    rollout = RolloutConfig(**{"actors": 1, "drain_seconds": 0.05, **config})
    return Fleet(config=rollout, buffer=stage, make=lambda name, wake: None, progress=lambda: None)  # pyright: ignore


@asynccontextmanager
async def playing(monkeypatch: pytest.MonkeyPatch, **config: Any) -> AsyncIterator[tuple[Fleet, Stage]]:
    """A fleet that runs; at the end it stops and leaves nothing."""
    stage = Stage(monkeypatch)
    fleet = make(stage, **config)
    running = asyncio.ensure_future(fleet.run())
    await settle()
    await fleet.gauges()
    yield fleet, stage
    await fleet.stop()
    await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 30.0)
    assert stage.alive() == []


async def settle(seconds: float = 0.0) -> None:
    await asyncio.sleep(seconds)
    for _ in range(10):
        await asyncio.sleep(0)


async def test_up_and_down_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch) as (fleet, stage):
        assert [await fleet.scale(count) for count in (4, 1, 3, 1)] == [1, 4, 1, 3]
        await settle(0.05)
        assert stage.alive() == ["rollout-0.0"]
        assert (await fleet.gauges())["rollout_actors_wanted"] == 1


async def test_scaling_before_it_runs_says_how_many_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    fleet = make(stage, actors=2)
    assert await fleet.scale(3) == 2
    running = asyncio.ensure_future(fleet.run())
    await settle()
    assert len(stage.alive()) == 3
    await fleet.gauges()
    await fleet.stop()
    await running


async def test_a_drained_actor_that_hangs_loses_its_leases_and_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch) as (fleet, stage):
        await fleet.scale(2)
        await settle()
        await fleet.gauges()
        stage.actors["rollout-1.0"].hanging = True
        await fleet.scale(1)
        await settle(0.1)
        assert stage.killed == ["rollout-1.0"]
        assert "rollout-1.0" in stage.returned
        assert stage.alive() == ["rollout-0.0"]


async def test_a_drained_actor_that_does_not_finish_in_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch, drain_seconds=0.5) as (fleet, stage):
        await fleet.scale(2)
        await settle()
        stage.finishes = False
        await fleet.scale(1)
        await settle()
        assert stage.killed == []
        await settle(0.6)
        assert stage.killed == ["rollout-1.0"]


async def test_the_actors_of_a_drained_node_leave_before_its_deadline_and_others_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drain, gone, seconds = Fleet._drain, asyncio.Event(), list[float]()

    async def drained(fleet: Fleet, place: Any, within: float) -> None:
        seconds.append(within)
        await gone.wait()
        await drain(fleet, place, 0.0)

    async with playing(monkeypatch, drain_seconds=60.0) as (fleet, stage):
        draining: dict[str, float] = {}
        monkeypatch.setattr(module, "draining_nodes", lambda: draining)
        await fleet.scale(2)
        await settle()
        await fleet.gauges()
        await fleet.leave_drained_nodes()
        assert stage.alive() == ["rollout-0.0", "rollout-1.0"]
        stage.finishes = False
        monkeypatch.setattr(Fleet, "_drain", drained)
        draining["node of rollout-0.0"] = time.time() + module.NODE_MARGIN_SECONDS + 30.0  # earlier than drain_seconds
        await fleet.leave_drained_nodes()
        await fleet.leave_drained_nodes()
        await settle()
        assert stage.alive() == ["rollout-0.0", "rollout-1.0", "rollout-2.0"]
        [within] = seconds
        assert 0.0 < within <= 30.0
        gone.set()
        await settle()
        assert (stage.alive(), "rollout-0.0" in stage.returned) == (["rollout-1.0", "rollout-2.0"], True)
        assert fleet.restarts == 0


async def test_a_place_that_is_drained_while_it_restarts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch) as (fleet, stage):
        await fleet.scale(2)
        await settle()
        stage.actors["rollout-1.0"].end(RayActorError())
        await asyncio.sleep(0)  # its leases are on their way back
        await fleet.scale(1)
        await settle(0.1)
        assert stage.alive() == ["rollout-0.0"]


async def test_waiting_actors_are_asked_once_and_killed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch) as (fleet, stage):
        stage.pending = True
        await fleet.scale(3)
        await settle()
        for _ in range(5):
            gauges = await fleet.gauges()
        assert (gauges["rollout_actors"], gauges["rollout_actors_wanted"]) == (1, 3)
        assert [stage.asked[f"rollout-{place}.0"] for place in (1, 2)] == [1, 1]
        await fleet.stop()
        assert sorted(stage.killed) == ["rollout-1.0", "rollout-2.0"]
        assert await fleet.scale(5) == 3
        await settle()
        assert stage.alive() == []


async def test_counters_of_the_dead_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch) as (fleet, stage):
        stage.pending = True
        await fleet.scale(2)
        await settle()
        stage.pending = False
        asking = asyncio.ensure_future(fleet.gauges())  # waits for the pending one
        await settle()
        stage.actors["rollout-0.0"].end(RayActorError())
        await asking
        await fleet.gauges()
        gauges = await fleet.gauges()
        assert gauges["rollout_row_forwards"] == 200  # of the dead one and of its replacement
        assert gauges["rollout_group_seconds_bucket{le=2.5}"] == gauges["rollout_group_seconds_bucket{le=+Inf}"] == 2
        assert (gauges["rollout_group_seconds_bucket{le=1}"], gauges["rollout_group_seconds_sum"]) == (0, 4.0)
        assert gauges["weights_adopt_seconds_bucket{le=+Inf}"] == 0


async def test_the_last_place_out_of_restarts_ends_the_run_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    fleet = make(stage, actors=2, max_restarts=1)
    running = asyncio.ensure_future(fleet.run())
    for attempt in range(2):
        await settle()
        for place in range(2):
            stage.actors[f"rollout-{place}.{attempt}"].end(RayActorError())
    with pytest.raises(RunError, match="all 2 rollout actors are dead and out of restarts"):
        await asyncio.wait_for(running, 30.0)
    assert fleet.restarts == 2


async def test_a_place_out_of_restarts_is_given_up_told_and_may_be_filled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with playing(monkeypatch, actors=2, max_restarts=0) as (fleet, stage):
        stage.actors["rollout-1.0"].end(RayActorError())
        await settle()
        assert (fleet.asked, fleet.wanted, fleet.working) == (2, 1, 1)
        [told] = fleet.given_up
        assert told.startswith("rollout-1.0: ")
        assert await fleet.scale(2) == 1
        await settle()
        assert stage.alive() == ["rollout-0.0", "rollout-2.0"]
        assert (fleet.wanted, len(fleet.given_up)) == (2, 1)


async def test_an_actor_that_cannot_start_is_named_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make(stage := Stage(monkeypatch))
    running = asyncio.ensure_future(fleet.run())
    await settle()
    text = "Traceback ...\ncommon.errors.UserError: model.device=cuda is not there"
    stage.actors["rollout-0.0"].end(RayActorError(None, text, actor_init_failed=True))
    with pytest.raises(RunError, match=r"^a rollout actor cannot start: model\.device=cuda is not there"):
        await asyncio.wait_for(running, 30.0)


async def test_a_preempted_node_costs_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Preempted(ActorDiedError):
        preempted = True

    async with playing(monkeypatch, max_restarts=1) as (fleet, stage):
        for life in range(4):
            stage.actors[f"rollout-0.{life}"].end(Preempted())
            await settle()
        assert stage.alive() == ["rollout-0.4"]
        assert (fleet.restarts, fleet.preemptions) == (0, 4)
        gauges = await fleet.gauges()
        assert (gauges["rollout_restarts"], gauges["rollout_preemptions"]) == (0, 4)


@pytest.mark.parametrize("error", [OutOfMemoryError("the node was low on memory"), ActorUnavailableError("lost", None)])
async def test_an_actor_that_ray_killed_or_lost_is_replaced(error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(monkeypatch, max_restarts=1) as (fleet, stage):
        stage.actors["rollout-0.0"].end(error)
        await settle()
        assert stage.alive() == ["rollout-0.1"]
        assert fleet.restarts == 1
        killed = isinstance(error, ActorUnavailableError)
        assert ("rollout-0.0" in stage.killed) == killed, "it may live, and hold its place"


async def test_a_look_at_drained_nodes_that_fails_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> dict[str, float]:
        raise RuntimeError("the state of the cluster cannot be had")

    async with playing(monkeypatch) as (fleet, stage):
        monkeypatch.setattr(module, "draining_nodes", failing)
        await fleet.leave_drained_nodes()
        assert stage.alive() == ["rollout-0.0"]


async def test_an_actor_that_does_not_answer_says_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MUTE_SECONDS", 0.05)
    monkeypatch.setattr(module, "pending", lambda handles: [False for _ in handles])
    async with playing(monkeypatch) as (fleet, stage):
        stage.actors["rollout-0.0"].hanging = True
        await fleet.gauges()
        await settle(0.1)
        assert (await fleet.doing())["rollout-0.0"] == "has not answered for 0 s"
        stage.actors["rollout-0.0"].hanging = False


async def test_actors_without_a_node_say_what_they_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pending", lambda handles: [handle.actor.pending for handle in handles])
    monkeypatch.setattr(module, "why_waiting", lambda demand: f"waits for {demand}")

    async with playing(monkeypatch, labels={"gpu": "inference"}) as (fleet, stage):
        assert (await fleet.look_for_nodes(), fleet.waiting, fleet.working) == (0, "", 1)
        stage.pending = True
        await fleet.scale(3)
        await settle()
        await fleet.gauges()
        assert (await fleet.look_for_nodes(), fleet.working) == (2, 1)
        assert fleet.waiting == "waits for 1 CPUs on a node labelled gpu=inference"
        assert await fleet.doing() == {
            "rollout-0.0": "working",
            "rollout-1.0": fleet.waiting,
            "rollout-2.0": fleet.waiting,
        }
