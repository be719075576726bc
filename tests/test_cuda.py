"""A GPU computes what the CPU computes: engine, caches, learner, shards over nccl, a whole run. Skipped without one."""

import copy
import subprocess
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_fixtures import PARAMETERS, make_engine, make_requests, one_group
from learner_fixtures import CPU, generate_batch, learner_config, tiny_policy
from run_fixtures import ROOT, command, rows
from torch import Tensor

from actors.request import Request
from common.adapter import learned_parameters
from common.config_file import load_config
from common.policy import Policy
from common.weights import sharded, whole
from learner.batch import Batch
from learner.doctor import gpu
from learner.learner import Learner
from learner.ranks import LOOPBACK, Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = torch.device("cuda")


class One(int):
    """The number of ranks in a world of one that goes the way of many: nccl refuses two ranks on one GPU."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.fixture
def alone() -> Iterator[Ranks]:
    config = load_config(None, ["task.name=sudoku", "model.device=cuda"])
    ranks = Ranks.join(Ranks.store(LOOPBACK, 0, 1), 0, config)
    ranks.count = One(1)
    yield ranks
    ranks.leave()


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch with all its tensors there."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})


def gradients(learner: Learner, batch: Batch) -> dict[str, np.ndarray]:
    learner.step(on(learner.policy.device, batch), version=0)
    learned = learned_parameters(learner.policy)
    return {name: whole(value.grad).cpu().numpy() for name, value in learned if value.grad is not None}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], share: float) -> None:
    """Equal up to a share of each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=share * np.abs(value).max(), err_msg=name)


def assert_same_draws(policy: Policy, requests: list[Request], **keys: object) -> None:
    """The same tokens in the same steps; log-probabilities differ a little, since Llama's norms compute in float32."""
    here = make_engine(policy, **keys).generate(requests)
    there = make_engine(copy.deepcopy(policy).to(CUDA), **keys).generate(requests)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(other.completion_ids, one.completion_ids)
        np.testing.assert_array_equal(other.reveal_step, one.reveal_step)
        np.testing.assert_allclose(other.behaviour_logprob, one.behaviour_logprob, rtol=0, atol=1e-4)
        assert other.first_entropy == pytest.approx(one.first_entropy, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", PARAMETERS)
def test_the_engine_draws_the_same_tokens(policy: Policy, rule: str, temperature: float) -> None:
    assert_same_draws(policy, make_requests(8, rule, temperature), rule=rule)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_hold_the_same(policy: Policy, cache: str) -> None:
    assert_same_draws(policy, one_group(6, threshold=1.5), cache=cache, block_length=4)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_half_precision_draws_all_tokens(policy: Policy, precision: str) -> None:
    half = copy.deepcopy(policy).float().to(CUDA)
    if precision == "bfloat16":
        half.model.bfloat16()
    engine = make_engine(half, use_autocast=precision == "autocast")
    for completion in engine.generate(make_requests(8)):
        assert completion.nfe >= 1
        assert np.isfinite(completion.behaviour_logprob).all()


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, {"micro_batch_tokens": 40}])
def test_the_learner_has_the_same_gradients(changes: dict[str, object]) -> None:
    policy = tiny_policy()
    batch = generate_batch(policy)
    expected = gradients(Learner(copy.deepcopy(policy), learner_config()), batch)
    found = gradients(Learner(policy.to(CUDA), learner_config(**changes)), batch)
    assert_close(found, expected, 1e-4)  # Llama's norms compute in float32


def test_autocast_loses_little() -> None:
    policy = tiny_policy(double=False)
    batch = generate_batch(policy)
    steps = [
        Learner(copy.deepcopy(policy).to(device), learner_config(autocast=half)).step(on(device, batch), version=0)
        for device, half in ((CPU, False), (CUDA, True))
    ]
    assert steps[1]["learner_loss"] == pytest.approx(steps[0]["learner_loss"], abs=0.05)


def test_shards_over_nccl_train_the_same(alone: Ranks) -> None:
    policy = tiny_policy()
    batch = generate_batch(policy)
    expected = gradients(Learner(copy.deepcopy(policy), learner_config()), batch)
    learner = Learner(policy, learner_config(), alone)
    assert any(sharded(value) and value.device.type == "cuda" for value in learner.policy.parameters())
    assert_close(gradients(learner, batch), expected, 1e-4)


def test_a_whole_run_on_one_gpu_that_learner_and_rollout_share(tmp_path: Path) -> None:
    given = ["model.device=cuda", "learner.gpus=0.4", "rollout.gpus=0.3", "rollout.actors=2", "learner.steps=4"]
    done = subprocess.run(command("sudoku", tmp_path, *given), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "frontier gain" in done.stdout
    steps = rows(tmp_path / "run")
    assert [row["learner_steps"] for row in steps] == [1, 2, 3, 4]
    first = [row["learner_weight_mean{reveal_step=1}"] for row in steps if row["replay_staleness_max"] == 0]
    assert first == pytest.approx([1.0] * len(first), abs=0.05)


def test_doctor_names_the_gpu() -> None:
    assert any("GB" in finding.found for finding in gpu())
