"""Warm start: LLaDA's masked loss against a loop, what is masked and attended, where demonstrations come from."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from learner_fixtures import MODEL, parameters, tiny_policy
from torch import Tensor

from common.config import Config, ThresholdConfig
from common.config_file import load_config
from common.errors import RunError, UserError
from common.policy import Policy, build_policy
from common.tasks import Task, build_task
from learner.demonstrations import FIRST_EXAMPLE, demonstrations, read_demonstrations
from learner.warm_start import masked_diffusion_loss, stratified, warm_start

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


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts with left padding, completions, masking probabilities, noise."""
    prompt = torch.tensor([[PAD, PAD, 4, 5], [6, PAD, 7, 8], [PAD, 4, 4, 4]])  # one PAD inside a prompt
    completion = torch.tensor([[4, 5, 6, 1, 1], [8, 8, 4, 5, 1], [7, 6, 5, 4, 4]])
    generator = torch.Generator().manual_seed(0)
    return prompt, completion, torch.tensor([0.3, 0.6, 0.95]), torch.rand(3, 5, generator=generator)


def loop_loss(policy: Policy, prompt: Tensor, completion: Tensor, t: Tensor, noise: Tensor) -> float:
    """Row by row without padding: cross-entropy of masked positions over t, per token of the batch."""
    total = 0.0
    for n in range(len(prompt)):
        ids = prompt[n].tolist()
        while ids[0] == PAD:
            ids.pop(0)
        hidden = [bool(u < t[n]) for u in noise[n]]
        noisy = [MASK if h else int(token) for h, token in zip(hidden, completion[n], strict=True)]
        logits = policy.model(input_ids=torch.tensor([ids + noisy]), use_cache=False).logits[0, len(ids) :]
        logits[:, MASK] = -torch.inf
        for position in range(len(noisy)):
            if hidden[position]:
                total -= float(logits[position].log_softmax(-1)[completion[n, position]]) / float(t[n])
    return total / completion.numel()


def test_loss_is_the_loops(policy: Policy, rows: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        found = float(masked_diffusion_loss(policy, *rows))
        assert found == pytest.approx(loop_loss(policy, *rows), rel=1e-6)
    assert found > 0.1


def test_nothing_masked_costs_nothing_and_all_masked_is_the_plain_mean(
    policy: Policy, rows: tuple[Tensor, ...]
) -> None:
    prompt, completion, _, noise = rows
    with torch.no_grad():
        assert float(masked_diffusion_loss(policy, prompt, completion, torch.zeros(3) + 1e-3, noise + 1)) == 0.0
        one = torch.ones(3)
        found = float(masked_diffusion_loss(policy, prompt, completion, one, noise))
        assert found == pytest.approx(loop_loss(policy, prompt, completion, one, noise), rel=1e-6)


def test_more_left_padding_changes_nothing(policy: Policy, rows: tuple[Tensor, ...]) -> None:
    prompt, *rest = rows
    wider = torch.nn.functional.pad(prompt, (3, 0), value=PAD)
    with torch.no_grad():
        found, other = (float(masked_diffusion_loss(policy, ids, *rest)) for ids in (prompt, wider))
    assert found == pytest.approx(other, rel=1e-6)


def test_the_prompt_is_never_masked_and_its_padding_never_attended(
    policy: Policy, rows: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, completion, _, noise = rows
    seen: list[tuple[Tensor, Tensor]] = []
    forward = policy.hidden

    def spy(ids: Tensor, attended: Tensor) -> Tensor:
        seen.append((ids, attended))
        return forward(ids, attended)

    monkeypatch.setattr(policy, "hidden", spy)
    masked_diffusion_loss(policy, prompt, completion, torch.ones(3), noise)
    [(ids, attended)] = seen
    assert ids[:, :4].tolist() == prompt.tolist()
    assert (ids[:, 4:] == MASK).all()
    assert attended[:, :4].tolist() == [[False, False, True, True], [True] * 4, [False, True, True, True]]
    assert attended[:, 4:].all()


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
    losses = warm_start(policy, task, config, report=lambda step, loss: reported.append((step, loss)))
    assert reported == list(enumerate(losses, 1))
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


def test_the_tasks_demonstrations_are_padded_with_eos(policy: Policy, task: Task) -> None:
    config = settings()
    for index, (prompt, completion) in enumerate(
        islice(demonstrations(config, task, policy.tokenizer), 5), FIRST_EXAMPLE
    ):
        example = task.example("train", index)
        assert policy.decode(prompt) == example.prompt
        assert policy.decode(completion) == example.fields["solution"]
        assert len(completion) == LENGTH
        assert completion[16:] == [policy.vocabulary.eos_id] * 4


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_lines(*lines: str) -> str:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write_lines


def pair(prompt: str, completion: str) -> str:
    return json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False)


def test_a_file_gives_every_pair_once_per_epoch_in_an_order_by_seed(
    policy: Policy, task: Task, write: Callable[..., str]
) -> None:
    prompts = ["0", "01", "012", "0123", "1", "12", "123", "2"]
    path = write(*(pair(prompt, prompt[::-1]) for prompt in prompts), "", "  ")
    assert read_demonstrations(path) == [(prompt, prompt[::-1]) for prompt in prompts]

    def epochs(seed: int) -> list[list[str]]:
        stream = demonstrations(settings(f"warm_start.file={path}", f"run.seed={seed}"), task, policy.tokenizer)
        found = []
        for prompt, completion in islice(stream, 2 * len(prompts)):
            found.append(policy.decode(prompt))
            assert policy.decode(completion) == found[-1][::-1]
            assert len(completion) == LENGTH
        return [found[: len(prompts)], found[len(prompts) :]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == sorted(prompts)
    assert first != second
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


GOOD = pair("1", "2")
BAD_LINES = [
    "not json",
    '{"prompt": "1"}',
    '{"completion": "1"}',
    '["1", "2"]',
    "17",
    "null",
    '"text"',
    '{"prompt": "1", "completion": "2"',
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_with_its_file(write: Callable[..., str], line: str) -> None:
    path = write(GOOD, "", line, GOOD)
    with pytest.raises(UserError) as caught:
        read_demonstrations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ")
    assert "`prompt` and `completion`" in message
    assert "\n" not in message


@pytest.mark.parametrize("lines", [(), ("",), ("  ", "")])
def test_an_empty_file_is_refused(write: Callable[..., str], lines: tuple[str, ...]) -> None:
    path = write(*lines)
    with pytest.raises(UserError, match="holds no demonstrations"):
        read_demonstrations(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"warm_start\.file=.*/nothing\.jsonl cannot be read"):
        read_demonstrations(str(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(("prompt", "completion", "kind"), [("0" * 33, "1", "prompt"), ("0", "1" * 21, "completion")])
def test_a_pair_beyond_the_limits_names_number_and_limit(
    policy: Policy, task: Task, write: Callable[..., str], prompt: str, completion: str, kind: str
) -> None:
    config = settings(f"warm_start.file={write(pair(prompt, completion))}")
    limit = {"prompt": 32, "completion": LENGTH}[kind]
    with pytest.raises(UserError, match=f"demonstration 1: {kind} of {limit + 1} tokens exceeds .*={limit};"):
        next(demonstrations(config, task, policy.tokenizer))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"pairs\.jsonl"):
        read_demonstrations(str(path))


def test_a_line_separator_inside_a_text_does_not_split_the_line(write: Callable[..., str]) -> None:
    assert read_demonstrations(write(pair("1\u2028", "2"))) == [("1\u2028", "2")]


@pytest.mark.parametrize("value", [None, ["1", "2"], {"text": "1"}])
def test_a_value_that_is_no_text_is_refused(write: Callable[..., str], value: object) -> None:
    path = write(json.dumps({"prompt": "1", "completion": value}))
    with pytest.raises(UserError, match="line 1"):
        read_demonstrations(path)
