"""QuarantineReport: what is written down of groups that failed."""

import asyncio
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from common.config_file import parse_config
from common.tasks import Example
from learner import quarantine_report
from learner.quarantine_report import QuarantineReport
from learner.run_directory import RunDirectory

FAILED = [(0, "Traceback ...\nValueError: no number")]


class Dated:
    def example(self, split: str, index: int) -> Example:
        return Example("when?", {"answer": date(2026, 1, 1)}, 1.0)


class Broken:
    def example(self, split: str, index: int) -> Example:
        raise KeyError("question")


@pytest.mark.parametrize(
    ("task", "example"),
    [
        (Dated(), {"prompt": "when?", "fields": {"answer": "2026-01-01"}, "difficulty": 1.0}),
        (Broken(), None),
    ],
    ids=["holds what JSON has not", "cannot be made"],
)
def test_a_group_is_written_down_whatever_its_example_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, example: Any
) -> None:
    monkeypatch.setattr(quarantine_report, "build_task", lambda _: task)
    report = QuarantineReport(parse_config({"task": {"name": "sudoku"}}), RunDirectory(tmp_path))
    newest = asyncio.run(report.write(FAILED))
    assert newest == {"group": 0, "reason": "ValueError: no number", "quarantined": 1}
    [kept] = json.loads((tmp_path / "quarantine.json").read_text())
    assert kept == {"group": 0, "example": example, "reason": FAILED[0][1]}
