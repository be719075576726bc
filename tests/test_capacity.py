"""Capacity: the learner's place is given back once, so that the evaluation can have it."""

import pytest

from common.config_file import parse_config
from learner import capacity as capacity_module
from learner.capacity import Capacity


def test_the_place_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[object] = []
    monkeypatch.setattr(capacity_module, "remove_placement_group", removed.append)
    capacity = Capacity(parse_config({"task": {"name": "sudoku"}}))
    capacity.release()
    assert removed == [], "a learner that reserves nothing has none"
    place = object()
    monkeypatch.setattr(capacity, "group", place)
    capacity.release()
    capacity.release()
    assert removed == [place]
