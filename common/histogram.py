"""Histogram: how many values fell into each bucket of a metric, and their sum; its size is fixed by the catalogue."""

from bisect import bisect_left

from common.metrics import CATALOGUE


def bucket_keys(name: str) -> list[str]:
    """The keys under which the buckets of a catalogue name are reported, ascending; the last one holds everything."""
    return [f"{name}_bucket{{le={bound}}}" for bound in (*(f"{bound:g}" for bound in CATALOGUE[name].bounds), "+Inf")]


def reported_keys(name: str) -> list[str]:
    """All keys of `Histogram.values`."""
    return [*bucket_keys(name), f"{name}_sum"]


class Histogram:
    """Owned by whoever sees the values; counters that only grow, so those of several owners may be added."""

    def __init__(self, name: str) -> None:
        self._bounds, self._keys = CATALOGUE[name].bounds, bucket_keys(name)
        self._sum_key = f"{name}_sum"
        self._counts = [0] * len(self._keys)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the first bucket whose bound it does not exceed."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def values(self) -> dict[str, float]:
        """`name_bucket{le=1}`: values up to 1; `name_sum`: their sum. May be called from another thread."""
        found, total = {}, 0
        for key, count in zip(self._keys, list(self._counts), strict=True):
            total += count
            found[key] = float(total)
        return found | {self._sum_key: self._sum}
