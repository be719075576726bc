"""Token scores: in pieces they are what the plain computation gives, and no piece's logits outlive it."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from learner_fixtures import generate_batch, learner_config, tiny_policy
from torch import Tensor, nn

import common.token_scores
from common.behaviour import behaviour_log_probs, reveal_log_probs
from common.keyed_random import derive
from common.policy import Policy
from common.token_scores import row_pieces, token_scores
from learner.benchmarks.learner import SavedTensors
from learner.demonstrations import Demonstration
from learner.learner import Learner
from learner.packing import micro_batches
from learner.surrogate import surrogate_gap
from learner.warm_start import masked_diffusion_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def small_pieces(policy: Policy) -> Iterator[pytest.MonkeyPatch]:
    """Three rows of logits in a piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.token_scores, "LOGIT_BYTES", 3 * 4 * policy.model.config.vocab_size)
        yield patch


def plain(policy: Policy, hidden: Tensor, row: Tensor, token: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    logits = policy.logits(hidden)
    scores = behaviour_log_probs(logits, temperature, policy.vocabulary.mask_id)[row, token]
    seen = reveal_log_probs(logits / policy.calibration.reveal_temperature, policy.vocabulary.mask_id)
    return scores, -(seen.exp() * seen.masked_fill(seen.isneginf(), 0.0)).sum(-1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pieces_cover_all_rows_in_order_within_the_budget(device: str) -> None:
    budget = common.token_scores.LOGIT_BYTES if device == "cpu" else common.token_scores.GPU_LOGIT_BYTES
    for rows, vocabulary in ((0, 10), (1, 126_464), (5000, 126_464), (5000, 10), (3, 1 << 40)):
        pieces = row_pieces(rows, vocabulary, torch.device(device))
        assert [n for piece in pieces for n in range(rows)[piece]] == list(range(rows))
        assert all(len(range(rows)[piece]) * vocabulary * 4 <= max(budget, 4 * vocabulary) for piece in pieces)
    assert len(row_pieces(5000, 126_464, torch.device(device))) > 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 20), tokens=st.integers(0, 40), per_piece=st.integers(1, 21), seed=st.integers(0, 99))
def test_pieces_have_the_plain_values_and_gradients(
    policy: Policy, small_pieces: pytest.MonkeyPatch, rows: int, tokens: int, per_piece: int, seed: int
) -> None:
    size = policy.model.config.vocab_size
    small_pieces.setattr(common.token_scores, "LOGIT_BYTES", per_piece * 4 * size)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, policy.model.config.hidden_size, dtype=torch.float64, generator=generator)
    hidden.requires_grad_()
    row = torch.randint(rows, (tokens,), generator=generator)
    ids = torch.randint(size - 1, (tokens,), generator=generator)
    ids = ids + (ids >= policy.vocabulary.mask_id)
    temperature = 0.5 + torch.rand(rows, dtype=torch.float64, generator=generator)
    upstream = torch.randn(tokens, dtype=torch.float64, generator=generator)
    wanted = [hidden, *policy.model.get_output_embeddings().parameters()]
    found = []
    for scores, entropies in (
        token_scores(policy, hidden, row, ids, temperature=temperature, entropy=True),
        plain(policy, hidden, row, ids, temperature),
    ):
        assert entropies is not None
        total = (scores * upstream).sum() + entropies.square().sum()
        found.append([scores, entropies, *torch.autograd.grad(total, wanted)])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("rule", ["entropy_bound", "sampled_entropy_bound"])
def test_a_learner_step_in_pieces_is_the_same_step(policy: Policy, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = generate_batch(policy, rule=rule)
    config = learner_config(train="joint", diagnostics_every=0)
    gradients = []
    for size in (common.token_scores.LOGIT_BYTES, 1 << 40):
        monkeypatch.setattr(common.token_scores, "LOGIT_BYTES", size)
        learner = Learner(copy.deepcopy(policy), config)
        learner.step(batch, version=0)
        gradients.append([p.grad for p in learner.policy.parameters() if p.grad is not None])
    assert gradients[0]
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def test_the_gap_and_the_warm_start_in_pieces_are_the_same(policy: Policy, small_pieces: pytest.MonkeyPatch) -> None:
    batch = generate_batch(policy)
    generator = torch.Generator().manual_seed(derive(1, 2))
    pairs = [
        Demonstration(*pair)
        for pair in zip(batch.prompts[batch.group].tolist(), batch.completion_ids.tolist(), strict=True)
    ]
    t = torch.rand(len(pairs), generator=generator).clamp(min=0.2)
    noise = torch.rand(batch.completion_ids.numel(), generator=generator)
    (rows,) = micro_batches(pairs, t, noise, pad_id=policy.vocabulary.pad_id, width=None, budget=1 << 20)
    found = []
    for size in (3, 1 << 30):
        small_pieces.setattr(common.token_scores, "LOGIT_BYTES", size * 4 * policy.model.config.vocab_size)
        gaps = surrogate_gap(policy, batch, (1, 2, 4))
        loss = masked_diffusion_loss(policy, rows)
        weights = list(policy.model.parameters())
        found.append([*gaps.values(), loss, *torch.autograd.grad(loss, weights)])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_pieces")
def test_the_engine_in_pieces_generates_the_same(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in ("entropy_bound", "sampled_entropy_bound"):
        pieces = generate_batch(policy, rule=rule)
        with monkeypatch.context() as patch:
            patch.setattr(common.token_scores, "LOGIT_BYTES", 1 << 40)
            whole = generate_batch(policy, rule=rule)
        assert torch.equal(pieces.completion_ids, whole.completion_ids)
        assert torch.equal(pieces.reveal_step, whole.reveal_step)
        torch.testing.assert_close(pieces.behaviour_logprob, whole.behaviour_logprob, rtol=0, atol=1e-6)
        torch.testing.assert_close(pieces.entropy, whole.entropy, rtol=0, atol=1e-6)


def test_autograd_keeps_no_logits_of_pieces(policy: Policy, small_pieces: pytest.MonkeyPatch) -> None:
    """Between the passes nothing of the size of the vocabulary; largest tensor of any pass: one piece's."""
    wide = copy.deepcopy(policy)
    size, rows = 5000, 60
    wide.model.set_output_embeddings(nn.Linear(wide.model.config.hidden_size, size, bias=False).double())
    wide.model.config.vocab_size = size
    small_pieces.setattr(common.token_scores, "LOGIT_BYTES", 6 * 4 * size)
    hidden = torch.randn(rows, wide.model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    shapes: list[int] = []
    wide.logits = lambda states, plain=wide.logits: (shapes.append(len(states)), plain(states))[1]  # type: ignore[method-assign]
    saved = SavedTensors(wide)
    with saved:
        scores, _ = token_scores(wide, hidden, torch.arange(rows), torch.arange(rows) + 10)
        assert saved.peak < rows * size * 8 / 20
        scores.sum().backward()
    assert shapes == [6] * 20  # ten pieces forwards, ten again backwards
