"""LearnerActor without Ray and without models: nothing is lost or trained twice, whoever dies, and bad batches end.

The buffer is the real one on real files, the trainer's weights are the list of groups that they were trained on.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from buffer_fixtures import PATIENCE, WHEN, Handle, living, without_objects
from ray.exceptions import ActorUnavailableError

from actors import rollout_actor
from actors.producer import Fault
from actors.rollout_actor import RolloutActor
from common.checkpoint_store import CheckpointStore
from common.config import Config
from common.config_file import load_config
from common.errors import RunError
from common.lease import FinishedGroup, Sample
from common.place import Place
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from common.version import LINEAGE, step_of
from learner import buffer_link, learner_actor
from learner.benchmarks.event_model import Workload
from learner.benchmarks.simulated_producer import MakeSimulated, SimulatedProducer
from learner.checkpoint_writer import CheckpointWriter
from learner.learner_actor import LearnerActor
from learner.run_directory import RunDirectory
from learner.saved_group import find_group
from learner.trainer import BatchRefused, Report

STEPS, GROUPS = 8, 2


class Killed(BaseException):
    """The learner's process ends here."""


class ListTrainer:
    """Its weights are the numbers of the groups that it was trained on."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.trained: list[int] = []
        self.closed = False

    @property
    def steps(self) -> int:
        return len(self.trained) // GROUPS

    def warm_start(self, report: Report) -> None:
        report("warm_start", {})

    def restore(self, folder: Path) -> None:
        self.trained = json.loads((folder / "trained.json").read_text())

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        numbers = [int(payload) for payload in payloads]
        if refused := self._world.refused.intersection(numbers):
            raise BatchRefused(f"groups {sorted(refused)} are no good")
        self.trained += numbers
        if self.steps in self._world.dies_at:
            self._world.dies_at.remove(self.steps)
            raise Killed
        return {"learner_loss": float(version)}

    def recorded(self, batch: Sample) -> None:
        return None

    def weights(self) -> np.ndarray:
        return np.array([0, *self.trained], np.float32)

    def base(self) -> list[np.ndarray]:
        return []

    def saved(self) -> Callable[[Path], None]:
        text = json.dumps(self.trained)
        return lambda folder: self._world.write(folder, text)

    def close(self) -> None:
        self.closed = True

    def gauges(self) -> dict[str, float]:
        return {}


class Numbered(SimulatedProducer):
    """A group's payload is its number."""

    def step(self) -> list[FinishedGroup | Fault]:
        return [replace(group, payload=b"%d" % group.number) for group in super().step()]  # type: ignore[type-var]


class World:
    """A run directory, its buffer, an actor that generates, and what learners tell; they are the test's to start."""

    def __init__(self, root: Path, *overrides: str) -> None:
        settings = [f"learner.steps={STEPS}", f"learner.groups_per_step={GROUPS}", "run.checkpoint_every=2"]
        self.config: Config = load_config(None, ["task.name=sudoku", f"run.root={root}", *settings, *overrides])
        self.directory = RunDirectory.create(self.config)
        self.refused: set[int] = set()
        self.dies_at: list[int] = []
        self.unwritable: list[int] = []
        self.told: list[tuple[str, dict[str, float]]] = []
        self.after_step: dict[int, Callable[[], Any]] = {}
        self.warnings: list[str] = []
        self.trainer: ListTrainer
        self.actor: LearnerActor
        self.buffer: Handle
        self.writers: list[EndedWriter] = []

    def write(self, folder: Path, text: str) -> None:
        step = len(json.loads(text)) // GROUPS
        if step in self.unwritable:
            self.unwritable.remove(step)
            raise OSError("no space left")
        (folder / "trained.json").write_text(text)

    def make_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(
            groups_per_step=GROUPS,
            max_staleness=1,
            lease_seconds=60.0,
            drop_no_spread=False,
            store=SegmentStore(self.directory.segments, memory_bytes=2**20),
            checkpoints=self.directory.checkpoint_store(self.config),
            groups_limit=STEPS * GROUPS,
        )

    def learn(self) -> dict[str, float]:
        """One learner, from its start to its end."""

        def make(config: Config, warm_start: Path) -> ListTrainer:
            self.trainer = ListTrainer(self)
            return self.trainer

        def writer(store: CheckpointStore, keep: int) -> CheckpointWriter:
            self.writers.append(EndedWriter(store, keep=keep))
            return self.writers[-1]

        learner_actor.CheckpointWriter = writer  # type: ignore[assignment, misc]
        self.actor = LearnerActor(
            config=self.config, directory=self.directory.name, controller=Controller(self), make=make
        )
        self.actor.warm_start()
        try:
            return self.actor.run(self.buffer)
        except Killed:
            self.writers[-1].end()
            raise

    def report(self, kind: str, values: dict[str, float]) -> None:
        self.told.append((kind, values))
        if kind == "step":
            self.after_step.pop(int(values["learner_steps"]), lambda: None)()

    def values(self, kind: str) -> list[dict[str, float]]:
        return [values for told, values in self.told if told == kind]

    def checkpoints(self) -> list[int]:
        return [one.step for one in self.directory.checkpoint_store(self.config).checkpoints()]


class EndedWriter(CheckpointWriter):
    """Ends with its learner, as if it were of the same process; what it writes then is whole."""

    def end(self) -> None:
        self._threads.shutdown(wait=True)


class Controller:
    def __init__(self, world: World) -> None:
        self.report = Method(world.report)
        self.warn = Method(world.warnings.append)


class Method:
    def __init__(self, call: Callable[..., None]) -> None:
        self.remote = call


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    without_objects(monkeypatch)
    monkeypatch.setattr(learner_actor, "CheckpointWriter", None)  # each learner sets its own
    for module in (buffer_link, rollout_actor):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.005)


@contextmanager
def world(root: Path, *overrides: str, seconds: float = 0.002) -> Iterator[World]:
    found = World(root, *overrides)
    workload = Workload(generation_seconds=seconds, cv=0.5, train_seconds=0.0, steps=1)
    made = MakeSimulated(workload=workload, slots=3)
    with living(found.make_buffer) as found.buffer:
        actor = RolloutActor(name="a", buffer=found.buffer, make=lambda name, wake: Numbered(made))
        thread = Thread(target=actor.run, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            found.buffer.call("close")
            actor.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def assert_each_was_trained_once(found: World, reached: dict[str, float]) -> None:
    assert reached["steps"] == STEPS
    assert found.trainer.trained == list(range(STEPS * GROUPS))
    gauges = found.buffer.call("gauges")
    assert gauges["groups_trained"] == STEPS * GROUPS
    assert (gauges["lost_groups"], gauges["violations"], gauges["groups_quarantined"]) == (0, 0, 0)
    assert found.checkpoints()[-1] == STEPS
    assert found.trainer.closed


def test_a_run_without_deaths(tmp_path: Path) -> None:
    with world(tmp_path, "run.keep_checkpoints=2") as found:
        reached = found.learn()
        assert_each_was_trained_once(found, reached)
        assert found.checkpoints() == [6, 8]
        assert [values["weights_version"] for values in found.values("step")] == list(range(1, STEPS + 1))
        assert found.values("step")[-1]["checkpoint_failures"] == 0
        assert found.warnings == []


CALLS = ["sample", "publish", "export", "settle", "lease", "submit"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", CALLS)
def test_the_buffer_may_die_at_any_call(tmp_path: Path, name: str, when: str) -> None:
    """At the first call of the name, and at a later one; one of an actor's while the learner sees nothing of it."""
    with world(tmp_path) as found:
        found.buffer.dies(name, when)
        found.after_step[STEPS // 2 - 1] = lambda: found.buffer.dies(name, when)
        reached = found.learn()
        assert found.buffer.lives >= 2
        assert_each_was_trained_once(found, reached)
        lineages = {int(values["weights_version"]) // LINEAGE for values in found.values("step")}
        assert len(lineages) == 1, "the learner lives"


@pytest.mark.parametrize("step", [1, 2, 3, 5, STEPS])
def test_a_learner_that_dies_goes_on_from_its_newest_checkpoint(tmp_path: Path, step: int) -> None:
    with world(tmp_path) as found:
        found.dies_at = [step]
        with pytest.raises(Killed):
            found.learn()
        kept = found.checkpoints()[-1]
        assert kept < step
        done = len(found.values("step"))
        reached = found.learn()
        assert_each_was_trained_once(found, reached)
        lineages = [int(values["weights_version"]) // LINEAGE for values in found.values("step")]
        assert lineages == [0] * done + [1] * (STEPS - kept)
        steps = [step_of(int(values["weights_version"])) for values in found.values("step")[done:]]
        assert steps == list(range(kept + 1, STEPS + 1))
        assert found.buffer.call("gauges")["rewound_groups"] == (done - kept) * GROUPS


def test_a_learner_that_dies_again_and_again(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.dies_at = [3, 4, 5, 7, STEPS]
        while found.dies_at:
            with pytest.raises(Killed):
                found.learn()
        assert_each_was_trained_once(found, found.learn())
        versions = [values["weights_version"] for values in found.values("step")]
        assert all(low < high for low, high in pairwise(versions))


@pytest.mark.parametrize("name", ["rewind", "publish", "sample"])
@pytest.mark.parametrize("when", WHEN)
def test_both_may_die(tmp_path: Path, name: str, when: str) -> None:
    """The buffer dies while the new learner takes its run up again."""
    with world(tmp_path) as found:
        found.dies_at = [5]
        with pytest.raises(Killed):
            found.learn()
        found.buffer.dies(name, when)
        assert_each_was_trained_once(found, found.learn())
        assert found.buffer.lives == 2


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.dies_at = [6]
        with pytest.raises(Killed):
            found.learn()
        newest = found.directory.path / "checkpoints" / f"step-{found.checkpoints()[-1]:06d}"
        (newest / "trained.json").write_text("[]")
        assert_each_was_trained_once(found, found.learn())
        [warning] = found.warnings
        assert f"{newest.name}/trained.json" in warning


def test_a_checkpoint_that_was_passed_over_and_is_sound_again_is_left_behind(tmp_path: Path) -> None:
    """What it contains was taken back for the older one that was used in its place."""
    with world(tmp_path) as found:
        found.dies_at = [6]
        with pytest.raises(Killed):
            found.learn()
        newest = found.directory.path / "checkpoints" / f"step-{found.checkpoints()[-1]:06d}" / "trained.json"
        sound = newest.read_bytes()
        newest.write_text("[]")
        found.dies_at = [3]
        with pytest.raises(Killed):
            found.learn()
        newest.write_bytes(sound)
        assert_each_was_trained_once(found, found.learn())
        assert f"checkpoint {newest.parent.name} was left behind and goes; step-000002 is used" in found.warnings[-1]
        assert "were taken back since" in found.warnings[-1]


def test_a_damaged_checkpoint_takes_the_place_of_no_sound_one(tmp_path: Path) -> None:
    """Training ends before its step comes again: it would be the second newest of two that are kept."""
    with world(tmp_path) as found:
        found.dies_at = [6]
        with pytest.raises(Killed):
            found.learn()
        sound, damaged = found.checkpoints()
        (found.directory.path / "checkpoints" / f"step-{damaged:06d}" / "trained.json").write_text("[]")
        found.after_step[damaged - 1] = lambda: found.buffer.call("close")
        reached = found.learn()
        assert sound < reached["steps"] < damaged
        assert found.checkpoints() == [sound, reached["steps"]]


def test_a_batch_that_cannot_be_trained_on_is_set_aside(tmp_path: Path) -> None:
    """Two in a row meet the same weights; their steps are done with other groups."""
    with world(tmp_path) as found:
        found.refused = {4, 7}
        reached = found.learn()
        assert reached["steps"] == STEPS
        assert found.trainer.trained == [number for number in range(STEPS * GROUPS + 4) if number not in range(4, 8)]
        folders = sorted((found.directory.path / "set_aside").iterdir())
        assert len(folders) == len(found.warnings) == 2
        for folder, numbers in zip(folders, ([4, 5], [6, 7]), strict=True):
            why = json.loads((folder / "why.json").read_text())
            assert (why["step"], why["version"], why["numbers"]) == (2, 2, numbers)
            assert "are no good" in why["reason"]
            assert json.loads((folder / "trained.json").read_text()) == [0, 1, 2, 3]
            assert (folder / "groups").is_dir()
        assert found.values("step")[-1]["learner_skipped_steps"] == 2
        gauges = found.buffer.call("gauges")
        assert (gauges["skipped_groups"], gauges["groups_trained"]) == (4, STEPS * GROUPS)


def test_batches_are_set_aside_up_to_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_actor, "MOST_SET_ASIDE", 1)
    with world(tmp_path) as found:
        found.refused = {4, 7}
        assert found.learn()["steps"] == STEPS
        assert len(list((found.directory.path / "set_aside").iterdir())) == 1
        kept, left = found.warnings
        assert "is set aside in " in kept
        assert "set_aside has 1 already (move some away to keep more): groups" in left
        assert found.buffer.call("gauges")["skipped_groups"] == 4


@pytest.mark.parametrize("when", WHEN)
def test_the_buffer_may_die_while_a_batch_is_set_aside(tmp_path: Path, when: str) -> None:
    with world(tmp_path) as found:
        found.refused = {4}
        found.buffer.dies("set_aside", when)
        assert found.learn()["steps"] == STEPS
        assert found.buffer.lives == 2
        assert found.trainer.trained == [number for number in range(STEPS * GROUPS + 2) if number not in (4, 5)]
        [folder] = (found.directory.path / "set_aside").iterdir()
        assert find_group(found.directory, 4).set_aside == Place(folder)


def test_the_buffer_may_die_before_there_is_a_learner(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.buffer.dies("gauges", "before")
        with pytest.raises(ActorUnavailableError):
            found.buffer.call("gauges")
        assert_each_was_trained_once(found, found.learn())


def test_a_learner_that_dies_before_its_first_checkpoint(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.unwritable = [0]
        with pytest.raises(RunError, match=r"step 0 in .*checkpoints cannot be written: no space left; make room"):
            found.learn()
        assert found.buffer.call("gauges")["groups_leased"] == 0, "nothing begins without it"
        for _ in range(2):  # a run that is resumed has another buffer
            assert found.checkpoints() == []
            found.buffer.dies("gauges", "before")
            with pytest.raises(ActorUnavailableError):
                found.buffer.call("gauges")
        assert_each_was_trained_once(found, found.learn())


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_refused_batches_in_a_row_end_the_run(tmp_path: Path, most: int) -> None:
    with world(tmp_path, f"learner.max_skipped_steps={most}") as found:
        found.refused = set(range(4, 100))
        with pytest.raises(
            RunError, match=rf"{most + 1} batches in a row .*max_skipped_steps={most}\); the last: groups"
        ):
            found.learn()
        assert len(list((found.directory.path / "set_aside").iterdir())) == most + 1
        assert found.trainer.closed


def test_refused_batches_are_counted_in_a_row_only(tmp_path: Path) -> None:
    with world(tmp_path, "learner.max_skipped_steps=1") as found:
        found.refused = {0, 5, 9}
        assert found.learn()["steps"] == STEPS


def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_its_place(tmp_path: Path) -> None:
    with world(tmp_path, "run.keep_checkpoints=9") as found:
        found.unwritable = [4]
        reached = found.learn()
        assert_each_was_trained_once(found, reached)
        assert found.checkpoints() == [0, 2, 6, 8]
        [warning] = found.warnings
        assert "the last one stays: checkpoint of step 4" in warning
        assert "no space left" in warning


def test_a_closed_buffer_ends_the_loop_with_a_checkpoint(tmp_path: Path) -> None:
    with world(tmp_path) as found:
        found.after_step[3] = lambda: found.buffer.call("close")
        reached = found.learn()
        assert 3 <= reached["steps"] < STEPS
        assert found.checkpoints()[-1] == reached["steps"]


def test_it_says_what_it_is_doing(tmp_path: Path) -> None:
    with world(tmp_path, seconds=60.0) as found:
        thread = Thread(target=found.learn, daemon=True)
        thread.start()
        deadline = time.monotonic() + PATIENCE
        while not hasattr(found, "actor") or "waits for a batch" not in found.actor.doing():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found.buffer.call("close")
        thread.join(PATIENCE)
        assert not thread.is_alive()
