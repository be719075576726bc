"""CachedForwardPass: a block's first step is exact, later ones compute few columns and take the rest from a page.

Fast-dLLM (arXiv 2505.22618): `prefix` computes the columns from the active block on, `dual` those of the block alone.
Where the column before a position predicts it (`Policy.shift`), both begin one column earlier.
A pass on fewer columns still counts as one function evaluation; `token_forwards` shows what was saved.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from actors.forward_pass import ForwardPass
from actors.key_value_pages import KeyValuePages
from actors.rows import Rows
from common.autocast import autocast
from common.behaviour import reveal_log_probs
from common.policy import Policy, check_cache
from common.token_scores import row_pieces

NONE = -1


class CachedForwardPass(ForwardPass):
    """Approximate; how far from exact is measured on one row in every `drift_every` passes (0: never)."""

    def __init__(
        self, policy: Policy, rows: Rows, *, dual: bool, drift_every: int, use_autocast: bool, fixed_padding: bool
    ) -> None:
        check_cache(policy.model)
        super().__init__(policy, rows, use_autocast=use_autocast, fixed_padding=fixed_padding)
        self._dual, self._drift_every = dual, drift_every
        self._pages = KeyValuePages(rows.slots, rows.width + rows.length, policy.device)
        self._page = torch.full((rows.slots,), NONE, device=policy.device)
        self._block = torch.full_like(self._page, NONE)
        self._passes = 0

    def __call__(self, slots: Tensor, begins: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = self._rows
        first, last = self._window(slots)
        block = rows.active_block(slots)
        stale = self._block[slots] != block
        self._take_pages(slots[stale], block[stale])
        hidden, features = None, None
        if stale.any():
            cache = self._pages.record(self._page[slots[stale]], first)
            full = self._full(slots[stale], first, last, cache)
            completion = self._completion(full, first)
            hidden = completion.new_zeros(len(slots), *completion.shape[1:])
            hidden[stale] = completion
            found = self._features(full, slots[stale], begins[stale], first, last)
            if found is not None:
                features = found.new_zeros(len(slots), found.shape[-1])
                features[stale] = found
        kept = (~stale).nonzero().squeeze(-1)
        for index in self._alike(kept, block):
            columns, part = self._partial(slots[index], block[index], first, last)
            if hidden is None:
                hidden = part.new_zeros(len(slots), rows.length, part.shape[-1])
            hidden[index.unsqueeze(-1), columns - rows.width] = part
        if hidden is None:
            raise RuntimeError("a forward pass of no rows; the engine passes at least one")
        self._passes += 1
        if len(kept) and self._drift_every and self._passes % self._drift_every == 0:
            at = int(kept[self._passes // self._drift_every % len(kept)])
            self._probe(slots[at : at + 1], hidden[at : at + 1], first, last)
        return hidden, features

    def share(self, slots: Tensor, sources: Tensor) -> None:
        follow = slots != sources
        self._page[slots[follow]] = self._page[sources[follow]]
        self._block[slots[follow]] = self._block[sources[follow]]
        self._pages.hold(self._page[slots[follow]])

    def release(self, slots: Tensor) -> None:
        pages = self._page[slots]
        self._pages.release(pages[pages != NONE])
        self._page[slots] = NONE
        self._block[slots] = NONE

    def invalidate(self) -> None:
        self._block.fill_(NONE)

    def _take_pages(self, slots: Tensor, block: Tensor) -> None:
        self.release(slots)
        self._page[slots] = self._pages.take(len(slots))
        self._block[slots] = block

    def _alike(self, kept: Tensor, block: Tensor) -> list[Tensor]:
        """Rows that can be forwarded together: with `dual` all, with `prefix` those in the same block."""
        if self._dual:
            return [kept] if len(kept) else []
        return [kept[block[kept] == one] for one in block[kept].unique()]

    def _partial(self, slots: Tensor, block: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Columns `[N, Q]` from the active block on, and their hidden states `[N, Q, H]`.

        A shifted model computes the column before them, too: it predicts the first, and there is one, since no prompt
        is empty.
        """
        rows, lead = self._rows, self._policy.shift
        start = rows.width + block * rows.block - lead
        count = rows.block + lead if self._dual else last - int(start[0])
        columns = start.unsqueeze(-1) + torch.arange(count, device=slots.device)
        self._count(len(slots), columns.numel())
        cache = self._pages.complete(self._page[slots], columns - first, first, last)
        with autocast(slots.device, enabled=self._use_autocast):
            hidden = self._policy.hidden(
                rows.ids[slots].gather(1, columns),
                rows.attended[slots, first:last],
                columns=columns - first,
                cache=cache,
            )
        return columns[:, lead:], hidden[:, lead:]

    def _probe(self, slots: Tensor, cached: Tensor, first: int, last: int) -> None:
        """Hold one row's cached hidden states `[1, L, H]` against an exact pass, at masked positions of its block."""
        exact = self._completion(self._full(slots, first, last), first)
        active = self._rows.active(slots)
        mask_id = self._policy.vocabulary.mask_id
        states, sampling = exact[active], cached[active]
        for rows in row_pieces(len(states), self._policy.model.config.vocab_size, states.device):
            with autocast(slots.device, enabled=self._use_autocast):
                both = [self._policy.logits(hidden[rows]) for hidden in (states, sampling)]
            true, sampled = (reveal_log_probs(logits, mask_id) for logits in both)
            self.probed_positions += len(true)
            self.probed_kl += float(kl_div(sampled, true, reduction="none", log_target=True).nan_to_num(0.0).sum())
            self.probed_flips += int((true.argmax(-1) != sampled.argmax(-1)).sum())
