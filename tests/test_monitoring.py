"""Monitoring: rules, dashboard and runbook speak of what a run exports; a real Prometheus scrapes a real run."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_end_to_end import ENDLESS, start

from common.metrics import CATALOGUE

ROOT = Path(__file__).parents[1]
RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
OF_TARGETS = {"job", "instance", "run"}
SELECTOR = re.compile(r"\b((?:diffpo[_:][a-z0-9_:]+)|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)(=~|!~|!=|=)"([^"]*)"')
SECONDS = 240.0  # a busy machine is no failure

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH (.ci/run has it)")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not on PATH (.ci/run has it)"
)


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDED = {rule["record"]: rule["expr"] for rule in rules("recording.yml")}
SAMPLES = {sample: metric for metric in CATALOGUE.values() for sample in metric.samples}


def targets() -> list[dict[str, Any]]:
    """Every query of the dashboard's panels and annotations."""
    found = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return found + DASHBOARD["annotations"]["list"]


def expressions() -> dict[str, str]:
    """Every PromQL expression that is shipped, by where it stands."""
    return {
        **{name: rule["expr"] for name, rule in ALERTS.items()},
        **RECORDED,
        **{f"panel {number}: {target['expr'][:50]}": target["expr"] for number, target in enumerate(targets())},
    }


def used_metrics() -> set[str]:
    """Samples of ours that rules and dashboard ask for."""
    names = {match[1] for expr in expressions().values() for match in SELECTOR.finditer(expr)}
    return {name for name in names if name.startswith("diffpo_")}


def labels_of(name: str) -> set[str]:
    """Labels that a series of a metric has. Raises KeyError for one that nobody exports."""
    if name == "up":
        return OF_TARGETS
    if name in RECORDED:
        inner = [labels_of(match[1]) for match in SELECTOR.finditer(RECORDED[name])]
        return set().union(*inner) - {"le"}
    return {*SAMPLES[name].labels, *(["le"] if name.endswith("_bucket") else [])} | OF_TARGETS


def faults(expr: str) -> list[str]:
    """What an expression asks for that no run exports."""
    found, known = [], set(OF_TARGETS)
    for name, inner in SELECTOR.findall(expr):
        try:
            known |= labels_of(name)
        except KeyError:
            found.append(f"{name} is exported by nobody")
            continue
        for label, operator, value in MATCHER.findall(inner):
            if label not in labels_of(name):
                found.append(f"{name} has no label {label}")
            elif label not in OF_TARGETS:
                # Prometheus 3 writes the bound 1 as 1.0
                wanted = value.replace("(.0)?", "").split("|") if "~" in operator else [value]
                found += [f"{name}: {label} is never {one!r}" for one in wanted if one not in values_of(name, label)]
    for words in re.findall(r"\b(?:by|on|ignoring|without|group_left|group_right) ?\(([^)]*)\)", expr):
        found += [f"no series has a label {word}" for word in re.findall(r"\w+", words) if word not in known]
    return found


def values_of(name: str, label: str) -> set[str]:
    metric = SAMPLES[name]
    if label == "le":
        return {*(f"{bound:g}" for bound in metric.bounds), "+Inf"}
    return {values[metric.labels.index(label)] for values in metric.values}


@pytest.mark.parametrize("where", list(expressions()))
def test_expressions_ask_for_what_a_run_exports(where: str) -> None:
    expr = expressions()[where]
    assert SELECTOR.search(expr)
    assert faults(expr) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("rate(diffpo_learner_steps[5m])", "diffpo_learner_steps is exported by nobody"),
        ("diffpo:learner_step:rate5m", "diffpo:learner_step:rate5m is exported by nobody"),
        ("diffpo_rollout_group_seconds", "diffpo_rollout_group_seconds is exported by nobody"),
        ('diffpo_replay_groups{phase="train"}', "diffpo_replay_groups has no label phase"),
        ('diffpo_run_phase{phase=~"train|rest"}', "diffpo_run_phase: phase is never 'rest'"),
        ('diffpo_rollout_completion_nfe_bucket{le="5"}', "diffpo_rollout_completion_nfe_bucket: le is never '5'"),
        ("sum by (worker) (diffpo_learner_loss)", "no series has a label worker"),
    ],
)
def test_an_expression_that_asks_for_something_else_is_found(expr: str, fault: str) -> None:
    assert faults(expr) == [fault]


def test_panels_name_labels_that_their_series_have_and_one_run() -> None:
    assert len(targets()) > 50
    for target in targets():
        selectors = SELECTOR.findall(target["expr"])
        known = set().union(*(labels_of(name) for name, _ in selectors))
        legend = target.get("legendFormat", target.get("titleFormat", ""))
        assert set(re.findall(r"{{(\w+)}}", legend)) <= known, target
        assert all('run="$run"' in inner for _, inner in selectors), target


def test_panels_stand_side_by_side() -> None:
    """No two cover the same place, and ids are their own."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Is it learning?", "Is it fast?", "Who waits for whom?", "Is it healthy?"]


@pytest.mark.parametrize("name", list(ALERTS))
def test_every_alert_says_what_it_means_and_leads_to_its_heading(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) == {"run"}
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_the_runbook_has_a_heading_for_every_alert_and_an_alert_for_every_heading() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    sections = dict(re.findall(r"^### (Diffpo\w+)\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(sections) == list(ALERTS)
    for name, section in sections.items():
        named = set(re.findall(r"`(diffpo_\w+)`", section)) & set(SAMPLES)
        asked = {match[1] for match in SELECTOR.finditer(ALERTS[name]["expr"])}
        asked = {inner[1] for one in asked for inner in SELECTOR.finditer(RECORDED.get(one, one))}
        assert named & asked or name == "DiffpoRunDown", f"{name}: its section names no metric of the alert"


def test_every_metric_of_the_runbook_is_exported() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(diffpo_[a-z_]+)`", text))
    assert named
    assert named <= set(SAMPLES) | {metric.exported for metric in CATALOGUE.values()}


def test_every_alert_fires_in_the_tests_of_the_rules_and_none_in_a_healthy_run() -> None:
    """What `promtool test rules` then holds to be true."""
    healthy, *others = yaml.safe_load((RULES / "tests.yml").read_text())["tests"]
    expected = [
        sample["labels"] for test in others for case in test["promql_expr_test"] for sample in case["exp_samples"]
    ]
    assert set(expected) == {f'{{alertname="{name}"}}' for name in ALERTS}
    assert healthy["name"] == "a healthy run"
    silent = [case for case in healthy["promql_expr_test"] if "ALERTS" in case["expr"]]
    assert silent
    assert not any(case["exp_samples"] for case in silent)
    given = {match[1] for series in healthy["input_series"] for match in SELECTOR.finditer(series["series"])}
    asked = {match[1] for rule in ALERTS.values() for match in SELECTOR.finditer(rule["expr"])}
    asked |= {match[1] for name in asked & set(RECORDED) for match in SELECTOR.finditer(RECORDED[name])}
    assert asked - set(RECORDED) <= given, "a series that is not there keeps every alert silent"


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "alerts.yml", "recording.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "tests.yml"],
    ],
)
def test_promtool_agrees(arguments: list[str]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


class Server:
    """A Prometheus that was started with the configuration as it is shipped."""

    def __init__(self, config: Path, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._log = (data / "log").open("w")
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}"]
        self._process = subprocess.Popen([*command, f"--web.listen-address={self.address}"], stderr=self._log)

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer; an answer that is an error raises."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def names(self) -> set[str]:
        return set(self.get("label/__name__/values"))

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Its configuration lies beside `tmp_path/runs` as in a checkout."""
    shutil.copytree(RULES, tmp_path / "deploy" / "prometheus")
    (tmp_path / "data").mkdir()
    found = Server(tmp_path / "deploy" / "prometheus" / "prometheus.yml", tmp_path / "data")
    yield found
    found.end()


@needs_prometheus
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_server_scrapes_a_run_and_finds_every_metric_that_rules_and_dashboard_use(
    server: Server, tmp_path: Path
) -> None:
    process = start("sudoku", tmp_path / "runs", ENDLESS, "run.name=watched", "warm_start.held_out=8")
    target = tmp_path / "runs" / "_targets" / "watched.json"
    try:
        wait_until(lambda: used_metrics() <= server.names(), process, lambda: sorted(used_metrics() - server.names()))
        (found,) = server.get("query", query="diffpo_run_info")["result"]
        assert (
            found["metric"].items() >= {"run": "watched", "name": "watched", "task": "sudoku", "job": "diffpo"}.items()
        )
        assert "exported_run" not in found["metric"], "its own label and the target's are one"
        for name, expr in expressions().items():
            server.get("query", query=expr.replace("$run", "watched"))  # or the server's error, which names it
            assert name
        wait_until(lambda: not unhealthy(server), process, lambda: unhealthy(server))
        steps = 'diffpo_learner_step_seconds_count{run="watched"} >= 1'
        assert server.get("query", query=steps)["result"]
        assert server.get("query", query=f"{steps} unless diffpo_learner_steps_total >= 1")["result"] == []
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 143, output
    assert not target.exists(), "a run that was stopped is not missed"


def unhealthy(server: Server) -> list[str]:
    """Rules that have not been evaluated yet, or cannot be, and alerts that fire though nothing is wrong."""
    found = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(ALERTS) + len(RECORDED)
    firing = [rule["name"] for rule in found if rule.get("state") == "firing"]
    assert not firing
    return [f"{rule['name']}: {rule.get('lastError')}" for rule in found if rule["health"] != "ok"]


def wait_until(reached: Any, process: subprocess.Popen[str], missing: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if reached():
                return
        except OSError:  # the server is starting
            if time.monotonic() > deadline:
                raise
        if process.poll() is not None:
            pytest.fail(f"the run ended: {process.communicate()[0][-3000:]}")
        assert time.monotonic() < deadline, missing()
        time.sleep(0.5)
