"""Completions: which groups of a run a person should look at, and what the reveal viewer needs to draw one."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as arrow_compute

from common.errors import UserError
from common.place import FAILURES
from learner.record_rows import SCHEMA
from learner.report.run_data import RunData
from learner.run_record import read_record

compute: Any = arrow_compute
EMBEDDED_BYTES = 1_500_000  # of groups in one report
STANDOUTS = 5  # best completions, and as many worst
STEPS_SHOWN = 8  # besides the groups that stand out: groups from so many steps, evenly spread
SIDES = {16: 4, 81: 9}  # cells of a sudoku -> its side
DIGITS = 4  # of numbers in the page


@dataclass(frozen=True)
class Standout:
    """A completion, and why it is shown."""

    why: str
    row: dict[str, Any]


def standouts(run: RunData) -> tuple[list[Standout], list[Standout]]:
    """The best and the worst completions by reward after cost; one of each group, latest first among equals."""
    record = run.record
    if not len(record):
        return [], []
    earned, step, group = (record[name].to_numpy() for name in ("earned", "step", "group"))
    found = []
    for why, order in (("best", np.lexsort((-step, -earned))), ("worst", np.lexsort((-step, earned)))):
        _, first = np.unique(group[order], return_index=True)
        chosen = order[np.sort(first)[:STANDOUTS]]
        found.append([Standout(why, record.slice(int(at), 1).to_pylist()[0]) for at in chosen])
    return found[0], found[1]


def slowest(run: RunData, count: int = 8) -> list[dict[str, Any]]:
    """Groups by the time from lease to hand-in, the slowest first."""
    record = run.record
    if not len(record):
        return []
    columns = ["group", "step", "worker", "seconds", "nfe", "reward"]
    table = record.select(columns).group_by(["group", "step", "worker", "seconds"])
    rows = table.aggregate([("nfe", "mean"), ("nfe", "max"), ("reward", "mean")]).to_pylist()
    known = [row for row in rows if row["seconds"] == row["seconds"]]
    return sorted(known, key=lambda row: -row["seconds"])[:count]


def shown_groups(run: RunData, wanted: list[int]) -> list[dict[str, Any]]:
    """Groups for the viewer, those that are wanted first, as long as there is room: see `group_view`."""
    try:
        rows, _ = read_record(run.directory.place)  # what is left out is told by `RunData.record`
    except FAILURES:
        return []
    table = rows.filter(compute.is_valid(rows["tokens"]))
    steps = np.unique(table["step"].to_numpy())
    places = np.unique(np.linspace(0, max(len(steps) - 1, 0), STEPS_SHOWN).round().astype(int))
    spread = {int(steps[at]) for at in places if at < len(steps)}
    first = {}
    for group, step in zip(table["group"].to_pylist(), table["step"].to_pylist(), strict=True):
        if step in spread:
            first.setdefault(step, group)
    there = set(table["group"].to_pylist())
    chosen = [group for group in dict.fromkeys([*wanted, *first.values()]) if group in there]
    found, used = [], 0
    for group in chosen:
        view = group_view(run, table.filter(compute.equal(table["group"], group)))
        used += len(repr(view))
        if used > EMBEDDED_BYTES and found:
            run.notes.append(
                f"The viewer has room for {len(found)} groups; `diffpo view {run.name} --group G` shows others."
            )
            break
        found.append(view)
    return found


def recorded_group(run: RunData, group: int | None = None) -> dict[str, Any]:
    """One group for the viewer; the newest, if none is named.

    Raises:
        UserError: when it is not recorded position by position; says which are.
    """
    try:
        rows, unread = read_record(run.directory.place)
    except FAILURES as error:
        raise UserError(f"{run.directory.name}/record cannot be read: {error}; mend its permissions") from error
    table = rows.filter(compute.is_valid(rows["tokens"]))
    if group is None and len(table):
        group = table["group"][-1].as_py()
    mine = table.filter(compute.equal(table["group"], group)) if group is not None else table.slice(0, 0)
    if len(mine):
        last = compute.max(mine["step"]).as_py()
        return group_view(run, mine.filter(compute.equal(mine["step"], last)))
    if unread:
        raise UserError(
            f"{run.directory.name}/record cannot be read whole: {'; '.join(unread)}; restore from a copy what is "
            "damaged, or move it away"
        )
    numbers = sorted(set(table["group"].to_pylist()))
    some = ", ".join(map(str, numbers[-10:])) or "none yet: they are written with each checkpoint"
    if group is None:
        raise UserError(f"run {run.name} has recorded no group yet: they come with each checkpoint; wait for one")
    trained = group in set(rows["group"].to_pylist())
    why = "was trained on, but not kept position by position (run.record_groups)" if trained else "is not in the record"
    raise UserError(
        f"group {group} of run {run.name} {why}; give one of the {len(numbers)} that are, the newest last: {some}"
    )


def group_view(run: RunData, rows: pa.Table) -> dict[str, Any]:
    """What the page's script draws: plain values, texts unescaped."""
    found = rows.cast(SCHEMA).to_pylist()
    first = found[0]
    return {
        "run": run.name,
        "group": first["group"],
        "step": first["step"],
        "version": first["version"],
        "staleness": first["staleness"],
        "seconds": _number(first["seconds"]),
        "worker": first["worker"],
        "prompt": first["prompt"],
        "side": _side(first),
        "completions": [_completion(row) for row in found],
    }


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": row["index"],
        "reward": _number(row["reward"]),
        "earned": _number(row["earned"]),
        "advantage": _number(row["advantage"]),
        "components": {name: _number(value) for name, value in row["components"]},
        "nfe": row["nfe"],
        "gamma": _number(row["gamma"]),
        "tokens": row["tokens"],
        "reveal": row["reveal_step"],
        "logprob": [_number(value) for value in row["logprob"]],
        "entropy": [_number(value) for value in row["entropy"]],
        "version": row["token_version"],
        "weight": [_number(value) for value in row["token_weight"]],
    }


def _side(row: dict[str, Any]) -> int:
    """Side of the sudoku that the first tokens fill; 0 of what is none."""
    side = SIDES.get(len(row["prompt"]), 0)
    digits = row["prompt"].isascii() and row["prompt"].isdigit()
    return side if side and digits and len(row["tokens"]) >= side * side else 0


def _number(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
