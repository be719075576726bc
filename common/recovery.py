"""Recovery: what a replay buffer that died left behind, put together again.

    newest journal of a checkpoint + the entries in segment files since    ->  the ledger as it was
    segment files, else the groups of the checkpoints                      ->  the bytes of every group still needed

- A group whose bytes are in a file and whose lease is current by the journal was accepted, or was about to be: it is
  finished now, and its actor will be told that its own result comes late.
- Leases stay: their actors may live. What the dead buffer granted after its last entry in a file is unknown; it is told
  from new leases by its attempt (`Ledger.first_attempt`).
- Bytes that are nowhere make their group go back to the queue, counted and named.

Blocking; for the start of a buffer.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.checkpoint_manifest import Checkpoint
from common.checkpoint_store import CheckpointStore
from common.errors import RunError
from common.journal import decode_journal
from common.lease import FinishedGroup
from common.ledger import GroupState, Ledger
from common.segment_folder import damage_named, decode_segment
from common.segment_store import SegmentStore, StoredGroup

JOURNAL_FILE = "journal.arrow"
GROUPS_FILE = "groups/segment-00000000.arrow"
ATTEMPTS_PER_LIFE = 1_000_000
NO_SPREAD = "no spread"

log = logging.getLogger(__name__)


@dataclass
class Recovered:
    """The state of a buffer; empty where nothing was left."""

    ledger: Ledger = field(default_factory=Ledger)
    held: dict[int, StoredGroup] = field(default_factory=dict)
    restored: list[FinishedGroup] = field(default_factory=list)
    """Groups that only checkpoints hold: to be written before anything else."""
    life: int = 0
    """How many buffers, and returns of learners, there were before."""
    counters: dict[str, float] = field(default_factory=dict)
    drained: list[str] = field(default_factory=list)
    recorded: int = 0
    """Journal entries that are in files."""
    lost: list[int] = field(default_factory=list)
    """Groups that were acknowledged and whose bytes are gone."""


def recover(store: SegmentStore, checkpoints: CheckpointStore | None) -> Recovered:
    """Read everything that was left; of what `store` found it then holds the groups that are needed and no others.

    Raises:
        RunError: when a segment is damaged, or entries are missing between two files.
    """
    found = store.recover()
    kept = checkpoints.checkpoints() if checkpoints else []
    if not found.notes and not kept:
        return Recovered()
    entries: list[Any] = _newest_journal(checkpoints, kept) if checkpoints else []
    for notes in found.notes:
        start, new = notes["start"], notes["entries"]
        if start > len(entries):
            raise RunError(
                f"the journal in {store.name} breaks off: entries {len(entries)} to {start} are in no file; restore "
                "the missing segment from a copy, or move the whole folder away: groups since the last checkpoint are "
                "then generated again"
            )
        entries += new[len(entries) - start :]
    ledger = Ledger.from_journal(entries)
    ledger.settle(min((one.journal_index for one in kept), default=0))
    last = found.notes[-1] if found.notes else max(kept, key=lambda one: one.journal_index).facts
    recovered = Recovered(
        ledger=ledger,
        life=1 + max([notes["life"] for notes in found.notes] + [one.facts["life"] for one in kept]),
        counters=last["counters"],
        drained=last["drained"],
        recorded=len(entries),
    )
    ledger.first_attempt = recovered.life * ATTEMPTS_PER_LIFE + 1
    _take_groups(store, recovered, found.groups, [tuple(one) for notes in found.notes for one in notes["discarded"]])
    _restore(recovered, checkpoints, kept)
    store.forget(min((one.journal_index for one in kept), default=0))
    return recovered


def _newest_journal(checkpoints: CheckpointStore, kept: list[Checkpoint]) -> list[Any]:
    """The longest that can be read: entries since the oldest are in segment files too, where these are whole."""
    for checkpoint in sorted(kept, key=lambda one: (one.journal_index, one.version), reverse=True):
        try:
            return decode_journal(checkpoints.read(checkpoint, JOURNAL_FILE))
        except RunError as error:
            log.warning("%s; an older journal is used", error)
    return []


def _take_groups(
    store: SegmentStore, recovered: Recovered, groups: Iterable[StoredGroup], discarded: list[tuple[int, int]]
) -> None:
    ledger = recovered.ledger
    for number, attempt in discarded:
        if ledger.state(number) is GroupState.LEASED and ledger.record(number).attempt == attempt:
            ledger.finish(number)
            ledger.discard(number, reason=NO_SPREAD)
    needed = ledger.needed_attempts()
    for one in groups:
        if ledger.state(one.number) is GroupState.LEASED and ledger.record(one.number).attempt == one.attempt:
            ledger.finish(one.number)
            needed[one.number] = one.attempt
        if needed.get(one.number) == one.attempt and one.number not in recovered.held:
            recovered.held[one.number] = one
        else:
            store.drop([one])


def _restore(recovered: Recovered, checkpoints: CheckpointStore | None, kept: list[Checkpoint]) -> None:
    """Bytes that no segment has come from the checkpoints, or their groups go back to the queue."""
    ledger = recovered.ledger
    missing = {key for key in ledger.needed_attempts().items() if key[0] not in recovered.held}
    for checkpoint in reversed(kept):
        if checkpoints is None or not missing:
            break
        groups = [one for one in checkpoint_groups(checkpoints, checkpoint) if (one.number, one.attempt) in missing]
        recovered.restored += groups
        missing -= {(one.number, one.attempt) for one in groups}
    for number, _ in sorted(missing):
        if ledger.state(number) is GroupState.TRAINED:
            continue  # only missed should the learner return to before it
        if ledger.state(number) is GroupState.SAMPLED:
            ledger.unsample(number)
        ledger.requeue(number, reason="its bytes are lost")
        recovered.lost.append(number)
    if recovered.lost:
        log.warning("the bytes of groups %s are in no file; they are generated again", recovered.lost)


def checkpoint_groups(checkpoints: CheckpointStore, checkpoint: Checkpoint) -> list[FinishedGroup]:
    """The finished and untrained groups of a checkpoint; none, and a warning, where they are damaged."""
    try:
        data = checkpoints.read(checkpoint, GROUPS_FILE)
        with damage_named(f"{checkpoint.name}/{GROUPS_FILE}"):
            return decode_segment(data, name=f"{checkpoint.name}/{GROUPS_FILE}")[0]
    except RunError as error:
        log.warning("%s", error)
        return []
