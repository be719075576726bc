"""Advantage: what a completion earned beyond its group.

- On rewards after their cost (`common.cost`).
- Baseline: group mean (d1, arXiv 2504.12216) or the mean of the others (leave-one-out).
- A group without spread, or of a single completion, has advantage 0 and carries no gradient.
"""

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # as TRL's GRPO has it; GRPO (arXiv 2402.03300) divides by the std alone


def advantages(reward: Tensor, group: Tensor, *, baseline: str, scale_by_std: bool) -> Tensor:
    """Advantage of each completion inside its group.

    Args:
        reward: `[N]`, cost included.
        group: `[N]` int64 in `0..M-1`.
        baseline: `mean` or `leave_one_out`.
        scale_by_std: divide by the group's (biased) standard deviation + 1e-4.

    Returns:
        `[N]`; exactly 0 in groups without spread and in groups of one.
    """
    groups = int(group.max()) + 1
    zeros = reward.new_zeros(groups)
    size = zeros.index_add(0, group, torch.ones_like(reward))
    mean = zeros.index_add(0, group, reward) / size
    centred = reward - mean[group]
    low = zeros.scatter_reduce(0, group, reward, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, reward, "amax", include_self=False)
    flat = (high == low)[group]
    if scale_by_std:
        std = (zeros.index_add(0, group, centred.square()) / size).sqrt()
        centred = centred / (std[group] + STD_FLOOR)
    if baseline == "leave_one_out":
        centred = centred * (size / (size - 1).clamp(min=1))[group]
    return centred.masked_fill(flat, 0.0)
