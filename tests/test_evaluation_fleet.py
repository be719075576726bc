"""Evaluation at scale: the same answers from one process and from workers, after a kill, and after a worker's death."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from learner_fixtures import MODEL

from actors.evaluation import Point, standard_settings
from common.config import IN_RAY_JOB, Config, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError
from common.place import Place
from common.policy_loading import build_policy
from common.tasks import build_task
from learner import final_evaluation
from learner.evaluation_fleet import Shard, measure_on_ray, shards_of
from learner.evaluation_record import ShardFolder, evaluation_digest
from learner.final_evaluation import Evaluation
from learner.ray_connection import LOCAL, connect

Points = dict[str, list[Point]]


def settings(*overrides: str) -> Config:
    given = ["task.name=sudoku", "sampler.max_prompt_tokens=16", "evaluation.prompts=10", "evaluation.gammas=[0.1,1]"]
    given += ["evaluation.confidences=[0.9]", "evaluation.tokens_per_step=[4,4]", "evaluation.shard_prompts=4"]
    return load_config(None, [*given, *overrides])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for seed, name in enumerate(("before", "after")):
        folder = tmp_path_factory.mktemp(name)
        made[name] = str(folder)
        task = build_task(settings().task)
        build_policy(MODEL, ThresholdConfig(), alphabet=task.alphabet, seed=seed).save(folder)
    return made


def evaluated(config: Config, folders: dict[str, str], out: Path) -> Points:
    return Evaluation(config, folders, ShardFolder(Place(out), config, folders)).run()


@pytest.fixture(scope="module")
def whole(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Points:
    return evaluated(settings(), folders, tmp_path_factory.mktemp("whole"))


def check_equal(found: Points, expected: Points) -> None:
    assert list(found) == list(expected)
    for name, points in expected.items():
        assert len(found[name]) == len(points) == 7
        for mine, theirs in zip(found[name], points, strict=True):
            assert (mine.setting, mine.failed) == (theirs.setting, theirs.failed)
            assert mine.completions == theirs.completions
            assert mine.failures == theirs.failures
            for field in ("correct", "nfe", "reward", "reward_costed", "gamma"):
                np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))
            for key, values in theirs.components.items():
                np.testing.assert_array_equal(mine.components[key], values)


@pytest.mark.parametrize(("learns", "mode"), [("joint", "mean"), ("threshold", "mean"), ("model", "initial")])
def test_the_operating_point_is_that_of_rollouts(learns: str, mode: str) -> None:
    """A head that nothing trains has another mean than the gamma that it was made for."""
    own = [each.parameter for each in standard_settings(settings(f"learner.train={learns}"))[-2:]]
    assert own == [mode, mode]


def test_shards_cover_every_prompt_of_every_setting(folders: dict[str, str]) -> None:
    shards = shards_of(settings(), folders, 4)
    assert [list(shard.prompts) for shard in shards[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(shards) == 2 * 7 * 3


def test_policies_differ_and_answers_are_recorded(whole: Points) -> None:
    [before, after] = [points[0] for points in whole.values()]
    assert len(before.completions) == 10
    assert before.completions != after.completions


def test_an_evaluation_that_was_killed_does_what_is_missing(
    folders: dict[str, str], whole: Points, tmp_path: Path
) -> None:
    config, killed_after = settings(), 5
    kept = ShardFolder(Place(tmp_path), config, folders)
    write, written = kept.write, []

    def killed(number: int, point: Point) -> None:
        write(number, point)
        written.append(number)
        if len(written) == killed_after:
            raise KeyboardInterrupt

    kept.write = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Evaluation(config, folders, kept).run()
    (tmp_path / "shards" / kept.place.last / "1.parquet").write_bytes(b"half of a fi")
    again = ShardFolder(Place(tmp_path), config, folders)
    write_again, missing = again.write, []
    again.write = lambda number, point: (missing.append(number), write_again(number, point))[1]  # type: ignore[method-assign]
    told: list[tuple[str, str]] = []
    evaluation = Evaluation(config, folders, again, lambda name, point: told.append((name, point.setting.name)))
    found = evaluation.run()
    check_equal(found, whole)
    assert missing == [1, *range(killed_after, 42)]
    assert len(told) == 14
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_computed_decides_what_goes_on(folders: dict[str, str], tmp_path: Path) -> None:
    digest = evaluation_digest(settings(), folders)
    for same in ("rollout.actors=3", "run.name=other", "learner.steps=7"):
        assert evaluation_digest(settings(same), folders) == digest
    for other in ("run.seed=1", "task.seed=1", "evaluation.prompts=9", "rollout.slots=8", "learner.speed_weight=0.2"):
        assert evaluation_digest(settings(other), folders) != digest
    assert evaluation_digest(settings(), {"before": folders["after"]}) != digest
    moved = {**folders, "after": str(tmp_path)}
    assert evaluation_digest(settings(), moved) != digest


def test_a_folder_named_as_a_text_of_the_task_is_none_of_its_data(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = evaluation_digest(settings(), folders)
    (tmp_path / settings().task.name).mkdir()  # `--out sudoku`, in which shards are written
    assert evaluation_digest(settings(), folders) == digest


def test_a_text_of_the_task_too_long_for_a_path_is_none(folders: dict[str, str]) -> None:
    prompt = f"task.prompt='{{question}} {'step by step ' * 30}'"
    told = load_config(None, ["task.name=custom", "task.reward=a:b", prompt])
    assert evaluation_digest(told, folders) == evaluation_digest(told, folders)


@pytest.mark.parametrize("in_job", [False, True])
def test_workers_elsewhere_get_absolute_paths_but_in_a_ray_job(
    in_job: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    async def asked(config: Config, shards: dict[int, Shard], done: Any, **_: Any) -> None:
        base = Path() if in_job else tmp_path
        assert {shard.folder for shard in shards.values()} == {str(base / "model")}
        assert config.task.files == (str(base / "data.jsonl"), str(base / "other.jsonl"))
        assert config.task.validation_data == "hub:a/b"  # type: ignore[union-attr]
        raise Asked

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(final_evaluation, "_connect", lambda config: None)
    monkeypatch.setattr(final_evaluation, "measure_on_ray", asked)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv(IN_RAY_JOB, "{}") if in_job else monkeypatch.delenv(IN_RAY_JOB, raising=False)
    data = ["task.data=data.jsonl", "task.test_data=other.jsonl", "task.validation_data=hub:a/b", "rollout.actors=2"]
    config = load_config(None, ["task.name=gsm8k", *data])
    with pytest.raises(Asked):
        evaluated(config, {"policy": "model"}, tmp_path / "out")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    connect(LOCAL, way_out="")
    yield
    ray.shutdown()


def test_workers_find_what_one_process_finds_though_one_dies(
    cluster: None, folders: dict[str, str], whole: Points
) -> None:
    config = settings("rollout.cpus=0.5")
    shards = dict(enumerate(shards_of(config, folders, 4)))
    found: dict[int, Point] = {}
    killed: list[int] = []

    def done(number: int, point: Point) -> None:
        found[number] = point
        if len(found) == 10:
            worker = next(one for one in workers() if one.pid not in killed)
            killed.append(worker.pid)
            worker.kill()

    asyncio.run(measure_on_ray(config, shards, done, workers=2))
    assert len(killed) == 1
    assert sorted(found) == sorted(shards)
    points = [found[number] for number in shards]
    joined = [Point.joined(points[start : start + 3]) for start in range(0, 42, 3)]
    check_equal({"before": joined[:7], "after": joined[7:]}, whole)


def workers() -> list[psutil.Process]:
    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found += [one] if "EvaluationWorker" in " ".join(one.cmdline()) else []
    return found


def test_a_worker_that_dies_again_and_again_ends_it(cluster: None, folders: dict[str, str]) -> None:
    config = settings("rollout.cpus=0.5", "rollout.max_restarts=0")

    def done(number: int, point: Point) -> None:
        for worker in workers():
            with suppress(psutil.Error):
                worker.kill()

    shards = dict(enumerate(shards_of(config, folders, 4)))
    with pytest.raises(RunError, match=r"an evaluation worker died 1 times \(rollout.max_restarts=0\)"):
        asyncio.run(measure_on_ray(config, shards, done, workers=1))


def test_a_policy_that_cannot_be_loaded_is_the_users_error(cluster: None, tmp_path: Path) -> None:
    shard: Any = Shard("policy", tmp_path, shards_of(settings(), {"policy": tmp_path}, 4)[0].setting, range(4))
    with pytest.raises(Exception, match=r"no config\.json there") as caught:
        asyncio.run(measure_on_ray(settings(), {0: shard}, lambda number, point: None, workers=1))
    assert type(caught.value).__name__ == "UserError"


def test_the_end_of_a_run_measures_the_same_and_tells_how_it_gets_on(
    cluster: None, folders: dict[str, str], whole: Points, tmp_path: Path
) -> None:
    class Listener:
        """Hears what a controller would; made here, as workers cannot import this file."""

        def __init__(self) -> None:
            self._heard: list[tuple[int, str]] = []

        def evaluating(self, worker: int, doing: str) -> None:
            self._heard.append((worker, doing))

        def heard(self) -> list[tuple[int, str]]:
            return self._heard

    config = settings("evaluation.prompts=4", "rollout.cpus=2")
    listener: Any = ray.remote(Listener).options(num_cpus=0).remote()
    kept = ShardFolder(Place(tmp_path), config, folders)
    found = asyncio.run(Evaluation(config, folders, kept).on_ray(workers=1, listener=listener))
    assert [point.completions for point in found["after"]] == [point.completions[:4] for point in whole["after"]]
    heard = ray.get(listener.heard.remote())
    assert heard[0] == (0, "loads policy before")
    assert heard[1] == (0, "before: eb gamma=0.1: 0 of 4 completions")
    again = ShardFolder(Place(tmp_path), config, folders)
    assert asyncio.run(Evaluation(config, folders, again).on_ray(workers=1)).keys() == found.keys()  # of files alone
