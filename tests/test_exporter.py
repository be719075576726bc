"""Exporter: what Prometheus sees when it scrapes."""

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.config import MetricsConfig
from common.errors import UserError
from common.metrics import CATALOGUE, PREFIX, markdown_table, split_labels
from learner.exporter import Exporter, check_port

Labels = tuple[tuple[str, str], ...]


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    found = Exporter(host="127.0.0.1", port=0)
    yield found
    found.close()


def scrape(exporter: Exporter) -> dict[tuple[str, Labels], float]:
    """Every sample by name and sorted labels."""
    with urlopen(f"http://{exporter.address}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_nothing_is_exported_before_anything_is_reported(exporter: Exporter) -> None:
    assert scrape(exporter) == {}


def test_values_arrive_with_prefix_suffix_and_labels(exporter: Exporter) -> None:
    exporter.update({"learner_loss": 0.25, "learner_steps": 3.0, "learner_weight_mean{staleness=7}": 9.0})
    # a report replaces all series of a metric: nothing of the batch that had staleness 7 is left
    weights = {"learner_weight_mean{staleness=2}": 0.5, "learner_weight_mean{reveal_step=4}": 0.75}
    exporter.update({"learner_weight_mean": 1.5, **weights})
    exporter.update({"run_phase{phase=train}": 1.0, "learner_loss": -0.5})
    assert scrape(exporter) == {
        ("diffpo_learner_loss", ()): -0.5,
        ("diffpo_learner_steps_total", ()): 3.0,
        ("diffpo_learner_weight_mean", (("bucket", "all"), ("value", "all"))): 1.5,
        ("diffpo_learner_weight_mean", (("bucket", "staleness"), ("value", "2"))): 0.5,
        ("diffpo_learner_weight_mean", (("bucket", "reveal_step"), ("value", "4"))): 0.75,
        ("diffpo_run_phase", (("phase", "train"),)): 1.0,
    }


def test_replace_forgets_the_series_of_before(exporter: Exporter) -> None:
    exporter.replace("replay_groups", {"leased": 2.0, "finished": 1.0})
    exporter.replace("replay_groups", {"finished": 4.0})
    assert scrape(exporter) == {("diffpo_replay_groups", (("state", "finished"),)): 4.0}


def test_every_metric_of_the_catalogue_can_be_scraped(exporter: Exporter) -> None:
    exporter.update({name: float(index) for index, name in enumerate(CATALOGUE)})
    found = scrape(exporter)
    for index, metric in enumerate(CATALOGUE.values()):
        name = f"{PREFIX}{metric.name}{'_total' if metric.kind == 'counter' else ''}"
        assert found[name, tuple(sorted((label, "all") for label in metric.labels))] == index
    assert len(found) == len(CATALOGUE)


@pytest.mark.parametrize("key", ["nothing_of_ours", "nothing{phase=train}", "diffpo_learner_loss"])
def test_a_name_that_the_catalogue_lacks_is_refused(exporter: Exporter, key: str) -> None:
    with pytest.raises(KeyError, match=r"nothing|diffpo_learner_loss"):
        exporter.update({key: 1.0})
    assert scrape(exporter) == {}


def test_the_endpoint_binds_loopback_unless_told_otherwise(exporter: Exporter) -> None:
    assert MetricsConfig().host == "127.0.0.1"
    assert exporter.address.startswith("127.0.0.1:")
    assert exporter._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_refused_with_the_way_out(exporter: Exporter) -> None:
    port = int(exporter.address.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"metrics endpoint 127\.0\.0\.1:{port} .*set metrics\.port=0"):
        Exporter(host="127.0.0.1", port=port)
    with pytest.raises(UserError, match=rf"metrics\.port={port} on 127\.0\.0\.1 .*set metrics\.port=0"):
        check_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [0, -1])
def test_a_free_or_absent_port_needs_no_check(port: int) -> None:
    check_port("127.0.0.1", port)


def test_a_port_that_nobody_holds_passes_the_check() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    check_port("127.0.0.1", port)


def test_close_frees_the_port() -> None:
    exporter = Exporter(host="127.0.0.1", port=0)
    port = int(exporter.address.rpartition(":")[2])
    exporter.close()
    again = Exporter(host="127.0.0.1", port=port)
    again.close()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learner_loss", ("learner_loss", ())),
        ("run_phase{phase=train}", ("run_phase", ("train",))),
        ("learner_weight_mean{staleness=3}", ("learner_weight_mean", ("staleness", "3"))),
    ],
)
def test_labels_are_split_off_a_key(key: str, expected: tuple[str, tuple[str, ...]]) -> None:
    assert split_labels(key) == expected


def test_the_docs_table_has_one_row_per_metric() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert head.count("|") == rule.count("|") == 5
    for metric, row in zip(CATALOGUE.values(), rows, strict=True):
        assert row.startswith(f"| `{PREFIX}{metric.name}{'_total' if metric.kind == 'counter' else ''}` |")
        assert metric.kind in row
        assert metric.meaning in row
        assert all(label in row for label in metric.labels)
