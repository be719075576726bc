"""DenoisingEngine: continuous batching for diffusion.

- `slots` rows; a step admits waiting requests into free slots, runs one forward over live rows, reveals, and retires
  finished rows. Nobody waits for the slowest row; no forward is spent on a finished row or a finished block.
- Every step reveals at least one token in every live row; a revealed token never changes; MASK is never revealed.
- The forward on `z_0` is the same for all completions of a group: computed once for those admitted together.
- Logits exist only for masked positions of the active block; temperature touches only revealed ones.
- Random numbers are keyed by (seed, step, position): a completion does not depend on its batch companions beyond
  floating-point noise (padding to the longest live prompt moves it by about 1e-6; `fixed_padding` removes that).
- New weights are adopted between two steps; a model without cache has nothing to recompute, so live rows go on and
  each token carries the version that revealed it.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.reveal_rules import REVEAL_RULES
from common.autocast import autocast
from common.behaviour import behaviour_log_probs, draw, entropy, reveal_log_probs
from common.errors import RunError, UserError
from common.keyed_random import GAMMA_STREAM, uniform
from common.policy import Policy
from common.trajectory import NOT_DRAWN, Completion
from common.weights import load_flat

MODES = {"sample": 1, "mean": 2}  # how a row takes its threshold from the policy; 0: it was given
SMALLEST_TEMPERATURE = 1e-3  # below, tempered logits overflow


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to be generated."""

    prompt_ids: tuple[int, ...]
    seed: int
    group: int
    """Requests of one group and prompt that wait together share their first forward."""
    temperature: float = 1.0
    """Temperature of the draw; 0 is argmax, for evaluation only."""
    threshold: float | Literal["sample", "mean"] = "mean"
    """The reveal rule's parameter, or how to take it from the threshold policy."""


class DenoisingEngine:
    """Lives in one rollout actor or evaluation process; is fed with requests and stepped until idle."""

    def __init__(
        self,
        policy: Policy,
        *,
        slots: int,
        rule: str,
        max_prompt_tokens: int,
        completion_tokens: int,
        block_length: int | None = None,
        fixed_padding: bool = False,
        use_autocast: bool = False,
    ) -> None:
        if max_prompt_tokens + completion_tokens > policy.max_positions:
            raise UserError(
                f"prompt of {max_prompt_tokens} + completion of {completion_tokens} tokens exceed the model's "
                f"{policy.max_positions} positions; shorten sampler.max_prompt_tokens or max_completion_tokens"
            )
        self.policy = policy
        self.version = 0
        self.slots = slots
        self._rule_name = rule
        self._rule = REVEAL_RULES[rule]
        self._width = max_prompt_tokens
        self._length = completion_tokens
        self._block = block_length or completion_tokens
        self._fixed_padding = fixed_padding
        self._use_autocast = use_autocast
        self._stops = torch.tensor(policy.vocabulary.stop_ids, device=policy.device)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._free = list(range(slots))[::-1]
        self._handles: dict[int, int] = {}
        self._submitted = 0
        self.forwards = 0
        self.row_forwards = 0
        self._allocate()

    def _allocate(self) -> None:
        device, wide = self.policy.device, torch.promote_types(self.policy.model.dtype, torch.float32)

        def slot(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((self.slots, *shape), value, dtype=dtype, device=device)

        length, total = (self._length,), (self._width + self._length,)
        self._ids = slot(total, self.policy.vocabulary.pad_id, torch.int64)
        self._attended = slot(total, False, torch.bool)
        self._reveal_step = slot(length, 0, torch.int64)
        self._logprob = slot(length, 0.0, wide)
        self._entropy = slot(length, 0.0, wide)
        self._token_version = slot(length, NOT_DRAWN, torch.int64)
        self._live = slot((), False, torch.bool)
        self._nfe = slot((), 0, torch.int64)
        self._seed = slot((), 0, torch.int64)
        self._temperature = slot((), 1.0, wide)
        self._parameter = slot((), 0.0, wide)
        self._parameter_logprob = slot((), 0.0, wide)
        self._mode = slot((), 0, torch.int64)
        self._leader = slot((), 0, torch.int64)

    @property
    def idle(self) -> bool:
        """Whether nothing is live and nothing waits."""
        return not self._handles and not self._waiting

    @property
    def load(self) -> int:
        """Rows live or waiting."""
        return len(self._handles) + len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request; the handle comes back with its completion.

        Raises:
            UserError: on a prompt that is empty or longer than the engine's prompt width.
        """
        self.check_prompt(request.prompt_ids)
        if request.temperature != 0 and not SMALLEST_TEMPERATURE <= request.temperature < math.inf:
            raise UserError(
                f"temperature={request.temperature}; use 0 for argmax or a value from {SMALLEST_TEMPERATURE} on"
            )
        self._check_threshold(request.threshold)
        self._submitted += 1
        self._waiting.append((self._submitted, request))
        return self._submitted

    def check_prompt(self, prompt_ids: tuple[int, ...]) -> None:
        """Raises UserError for a prompt that is empty or longer than the engine's prompt width."""
        if not 0 < len(prompt_ids) <= self._width:
            raise UserError(
                f"prompt of {len(prompt_ids)} tokens; it must have 1 to {self._width} (sampler.max_prompt_tokens)"
            )

    def _check_threshold(self, threshold: float | str) -> None:
        if isinstance(threshold, str):
            if threshold not in MODES or self._rule_name != "entropy_bound":
                raise UserError(
                    f"threshold={threshold!r} under the rule {self._rule_name}; give a number, or with entropy_bound "
                    f"one of {', '.join(MODES)}"
                )
            return
        smallest = 1 if self._rule_name == "top_k" else 0
        if not smallest <= threshold < math.inf:
            raise UserError(f"threshold={threshold} under the rule {self._rule_name}; give a number >= {smallest}")

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """All completions, in the order of the requests; for an engine that has nothing else to do."""
        if not self.idle:
            raise RuntimeError(f"generate() on an engine with {self.load} rows of other requests; step() it to its end")
        handles = [self.submit(request) for request in requests]
        finished: dict[int, Completion] = {}
        while not self.idle:
            finished.update(self.step())
        return [finished[handle] for handle in handles]

    def adopt(self, flat: np.ndarray, version: int) -> None:
        """Take new weights between two steps; live rows go on with them."""
        load_flat(self.policy, flat)
        self.version = version

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion]]:
        """Admit, run one forward, reveal, retire; returns (handle, completion) of the rows that finished."""
        self._admit()
        rows = self._live.nonzero().squeeze(-1)
        if not len(rows):
            return []
        fresh = self._nfe[rows] == 0
        source_slot = torch.where(fresh, self._leader[rows], rows)
        forward = rows[source_slot == rows]
        place = torch.zeros(self.slots, dtype=torch.int64, device=rows.device)
        place[forward] = torch.arange(len(forward), device=rows.device)
        source = place[source_slot]

        hidden = self._forward(forward)
        active = self._active(forward)
        with autocast(rows.device, enabled=self._use_autocast):
            logits = self.policy.logits(hidden[:, -self._length :][active])
        log_probs = reveal_log_probs(logits, self.policy.vocabulary.mask_id)
        self._draw_thresholds(rows[fresh], forward, source[fresh], hidden)

        blank = self._entropy.new_full(active.shape, torch.inf)
        entropies = blank.masked_scatter(active, entropy(log_probs))
        tops = (-blank).masked_scatter(active, log_probs.amax(-1).exp())
        self._check_finite(entropies, active, forward)
        index = torch.zeros(active.shape, dtype=torch.int64, device=rows.device)
        index[active] = torch.arange(len(logits), device=rows.device)
        chosen = self._rule(entropies[source], tops[source], active[source], self._parameter[rows])
        at, position = chosen.nonzero(as_tuple=True)
        self._reveal(rows[at], position, logits[index[source[at], position]], entropies[source[at], position])
        self._nfe[rows] += 1
        return self._retire(rows)

    def _admit(self) -> None:
        """Fill free slots in order of arrival, whole groups at a time so that they share their first forward."""
        while self._waiting and self._free:
            group, prompt = self._waiting[0][1].group, self._waiting[0][1].prompt_ids
            together = 0
            for _, request in self._waiting:
                if request.group != group or request.prompt_ids != prompt:
                    break
                together += 1
            if len(self._free) < min(together, self.slots):
                return
            leader = self._free[-1]
            for _ in range(min(together, len(self._free))):
                self._place(self._free.pop(), leader, *self._waiting.popleft())

    def _place(self, slot: int, leader: int, handle: int, request: Request) -> None:
        ids, start = self._ids[slot], self._width - len(request.prompt_ids)
        ids[:start] = self.policy.vocabulary.pad_id
        ids[start : self._width] = torch.tensor(request.prompt_ids, device=ids.device)
        ids[self._width :] = self.policy.vocabulary.mask_id
        self._attended[slot] = torch.arange(len(ids), device=ids.device) >= start
        for state, value in (
            (self._reveal_step, 0),
            (self._logprob, 0.0),
            (self._entropy, 0.0),
            (self._token_version, NOT_DRAWN),
            (self._live, True),
            (self._nfe, 0),
            (self._seed, request.seed),
            (self._temperature, request.temperature),
            (self._parameter_logprob, 0.0),
            (self._leader, leader),
            (self._mode, MODES.get(str(request.threshold), 0)),
            (self._parameter, 0.0 if isinstance(request.threshold, str) else request.threshold),
        ):
            state[slot] = value
        self._handles[slot] = handle

    def _forward(self, slots: Tensor) -> Tensor:
        ids, attended = self._ids[slots], self._attended[slots]
        if not self._fixed_padding:
            first = int(attended.any(0).int().argmax())
            ids, attended = ids[:, first:], attended[:, first:]
        self.forwards += 1
        self.row_forwards += len(slots)
        with autocast(slots.device, enabled=self._use_autocast):
            return self.policy.hidden(ids, attended)

    def _active(self, slots: Tensor) -> Tensor:
        """`[F, L]` bool: masked positions of each row's active block, the one of its first masked position."""
        masked = self._ids[slots, self._width :] == self.policy.vocabulary.mask_id
        block = torch.arange(self._length, device=slots.device) // self._block
        return masked & (block == block[masked.int().argmax(-1)].unsqueeze(-1))

    def _draw_thresholds(self, fresh: Tensor, forward: Tensor, source: Tensor, hidden: Tensor) -> None:
        """Threshold of each row that begins, from the hidden states of its `z_0` forward."""
        learned = self._mode[fresh] > 0
        if not learned.any():
            return
        fresh, source = fresh[learned], source[learned]
        prompt = self._attended[forward].clone()
        prompt[:, self._width :] = False
        features = self.policy.prompt_features(hidden, prompt[:, -hidden.shape[1] :])[source]
        head = self.policy.head
        drawn = head.sample(features, uniform(self._seed[fresh], 0, GAMMA_STREAM))
        sampled = self._mode[fresh] == 1
        gamma = torch.where(sampled, drawn, head.mean(features))
        self._parameter[fresh] = gamma.to(self._parameter.dtype)
        logprob = torch.where(sampled, head.log_prob(features, gamma), torch.zeros_like(gamma))
        self._parameter_logprob[fresh] = logprob.to(self._parameter_logprob.dtype)

    def _reveal(self, slots: Tensor, position: Tensor, logits: Tensor, entropies: Tensor) -> None:
        temperature = self._temperature[slots]
        log_probs = behaviour_log_probs(logits, temperature, self.policy.vocabulary.mask_id)
        step = self._nfe[slots] + 1
        greedy = temperature == 0
        drawn = draw(log_probs, uniform(self._seed[slots], step, position))
        tokens = torch.where(greedy, log_probs.argmax(-1), drawn)
        logprob = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self._ids[slots, self._width + position] = tokens
        self._reveal_step[slots, position] = step
        self._logprob[slots, position] = logprob.masked_fill(greedy, 0.0).to(self._logprob.dtype)
        self._entropy[slots, position] = entropies
        self._token_version[slots, position] = self.version

    def _retire(self, rows: Tensor) -> list[tuple[int, Completion]]:
        """Finish rows that have no mask left of their first stop token (or none at all)."""
        tokens = self._ids[rows, self._width :]
        masked = tokens == self.policy.vocabulary.mask_id
        position = torch.arange(self._length, device=rows.device)
        stop = torch.where(torch.isin(tokens, self._stops), position, self._length).amin(-1, keepdim=True)
        done = ~(masked & (position < stop)).any(-1)
        if not done.any():
            return []
        ended = rows[done]
        filled = torch.zeros_like(self._reveal_step, dtype=torch.bool)
        filled[ended] = masked[done]
        self._ids[:, self._width :][filled] = self.policy.vocabulary.eos_id
        self._reveal_step = torch.where(filled, self._nfe.unsqueeze(-1) + 1, self._reveal_step)
        self._live[ended] = False
        return self._collect(ended, (stop[done] < self._length).squeeze(-1))

    def _collect(self, ended: Tensor, stopped: Tensor) -> list[tuple[int, Completion]]:
        per_position = {
            "ids": self._ids[ended].cpu().numpy(),
            "reveal_step": self._reveal_step[ended].cpu().numpy().astype(np.int16),
            "behaviour_logprob": self._logprob[ended].cpu().numpy().astype(np.float32),
            "entropy": self._entropy[ended].cpu().numpy().astype(np.float32),
            "token_version": self._token_version[ended].cpu().numpy().astype(np.int32),
        }
        ids = per_position.pop("ids").astype(np.int32)
        starts = (~self._attended[ended]).sum(-1).tolist()
        states = (self._parameter, self._parameter_logprob, self._nfe, self._seed, self._temperature)
        scalars = zip(*(state[ended].tolist() for state in states), stopped.tolist(), strict=True)
        finished = []
        for row, (slot, values) in enumerate(zip(ended.tolist(), scalars, strict=True)):
            gamma, gamma_logprob, nfe, seed, temperature, stop = values
            completion = Completion(
                prompt_ids=ids[row, starts[row] : self._width],
                completion_ids=ids[row, self._width :],
                gamma=gamma,
                gamma_logprob=gamma_logprob,
                nfe=nfe,
                seed=seed,
                temperature=temperature,
                finish_reason="stop" if stop else "length",
                **{name: values[row] for name, values in per_position.items()},
            )
            finished.append((self._handles.pop(slot), completion))
            self._free.append(slot)
        return finished

    def _check_finite(self, entropies: Tensor, active: Tensor, forward: Tensor) -> None:
        bad = (active & ~entropies.isfinite()).any(-1)
        if bad.any():
            slot = int(forward[bad][0])
            raise RunError(
                f"logits are not finite: request {self._handles[slot]}, weights version {self.version}, "
                f"step {int(self._nfe[slot]) + 1}"
            )
