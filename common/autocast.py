"""Autocast: bfloat16 matrix products under float32 weights, where the device has them."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch


def autocast(device: torch.device, *, enabled: bool, cache: bool = True) -> AbstractContextManager:
    """A bfloat16 autocast context, or none where it is off or would be slower than float32.

    With `cache` the bfloat16 copies of weights that learn live as long as it lasts; else each until it was used.
    """
    if enabled and has_bfloat16(device.type):
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
    return nullcontext()


@cache
def has_bfloat16(kind: str) -> bool:
    """Whether a device multiplies bfloat16 matrices in hardware (on x86 CPUs: AVX512-BF16 or AMX)."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
