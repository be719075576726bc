"""Textbook sampler for ONE sequence: slow, no batching, no tensors beyond the model's forward. The engine must agree.

Sources: semi-autoregressive blocks and the fixed number per step, LLaDA (arXiv 2502.09992); the confidence rule,
Fast-dLLM (arXiv 2505.22618); the entropy-bounded rule, EB-Sampler (arXiv 2505.24857). Reveal rules look at untempered
probabilities; only the draw and its log-probability are tempered.
"""

import math
from dataclasses import dataclass

import torch

from common.keyed_random import uniform
from common.policy import Policy


@dataclass
class Sampled:
    """One completion, with what was recorded at each position when it was revealed."""

    tokens: list[int]
    reveal_step: list[int]
    logprob: list[float]
    entropy: list[float]
    nfe: int
    finish_reason: str


def reference_sample(
    policy: Policy,
    prompt: tuple[int, ...],
    *,
    rule: str,
    parameter: float,
    temperature: float,
    seed: int,
    length: int,
    block: int,
) -> Sampled:
    """Denoise `length` positions after `prompt`, block by block, one full forward per step.

    The row ends when every position left of its first stop token is revealed (or all are); what is still MASK then
    becomes EOS with reveal step `nfe + 1`, log-probability 0 and entropy 0.
    """
    ids = policy.vocabulary
    tokens, reveal_step = [ids.mask_id] * length, [0] * length
    logprob, entropy = [0.0] * length, [0.0] * length
    nfe = 0
    while not _finished(tokens, ids.mask_id, ids.stop_ids):
        logits = _forward(policy, [*prompt, *tokens])[len(prompt) :]
        nfe += 1
        start = tokens.index(ids.mask_id) // block * block
        active = [at for at in range(start, min(start + block, length)) if tokens[at] == ids.mask_id]
        plain = {at: softmax(logits[at], ids.mask_id, 1.0) for at in active}
        entropies = {at: entropy_of(plain[at]) for at in active}
        tops = {at: max(plain[at]) for at in active}
        for at in select(rule, entropies, tops, parameter):
            if temperature == 0:
                tokens[at] = plain[at].index(tops[at])
            else:
                tempered = softmax(logits[at], ids.mask_id, temperature)
                tokens[at] = inverse_cdf(tempered, float(uniform(torch.tensor(seed), nfe, at)))
                logprob[at] = math.log(tempered[tokens[at]])
            reveal_step[at], entropy[at] = nfe, entropies[at]
    for at in range(length):
        if tokens[at] == ids.mask_id:
            tokens[at], reveal_step[at] = ids.eos_id, nfe + 1
    drawn = [token for token, step in zip(tokens, reveal_step, strict=True) if step <= nfe]
    reason = "stop" if any(token in ids.stop_ids for token in drawn) else "length"
    return Sampled(tokens, reveal_step, logprob, entropy, nfe, reason)


def _finished(tokens: list[int], mask_id: int, stop_ids: tuple[int, ...]) -> bool:
    for token in tokens:
        if token == mask_id:
            return False
        if token in stop_ids:
            return True
    return True


@torch.no_grad()
def _forward(policy: Policy, ids: list[int]) -> list[list[float]]:
    return policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].tolist()


def softmax(logits: list[float], mask_id: int, temperature: float) -> list[float]:
    """Probabilities at a temperature, MASK forbidden."""
    scaled = [-math.inf if token == mask_id else logit / temperature for token, logit in enumerate(logits)]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    return [weight / sum(weights) for weight in weights]


def entropy_of(probabilities: list[float]) -> float:
    """Entropy in nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def inverse_cdf(probabilities: list[float], u: float) -> int:
    """First token whose cumulative probability exceeds `u`."""
    total = 0.0
    for token, p in enumerate(probabilities):
        total += p
        if total > u:
            return token
    raise AssertionError(f"u={u} is above the total {total}")


def select(rule: str, entropies: dict[int, float], tops: dict[int, float], parameter: float) -> list[int]:
    """Positions to reveal: keys of `entropies` and `tops`, which are the masked positions of the active block."""
    if rule == "entropy_bound":
        order = sorted(entropies, key=lambda at: entropies[at])
        values = [entropies[at] for at in order]
        admissible = [n for n in range(1, len(order) + 1) if sum(values[:n]) - max(values[:n]) <= parameter]
        return order[: max(admissible)]
    order = sorted(tops, key=lambda at: -tops[at])
    if rule == "top_k":
        return order[: int(parameter)]
    return [at for at in order if at == order[0] or tops[at] >= parameter]
