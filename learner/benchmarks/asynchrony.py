"""Benchmark `async`: what asynchrony gains and costs, with simulated generations and learner steps on the real system.

Real are Ray, the replay buffer, the rollout actors' loop, leases and weights (1.06 M numbers a version, groups of 40
kB); a generation and a learner step only take their time, and import neither torch nor transformers. `event_model` says
what the same policy gives for the same draws where messages cost nothing.

- `efficiency_cv0`, `_cv05`, `_cv1`: speed-up of asynchronous over synchronous (`max_staleness` 0) running as a share of
  the model's, at that coefficient of variation of generation times; the worst of `max_staleness` 1, 2, 4. 32 slots in
  2 actors, 32 groups a step, mean generation time = learner step. `speedups`: each of them, real and modelled.
- `speedup_cv05`: the speed-up at 0.5 with `max_staleness` 3 in a longer run, since the first steps fill the buffer;
  `model_speedup_cv05` the model's.
- `bound_violations`: groups trained beyond the bound of their policy, or results with too old tokens, of
  `bound_groups` groups under short, wildly varying generations, for every policy that promises a bound.
- `wasted`: share of groups that windowed FIFO generated and lost (stale, or their lease), over all its runs.
- `learner_idle`: share of time that the learner waits with slots for 1.2 times what it trains, CV 0.5, `max_staleness`
  4; `learner_idle_excess`: the largest excess over the model's in the runs of the speed-ups.
- `wakeup_p50_ms`: from the submit that completes a batch to the learner that waited for it holding it.
- `buffer_vs_queue`: groups per second through lease, submit, sample and publish, 256 a call, over those through
  `ray.util.queue`, put and taken one at a time.
- `adopt_stall`: time that a rollout stands still per version, as a share of a learner step of 1 s; `adopt_8_vs_1`:
  median time from publication to adoption with 8 actors over that with 1.
- `scaling_64`: groups per second of 64 engines in 8 processes over 64 times those of one; 32 groups/s of 40 kB.
  `control_cores`: CPU of buffer and controller meanwhile, in cores; the controller collects and exports metrics as in a
  run.
- `live_scaling`: throughput after one actor was added to 2 while it ran, over 3/2 of that before.
- `policies`: what the model says about all policies at `max_staleness` 3 (speed-up, largest staleness, wasted).
- `splits`: what it says about the ways to split a bound between tickets and window: speed-up by share of a step that
  the window takes, mean of 3 draws.
"""

import asyncio
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.util.queue import Queue

from actors.fleet import Fleet
from common.admission import ADMISSIONS, WindowedFifo
from common.config import RolloutConfig
from common.histogram import reported_keys
from common.lease import FinishedGroup, Lease
from learner.benchmarks import Options
from learner.benchmarks.engine_host import EngineHost
from learner.benchmarks.event_model import Outcome, Workload, simulate
from learner.benchmarks.simulated_producer import MakeSimulated
from learner.benchmarks.simulated_run import FREE, SimulatedLearner, make_buffer, simulated_run
from learner.exporter import Exporter
from learner.ray_connection import LOCAL, connect

CVS = {"cv0": 0.0, "cv05": 0.5, "cv1": 1.0}
ETAS = (1, 2, 4)
PAYLOAD = b"\0" * 40_000
GAUGE_SECONDS = 2.0  # as the controller


def run(options: Options) -> dict[str, Any]:
    """All measurements; each is printed as it comes."""
    connect(LOCAL, way_out="")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _Measurements(options, Path(folder)).all()
    finally:
        ray.shutdown()


class _Measurements:
    """One call of the benchmark."""

    def __init__(self, options: Options, folder: Path) -> None:
        self._quick, self._console, self._folder = options.quick, options.console, folder
        self._result: dict[str, Any] = {}
        self._windowed: list[Outcome] = []

    def all(self) -> dict[str, Any]:
        self._add(self.speed())
        self._add(self.idle())
        self._add(self.bound())
        self._add({"wasted": _wasted(self._windowed)})
        self._add({"wakeup_p50_ms": self.wakeup()})
        self._add({"buffer_vs_queue": self.buffer_vs_queue()})
        self._add(self.adoption())
        self._add(asyncio.run(self.scaling()))
        self._add({"live_scaling": asyncio.run(self.live_scaling())})
        self._add({"policies": policies(200), "splits": splits(30 if self._quick else 60)})
        return self._result

    def _add(self, found: dict[str, Any]) -> None:
        self._result |= found
        self._console.print(str(found))

    # -- time ---------------------------------------------------------------------------------------------------

    def _workload(self, cv: float, *, long: bool = False) -> Workload:
        seconds = 0.25 if self._quick else 1.0
        steps = (36 if self._quick else 60) if long else (12 if self._quick else 30)
        return Workload(generation_seconds=seconds, cv=cv, train_seconds=seconds, steps=steps)

    def _outcomes(self, workload: Workload, eta: int) -> tuple[Outcome, Outcome]:
        """Real and modelled, of windowed FIFO."""
        with simulated_run(workload, self._folder, max_staleness=eta) as going:
            ray.get(going.learner.run.remote(workload.steps))
            real = going.outcome()
        self._windowed.append(real)
        return real, simulate(_policy("windowed_fifo", workload, eta), workload)

    def speed(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        table: dict[str, list[float]] = {}
        excess = []
        for name, cv in CVS.items():
            workload = self._workload(cv)
            sync, sync_model = self._outcomes(workload, 0)
            efficiency = []
            for eta in ETAS:
                real, model = self._outcomes(workload, eta)
                speedup, modelled = sync.seconds / real.seconds, sync_model.seconds / model.seconds
                table[f"{name}, max_staleness {eta}"] = [round(speedup, 3), round(modelled, 3)]
                excess.append(real.idle - model.idle)
                efficiency.append(speedup / modelled)
            found[f"efficiency_{name}"] = min(efficiency)
        workload = self._workload(0.5, long=True)
        (sync, sync_model), (real, model) = self._outcomes(workload, 0), self._outcomes(workload, 3)
        excess.append(real.idle - model.idle)
        found |= {
            "speedup_cv05": sync.seconds / real.seconds,
            "model_speedup_cv05": sync_model.seconds / model.seconds,
        }
        return found | {"learner_idle_excess": max(excess), "speedups": table}

    def idle(self) -> dict[str, float]:
        workload = self._workload(0.5)
        workload = replace(workload, train_seconds=workload.train_seconds * 1.2)
        real, model = self._outcomes(workload, 4)
        return {"learner_idle": real.idle, "model_learner_idle": model.idle}

    # -- bound --------------------------------------------------------------------------------------------------

    def bound(self) -> dict[str, int]:
        """Every policy that promises a bound, with generations of wildly varying length and hardly any training.

        No time is measured, so all go at once.
        """
        cases = [("windowed_fifo", 1), ("windowed_fifo", 4), ("strict_fifo", 2), ("drop_when_stale", 1)]
        steps = 10_000 // (8 * len(cases)) + 1
        workload = Workload(
            groups_per_step=8, slots=32, generation_seconds=0.02, cv=2.0, train_seconds=0.005, steps=steps
        )

        def play(case: tuple[str, int]) -> tuple[Outcome, int]:
            policy, eta = case
            with simulated_run(
                workload, self._folder, max_staleness=eta, admission=policy, payload_bytes=1000
            ) as going:
                ray.get(going.learner.run.remote(steps))
                outcome = going.outcome()
                broken = sum(age > eta for age in outcome.staleness) + int(going.gauges()["violations"])
            return outcome, broken

        with ThreadPoolExecutor(len(cases)) as pool:
            played = list(pool.map(play, cases))
        self._windowed += [
            outcome for (policy, _), (outcome, _) in zip(cases, played, strict=True) if "windowed" in policy
        ]
        return {
            "bound_violations": sum(broken for _, broken in played),
            "bound_groups": sum(len(outcome.staleness) for outcome, _ in played),
        }

    # -- messages -----------------------------------------------------------------------------------------------

    def wakeup(self) -> float:
        """Milliseconds, median."""
        buffer = make_buffer(self._folder, groups_per_step=1, max_staleness=0)
        learner: Any = ray.remote(SimulatedLearner).options(**FREE).remote(buffer=buffer, train_seconds=0, weights=1)
        ray.get(learner.publish.remote([]))
        taken = []
        for _ in range(50 if self._quick else 200):
            (lease,) = _leases(buffer, 1)
            waiting = learner.sample.remote()
            time.sleep(0.02)  # it waits by now
            sent = time.monotonic()
            buffer.submit.remote("driver", [_finished(lease)])
            numbers, arrived = ray.get(waiting)
            taken.append(arrived - sent)
            ray.get(learner.publish.remote(numbers))
        return median(taken) * 1000

    def buffer_vs_queue(self) -> float:
        """256 groups a call; both have passed something before their time is taken."""
        steps, size = 10 if self._quick else 40, 256
        buffer = make_buffer(self._folder, groups_per_step=size, max_staleness=1)
        learner: Any = ray.remote(SimulatedLearner).options(**FREE).remote(buffer=buffer, train_seconds=0, weights=1)

        def through_buffer(steps: int) -> float:
            started = time.monotonic()
            trained = learner.run.remote(steps)
            for _ in range(steps):
                leases = _leases(buffer, size)
                ray.get(buffer.submit.remote("driver", [_finished(lease) for lease in leases]))
            ray.get(trained)
            return steps * size / (time.monotonic() - started)

        queue = Queue(actor_options=FREE)
        take: Any = ray.remote(_take).options(**FREE)

        def through_queue(count: int) -> float:
            started = time.monotonic()
            taken = take.remote(queue, count)
            for _ in range(count):
                queue.put(PAYLOAD)
            ray.get(taken)
            return count / (time.monotonic() - started)

        through_buffer(1)
        through_queue(10)
        ratio = through_buffer(steps) / through_queue(300 if self._quick else 1000)
        queue.shutdown()
        return ratio

    # -- weights ------------------------------------------------------------------------------------------------

    def adoption(self) -> dict[str, float]:
        """Actors that hand a group in every 50 ms; publications every 0.4 s."""
        delay, stall = {}, []
        for actors in (1, 8):
            workload = Workload(
                groups_per_step=6 * actors, slots=actors, generation_seconds=0.05, cv=0.5, train_seconds=0.3, steps=24
            )
            with simulated_run(workload, self._folder, max_staleness=4, actors=actors) as going:
                ray.get(going.learner.run.remote(workload.steps))
                published = going.report()["published"]
                seen: list[Any] = ray.get([actor.gauges.remote() for actor in going.actors])
            delay[actors] = median(
                gauges[key] - published[version]
                for gauges in seen
                for version in range(2, workload.steps)
                if (key := f"adopted_{version}") in gauges
            )
            *_, adoptions, seconds = reported_keys("weights_adopt_seconds")
            stall.append(sum(g[seconds] for g in seen) / sum(g[adoptions] for g in seen))
        return {
            "adopt_stall": max(stall),
            "adopt_8_vs_1": delay[8] / delay[1],
            "adopt_ms_1": delay[1] * 1000,
            "adopt_ms_8": delay[8] * 1000,
        }

    # -- scale --------------------------------------------------------------------------------------------------

    async def scaling(self) -> dict[str, float]:
        cycles = 6 if self._quick else 15
        one, _ = await self._engines(hosts=1, engines=1, cycles=cycles)
        many, cores = await self._engines(hosts=8, engines=8, cycles=cycles)
        return {"scaling_64": many / (64 * one), "control_cores": cores, "groups_per_second_64": many}

    async def _engines(self, *, hosts: int, engines: int, cycles: int) -> tuple[float, float]:
        """Groups per second of engines that take 2 s for a group, and CPU of buffer and controller, in cores."""
        size = max(1, hosts * engines // 2)
        workload = Workload(
            groups_per_step=size, slots=1, generation_seconds=2.0, cv=0.0, train_seconds=0.5, steps=2 * cycles
        )
        buffer = make_buffer(self._folder, groups_per_step=size, max_staleness=4)
        learner: Any = ray.remote(SimulatedLearner).options(**FREE).remote(buffer=buffer, train_seconds=0.5)
        make = MakeSimulated(workload=workload, slots=1)
        parts: list[Any] = [
            ray.remote(EngineHost)
            .options(max_concurrency=4, **FREE)
            .remote(names=[f"engine-{host}-{n}" for n in range(engines)], buffer=buffer, make=make)
            for host in range(hosts)
        ]
        await asyncio.gather(*[part.gauges.remote() for part in parts])
        lives = [part.run.remote() for part in parts]
        collecting = asyncio.ensure_future(_collect(buffer, parts))
        before = await buffer.cpu_seconds.remote(), time.process_time(), time.monotonic()
        arrivals = await learner.timed_run.remote(workload.steps if hosts > 1 else cycles)
        after = await buffer.cpu_seconds.remote(), time.process_time(), time.monotonic()
        collecting.cancel()
        await buffer.close.remote()
        await asyncio.gather(*[part.stop.remote() for part in parts], *lives)
        for part in (*parts, learner, buffer):
            ray.kill(part)
        step = 2 if hosts > 1 else 1  # all engines end together, which fills two batches
        ends = arrivals[step - 1 :: step]
        rate = size * step * (len(ends) - 1) / (ends[-1] - ends[0])
        return rate, (after[0] - before[0] + after[1] - before[1]) / (after[2] - before[2])

    async def live_scaling(self) -> float:
        """A fleet of 2 that limits the run, then of 3."""
        steps = 9 if self._quick else 30
        workload = Workload(groups_per_step=8, slots=8, generation_seconds=1.0, cv=0.5, train_seconds=0.02, steps=steps)
        buffer = make_buffer(self._folder, groups_per_step=8, max_staleness=8)
        learner: Any = ray.remote(SimulatedLearner).options(**FREE).remote(buffer=buffer, train_seconds=0.02)
        make = MakeSimulated(workload=workload, slots=8)
        fleet = Fleet(
            config=RolloutConfig(actors=2, slots=8, cpus=0.01), buffer=buffer, make=make, progress=lambda: None
        )
        running = asyncio.ensure_future(fleet.run())
        rates = []
        for actors in (2, 3):
            await fleet.scale(actors)
            while (await fleet.gauges())["rollout_actors"] < actors:
                await asyncio.sleep(0.1)
            await learner.run.remote(12)  # what had been generated before is used up
            started = time.monotonic()
            await learner.run.remote(steps * actors)
            rates.append(steps * actors * 8 / (time.monotonic() - started))
        await buffer.close.remote()
        await fleet.stop()
        await running
        return rates[1] / rates[0] / 1.5


def _policy(name: str, workload: Workload, eta: int) -> Any:
    return ADMISSIONS[name](groups_per_step=workload.groups_per_step, max_staleness=eta)


def _wasted(outcomes: list[Outcome]) -> float:
    dropped = sum(outcome.dropped for outcome in outcomes)
    return dropped / (dropped + sum(len(outcome.staleness) for outcome in outcomes))


def _leases(buffer: Any, want: int) -> list[Lease]:
    found: list[Lease] = []
    while len(found) < want:
        reply: Any = ray.get(buffer.lease.remote("driver", want - len(found)))
        found += reply.leases
    return found


def _finished(lease: Any) -> FinishedGroup:
    return FinishedGroup(lease.number, lease.attempt, PAYLOAD, 1.0, lease.version, 8)


def _take(queue: Queue, count: int) -> None:
    for _ in range(count):
        queue.get()


async def _collect(buffer: Any, parts: list[Any]) -> None:
    """What the controller does besides waiting: gauges of all parts, into the exporter."""
    exporter = Exporter(host="127.0.0.1", port=0)
    try:
        while True:
            gauges, *_ = await asyncio.gather(buffer.gauges.remote(), *[part.gauges.remote() for part in parts])
            exporter.update({"replay_fill": gauges["fill"], "replay_tickets": gauges["tickets"]})
            await asyncio.sleep(GAUGE_SECONDS)
    finally:
        exporter.close()


def policies(steps: int) -> dict[str, list[float]]:
    """By policy and CV: speed-up over synchronous, largest staleness, share of groups wasted, at `max_staleness` 3."""
    found = {}
    for cv in CVS.values():
        workload = Workload(generation_seconds=1.0, cv=cv, train_seconds=1.0, steps=steps)
        sync = simulate(_policy("windowed_fifo", workload, 0), workload)
        for name in ADMISSIONS:
            outcome = simulate(_policy(name, workload, 3), workload)
            found[f"{name}, cv {cv:g}"] = [
                round(sync.seconds / outcome.seconds, 2),
                max(outcome.staleness),
                round(outcome.wasted, 3),
            ]
    return found


def splits(steps: int) -> dict[str, list[float]]:
    """By `max_staleness` and CV: speed-up over synchronous with a window of 0, 1/4, 1/2, 3/4 and all of a step."""
    found: dict[str, list[float]] = {}
    for cv in (0.5, 1.0):
        workload = Workload(generation_seconds=1.0, cv=cv, train_seconds=1.0, steps=steps)
        draws = [replace(workload, seed=seed) for seed in range(3)]
        sync = [simulate(_policy("windowed_fifo", draw, 0), draw).seconds for draw in draws]
        size = workload.groups_per_step
        for eta in (1, 2, 3, 4):
            row = []
            for quarters in range(5):
                window = 1 + size * quarters // 4
                tickets = (eta + 1) * size + 1 - window
                split = WindowedFifo(groups_per_step=size, tickets=tickets, window=min(window, tickets))
                ratios = [seconds / simulate(split, draw).seconds for seconds, draw in zip(sync, draws, strict=True)]
                row.append(round(sum(ratios) / len(ratios), 2))
            found[f"max_staleness {eta}, cv {cv:g}"] = row
    return found
