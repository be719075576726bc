"""PolicyTrainer: a saved state is a copy, what restores it goes on bit-equal, and a damaged one is named."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import parameters

from common.config import Config
from common.config_file import load_config
from common.errors import RunError
from common.policy_loading import load_policy
from common.tasks import build_task
from learner import policy_trainer
from learner.policy_trainer import LEARNER_STATE, PolicyTrainer
from learner.synchronous_rollout import SynchronousRollout

TINY = [
    *("task.name=sudoku", "model.hidden_size=16", "model.layers=2", "model.heads=2", "model.intermediate_size=32"),
    *("warm_start.steps=2", "warm_start.batch_size=4", "warm_start.threads=1", "learner.threads=1"),
    *("learner.group_size=4", "rollout.slots=4", "sampler.max_prompt_tokens=16", "sampler.max_completion_tokens=16"),
    *("learner.kl_beta=0.1", "learner.inner_updates=2", "learner.drift_remedy=hold_nfe", "learner.train=model"),
    *("learner.autocast=false", "learner.learning_rate=0.01", "evaluation.drift_every=0"),
]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, TINY)


@pytest.fixture(scope="module")
def warm_start(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "warm_start"
    PolicyTrainer(config, folder).warm_start(lambda kind, values: None)
    return folder


@pytest.fixture
def trainer(config: Config, warm_start: Path) -> PolicyTrainer:
    return started(config, warm_start)


def started(config: Config, warm_start: Path) -> PolicyTrainer:
    """From the weights that an earlier life left."""
    found = PolicyTrainer(config, warm_start)
    found.warm_start(lambda kind, values: pytest.fail("it learns the demonstrations anew"))
    return found


@pytest.fixture(scope="module")
def batches(config: Config, warm_start: Path) -> list[list[bytes]]:
    """Of one group each, whose rewards differ."""
    policy = load_policy(warm_start, config.model, config.sampler.threshold)
    rollout = SynchronousRollout(config, build_task(config.task), policy)
    found = [[group.payload] for _ in range(12) for group in rollout._groups(1) if group.spread]
    assert len(found) >= 4
    return found[:4]


def test_a_saved_state_is_a_copy(trainer: PolicyTrainer, batches: list[list[bytes]], tmp_path: Path) -> None:
    """What is written after more training is what there was when it was saved."""
    trainer.train(batches[0], 0)
    write, before = trainer.saved(), parameters(trainer._policy)
    write(tmp_path / "at once")
    for version, batch in enumerate(batches[1:]):
        trainer.train(batch, 1 + version)
    assert (parameters(trainer._policy) != before).any()
    write(tmp_path / "later")
    names = sorted(path.name for path in (tmp_path / "later").iterdir())
    assert LEARNER_STATE in names
    for name in names:
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "later" / name).read_bytes(), name
    loaded = load_policy(tmp_path / "later", trainer.config.model, trainer.config.sampler.threshold)
    assert (parameters(loaded) == before).all()
    assert torch.load(tmp_path / "later" / LEARNER_STATE, weights_only=True)["steps_done"] == 1


def test_a_restored_trainer_goes_on_bit_equal(
    config: Config, warm_start: Path, trainer: PolicyTrainer, batches: list[list[bytes]], tmp_path: Path
) -> None:
    """Also the KL term: its reference is the warm start, whatever was restored."""
    for version, batch in enumerate(batches[:2]):
        trainer.train(batch, version)
    trainer.saved()(tmp_path)
    onward = [trainer.train(batch, 2 + n) for n, batch in enumerate(batches[2:])]
    other = started(config, warm_start)
    other.restore(tmp_path)
    assert other.steps == 2
    assert [other.train(batch, 2 + n) for n, batch in enumerate(batches[2:])] == onward
    assert np.array_equal(other.weights(), trainer.weights())
    assert onward[0]["learner_kl"] > 0


def test_another_runs_weights_do_not_fit(config: Config, trainer: PolicyTrainer, tmp_path: Path) -> None:
    wider = config.model.model_copy(update={"hidden_size": 32})
    other = PolicyTrainer(config.model_copy(update={"model": wider}), tmp_path / "warm_start")
    other.warm_start(lambda kind, values: None)
    other.saved()(tmp_path / "other")
    with pytest.raises(RunError, match=r"does not fit this run: .*; resume the run it belongs to"):
        trainer.restore(tmp_path / "other")


@pytest.mark.parametrize("path", [False, True])
def test_what_ranks_will_share_out_is_opened_on_the_cpu(warm_start: Path, tmp_path: Path, path: bool) -> None:
    """Here there is no such device: whatever touched it would raise."""
    keys = ["learner.ranks=2", "model.device=cuda:63"]
    config = load_config(None, [*TINY, *keys, *([f"model.path={warm_start}"] if path else [])])
    trainer = PolicyTrainer(config, tmp_path / "warm_start" if path else warm_start)
    trainer.open(lambda kind, values: None)
    assert {p.device.type for p in trainer._policy.parameters()} == {"cpu"}


def test_a_start_that_is_not_finite_is_not_blamed_on_training(trainer: PolicyTrainer) -> None:
    with torch.no_grad():
        next(iter(trainer._policy.parameters())).fill_(float("nan"))
    with pytest.raises(RunError, match="the weights to start from are not finite; start another run with another"):
        trainer.weights()


def lose(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def replace_by_noise(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(5000))


class Attack:
    """What a pickle could be used for."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, ("/tmp/never-made-by-a-checkpoint",)


def replace_by_code(file: Path) -> None:
    file.write_bytes(pickle.dumps(Attack(), protocol=2))


def save_code(file: Path) -> None:
    torch.save({"optimizer": Attack()}, file)


def lose_a_key(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    del state["scheduler"]
    torch.save(state, file)


def save_a_list(file: Path) -> None:
    torch.save([1, 2], file)


def lose_a_group(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["optimizer"]["param_groups"] = []
    torch.save(state, file)


def spoil_the_generator(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["generator"] = torch.zeros(3)
    torch.save(state, file)


DAMAGES = [lose, empty, cut, replace_by_noise, replace_by_code, save_code, lose_a_key, save_a_list, lose_a_group]


@pytest.mark.parametrize("damage", [*DAMAGES, spoil_the_generator], ids=lambda damage: damage.__name__)
def test_a_damaged_state_is_named(
    trainer: PolicyTrainer, batches: list[list[bytes]], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    trainer.train(batches[0], 0)
    trainer.saved()(tmp_path)
    damage(tmp_path / LEARNER_STATE)
    with pytest.raises(RunError, match=f"checkpoint {tmp_path} does not fit this run: .*; resume the run it belongs"):
        trainer.restore(tmp_path)
    assert not Path("/tmp/never-made-by-a-checkpoint").exists()


def test_every_measured_loss_of_a_warm_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_trainer, "REPORTS_PER_WARM_START", 2)
    given = ["warm_start.steps=8", "warm_start.held_out=2", "warm_start.held_out_every=3"]
    reported: dict[float, bool] = {}

    def report(kind: str, values: dict[str, float]) -> None:
        reported[values["warm_start_steps"]] = "warm_start_held_out_loss" in values

    PolicyTrainer(load_config(None, [*TINY, *given]), tmp_path / "warm_start").open(report)
    assert reported == {3: True, 4: False, 6: True, 8: True}
