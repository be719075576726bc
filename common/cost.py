"""Cost: what forward passes take off a reward. Rollout asks whether a group has spread, the learner for advantages."""

from torch import Tensor


def with_cost(reward: Tensor, nfe: Tensor, *, length: int, speed_weight: float, form: str) -> Tensor:
    """Reward after the cost of forward passes. *(ours)*

    multiplicative: `max(r, 0) * (1 - speed_weight * NFE / L) + min(r, 0)`, so that being fast and wrong earns nothing
    and slow never looks better; additive: `r - speed_weight * NFE / L`.

    Args:
        reward: `[N]`.
        nfe: `[N]`, forward passes.
        length: L, completion length in tokens.
        speed_weight: in [0, 1].
        form: `multiplicative`, `additive` or `off`.

    Returns:
        `[N]`.
    """
    share = speed_weight * nfe.to(reward.dtype) / length
    if form == "multiplicative":
        return reward.clamp(min=0) * (1 - share) + reward.clamp(max=0)
    return reward - share if form == "additive" else reward
