"""BufferGauges: what one reading after the other shows."""

import pytest

from common.errors import RunError
from common.ledger import GroupState
from common.metrics import CATALOGUE, split_labels
from learner.buffer_gauges import METRICS, MOST_QUARANTINED, STALENESS_KEYS, BufferGauges, in_catalogue

NOTHING = {f"groups_{state}": 0.0 for state in GroupState}
NOTHING |= {"born": 0.0, "lost_before": 0.0, "expired_leases": 0.0, "no_spread_discards": 0.0, "lost_groups": 0.0}


def test_only_groups_that_can_be_trained_are_progress() -> None:
    seen = BufferGauges()
    seen.see(NOTHING)
    for state, progress in [("leased", False), ("discarded", False), ("quarantined", False), ("finished", True)]:
        seen.see(NOTHING | {f"groups_{state}": 3.0})
        assert seen.progressed == progress, state
    seen.see(NOTHING | {"groups_finished": 3.0})
    assert not seen.progressed, "nothing new"


def test_deaths_of_the_buffer_are_counted_and_returns_of_the_learner_are_not() -> None:
    seen = BufferGauges()
    for born, restarts in zip((2.0, 2.0, 4.0, 4.0, 6.0), (0, 0, 1, 1, 2), strict=True):
        seen.see(NOTHING | {"born": born})
        assert seen.restarts == restarts


def test_failures_in_a_row_are_too_many_and_failures_between_results_are_not() -> None:
    seen = BufferGauges()
    failed = trained = 0.0
    for _ in range(3):
        failed += MOST_QUARANTINED - 1
        seen.see(NOTHING | {"groups_quarantined": failed, "groups_trained": trained})
        assert seen.failed
        seen.reported()
        seen.check_failures("ValueError: no number")
        trained += 8
        seen.see(NOTHING | {"groups_quarantined": failed, "groups_trained": trained})
        assert not seen.failed
    failed += MOST_QUARANTINED
    seen.see(NOTHING | {"groups_quarantined": failed, "groups_trained": trained})
    with pytest.raises(RunError, match=r"100 groups in a row failed.*the last: ValueError: no number"):
        seen.check_failures("ValueError: no number")


def test_bytes_that_are_lost_are_news_once() -> None:
    seen = BufferGauges()
    told = []
    for lost in (0.0, 3.0, 3.0, 5.0):
        seen.see(NOTHING | {"lost_groups": lost})
        told.append(seen.lost)
    assert told == [0.0, 3.0, 0.0, 5.0]


def test_what_an_earlier_controller_told_is_no_news() -> None:
    before = NOTHING | {"born": 2.0, "lost_before": 3.0, "lost_groups": 3.0, "groups_quarantined": 5.0}
    seen = BufferGauges(reported=4)
    seen.see(before)
    assert seen.failed, "its driver was killed before it could report the fifth"
    seen = BufferGauges()
    seen.see(before | {"lost_groups": 7.0})
    assert seen.lost == 7.0, "what this very recovery lost is news"
    seen = BufferGauges(reported=5)
    seen.see(before)
    assert (seen.lost, seen.failed) == (0.0, False)
    seen.see(before | {"lost_groups": 4.0, "groups_quarantined": 6.0})
    assert (seen.lost, seen.failed) == (4.0, True)
    seen.see(before | {"lost_groups": 4.0, "groups_quarantined": 6.0})
    assert seen.failed, "no report was written"
    seen.reported()
    seen.see(before | {"lost_groups": 4.0, "groups_quarantined": 6.0})
    assert not seen.failed


def test_groups_that_cannot_be_trained_are_counted_since_the_last_progress_with_the_way_out() -> None:
    seen = BufferGauges()
    seen.see(NOTHING)
    assert seen.untrainable == ""
    failures = NOTHING | {"groups_discarded": 7.0, "no_spread_discards": 7.0, "groups_quarantined": 2.0}
    seen.see(failures)
    assert "7 groups were discarded since for equal rewards (a longer warm start" in seen.untrainable
    assert "2 quarantined" in seen.untrainable
    seen.see(failures | {"groups_trained": 8.0})
    assert seen.untrainable == ""
    seen.see(failures | {"groups_trained": 8.0, "no_spread_discards": 9.0})
    assert "2 groups were discarded since" in seen.untrainable
    assert "0 quarantined" in seen.untrainable


def test_a_deadline_that_is_too_short_is_told_once_with_a_longer_one() -> None:
    seen = BufferGauges()
    short = {"rollout_longest_pause_seconds": 4.0, "rollout_longest_group_seconds": 1.0}
    long = short | {"rollout_longest_pause_seconds": 8.0}
    seen.see(NOTHING)
    assert seen.late_renewals({}, deadline=10.0) == "", "nothing ran out, so nobody is asked"
    seen.see(NOTHING | {"expired_leases": 2.0})
    assert seen.late_renewals(short, deadline=10.0) == "", "an actor that died lets its leases run out too"
    text = seen.late_renewals(long, deadline=10.0)
    assert text.startswith("2 leases ran out: replay.lease_seconds is 10")
    assert text.endswith("give 24 or more")
    assert seen.late_renewals(long, deadline=10.0) == ""


def test_what_is_exported_is_in_the_catalogue() -> None:
    gauges = NOTHING | dict.fromkeys([*METRICS, *STALENESS_KEYS], 1.0)
    named = in_catalogue(gauges | {"waiting_actors": 1.0})
    assert len(named) == len(METRICS) + len(STALENESS_KEYS) + len(GroupState), "and nothing else"
    assert {split_labels(key)[0] for key in named} <= set(CATALOGUE)
