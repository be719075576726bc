"""Controller: the life of one run, as a named Ray actor (namespace = run id) behind a thin driver.

    phase        who works                                         ends when
    warm_start   learner                                           demonstrations are done (skipped for a given model)
    train        fleet -> buffer -> learner -> buffer -> fleet     all steps done, stop, or a failure
    evaluate     evaluation workers, before and after RL           every setting has been measured
    finished / stopped / failed

- Whatever fails first ends the run and names the cause; nothing waits on a dead part.
- A run in which nothing progresses is ended (`learner.watchdog`).
- A run that did not train all its steps is never reported as finished: a stop is `stopped`, the rest `failed`.
- A part that dies is started again, within its budget: an actor by the fleet, the buffer by Ray, the learner here
  (`learner.learner_lives`). The buffer goes on from its files, the learner from its newest checkpoint, and so does a
  whole run that is resumed.
- A run that lacks nodes waits for them, and says so (`learner.capacity`); that is no standstill.
- The driver only listens: `events` blocks until there is news.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError

from actors.failure import DEATHS, comes_back
from actors.fleet import Fleet, patiently
from common.config import Config
from common.errors import RunError, UserError, one_line
from learner.buffer_actor import start_buffer
from learner.buffer_gauges import BufferGauges
from learner.capacity import Capacity
from learner.event_log import Event, EventLog
from learner.learner_lives import LearnerLives, buffer_death
from learner.parts import POLICY, Parts
from learner.quarantine_report import QuarantineReport
from learner.reply import reply_of
from learner.run_directory import EVALUATION, PARETO, RunDirectory
from learner.run_metrics import RunMetrics
from learner.watchdog import Watchdog

T = TypeVar("T")

log = logging.getLogger(__name__)

GAUGE_SECONDS = 2.0
CLOSE_SECONDS = 5.0
CAUSE_SECONDS = 3.0  # a dead learner takes actors with it that need its weights: its death is the cause
FLEET_STOP_SECONDS = 5.0  # after its actors were ended


class Controller:
    """Started by the driver, owns every other part, lives as long as the run."""

    def __init__(self, *, config: Config, directory: str, parts: Parts = POLICY) -> None:
        self.config = config
        self._parts = parts
        self._directory = RunDirectory(directory)
        self._checkpoints = self._directory.checkpoint_store(config)
        self._events = EventLog()
        self._metrics = RunMetrics(config, self._directory, self._events)
        self._capacity = Capacity(config)
        self._watchdog = Watchdog(
            config.run, self._directory, lacking=lambda: self._capacity.lacking, who_waits=self._who_waits
        )
        self._learner = LearnerLives(
            config, self._directory.name, parts, self._capacity, self._events, progress=self._watchdog.mark
        )
        self._buffer: Any = None
        self._actor_restarts = 0.0
        self._actors_given_up = 0
        self._quarantine = QuarantineReport(config, self._directory)
        self._buffer_gauges = BufferGauges(reported=self._quarantine.written())
        self._fleet: Fleet | None = None
        self._evaluating: dict[int, str] = {}  # what each evaluation worker does
        self._phase = ""
        self._stop_reason = ""
        self._stopping = asyncio.Event()

    # -- called from outside ------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Called once by the driver; the summary of a run that did what it was asked to.

        Raises:
            UserError, RunError: with the cause, when it did not.
        """
        await self._metrics.open_trackers()
        watchdog = asyncio.create_task(self._watchdog.watch())
        looks = asyncio.create_task(self._look())
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait({watchdog, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                watchdog.result()  # raises
            summary = work.result()
            await self._metrics.close_trackers()
            await self._events.tell("summary", summary)
            return summary
        except BaseException:
            await self._enter("failed")
            raise
        finally:
            watchdog.cancel()
            looks.cancel()
            await self._metrics.close()
            if self._phase in ("finished", "stopped"):
                with suppress(OSError):  # of a target that could not be announced, or was taken away
                    self._directory.withdraw()

    async def events(self, after: int) -> list[Event]:
        """Called by the driver: the events from number `after` on; blocks until there is one."""
        return await self._events.after(after)

    async def report(self, kind: str, values: dict[str, float]) -> None:
        """Called by the learner after each step, and during the warm start."""
        self._watchdog.mark()
        await self._metrics.report(kind, values)

    async def warn(self, text: str) -> None:
        """Called by the learner when something was wrong that did not end the run."""
        await self._events.warn(text)

    async def evaluating(self, worker: int, doing: str) -> None:
        """Called by evaluation workers, now and then, as long as they get on; with no text for one that is gone."""
        if not doing:
            self._evaluating.pop(worker, None)
            return
        self._evaluating[worker] = doing
        self._watchdog.mark()

    async def stop(self, reason: str) -> None:
        """Called by the driver on a signal: the learner finishes its step, writes a checkpoint, and the run ends."""
        self._stop_reason = reason
        self._stopping.set()
        await self._events.tell("signal", {"name": reason, "phase": self._phase})
        if self._buffer is not None:
            await patiently(lambda: self._buffer.close.remote())

    async def scale(self, actors: int) -> dict[str, Any]:
        """Called by `diffpo scale`: how many rollout actors there shall be, from now on, while training goes on.

        Returns:
            `was` and `actors`, and a `note` where the cluster has too few CPUs for all of them.

        Raises:
            UserError: below 1, outside of what the run may scale itself to, or when it is not in its training phase.
        """
        self._capacity.check(actors)
        if self._phase != "train" or self._fleet is None or self._stopping.is_set():
            raise UserError(f"the run is in phase {self._phase}; rollout actors are there in phase train only")
        was = await self._scale(self._fleet, actors, "command")
        return {"was": was, "actors": actors, "note": self._capacity.shortage(actors)}

    async def until_ended(self) -> str:
        """Called by `diffpo stop`: the last phase; answers, or dies, once the run has ended."""
        await self._events.until(lambda: self._phase in ("finished", "stopped", "failed"))
        return self._phase

    async def directory(self) -> str:
        """Called by whoever found this actor by its name: which run it is."""
        return self._directory.name

    async def status(self) -> dict[str, Any]:
        """Called by anyone who found this actor by its name: phase, newest values, and who does, or waits for, what."""
        capacity = self._capacity
        learner = {"learner": capacity.learner} if capacity.learner else await self._learner.doing()
        return {
            "run": self.config.run.name,
            "directory": self._directory.name,
            "phase": self._phase,
            "stopping": self._stop_reason,
            "seconds": self._metrics.seconds,
            "idle_seconds": self._watchdog.idle,
            "steps": self.config.learner.steps,
            "metrics": self._metrics.address,
            "waiting_for_nodes": capacity.wanting,
            "learner": learner,
            "actors_wanted": self._fleet.wanted if self._fleet is not None else 0,
            "rollout_actors": await self._fleet.doing() if self._fleet is not None else {},
            "evaluation_workers": dict(self._evaluating) if self._phase == "evaluate" else {},
            "last_step": self._events.newest("step"),
        }

    # -- phases -------------------------------------------------------------------------------------------------

    async def _work(self) -> dict[str, Any]:
        config = self.config
        if config.metrics.port >= 0:
            capacity = self._capacity
            await self._metrics.open_endpoint(
                {
                    "run_idle_seconds": lambda: self._watchdog.idle,
                    "run_waiting_for_nodes": lambda: float(bool(capacity.lacking)),
                    "learner_pending": lambda: float(bool(capacity.learner)),
                    "rollout_pending_actors": lambda: float(capacity.pending),
                }
            )
        self._capacity.reserve()
        await self._enter("warm_start")
        await self._unless_stopped(self._learner.start())
        if self._stopping.is_set():
            reached = await self._saved()
        else:
            await self._enter("train")
            reached = await self._train()
        self._learner.end()
        self._capacity.release()  # for the evaluation
        evaluation = None
        if not self._stopping.is_set():
            if reached["steps"] < config.learner.steps:
                raise RunError(f"training ended after {reached['steps']:.0f} of {config.learner.steps} steps")
            if not self._parts.evaluates:
                await self._enter("finished")
                return reached
            await self._enter("evaluate")
            evaluation = await self._unless_stopped(self._evaluate(int(reached["steps"])))
        if evaluation is None:
            await self._enter("stopped")
            return {"stopped": self._stop_reason, **reached}
        await self._enter("finished")
        return {**reached, "evaluation": evaluation, "pareto": str(self._directory.place / PARETO)}

    async def _train(self) -> dict[str, float]:
        config = self.config
        self._buffer = start_buffer(config, self._directory, self._checkpoints)
        self._fleet = Fleet(
            config=config.rollout,
            buffer=self._buffer,
            make=partial(self._parts.producer, config),
            actor=self._parts.actor,
            progress=self._watchdog.mark,
        )
        training = asyncio.create_task(self._learner.learn(self._buffer, self._unless_stopped))
        generation = asyncio.create_task(self._fleet.run())
        gauges = asyncio.create_task(self._collect())
        try:
            await asyncio.wait({training, generation, gauges}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({training}, timeout=CAUSE_SECONDS)
            if not training.done():
                for part in (generation, gauges):
                    if part.done():
                        part.result()  # raises the cause, if it has one
            reached = await training
            gauges.cancel()
            try:
                await self._update_gauges(last=True)
            except Exception as error:  # what is trained is trained
                log.warning("the last gauges are missing: %s", one_line(error))
            return reached or await self._saved()
        except DEATHS as error:
            raise buffer_death(config, error) from error
        finally:
            training.cancel()
            gauges.cancel()
            closing = asyncio.ensure_future(self._buffer.close.remote())
            await asyncio.wait({closing}, timeout=CLOSE_SECONDS)  # a dead buffer must not hide the cause
            if closing.done() and closing.exception() is not None:
                log.warning("replay buffer did not close: %s", closing.exception())
            await self._fleet.stop()
            await asyncio.wait({generation}, timeout=FLEET_STOP_SECONDS)
            generation.cancel()
            self._fleet = None
            self._metrics.gauge({}, {"rollout_actors": 0.0, "rollout_actors_wanted": 0.0})

    async def _evaluate(self, steps: int) -> dict[str, Any]:
        """What `evaluation.json` holds; one that was cut off goes on."""
        from learner.evaluation_fleet import room_for_workers
        from learner.evaluation_record import ShardFolder
        from learner.final_evaluation import Evaluation, summarise
        from learner.pareto import draw_pareto

        config = self.config
        listener = ray.get_runtime_context().current_actor
        last = max(await asyncio.to_thread(self._checkpoints.checkpoints), key=lambda one: one.version)
        folders = {"before": self._directory.warm_start.name, "after": self._checkpoints.location(last)}
        kept = await asyncio.to_thread(ShardFolder, self._directory.place, config, folders)
        evaluation = await asyncio.to_thread(Evaluation, config, folders, kept)  # reads the shards that there are
        points = await evaluation.on_ray(workers=room_for_workers(config), listener=listener)
        results = {"steps": steps, **await asyncio.to_thread(summarise, config, points)}
        plot = draw_pareto(points, title=f"{config.task.name}, run {config.run.name}")
        self._directory.place.write(PARETO, plot)
        self._directory.write_json(EVALUATION, results)  # with it the run has finished: last
        kept.remove()
        return results

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of a part that cannot be asked to stop; None when a stop came first and the part is abandoned."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()  # else it takes the end of its parts for a death, and starts them again
        return None

    async def _saved(self) -> dict[str, float]:
        """Steps and version of the newest checkpoint."""
        kept = await asyncio.to_thread(self._checkpoints.checkpoints)
        newest = max(kept, key=lambda one: one.version, default=None)
        return {"steps": float(newest.step if newest else 0), "version": float(newest.version if newest else 0)}

    async def _enter(self, phase: str) -> None:
        self._phase = phase
        self._watchdog.mark()
        self._watchdog.untrainable = ""
        await self._metrics.enter(phase)
        await self._events.tell("phase", {"phase": phase})

    # -- what the phase train sees, and does about it -----------------------------------------------------------

    async def _look(self) -> None:
        await self._capacity.keep_looking(
            lambda: self._fleet,
            lambda: None if self._phase != "evaluate" else len(self._evaluating),
            self._events,
            self._watchdog.mark,
        )

    async def _collect(self) -> None:
        while True:
            try:
                await self._update_gauges()
            except ActorUnavailableError as error:  # the buffer is being started again
                if not comes_back(error):
                    raise
            await asyncio.sleep(GAUGE_SECONDS)

    async def _update_gauges(self, *, last: bool = False) -> None:
        if self._fleet is None:
            return
        if self._stopping.is_set():  # a buffer that was started anew does not know
            await self._buffer.close.remote()
        await self._fleet.leave_drained_nodes()
        gauges, fleet = await asyncio.gather(self._buffer.gauges.remote(), self._fleet.gauges())
        await self._heed(gauges, fleet)
        ending = last or self._stopping.is_set()
        proposal = None if ending else self._capacity.propose(gauges, self._fleet, time.monotonic())
        if proposal is not None:
            await self._scale(self._fleet, *proposal)
        fleet |= self._capacity.gauges(self._fleet.asked)
        restarts = {"learner_restarts": float(self._learner.deaths), "replay_restarts": self._buffer_gauges.restarts}
        self._metrics.gauge(gauges, fleet | restarts)

    async def _heed(self, gauges: dict[str, float], fleet: dict[str, float]) -> None:
        """Tell what the newest gauges show. Raises RunError when no prompt's group can be had any more."""
        seen = self._buffer_gauges
        seen.see(gauges)
        if (restarts := fleet.get("rollout_restarts", 0.0)) > self._actor_restarts:
            self._actor_restarts = restarts
            await self._events.warn(f"a rollout actor died and is started again ({restarts:.0f} so far)")
        for gone in self._fleet.given_up[self._actors_given_up :] if self._fleet is not None else ():
            self._actors_given_up += 1
            await self._events.warn(
                f"a rollout actor is given up (rollout.max_restarts={self.config.rollout.max_restarts}); "
                f"`diffpo scale` starts another; {gone}"
            )
        if seen.progressed:
            self._watchdog.mark()
        self._watchdog.untrainable = seen.untrainable
        if seen.lost:
            await self._events.warn(
                f"the bytes of {seen.lost:.0f} groups that were finished are in no file; they are generated again"
            )
        if late := seen.late_renewals(fleet, deadline=self.config.replay.lease_seconds):
            await self._events.warn(late)
        if seen.failed and (failed := await self._buffer.quarantine.remote()):  # a buffer started anew has none yet
            newest = await self._quarantine.write(failed)
            await self._events.tell("quarantine", newest)
            seen.reported()
            seen.check_failures(newest["reason"])

    async def _scale(self, fleet: Fleet, actors: int, reason: str) -> int:
        was = await fleet.scale(actors)
        self._capacity.scalings[reason] += 1
        await self._events.tell("scale", {"was": was, "actors": actors, "reason": reason})
        return was

    # -- who waits for whom -------------------------------------------------------------------------------------

    async def _who_waits(self) -> dict[str, Any]:
        """What every part is doing; one that does not answer is named as that."""
        found: dict[str, Any] = {"phase": self._phase, "learner": "is not there"} | await self._learner.doing()
        if self._buffer is not None:
            found["buffer"] = await reply_of(self._buffer.waiting.remote())
        if self._fleet is not None:
            found["rollout actors"] = await self._fleet.doing()
        if self._phase == "evaluate":
            found["evaluation workers"] = self._evaluating or "have not begun"
        return found
