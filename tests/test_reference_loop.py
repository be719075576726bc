"""Reference loop: the textbook ends with the very weights of the learner, and refuses what it does not cover."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from common.config import Config
from common.config_file import load_config
from common.errors import UserError
from common.policy import Policy
from common.policy_loading import open_policy
from common.tasks import build_task
from common.weight_store import digest
from common.weights import to_flat
from learner.batch import Batch
from learner.learner import Learner
from learner.reference_loop import Step, reference_loop
from learner.study.single_run import SingleRun
from learner.synchronous_rollout import SynchronousRollout

SUDOKU = Path(__file__).parents[1] / "deploy" / "configs" / "sudoku.yaml"
STEPS = 3
TINY = (
    "model.hidden_size=16",
    "model.layers=2",
    "model.heads=2",
    "model.intermediate_size=32",
    f"learner.steps={STEPS}",
    "learner.groups_per_step=3",
    "learner.group_size=4",
    "learner.importance_weight=truncated",
    "learner.cost=additive",  # a model that solves nothing: what tells its completions apart is their NFE
    "learner.learning_rate=3e-3",
    "learner.threshold_learning_rate=3e-2",
    "learner.warmup_steps=2",
    "learner.drift_remedy=none",
    "learner.micro_batch_tokens=1000000",
    "learner.diagnostics_every=0",
    "rollout.slots=16",
    "replay.max_staleness=0",
)
# Each once in a place where it matters, and all of them with others: what learns, passes and their law, inner updates,
# weights, means, baselines, costs, rules, heads, blocks, precision.
OPTIONS = (
    (),
    ("learner.train=model",),
    ("learner.train=threshold",),
    ("learner.inner_updates=3",),
    ("learner.surrogate_passes=1",),
    ("learner.surrogate_passes=99", "learner.tau_law=distinct", "learner.inner_updates=2"),
    ("learner.surrogate_passes=3", "learner.tau_law=distinct", "learner.train=model", "learner.inner_updates=2"),
    ("learner.importance_weight=none",),
    ("learner.importance_weight=none", "learner.train=threshold", "learner.inner_updates=3"),
    ("learner.weight_cap=1.1", "learner.inner_updates=2", "learner.clip_low=0.01", "learner.clip_high=0.02"),
    ("learner.loss_mean=token", "learner.train=model"),
    ("learner.advantage_baseline=leave_one_out", "learner.advantage_std=false"),
    ("learner.cost=multiplicative", "learner.speed_weight=0.9"),
    ("learner.cost=off", "replay.drop_no_spread=false"),
    ("learner.weight_decay=0.1", "learner.grad_clip=0.01", "learner.threshold_weight=0.3"),
    ("learner.entropy_bonus=0.5", "sampler.threshold.head=log_normal"),
    ("sampler.rule=confidence", "sampler.confidence_threshold=0.11", "learner.train=model"),
    ("sampler.rule=top_k", "sampler.tokens_per_step=3", "learner.train=model", "learner.cost=off"),
    ("sampler.block_length=4", "sampler.temperature=0.7"),
    ("learner.autocast=false", "rollout.precision=bfloat16"),
)


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def tiny(*overrides: str) -> Config:
    """The main job with a model that a test can train in a second."""
    return load_config(SUDOKU, [*TINY, *overrides])


def fresh(config: Config) -> Policy:
    """What a run starts from. Larger matrices, so that surrogates and rules differ."""
    policy = open_policy(config, build_task(config.task))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return policy


def by_the_learner(config: Config, policy: Policy) -> tuple[list[str], list[dict[str, float]]]:
    """Digests and metrics of each step of a synchronous run with the learner of the system."""
    rollout = SynchronousRollout(config, build_task(config.task), copy.deepcopy(policy))
    torch.use_deterministic_algorithms(True)
    learner = Learner(policy, config.learner)
    digests, metrics = [], []
    for step in range(1, config.learner.steps + 1):
        metrics.append(learner.step(rollout.batch(), version=step - 1))
        flat = to_flat(policy)
        rollout.adopt(flat, step)
        digests.append(digest(flat))
    return digests, metrics


@cache
def by_the_reference(*overrides: str) -> tuple[Step, ...]:
    config = tiny(*overrides)
    return tuple(reference_loop(config, fresh(config)))


@pytest.mark.parametrize("overrides", OPTIONS, ids=" ".join)
def test_every_step_ends_with_the_weights_of_the_learner(overrides: tuple[str, ...]) -> None:
    config = tiny(*overrides)
    digests, metrics = by_the_learner(config, fresh(config))
    steps = by_the_reference(*overrides)
    assert [step.digest for step in steps] == digests
    assert len({digest(to_flat(fresh(config))), *digests}) == 1 + STEPS  # every step moved them
    assert [step.number for step in steps] == [1, 2, 3]
    for step, learned in zip(steps, metrics, strict=True):
        assert step.reward == learned["rollout_reward"]
        assert step.reward_costed == learned["rollout_reward_costed"]
        assert step.nfe == learned["rollout_nfe"]


def test_every_combination_of_options_above_makes_a_difference() -> None:
    ends = [by_the_reference(*overrides)[-1].digest for overrides in OPTIONS]
    assert len(set(ends)) == len(OPTIONS)


def test_the_policy_that_was_given_is_trained() -> None:
    config = tiny()
    policy = fresh(config)
    for step in reference_loop(config, policy):
        assert step.digest == digest(to_flat(policy))


def test_batches_without_advantage_change_nothing() -> None:
    """A weight of 0 for speed, and a model that solves nothing under a reward that only solutions get."""
    config = tiny(
        "task.reward_weights={cells: 0.0, exact: 1.0}", "learner.speed_weight=0", "replay.drop_no_spread=false"
    )
    start = digest(to_flat(fresh(config)))
    steps = list(reference_loop(config, fresh(config)))
    assert [(step.reward, step.digest) for step in steps] == [(0.0, start)] * STEPS
    assert by_the_learner(config, fresh(config))[0] == [start] * STEPS


@pytest.mark.parametrize(
    ("overrides", "key", "value", "way_out"),
    [
        (("learner.surrogate=coupled_masks",), "learner.surrogate", "coupled_masks", "mean_field"),
        (("learner.prompt_masking=0.15",), "learner.prompt_masking", "0.15", "0.0"),
        (
            ("learner.importance_weight=self_normalised",),
            "learner.importance_weight",
            "self_normalised",
            "truncated",
        ),
        (("learner.weight_level=sequence",), "learner.weight_level", "sequence", "token"),
        (("learner.kl_beta=0.1",), "learner.kl_beta", "0.1", "0.0"),
        (("learner.train=model", "learner.drift_remedy=hold_entropy"), "learner.drift_remedy", "hold_entropy", "none"),
        (("learner.train=model", "learner.drift_remedy=auto"), "learner.drift_remedy", "hold_nfe", "none"),
        (("sampler.rule=sampled_entropy_bound",), "sampler.rule", "sampled_entropy_bound", "entropy_bound"),
        (("sampler.threshold.standardise=true",), "sampler.threshold.standardise", "True", "False"),
    ],
    ids=lambda argument: argument if isinstance(argument, str) else "",
)
def test_what_is_not_covered_is_refused_before_anything_starts(
    overrides: tuple[str, ...], key: str, value: str, way_out: str
) -> None:
    config = tiny(*overrides)
    with pytest.raises(UserError, match=rf"^{key}={value} is not covered .*; set {key}={way_out}, or"):
        reference_loop(config, fresh(config))


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_single_run_trains_on_tokens_of_that_age(staleness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a validation, which measures the newest weights with the same engine."""
    small = ["evaluation.prompts=2", "evaluation.drift_prompts=2", "evaluation.gammas=[1]", "evaluation.drift_every=1"]
    config = tiny(*small, "learner.steps=5", "evaluation.confidences=[]", "evaluation.tokens_per_step=[]")
    single = SingleRun(config, to_flat(fresh(config).model), staleness=staleness)
    ages = []
    step = single.learner.step

    def watched(batch: Batch, *, version: int) -> dict[str, float]:
        ages.append({version - token for token in batch.token_version[batch.scored].tolist()})
        return step(batch, version=version)

    monkeypatch.setattr(single.learner, "step", watched)
    result = single.run()
    assert ages == [{min(version, staleness)} for version in range(5)]
    assert [point["step"] for point in result["validation"]] == list(range(6))
