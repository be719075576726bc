"""Weights: what a policy has learned as one flat buffer, and a frozen base as read-only arrays.

- One buffer per published version, in the order of `parameters()`: model first, threshold head and calibration last;
  beside an adapter the frozen weights are left out.
- float32, or `narrow`: the model's numbers as bfloat16, for rollout that computes with these. The learner's stay
  float32, and so do head and calibration.
- Ray's zero-copy arrays are read-only, so loading a buffer copies. A base never changes: its parameters are the arrays.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.adapter import frozen_parameters, learned_parameters
from common.errors import RunError

MODEL = "model."  # in a policy, what may be narrow
WIDTH = 4  # bytes; where every parameter begins is a multiple


def to_flat(module: nn.Module, *, narrow: bool = False, keep: bool = True) -> np.ndarray:
    """All that learns as one vector: float32 `[N]`, or bytes `uint8[N]` if narrow.

    Where parameters are sharded, all ranks must ask; they are gathered in turn, and whoever does not `keep` them gets
    an empty vector and never has more than one whole parameter.
    """
    if not keep:
        for _, parameter in learned_parameters(module):
            whole(parameter.detach())
        return np.empty(0, np.float32)
    buffer = torch.zeros(_size(module, narrow), dtype=torch.uint8)
    for parameter, place in _places(module, narrow, buffer):
        place.copy_(whole(parameter.detach()))
    return (buffer if narrow else buffer.view(torch.float32)).numpy()


def load_flat(module: nn.Module, flat: np.ndarray) -> None:
    """Overwrite all that learns from a vector made by `to_flat`.

    Raises:
        RunError: when the sizes differ (another model, another adapter or another threshold head).
    """
    narrow = flat.dtype == np.uint8
    size = _size(module, narrow)
    if flat.nbytes != size:
        own = size // flat.itemsize
        raise RunError(f"weights of {flat.size} numbers do not fit a policy of {own}; both sides need one config")
    with torch.no_grad():
        for parameter, place in _places(module, narrow, _tensor(flat).view(torch.uint8)):
            parameter.copy_(place)


def not_finite(module: nn.Module, *, narrow: bool = False, keep: bool = True) -> int:
    """How many of the numbers that `to_flat` would give are NaN or infinite, counted where they are.

    Of a sharded parameter this rank counts its part, of a whole one whoever is to `keep` it.
    """
    return sum(
        int((~local_part(parameter.detach()).to(kind).isfinite()).sum())
        for parameter, kind, _ in _kinds(module, narrow)
        if keep or sharded(parameter)
    )


def base_arrays(module: nn.Module, *, narrow: bool = False, keep: bool = True) -> list[np.ndarray]:
    """The weights that are frozen beside an adapter, one array each: float32, or the bits of bfloat16 as int16.

    Sharded ones are gathered as in `to_flat`.
    """
    found = []
    for _, parameter in frozen_parameters(module):
        value = whole(parameter.detach())
        if not keep:
            continue
        value = value.cpu()
        found.append(value.bfloat16().view(torch.int16).numpy() if narrow else value.float().numpy())
    return found


def adopt_base(module: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Put arrays of `base_arrays` in place of what is frozen; on a CPU nothing is copied, and nothing may write there.

    Raises:
        RunError: when they are those of another model.
    """
    own = [parameter for _, parameter in frozen_parameters(module)]
    shapes = [tuple(parameter.shape) for parameter in own]
    if [array.shape for array in arrays] != shapes:
        raise RunError(f"a base of {len(arrays)} arrays does not fit a model of {len(own)}; both sides need one config")
    for parameter, array in zip(own, arrays, strict=True):
        value = _tensor(array)
        value = value.view(torch.bfloat16) if array.dtype == np.int16 else value
        parameter.data = value.to(parameter.device, parameter.dtype)


def sharded(value: Tensor) -> bool:
    """Whether each rank of a learner has a part of it only."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered, by all ranks at once; one that is not sharded as it is."""
    found: Any = value
    return found.full_tensor() if sharded(value) else value


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; the tensor itself if it is not sharded."""
    found: Any = value
    return found.to_local() if sharded(value) else value


def _tensor(array: np.ndarray) -> Tensor:
    """The same memory as a tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(array)


def _kinds(module: nn.Module, narrow: bool) -> Iterator[tuple[nn.Parameter, torch.dtype, int]]:
    """Each parameter, its type in a buffer, and its bytes there, rounded up."""
    for name, parameter in learned_parameters(module):
        kind = torch.bfloat16 if narrow and name.startswith(MODEL) else torch.float32
        yield parameter, kind, -(-parameter.numel() * kind.itemsize // WIDTH) * WIDTH


def _size(module: nn.Module, narrow: bool) -> int:
    return sum(size for _, _, size in _kinds(module, narrow))


def _places(module: nn.Module, narrow: bool, buffer: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter, and its part of a buffer of bytes in its own shape."""
    offset = 0
    for parameter, kind, size in _kinds(module, narrow):
        part = buffer[offset : offset + size].view(kind)[: parameter.numel()]
        yield parameter, part.view(parameter.shape)
        offset += size
