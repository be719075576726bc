"""Batch: the groups of one learner step as tensors.

- Rows are completions, in the order of groups and completion indices; `group` maps each to its prompt.
- `scored` marks the tokens that the loss is about: really drawn, up to and including the first stop token.
- `select` cuts whole groups or single completions out; nothing is copied back.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.vocabulary import Vocabulary


@dataclass(frozen=True)
class Batch:
    """Tensors of `N` completions of `L` positions in `M` groups."""

    prompts: Tensor
    """`[M, P]` int64, left-padded."""
    attended: Tensor
    """`[M, P]` bool."""
    group: Tensor
    """`[N]` int64 in `0..M-1`."""
    row: Tensor
    """`[N]` int64, place in the batch that it was selected from."""
    completion_ids: Tensor
    """`[N, L]` int64."""
    reveal_step: Tensor
    """`[N, L]` int64, 1-based."""
    scored: Tensor
    """`[N, L]` bool."""
    behaviour_logprob: Tensor
    """`[N, L]` nats."""
    token_version: Tensor
    """`[N, L]` int64, -1 where not drawn."""
    reveal_logprob: Tensor
    """`[N, L]` nats, of the set that was revealed with each token; 0 under rules that draw none."""
    entropy: Tensor
    """`[N, L]` nats, at reveal."""
    first_entropy: Tensor
    """`[N]` nats, mean over the positions active in the first step."""
    gamma: Tensor
    """`[N]` nats."""
    gamma_logprob: Tensor
    """`[N]` nats."""
    nfe: Tensor
    """`[N]` int64."""
    block_length: Tensor
    """`[N]` int64."""
    seed: Tensor
    """`[N]` int64."""
    temperature: Tensor
    """`[N]`."""
    reward: Tensor
    """`[N]`, the task's reward without cost."""

    draws_sets: bool
    """Whether the rollout drew the sets that it revealed, `sampler.rule: sampled_entropy_bound`."""

    @property
    def length(self) -> int:
        return self.completion_ids.shape[1]

    def select(self, rows: Tensor) -> "Batch":
        """The completions at `rows` (ascending indices) and the groups they belong to."""
        groups, group = self.group[rows].unique(return_inverse=True)
        per_row = {
            name: getattr(self, name)[rows]
            for name in self.__dataclass_fields__
            if name not in {"prompts", "attended", "group", "draws_sets"}
        }
        return replace(self, prompts=self.prompts[groups], attended=self.attended[groups], group=group, **per_row)


def build_batch(tables: list[pa.Table], vocabulary: Vocabulary, *, width: int | None, device: torch.device) -> Batch:
    """Tensors of some groups' tables.

    Args:
        tables: one table per group, under `common.trajectory.SCHEMA`.
        vocabulary: pad and stop ids.
        width: prompt width to pad to; None pads to the longest prompt here.
        device: where the tensors go.
    """
    prompts = [table["prompt_ids"][0].as_py() for table in tables]
    width = width or max(map(len, prompts))
    padded = torch.full((len(tables), width), vocabulary.pad_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    table = pa.concat_tables(tables)

    def positions(name: str, dtype: torch.dtype) -> Tensor:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.tensor(flat.reshape(len(table), -1)).to(dtype)

    def scalars(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor(table[name].to_numpy()).to(dtype)

    ids, version = positions("completion_ids", torch.int64), positions("token_version", torch.int64)
    stop = torch.isin(ids, torch.tensor(vocabulary.stop_ids))
    before_end = stop.cumsum(-1) - stop.long() == 0
    batch = Batch(
        row=torch.arange(len(ids)),
        prompts=padded,
        attended=torch.arange(width) >= (width - lengths).unsqueeze(-1),
        group=torch.tensor(np.repeat(np.arange(len(tables)), [len(t) for t in tables])),
        completion_ids=ids,
        reveal_step=positions("reveal_step", torch.int64),
        scored=(version >= 0) & before_end,
        behaviour_logprob=positions("behaviour_logprob", torch.float32),
        token_version=version,
        reveal_logprob=positions("reveal_logprob", torch.float32),
        entropy=positions("entropy", torch.float32),
        first_entropy=scalars("first_entropy", torch.float32),
        gamma=scalars("gamma", torch.float32),
        gamma_logprob=scalars("gamma_logprob", torch.float32),
        nfe=scalars("nfe", torch.int64),
        block_length=scalars("block_length", torch.int64),
        seed=scalars("seed", torch.int64),
        temperature=scalars("temperature", torch.float32),
        reward=scalars("reward", torch.float32),
        draws_sets=table["reveal_rule"][0].as_py() == "sampled_entropy_bound",
    )
    tensors = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "draws_sets"}
    return replace(batch, **{name: tensor.to(device) for name, tensor in tensors.items()})
