"""DoctorDisplay: what `diffpo doctor` found, as a table and as what to do."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from learner.doctor import Finding, State

STYLES = {State.OK: "green", State.NOTE: "yellow", State.MISSING: "bold red"}


def show(findings: list[Finding], console: Console) -> None:
    """All findings, then advice for those that are not ok."""
    table = Table("", "", "found", "state")
    part = ""
    for one in findings:
        if part and one.part != part:
            table.add_section()
        cells = (one.part if one.part != part else "", one.name, one.found)
        table.add_row(*map(Text, cells), Text(one.state, style=STYLES[one.state]))
        part = one.part
    console.print(table)
    for one in findings:
        if one.state is not State.OK:
            console.print(f"{one.state}: {one.name}: {one.found} -> {one.advice}", soft_wrap=True)
    lacking = sum(one.state is State.MISSING for one in findings)
    console.print("runs can start here" if not lacking else f"{lacking} missing: runs cannot start here")


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    """The same for programs: `ok`, and the findings."""
    rows = [
        {"part": one.part, "name": one.name, "found": one.found, "state": str(one.state), "advice": one.advice}
        for one in findings
    ]
    return {"ok": all(one.state is not State.MISSING for one in findings), "findings": rows}
