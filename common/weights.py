"""Weights: a policy's parameters as one flat buffer.

- One buffer per published version: float32, in the order of `parameters()`, model first, threshold head last.
- Ray's zero-copy arrays are read-only, so loading copies.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from common.errors import RunError


def to_flat(module: nn.Module) -> np.ndarray:
    """All parameters as one float32 vector."""
    return parameters_to_vector(p.detach().float() for p in module.parameters()).cpu().numpy()


def load_flat(module: nn.Module, flat: np.ndarray) -> None:
    """Overwrite all parameters from a vector made by `to_flat`.

    Raises:
        RunError: when the sizes differ (another model or another threshold head).
    """
    own = sum(p.numel() for p in module.parameters())
    if own != flat.size:
        raise RunError(f"weights of {flat.size} numbers do not fit a policy of {own}; both sides need one config")
    offset = 0
    with torch.no_grad():
        for parameter in module.parameters():
            piece = flat[offset : offset + parameter.numel()]
            parameter.copy_(torch.tensor(piece).view_as(parameter))
            offset += parameter.numel()
