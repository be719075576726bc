"""Trackers: what a slow or failing one does to a run (nothing), and the real TensorBoard and W&B on disk."""

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from test_cli import TINY, Diffpo, check_refused, diffpo  # noqa: F401

from common.config import Config
from common.config_file import load_config, parse_config
from common.errors import UserError
from learner import run_metrics
from learner import trackers as trackers_module
from learner.controller import Controller
from learner.resumption import resumed_config
from learner.run_directory import RunDirectory
from learner.trackers import Trackers, check_trackers, open_trackers, tag

Rows = list[tuple[str, int, dict[str, float]]]


class Sink:
    """Keeps what it is given; may be told to be slow, or to fail at a step."""

    def __init__(self, *, until: threading.Event | None = None, fails_at: int | None = None) -> None:
        self.rows: Rows = []
        self.closed = False
        self._until, self._fails_at = until, fails_at

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self._until is not None:
            self._until.wait()
        if step == self._fails_at:
            raise ConnectionError("no\nroute to host")
        self.rows.append((kind, step, dict(values)))

    def close(self) -> None:
        self.closed = True


def step(number: int, reward: float = 0.5) -> dict[str, float]:
    return {"learner_steps": float(number), "rollout_reward": reward, "learner_weight_ess{reveal_step=2}": 0.75}


def config(where: Path | str, *trackers: str) -> Config:
    return parse_config(
        {
            "task": {"name": "sudoku"},
            "run": {"root": str(where), "name": "first"},
            "warm_start": {"steps": 3},
            "metrics": {"trackers": list(trackers)},
        }
    )


def test_rows_arrive_in_order_and_the_tracker_is_closed() -> None:
    sink, warnings = Sink(), []
    trackers = Trackers({"sink": lambda: sink}, warnings.append)
    trackers.put("warm_start", {"warm_start_steps": 1.0, "warm_start_loss": 2.0})
    trackers.put("started", {"learner_steps": 0.0})
    trackers.put("skipped", {"learner_skipped_steps": 1.0})
    for number in range(1, 101):
        trackers.put("step", step(number))
    trackers.close()
    trackers.close()
    assert [(kind, number) for kind, number, _ in sink.rows] == [
        ("warm_start", 1),
        *(("step", number) for number in range(1, 101)),
    ]
    assert sink.rows[-1][2] == {
        "learner/learner_steps": 100.0,
        "rollout/rollout_reward": 0.5,
        "learner/learner_weight_ess/reveal_step_2": 0.75,
    }
    assert sink.closed
    assert warnings == []


def test_tags_say_section_name_and_labels() -> None:
    assert tag("warm_start_loss") == "warm_start/warm_start_loss"
    assert tag("drift_nfe") == "drift/drift_nfe"
    assert tag("learner_surrogate_kl{passes=2,reveal_step=4}") == "learner/learner_surrogate_kl/passes_2/reveal_step_4"


def test_one_that_fails_is_one_warning_and_the_others_go_on() -> None:
    bad, good, warnings = Sink(fails_at=3), Sink(), []

    def refused() -> Sink:
        raise RuntimeError("nobody is logged in")

    trackers = Trackers({"bad": lambda: bad, "refused": refused, "good": lambda: good}, warnings.append)
    for number in range(1, 11):
        trackers.put("step", step(number))
    trackers.close()
    assert sorted(warnings) == [
        "tracker bad is off from here on: no route to host (metrics.jsonl has every step)",
        "tracker refused is off from here on: nobody is logged in (metrics.jsonl has every step)",
    ]
    assert [number for _, number, _ in bad.rows] == [1, 2]
    assert bad.closed
    assert [number for _, number, _ in good.rows] == list(range(1, 11))


def test_a_slow_one_holds_nobody_up_and_lacks_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "PENDING_ROWS", 5)
    gate, warnings = threading.Event(), []
    sink = Sink(until=gate)
    trackers = Trackers({"slow": lambda: sink}, warnings.append)
    for number in range(1, 1001):
        trackers.put("step", step(number))
    trackers.close(seconds=0.05)
    gate.set()  # neither call waited for it
    assert warnings == [
        "tracker slow is 5 rows behind: it lacks some (metrics.jsonl has them)",
        "tracker slow has not taken the last rows in 0.05 s (metrics.jsonl has them)",
    ]


def run_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinks: dict[str, Callable[[], Sink]], steps: int = 5
) -> list[tuple[str, dict[str, Any]]]:
    """A controller that reports some steps to given trackers; its events."""
    monkeypatch.setattr(run_metrics, "open_trackers", lambda _, __, warn: Trackers(sinks, warn))

    async def scenario() -> list[tuple[str, dict[str, Any]]]:
        controller = Controller(config=parse_config({"task": {"name": "sudoku"}}), directory=str(tmp_path))

        async def work() -> dict[str, Any]:
            for number in range(1, steps + 1):
                await controller.report("step", step(number))
            await controller._enter("finished")
            return {"steps": float(steps)}

        monkeypatch.setattr(controller, "_work", work)
        await controller.run()
        return await controller.events(0)

    return asyncio.run(scenario())


def test_a_run_ends_well_whatever_its_trackers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Sink()
    sinks = {"bad": lambda: Sink(fails_at=2), "good": lambda: good}
    events = run_controller(tmp_path, monkeypatch, sinks)
    assert events[-1][0] == "summary"
    warnings = [values["text"] for kind, values in events if kind == "warning"]
    assert len(warnings) == 1
    assert "tracker bad is off" in warnings[0]
    assert [number for _, number, _ in good.rows] == [1, 2, 3, 4, 5]
    assert good.closed
    assert [row["learner_steps"] for row in RunDirectory(tmp_path).read_metrics()] == [1, 2, 3, 4, 5]


def test_the_event_loop_does_not_wait_for_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reported = threading.Event(), []
    sink = Sink(until=gate)
    report = Controller.report

    async def counted(self: Controller, kind: str, values: dict[str, float]) -> None:
        await report(self, kind, values)
        reported.append(len(sink.rows))
        if len(reported) == 5:
            threading.Timer(0.2, gate.set).start()

    monkeypatch.setattr(Controller, "report", counted)
    events = run_controller(tmp_path, monkeypatch, {"slow": lambda: sink})
    assert reported == [0] * 5, "all five were reported before the tracker took one"
    assert events[-1][0] == "summary"
    assert len(sink.rows) == 5, "and it was given time to take them at the end"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["metrics.trackers=[mlflow]"], ["metrics.trackers.0: 'mlflow' is unknown; known: 'tensorboard' or 'wandb'"]),
        (["metrics.trackers=3"], ["metrics.trackers"]),
        (["metrics.wandb_project=a/b"], ["metrics.wandb_project", "a/b"]),
    ],
)
def test_trackers_that_there_are_not_are_refused(diffpo: Diffpo, overrides: list[str], parts: list[str]) -> None:  # noqa: F811
    check_refused(diffpo("train", *TINY, *overrides), *parts)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_package_that_is_not_there_is_named_before_anything_starts(
    diffpo: Diffpo,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda _: None)
    check_refused(diffpo(command, *TINY, "metrics.trackers=wandb"), "pip install 'diffpo[wandb]'")


def test_tensorboard_in_an_object_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_module, "find_spec", lambda _: True)
    with pytest.raises(UserError, match=r"run\.root=s3://bucket/runs\S+ cannot; set run\.root to a folder"):
        check_trackers(config("s3://bucket/runs?region=us-east-1", "tensorboard"))


def test_a_run_that_goes_on_may_have_other_trackers(tmp_path: Path) -> None:
    directory = RunDirectory.create(config(tmp_path))
    assert resumed_config(directory, file=None, overrides=["metrics.trackers=[wandb,wandb]"]).metrics.trackers == (
        "wandb",
    )
    assert load_config(f"{directory.name}/config.yaml").metrics.trackers == ()


def tell(config: Config, directory: RunDirectory, steps: list[int], reward: float) -> list[str]:
    """One process of a run: its steps, in metrics.jsonl and in its trackers; their warnings."""
    warnings: list[str] = []
    trackers = open_trackers(config, directory, warnings.append)
    if steps[0] == 1:
        for number in (1, 2, 3):
            values = {"warm_start_steps": float(number), "warm_start_loss": 1.0 / number}
            trackers.put("warm_start", values)
            directory.append_metrics({"kind": "warm_start", **values})
    for number in steps:
        trackers.put("step", step(number, reward))
        directory.append_metrics({"kind": "step", **step(number, reward)})
    trackers.close()
    return warnings


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config(tmp_path, "tensorboard")
    directory = RunDirectory.create(made)
    assert tell(made, directory, [1, 2, 3, 4, 3, 4, 5], 0.25) == [], "steps 3 and 4 again: the learner came back"
    assert tell(made, directory, [4, 5, 6], 0.75) == []
    shown = EventAccumulator(str(directory.path / "tensorboard" / "train")).Reload().Scalars("rollout/rollout_reward")
    assert [(event.step, event.value) for event in shown] == [
        (1, 0.25),
        (2, 0.25),
        (3, 0.25),
        (4, 0.75),
        (5, 0.75),
        (6, 0.75),
    ]
    warm = EventAccumulator(str(directory.path / "tensorboard" / "warm_start")).Reload()
    assert [event.step for event in warm.Scalars("warm_start/warm_start_loss")] == [1, 2, 3]


def test_wandb_goes_on_in_the_same_run_with_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline files hold what would be sent."""
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    made = config(tmp_path, "wandb")
    directory = RunDirectory.create(made)
    assert tell(made, directory, [1, 2, 3, 4], 0.25) == []
    assert tell(made, directory, [3, 4, 5, 6], 0.75) == []
    name = directory.read_json("wandb.json")["id"]
    files = sorted((directory.path / "wandb").glob(f"offline-run-*/run-{name}.wandb"), key=lambda f: f.stat().st_mtime)
    records = [Record.FromString(content) for file in files for content in wandb_records(file)]
    assert {record.run.run_id for record in records if record.HasField("run")} == {name}
    logged = []
    for record in records:
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            logged.append((record.history.step.num, json.loads(row.get("rollout/rollout_reward", "null"))))
    warm_start, first, again = [(1, None), (2, None), (3, None)], [(4, 0.25), (5, 0.25), (6, 0.25), (7, 0.25)], [8, 9]
    assert logged == [*warm_start, *first, *((number, 0.75) for number in again)]


def wandb_records(file: Path) -> list[bytes]:
    """Contents of W&B's own log: 7 bytes, then LevelDB's log format (blocks of 32 KiB; crc, length, type)."""
    data, at, found = file.read_bytes(), 7, [b""]
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        found[-1] += data[at + 7 : at + 7 + size]
        if kind in (1, 4):  # whole, or the last part
            found.append(b"")
        at += 7 + size
    return found[:-1]


def test_wandb_without_a_login_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb").teardown()  # it reads the environment once
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    made = config(tmp_path / "runs", "wandb")
    directory = RunDirectory.create(made)
    [warning] = tell(made, directory, [1, 2], 0.5)
    assert warning.startswith("tracker wandb is off from here on: ")
    assert "wandb login" in warning


def test_trackers_import_nothing_that_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    made = config(tmp_path)
    check_trackers(made)
    trackers = open_trackers(made, RunDirectory.create(made), pytest.fail)
    trackers.put("step", step(1))
    trackers.close()


def test_a_package_that_cannot_be_imported_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("learner.tensorboard_tracker", "learner.wandb_tracker"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    made = config(tmp_path, "tensorboard", "wandb")
    warnings = tell(made, RunDirectory.create(made), [1, 2], 0.5)
    assert len(warnings) == 2
    assert all("is off from here on" in warning for warning in warnings)


def test_sft_feeds_trackers_too(diffpo: Diffpo, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert diffpo("sft", *TINY, "metrics.trackers=tensorboard").code == 0
    shown = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard/warm_start")).Reload()
    assert [event.step for event in shown.Scalars("warm_start/warm_start_loss")] == [1, 2, 3]
