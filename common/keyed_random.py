"""Keyed randomness: every random number is a function of what it is for.

- Counter-based: `uniform(seed, step, position)` depends on nothing else, neither on batch companions nor on order.
- One seed per completion, made by `derive` from run seed, prompt cursor and completion index, so a lease that is
  generated again, elsewhere, asks for the same completion.
- Hash: the finaliser of splitmix64 (Steele, Lea, Flood 2014), applied once per key word. Not cryptographic.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB

# Positions below zero are streams that are not draws of a token.
GAMMA_STREAM = -1
TAU_STREAM = -2
GATE_STREAM = -(1 << 20)  # less the position: whether it is revealed


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def derive(*words: int) -> int:
    """A seed in `[0, 2^63)` from integers, the same in every process."""
    state = 0
    for word in words:
        state = (state + word + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _C1) & _MASK
        state = ((state ^ (state >> 27)) * _C2) & _MASK
        state ^= state >> 31
    return state >> 1


def _mix(state: Tensor) -> Tensor:
    # int64 arithmetic wraps; the arithmetic shift is masked into a logical one
    state = state + _signed(_GOLDEN)
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _signed(_C1)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _signed(_C2)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def uniform(seed: Tensor, step: Tensor | int, position: Tensor | int) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one per broadcast element.

    Args:
        seed, step, position: int64 tensors (or ints for the last two) that broadcast together.

    Returns:
        float64 tensor of the broadcast shape, with 52 random bits.
    """
    bits = _mix(_mix(_mix(seed) + step) + position)
    return (((bits >> 12) & ((1 << 52) - 1)).to(torch.float64) + 0.5) * 2.0**-52
