"""Exporter: what Prometheus sees when it scrapes."""

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from common.config import MetricsConfig
from common.errors import UserError
from common.histogram import Histogram
from common.metrics import CATALOGUE, markdown_table, split_labels
from learner.benchmarks import Options
from learner.benchmarks import exporter as exporter_benchmark
from learner.benchmarks.exporter import every_series
from learner.exporter import Exporter, check_port

Labels = tuple[tuple[str, str], ...]


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    found = Exporter(host="127.0.0.1", port=0)
    yield found
    found.close()


def scrape(exporter: Exporter) -> dict[tuple[str, Labels], float]:
    """Every sample by name and sorted labels, but counters and buckets at 0."""
    return {key: value for key, value in scrape_all(exporter).items() if value or not counts(key[0])}


def counts(sample: str) -> bool:
    """Whether a sample is of a counter or a histogram."""
    return sample.endswith(("_total", "_bucket", "_count", "_sum"))


def scrape_all(exporter: Exporter) -> dict[tuple[str, Labels], float]:
    """Every sample by name and sorted labels."""
    with urlopen(f"http://{exporter.address}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_before_anything_is_reported_counters_and_histograms_are_there_at_0(exporter: Exporter) -> None:
    found = scrape_all(exporter)
    assert set(found.values()) == {0.0}
    counting = {sample for metric in CATALOGUE.values() if metric.kind != "gauge" for sample in metric.samples}
    assert {"diffpo_learner_restarts_total", "diffpo_rollout_group_seconds_bucket"} <= counting
    assert {name for name, _ in found} == counting


def test_a_counter_that_goes_on_from_an_earlier_life_is_not_0_before() -> None:
    exporter = Exporter(host="127.0.0.1", port=0, later=["replay_lost_groups"])
    try:
        assert ("diffpo_replay_lost_groups_total", ()) not in scrape_all(exporter)
        exporter.update({"replay_lost_groups": 3.0})
        assert scrape(exporter) == {("diffpo_replay_lost_groups_total", ()): 3.0}
    finally:
        exporter.close()


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


def test_constant_labels_are_on_every_series() -> None:
    exporter = Exporter(host="127.0.0.1", port=0, labels={"run": "mine"})
    try:
        exporter.update({"replay_groups{state=leased}": 2.0, "learner_step_seconds": 3.0})
        found = scrape_all(exporter)
    finally:
        exporter.close()
    assert found["diffpo_replay_groups", (("run", "mine"), ("state", "leased"))] == 2.0
    assert found["diffpo_learner_step_seconds_bucket", (("le", "5"), ("run", "mine"))] == 1.0
    assert all(dict(labels)["run"] == "mine" for _, labels in found)


def test_replace_forgets_the_series_of_before(exporter: Exporter) -> None:
    exporter.replace("replay_groups", {"leased": 2.0, "finished": 1.0})
    exporter.replace("replay_groups", {"finished": 4.0})
    assert scrape(exporter) == {("diffpo_replay_groups", (("state", "finished"),)): 4.0}


def test_every_metric_of_the_catalogue_can_be_scraped_with_every_label(exporter: Exporter) -> None:
    given = {key: float(number) for number, key in enumerate(every_series(0.0), 1)}
    exporter.update(given)
    found = scrape_all(exporter)
    counts = {key: value for key, value in found.items() if key[0].endswith("_count")}
    assert sorted(given.values()) == sorted(value for key, value in found.items() if key not in counts)
    assert {name.removesuffix("_count") for name, _ in counts} == {
        metric.exported for metric in CATALOGUE.values() if metric.kind == "histogram"
    }
    assert found["diffpo_replay_groups", (("state", "quarantined"),)] == given["replay_groups{state=quarantined}"]


def test_a_histogram_counts_what_is_reported_under_its_name(exporter: Exporter) -> None:
    for seconds in (0.1, 3.0, 4000.0):
        exporter.update({"learner_step_seconds": seconds, "learner_loss": seconds})
    found = scrape(exporter)
    bucket = "diffpo_learner_step_seconds_bucket"
    assert found[bucket, (("le", "0.1"),)] == found[bucket, (("le", "2.5"),)] == 1
    assert found[bucket, (("le", "5"),)] == found[bucket, (("le", "1800"),)] == 2
    assert found[bucket, (("le", "+Inf"),)] == found["diffpo_learner_step_seconds_count", ()] == 3
    assert found["diffpo_learner_step_seconds_sum", ()] == pytest.approx(4003.1)
    assert found["diffpo_learner_loss", ()] == 4000


def test_buckets_that_are_reported_replace_the_ones_before(exporter: Exporter) -> None:
    seen = Histogram("weights_adopt_seconds")
    for count in (1, 2):
        seen.observe(0.3)
        exporter.update(seen.values())
        found = scrape(exporter)
        assert found["diffpo_weights_adopt_seconds_count", ()] == count
        assert found["diffpo_weights_adopt_seconds_sum", ()] == pytest.approx(0.3 * count)


def test_live_values_are_asked_for_at_each_scrape() -> None:
    asked = iter((1.0, 2.0))
    exporter = Exporter(host="127.0.0.1", port=0, live={"run_idle_seconds": lambda: next(asked)})
    try:
        assert [scrape(exporter) for _ in range(2)] == [{("diffpo_run_idle_seconds", ()): n} for n in (1.0, 2.0)]
    finally:
        exporter.close()


@pytest.mark.parametrize(
    "key",
    [
        "learner_weight_mean{staleness=17}",
        "learner_weight_mean{worker=3}",
        "replay_groups{state=lost}",
        "replay_groups",
        "run_phase{state=train}",
        "learner_loss{phase=train}",
        "rollout_group_seconds_bucket{phase=train}",
    ],
)
def test_labels_that_the_catalogue_lacks_are_refused(exporter: Exporter, key: str) -> None:
    with pytest.raises(KeyError):
        exporter.update({key: 1.0})
    assert scrape(exporter) == {}


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "10.1.2.3")])
def test_others_are_told_an_address_that_they_can_reach(host: str, expected: str) -> None:
    exporter = Exporter(host=host, port=0)
    try:
        assert exporter.reachable("10.1.2.3").rpartition(":")[0] == expected
    finally:
        exporter.close()


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
        ("learner_weight_ess{bucket=staleness,value=8}", ("learner_weight_ess", ("staleness", "8"))),
        ("learner_weight_mean", ("learner_weight_mean", ("all", "all"))),
        ("learner_surrogate_kl{reveal_step=8,passes=2}", ("learner_surrogate_kl", ("2", "8"))),
        ("rollout_group_seconds_bucket{le=+Inf}", ("rollout_group_seconds", ("+Inf",))),
        ("rollout_group_seconds_sum", ("rollout_group_seconds", ("sum",))),
    ],
)
def test_labels_are_split_off_a_key(key: str, expected: tuple[str, tuple[str, ...]]) -> None:
    assert split_labels(key) == expected


@pytest.mark.parametrize("key", ["learner_surrogate_kl{passes=2}", "learner_loss{a=b}", "run_phase{state=x}"])
def test_labels_that_a_metric_does_not_have_are_refused(key: str) -> None:
    with pytest.raises(KeyError, match=f"the labels of {key.partition('{')[0]} are"):
        split_labels(key)


def test_the_docs_table_has_one_row_per_metric() -> None:
    head, rule, *rows = markdown_table().splitlines()
    assert head.count("|") == rule.count("|") == 5
    for metric, row in zip(CATALOGUE.values(), rows, strict=True):
        assert row.startswith(f"| `{metric.exported}` |")
        assert metric.kind in row
        assert metric.meaning in row
        assert all(label in row for label in metric.labels)


def test_a_scrape_of_everything_is_small_and_quick() -> None:
    """At most 2,000 series; the time (goal: 50 ms) is measured by `diffpo bench exporter`, where nothing else runs."""
    found = exporter_benchmark.run(Options(quick=True, seeds=1, config=None, overrides=[], console=Console()))
    assert found["scrape_ms_low"] <= found["scrape_ms"] <= found["scrape_ms_p99"]
    assert 200 < found["series"] <= 2000
