"""Export: a policy as a folder that other programs read: `from_pretrained` of transformers, or of peft."""

import shutil
from pathlib import Path

import torch

from common.adapter import ADAPTER_BASE, read_base
from common.config import ModelConfig, ThresholdConfig
from common.errors import UserError
from common.new_folder import new_folder
from common.policy_loading import load_policy

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: Path, out: Path, *, merge: bool, precision: str = "float32", mask_token: str | None = None
) -> str:
    """Write model or adapter, and tokenizer; the threshold head beside them, which other programs pass over.

    Args:
        checkpoint: a policy's folder.
        out: made here.
        merge: add an adapter to its base's weights.
        precision: of the written model; an adapter alone is float32.
        mask_token: the MASK token, where neither tokenizer nor configuration names it.

    Returns:
        What was written, in a line.

    Raises:
        UserError: when the checkpoint cannot be loaded, or `out` exists or cannot be made.
        RunError: when there is no room; nothing is left behind.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision!r}; give one of {', '.join(PRECISIONS)}")
    if out.exists():
        raise UserError(f"{out} exists, and an export overwrites nothing; give another folder")
    base = read_base(checkpoint)
    if base is not None and not merge:
        names = [path.name for path in checkpoint.glob("*") if path.suffix in (".json", ".safetensors", ".jinja")]
        kept = [name for name in names if name not in (ADAPTER_BASE, "manifest.json")]
        with new_folder(out) as partial:
            for name in kept:
                shutil.copyfile(checkpoint / name, partial / name)
        return f"{out}: the adapter alone, for the base {base.folder} (--merge adds it to that)"
    policy = load_policy(checkpoint, ModelConfig(mask_token=mask_token), ThresholdConfig())
    policy.model.to(dtype=PRECISIONS[precision])  # pyright: ignore[reportCallIssue]: takes what torch's takes
    with new_folder(out) as partial:
        policy.save(partial)
    what = (
        f"the adapter of {checkpoint} merged into {base.folder}" if base is not None else f"the model of {checkpoint}"
    )
    return f"{out}: {what}, in {precision}"
