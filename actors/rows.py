"""Rows: the completions that are being denoised, one per slot, as tensors on the device.

- A row is a prompt, left-padded to the common width W, then L completion positions; what is padding, or lies beyond a
  row's own length, is never attended. Positions beyond its own length hold PAD, so they are not masked either.
- Nothing here loops over rows but `place` and `collect`, once in a row's life.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.request import MODES, Request
from common.trajectory import NOT_DRAWN, Completion
from common.vocabulary import Vocabulary


class Rows:
    """State of `slots` rows; made with the engine, a slot is free, then live, then free again."""

    def __init__(
        self,
        *,
        slots: int,
        width: int,
        length: int,
        block: int,
        vocabulary: Vocabulary,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.slots, self.width, self.length, self.block = slots, width, length, block
        self._vocabulary = vocabulary

        def state(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        self.ids = state((width + length,), vocabulary.pad_id, torch.int64)
        self.attended = state((width + length,), False, torch.bool)
        self.reveal_step = state((length,), 0, torch.int64)
        self.logprob = state((length,), 0.0, dtype)
        self.reveal_logprob = state((length,), 0.0, dtype)
        self.entropy = state((length,), 0.0, dtype)
        self.token_version = state((length,), NOT_DRAWN, torch.int64)
        self.live = state((), False, torch.bool)
        self.nfe = state((), 0, torch.int64)
        self.first_entropy = state((), 0.0, dtype)
        self.seed = state((), 0, torch.int64)
        self.temperature = state((), 1.0, dtype)
        self.parameter = state((), 0.0, dtype)
        self.parameter_logprob = state((), 0.0, dtype)
        self.mode = state((), 0, torch.int64)
        self.own_length = state((), length, torch.int64)

    @property
    def completion_ids(self) -> Tensor:
        """`[slots, L]`, a view."""
        return self.ids[:, self.width :]

    def masked(self, slots: Tensor) -> Tensor:
        """`[N, L]` bool: positions that are still MASK."""
        return self.completion_ids[slots] == self._vocabulary.mask_id

    def active_block(self, slots: Tensor) -> Tensor:
        """`[N]`: number of each row's active block, the one of its first masked position."""
        return self.masked(slots).int().argmax(-1) // self.block

    def active(self, slots: Tensor) -> Tensor:
        """`[N, L]` bool: masked positions of each row's active block."""
        masked = self.masked(slots)
        of_position = torch.arange(self.length, device=slots.device) // self.block
        return masked & (of_position == (masked.int().argmax(-1) // self.block).unsqueeze(-1))

    def place(self, slots: Tensor, requests: Sequence[Request]) -> None:
        """Begin the requests in the given free slots `[N]`."""
        device, ids = slots.device, self._vocabulary
        lengths = [request.completion_tokens or self.length for request in requests]
        tokens = np.full((len(requests), self.width + self.length), ids.pad_id)
        attended = np.zeros(tokens.shape, dtype=bool)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            start = self.width - len(request.prompt_ids)
            tokens[row, start : self.width] = request.prompt_ids
            tokens[row, self.width : self.width + length] = ids.mask_id
            attended[row, start : self.width + length] = True
        self.ids[slots] = torch.from_numpy(tokens).to(device)
        self.attended[slots] = torch.from_numpy(attended).to(device)
        for state, fresh in (
            (self.reveal_step, 0),
            (self.logprob, 0.0),
            (self.reveal_logprob, 0.0),
            (self.entropy, 0.0),
            (self.token_version, NOT_DRAWN),
            (self.live, True),
            (self.nfe, 0),
            (self.parameter_logprob, 0.0),
        ):
            state[slots] = fresh
        given = [0.0 if isinstance(request.threshold, str) else request.threshold for request in requests]
        for state, values in (
            (self.seed, [request.seed for request in requests]),
            (self.temperature, [request.temperature for request in requests]),
            (self.parameter, given),
            (self.mode, [MODES.get(str(request.threshold), 0) for request in requests]),
            (self.own_length, lengths),
        ):
            state[slots] = torch.tensor(values, dtype=state.dtype, device=device)

    def finished(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows have no mask left of their first stop token (or none at all), and which found a stop."""
        tokens = self.completion_ids[slots]
        masked = tokens == self._vocabulary.mask_id
        position = torch.arange(self.length, device=slots.device)
        stops = torch.tensor(self._vocabulary.stop_ids, device=slots.device)
        found = torch.isin(tokens, stops) & (position < self.own_length[slots].unsqueeze(-1))
        stop = torch.where(found, position, self.length).amin(-1, keepdim=True)
        return ~(masked & (position < stop)).any(-1), found.any(-1)

    def collect(self, slots: Tensor, stopped: Tensor) -> list[Completion]:
        """The completions of finished rows; what is still MASK becomes EOS, not drawn."""
        undrawn = self.masked(slots)
        tokens = self.completion_ids[slots].masked_fill(undrawn, self._vocabulary.eos_id)
        steps = torch.where(undrawn, self.nfe[slots].unsqueeze(-1) + 1, self.reveal_step[slots])
        arrays = (
            (tokens, np.int32),
            (steps, np.int16),
            (self.logprob[slots], np.float32),
            (self.reveal_logprob[slots], np.float32),
            (self.entropy[slots], np.float32),
            (self.token_version[slots], np.int32),
        )
        columns = [tensor.cpu().numpy().astype(kind) for tensor, kind in arrays]
        prompts = self.ids[slots, : self.width].cpu().numpy().astype(np.int32)
        starts = (~self.attended[slots, : self.width]).sum(-1).tolist()
        states = (self.parameter, self.parameter_logprob, self.nfe, self.seed, self.temperature)
        states += (self.first_entropy, self.own_length)
        scalars = zip(*(state[slots].tolist() for state in states), stopped.tolist(), strict=True)
        completions = []
        for row, (gamma, gamma_logprob, nfe, seed, temperature, first, length, stop) in enumerate(scalars):
            ids, reveal_step, logprob, reveal_logprob, entropy, version = (column[row, :length] for column in columns)
            completions.append(
                Completion(
                    prompt_ids=prompts[row, starts[row] :],
                    completion_ids=ids,
                    reveal_step=reveal_step,
                    behaviour_logprob=logprob,
                    reveal_logprob=reveal_logprob,
                    entropy=entropy,
                    token_version=version,
                    first_entropy=first,
                    gamma=gamma,
                    gamma_logprob=gamma_logprob,
                    nfe=nfe,
                    seed=seed,
                    temperature=temperature,
                    finish_reason="stop" if stop else "length",
                )
            )
        return completions
