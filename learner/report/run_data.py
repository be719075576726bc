"""RunData: what a report needs of one run, read from its directory.

- Nothing is needed but the directory: a run that is still going, that crashed, or was never evaluated has what it has,
  and `notes` say what is missing. So has one that other versions of this code wrote, where that cannot be read.
- Steps that a resumed run did again count as the last time.
"""

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import yaml

from common.errors import UserError, one_line
from common.location import below
from common.place import FAILURES
from learner.record_rows import POSITIONS, SCHEMA
from learner.run_directory import CONFIG_FILE, EVALUATION, METRICS, RunDirectory
from learner.run_record import read_record

Rows = list[dict[str, Any]]
LARGEST = 1e30  # of what is drawn
LAST = 0.1  # share of the steps that stand for how a run ended
LITTLE = [name for name in SCHEMA.names if name not in POSITIONS]
UNREADABLE = (*FAILURES, ValueError, KeyError, TypeError)


@dataclass
class RunData:
    """Of one run; read once."""

    directory: RunDirectory
    notes: list[str] = field(default_factory=list)
    """What is missing, and why."""
    label: str = field(init=False)
    """Its name, or what tells it apart from others of that name."""

    def __post_init__(self) -> None:
        self.label = self.name

    @classmethod
    def read(cls, run: str) -> "RunData":
        """Raises UserError when there is no such run, or it is no run directory."""
        data = cls(RunDirectory.find(run))
        _ = data.config
        for part in (data.steps, data.evaluation, data.record, data.quarantined, data.set_aside):
            _ = part  # so that all notes are there
        return data

    @property
    def name(self) -> str:
        return self.directory.place.last

    @cached_property
    def config(self) -> dict[str, Any]:
        """As it was written, validated or not: a report changes nothing.

        Raises:
            UserError: when there is none.
        """
        try:
            found = yaml.safe_load(self.directory.place.read(CONFIG_FILE))
            if not isinstance(found, dict):
                raise ValueError("it holds no sections")
            return found
        except FileNotFoundError as error:
            raise UserError(
                f"{self.directory.name} is no run directory: it has no {CONFIG_FILE}; give run.root/run.name of a run"
            ) from error
        except (*UNREADABLE, yaml.YAMLError, RecursionError) as error:
            raise UserError(
                f"{below(self.directory.name, CONFIG_FILE)} cannot be read: {one_line(error)}; restore it"
            ) from error

    def key(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration; the default where the run's version had no such key."""
        found: Any = self.config
        for part in dotted.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return default if found is None else found

    @cached_property
    def steps(self) -> Rows:
        """Rows of learner steps, in their order."""
        try:
            rows = self.directory.read_metrics()
        except UNREADABLE as error:
            self.notes.append(f"{METRICS} cannot be read ({one_line(error)}): no curves")
            return []
        rows = [row for row in rows if row.get("kind") == "step"]
        known = {int(row["learner_steps"]): row for row in rows if _is_number(row.get("learner_steps"))}
        if not known:
            self.notes.append("No learner step is in metrics.jsonl yet: no curves.")
        return [known[step] for step in sorted(known)]

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluation.json` holds; None where the run has not been evaluated."""
        try:
            found = self.directory.read_json(EVALUATION)
            _check_evaluation(found)
            return found
        except FileNotFoundError:
            self.notes.append("Not evaluated yet: no frontier, and no accuracy before and after.")
        except (*UNREADABLE, LookupError) as error:
            self.notes.append(f"{EVALUATION} cannot be read ({one_line(error)}): no frontier.")
        return None

    @cached_property
    def record(self) -> pa.Table:
        """Every completion that the run was trained on, without what it has position by position."""
        try:
            found, unread = read_record(self.directory.place, columns=LITTLE)
        except UNREADABLE as error:
            self.notes.append(f"record/ cannot be read ({one_line(error)}): no completions.")
            return SCHEMA.empty_table().select(LITTLE)
        self.notes += [f"A file of record/ cannot be read and is left out: {why}." for why in unread]
        if not len(found) and not unread:
            self.notes.append("No completions are recorded yet (they are written with each checkpoint).")
        return found

    @cached_property
    def quarantined(self) -> Rows:
        """Groups that failed twice, with the reason."""
        try:
            found = self.directory.read_json("quarantine.json")
            return [{"group": one["group"], "reason": one["reason"]} for one in found]
        except FileNotFoundError:
            return []
        except UNREADABLE:
            self.notes.append("quarantine.json cannot be read.")
            return []

    @cached_property
    def set_aside(self) -> Rows:
        """Batches that could not be trained on."""
        found = []
        place = self.directory.set_aside
        try:
            for name in place.folders():
                why = json.loads((place / name).read("why.json"))
                found.append({"name": name} | {key: why[key] for key in ("step", "version", "reason")})
        except UNREADABLE:
            self.notes.append("A batch that was set aside cannot be read.")
        return found

    @cached_property
    def planned(self) -> int:
        """Learner steps that it was to do."""
        steps = self.key("learner.steps")
        return int(steps) if _is_number(steps) else 0

    @cached_property
    def state(self) -> str:
        """In one phrase."""
        done = int(self.steps[-1]["learner_steps"]) if self.steps else 0
        if self.evaluation is not None and self.evaluation["steps"] >= self.planned:
            return f"finished, {done} steps"
        age = self._seconds_since_written()
        since = f", last step {_duration(age)} ago" if age is not None else ""
        return f"{done} of {self.planned} steps{since}; going on, stopped or failed (diffpo status {self.name})"

    def _seconds_since_written(self) -> float | None:
        times = [when for name, _, when in self.directory.place.files() if name == METRICS]
        return max(0.0, time.time() - times[0] / 1e9) if times else None

    @cached_property
    def seconds(self) -> float:
        """From the first report to the last, over all lives of the run, as far as rows tell."""
        total, before = 0.0, 0.0
        for now in self.series("seconds")[1]:
            total += now - before if now >= before else now
            before = now
        return total

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key of the rows, where it is there and a number."""
        found = [(int(row["learner_steps"]), row[key]) for row in self.steps if _is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def ending(self, key: str) -> float | None:
        """Mean of a key over the last steps."""
        _, values = self.series(key)
        last = values[-max(1, round(LAST * len(values))) :]
        return sum(last) / len(last) if last else None

    def settings(self, policy: str) -> list[dict[str, Any]]:
        """The rows of the evaluation, of the policy before or after; none where the run has not been evaluated."""
        return self.evaluation["settings"][policy] if self.evaluation is not None else []

    def setting(self, policy: str, name: str) -> dict[str, Any] | None:
        """The row of one setting."""
        return next((row for row in self.settings(policy) if row["setting"] == name), None)


def _check_evaluation(found: Any) -> None:
    """Raises ValueError, KeyError, TypeError, LookupError where something that the page shows is missing."""
    rows = [row for policy in ("before", "after") for row in (found["settings"][policy][0], *found["settings"][policy])]
    numbers = [found["steps"], *(row[key] for row in rows for key in ("accuracy", "nfe"))]
    if "frontier_gain" in found:
        numbers += [
            *(found["frontier_gain"][key] for key in ("gain", "low", "high")),
            *(found["nfe_range"][at] for at in (0, 1)),
        ]
    odd = [one for one in numbers if not _is_number(one)] + [one for one in rows if not isinstance(one["setting"], str)]
    if odd:
        raise ValueError(f"{odd[0]!r} is in a place of a number or a setting")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST  # not of NaN


def _duration(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
