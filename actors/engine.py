"""DenoisingEngine: continuous batching for diffusion.

- `slots` rows; a step admits waiting requests into free slots, runs one forward over live rows, reveals, and retires
  finished rows. Nobody waits for the slowest row; no forward is spent on a finished row or a finished block.
- Every step reveals at least one token in every live row; a revealed token never changes; MASK is never revealed.
- The forward on `z_0` is the same for all completions of a group: computed once, also for those admitted later, as
  long as the group's requests were submitted in a row and the weights stay.
- Logits exist only for masked positions of the active block, and never more of them at once than fit a piece
  (`common.token_scores`); temperature touches only revealed ones.
- Random numbers are keyed by (seed, step, position): a completion does not depend on its batch companions beyond
  floating-point noise (padding to the longest live prompt moves it by about 1e-6; `fixed_padding` removes that).
- New weights are adopted between two steps. Without a cache there is nothing to recompute: live rows go on, and each
  token carries the version that revealed it. With one, every live row begins again with a full forward.
- With a cache (`actors.cached_forward_pass`) the recorded log-probabilities are those of the distribution really
  sampled, and how far it is from the exact one is measured as it goes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from actors.cached_forward_pass import CachedForwardPass
from actors.forward_pass import ForwardPass
from actors.request import MODES, WAY_OUT, Failure, Request
from actors.reveal_rules import ENTROPY_BOUND, REVEAL_RULES, RULES, SAMPLED_ENTROPY_BOUND
from actors.rows import Rows
from common.autocast import autocast
from common.behaviour import draw_tokens, reveal_statistics
from common.config import Config
from common.errors import RunError, UserError, is_out_of_memory
from common.keyed_random import GAMMA_STREAM, GATE_STREAM, uniform
from common.policy import Policy
from common.reveal_likelihood import draw_set, gate_logits, set_log_prob
from common.token_scores import row_pieces
from common.trajectory import Completion
from common.weights import load_flat

CACHES = ("none", "prefix", "dual")
SMALLEST_TEMPERATURE = 1e-3  # below, tempered logits overflow
LARGEST_THRESHOLD = 1e30  # float32 holds it


@dataclass
class _FirstPass:
    """A group's forward on `z_0`, kept while members of the group wait for a slot."""

    key: tuple
    hidden: Tensor  # [L, H]
    features: Tensor  # [H]


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
        cache: str = "none",
        drift_every: int = 32,
        fixed_padding: bool = False,
        use_autocast: bool = False,
        compiled: bool = False,
        queue_limit: int = 100_000,
    ) -> None:
        """The arguments are explained in the configuration's sections `sampler` and `rollout`.

        Raises:
            UserError: when lengths exceed the model's positions, blocks do not divide, rule or cache are unknown or
                impossible with this model, or the rows do not fit the memory.
        """
        block = completion_tokens if block_length is None else block_length
        _check_lengths(policy, max_prompt_tokens, completion_tokens, block)
        for name, value, known in (("rule", rule, RULES), ("cache", cache, CACHES)):
            if value not in known:
                raise UserError(f"{name}={value!r} is unknown; give one of {', '.join(known)}")
        if compiled and cache != "none":
            raise UserError(f"cache={cache} cannot be compiled; set rollout.compile=false or sampler.cache=none")
        self.policy = policy
        self.version = 0
        self._read_calibration()
        self.slots = slots
        self._rule_name = rule
        self._use_autocast = use_autocast
        self._queue_limit = queue_limit
        self._waiting: deque[tuple[int, Request]] = deque()
        self._handles: dict[int, int] = {}
        self._submitted = 0
        self._kept: _FirstPass | None = None
        self._rows = _rows(policy, slots, max_prompt_tokens, completion_tokens, block)
        self._free = list(range(slots))[::-1]
        self._spare = slots  # stands for the kept first pass wherever a slot is asked for
        self._spare_slot = torch.tensor([slots], device=policy.device)
        self._leader = torch.zeros(slots, dtype=torch.int64, device=policy.device)
        if cache == "none":
            self._forward = ForwardPass(
                policy, self._rows, use_autocast=use_autocast, fixed_padding=fixed_padding, compiled=compiled
            )
        else:
            self._forward = CachedForwardPass(
                policy,
                self._rows,
                dual=cache == "dual",
                drift_every=drift_every,
                use_autocast=use_autocast,
                fixed_padding=fixed_padding,
            )

    @classmethod
    def of(cls, policy: Policy, config: Config, *, rule: str, slots: int, fixed_padding: bool = False) -> Self:
        """The engine that a configuration describes, in the precision that the policy's weights have."""
        sampler, rollout = config.sampler, config.rollout
        return cls(
            policy,
            slots=slots,
            rule=rule,
            max_prompt_tokens=sampler.max_prompt_tokens,
            completion_tokens=sampler.max_completion_tokens,
            block_length=sampler.block_length,
            cache=sampler.cache,
            drift_every=sampler.cache_drift_every,
            fixed_padding=fixed_padding,
            use_autocast=rollout.precision == "autocast",
            compiled=rollout.compile,
        )

    @property
    def cost(self) -> ForwardPass:
        """Counters of what was forwarded and, with a cache, of its drift."""
        return self._forward

    # -- requests -----------------------------------------------------------------------------------------------

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
            UserError: on a request that cannot be served, or when the queue is full.
        """
        self.check_prompt(request.prompt_ids)
        if not -(1 << 63) <= request.seed < 1 << 63:
            raise UserError(f"seed={request.seed}; it must fit 64 bits: give one from {-(1 << 63)} to {(1 << 63) - 1}")
        if request.temperature != 0 and not SMALLEST_TEMPERATURE <= request.temperature < math.inf:
            raise UserError(
                f"temperature={request.temperature}; use 0 for argmax or a value from {SMALLEST_TEMPERATURE} on"
            )
        self._check_threshold(request.threshold)
        length = request.completion_tokens
        whole = length is None or isinstance(length, int)
        if length is not None and (not whole or not 0 < length <= self._rows.length or length % self._rows.block):
            raise UserError(
                f"completion of {length} tokens; give 1 to {self._rows.length} (sampler.max_completion_tokens), "
                f"in blocks of {self._rows.block}"
            )
        if len(self._waiting) >= self._queue_limit:
            raise UserError(
                f"{len(self._waiting)} requests wait, queue_limit={self._queue_limit}; step() the engine before "
                "submitting more, or raise the limit"
            )
        self._submitted += 1
        self._waiting.append((self._submitted, request))
        return self._submitted

    def check_prompt(self, prompt_ids: tuple[int, ...]) -> None:
        """Raises UserError for a prompt that is empty, longer than the engine's width, or not of the vocabulary."""
        if not 0 < len(prompt_ids) <= self._rows.width:
            raise UserError(
                f"prompt of {len(prompt_ids)} tokens; it must have 1 to {self._rows.width} (sampler.max_prompt_tokens)"
            )

        size = self.policy.model.config.vocab_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < size:
            wrong = next(token for token in prompt_ids if not 0 <= token < size)
            raise UserError(f"prompt with token id {wrong}; the model's vocabulary has {size}: use its own tokenizer")

    def _check_threshold(self, threshold: float | str) -> None:
        if isinstance(threshold, str):
            if threshold not in MODES or self._rule_name not in ENTROPY_BOUND:
                raise UserError(
                    f"threshold={threshold!r} under the rule {self._rule_name}; give a number, or with "
                    f"{' or '.join(ENTROPY_BOUND)} one of {', '.join(MODES)}"
                )
            return
        smallest = 1 if self._rule_name == "top_k" else 0
        if not smallest <= threshold <= LARGEST_THRESHOLD:
            raise UserError(
                f"threshold={threshold} under the rule {self._rule_name}; give a number from {smallest} to "
                f"{LARGEST_THRESHOLD:g}"
            )

    def generate(self, requests: Iterable[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """All completions, in the order of the requests; for an engine that has nothing else to do.

        `progress` is called after every step with how many have finished. Whatever it raises, the engine is idle then
        and can be used again.

        Raises:
            UserError: for a request that cannot be served.
            RunError: when requests failed; the first reason.
        """
        if not self.idle:
            raise RuntimeError(f"generate() on an engine with {self.load} rows of other requests; step() it to its end")
        waiting, handles = iter(requests), []
        finished: dict[int, Completion | Failure] = {}
        more = True
        try:
            while more or not self.idle:
                while more and len(self._waiting) < self._queue_limit:
                    request = next(waiting, None)
                    more = request is not None
                    if request is not None:
                        handles.append(self.submit(request))
                finished.update(self.step())
                if progress is not None:
                    progress(len(finished))
        except Exception:
            self.abandon()
            raise
        completions = [outcome for outcome in map(finished.get, handles) if isinstance(outcome, Completion)]
        failures = [outcome for outcome in finished.values() if isinstance(outcome, Failure)]
        if failures:
            first = f"{failures[0].reason}; {WAY_OUT}"
            raise RunError(f"{len(failures)} of {len(handles)} requests failed; the first: {first}")
        return completions

    def latent(self, handle: int) -> np.ndarray | None:
        """`[L]` ids of a live row as it stands between two steps, MASK where nothing is revealed yet; else None."""
        slots = [slot for slot, live in self._handles.items() if live == handle]
        return self._rows.completion_ids[slots[0]].cpu().numpy().copy() if slots else None

    def abandon(self) -> None:
        """Drop all requests, waiting and live; their handles never come back."""
        live = self._rows.live.nonzero().squeeze(-1)
        self._rows.live[live] = False
        self._forward.release(live)
        self._forget()
        self._waiting.clear()
        self._handles.clear()
        self._free = list(range(self.slots))[::-1]

    def adopt(self, flat: np.ndarray, version: int) -> None:
        """Take new weights between two steps; live rows go on with them."""
        load_flat(self.policy, flat)
        self.version = version
        self._read_calibration()
        self._forward.invalidate()
        self._forget()

    def _read_calibration(self) -> None:
        calibration = self.policy.calibration
        self._gamma_scale, self._reveal_temperature = calibration.gamma_scale, calibration.reveal_temperature

    # -- one step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Completion | Failure]]:
        """Admit, run one forward, reveal, retire; returns (handle, outcome) of the rows that ended.

        Raises:
            RunError: when the forward does not fit the memory; all requests are dropped then.
        """
        try:
            return self._step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            count = len(self._handles)
            self.abandon()
            raise RunError(f"a step of {count} rows does not fit the memory; lower rollout.slots") from error

    def _step(self) -> list[tuple[int, Completion | Failure]]:
        keep = self._admit()
        if not self._handles:
            return []
        rows = self._rows
        live = rows.live.nonzero().squeeze(-1)
        fresh = rows.nfe[live] == 0
        source_slot = torch.where(fresh, self._leader[live], live)
        sources = live[source_slot == live]
        hidden, features = None, None
        if len(sources):  # none where every live row begins with the kept pass
            hidden, features = self._forward(sources, rows.nfe[sources] == 0)
        place = torch.zeros(rows.slots, dtype=torch.int64, device=live.device)
        place[sources] = torch.arange(len(sources), device=live.device)
        hidden, features = self._with_kept(hidden, features)
        place[self._spare] = len(hidden) - 1
        source = place[source_slot]
        if fresh.any() and features is not None:
            self._draw_thresholds(live[fresh], features[source[fresh]])

        active = rows.active(live)
        needed = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=live.device)
        needed[source] = active  # rows of one source are equal
        states = hidden[needed]
        entropy, top, logits = self._look(states)
        blank = entropy.new_full(needed.shape, torch.inf)
        entropies = blank.masked_scatter(needed, entropy)[source]
        tops = (-blank).masked_scatter(needed, top)[source]
        broken = (active & ~entropies.isfinite()).any(-1) | ~rows.parameter[live].isfinite()
        rows.first_entropy[live[fresh]] = _mean_entropy(entropies[fresh], active[fresh]).to(rows.first_entropy.dtype)
        chosen = self._choose(live, entropies, tops, active) & ~broken.unsqueeze(-1)
        row, position = chosen.nonzero(as_tuple=True)
        index = needed.flatten().cumsum(0).view_as(needed) - 1
        at = index[source[row], position]
        kept = None if logits is None else logits[at]
        self._reveal(live[row], position, states[at], kept, entropies[row, position])
        self._forward.share(live[fresh], source_slot[fresh])
        self._keep(keep, place, hidden, features)
        rows.nfe[live] += 1
        return self._retire(live, broken)

    def _look(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Entropy and top probability `[N]` that the reveal rule sees, at the policy's reveal temperature, and the
        logits `[N, V]` where all of them may exist at once."""
        statistics, logits = [], None
        pieces = row_pieces(len(states), self.policy.model.config.vocab_size, states.device)
        for rows in pieces:
            logits = self._logits(states[rows])
            scaled = logits if self._reveal_temperature == 1 else logits / self._reveal_temperature
            statistics.append(reveal_statistics(scaled, self.policy.vocabulary.mask_id))
        entropy, top = (torch.cat(parts) for parts in zip(*statistics, strict=True))
        return entropy, top, logits if len(pieces) == 1 else None

    def _logits(self, states: Tensor) -> Tensor:
        with autocast(states.device, enabled=self._use_autocast):
            return self.policy.logits(states)

    def _choose(self, live: Tensor, entropies: Tensor, tops: Tensor, active: Tensor) -> Tensor:
        """The positions `[N, L]` to be revealed in this step."""
        rows = self._rows
        scale = torch.where(rows.mode[live] > 0, self._gamma_scale, 1.0).to(rows.parameter.dtype)
        parameter = rows.parameter[live] * scale
        if self._rule_name != SAMPLED_ENTROPY_BOUND:
            return REVEAL_RULES[self._rule_name](entropies, tops, active, parameter)
        gates = gate_logits(entropies, active, parameter)
        position = GATE_STREAM - torch.arange(rows.length, device=live.device)
        uniforms = uniform(rows.seed[live].unsqueeze(-1), (rows.nfe[live] + 1).unsqueeze(-1), position)
        chosen = draw_set(gates, uniforms.to(gates.dtype), rows.temperature[live] == 0)
        scored = set_log_prob(gates, chosen).masked_fill(rows.temperature[live] == 0, 0.0)
        row, at = chosen.nonzero(as_tuple=True)
        rows.reveal_logprob[live[row], at] = scored[row].to(rows.reveal_logprob.dtype)
        return chosen

    def _admit(self) -> int | None:
        """Fill free slots in order of arrival; requests with the same first pass get the same leader.

        Returns the slot whose first pass is to be kept, since more requests for it wait: a new leader, the spare one
        if what is kept stays, or None if nothing is to be kept.
        """
        handles, requests, slots, leaders = [], [], [], []
        kept = None if self._kept is None else self._kept.key
        key, leader = None, -1
        while self._waiting and self._free:
            handle, request = self._waiting.popleft()
            slots.append(self._free.pop())
            if request.first_pass != key:
                key = request.first_pass
                leader = self._spare if key == kept else slots[-1]
            handles.append(handle)
            requests.append(request)
            leaders.append(leader)
        if not requests:
            return self._spare
        self._handles.update(zip(slots, handles, strict=True))
        where = torch.tensor(slots, device=self._leader.device)
        self._leader[where] = torch.tensor(leaders, device=where.device)
        self._rows.place(where, requests)
        return leader if self._waiting and self._waiting[0][1].first_pass == key else None

    def _with_kept(self, hidden: Tensor | None, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The kept first pass as one more source, the last; or the only one, where nothing was forwarded."""
        if self._kept is None:
            if hidden is None:
                raise RuntimeError("live rows were neither forwarded nor begin with a kept first pass")
            return hidden, features
        own = self._kept.features
        if hidden is None:
            return self._kept.hidden[None], own[None]
        if features is None:
            features = own.new_zeros(len(hidden), len(own))
        return torch.cat([hidden, self._kept.hidden[None]]), torch.cat([features, own[None]])

    def _keep(self, leader: int | None, place: Tensor, hidden: Tensor, features: Tensor | None) -> None:
        """Keep the first pass of `leader` for those of its group that wait; the spare slot: leave what is kept."""
        if leader == self._spare:
            return
        self._forget()
        if leader is not None and features is not None:
            at = int(place[leader])
            self._kept = _FirstPass(self._waiting[0][1].first_pass, hidden[at].clone(), features[at].clone())
            self._forward.share(self._spare_slot, torch.full_like(self._spare_slot, leader))

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept = None
            self._forward.release(self._spare_slot)

    def _draw_thresholds(self, slots: Tensor, features: Tensor) -> None:
        """Threshold of each row that begins, from the prompt features `[N, H]` of its first pass."""
        rows, head = self._rows, self.policy.head
        learned = rows.mode[slots] > 0
        if not learned.any():
            return
        slots, features = slots[learned], features[learned]
        sampled = rows.mode[slots] == MODES["sample"]
        drawn = head.sample(features, uniform(rows.seed[slots], 0, GAMMA_STREAM))
        fixed = rows.mode[slots] == MODES["initial"]
        gamma = torch.where(sampled, drawn, head.mean(features)).masked_fill(fixed, head.config.gamma_init)
        rows.parameter[slots] = gamma.to(rows.parameter.dtype)
        logprob = torch.where(sampled, head.log_prob(features, gamma), torch.zeros_like(gamma))
        rows.parameter_logprob[slots] = logprob.to(rows.parameter_logprob.dtype)

    def _reveal(self, slots: Tensor, position: Tensor, states: Tensor, logits: Tensor | None, entropy: Tensor) -> None:
        """Draw one token for each of the `[K]` chosen positions, and record how; without logits, from the states."""
        rows, mask_id = self._rows, self.policy.vocabulary.mask_id
        step = rows.nfe[slots] + 1
        uniforms, temperature = uniform(rows.seed[slots], step, position), rows.temperature[slots]
        if logits is None:
            pieces = row_pieces(len(states), self.policy.model.config.vocab_size, states.device)
            drawn = [draw_tokens(self._logits(states[p]), temperature[p], uniforms[p], mask_id) for p in pieces]
            tokens, logprob = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        else:
            tokens, logprob = draw_tokens(logits, temperature, uniforms, mask_id)
        rows.completion_ids[slots, position] = tokens
        rows.reveal_step[slots, position] = step
        rows.logprob[slots, position] = logprob.to(rows.logprob.dtype)
        rows.entropy[slots, position] = entropy.to(rows.entropy.dtype)
        rows.token_version[slots, position] = self.version

    def _retire(self, live: Tensor, broken: Tensor) -> list[tuple[int, Completion | Failure]]:
        """Free the slots of rows that are finished or broken."""
        rows = self._rows
        done, stopped = rows.finished(live)
        done &= ~broken
        over = live[done | broken]
        if not len(over):
            return []
        failed, finished = live[broken].tolist(), live[done]
        ended: list[tuple[int, Completion | Failure]] = []
        for slot in failed:
            handle, nfe = self._handles[slot], int(rows.nfe[slot])
            reason = f"logits or threshold are not finite: request {handle}, version {self.version}, step {nfe}"
            ended.append((handle, Failure(reason)))
        completions = rows.collect(finished, stopped[done])
        ended += zip((self._handles[slot] for slot in finished.tolist()), completions, strict=True)
        rows.live[over] = False
        self._forward.release(over)
        for slot in over.tolist():
            del self._handles[slot]
            self._free.append(slot)
        return ended


def _mean_entropy(entropies: Tensor, active: Tensor) -> Tensor:
    return entropies.masked_fill(~active, 0.0).sum(-1) / active.sum(-1).clamp(min=1)


def _check_lengths(policy: Policy, prompt: int, completion: int, block: int) -> None:
    """Refuse blocks that do not divide the completion, and what the model has no positions for."""
    if completion < 1 or block < 1 or completion % block:
        raise UserError(
            f"block_length={block} does not divide completion_tokens={completion}; choose a divisor, and a length of "
            "at least 1"
        )
    if prompt + completion > policy.max_positions:
        raise UserError(
            f"prompt of {prompt} + completion of {completion} tokens exceed the model's {policy.max_positions} "
            "positions; shorten the prompt or the completion (sampler.max_completion_tokens, --tokens)"
        )


def _rows(policy: Policy, slots: int, width: int, length: int, block: int) -> Rows:
    """`slots` rows and a spare one, the last, which is never live."""
    try:
        return Rows(
            slots=slots + 1,
            width=width,
            length=length,
            block=block,
            vocabulary=policy.vocabulary,
            device=policy.device,
            dtype=torch.promote_types(policy.model.dtype, torch.float32),
        )
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"slots={slots} rows of {width + length} tokens do not fit the memory of {policy.device}: "
            f"{str(error).splitlines()[0][:120]}; lower rollout.slots"
        ) from error
