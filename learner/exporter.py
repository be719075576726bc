"""Exporter: the Prometheus endpoint of a run.

One endpoint, in the controller: a custom collector over the newest values that parts have reported, in a registry of
its own. Only names of the catalogue are exported. Bound to loopback unless the configuration says otherwise.
"""

import socket
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import UserError, cause
from common.metrics import CATALOGUE, PREFIX, split_labels


class Exporter(Collector):
    """Lives in the controller from start to end of a run; `update` is called with every report."""

    def __init__(self, *, host: str, port: int) -> None:
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry=self._registry)
        except OSError as error:
            raise UserError(
                f"metrics endpoint {host}:{port} cannot be opened ({error.strerror}); "
                "set metrics.port=0 for a free port"
            ) from error
        self.address = f"{host}:{self._server.server_port}"

    def update(self, values: Mapping[str, float]) -> None:
        """Take new values; keys are `name` or `name{label=value}`. All series of a metric named here are replaced.

        Raises:
            KeyError: for a name that the catalogue does not have.
        """
        fresh: dict[str, dict[tuple[str, ...], float]] = {}
        for key, value in values.items():
            name, labels = split_labels(key)
            if name not in CATALOGUE:
                raise KeyError(f"metric {name!r} is not in common.metrics.CATALOGUE")
            wanted = len(CATALOGUE[name].labels)
            labels = labels or ("all",) * wanted
            fresh.setdefault(name, {})[labels] = value
        self._values.update(fresh)

    def replace(self, name: str, values: Mapping[str, float]) -> None:
        """Set all series of a metric with one label at once."""
        self._values[name] = {(label,): value for label, value in values.items()}

    def collect(self) -> Iterator[Metric]:
        """Called by the client library at each scrape."""
        for name, series in list(self._values.items()):
            metric = CATALOGUE[name]
            family: Any = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                PREFIX + name, metric.meaning, labels=metric.labels
            )
            for labels, value in list(series.items()):
                family.add_metric(labels, value)
            yield family

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
