"""ForwardPass: one function evaluation of some rows, and what it cost.

- Only columns that some row of the pass attends to are computed, unless padding is fixed.
- Compiled passes see few shapes: padding is fixed and the number of rows is rounded up to a multiple of a bucket.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from actors.rows import Rows
from common.autocast import autocast
from common.policy import Policy

BUCKETS = 8  # a compiled pass sees at most this many batch sizes


class ForwardPass:
    """Exact: every pass computes all columns. Belongs to an engine and reads its rows."""

    def __init__(
        self, policy: Policy, rows: Rows, *, use_autocast: bool, fixed_padding: bool = False, compiled: bool = False
    ) -> None:
        self._policy, self._rows = policy, rows
        self._use_autocast = use_autocast
        self._fixed_padding = fixed_padding or compiled
        most = rows.slots - 1  # the engine's; the last row is a spare one that is never forwarded
        self._bucket = math.ceil(most / BUCKETS) if compiled else 1
        self._hidden = torch.compile(policy.hidden, dynamic=False) if compiled else policy.hidden
        self.calls = 0
        """Forward passes of the model, of any number of rows."""
        self.row_forwards = 0
        """Rows forwarded, those of drift probes included."""
        self.token_forwards = 0
        """Columns forwarded, padding included; what a cache saves."""
        self.probed_positions = 0
        """Masked positions of active blocks at which a cached pass was held against an exact one."""
        self.probed_kl = 0.0
        """Sum over these of KL(exact || cached), nats."""
        self.probed_flips = 0
        """How many of these have another most probable token."""

    def __call__(self, slots: Tensor, begins: Tensor) -> tuple[Tensor, Tensor | None]:
        """Forward the rows in `slots` `[F]` on their latents as they stand.

        Args:
            slots: `[F]` slots.
            begins: `[F]` bool, rows whose threshold is still to be drawn.

        Returns:
            hidden states of the completions `[F, L, H]`, and prompt features `[F, H]` of the rows that begin (zeros
            elsewhere), None when none does.
        """
        first, last = self._window(slots)
        hidden = self._full(slots, first, last)
        return self._completion(hidden, first), self._features(hidden, slots, begins, first, last)

    def share(self, slots: Tensor, sources: Tensor) -> None:
        """Rows `slots` `[N]` began with the first pass of the rows `sources` `[N]`."""

    def release(self, slots: Tensor) -> None:
        """Rows `slots` `[N]` have ended."""

    def invalidate(self) -> None:
        """The weights have changed."""

    def _window(self, slots: Tensor) -> tuple[int, int]:
        """First column that is attended to in any of the rows, and the one after the last."""
        if self._fixed_padding:
            return 0, self._rows.width + self._rows.length
        columns = self._rows.attended[slots].any(0).nonzero()
        return int(columns[0]), int(columns[-1]) + 1

    def _full(self, slots: Tensor, first: int, last: int, cache: Cache | None = None) -> Tensor:
        """Hidden states `[F, last - first, H]`."""
        count = len(slots)
        padded = slots if count % self._bucket == 0 else pad(slots, (0, -count % self._bucket), value=int(slots[0]))
        self._count(len(padded), len(padded) * (last - first))
        ids, attended = self._rows.ids[padded, first:last], self._rows.attended[padded, first:last]
        with autocast(slots.device, enabled=self._use_autocast):
            return self._hidden(ids, attended, cache=cache)[:count]

    def _completion(self, hidden: Tensor, first: int) -> Tensor:
        """`[F, T, H]` from column `first` on -> `[F, L, H]`, zeros beyond the last column."""
        part = hidden[:, self._rows.width - first :]
        missing = self._rows.length - part.shape[1]
        return pad(part, (0, 0, 0, missing)) if missing else part

    def _features(self, hidden: Tensor, slots: Tensor, begins: Tensor, first: int, last: int) -> Tensor | None:
        if not begins.any():
            return None
        prompt = self._rows.attended[slots[begins], first:last].clone()
        prompt[:, self._rows.width - first :] = False
        part = self._policy.prompt_features(hidden[begins], prompt)
        features = part.new_zeros(len(slots), part.shape[-1])
        features[begins] = part
        return features

    def _count(self, rows: int, tokens: int) -> None:
        self.calls += 1
        self.row_forwards += rows
        self.token_forwards += tokens
