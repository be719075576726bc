"""KeyValuePages: keys and values kept between the steps of a block (Fast-dLLM, arXiv 2505.22618).

- A block's first step is a full forward that leaves the keys and values of every column in a *page*. Until the block
  ends, later steps forward only some columns (`prefix`: from the block on; `dual`: the block alone) and take the rest
  from the page, as it was: an approximation, since in a bidirectional model every reveal changes every column.
- The completions of a group share the page of their forward on `z_0`: one copy of the prompt's keys and values.
- Pages are counted by the rows that hold them, so as many pages as rows suffice.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache


class KeyValuePages:
    """All pages of one engine; allocated when the first keys arrive, since their shape is the model's business."""

    def __init__(self, pages: int, columns: int, device: torch.device) -> None:
        self._columns = columns
        self._layers: dict[tuple[int, str], Tensor] = {}
        self._holders = torch.zeros(pages, dtype=torch.int64, device=device)

    def take(self, count: int) -> Tensor:
        """`[count]` pages that nobody holds, now held once."""
        pages = (self._holders == 0).nonzero().squeeze(-1)[:count]
        self._holders[pages] = 1
        return pages

    def hold(self, pages: Tensor) -> None:
        """One more holder of each of `pages` `[N]`, which may repeat."""
        self._holders.index_add_(0, pages, torch.ones_like(pages))

    def release(self, pages: Tensor) -> None:
        """One holder less of each of `pages` `[N]`, which may repeat."""
        self._holders.index_add_(0, pages, -torch.ones_like(pages))

    @property
    def held(self) -> int:
        """Pages in use."""
        return int((self._holders > 0).sum())

    def record(self, pages: Tensor, first: int) -> Cache:
        """For a full forward of columns `first` on: what it computes goes into `pages` `[N]`."""
        return _Recorder(self, pages, first)

    def complete(self, pages: Tensor, columns: Tensor, first: int, last: int) -> Cache:
        """For a forward of `columns` `[N, Q]`, counted from `first`: others up to `last` come from `pages` `[N]`."""
        return _Completer(self, pages, columns, first, last)

    def store(self, layer: int, kind: str, pages: Tensor, first: int, values: Tensor) -> None:
        """Write `[N, heads, T, D]` of one layer, 0 at other columns; `kind` is keys or values.

        A later pass may load more columns than were computed. Nothing attends to them, but what the page's last holder
        left there must not be NaN, which a weight of 0 would not remove.
        """
        _, heads, width, size = values.shape
        if (layer, kind) not in self._layers:
            self._layers[layer, kind] = values.new_zeros(len(self._holders), heads, self._columns, size)
        left, right = first, self._columns - first - width
        self._layers[layer, kind][pages] = pad(values, (0, 0, left, right))

    def load(self, layer: int, kind: str, pages: Tensor, first: int, last: int) -> Tensor:
        """A copy `[N, heads, last - first, D]` of one layer."""
        return self._layers[layer, kind][:, :, first:last][pages]


class _Recorder(Cache):
    """What the model hands its keys and values to; it attends to what it handed over."""

    def __init__(self, store: KeyValuePages, pages: Tensor, first: int) -> None:
        super().__init__(layers=[])
        self._store, self._pages, self._first = store, pages, first

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        self._store.store(layer_idx, "keys", self._pages, self._first, key_states)
        self._store.store(layer_idx, "values", self._pages, self._first, value_states)
        return key_states, value_states


class _Completer(Cache):
    """Puts the fresh columns among the kept ones, which the model then attends to."""

    def __init__(self, store: KeyValuePages, pages: Tensor, columns: Tensor, first: int, last: int) -> None:
        super().__init__(layers=[])
        self._store, self._pages, self._columns, self._first, self._last = store, pages, columns, first, last

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        return self._among(layer_idx, "keys", key_states), self._among(layer_idx, "values", value_states)

    def _among(self, layer: int, kind: str, fresh: Tensor) -> Tensor:
        kept = self._store.load(layer, kind, self._pages, self._first, self._last)
        return kept.scatter_(2, self._columns[:, None, :, None].expand_as(fresh), fresh.to(kept.dtype))
