"""Report and viewer as files: what is in them, of runs in every state, and that what a run wrote stays text."""

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from common.errors import UserError
from common.place import Place
from learner.benchmarks.drawn_run import draw_run
from learner.cli import main
from learner.pareto import draw_pareto
from learner.record_rows import SCHEMA
from learner.report.arms import Estimate, arms, differences, estimate
from learner.report.completions import recorded_group, slowest, standouts
from learner.report.curves import curves
from learner.report.figure import POINTS, Figure, drawn, line, thinned
from learner.report.page import report_page, view_page
from learner.report.run_data import RunData
from learner.run_record import RunRecord, read_record

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028 ünïcødé 数独"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return draw_run(tmp_path, "one", steps=6, per_step=10)


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*runs: Path) -> Page:
    return Page(report_page([RunData.read(str(run)) for run in runs]))


def embedded(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="groups">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_report_holds_all_that_a_run_did(run: Path) -> None:
    text = report_page([RunData.read(str(run))])
    page = Page(text)
    for word in (
        "finished, 6 steps",
        "frontier gain",
        "+0.100",
        "Effective sample size",
        "ESS by reveal step",
        "Threshold",
    ):
        assert word in page.words
    assert "Who waits for whom" in page.words
    figures = page.all("figure")
    alts = [attributes["aria-label"] or "" for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(alts) == len(figures) == 11
    assert any("Reward. generated: from 0.2" in alt for alt in alts)
    groups = embedded(text)
    data = RunData.read(str(run))
    best, worst = standouts(data)
    shown = {group["group"] for group in groups}
    assert {one.row["group"] for one in (best[0], worst[0])} <= shown, "those are kept position by position"
    assert best[0].row["earned"] == max(data.record["earned"].to_pylist())
    assert worst[0].row["earned"] == min(data.record["earned"].to_pylist())
    assert "learner:" in page.words, "its configuration"


def test_it_needs_nothing_from_elsewhere(run: Path) -> None:
    text = report_page([RunData.read(str(run))])
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("#", "data:")), (tag, target)
    assert "default-src 'none'" in (page.all("meta")[2]["content"] or "")
    assert not re.findall(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), "no two figures share an id"
    targets = re.findall(r'(?:url\(#|href="#)([^")]+)', text)
    assert set(targets) <= set(ids)


def test_what_a_run_wrote_stays_text(tmp_path: Path) -> None:
    run = draw_run(tmp_path, "bad", steps=2, per_step=10)
    record, _ = read_record(Place(run))
    rows = [row | {"prompt": HOSTILE, "completion": HOSTILE, "worker": HOSTILE} for row in record.to_pylist()]
    for row in rows:
        row["tokens"] = row["tokens"] and [HOSTILE] * len(row["tokens"])
        row["components"] = [(HOSTILE, 1.0)]
    found = RunRecord(Place(run), groups=1, warn=pytest.fail)
    found.rewind(0)
    found.add(pa.Table.from_pylist(rows, schema=SCHEMA))
    found.write()
    (run / "quarantine.json").write_text(json.dumps([{"group": 3, "reason": HOSTILE}]))
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"name": HOSTILE}, "task": {"name": HOSTILE}}))
    for text in (
        report_page([RunData.read(str(run))]),
        view_page(recorded_group(RunData.read(str(run)), rows[0]["group"])),
    ):
        page = Page(text)
        assert [attributes.get("id") for attributes in page.all("script")] == ["groups", None]
        assert not page.all("img")
        assert embedded(text)[0]["completions"][0]["tokens"][0] == HOSTILE
    assert "数独" in page_of(run).words


def test_a_run_that_is_still_going_has_what_it_has(run: Path) -> None:
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-40])
    page = page_of(run)
    assert re.search(r"5 of 6 steps, last step \d+ s ago; going on, stopped or failed", page.words)
    assert "Not evaluated yet" in page.words
    assert "Best and worst" in page.words


def test_a_run_that_has_just_begun_has_a_report(run: Path) -> None:
    for name in ("evaluation.json", "metrics.jsonl", *(f"record/{one.name}" for one in (run / "record").iterdir())):
        (run / name).unlink()
    page = page_of(run)
    for word in ("0 of 6 steps", "No learner step is in metrics.jsonl yet", "No completions are recorded yet"):
        assert word in page.words
    assert not page.all("svg")
    assert not page.all("script")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("evaluation.json", b'{"steps": 6}', "evaluation.json cannot be read ('settings'): no frontier"),
        ("evaluation.json", b"{", "evaluation.json cannot be read"),
        (
            "evaluation.json",
            b'{"steps": NaN, "settings": {"before": [{"setting": "eb", "accuracy": 0, "nfe": 1}], '
            b'"after": [{"setting": "eb", "accuracy": 0, "nfe": 1}]}}',
            "cannot be read (nan is in a place of a number",
        ),
        (
            "metrics.jsonl",
            b'[1]\n3\n{"kind": "step", "learner_steps": null}\n{"kind": "step", "learner_steps": Infinity}\n'
            b'{"kind": "step", "learner_steps": 2, "seconds": null}\n'
            b'{"kind": "step", "learner_steps": 3, "seconds": "x"}\n',
            "finished, 3 steps",
        ),
        ("quarantine.json", b'[{"group": 1}]', "quarantine.json cannot be read"),
        ("config.yaml", b"learner: {steps: .inf}\ntask: [sudoku]", "finished, 6 steps"),
        ("record/steps-000001-000006.parquet", b"PAR1 of another version", "record/ cannot be read"),
        ("metrics.jsonl", b"\xff\xfe", "No learner step is in metrics.jsonl yet"),
        ("config.yaml", b"learner: {steps: 6, of_an_older_version: 3}\ntask: {name: go}", "go"),
    ],
)
def test_what_other_versions_or_a_crash_left_is_said(run: Path, name: str, content: bytes, told: str) -> None:
    (run / name).write_bytes(content)
    assert told in page_of(run).words


@pytest.mark.parametrize("lacks", ["version", "step", "group", "token_weight"])
def test_a_record_of_another_version_is_said(run: Path, lacks: str) -> None:
    file = next((run / "record").iterdir())
    table = pq.read_table(file).drop_columns([lacks])
    pq.write_table(table.append_column("new", pa.nulls(len(table), pa.int8())), file)
    shown = page_of(run).words
    assert ("record/ cannot be read" in shown) == (lacks != "token_weight"), "that is for the viewer alone"
    assert "Reveal viewer" not in shown
    with pytest.raises(UserError, match=f"parquet: it is of another version and lacks {lacks}; restore"):
        recorded_group(RunData.read(str(run)))


def test_one_damaged_file_hides_no_other(run: Path) -> None:
    file = next((run / "record").iterdir())
    group = pq.read_table(file)["group"][0].as_py()
    file.with_name("steps-000007-000007.parquet").write_bytes(b"PAR1 torn")
    shown = page_of(run).words
    assert "A file of record/ cannot be read and is left out: steps-000007-000007.parquet: " in shown
    assert "Reveal viewer" in shown
    data = RunData.read(str(run))
    assert recorded_group(data, group)["group"] == group
    with pytest.raises(UserError, match=r"record cannot be read whole: steps-000007-000007.parquet: .*; restore"):
        recorded_group(data, 12345)


def test_steps_that_were_done_again_count_once(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    again = [row | {"seconds": 1.0, "rollout_generated_reward": 0.9} for row in rows[3:]]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows[:5], *again])))
    data = RunData.read(str(run))
    steps, rewards = data.series("rollout_generated_reward")
    assert (steps, rewards[3:]) == ([1, 2, 3, 4, 5, 6], [0.9] * 3)


def test_runs_that_differ_in_their_seed_alone_are_one_arm(tmp_path: Path) -> None:
    seeds = [draw_run(tmp_path, f"seed{seed}", steps=4, per_step=10, seed=seed) for seed in (0, 1, 2)]
    other = draw_run(tmp_path, "other", steps=4, per_step=10, replay__max_staleness=7)
    runs = [RunData.read(str(run)) for run in (*seeds, other)]
    found = arms(runs)
    assert [len(arm.runs) for arm in found] == [3, 1]
    assert found[0].label == "replay.max_staleness=2"
    steps, estimates = found[0].series("rollout_generated_nfe")
    values = [run.series("rollout_generated_nfe")[1][0] for run in runs[:3]]
    assert (steps, estimates[0]) == ([1, 2, 3, 4], estimate(values))
    assert dict(differences(runs)) == {"replay.max_staleness": [2, 2, 2, 7], "run.seed": [0, 1, 2, 0]}
    page = page_of(*seeds, other)
    assert "4 runs" in page.words
    assert "replay.max_staleness=2" in page.words
    assert "ESS by reveal step" not in page.words, "that is of one run"


def test_runs_of_one_seed_are_no_more_seeds(tmp_path: Path) -> None:
    runs = [draw_run(tmp_path, name, steps=3, per_step=4, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    data = [RunData.read(str(run)) for run in runs]
    (arm,) = arms(data)
    a, b, c = (run.series("rollout_generated_nfe")[1] for run in data)
    assert arm.seeds == 2
    assert arm.series("rollout_generated_nfe")[1][0] == estimate([(a[0] + b[0]) / 2, c[0]])
    alone = arm.estimate(lambda run: 1.0 if run is data[2] else None)
    assert isinstance(alone, Estimate)
    assert (alone.mean, alone.count) == (1.0, 1)


@pytest.mark.filterwarnings("ignore:No artists")  # of a plot without points
def test_labels_are_no_mathematics(tmp_path: Path) -> None:
    runs = [
        draw_run(tmp_path, f"{name}{seed}", steps=3, per_step=4, seed=seed, model__path=f"{name}$_$")
        for name in ("x", "y")
        for seed in (0, 1)
    ]
    for figure in curves(arms([RunData.read(str(run)) for run in runs])):
        assert "model.path=x$_$" in figure.svg
        assert "model.path=y$_$" in figure.svg
    assert draw_pareto({}, title="sudoku: runs/x$_$").startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [
        draw_run(tmp_path / folder, "first", steps=3, per_step=4, seed=seed, learner__group_size=size)
        for folder, seed, size in (("A", 0, 4), ("B", 1, 8))
    ]
    data = [RunData.read(str(run)) for run in runs]
    text = report_page(data)
    page = Page(text)
    assert [arm.label for arm in arms(data)] == ["first (1)", "first (2)"]
    groups = json.loads(re.search(r'id="groups">(.*?)</script>', text)[1])  # pyright: ignore
    links = [int(link["data-at"]) for link in page.all("a") if "data-at" in link]  # pyright: ignore
    assert {groups[at]["why"].split(" · ")[0] for at in links} == {"first (1)", "first (2)"}
    told = [(groups[at]["group"], groups[at]["why"]) for at in links]
    shown = re.findall(r'data-at="\d+">(\d+)</a>', text)
    assert [str(group) for group, _ in told] == shown


def test_an_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, round(found.half, 3)) == (2.0, 2.484)  # 4.303 / sqrt(3)
    assert str(estimate([0.5])) == "0.5"


def test_the_slowest_groups_are_those_that_took_longest(run: Path) -> None:
    data = RunData.read(str(run))
    found = slowest(data, 3)
    assert [row["seconds"] for row in found] == sorted((row["seconds"] for row in found), reverse=True)
    assert found[0]["seconds"] == max(data.record["seconds"].to_pylist())


def test_long_lines_are_means_of_neighbours() -> None:
    x, y = thinned(range(10 * POINTS), [1.0, 3.0] * 5 * POINTS)
    assert (len(x), set(y)) == (POINTS, {2.0})
    assert [list(part) for part in thinned([1, 2], [3, 4])] == [[1, 2], [3, 4]]


def test_a_figure_takes_the_colours_of_its_page() -> None:
    figure = Figure('A "title"', "about")
    with drawn(figure) as axes:
        line(axes, figure, [1, 2], [3.0, 5.0], "<b>", "#0f8f83")
    opening = figure.svg[: figure.svg.index(">")]
    assert "currentColor" in figure.svg
    assert "width=" not in opening
    assert "viewBox" in opening
    assert figure.alt == "A &quot;title&quot;. &lt;b&gt;: from 3 to 5, between 3 and 5."


def diffpo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["diffpo", *arguments])
    code: Any = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


def test_commands_write_beside_the_run_or_where_they_are_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = draw_run(tmp_path, "two", steps=2, per_step=10)
    for arguments, file in (
        (["report", str(run)], run / "report.html"),
        (["report", str(run), "--out", "mine.html"], tmp_path / "mine.html"),
        (["report", str(run), str(other)], tmp_path / "report.html"),
        (["view", str(run), "--group", "0"], run / "view-0.html"),
    ):
        assert diffpo(monkeypatch, capsys, *arguments) == (0, f"{file}\n", "")
        assert file.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "nowhere"], "run 'nowhere': no folder of that name"),
        (["report", "."], "is no run directory: it has no config.yaml"),
        (["report", "one", "--out", "no/where.html"], "--out no/where.html cannot be written: there is no folder no"),
        (["view", "one", "--group", "99"], "group 99 of run one is not in the record; give one of the 8 that are"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_run(tmp_path, "one", steps=6, per_step=10)
    monkeypatch.chdir(tmp_path)
    code, out, err = diffpo(monkeypatch, capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err


def test_a_group_that_is_nowhere_is_an_error_that_lists_others(run: Path) -> None:
    data = RunData.read(str(run))
    with pytest.raises(UserError, match=r"group 12345 of run one is not in the record; give one of the \d+ that are"):
        recorded_group(data, 12345)
    thin = next(row["group"] for row in read_record(Place(run))[0].to_pylist() if row["tokens"] is None)
    with pytest.raises(UserError, match=rf"group {thin} of run one was trained on, but not kept position by position"):
        recorded_group(data, thin)
