"""LLaDA's published batched sampling loop with a choice of reveal rule: the baseline of `diffpo bench engine`.

Written as dLLM-RL code bases write it (arXiv 2502.09992, reference `generate`): a batch goes through the blocks
together and waits for its slowest row; every step computes logits, softmax and Gumbel noise of the whole vocabulary at
all positions, prompt included; finished rows and blocks are computed again. Departures, in its favour or needed to end:
MASK is forbidden, the reveal rules are ours, vectorised, and the noise can be float32 where LLaDA's is float64 (at a
vocabulary of 32k that alone would make the baseline several times slower).
"""

import torch
from torch import Tensor

from actors.reveal_rules import REVEAL_RULES
from common.policy import Policy


@torch.inference_mode()
def llada_sample(
    policy: Policy,
    prompts: Tensor,
    *,
    rule: str,
    parameter: Tensor,
    temperature: float,
    length: int,
    block: int,
    noise: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Completions of one batch.

    Args:
        policy: the model.
        prompts: `[B, P]` ids, all of one length.
        rule: reveal rule.
        parameter: `[B]`, the rule's parameter of each row.
        temperature: of the draw; 0 is argmax.
        length: completion tokens L.
        block: tokens of a block, dividing `length`.
        noise: precision of the Gumbel noise.

    Returns:
        ids `[B, L]`, and `[B]` the forward passes in which each row still had something to reveal.
    """
    mask_id, width = policy.vocabulary.mask_id, prompts.shape[1]
    ids = torch.cat([prompts, torch.full((len(prompts), length), mask_id, device=prompts.device)], dim=1)
    attended = torch.ones_like(ids)
    nfe = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device)
    for start in range(width, width + length, block):
        while (ids[:, start : start + block] == mask_id).any():
            logits = policy.model(input_ids=ids, attention_mask=attended, use_cache=False).logits
            logits[..., mask_id] = -torch.inf
            drawn = _gumbel_noised(logits.to(noise), temperature).argmax(-1)
            probabilities = logits.float().softmax(-1)
            entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
            top = probabilities.amax(-1)
            active = ids == mask_id
            active[:, start + block :] = False
            nfe += active.any(-1)
            chosen = REVEAL_RULES[rule](entropy, top, active, parameter)
            ids = torch.where(chosen, drawn, ids)
    return ids[:, width:], nfe


def _gumbel_noised(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits
    noise = -torch.rand_like(logits).log_()
    return logits.exp() / (noise if temperature == 1 else noise**temperature)
