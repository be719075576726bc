"""RunMetrics: where the numbers of a run go: `metrics.jsonl`, trackers, and the Prometheus endpoint."""

import asyncio
import time
from collections.abc import Callable, Mapping

import ray

from common.config import Config
from common.errors import cause, one_line
from common.place import FAILURES
from common.release import release
from learner.buffer_gauges import COUNTERS, METRICS, in_catalogue
from learner.event_log import EventLog
from learner.exporter import Exporter
from learner.pace import Pace
from learner.run_directory import RunDirectory
from learner.trackers import Trackers, open_trackers


class RunMetrics:
    """Owned by the controller, and as old as the run."""

    def __init__(self, config: Config, directory: RunDirectory, events: EventLog) -> None:
        self._config, self._directory, self._events = config, directory, events
        self._started = time.monotonic()
        self._pace = Pace()
        self._trackers: Trackers | None = None
        self._exporter: Exporter | None = None
        self._unwritten = False
        self._counted: dict[str, float] = {}
        self._checkpoint = -1.0  # newest, as the learner told

    @property
    def seconds(self) -> float:
        """Since the run began, or went on."""
        return time.monotonic() - self._started

    @property
    def address(self) -> str:
        """Of the endpoint, on this machine; empty while there is none."""
        return self._exporter.address if self._exporter is not None else ""

    async def open_trackers(self) -> None:
        """Before the first report."""
        self._trackers = await asyncio.to_thread(open_trackers, self._config, self._directory, self._events.warner())

    async def open_endpoint(self, live: Mapping[str, Callable[[], float]]) -> None:
        """Open the endpoint, and say where it is; `live` values are asked for at each scrape, as `run_seconds` is."""
        config = self._config
        live = {"run_seconds": lambda: self.seconds, **live}
        kept = {"learner_steps", *METRICS.values()}  # a resumed run goes on from what they were
        labels = {"run": config.run.name}  # a target may have many runs, one after the other
        host, port = config.metrics.host, config.metrics.port
        self._exporter = Exporter(host=host, port=port, live=live, later=kept, labels=labels)
        info = f"name={config.run.name},version={release()},task={config.task.name},learns={config.learner.train}"
        self._exporter.update({f"run_info{{{info}}}": 1.0, "run_stall_seconds": config.run.stall_timeout})
        address = self._exporter.reachable(ray.util.get_node_ip_address())
        try:
            self._directory.announce([{"targets": [address], "labels": {"run": config.run.name}}])
        except FAILURES as error:
            await self._events.warn(f"Prometheus will not find {address} by itself: {one_line(error)}")
        await self._events.tell("metrics", {"address": address})

    async def report(self, kind: str, values: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl`, and an event."""
        now = time.monotonic()
        if self._exporter is not None:
            self._exporter.update(values)
        row = dict(values) | self._pace.beside(kind, values, now)
        if self._trackers is not None:
            self._trackers.put(kind, row)
        try:
            self._directory.append_metrics({"kind": kind, "seconds": round(now - self._started, 3), **row})
        except FAILURES as error:
            await self._warn_of_gap(error)
        await self._events.tell(kind, row)
        checkpoint = row.get("checkpoint_step", self._checkpoint)
        self._checkpoint, new = checkpoint, checkpoint != self._checkpoint
        await self._flush(now=new)

    async def enter(self, phase: str) -> None:
        """Another phase begins."""
        if self._exporter is not None:
            self._exporter.replace("run_phase", {phase: 1.0})
        await self._flush(now=True)

    def gauge(self, buffer: Mapping[str, float], others: Mapping[str, float]) -> None:
        """The newest gauges: of the buffer in its own names, of others in the catalogue's."""
        gauges = {**in_catalogue(buffer), **others}
        for name in COUNTERS & gauges.keys():  # one that came back from its files may have lost the last of them
            gauges[name] = self._counted[name] = max(gauges[name], self._counted.get(name, 0.0))
        self._pace.see(time.monotonic(), gauges)
        if self._exporter is not None:
            self._exporter.update(gauges)

    async def close_trackers(self) -> None:
        """Let them take what they have; what they warn of is told before this returns. May be called again."""
        if self._trackers is not None:
            await asyncio.to_thread(self._trackers.close)

    async def close(self) -> None:
        """Close all that was opened."""
        await self.close_trackers()
        if self._exporter is not None:
            self._exporter.close()

    async def _flush(self, *, now: bool) -> None:
        try:
            await asyncio.to_thread(self._directory.flush_metrics, now=now)
        except FAILURES as error:
            await self._warn_of_gap(error)

    async def _warn_of_gap(self, error: Exception) -> None:
        if not self._unwritten:
            self._unwritten = True
            await self._events.warn(f"metrics.jsonl lacks steps, it cannot be written: {cause(error)}")
