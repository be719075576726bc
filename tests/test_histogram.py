"""Histogram: what it says about values is what numpy says, and those of several owners may be added."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.histogram import Histogram, bucket_keys, reported_keys
from common.metrics import CATALOGUE

HISTOGRAMS = [metric for metric in CATALOGUE.values() if metric.kind == "histogram"]
VALUES = st.lists(st.one_of(st.sampled_from(CATALOGUE["rollout_completion_nfe"].bounds), st.floats(-5, 600)))


@given(one=VALUES, other=VALUES)
def test_buckets_hold_the_values_up_to_their_bound(one: list[float], other: list[float]) -> None:
    found = []
    for values in (one, other):
        histogram = Histogram("rollout_completion_nfe")
        for value in values:
            histogram.observe(value)
        found.append(histogram.values())
    together = {key: found[0][key] + found[1][key] for key in found[0]}
    everything = np.array([*one, *other])
    bounds = (*CATALOGUE["rollout_completion_nfe"].bounds, float("inf"))
    assert [together[key] for key in bucket_keys("rollout_completion_nfe")] == [(everything <= b).sum() for b in bounds]
    assert together["rollout_completion_nfe_sum"] == pytest.approx(everything.sum())
    assert list(together) == reported_keys("rollout_completion_nfe")


def test_bounds_of_the_catalogue_ascend_and_have_names_of_their_own() -> None:
    assert HISTOGRAMS
    for metric in HISTOGRAMS:
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert len(set(bucket_keys(metric.name))) == len(metric.bounds) + 1
        assert not metric.labels
    assert not any(metric.bounds for metric in CATALOGUE.values() if metric.kind != "histogram")
