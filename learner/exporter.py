"""Exporter: the Prometheus endpoint of a run.

One endpoint, in the controller: a custom collector over the newest values that parts have reported, in a registry of
its own. Only names and labels of the catalogue are exported; counters and histograms are there, at 0, from the start
(but for those that a run goes on from), so that their first increase is seen. Bound to loopback unless the
configuration says otherwise.
"""

import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import UserError, cause
from common.histogram import Histogram
from common.metrics import CATALOGUE, split_labels

EVERYWHERE = ("0.0.0.0", "::")
SUM = ("sum",)
Series = dict[tuple[str, ...], float]


class Exporter(Collector):
    """Lives in the controller from start to end of a run; `update` is called with every report."""

    def __init__(
        self,
        *,
        host: str,
        port: int,
        live: Mapping[str, Callable[[], float]] | None = None,
        later: Collection[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Open the endpoint.

        Args:
            host: address to bind.
            port: to bind; 0 is a free one.
            live: values that are asked for at each scrape.
            later: counters that may begin above 0, so that a 0 before would look like an increase.
            labels: of every series, beside those of the catalogue.

        Raises:
            UserError: when the address cannot be bound.
        """
        self._live = dict(live or {})
        self._labels = dict(labels or {})
        self._histograms = {name: Histogram(name) for name, metric in CATALOGUE.items() if metric.kind == "histogram"}
        self._values: dict[str, Series] = {
            name: dict.fromkeys(metric.values or ((),), 0.0)
            for name, metric in CATALOGUE.items()
            if metric.kind == "counter" and name not in later
        }
        for histogram in self._histograms.values():
            self.update(histogram.values())
        self._registry = CollectorRegistry()
        self._registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry=self._registry)
        except OSError as error:
            raise UserError(
                f"metrics endpoint {host}:{port} cannot be opened ({error.strerror}); "
                "set metrics.port=0 for a free port"
            ) from error
        self._host, self._port = host, self._server.server_port
        self.address = self.reachable(host)

    def reachable(self, node: str) -> str:
        """Address for other machines, where `node` is this one's: the endpoint may be bound to all there are."""
        host = node if self._host in EVERYWHERE else self._host
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    def update(self, values: Mapping[str, float]) -> None:
        """Take new values; keys as `split_labels` takes them. All series of a metric named here are replaced.

        A value under a histogram's own name is one that it shall count.

        Raises:
            KeyError: for a name or a label that the catalogue does not have.
        """
        fresh: dict[str, Series] = {}
        for key, value in values.items():
            name, labels = split_labels(key)
            if not labels and name in self._histograms:
                histogram = self._histograms[name]
                histogram.observe(value)
                self.update(histogram.values())
            else:
                fresh.setdefault(name, {})[labels] = value
        self._values.update(fresh)

    def replace(self, name: str, values: Mapping[str, float]) -> None:
        """Set all series of a metric with one label at once."""
        label = CATALOGUE[name].labels[0]
        self.update({f"{name}{{{label}={of}}}": value for of, value in values.items()})

    def collect(self) -> Iterator[Metric]:
        """Called by the client library at each scrape."""
        live: dict[str, Series] = {name: {(): ask()} for name, ask in self._live.items()}
        names, values = tuple(self._labels), tuple(self._labels.values())
        for name, series in (self._values | live).items():
            metric = CATALOGUE[name]
            if metric.kind == "histogram":
                buckets = [(labels[0], value) for labels, value in series.items() if labels != SUM]
                counted = HistogramMetricFamily(metric.exported, metric.meaning, labels=names)
                counted.add_metric(values, buckets, series[SUM])
                yield counted
                continue
            family: Any = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            found = family(metric.exported, metric.meaning, labels=(*names, *metric.labels))
            for labels, value in series.items():
                found.add_metric((*values, *labels), value)
            yield found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def check_port(host: str, port: int) -> None:
    """Refuse a port that is in use, or an address that is not this machine's, before anything is started.

    Raises:
        UserError: naming the address and the way out.
    """
    if port < 0:
        return
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the latter: a name with a part that is too long
        raise UserError(
            f"metrics.port={port} on {host} is not usable ({cause(error)}); set metrics.port=0 for a free port, and "
            "metrics.host=127.0.0.1 or another address of this machine"
        ) from error
