"""Checkpoint: a policy and the learner's state at one step.

A folder in Hugging Face layout (`from_pretrained`, `diffpo eval` read it) with the threshold head, the optimizer's
state and `manifest.json`; written under another name, manifest last, then renamed, so a reader never sees half of one.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from learner.learner import Learner
from learner.run_directory import MANIFEST

LEARNER_STATE = "learner_state.pt"


def write_checkpoint(learner: Learner, folder: Path, *, version: int) -> Path:
    """Write a complete checkpoint to `folder` (replacing an incomplete one)."""
    partial = folder.with_name(f"partial-{folder.name}")
    for unfinished in (partial, folder):
        shutil.rmtree(unfinished, ignore_errors=True)
    partial.mkdir(parents=True)
    learner.policy.save(partial)
    torch.save(learner.state(), partial / LEARNER_STATE)
    manifest = {"step": learner.steps_done, "version": version, "files": sorted(p.name for p in partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(partial, folder)
    return folder
