"""The replay buffer: what blocks, what wakes it, what is late, and that no schedule breaks an invariant."""

import asyncio
import gc
import random
import shutil
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from circulation_fixtures import Clock, fill, grant, result, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_fixtures import Gate, until

from common.admission import ADMISSIONS
from common.errors import RunError, UserError
from common.ledger import GroupState, Ledger, LedgerError
from common.replay_buffer import FinishedGroup, Lease, ReplayBuffer, Sample
from common.segment_folder import SegmentFolder
from common.segment_store import SegmentStore
from common.weight_store import UNPUBLISHED, WeightStore

T = TypeVar("T")


def make(**changed: Any) -> ReplayBuffer:
    values = {"groups_per_step": 2, "max_staleness": 1, "lease_seconds": 60.0, "drop_no_spread": False}
    return ReplayBuffer(**{"store": in_memory(2**20), **values, **changed})


def in_memory(memory_bytes: int) -> SegmentStore:
    """A store whose files lie in a file system of its own, in memory."""
    return SegmentStore("mock:///segments", memory_bytes=memory_bytes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def settle() -> None:
    """Lets every task run that can run without time passing."""
    for _ in range(10):
        await asyncio.sleep(0)


async def blocked(call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    task = asyncio.ensure_future(call)
    await settle()
    assert not task.done()
    return task


async def started(**changed: Any) -> ReplayBuffer:
    buffer = make(**changed)
    await buffer.publish(weights(0), [])
    return buffer


async def test_a_group_goes_round() -> None:
    buffer = make()
    waiting = await blocked(buffer.lease("a", 8))
    await buffer.publish(weights(0), [])
    reply = await waiting
    assert [(x.number, x.cursor, x.attempt, x.version, x.seconds) for x in reply.leases] == [
        (n, n, 1, 0, 60.0) for n in range(4)
    ]
    assert (reply.snapshot, reply.closed) == (weights(0), False)
    learner = await blocked(buffer.sample())
    accepted = await buffer.submit("a", [result(reply.leases[1])])
    assert (accepted.accepted, accepted.late, accepted.snapshot) == ([1], [], weights(0))
    await settle()
    assert not learner.done()  # window 1: group 0 comes first
    await buffer.submit("a", [result(reply.leases[0])])
    batch = await learner
    assert (batch.numbers, batch.payloads, batch.version, batch.staleness) == (
        [0, 1],
        [b"group 0", b"group 1"],
        0,
        [0, 0],
    )
    more = await blocked(buffer.lease("a", 8))
    await buffer.publish(weights(1), batch.numbers)
    assert [(x.number, x.version) for x in (await more).leases] == [(4, 1), (5, 1)]
    gauges = await buffer.gauges()
    assert (gauges["groups_trained"], gauges["groups_leased"], gauges["tickets"], gauges["version"]) == (2, 4, 4, 1)
    assert (gauges["held_bytes"], gauges["completions"], gauges["wasted_groups"]) == (0, 8, 0)
    buckets = [gauges[f"replay_group_staleness_bucket{{le={bound}}}"] for bound in (0, 1, "+Inf")]
    assert (buckets, gauges["replay_group_staleness_sum"]) == ([2, 2, 2], 0)
    assert vars(Ledger.from_journal(buffer._ledger.journal())) == vars(buffer._ledger)


async def test_staleness_0_leases_only_after_the_batch_was_trained_and_published() -> None:
    buffer = await started(max_staleness=0)
    await fill(buffer, 8)
    waiting = await blocked(buffer.lease("a", 8))
    batch = await buffer.sample()
    await settle()
    assert not waiting.done()
    await buffer.publish(weights(1), batch.numbers)
    assert [lease.version for lease in (await waiting).leases] == [1, 1]


async def test_late_duplicate_unknown_and_foreign_results_are_counted_and_not_stored() -> None:
    buffer = await started()
    first, second, *_ = await grant(buffer, 4)
    await buffer.return_worker("a")
    (again,) = await grant(buffer, 1, "b")
    assert (again.number, again.attempt) == (0, 2)
    reply = await buffer.submit("a", [result(first), result(second)])
    assert (reply.accepted, reply.late) == ([], [0, 1])
    reply = await buffer.submit("b", [result(again), result(again)])
    assert (reply.accepted, reply.late) == ([0], [0])
    reply = await buffer.submit("b", [result(again), result(Lease(99, 99, 1, 0, 1.0))])
    assert (reply.accepted, reply.late) == ([], [0, 99])
    gauges = await buffer.gauges()
    assert (gauges["late_results"], gauges["wasted_groups"], gauges["groups_finished"]) == (5, 1, 1)


async def test_an_earlier_attempt_s_lease_is_lost_though_the_same_worker_has_the_group_again() -> None:
    clock = Clock()
    buffer = await started(clock=clock)
    (first,) = await grant(buffer, 1)
    clock.now = 70.0
    (again,) = await grant(buffer, 1)
    assert (first.number, first.attempt, again.number, again.attempt) == (0, 1, 0, 2)
    assert (await buffer.renew("a", [(0, 1), (0, 2)])).lost == [(0, 1)]
    assert (await buffer.submit("a", [result(first)])).late == [0]
    assert (await buffer.submit("a", [result(again)])).accepted == [0]


async def test_a_batch_that_is_held_back_beyond_its_bound_is_refused_at_publication() -> None:
    buffer = await started(max_staleness=1)
    await fill(buffer, 4)
    held, first = await buffer.sample(), await buffer.sample()
    await buffer.publish(weights(1), first.numbers)
    await fill(buffer, 2)
    later = await buffer.sample()
    await buffer.publish(weights(2), later.numbers)
    with pytest.raises(RuntimeError, match="staleness above the bound 1"):
        await buffer.publish(weights(3), held.numbers)
    assert ((await buffer.gauges())["violations"], buffer.version) == (1, 2)


async def test_what_was_generated_is_told_over_a_step_s_worth_though_it_comes_in_bursts() -> None:
    buffer = await started(max_staleness=2)
    leases = await grant(buffer, 6)
    rewarded = [replace(result(lease), reward=float(lease.number)) for lease in leases]
    await buffer.submit("a", rewarded[:4])
    first = await buffer.sample()
    assert first.generated == {"reward": 1.5, "nfe": 0.0}
    assert (await buffer.sample()).generated == first.generated  # nothing came in between
    await buffer.submit("a", rewarded[4:])
    assert (await buffer.sample()).generated == {"reward": 4.5, "nfe": 0.0}


async def test_a_drained_worker_keeps_its_leases_and_is_granted_no_more() -> None:
    buffer = await started()
    (lease,) = await grant(buffer, 1)
    await buffer.drain("a")
    reply = await buffer.lease("a", 4)
    assert (reply.leases, reply.closed) == ([], True)
    assert (await buffer.renew("a", [(lease.number, 1)])).lost == []
    assert (await buffer.submit("a", [result(lease)])).accepted == [0]
    assert [x.number for x in await grant(buffer, 4, "b")] == [1, 2, 3]


async def test_what_has_grown_too_old_is_dropped_its_file_too_and_its_tickets_are_free() -> None:
    store = in_memory(2**20)
    buffer = await started(max_staleness=0, admission="drop_when_stale", store=store)
    await fill(buffer, 4)  # two steps' worth, of version 0
    batch = await buffer.sample()
    await buffer.publish(weights(1), batch.numbers)
    learner = await blocked(buffer.sample())  # the other two are of version 0: too old
    gauges = await buffer.gauges()
    assert (gauges["stale_discards"], gauges["tickets"]) == (2, 0)
    await fill(buffer, 2)
    assert (await learner).staleness == [0, 0]
    await buffer.settle(buffer._ledger.length)
    await store.settle()
    assert (await buffer.gauges())["segments"] == 1


async def test_aggregate_lead_promises_no_bound_and_lets_a_slow_group_be_overtaken() -> None:
    buffer = await started(max_staleness=1, admission="aggregate_lead")
    slow, *others = await grant(buffer, 4)
    for version in range(1, 4):
        await buffer.submit("a", [result(lease) for lease in others[:2]])
        batch = await buffer.sample()
        await buffer.publish(weights(version), batch.numbers)
        others = others[2:] + await grant(buffer, 2)
    await buffer.submit("a", [result(slow), result(others[0])])
    assert max((await buffer.sample()).staleness) == 3
    assert (await buffer.gauges())["staleness_bound"] == -1


async def test_a_group_without_spread_frees_its_ticket_at_once_and_is_replaced() -> None:
    buffer = await started(drop_no_spread=True, groups_limit=4)
    leases = await grant(buffer, 8)
    waiting = await blocked(buffer.lease("b", 8))
    await buffer.submit("a", [result(leases[0], spread=0.0), result(leases[1])])
    assert [lease.number for lease in (await waiting).leases] == [4]
    gauges = await buffer.gauges()
    assert (gauges["no_spread_discards"], gauges["groups_discarded"], gauges["tickets"]) == (1, 1, 4)
    await buffer.submit("a", [result(leases[2])])
    assert (await buffer.sample()).numbers == [1, 2]
    await blocked(buffer.lease("b", 8))  # four that count were numbered: the limit


async def test_tokens_older_than_the_lease_are_refused() -> None:
    buffer = await started()
    numbers = await fill(buffer, 2)
    await buffer.sample()
    await buffer.publish(weights(1), numbers)
    fine, wrong, *_ = await grant(buffer, 4)
    for oldest in (0, 2):
        with pytest.raises(RuntimeError, match=f"group 3 of worker a has a token of version {oldest}"):
            await buffer.submit("a", [result(fine), result(wrong, oldest=oldest)])
    gauges = await buffer.gauges()
    assert (gauges["violations"], gauges["groups_finished"]) == (2, 0)
    assert (await buffer.submit("a", [result(fine), result(wrong)])).accepted == [2, 3]


async def test_infrastructure_failures_go_back_and_data_failures_end_in_quarantine() -> None:
    buffer = await started()
    await grant(buffer, 4)
    for attempt in range(1, 5):
        assert await buffer.fail("a", 1, attempt, "node lost", data=False)
        assert not await buffer.fail("a", 1, attempt, "node lost", data=False)
        assert [(x.number, x.attempt) for x in await grant(buffer, 1)] == [(1, attempt + 1)]
    assert await buffer.fail("a", 1, 5, "no answer", data=True)
    assert [(x.number, x.attempt) for x in await grant(buffer, 4)] == [(1, 6)]
    waiting = await blocked(buffer.lease("b", 4))
    assert await buffer.fail("a", 1, 6, "still no answer", data=True)
    assert await buffer.quarantine() == [(1, "still no answer")]
    assert [lease.number for lease in (await waiting).leases] == [4]
    assert (await buffer.gauges())["failed_leases"] == 6


async def test_a_lease_expires_at_its_deadline_and_wakes_who_waits() -> None:
    buffer, before = await started(lease_seconds=0.05), asyncio.get_running_loop().time()
    leases = await grant(buffer, 4)
    assert (await buffer.renew("a", [(2, 1), (3, 1), (77, 1)])).lost == [(77, 1)]
    reply = await asyncio.wait_for(buffer.lease("b", 4), 30.0)
    assert asyncio.get_running_loop().time() - before >= 0.05
    assert [(x.number, x.attempt) for x in reply.leases][:2] == [(0, 2), (1, 2)]
    assert (await buffer.renew("a", [(0, 1)])).lost == [(0, 1)]
    assert (await buffer.submit("a", [result(leases[0])])).late == [0]
    assert (await buffer.gauges())["expired_leases"] >= 2
    await buffer.close()


async def test_renewed_leases_do_not_expire() -> None:
    clock = Clock()
    buffer = await started(clock=clock)
    leases = await grant(buffer, 4)
    clock.now = 50.0
    await buffer.renew("a", [(0, 1), (1, 1)])
    clock.now = 70.0
    assert [x.number for x in await grant(buffer, 4, "b")] == [2, 3]
    assert (await buffer.submit("a", [result(lease) for lease in leases])).accepted == [0, 1]


async def test_renewed_leases_still_expire_for_someone_who_waits_already() -> None:
    clock = Clock()
    buffer = await started(lease_seconds=0.2, clock=clock)
    await grant(buffer, 4)
    waiting = await blocked(buffer.lease("b", 4))
    clock.now = 0.15
    await buffer.renew("a", [(number, 1) for number in range(4)])
    clock.now = 0.25
    await asyncio.sleep(0.3)
    assert not waiting.done()  # the timer fired for the old deadline and found nothing
    clock.now = 0.4
    assert [lease.number for lease in (await waiting).leases] == [0, 1, 2, 3]
    await buffer.close()


async def test_a_drained_worker_s_blocked_lease_ends_although_nothing_is_free() -> None:
    buffer = await started()
    await grant(buffer, 4)
    drained, other = await blocked(buffer.lease("b", 1)), await blocked(buffer.lease("c", 1))
    assert await buffer.return_worker("b") == []
    reply = await asyncio.wait_for(drained, 30.0)
    assert (reply.leases, reply.closed, other.done()) == ([], False, False)
    await buffer.close()
    await other


async def test_a_dead_worker_loses_its_leases_at_once_and_is_granted_nothing_afterwards() -> None:
    buffer = await started()
    await grant(buffer, 4)
    dead, alive = await blocked(buffer.lease("a", 4)), await blocked(buffer.lease("b", 1))
    assert await buffer.return_worker("a") == [0, 1, 2, 3]
    assert [lease.number for lease in (await alive).leases] == [0]
    reply = await dead
    assert (reply.leases, reply.closed) == ([], False)
    assert [lease.number for lease in await grant(buffer, 4)] == [1, 2, 3]  # a new life under the same name
    assert (await buffer.gauges())["returned_leases"] == 4


async def test_cancelling_blocked_calls_loses_nothing() -> None:
    clock = Clock()
    buffer = await started(clock=clock)
    leases = await grant(buffer, 4)
    gone, heir = await blocked(buffer.sample()), await blocked(buffer.sample())
    idle, next_idle = await blocked(buffer.lease("b", 4)), await blocked(buffer.lease("c", 4))
    for lease in leases:
        await buffer.submit("a", [result(lease)])
        if lease.number == 1:
            gone.cancel()  # it was notified but has not run yet
    assert (await heir).numbers == [0, 1]
    publication = asyncio.ensure_future(buffer.publish(weights(1), [0, 1]))
    await asyncio.sleep(0)
    idle.cancel()
    await publication
    assert [lease.number for lease in (await next_idle).leases] == [4, 5]
    await asyncio.gather(gone, idle, return_exceptions=True)
    assert gone.cancelled()
    assert idle.cancelled()
    assert (await buffer.sample()).numbers == [2, 3]
    assert not buffer._changed.locked()
    clock.now = 9.0
    assert (await buffer.gauges())["sample_wait_seconds"] == 0.0, "nobody waits any more"


async def test_cancelling_a_call_that_waits_for_the_lock_changes_nothing() -> None:
    buffer = await started()
    leases = await grant(buffer, 2)
    await buffer._changed.acquire()
    calls = [
        await blocked(buffer.submit("a", [result(leases[0])])),
        await blocked(buffer.lease("a", 1)),
        await blocked(buffer.return_worker("a")),
        await blocked(buffer.publish(weights(1), [])),
    ]
    for call in calls:
        call.cancel()
    buffer._changed.release()
    await asyncio.gather(*calls, return_exceptions=True)
    assert all(call.cancelled() for call in calls)
    assert (buffer.version, buffer._ledger.numbers(GroupState.LEASED)) == (0, [0, 1])
    assert (await buffer.submit("a", [result(lease) for lease in leases])).accepted == [0, 1]


async def test_a_learner_whose_call_failed_gets_its_batch_again() -> None:
    buffer = await started()
    await fill(buffer, 4)
    lost = await buffer.sample()
    await buffer.rejoin(weights(0), [], [])
    again = await buffer.sample()
    assert (again.numbers, again.payloads) == (lost.numbers, lost.payloads)
    with pytest.raises(LedgerError, match="sampled to queued"):
        buffer._ledger.requeue(again.numbers[0], reason="not possible")


@pytest.mark.parametrize("after", ["rewind", "rejoin"])
async def test_a_call_of_a_learner_that_is_gone_takes_no_batch(after: str) -> None:
    """Nobody cancels a call when its caller dies: it would be first, and answer nobody."""
    buffer = await started()
    orphan = await blocked(buffer.sample())
    if after == "rewind":
        await buffer.publish(weights(await buffer.rewind(0, 0)), [])
    else:
        await buffer.rejoin(weights(0), [], [])
    with pytest.raises(RuntimeError, match="the learner that asked for a batch is gone"):
        await orphan
    await fill(buffer, 4)
    assert (await buffer.sample()).numbers == [0, 1]


async def test_a_batch_sampled_ahead_counts_the_step_before_it() -> None:
    buffer = await started()
    await fill(buffer, 4)
    first, second = await buffer.sample(), await buffer.sample()
    assert (first.version, first.staleness) == (0, [0, 0])
    assert (second.version, second.staleness) == (1, [1, 1])
    assert (await buffer.gauges())["batch_staleness_max"] == 1


async def test_a_sample_above_the_bound_raises_and_is_counted() -> None:
    buffer = await started()
    await fill(buffer, 2)
    buffer._groups.weights.publish(weights(2))  # what `publish` would have refused
    with pytest.raises(RuntimeError, match="staleness above the bound 1"):
        await buffer.sample()
    gauges = await buffer.gauges()
    assert (gauges["violations"], gauges["groups_sampled"], gauges["groups_finished"]) == (1, 0, 2)


async def test_publications_that_break_the_proof_are_refused_and_change_nothing() -> None:
    buffer = await started()
    await fill(buffer, 4)
    numbers = (await buffer.sample()).numbers
    more = (await buffer.sample()).numbers
    for snapshot, trained, needle in [
        (weights(2), numbers, "version 2 published, expected 1"),
        (weights(0), numbers, "version 0 published, expected 1"),
        (weights(1), [], "ends 0 groups, not a step of 2"),
        (weights(1), [0], "ends 1 groups, not a step of 2"),
        (weights(1), [*numbers, *more], "ends 4 groups, not a step of 2"),
        (weights(1), [0, 7], r"groups \[7\] trained in version 1, but they are not sampled"),
        (weights(1), [0, 1, 1], r"groups \[0, 1, 1\] trained in version 1: one is named twice"),
    ]:
        with pytest.raises(RuntimeError, match=needle):
            await buffer.publish(snapshot, trained)
    assert (buffer.version, len(buffer._held)) == (0, 4)
    await buffer.publish(weights(1), numbers)
    assert buffer._ledger.unsettled() == numbers


async def test_a_batch_that_is_set_aside_frees_its_tickets_and_is_not_trained() -> None:
    buffer = await started(max_staleness=0)
    await fill(buffer, 2)
    batch = await buffer.sample()
    waiting = await blocked(buffer.lease("a", 8))
    for numbers, needle in [([0, 7], r"groups \[7\] set aside, but they"), ([0, 0], "one is named twice")]:
        with pytest.raises(RuntimeError, match=needle):
            await buffer.set_aside(numbers, "nan")
    assert buffer._ledger.numbers(GroupState.SAMPLED) == [0, 1]
    await buffer.set_aside(batch.numbers, "nan")
    assert [lease.number for lease in (await waiting).leases] == [2, 3]
    gauges = await buffer.gauges()
    assert (gauges["skipped_groups"], gauges["groups_discarded"], gauges["held_bytes"]) == (2, 2, 0)
    assert (buffer._ledger.discards(), buffer.version) == ({"nan": 2}, 0)
    with pytest.raises(RuntimeError, match="not sampled"):
        await buffer.publish(weights(1), batch.numbers)


async def test_close_wakes_everybody_and_results_are_still_taken() -> None:
    unpublished = make()
    early = await blocked(unpublished.lease("a", 1))
    await unpublished.close()
    assert ((await early).closed, (await early).snapshot) == (True, UNPUBLISHED)
    buffer = await started()
    leases = await grant(buffer, 4)
    actor, learner = await blocked(buffer.lease("b", 1)), await blocked(buffer.sample())
    await buffer.close()
    assert ((await actor).leases, (await actor).closed) == ([], True)
    assert (await learner).numbers == []
    assert (await buffer.submit("a", [result(lease) for lease in leases])).accepted == [0, 1, 2, 3]
    assert (await buffer.sample()).numbers == []
    assert (await buffer.lease("b", 1)).closed


async def test_time_spent_blocked_shows_while_it_lasts() -> None:
    clock = Clock()
    buffer = await started(clock=clock, lease_seconds=1000.0)
    leases = await grant(buffer, 4)
    learner = await blocked(buffer.sample())
    actors = [await blocked(buffer.lease("b", 1)) for _ in range(2)]
    clock.now = 5.0
    gauges = await buffer.gauges()
    assert (gauges["sample_wait_seconds"], gauges["lease_wait_seconds"]) == (5.0, 10.0)
    await buffer.submit("a", [result(lease) for lease in leases])
    await learner
    clock.now = 6.0
    gauges = await buffer.gauges()
    assert (gauges["sample_wait_seconds"], gauges["lease_wait_seconds"]) == (5.0, 12.0)
    assert gauges["fill"] == 1.0  # two of its tickets wait for the learner, two are in its batch
    await buffer.close()
    await asyncio.gather(*actors)


@pytest.mark.parametrize(
    ("changed", "needle"),
    [
        ({"groups_per_step": 0}, "groups_per_step is 0"),
        ({"max_staleness": -1}, "max_staleness is -1"),
        ({"lease_seconds": 0.0}, "lease_seconds is 0.0"),
        ({"keep_versions": 0}, "keep_versions is 0"),
        ({"groups_limit": 7}, "groups_limit is 7.*give 6"),
    ],
)
def test_values_under_which_nothing_could_be_trained_are_refused(changed: dict[str, Any], needle: str) -> None:
    with pytest.raises(UserError, match=needle):
        make(**changed)


def test_the_weight_store_keeps_the_last_versions() -> None:
    store = WeightStore(keep=2)
    assert store.latest is UNPUBLISHED
    published = [weights(version) for version in (3, 4, 7)]
    for snapshot in published:
        store.publish(snapshot)
    assert store.latest is published[-1]
    held = [any(one is kept for kept in gc.get_referents(store._kept)) for one in published]
    assert held == [False, True, True], "what an actor is still fetching, and no more"
    with pytest.raises(RuntimeError, match="version 7 published after 7"):
        store.publish(weights(7))


# -- segment files --------------------------------------------------------------------------------------------------


async def test_a_submit_is_acknowledged_only_when_its_file_is_there_and_holds_nobody_up(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=2**20)
    buffer = await started(store=store)
    leases = await grant(buffer, 4)
    gate = Gate(store)
    calls = [asyncio.ensure_future(buffer.submit("a", [result(lease)])) for lease in leases[:2]]
    await until(lambda: gate.begun)
    learner = await blocked(buffer.sample())
    assert (await buffer.renew("a", [(number, 1) for number in range(3)])).lost == []
    assert await buffer.fail("a", 3, 1, "node lost", data=False)
    assert [lease.number for lease in await grant(buffer, 1, "b")] == [3]
    gauges = await buffer.gauges()
    assert (gauges["groups_leased"], gauges["groups_finished"], names(tmp_path)) == (
        4,
        0,
        ["segment-00000000.arrow"],
    )
    assert not any(call.done() for call in calls)
    gate.let_through(2)
    assert [(await call).accepted for call in calls] == [[0], [1]]
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000001.arrow"]
    assert (await learner).numbers == [0, 1]


async def test_a_lease_that_ends_while_its_group_is_written_makes_it_late(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    clock = Clock()
    buffer = await started(store=store, clock=clock)
    first, second, *_ = await grant(buffer, 4)
    gate = Gate(store)
    late = asyncio.ensure_future(buffer.submit("a", [result(first), result(second), result(first)]))
    await until(lambda: gate.begun)
    clock.now = 50.0
    await buffer.renew("a", [(1, 1)])
    clock.now = 70.0
    (again, *_) = await grant(buffer, 4, "b")
    assert (again.number, again.attempt) == (0, 2)
    own = replace(result(again), payload=b"second attempt")
    in_time = asyncio.ensure_future(buffer.submit("b", [own]))
    await settle()
    gate.let_through(2)
    reply = await late
    assert (reply.accepted, reply.late) == ([1], [0, 0])
    assert (await in_time).accepted == [0]
    assert (await buffer.gauges())["late_results"] == 2
    assert (await buffer.sample()).payloads == [b"second attempt", b"group 1"]
    await buffer.publish(weights(1), [0, 1])
    await store.settle()
    assert len(names(tmp_path)) == 3  # a learner that returns to a checkpoint would need them
    await buffer.settle(buffer._ledger.length)
    await store.settle()
    assert names(tmp_path) == []


async def test_a_group_handed_in_twice_at_once_is_stored_once(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    buffer = await started(store=store)
    leases = await grant(buffer, 2)
    groups = [result(lease) for lease in leases]
    replies = await asyncio.gather(*(buffer.submit("a", groups) for _ in range(2)))
    assert [(reply.accepted, reply.late) for reply in replies] == [([0, 1], []), ([], [0, 1])]
    assert (await buffer.gauges())["spilled_bytes"] == sum(len(group.payload) for group in groups)
    assert (await buffer.sample()).payloads == [b"group 0", b"group 1"]


async def test_a_failed_write_leaves_the_leases_as_they_were(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path / "segments", memory_bytes=2**20)
    buffer = await started(store=store, drop_no_spread=True)
    leases = await grant(buffer, 2)
    shutil.rmtree(tmp_path / "segments")
    groups = [result(leases[0]), result(leases[1], spread=0.0)]
    with pytest.raises(RunError, match=r"segment-00000001.arrow cannot be written: No such file .*make room there"):
        await buffer.submit("a", groups)
    gauges = await buffer.gauges()
    assert [gauges[key] for key in ("groups_leased", "completions", "held_bytes", "late_results")] == [2, 0, 0, 0]
    (tmp_path / "segments").mkdir()
    assert (await buffer.submit("a", groups)).accepted == [0, 1]
    assert (await buffer.gauges())["no_spread_discards"] == 1


async def test_of_groups_that_are_discarded_at_once_only_a_note_is_written(tmp_path: Path) -> None:
    buffer = await started(store=SegmentStore(tmp_path, memory_bytes=0), drop_no_spread=True)
    leases = await grant(buffer, 2)
    assert (await buffer.submit("a", [result(lease, spread=0.0) for lease in leases])).accepted == [0, 1]
    groups, notes = SegmentFolder(tmp_path).read_all(1)
    assert (groups, notes["discarded"]) == ([], [[0, 1], [1, 1]])


@pytest.mark.parametrize("waits_for", ["file", "lock"])
async def test_a_cancelled_submit_leaves_lease_and_folder_as_they_were(waits_for: str, tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=2**20)
    buffer = await started(store=store)
    leases = await grant(buffer, 2)
    gate = Gate(store)
    call = asyncio.ensure_future(buffer.submit("a", [result(lease) for lease in leases]))
    await until(lambda: gate.begun)
    if waits_for == "lock":
        await buffer._changed.acquire()
        gate.let_through()
        await until(lambda: store.gauges()["segments"] == 2)
        await settle()
        assert not call.done()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    if waits_for == "lock":
        buffer._changed.release()
    gate.let_through()
    await store.settle()
    assert (call.cancelled(), store.gauges()["held_bytes"]) == (True, 0)
    gate.let_through()
    assert (await buffer.submit("a", [result(lease) for lease in leases])).accepted == [0, 1]
    await buffer.settle(buffer._ledger.length)
    await store.settle()
    assert names(tmp_path) == ["segment-00000002.arrow"]  # that of the second call


async def test_groups_are_sampled_right_whether_in_memory_or_not(tmp_path: Path) -> None:
    buffer = await started(store=SegmentStore(tmp_path, memory_bytes=len(b"group 0")))
    leases = await grant(buffer, 4)
    for lease in reversed(leases):
        await buffer.submit("a", [result(lease)])
    gauges = await buffer.gauges()
    assert (gauges["held_bytes"], gauges["spilled_bytes"], gauges["segments"]) == (7, 21, 5)
    lost = await buffer.sample()
    assert (lost.numbers, lost.payloads) == ([0, 1], [b"group 0", b"group 1"])
    await buffer.rejoin(weights(0), [], [])
    assert (await buffer.sample()).payloads == lost.payloads
    await buffer.publish(weights(1), [0, 1])
    assert (await buffer.sample()).payloads == [b"group 2", b"group 3"]


async def test_a_lower_number_that_finishes_while_files_are_read_is_sampled_first(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    # a policy that takes what is there, so that the batch can change while it is read
    buffer = await started(store=store, admission="aggregate_lead")
    leases = await grant(buffer, 4)
    await buffer.submit("a", [result(lease) for lease in leases[1:3]])
    gate = Gate(store, "read")
    learner = asyncio.ensure_future(buffer.sample())
    await until(lambda: gate.begun)
    assert (await buffer.submit("a", [result(leases[0])])).accepted == [0]
    gate.let_through(2)
    batch = await learner
    assert (batch.numbers, batch.payloads) == ([0, 1], [b"group 0", b"group 1"])


async def test_two_learners_that_read_the_same_groups_take_each_once(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    buffer = await started(store=store)
    await fill(buffer, 4)
    gate = Gate(store, "read")
    cancelled, first, second = (asyncio.ensure_future(buffer.sample()) for _ in range(3))
    await until(lambda: gate.begun == 3)
    cancelled.cancel()
    gate.let_through(2)
    await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    assert (await buffer.gauges())["groups_sampled"] == 2
    await buffer.publish(weights(1), [0, 1])  # while the other may still read their file
    gate.let_through(2)
    batches = await asyncio.gather(first, second)
    assert sorted((batch.numbers, batch.payloads) for batch in batches) == [
        ([0, 1], [b"group 0", b"group 1"]),
        ([2, 3], [b"group 2", b"group 3"]),
    ]


async def test_a_file_that_cannot_be_read_back_takes_nothing(tmp_path: Path) -> None:
    buffer = await started(store=SegmentStore(tmp_path, memory_bytes=0))
    await fill(buffer, 2)
    (tmp_path / "segment-00000001.arrow").write_bytes(b"")
    with pytest.raises(RunError, match=r"segment-00000001.arrow is missing or damaged"):
        await buffer.sample()
    assert (await buffer.gauges())["groups_finished"] == 2


# -- random schedules -----------------------------------------------------------------------------------------------

EVENTS = [
    "lease",
    "lease",
    "submit",
    "submit",
    "sample",
    "publish",
    "late",
    "fail",
    "data",
    "expire",
    "die",
    "unsample",
    "aside",
    "settle",
]


class Driver:
    """Plays actors and learner against one buffer; a call that would block stays pending or is cancelled."""

    def __init__(self, buffer: ReplayBuffer, store: SegmentStore, clock: Clock, seed: int) -> None:
        self.store = store
        self.buffer, self.clock, self.draw = buffer, clock, random.Random(seed)
        self.held: dict[str, list[Lease]] = {"a": [], "b": []}
        self.done: list[tuple[str, FinishedGroup]] = []
        self.batches: list[Sample] = []
        self.pending: list[asyncio.Task[Any]] = []
        self.trained: Counter[int] = Counter()

    async def call(self, call: Coroutine[Any, Any, T]) -> T | None:
        task = asyncio.ensure_future(call)
        await settle()
        while not task.done() and self.draw.random() < 0.95:
            if not any(segment.readers for segment in self.store._segments.values()):
                break
            await asyncio.sleep(0.0002)  # it waits for files, not for others
            await settle()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        return None

    async def step(self, event: str) -> None:
        worker = self.draw.choice("ab")
        if event == "lease":
            reply = await self.call(self.buffer.lease(worker, self.draw.randint(1, 3)))
            self.held[worker] += reply.leases if reply else []
        elif event in ("submit", "late", "fail", "data"):
            await self.end_lease(event, worker)
        elif event == "sample":
            batch = await self.call(self.buffer.sample())
            self.batches += [batch] if batch else []
        elif event == "publish" and self.batches:
            batch = self.batches.pop(0)
            assert batch.version == self.buffer.version
            assert batch.payloads == [f"group {number}".encode() for number in batch.numbers]
            self.trained.update(batch.numbers)
            await self.buffer.publish(weights(self.buffer.version + 1), batch.numbers)
        elif event == "expire":
            self.clock.now += self.draw.choice([20.0, 70.0])
        elif event == "die":
            await self.buffer.return_worker(worker)
            self.held[worker].clear()
        elif event == "unsample":
            await self.buffer.rejoin(weights(self.buffer.version), [], [])
            self.batches.clear()
        elif event == "aside" and self.batches:
            await self.buffer.set_aside(self.batches.pop().numbers, "nan")
        elif event == "settle":
            await self.buffer.settle(self.draw.randint(0, self.buffer._ledger.length))

    async def end_lease(self, event: str, worker: str) -> None:
        if event == "late" and self.done:
            assert (await self.buffer.submit(*self.resend(worker))).accepted == []
        elif event != "late" and self.held[worker]:
            lease = self.held[worker].pop(self.draw.randrange(len(self.held[worker])))
            if event == "submit":
                group = result(lease, spread=self.draw.choice([0.0, 1.0, 1.0, 1.0]))
                self.pending.append(asyncio.ensure_future(self.buffer.submit(worker, [group])))
                if self.draw.random() < 0.2:
                    return  # it is written while the others go on
                await self.submitted()
                self.done.append((worker, group))
            else:
                await self.buffer.fail(worker, lease.number, lease.attempt, event, data=event == "data")

    async def submitted(self) -> None:
        await asyncio.gather(*self.pending)
        self.pending.clear()

    def resend(self, worker: str) -> tuple[str, list[FinishedGroup]]:
        return worker, [self.draw.choice(self.done)[1]]

    async def check(self) -> None:
        ledger, gauges = self.buffer._ledger, await self.buffer.gauges()
        counts = ledger.counts()
        assert gauges["violations"] == 0
        bound = gauges["staleness_bound"]
        assert bound < 0 or gauges["batch_staleness_max"] <= bound
        assert sum(counts.values()) == ledger.next_number
        assert gauges["tickets"] == sum(
            counts[s] for s in GroupState if s in ("queued", "leased", "finished", "sampled")
        )
        tickets = int(gauges["tickets"])
        assert tickets == 0 or self.buffer._groups.admission.admit(tickets - 1)  # never above B
        assert sorted(self.buffer._held) == sorted(
            ledger.numbers(GroupState.FINISHED) + ledger.numbers(GroupState.SAMPLED) + ledger.unsettled()
        )
        assert not any(self.buffer._held[number].group for number in ledger.unsettled())
        assert set(self.trained.values()) <= {1}
        assert len(self.trained) == counts[GroupState.TRAINED]
        assert not self.buffer._changed.locked()


@settings(max_examples=120)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.integers(0, 2**32),
    st.sampled_from([0, 16, 2**20]),
    st.sampled_from(list(ADMISSIONS)),
    st.lists(st.sampled_from(EVENTS), max_size=80),
)
def test_random_schedules(
    groups_per_step: int, max_staleness: int, seed: int, memory_bytes: int, admission: str, events: list[str]
) -> None:
    async def scenario() -> None:
        clock, store = Clock(), in_memory(memory_bytes)
        buffer = await started(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            admission=admission,
            drop_no_spread=True,
            clock=clock,
            store=store,
        )
        driver = Driver(buffer, store, clock, seed)
        for event in events:
            await driver.step(event)
            await driver.check()
        target = buffer.version + 3
        for _ in range(200):  # progress: workers that hold dead leases go on as well
            for event in ("lease", "lease", "submit", "submit", "sample", "publish"):
                await driver.step(event)
            clock.now += 1.0
            if buffer.version >= target:
                break
        await driver.submitted()
        await driver.check()
        assert buffer.version >= target
        replayed = Ledger.from_journal(buffer._ledger.journal())
        replayed.settle(buffer._ledger._settled)
        assert vars(replayed) == vars(buffer._ledger)
        end = buffer._ledger.length
        await buffer.settle(end)
        await store.settle()
        newest = {number for number, segment in store._segments.items() if segment.end == end}
        assert set(store._folder.numbers()) == {one.segment.number for one in buffer._held.values()} | newest
        await buffer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("memory_bytes", [0, 2**20])
async def test_real_tasks_train_every_group_once_and_in_bound(memory_bytes: int, tmp_path: Path) -> None:
    """Free-running actors and learner on one loop: 60 steps, one actor killed and replaced on the way."""

    async def actor(buffer: ReplayBuffer, name: str, draw: random.Random) -> None:
        while not (reply := await buffer.lease(name, 3)).closed:
            for lease in reply.leases:
                await asyncio.sleep(draw.random() * 0.002)
                await buffer.submit(name, [result(lease, spread=float(draw.random() < 0.9))])

    store = SegmentStore(tmp_path, memory_bytes=memory_bytes)
    buffer = make(groups_per_step=4, max_staleness=2, drop_no_spread=True, groups_limit=240, store=store)
    draw = random.Random(0)
    actors = {name: asyncio.ensure_future(actor(buffer, name, draw)) for name in "abcdef"}
    await buffer.publish(weights(0), [])
    numbers: list[int] = []
    for version in range(1, 61):
        batch = await asyncio.wait_for(buffer.sample(), 30.0)
        numbers += batch.numbers
        assert batch.payloads == [f"group {number}".encode() for number in batch.numbers]
        if version == 20:
            actors["a"].cancel()
            await buffer.return_worker("a")
            actors["a"] = asyncio.ensure_future(actor(buffer, "a", draw))
        await buffer.publish(weights(version), batch.numbers)
    await buffer.close()
    await asyncio.gather(*actors.values())
    gauges = await buffer.gauges()
    assert len(set(numbers)) == len(numbers) == gauges["groups_trained"] == 240
    assert (gauges["violations"], gauges["tickets"], gauges["held_bytes"]) == (0, 0, 0)
    await buffer.settle(buffer._ledger.length)
    await store.settle()
    assert names(tmp_path) == []
