"""Displays: what the live view draws, what plain, quiet and JSON modes print, on a terminal and off it."""

import io
import json
import math
import os
import pty
import re
import select
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from test_cli import CONFIG as CONFIG_FILE
from test_cli import ROOT, TINY, Diffpo, diffpo  # noqa: F401

import learner.supervised_run
from common.config import IN_RAY_JOB
from common.config_file import parse_config
from common.errors import RunError, UserError
from learner.cli import main
from learner.display import check_mode, early_display, open_display
from learner.json_display import JsonDisplay
from learner.live_display import POINTS, LiveDisplay, sparkline
from learner.plain_display import PlainDisplay
from learner.quiet_display import QuietDisplay
from learner.text_console import text_console

CONFIG = parse_config(
    {"task": {"name": "sudoku"}, "run": {"name": "first"}, "learner": {"steps": 40}, "warm_start": {"steps": 10}}
)
TOTALS = {"warm_start": 10, "step": 40}
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def step(number: int, **more: float) -> dict[str, float]:
    """The values of one learner step, as the controller tells them."""
    return {
        "learner_steps": float(number),
        "rollout_reward": 0.1,
        "rollout_generated_reward": number / 40,
        "rollout_nfe": 9.0,
        "rollout_generated_nfe": 8.0 - number / 10,
        "rollout_tokens_per_forward": 2.125,
        "threshold_gamma": 0.3125,
        "replay_staleness_mean": 1.5,
        "learner_weight_ess": 0.875,
        "learner_step_seconds": 0.75,
        "rollout_actors": 2.0,
        "rollout_actors_wanted": 3.0,
        "learner_wait_share": 0.12,
        "rollout_wait_share": 0.34,
        "rollout_completions_per_second": 56.7,
        **more,
    }


def live(width: int = 100, encoding: str = "utf-8") -> tuple[LiveDisplay, Console, list[float]]:
    """A live view on a recorded terminal, and the clock that it reads."""
    now = [0.0]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = text_console(file=file, force_terminal=True, width=width, record=True, soft_wrap=True)
    return LiveDisplay(console, TOTALS, title="sudoku, run first", clock=lambda: now[0]), console, now


def drawn(display: LiveDisplay, console: Console) -> str:
    """What it would draw now, as text."""
    with console.capture() as captured:
        console.print(display.render())
    return CODES.sub("", captured.get())


def test_the_live_view_shows_where_a_run_is_and_who_waits() -> None:
    display, console, now = live()
    with display:
        display.show("phase", {"phase": "train"})
        for number in range(1, 11):
            now[0] = 2.0 * number
            display.show("step", step(number, **({"drift_accuracy": 0.25, "drift_nfe": 7.0} if number == 5 else {})))
        display.show("warning", {"text": "3 leases ran out [/odd]"})
        text = drawn(display, console)
    assert "sudoku, run first: train" in text
    assert "10/40" in text
    assert "0:01:00" in text, "30 steps of 2 s are left"
    for name, value in (
        ("reward", "0.250 ▁"),
        ("NFE", "7.00 █"),
        ("accuracy", "0.250 (step 5)"),
        ("TPF", "2.12"),
        ("gamma", "0.312"),
        ("ESS", "0.88"),
        ("staleness", "1.5 versions"),
        ("actors", "2 of 3"),
        ("learner waits", "12%"),
        ("rollout waits", "34%"),
        ("completions", "56.7/s"),
        ("step takes", "0.75 s"),
    ):
        assert re.search(rf"{re.escape(name)} +{re.escape(value)}", text), (name, text)
    assert "warning: 3 leases ran out [/odd]" in text
    said = CODES.sub("", console.export_text())
    assert said.count("phase: train") == 1, "what is told once stays above"


def test_the_time_left_of_a_resumed_run_is_not_judged_by_the_steps_before() -> None:
    display, console, now = live()
    with display:
        for number in (31, 32, 33):
            now[0] += 4.0
            display.show("step", step(number))
        assert "0:00:28" in drawn(display, console), "7 steps of 4 s"


def test_the_live_view_of_a_warm_start_and_of_values_that_are_not_known() -> None:
    display, console, _ = live()
    with display:
        display.show("warm_start", {"warm_start_steps": 3.0, "warm_start_loss": 1.5, "warm_start_held_out_loss": 2.0})
        display.show("warm_start", {"warm_start_steps": 4.0, "warm_start_loss": 1.25, "warm_start_skipped": 2.0})
        assert "loss 1.250  held out 2.000  2 too long" in drawn(display, console)
        rare = {key: value for key, value in step(1).items() if "wait" not in key and "actors" not in key}
        display.show("step", {**rare, "rollout_generated_reward": math.nan})
        assert re.search(r"learner waits +- ", drawn(display, console))
        assert re.search(r"accuracy +- ", drawn(display, console))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_view_fits_its_terminal(width: int) -> None:
    display, console, _ = live(width)
    with display:
        for number in range(1, 2 * POINTS):
            display.show("step", step(number, drift_accuracy=0.5, drift_nfe=3.0))
        text = drawn(display, console)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text.replace("…", "", text.splitlines()[1].count("…")), "values are whole; a bar may be cut"


def test_a_terminal_without_unicode_gets_no_sparklines() -> None:
    display, console, _ = live(encoding="ascii")
    with display:
        display.show("step", step(1))
        display.show("step", step(2))
        drawn(display, console).encode("ascii")


def test_a_command_that_is_refused_draws_nothing() -> None:
    display, console, _ = live()
    with pytest.raises(UserError), display:
        raise UserError("no such model")
    assert console.export_text() == ""


def test_sparklines_keep_order_and_pass_over_what_is_not_finite() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▅▅"
    assert sparkline([0.0, math.nan, math.inf, 8.0]) == "▁█"
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("terminal", "variables", "kind"),
    [
        (True, {}, LiveDisplay),
        (False, {}, PlainDisplay),
        (True, {IN_RAY_JOB: "{}"}, PlainDisplay),
        (True, {"TERM": "dumb"}, PlainDisplay),
    ],
)
def test_the_display_fits_where_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, variables: dict[str, str], kind: type
) -> None:
    for name in (IN_RAY_JOB, "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    console = text_console(file=io.StringIO(), force_terminal=terminal)
    assert type(open_display(CONFIG, console=console)) is kind
    assert type(open_display(CONFIG, quiet=True, console=console)) is QuietDisplay
    with early_display(json=True) as early, open_display(CONFIG, early=early, console=console) as display:
        assert type(display) is JsonDisplay
    with early_display(json=False) as early:
        assert early is None


EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("phase", {"phase": "train"}),
    ("metrics", {"address": "127.0.0.1:9464"}),
    ("started", {"learner_steps": 0.0}),
    ("step", step(1)),
    ("step", step(2)),
    ("step", step(3, drift_accuracy=0.5, drift_nfe=6.0)),
    ("scale", {"was": 1, "actors": 2, "reason": "learner_waits"}),
    ("warning", {"text": "a [bold]checkpoint[/] is missing at 1:100:2"}),
    ("quarantine", {"group": 7, "reason": "ValueError: [/x]", "quarantined": 2}),
    ("signal", {"name": "SIGTERM", "phase": "train"}),
    ("summary", {"steps": 40.0}),
]
STOPPED = {"stopped": "SIGTERM", "steps": 3.0, "run_directory": "runs/first"}


def shown(display: Any, file: io.StringIO) -> list[str]:
    with display:
        for kind, values in EVENTS:
            display.show(kind, values)
        display.finish(STOPPED)
    return file.getvalue().splitlines()


def test_plain_lines_tell_every_event_and_some_steps() -> None:
    file = io.StringIO()
    assert shown(PlainDisplay(text_console(file=file, soft_wrap=True), TOTALS), file) == [
        "phase: train (rollout actors start, then generate the groups of the first step)",
        "metrics: http://127.0.0.1:9464/metrics",
        "step 1/40: reward 0.025  NFE 7.90  gamma 0.312  staleness 1.5  ESS 0.88",
        "step 3/40: reward 0.075  NFE 7.70  gamma 0.312  staleness 1.5  ESS 0.88"
        "  | at gamma_init: accuracy 0.500 NFE 6.00",
        "rollout actors: 1 -> 2, the learner waits for groups",
        "warning: a [bold]checkpoint[/] is missing at 1:100:2",
        "group 7 quarantined, it failed twice: ValueError: [/x]; 2 groups so far, RUN/quarantine.json",
        "SIGTERM: stopping, after the step in hand and a checkpoint",
        "stopped by SIGTERM after 3 steps; run directory runs/first",
        "go on with: diffpo train --resume runs/first",
    ]


def test_quiet_tells_what_is_wrong_and_the_end() -> None:
    file = io.StringIO()
    assert shown(QuietDisplay(text_console(file=file, soft_wrap=True)), file) == [
        "warning: a [bold]checkpoint[/] is missing at 1:100:2",
        "group 7 quarantined, it failed twice: ValueError: [/x]; 2 groups so far, RUN/quarantine.json",
        "SIGTERM: stopping, after the step in hand and a checkpoint",
        "stopped by SIGTERM after 3 steps; run directory runs/first",
        "go on with: diffpo train --resume runs/first",
    ]


def test_json_is_one_object_per_event_and_the_summary_last(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonDisplay() as display:
        for kind, values in EVENTS:
            display.show(kind, values)
        print("a reward function says something")  # noqa: T201
        display.show("step", step(4, learner_loss=math.nan))
        display.finish(STOPPED)
    captured = capsys.readouterr()
    rows = [json.loads(text) for text in captured.out.splitlines()]
    assert [row["kind"] for row in rows] == [*(kind for kind, _ in EVENTS[:-1]), "step", "summary"]
    assert all(row["time"] > 1.6e9 for row in rows)
    assert rows[3].items() >= step(1).items()
    assert rows[-2]["learner_loss"] is None, "NaN is not JSON"
    assert rows[-1].items() >= STOPPED.items()
    assert captured.err == "a reward function says something\n"


def test_json_ends_with_the_error_of_a_run_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        with JsonDisplay() as display:
            display.show("phase", {"phase": "train"})
            raise RunError("the learner\ndied")

    with pytest.raises(RunError):
        failing()
    rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert (rows[-1]["kind"], rows[-1]["error"]) == ("failed", "the learner died")


def test_json_of_a_command_that_is_interrupted_ends_with_that(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), JsonDisplay():
        raise KeyboardInterrupt
    assert json.loads(capsys.readouterr().out)["error"] == "interrupted"


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyError("steps"), "KeyError: 'steps'"), (RuntimeError(), "RuntimeError"), (OSError("no room"), "no room")],
)
def test_json_of_whatever_went_wrong_ends_with_that(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), JsonDisplay():
        raise error
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["kind"], row["error"]) == ("failed", told)


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("wrong", [["-c", CONFIG_FILE, "learner.stepz=3"], ["-c", "no.yaml"], ["--resume", "no"]])
def test_json_of_a_configuration_that_is_refused_ends_with_that(
    diffpo: Diffpo,  # noqa: F811
    command: str,
    wrong: list[str],
) -> None:
    ended = diffpo(command, "--json", *wrong)
    (row,) = map(json.loads, ended.out.splitlines())
    assert (ended.code, row["kind"], ended.err) == (2, "failed", f"error: {row['error']}\n")


@pytest.mark.parametrize("text", ["a[b].jsonl", "c[/b].jsonl", "[bold]x[/]", "1:100:2", ":smile:", "\\[b]"])
def test_texts_of_others_are_printed_as_they_are(text: str) -> None:
    console = text_console(file=io.StringIO(), width=60)
    table = Table(text, title=text)
    table.add_row(text)
    for printed in (text, table):
        console.print(printed)
    console.print(text, style="bold")
    assert console.file.getvalue().count(text) == 5  # pyright: ignore


def test_texts_of_others_do_not_steer_the_terminal() -> None:
    """Completions are in warnings and errors; the console's own colours stay."""
    hostile = "a\x1b]52;c;eA==\x07\x1b[2J\x9b31mb\tc"
    console = text_console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    table = Table(hostile)
    table.add_row(Text(hostile))
    for printed in (hostile, Text(hostile), table):
        console.print(printed, style="bold")
    printed = console.file.getvalue()  # pyright: ignore
    assert printed.count("a]52;c;eA==[2J31mb") == 4
    assert set(re.findall(r"\x1b.", printed)) == {"\x1b["}
    assert re.search(r"\x1b\](?!\[)|\x1b\[2J|\x07|\x9b", printed) is None


def test_every_command_prints_on_such_a_console() -> None:
    made = {
        path.name for path in ROOT.glob("learner/**/*.py") if re.search(r"(?<!_)\b_?(Text)?Console\(", path.read_text())
    }
    assert made == {"text_console.py"}


def test_flags_that_contradict_each_other_are_refused() -> None:
    for flags in ({"quiet": True, "json": True}, {"quiet": False, "json": True, "dry_run": True}):
        with pytest.raises(UserError, match="--json"):
            check_mode(**flags)


def test_sft_in_json_and_quietly(diffpo: Diffpo) -> None:  # noqa: F811
    ended = diffpo("sft", *TINY, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = [json.loads(text) for text in ended.out.splitlines()]
    assert [row["kind"] for row in rows] == ["warm_start"] * 3 + ["summary"]
    assert rows[1]["warm_start_tokens_per_second"] > 0
    assert rows[-1]["model"].endswith("runs/tiny/warm_start")

    ended = diffpo("sft", *TINY, "run.name=other", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(r"model: .*runs/other/warm_start\n", ended.out)

    ended = diffpo("sft", *TINY, "run.name=third", "--json", "model.path=nowhere")
    assert ended.code == 2
    assert json.loads(ended.out)["error"] in ended.err
    assert not Path("runs/third").exists()


def test_sft_on_a_real_terminal_is_drawn_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through a pseudo-terminal: what is written moves the cursor, and the cursor is there again at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv(IN_RAY_JOB, raising=False)
    monkeypatch.setattr(sys, "argv", ["diffpo", "sft", *TINY])
    lines: list[bytes] = []
    here, there = pty.openpty()
    supervised = learner.supervised_run.supervised_run

    def watched(*arguments: Any, **more: Any) -> dict[str, Any]:
        result = supervised(*arguments, **more)
        lines.append(os.read(here, 1 << 16))
        return result

    monkeypatch.setattr(learner.supervised_run, "supervised_run", watched)
    with os.fdopen(there, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        terminal.flush()
        while select.select([here], [], [], 0.5)[0]:  # a terminal hands out a few thousand bytes at a time
            lines.append(os.read(here, 1 << 16))
    os.close(here)
    text = b"".join(lines).decode()
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    plain = CODES.sub("", text)
    assert "sudoku, run tiny" in plain
    assert "3/3" in plain
    assert "loss" in plain
    assert plain.rstrip().endswith("runs/tiny/warm_start")
