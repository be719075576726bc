"""The ledger: its table is the only way to move, numbers stay, and the journal rebuilds it."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
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


def train(ledger: Ledger, *numbers: int) -> int:
    """Fresh groups to the end; the index behind their entries, as a checkpoint would have it."""
    for number in numbers:
        for name in WAYS[GroupState.TRAINED]:
            move(ledger, name, number)
    return ledger.length


def test_a_rewind_brings_back_what_was_trained_since_and_nothing_else() -> None:
    ledger = Ledger()
    first, second = train(ledger, 0, 1), train(ledger, 2)
    train(ledger, 3)
    before = ledger.journal()
    assert ledger.rewind(ledger.length, reason="nothing since") == []
    assert ledger.journal() == before
    assert ledger.rewind(first, reason="step 1") == [2, 3]
    assert (ledger.numbers(GroupState.FINISHED), ledger.unsettled(), ledger.active_count) == ([2, 3], [0, 1], 2)
    assert (ledger.record(2).reason, ledger.record(2).attempt, ledger.needed_attempts()) == (
        "step 1",
        1,
        {0: 1, 1: 1, 2: 1, 3: 1},
    )
    assert ledger.rewind(0, reason="step 0") == [0, 1]
    with pytest.raises(LedgerError, match=rf"return to entry {second}: groups \[0, 1, 2\] .* were taken back since"):
        ledger.rewind(second, reason="a lineage that was abandoned")


def test_what_is_settled_is_final() -> None:
    ledger = Ledger()
    first, second = train(ledger, 0), train(ledger, 1)
    assert (ledger.settle(first), ledger.settle(first), ledger.unsettled()) == ([0], [], [1])
    before = (ledger.journal(), ledger.counts())
    with pytest.raises(LedgerError, match=f"cannot return to entry {first - 1}: it is settled up to {first}"):
        ledger.rewind(first - 1, reason="too early")
    record = Ledger.from_journal(before[0])._trained[0][1]
    with pytest.raises(LedgerError, match="group 0 is trained and settled"):
        ledger._append(record._replace(state=GroupState.FINISHED))
    assert (ledger.journal(), ledger.counts()) == before
    assert ledger.rewind(first, reason="just late enough") == [1]
    assert ledger.settle(second) == []


def test_attempts_start_above_those_of_earlier_lives() -> None:
    ledger = Ledger()
    move(ledger, "lease")
    ledger.first_attempt = 1001
    ledger.requeue(0, reason="returned")
    assert [ledger.lease(number, worker="w", deadline=1.0, version=3).attempt for number in (0, 1)] == [1001, 1001]
    ledger.requeue(0, reason="returned")
    assert ledger.lease(0, worker="w", deadline=1.0, version=3).attempt == 1002


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


class Lineage:
    """What the parameters of a learner contain, and the checkpoints it may return to: index -> content."""

    def __init__(self) -> None:
        self.content: set[int] = set()
        self.checkpoints: dict[int, set[int]] = {0: set()}
        self.abandoned: set[int] = set()
        self.settled = 0

    def step(self, ledger: Ledger, name: str, choice: int) -> None:
        """Save a checkpoint, return to one, or make one the oldest."""
        places = sorted(self.checkpoints)
        place = places[choice % len(places)]
        if name == "save":
            self.checkpoints[ledger.length] = set(self.content)
        elif name == "settle":
            self.settled = max(self.settled, place)
            trained = ledger.unsettled()
            assert sorted(ledger.settle(place) + ledger.unsettled()) == trained
        elif place < self.settled or place in self.abandoned:
            before = ledger.journal()
            with pytest.raises(LedgerError, match=r"it is settled|taken back since"):
                ledger.rewind(place, reason="rewind")
            assert ledger.journal() == before
        else:
            self.rewind(ledger, place)

    def rewind(self, ledger: Ledger, place: int) -> None:
        states = {number: ledger.state(number) for number in range(ledger.next_number)}
        rewound = ledger.rewind(place, reason="rewind")
        assert rewound == sorted(self.content - self.checkpoints[place])
        states |= dict.fromkeys(rewound, GroupState.FINISHED)
        assert {number: ledger.state(number) for number in states} == states
        self.content = set(self.checkpoints[place])
        self.abandoned |= {one for one, content in self.checkpoints.items() if content & set(rewound)}


LINEAGE_MOVES = ["save", "settle", "rewind"]


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*MOVES, "train", "sample", "finish", "lease", "renew", *LINEAGE_MOVES]), st.integers(0, 5)
        ),
        max_size=120,
    )
)
def test_the_journal_rebuilds_the_identical_ledger(moves: list[tuple[str, int]]) -> None:
    ledger, lineage = Ledger(), Lineage()
    for name, number in moves:
        try:
            if name in LINEAGE_MOVES:
                lineage.step(ledger, name, number)
            elif name == "renew":
                ledger.renew(number, deadline=7.5)
            else:
                move(ledger, name, number)
                if name == "train":
                    assert number not in lineage.content  # no lineage trains a group twice
                    lineage.content.add(number)
        except LedgerError:
            continue
        assert lineage.content == {n for n in range(ledger.next_number) if ledger.state(n) is GroupState.TRAINED}
    states = [ledger.state(number) for number in range(ledger.next_number)]
    assert sum(ledger.counts().values()) == len(states)
    assert all(ledger.counts()[state] == states.count(state) for state in GroupState)
    for state in ACTIVE:
        assert ledger.numbers(state) == [number for number, at in enumerate(states) if at is state]
    replayed = Ledger.from_journal(json.loads(json.dumps(ledger.journal())))
    replayed.settle(lineage.settled)
    assert vars(replayed) == vars(ledger)
    half = len(ledger.journal()) // 2
    assert ledger.journal()[:half] + ledger.journal(half) == ledger.journal()
