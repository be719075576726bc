"""The ledger: its table is the only way to move, numbers stay, and the journal rebuilds it."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.ledger import ACTIVE, TERMINAL, TRANSITIONS, GroupState, Ledger, LedgerError

WAYS = {  # how to bring group 0 of a fresh ledger into each state
    GroupState.QUEUED: ["lease", "requeue"],
    GroupState.LEASED: ["lease"],
    GroupState.FINISHED: ["lease", "finish"],
    GroupState.SAMPLED: ["lease", "finish", "sample"],
    GroupState.TRAINED: ["lease", "finish", "sample", "train"],
    GroupState.DISCARDED: ["lease", "finish", "discard"],
    GroupState.QUARANTINED: ["lease", "quarantine"],
}
MOVES = {  # where each method leads to
    "lease": GroupState.LEASED,
    "requeue": GroupState.QUEUED,
    "finish": GroupState.FINISHED,
    "unsample": GroupState.FINISHED,
    "sample": GroupState.SAMPLED,
    "train": GroupState.TRAINED,
    "discard": GroupState.DISCARDED,
    "quarantine": GroupState.QUARANTINED,
}


def move(ledger: Ledger, name: str, number: int = 0) -> None:
    if name == "lease":
        ledger.lease(number, worker="w", deadline=1.0, version=3)
    elif name in ("requeue", "discard", "quarantine"):
        getattr(ledger, name)(number, reason=f"because {name}")
    else:
        getattr(ledger, name)(number)


def in_state(state: GroupState) -> Ledger:
    ledger = Ledger()
    for name in WAYS[state]:
        move(ledger, name)
    return ledger


@pytest.mark.parametrize(("state", "name"), list(product(WAYS, MOVES)))
def test_only_the_table_s_moves_are_possible(state: GroupState, name: str) -> None:
    ledger = in_state(state)
    before = (ledger.journal(), ledger.counts())
    if MOVES[name] in TRANSITIONS[state] and state is not GroupState.TRAINED:  # only `rewind` leaves that one
        move(ledger, name)
        assert ledger.state(0) is MOVES[name]
        return
    with pytest.raises(LedgerError) as caught:
        move(ledger, name)
    assert f"group 0 cannot go from {state} to {MOVES[name]}" in str(caught.value)
    assert all(allowed in str(caught.value) for allowed in TRANSITIONS[state])
    assert (ledger.journal(), ledger.counts()) == before


def test_every_state_can_be_reached_and_terminal_ones_cannot_be_left() -> None:
    assert {state: in_state(state).state(0) for state in WAYS} == {state: state for state in GroupState}
    assert {GroupState.TRAINED, GroupState.DISCARDED, GroupState.QUARANTINED} == TERMINAL


def test_numbers_are_given_in_order_and_a_lost_lease_comes_first_with_its_number() -> None:
    ledger = Ledger()
    for number in range(3):
        assert ledger.next_number == number
        move(ledger, "lease", number)
    with pytest.raises(LedgerError, match="next fresh number is 3"):
        move(ledger, "lease", 4)
    ledger.requeue(2, reason="died")
    ledger.requeue(1, reason="died", data=True)
    assert ledger.first_queued() == 1
    again = ledger.lease(1, worker="other", deadline=9.0, version=5)
    assert (again.number, again.cursor, again.attempt, again.version, again.tries) == (1, 1, 2, 5, 1)
    assert ledger.first_queued() == 2


def test_leases_are_known_by_worker_attempt_and_deadline() -> None:
    ledger = Ledger()
    ledger.lease(0, worker="a", deadline=5.0, version=0)
    ledger.lease(1, worker="b", deadline=4.0, version=0)
    assert (ledger.leased_to("a"), ledger.next_deadline(), ledger.overdue(4.0)) == ([0], 4.0, [1])
    assert ledger.is_current("b", 1, 1)
    assert not ledger.is_current("a", 1, 1)
    assert not ledger.is_current("b", 1, 2)
    assert not ledger.is_current("b", 7, 1)
    ledger.renew(1, deadline=9.0)
    assert (ledger.next_deadline(), ledger.overdue(4.0)) == (5.0, [])
    ledger.finish(1)
    with pytest.raises(LedgerError, match="finished to leased"):
        ledger.renew(1, deadline=10.0)


def test_reasons_are_kept() -> None:
    ledger = in_state(GroupState.QUARANTINED)
    for name in ("lease", "finish", "discard"):
        move(ledger, name, 1)
    assert ledger.quarantined() == [(0, "because quarantine")]
    assert ledger.discards() == {"because discard": 1}


@pytest.mark.parametrize(
    "entries",
    [
        [[0, 0, "leased", 1, "w"]],
        [[0, 0, "lost", 1, "w", 1.0, 0, "", 0]],
        [[0, 0, "finished", 1, "w", 1.0, 0, "", 0]],
        [[1, 1, "leased", 1, "w", 1.0, 0, "", 0]],
        [[0, 0, "leased", 1, "w", 1.0, 0, "", 0], [0, 0, "leased", 2, "w", 1.0, 0, "", 0]],
    ],
)
def test_a_journal_that_does_not_replay_is_refused(entries: list[list[object]]) -> None:
    with pytest.raises(LedgerError):
        Ledger.from_journal(entries)


@given(st.lists(st.tuples(st.sampled_from([*MOVES, "renew"]), st.integers(0, 5)), max_size=80))
def test_the_journal_rebuilds_the_identical_ledger(moves: list[tuple[str, int]]) -> None:
    ledger = Ledger()
    for name, number in moves:
        try:
            if name == "renew":
                ledger.renew(number, deadline=7.5)
            else:
                move(ledger, name, number)
        except LedgerError:
            continue
    states = [ledger.state(number) for number in range(ledger.next_number)]
    assert sum(ledger.counts().values()) == len(states)
    assert all(ledger.counts()[state] == states.count(state) for state in GroupState)
    for state in ACTIVE:
        assert ledger.numbers(state) == [number for number, at in enumerate(states) if at is state]
    assert vars(Ledger.from_journal(json.loads(json.dumps(ledger.journal())))) == vars(ledger)
    half = len(ledger.journal()) // 2
    assert ledger.journal()[:half] + ledger.journal(half) == ledger.journal()
