"""Warm start: LLaDA's masked loss against a loop, however rows are laid out; what is masked and attended; resuming."""

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import MODEL, parameters, tiny_policy
from new_folder_fixtures import no_more_than
from torch import Tensor

from common.checkpoint_store import CheckpointStore
from common.config import Config, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError, UserError
from common.policy import Policy
from common.policy_loading import build_policy
from common.tasks import Task, build_task
from learner.demonstrations import Demonstration
from learner.packing import Rows, micro_batches
from learner.warm_start import WarmStart, masked_diffusion_loss, save_start, stratified, supervised, warm_start

PAD, MASK = 0, 2
LENGTH = 20


def settings(*overrides: str) -> Config:
    return load_config(
        None,
        [
            "task.name=sudoku",
            "task.blanks_max=4",
            f"sampler.max_completion_tokens={LENGTH}",
            "warm_start.batch_size=8",
            "warm_start.autocast=false",
            "warm_start.threads=1",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def task() -> Task:
    return build_task(settings().task)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


PAIRS = [([4, 5], [4, 5, 6, 1, 1]), ([6, PAD, 7, 8], [8, 8, 4]), ([4, 4, 4], [7, 6, 5, 4]), ([], [5, 6]), ([9], [1])]
DEMONSTRATIONS = [Demonstration(*pair) for pair in PAIRS]  # one PAD inside a prompt, one prompt empty
TOKENS = sum(len(one.completion) for one in DEMONSTRATIONS)
T = torch.tensor([0.3, 0.6, 0.95, 1.0, 0.5])
NOISE = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))


def laid_out(t: Tensor = T, noise: Tensor = NOISE, *, width: int | None = None, budget: int = 1000) -> list[Rows]:
    return list(micro_batches(DEMONSTRATIONS, t, noise, pad_id=PAD, width=width, budget=budget))


def loss_of(policy: Policy, rows: list[Rows]) -> Tensor:
    return torch.stack([masked_diffusion_loss(policy, one) for one in rows]).sum()


def loop_loss(policy: Policy, t: Tensor = T, noise: Tensor = NOISE) -> float:
    """One by one without padding: cross-entropy of masked positions over t, mean of the means of completions."""
    total, start = 0.0, 0
    for n, (prompt, completion) in enumerate(DEMONSTRATIONS):
        hidden = [bool(u < t[n]) for u in noise[start : start + len(completion)]]
        start += len(completion)
        noisy = [MASK if h else token for h, token in zip(hidden, completion, strict=True)]
        logits = policy.model(input_ids=torch.tensor([prompt + noisy]), use_cache=False).logits[0, len(prompt) :]
        logits[:, MASK] = -torch.inf
        for position in range(len(noisy)):
            if hidden[position]:
                share = len(completion) * len(DEMONSTRATIONS)
                total -= float(logits[position].log_softmax(-1)[completion[position]]) / float(t[n]) / share
    return total


LAYOUTS = {
    "rows": {},
    "one row each": {"budget": 1},
    "packed": {"width": 9},
    "packed, one each": {"width": 9, "budget": 9},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradient_are_the_loops_however_rows_are_laid_out(layout: dict[str, int], attention: str) -> None:
    policy = tiny_policy()
    policy.model.set_attn_implementation(attention)
    rows = laid_out(**layout)
    assert any(one.several for one in rows) == ("width" in layout)
    loss = loss_of(policy, rows)
    loss.backward()
    found = gradients(policy)
    value = float(loss.detach())
    assert value == pytest.approx(loop_loss(policy), rel=1e-6)
    assert value > 0.1
    policy.zero_grad()
    alone = loss_of(policy, laid_out(budget=1))
    alone.backward()
    assert value == pytest.approx(float(alone.detach()), rel=1e-12)
    torch.testing.assert_close(found, gradients(policy), rtol=1e-9, atol=1e-12)


def gradients(policy: Policy) -> Tensor:
    return torch.cat([one.grad.flatten() for one in policy.model.parameters() if one.grad is not None])


def test_nothing_masked_costs_nothing_and_all_masked_is_the_plain_mean(policy: Policy) -> None:
    with torch.no_grad():
        assert float(loss_of(policy, laid_out(torch.full((5,), 1e-3), NOISE * 0.9 + 0.1))) == 0.0
        one = torch.ones(5)
        assert float(loss_of(policy, laid_out(one))) == pytest.approx(loop_loss(policy, one), rel=1e-6)


def test_the_prompt_is_never_masked_and_sequences_see_nothing_of_each_other(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    forward = policy.model.base_model.forward

    def spy(**given: Any) -> Any:
        seen.append(given["input_ids"])
        places = given["attention_mask"][0, 0].nonzero().tolist()
        sequence = [0] * 5 + [1] * 4  # lengths 5 and 4 of the second row
        assert [[a, b] for a in range(9) for b in range(9) if sequence[a] == sequence[b]] == places
        assert given["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
        return forward(**given)

    [rows, _] = micro_batches(
        [Demonstration([4] * 4, [5] * 4), Demonstration([6] * 2, [7] * 3), Demonstration([8] * 3, [9])],
        torch.ones(3),
        torch.zeros(8),
        pad_id=PAD,
        width=9,
        budget=9,
    )
    monkeypatch.setattr(policy.model.base_model, "forward", spy)
    masked_diffusion_loss(policy, rows)
    assert [ids.tolist() for ids in seen] == [[[6, 6, MASK, MASK, MASK, 8, 8, 8, MASK]]]


@pytest.mark.parametrize("count", [1, 2, 7, 128])
def test_masking_probabilities_fall_one_into_each_stratum(count: int) -> None:
    for seed in range(20):
        t = stratified(count, torch.Generator().manual_seed(seed))
        assert (t * count).floor().clamp(max=count - 1).tolist() == list(range(count))
        assert (t > 0).all()
        assert (t <= 1).all()


def small_policy() -> Policy:
    return build_policy(MODEL, ThresholdConfig(), alphabet="01234", seed=0)


def test_the_loss_falls_and_every_step_is_reported(task: Task) -> None:
    config = settings("warm_start.steps=60", "warm_start.learning_rate=0.02", "warm_start.batch_size=16")
    policy, reported = small_policy(), []
    head = parameters(policy.head)
    losses = warm_start(policy, task, config, report=reported.append)
    assert [(row["warm_start_steps"], row["warm_start_loss"]) for row in reported] == list(enumerate(losses, 1))
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert (parameters(policy.head) == head).all()
    assert not policy.training


def test_zero_steps_leave_the_model_as_built(task: Task) -> None:
    policy = small_policy()
    assert warm_start(policy, task, settings("warm_start.steps=0")) == []
    assert (parameters(policy) == parameters(small_policy())).all()


def test_the_same_seed_gives_the_same_weights(task: Task) -> None:
    def trained(seed: int) -> tuple[list[float], list[float]]:
        torch.manual_seed(seed + 100)  # a global generator must not matter
        policy = small_policy()
        losses = warm_start(policy, task, settings("warm_start.steps=3", f"run.seed={seed // 2}"))
        return losses, parameters(policy).tolist()

    assert trained(0) == trained(1)
    assert trained(0)[0] != trained(2)[0]


def test_a_loss_that_is_not_finite_ends_the_warm_start(task: Task) -> None:
    policy = small_policy()
    with torch.no_grad():
        next(policy.model.parameters()).fill_(torch.nan)
    with pytest.raises(RunError, match=r"warm start: loss nan at step 1; lower warm_start\.learning_rate"):
        warm_start(policy, task, settings("warm_start.steps=3"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_warm_start_with_the_weights_as_they_were(
    value: float, task: Task
) -> None:
    """As where the loss is finite and its backward pass overflows."""
    policy = small_policy()
    one = next(policy.model.parameters())
    one.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    before = parameters(policy)
    with pytest.raises(RunError, match=f"gradient norm {value} at step 1; lower warm_start.learning_rate"):
        warm_start(policy, task, settings("warm_start.steps=2"))
    assert (parameters(policy) == before).all()


def test_micro_batches_change_nothing_but_the_order_of_sums(task: Task) -> None:
    def trained(*overrides: str) -> tuple[list[float], Any]:
        policy = small_policy().double()
        return warm_start(policy, task, settings("warm_start.steps=3", *overrides)), parameters(policy)

    losses, weights = trained()
    others, found = trained("warm_start.micro_batch_tokens=100")
    assert others == pytest.approx(losses, rel=1e-12)
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-9)


def test_a_token_budget_takes_as_many_demonstrations_as_reach_it(task: Task) -> None:
    started = WarmStart(small_policy(), task, settings("warm_start.batch_tokens=100", "warm_start.steps=2"))
    started.step()
    assert started.tokens == 3 * (16 + LENGTH)
    assert started.state()["position"] == 3


def test_what_is_left_out_is_counted(task: Task, tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1" * 20, "completion": "2"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"warm_start.file={tmp_path / 'pairs.jsonl'}", "warm_start.max_tokens=10", "warm_start.batch_size=3"]
    started = WarmStart(small_policy(), task, settings(*given))
    started.step()
    assert started.state()["position"] == 3 + started.skipped
    assert 2 <= started.skipped <= 3


def test_a_step_ends_where_no_demonstration_of_a_task_fits(task: Task) -> None:
    started = WarmStart(small_policy(), task, settings("warm_start.max_tokens=20"))
    with pytest.raises(UserError, match=r"none of 10000 demonstrations fits warm_start\.max_tokens=20; raise it"):
        started.step()


def test_held_out_demonstrations_are_others_and_measured_the_same_way_each_time(task: Task) -> None:
    config = settings("warm_start.steps=4", "warm_start.held_out=6", "warm_start.held_out_every=3")
    policy, reported = small_policy(), []
    warm_start(policy, task, config, report=reported.append)
    assert ["warm_start_held_out_loss" in row for row in reported] == [False, False, True, True]
    started = WarmStart(policy, task, config)
    assert started.held_out_loss() == started.held_out_loss() == reported[-1]["warm_start_held_out_loss"]
    assert not math.isnan(started.held_out_loss())
    assert math.isnan(WarmStart(policy, task, settings()).held_out_loss())


def test_a_warm_start_that_was_killed_ends_with_the_same_weights(task: Task, tmp_path: Path) -> None:
    config = settings("warm_start.steps=7", "warm_start.checkpoint_every=2", "warm_start.held_out=2")
    whole = supervised(config, task, tmp_path / "whole")

    class Killed(Exception):
        pass

    def killed(values: dict[str, float]) -> None:
        if values["warm_start_steps"] == 5:
            raise Killed

    store = CheckpointStore(tmp_path / "sft")
    with pytest.raises(Killed):
        supervised(config, task, tmp_path / "resumed", killed, store)
    assert [one.step for one in store.checkpoints()] == [2, 4]
    reported: list[dict[str, float]] = []
    resumed = supervised(config, task, tmp_path / "resumed", reported.append, store)
    assert [row["warm_start_steps"] for row in reported] == [5, 6, 7]
    assert (parameters(resumed) == parameters(whole)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]  # the checkpoints are gone


def test_a_small_model_is_adapted_after_its_warm_start_and_not_when_that_goes_on(task: Task, tmp_path: Path) -> None:
    config = settings("warm_start.steps=4", "warm_start.checkpoint_every=2", "model.lora={rank: 2}")
    store, told = CheckpointStore(tmp_path / "sft"), iter(range(4))

    def killed(_: dict[str, float]) -> None:
        if next(told) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        supervised(config, task, tmp_path / "resumed", killed, store)
    resumed = supervised(config, task, tmp_path / "resumed", lambda _: None, store)
    assert (parameters(resumed) == parameters(supervised(config, task, tmp_path / "whole"))).all()


def test_weights_that_find_no_room_are_named_and_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, _: str) -> None:
        file.touch()  # a name still finds room
        raise OSError(errno.ENOSPC, "No space left on device")

    policy = tiny_policy(double=False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(RunError, match=rf"{tmp_path}/start cannot be written .*No space left.*; make room there"):
            save_start(policy, tmp_path / "start")
    assert not (tmp_path / "start/threshold.json").exists(), "a run would take it for the end of the warm start"
    save_start(policy, tmp_path / "start")
    assert (tmp_path / "start/threshold.json").stat().st_size


def test_a_full_disk_at_the_end_names_the_folder(task: Task, tmp_path: Path) -> None:
    config = settings("warm_start.steps=0")
    with no_more_than(10_000), pytest.raises(RunError, match=rf"{tmp_path}/out cannot be written .*; make room there"):
        supervised(config, task, tmp_path / "out")
    supervised(config, task, tmp_path / "out")
