"""Textbook sampler for ONE sequence: slow, no batching, no tensors beyond the model's forward. The engine must agree.

Sources: semi-autoregressive blocks and the fixed number per step, LLaDA (arXiv 2502.09992); the confidence rule and
the caches, Fast-dLLM (arXiv 2505.22618); the entropy-bounded rule, EB-Sampler (arXiv 2505.24857). Reveal rules look at
untempered probabilities; only the draw and its log-probability are tempered.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.keyed_random import GATE_STREAM, uniform
from common.policy import Policy
from common.reveal_likelihood import SMALLEST, WIDTH


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
    cache: str = "none",
    adopted: Mapping[int, Policy] | None = None,
) -> Sampled:
    """Denoise `length` positions after `prompt`, block by block, one full forward per step.

    With a cache, the first step of a block is exact; its later ones compute every column, and then take the keys and
    values of the columns that the cache keeps (`prefix`: those before the block; `dual`: those outside it) as they were
    at that first step. Where the column before a position predicts it, the one before the block is not kept. New
    weights, from the steps in `adopted` on, make a step exact again.

    The row ends when every position left of its first stop token is revealed (or all are); what is still MASK then
    becomes EOS with reveal step `nfe + 1`, log-probability 0 and entropy 0.
    """
    ids = policy.vocabulary
    tokens, reveal_step = [ids.mask_id] * length, [0] * length
    logprob, entropy = [0.0] * length, [0.0] * length
    nfe, computed, memory = 0, -1, {}
    while not _finished(tokens, ids.mask_id, ids.stop_ids):
        nfe += 1
        start = tokens.index(ids.mask_id) // block * block
        if adopted and nfe in adopted:
            policy, computed = adopted[nfe], -1
        kept = kept_columns(cache, len(prompt), length, start, block, policy.shift) if start == computed else []
        computed = start
        logits = forward(policy, [*prompt, *tokens], memory, kept)[len(prompt) :].tolist()
        active = [at for at in range(start, min(start + block, length)) if tokens[at] == ids.mask_id]
        plain = {at: softmax(logits[at], ids.mask_id, 1.0) for at in active}
        entropies = {at: entropy_of(plain[at]) for at in active}
        tops = {at: max(plain[at]) for at in active}
        gates = {at: float(uniform(torch.tensor(seed), nfe, GATE_STREAM - at)) for at in active}
        for at in select(rule, entropies, tops, parameter, gates if temperature > 0 else None):
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


def kept_columns(cache: str, prompt: int, length: int, start: int, block: int, shift: int = 0) -> list[int]:
    """Columns of prompt and completion whose keys and values stay as they were at the first step of a block."""
    if cache == "none":
        return []
    before = list(range(prompt + start - shift))
    return before if cache == "prefix" else before + list(range(prompt + start + block, prompt + length))


@torch.no_grad()
def forward(
    policy: Policy, ids: Sequence[int], memory: dict[nn.Module, Tensor] | None = None, kept: Sequence[int] = ()
) -> Tensor:
    """Logits `[T, V]`, at the position that they predict, of a full forward in which the keys and values of the columns
    `kept` are those in `memory`.

    `memory` is overwritten with the keys and values of this forward, which is exact where nothing is kept. Logits at
    kept columns mean nothing.
    """
    memory = {} if memory is None else memory

    def keep(projection: nn.Module, _: object, output: Tensor) -> Tensor:
        output = output.clone()
        for column in kept:
            output[:, column] = memory[projection][:, column]
        memory[projection] = output
        return output

    names = ("self_attn.k_proj", "self_attn.v_proj")
    hooks = [part.register_forward_hook(keep) for name, part in policy.model.named_modules() if name.endswith(names)]
    logits = policy.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.cat([logits[:1], logits[:-1]]) if policy.shift else logits  # as Dream's own sampler does


def softmax(logits: list[float], mask_id: int, temperature: float) -> list[float]:
    """Probabilities at a temperature, MASK forbidden."""
    scaled = [-math.inf if token == mask_id else logit / temperature for token, logit in enumerate(logits)]
    largest = max(scaled)
    weights = [math.exp(value - largest) for value in scaled]
    total = sum(weights)
    return [weight / total for weight in weights]


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
    raise RuntimeError(f"u={u} is above the total {total}")


def select(
    rule: str,
    entropies: dict[int, float],
    tops: dict[int, float],
    parameter: float,
    gates: dict[int, float] | None = None,
) -> list[int]:
    """Positions to reveal: keys of the dictionaries, which are the masked positions of the active block.

    `gates` are the uniforms of the rule that draws its set; without them a half stands for each.
    """
    if rule == "sampled_entropy_bound":
        order, chosen, before = sorted(entropies, key=lambda at: entropies[at]), [], 0.0
        for at in order:
            odds = (max(parameter, SMALLEST) / max(before, SMALLEST)) ** (1 / WIDTH)
            if at == order[0] or (gates[at] if gates else 0.5) <= odds / (1 + odds):
                chosen.append(at)
            before += entropies[at]
        return chosen
    if rule == "entropy_bound":
        order = sorted(entropies, key=lambda at: entropies[at])
        values = [entropies[at] for at in order]
        admissible = [n for n in range(1, len(order) + 1) if sum(values[:n]) - max(values[:n]) <= parameter]
        return order[: max(admissible)]
    order = sorted(tops, key=lambda at: -tops[at])
    if rule == "top_k":
        return order[: int(parameter)]
    return [at for at in order if at == order[0] or tops[at] >= parameter]
