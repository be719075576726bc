"""Benchmark `exporter`: what a scrape costs when all that a run can export is there, over HTTP as Prometheus asks.

The endpoint is the controller's. It gets what the fleet makes of 64 actors (sums of their counters and buckets: no
series is an actor's own, so their number costs the sums alone) and, beside that, every metric of the catalogue with
every value of its labels. Values change between two scrapes.

- `scrape_ms`: median time of a scrape, request to last byte; `scrape_ms_low` and `_high`: of the medians of `repeats`
  rounds, `scrape_ms_p99` over all of them.
- `series`: samples in one scrape.
- `update_ms`: median time in which the controller adds 64 actors up and hands everything to the endpoint, which it does
  every 2 s.
- `bytes`: of one scrape.
"""

import random
import time
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

from actors.fleet import BUCKETS, HISTOGRAMS
from common.histogram import Histogram, reported_keys
from common.metrics import CATALOGUE, Metric
from learner.benchmarks import Options
from learner.exporter import Exporter

ACTORS = 64
COMPLETIONS = 20  # that one actor has more of at each round


def run(options: Options) -> dict[str, Any]:
    """All measurements."""
    repeats, scrapes = (3, 20) if options.quick else (10, 100)
    exporter = Exporter(host="127.0.0.1", port=0)
    try:
        actors = [_Actor(seed) for seed in range(ACTORS)]
        medians: list[float] = []
        took: list[float] = []
        updates: list[float] = []
        text = b""
        for _ in range(repeats):
            times = []
            for _ in range(scrapes):
                for actor in actors:
                    actor.go_on()
                said = [actor.gauges() for actor in actors]
                started = time.perf_counter()
                exporter.update(everything(said))
                updates.append(time.perf_counter() - started)
                started = time.perf_counter()
                with urlopen(f"http://{exporter.address}/metrics", timeout=10) as reply:
                    text = reply.read()
                times.append(time.perf_counter() - started)
            medians.append(median(times))
            took += times
    finally:
        exporter.close()
    return {
        "scrape_ms": round(1000 * median(took), 3),
        "scrape_ms_low": round(1000 * min(medians), 3),
        "scrape_ms_high": round(1000 * max(medians), 3),
        "scrape_ms_p99": round(1000 * quantiles(took, n=100)[-1], 3),
        "series": sum(not line.startswith(b"#") for line in text.splitlines()),
        "update_ms": round(1000 * median(updates), 3),
        "bytes": len(text),
        "actors": ACTORS,
        "repeats": repeats,
    }


class _Actor:
    """Counts what a rollout actor counts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._histograms = [Histogram(name) for name in HISTOGRAMS]

    def go_on(self) -> None:
        """Some groups later."""
        for histogram in self._histograms:
            for _ in range(COMPLETIONS):
                histogram.observe(self._random.lognormvariate(0, 2))

    def gauges(self) -> dict[str, float]:
        return {key: value for histogram in self._histograms for key, value in histogram.values().items()}


def everything(said: list[dict[str, float]]) -> dict[str, float]:
    """All that the controller can report at once, and the sums of what actors said."""
    return every_series(random.random()) | {key: sum(own[key] for own in said) for key in BUCKETS}


def every_series(value: float) -> dict[str, float]:
    """Every metric of the catalogue with every value of its labels, as parts report them."""
    keys = []
    for metric in CATALOGUE.values():
        if metric.kind == "histogram":
            keys += reported_keys(metric.name)
        else:
            keys += [_key(metric, values) for values in metric.values or (("of_the_run",) * len(metric.labels),)]
    return dict.fromkeys(keys, value)


def _key(metric: Metric, values: tuple[str, ...]) -> str:
    if metric.labels == ("bucket", "value"):
        return f"{metric.name}{{{values[0]}={values[1]}}}" if values[0] != "all" else metric.name
    labels = ",".join(f"{label}={value}" for label, value in zip(metric.labels, values, strict=True))
    return f"{metric.name}{{{labels}}}" if labels else metric.name
