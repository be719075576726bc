"""Controller: the life of one run, as a named Ray actor (namespace = run id) behind a thin driver.

    phase        who works                                         ends when
    warm_start   learner                                           demonstrations are done (skipped for a given model)
    train        fleet -> buffer -> learner -> buffer -> fleet     all steps done, stop, or a failure
    evaluate     evaluation workers, before and after RL           every setting has been measured
    finished / stopped / failed

- Whatever fails first ends the run and names the cause; nothing waits on a dead part.
- The watchdog ends a run in which nothing has progressed for `run.stall_timeout`. In the training phase only groups
  that can be trained count: discarding every group for equal rewards is not progress. In the evaluation every forward
  pass and every reward counts.
- A run that did not train all its steps is never reported as finished: a stop is `stopped`, the rest `failed`.
- A part that dies is started again, within its budget: an actor by the fleet, the buffer by Ray, the learner here. The
  buffer goes on from its files, the learner from its newest checkpoint, and so does a whole run that is resumed.
- A run that lacks nodes waits for them, and says so (`learner.capacity`); that is no standstill.
- The driver only listens: `events` blocks until there is news.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from actors.cluster_state import on_this_node
from actors.failure import FailureKind, cause_line, comes_back, failure_kind
from actors.fleet import Fleet, patiently
from common.config import Config
from common.errors import RunError, UserError, cause, one_line
from common.histogram import reported_keys
from common.place import FAILURES
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from common.tasks import Task, build_task
from learner.capacity import Capacity
from learner.exporter import Exporter
from learner.learner_ranks import LearnerRanks
from learner.pace import Pace
from learner.parts import POLICY, Parts
from learner.run_directory import EVALUATION, PARETO, RunDirectory
from learner.trackers import Trackers, open_trackers

T = TypeVar("T")

log = logging.getLogger(__name__)

GAUGE_SECONDS = 2.0
ANSWER_SECONDS = 2.0
CLOSE_SECONDS = 5.0
NODE_SECONDS = 3.0  # between two looks for nodes
MOST_ACTORS = 500  # each may block one of the buffer's calls in `lease`, of which it answers `BUFFER_CALLS` at once
BUFFER_CALLS = 1000
CAUSE_SECONDS = 3.0  # a dead learner takes actors with it that need its weights: its death is the cause
FLEET_STOP_SECONDS = 5.0  # after its actors were ended
MOST_QUARANTINED = 100  # groups in a row: then it is not the prompts
# buffer gauge -> catalogue name
BUFFER_METRICS = {
    "tickets": "replay_tickets",
    "fill": "replay_fill",
    "held_bytes": "replay_held_bytes",
    "spilled_bytes": "replay_spilled_bytes",
    "segments": "replay_segments",
    "segment_bytes": "replay_segment_bytes",
    "staleness_bound": "replay_staleness_bound",
    "violations": "replay_staleness_violations",
    "no_spread_discards": "replay_no_spread",
    "stale_discards": "replay_stale",
    "late_results": "replay_late_results",
    "failed_leases": "replay_failed_leases",
    "expired_leases": "replay_expired_leases",
    "returned_leases": "replay_returned_leases",
    "wasted_groups": "replay_wasted_groups",
    "lost_groups": "replay_lost_groups",
    "rewound_groups": "replay_rewound_groups",
    "skipped_groups": "replay_skipped_groups",
    "restarts": "replay_restarts",
    "completions": "rollout_completions",
    "sample_wait_seconds": "learner_wait_seconds",
    "lease_wait_seconds": "rollout_wait_seconds",
}
STALENESS_KEYS = reported_keys("replay_group_staleness")


class Controller:
    """Started by the driver, owns every other part, lives as long as the run."""

    def __init__(self, *, config: Config, directory: str, parts: Parts = POLICY) -> None:
        self.config = config
        self._parts = parts
        self._directory = RunDirectory(directory)
        self._checkpoints = self._directory.checkpoint_store(config)
        self._learner: Any = None
        self._learner_deaths = 0
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._news = asyncio.Condition()
        self._started = self._progressed = time.monotonic()
        self._phase = ""
        self._stop_reason = ""
        self._stopping = asyncio.Event()
        self._buffer: Any = None
        self._fleet: Fleet | None = None
        self._exporter: Exporter | None = None
        self._trackers: Trackers | None = None
        self._pace = Pace()
        self._progress_mark: tuple[float, ...] = ()
        self._quarantined = self._quarantined_before = 0.0
        self._untrainable = ""
        self._warned = False
        self._lost = 0.0
        self._task: Task | None = None
        self._unwritten = False
        self._checkpoint = -1.0  # newest, as the learner told
        self._capacity = Capacity(config)
        self._evaluating: dict[int, str] = {}  # what each evaluation worker does

    # -- called from outside ------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """Called once by the driver; the summary of a run that did what it was asked to.

        Raises:
            UserError, RunError: with the cause, when it did not.
        """
        self._trackers = await asyncio.to_thread(open_trackers, self.config, self._directory, self._warner())
        watchdog = asyncio.create_task(self._watch())
        looks = asyncio.create_task(self._look_for_nodes())
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait({watchdog, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                watchdog.result()  # raises
            summary = work.result()
            await asyncio.to_thread(self._trackers.close)
            await self._tell("summary", summary)
            return summary
        except BaseException:
            await self._enter("failed")
            raise
        finally:
            watchdog.cancel()
            looks.cancel()
            await asyncio.to_thread(self._trackers.close)
            if self._exporter is not None:
                self._exporter.close()
            if self._phase in ("finished", "stopped"):
                self._directory.withdraw()

    async def events(self, after: int) -> list[tuple[str, dict[str, Any]]]:
        """Called by the driver: the events from number `after` on; blocks until there is one."""
        async with self._news:
            await self._news.wait_for(lambda: len(self._events) > after)
            return self._events[after:]

    async def report(self, kind: str, values: dict[str, float]) -> None:
        """Called by the learner after each step, and during the warm start."""
        self._progressed = time.monotonic()
        if self._exporter is not None:
            self._exporter.update(values)
        values = values | self._pace.beside(kind, values, self._progressed)
        if self._trackers is not None:
            self._trackers.put(kind, values)
        row = {"kind": kind, "seconds": round(self._progressed - self._started, 3), **values}
        try:
            self._directory.append_metrics(row)
        except FAILURES as error:
            await self._metrics_unwritten(error)
        await self._tell(kind, values)
        checkpoint = values.get("checkpoint_step", self._checkpoint)
        self._checkpoint, new = checkpoint, checkpoint != self._checkpoint
        await self._flush_metrics(now=new)

    async def _flush_metrics(self, *, now: bool) -> None:
        try:
            await asyncio.to_thread(self._directory.flush_metrics, now=now)
        except FAILURES as error:
            await self._metrics_unwritten(error)

    async def _metrics_unwritten(self, error: Exception) -> None:
        if not self._unwritten:
            self._unwritten = True
            await self._tell("warning", {"text": f"metrics.jsonl lacks steps, it cannot be written: {cause(error)}"})

    async def warn(self, text: str) -> None:
        """Called by the learner when something was wrong that did not end the run."""
        await self._tell("warning", {"text": text})

    def _warner(self) -> Callable[[str], None]:
        """`warn` for other threads."""
        loop = asyncio.get_running_loop()

        def warn(text: str) -> None:
            with suppress(RuntimeError):  # the run is over, and nobody listens
                asyncio.run_coroutine_threadsafe(self.warn(text), loop)

        return warn

    async def evaluating(self, worker: int, doing: str) -> None:
        """Called by evaluation workers, now and then, as long as they get on."""
        self._evaluating[worker] = doing
        self._mark_progress()

    async def stop(self, reason: str) -> None:
        """Called by the driver on a signal: the learner finishes its step, writes a checkpoint, and the run ends."""
        self._stop_reason = reason
        self._stopping.set()
        await self._tell("signal", {"name": reason, "phase": self._phase})
        if self._buffer is not None:
            await patiently(lambda: self._buffer.close.remote())

    async def scale(self, actors: int) -> dict[str, Any]:
        """Called by `diffpo scale`: how many rollout actors there shall be, from now on, while training goes on.

        Returns:
            `was` and `actors`, and a `note` where the cluster has too few CPUs for all of them.

        Raises:
            UserError: below 1, outside of what the run may scale itself to, or when it is not in its training phase.
        """
        if not 1 <= actors <= MOST_ACTORS:
            raise UserError(
                f"{actors} rollout actors; a run needs at least 1 (to end it, stop it) and can have {MOST_ACTORS}"
            )
        least, most = self.config.rollout.min_actors, self.config.rollout.max_actors
        if most is not None and not least <= actors <= most:
            raise UserError(
                f"{actors} rollout actors; this run scales itself between rollout.min_actors={least} and "
                f"rollout.max_actors={most}; stop it and resume it with other bounds"
            )
        if self._phase != "train" or self._fleet is None or self._stopping.is_set():
            raise UserError(f"the run is in phase {self._phase}; rollout actors are there in phase train only")
        was = await self._scaled(actors, "command")
        wanted = actors * self.config.rollout.cpus + self.config.learner.ranks * self.config.learner.cpus
        cpus = ray.cluster_resources().get("CPU", 0.0)
        few = f"; they and the learner want {wanted:g} CPUs of {cpus:g}, so some wait until there are more"
        return {"was": was, "actors": actors, "note": few if wanted > cpus else ""}

    async def _scaled(self, actors: int, reason: str) -> int:
        assert self._fleet is not None
        was = await self._fleet.scale(actors)
        self._capacity.scalings[reason] += 1
        await self._tell("scale", {"was": was, "actors": actors, "reason": reason})
        return was

    async def until_ended(self) -> None:
        """Called by `diffpo stop`: returns, or dies, once the run has ended."""
        async with self._news:
            await self._news.wait_for(lambda: self._phase in ("finished", "stopped", "failed"))

    async def directory(self) -> str:
        """Called by whoever found this actor by its name: which run it is."""
        return self._directory.name

    async def status(self) -> dict[str, Any]:
        """Called by anyone who found this actor by its name: phase, newest values, and who does, or waits for, what."""
        last = next((values for kind, values in reversed(self._events) if kind == "step"), {})
        now = time.monotonic()
        learner, capacity = self._learner, self._capacity
        if capacity.learner:
            known = {"learner": capacity.learner}
        else:
            calls = learner.doing() if learner is not None else {}
            known = {name: await _answer(call) for name, call in calls.items()}
        return {
            "run": self.config.run.name,
            "directory": self._directory.name,
            "phase": self._phase,
            "stopping": self._stop_reason,
            "seconds": now - self._started,
            "idle_seconds": now - self._progressed,
            "steps": self.config.learner.steps,
            "metrics": self._exporter.address if self._exporter is not None else "",
            "waiting_for_nodes": capacity.wanting,
            "learner": known,
            "actors_wanted": self._fleet.wanted if self._fleet is not None else 0,
            "rollout_actors": await self._fleet.doing() if self._fleet is not None else {},
            "evaluation_workers": dict(self._evaluating) if self._phase == "evaluate" else {},
            "last_step": last,
        }

    # -- phases -------------------------------------------------------------------------------------------------

    async def _work(self) -> dict[str, Any]:
        config = self.config
        if config.metrics.port >= 0:
            await self._export()
        self._capacity.reserve()
        await self._enter("warm_start")
        await self._unless_stopped(self._start_learner())
        reached = {"steps": 0.0, "version": 0.0}
        if not self._stopping.is_set():
            await self._enter("train")
            reached = await self._train()
        self._learner.kill()
        self._learner = None
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

    async def _export(self) -> None:
        """Open the endpoint, and say where it is."""
        config = self.config
        now = time.monotonic
        live = {
            "run_seconds": lambda: now() - self._started,
            "run_idle_seconds": lambda: now() - self._progressed,
        }
        kept = {"learner_steps", *BUFFER_METRICS.values()}  # a resumed run goes on from what they were
        self._exporter = Exporter(host=config.metrics.host, port=config.metrics.port, live=live, later=kept)
        info = (
            f"name={config.run.name},version={version('diffpo')},task={config.task.name},learns={config.learner.train}"
        )
        self._exporter.update({f"run_info{{{info}}}": 1.0, "run_stall_seconds": config.run.stall_timeout})
        address = self._exporter.reachable(ray.util.get_node_ip_address())
        self._directory.announce([{"targets": [address], "labels": {"run": config.run.name}}])
        await self._tell("metrics", {"address": address})

    async def _evaluate(self, steps: int) -> dict[str, Any]:
        """What `evaluation.json` holds; one that was cut off goes on."""
        from learner.evaluation_fleet import room_for_workers
        from learner.evaluation_record import ShardFolder
        from learner.final_evaluation import Evaluation, summarise
        from learner.pareto import draw_pareto

        config = self.config
        listener = ray.get_runtime_context().current_actor
        last = max(self._checkpoints.checkpoints(), key=lambda one: one.version)
        folders = {"before": self._directory.warm_start.name, "after": self._checkpoints.location(last)}
        kept = ShardFolder(self._directory.place, config, folders)
        points = await Evaluation(config, folders, kept).on_ray(workers=room_for_workers(config), listener=listener)
        results = {"steps": steps, **summarise(config, points)}
        plot = draw_pareto(points, title=f"{config.task.name}, run {config.run.name}")
        self._directory.place.write(PARETO, plot)
        self._directory.write_json(EVALUATION, results)  # with it the run has finished: last
        kept.remove()
        return results

    async def _start_learner(self) -> None:
        """A learner with the weights of the warm start; again, should it die over them."""
        while True:
            controller = ray.get_runtime_context().current_actor
            self._learner = LearnerRanks(
                self.config, self._directory.name, self._parts, controller, self._capacity.group
            )
            try:
                await self._learner.warm_start()
                return
            except RayActorError as error:
                await self._learner_died(error)

    async def _learn(self) -> dict[str, float]:
        """The learner's loop; again from the newest checkpoint, should it die."""
        while True:
            try:
                return await self._learner.run(self._buffer)
            except RayActorError as error:
                await self._learner_died(error)
            await self._start_learner()

    async def _learner_died(self, error: RayActorError) -> None:
        """Raises unless another learner may be started."""
        if error.actor_init_failed:
            raise RunError(f"the learner cannot start: {cause_line(error)}") from error
        if failure_kind(error) is not FailureKind.INFRASTRUCTURE:
            raise RunError(f"the replay buffer died and does not come back: {cause_line(error)}") from error
        most = self.config.learner.max_restarts
        self._learner_deaths += 1
        if self._learner_deaths > most:
            raise RunError(
                f"the learner died {self._learner_deaths} times (learner.max_restarts={most}); the last: "
                f"{one_line(error)}"
            ) from error
        self._mark_progress()
        await self._tell("warning", {"text": f"the learner died and is started again: {one_line(error)}"})

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of a part that cannot be asked to stop; None when a stop came first and the part is abandoned."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()  # else it takes the end of its parts for a death, and starts them again
        return None

    async def _train(self) -> dict[str, float]:
        config = self.config
        self._buffer = (
            ray.remote(ReplayBuffer)
            .options(
                num_cpus=0,
                max_concurrency=BUFFER_CALLS,
                name="buffer",
                max_restarts=config.replay.max_restarts,
                max_task_retries=0,
                scheduling_strategy=on_this_node(),
            )
            .remote(
                groups_per_step=config.learner.groups_per_step,
                max_staleness=config.replay.max_staleness,
                admission=config.replay.admission,
                lease_seconds=config.replay.lease_seconds,
                drop_no_spread=config.replay.drop_no_spread,
                store=SegmentStore(self._directory.segments, memory_bytes=config.replay.memory_bytes),
                checkpoints=self._checkpoints,
                lock=self._directory.buffer_lock,
                keep_versions=config.replay.keep_versions,
                groups_limit=config.learner.steps * config.learner.groups_per_step,
            )
        )
        self._fleet = Fleet(
            config=config.rollout,
            buffer=self._buffer,
            make=partial(self._parts.producer, config),
            actor=self._parts.actor,
            progress=self._mark_progress,
        )
        training = asyncio.create_task(self._learn())
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
            await self._update_gauges()
            return reached
        except RayActorError as error:
            raise RunError(
                "the replay buffer died (killed, or out of memory) and does not come back "
                f"(replay.max_restarts={config.replay.max_restarts}): {cause_line(error)}"
            ) from error
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

    # -- progress and metrics -----------------------------------------------------------------------------------

    async def _enter(self, phase: str) -> None:
        self._phase = phase
        self._mark_progress()
        if self._exporter is not None:
            self._exporter.replace("run_phase", {phase: 1.0})
        await self._flush_metrics(now=True)
        await self._tell("phase", {"phase": phase})

    async def _tell(self, kind: str, values: dict[str, Any]) -> None:
        async with self._news:
            self._events.append((kind, values))
            self._news.notify_all()

    def _mark_progress(self) -> None:
        self._progressed = time.monotonic()

    async def _watch(self) -> None:
        """Raises when nothing has progressed for too long; sleeps until the moment that could be."""
        limit = self.config.run.stall_timeout
        while True:
            idle = time.monotonic() - self._progressed
            lacking = self._capacity.lacking
            if lacking and idle < self.config.run.capacity_timeout:
                await asyncio.sleep(NODE_SECONDS)
                continue
            if lacking:
                raise RunError(
                    f"no nodes for {idle:.0f} s (run.capacity_timeout={self.config.run.capacity_timeout:g}): "
                    f"{lacking}; add such nodes, or ask for less (cpus, gpus and labels of rollout and learner)"
                )
            if idle >= limit:
                waits = await self._who_waits()
                with suppress(*FAILURES):  # the message says the same
                    self._directory.write_json("stall.json", waits)
                raise RunError(
                    f"no progress for {idle:.0f} s in phase {self._phase} (run.stall_timeout={limit:g})"
                    f"{self._untrainable}; raise the limit if single groups or steps take longer, else look at the "
                    f"actors' logs; who waits for whom (RUN/stall.json): {waits}"  # long: what follows may be cut
                )
            await asyncio.sleep(limit - idle)

    async def _look_for_nodes(self) -> None:
        """Who waits for a node; told when it lasts, and once there are enough again."""
        capacity = self._capacity
        told = before = ""
        while True:
            await asyncio.sleep(NODE_SECONDS)
            await capacity.look(self._fleet)
            if before and not capacity.lacking:
                self._mark_progress()
            if told and not capacity.wanting:
                await self._tell("warning", {"text": "all have their nodes now"})
                told = ""
            elif capacity.wanting and not told and before:
                told = capacity.wanting
                await self._tell("warning", {"text": f"waiting for nodes: {told}"})
            before = capacity.wanting

    async def _who_waits(self) -> dict[str, Any]:
        """What every part is doing; one that does not answer is named as that."""
        found: dict[str, Any] = {"phase": self._phase, "learner": "is not there"}
        if self._learner is not None:
            found |= {name: await _answer(call) for name, call in self._learner.doing().items()}
        if self._buffer is not None:
            found["buffer"] = await _answer(self._buffer.waiting.remote())
        if self._fleet is not None:
            found["rollout actors"] = await self._fleet.doing()
        if self._phase == "evaluate":
            found["evaluation workers"] = self._evaluating or "have not begun"
        return found

    async def _report_quarantine(self) -> str:
        """Write the failures down with their tracebacks, and tell the last line of the newest."""
        found = await self._buffer.quarantine.remote()
        if self._task is None:
            self._task = await asyncio.to_thread(build_task, self.config.task)
        kept = [{"group": n, "example": _fields(self._task, n), "reason": reason} for n, reason in found]
        self._directory.write_json("quarantine.json", kept, default=str)  # a user's task may have any fields
        group, reason = found[-1]
        said = reason.strip().splitlines()[-1]
        await self._tell("quarantine", {"group": group, "reason": said, "quarantined": len(found)})
        return said

    async def _warn_of_deadline(self, expired: float, fleet: dict[str, float]) -> None:
        """Once, if actors that live could not renew in time."""
        pause, longest = fleet["rollout_longest_pause_seconds"], fleet["rollout_longest_group_seconds"]
        deadline = self.config.replay.lease_seconds
        if pause > deadline / 2:
            self._warned = True
            text = (
                f"{expired:.0f} leases ran out: replay.lease_seconds is {deadline:g}, and an actor was busy for up to "
                f"{pause:.2g} s between two renewals (a group took up to {longest:.2g} s); give {3 * pause:.2g} or more"
            )
            await self._tell("warning", {"text": text})

    async def _collect(self) -> None:
        while True:
            try:
                await self._update_gauges()
            except ActorUnavailableError as error:  # the buffer is being started again
                if not comes_back(error):
                    raise
            await asyncio.sleep(GAUGE_SECONDS)

    async def _update_gauges(self) -> None:
        if self._fleet is None:
            return
        if self._stopping.is_set():  # a buffer that was started anew does not know
            await self._buffer.close.remote()
        await self._fleet.leave_drained_nodes()
        gauges, fleet = await asyncio.gather(self._buffer.gauges.remote(), self._fleet.gauges())
        mark = tuple(gauges[f"groups_{state}"] for state in ("finished", "sampled", "trained"))
        if mark != self._progress_mark:
            self._progress_mark = mark
            self._mark_progress()
            self._quarantined_before = gauges["groups_quarantined"]
        if gauges["groups_quarantined"] > self._quarantined:
            self._quarantined = gauges["groups_quarantined"]
            last = await self._report_quarantine()
            if self._quarantined - self._quarantined_before >= MOST_QUARANTINED:
                raise RunError(
                    f"{self._quarantined - self._quarantined_before:.0f} groups in a row failed, so it is not their "
                    f"prompts; the last: {last} (RUN/quarantine.json); mend the reward function, or where logits are "
                    "not finite start another run with model.path=RUN/checkpoints/STEP and a lower "
                    "learner.learning_rate"
                )
        if gauges["lost_groups"] > self._lost:
            self._lost = gauges["lost_groups"]
            text = f"the bytes of {self._lost:.0f} groups that were finished are in no file; they are generated again"
            await self._tell("warning", {"text": text})
        if gauges["expired_leases"] > 0 and not self._warned:
            await self._warn_of_deadline(gauges["expired_leases"], fleet)
        if gauges["groups_discarded"] + gauges["groups_quarantined"] > 0:
            self._untrainable = (
                f": {gauges['no_spread_discards']:.0f} groups were discarded for equal rewards (a longer warm start, "
                f"another reward, or replay.drop_no_spread=false) and {self._quarantined:.0f} quarantined for "
                "failing rewards or logits (RUN/quarantine.json)"
            )
        capacity, now = self._capacity, time.monotonic()
        proposal = None if self._stopping.is_set() else capacity.propose(gauges, self._fleet, now)
        if proposal is not None:
            await self._scaled(*proposal)
        fleet |= capacity.gauges(self._fleet.wanted)
        fleet["learner_restarts"] = float(self._learner_deaths)
        buffer = {BUFFER_METRICS[key]: value for key, value in gauges.items() if key in BUFFER_METRICS}
        self._pace.see(now, buffer | fleet)
        if self._exporter is None:
            return
        self._exporter.update(buffer)
        self._exporter.update({key: gauges[key] for key in STALENESS_KEYS if key in gauges} | fleet)
        states = {key.removeprefix("groups_"): gauges[key] for key in gauges if key.startswith("groups_")}
        self._exporter.replace("replay_groups", states)


def _fields(task: Task, cursor: int) -> dict[str, Any] | None:
    """Of an example; None of one that cannot be made, which may be why its group failed."""
    try:
        return vars(task.example("train", cursor))
    except Exception:
        return None


async def _answer(call: Any) -> Any:
    """The reply of an actor, or that it gives none."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(call.future()), ANSWER_SECONDS)
    except (TimeoutError, RayError) as error:
        return f"does not answer ({one_line(error) or 'busy, or stopped'})"
