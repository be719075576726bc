"""Token scores: log-probabilities and entropies from hidden states, without the logits of all positions at once.

- At a vocabulary of 126k the logits of one row take half a megabyte. The output head is applied to pieces of rows, and
  under autograd what a piece computed is dropped and computed again in the backward pass.
- Where all logits fit one piece nothing is computed twice, and the numbers are those of the plain computation.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.behaviour import behaviour_log_probs, reveal_log_probs
from common.policy import Policy

LOGIT_BYTES = 64 * 2**20
"""Of one piece's logits in fp32; the scores take some times as much."""
GPU_LOGIT_BYTES = 512 * 2**20
"""Elsewhere than on a CPU, where matrix products want more rows."""


def row_pieces(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Slices of rows whose logits fit the piece; one, maybe empty, where all do."""
    step = _step(vocabulary, device)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def row_bytes(rows: int, vocabulary: int, device: torch.device) -> int:
    """Bytes of the largest piece's logits in fp32."""
    return 4 * vocabulary * min(rows, _step(vocabulary, device))


def _step(vocabulary: int, device: torch.device) -> int:
    return max(1, (LOGIT_BYTES if device.type == "cpu" else GPU_LOGIT_BYTES) // (4 * vocabulary))


def token_scores(
    policy: Policy,
    hidden: Tensor,
    row: Tensor,
    token: Tensor,
    *,
    temperature: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `T` tokens under the behaviour distributions of `U` rows; differentiable.

    Args:
        policy: whose output head, MASK and reveal temperature count.
        hidden: `[U, H]`.
        row: `[T]` in `0..U-1`, the row that each token is scored on.
        token: `[T]` ids.
        temperature: `[U]`, of the draw; None is 1.
        entropy: also return the rows' entropies.

    Returns:
        `[T]` nats, and `[U]` nats as the reveal rule sees them, untempered (None unless asked for).
    """
    mask_id = policy.vocabulary.mask_id

    def piece(states: Tensor, warmth: Tensor | None, at: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.logits(states)
        if warmth is None:
            log_probs = reveal_log_probs(logits, mask_id)
        else:
            log_probs = behaviour_log_probs(logits, warmth, mask_id)
        if not entropy:
            return log_probs[at, ids], log_probs.new_zeros(0)
        plain = reveal_log_probs(logits / policy.calibration.reveal_temperature, mask_id)
        return log_probs[at, ids], -(plain.exp() * plain.masked_fill(plain.isneginf(), 0.0)).sum(-1)

    pieces = row_pieces(len(hidden), policy.model.config.vocab_size, hidden.device)
    if len(pieces) == 1:
        scores, entropies = piece(hidden, temperature, row, token)
        return scores, entropies if entropy else None
    order = row.argsort(stable=True)
    ends = torch.tensor([rows.stop for rows in pieces], device=row.device)
    cuts = [0, *torch.searchsorted(row[order], ends).tolist()]
    found = []
    for number, rows in enumerate(pieces):
        mine = order[cuts[number] : cuts[number + 1]]
        warmth = None if temperature is None else temperature[rows]
        given = (hidden[rows], warmth, row[mine] - rows.start, token[mine])
        if torch.is_grad_enabled():
            found.append(checkpoint(piece, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(piece(*given))
    scores, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores[order.argsort()], entropies if entropy else None
