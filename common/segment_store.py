"""SegmentStore: finished groups, safe in segment files and served from memory as far as a bound allows.

Who waits for whom, who wakes it:

    write()     its segment file                                        the one writer, when the file is closed
    read()      the files of those groups that memory does not hold     its own threads
    settle()    all writing and removing that is under way              the last of it
    the rest    never waits

Contract:
- `write` returns only after the groups are in a closed file (`common.segment_folder`), and raises for all of them
  otherwise. One segment is written at a time; what is handed in meanwhile shares the next one (group commit).
- A cancelled `write` keeps nothing, whenever the cancellation comes.
- Memory holds at most `memory_bytes` of payloads, besides those that are being written or read. Of the groups it had
  when the bound was met, those with the highest numbers live only in their files: they are sampled last.
- Every file also carries the journal entries that its owner has made since the last one (`follow`), so the files hold
  the journal without a gap: a group never stands in a file without the history that led to it.
- A segment's file is removed when all its groups are dropped, nobody reads it, and its entries are no longer needed
  (`forget`). So the newest file of an owner that is followed stays.
- File input and output happen in threads: the event loop never waits for a disk.

Plain class for one event loop. It holds no loop until it is first used, so Ray may carry a new one to its actor.
"""

import asyncio
import logging
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RunError, UserError
from common.lease import FinishedGroup
from common.segment_folder import SegmentFolder

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Segment:
    """One file: which of its groups still count, and how many reads of it are under way."""

    number: int
    end: int
    """Index behind its last journal entry; -1 when nobody's journal goes along."""
    live: set["StoredGroup"] = field(default_factory=set)
    readers: int = 0


@dataclass(eq=False, slots=True)
class StoredGroup:
    """A group in a segment file, from its write until it is dropped. `group` is None while it is only there."""

    number: int
    attempt: int
    oldest_version: int
    size: int
    segment: _Segment
    row: int
    group: FinishedGroup | None = None


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a folder held: every group of its segments, their notes in order, and how many were half-written."""

    groups: list[StoredGroup]
    notes: list[dict[str, Any]]
    half_written: int


@dataclass(eq=False, slots=True)
class _Call:
    """One `write` that waits."""

    groups: list[FinishedGroup]
    discarded: list[tuple[int, int]]
    stored: asyncio.Future[list[StoredGroup]]


TakeNotes = Callable[[int], tuple[dict[str, Any], int]]
"""From the index behind the last entry that is in a file: the notes for the next one, and the index behind theirs."""


class SegmentStore:
    """Opens its folder, takes groups in until their owner drops them, and leaves the rest on disk when it ends."""

    def __init__(self, folder: str | Path, *, memory_bytes: int) -> None:
        """Raises `UserError` when the folder cannot be opened or the bound is negative."""
        if memory_bytes < 0:
            raise UserError(f"memory_bytes is {memory_bytes}; 0 (all payloads are read from their files) is the least")
        self._folder = SegmentFolder(folder)
        self._memory_bytes = memory_bytes
        self._segments: dict[int, _Segment] = {}
        self._in_memory: list[StoredGroup] = []  # sorted by `_order`
        self._memory_used = 0
        self._spilled = 0
        self._written = 0
        self._calls: list[_Call] = []
        self._writer: asyncio.Task[None] | None = None
        self._removals: set[asyncio.Task[None]] = set()
        self._take_notes: TakeNotes | None = None
        self._recorded = 0
        self._forgotten = 0

    @property
    def name(self) -> str:
        """Path or URI of its folder."""
        return self._folder.name

    def follow(self, take_notes: TakeNotes, recorded: int) -> None:
        """Called by the owner before the first write: whose journal goes along, and how much of it is in files."""
        self._take_notes, self._recorded = take_notes, recorded

    def forget(self, index: int) -> None:
        """Entries before `index`, and the notes taken up to them, are safe elsewhere: their files are removed.

        A file that ends at `index` stays: its other notes may be newer.
        """
        self._forgotten = max(self._forgotten, index)
        for segment in list(self._segments.values()):
            self._remove_if_unused(segment)

    # -- groups -------------------------------------------------------------------------------------------------

    async def write(
        self, groups: Sequence[FinishedGroup], discarded: Sequence[tuple[int, int]] = ()
    ) -> list[StoredGroup]:
        """The groups, in their order, once they are in a closed file.

        `discarded`, (number, attempt) of groups without a use, are noted in it. A call with neither writes down the
        journal, as far as it is not in a file yet.

        Raises:
            RunError: when the segment could not be written; none of `groups` is kept then.
        """
        call = _Call(list(groups), list(discarded), asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_calls())
        try:
            return await call.stored
        except asyncio.CancelledError:
            if not call.stored.cancelled() and call.stored.exception() is None:
                self.drop(call.stored.result())  # written, but the cancellation came before its caller went on
            raise

    async def read(self, stored: Sequence[StoredGroup]) -> list[FinishedGroup]:
        """The groups, from memory or from their files, which stay until this returns even if they are dropped.

        Raises:
            RunError: when a file is missing or damaged.
        """
        self._check_live(stored)
        found = {one: one.group for one in stored if one.group is not None}
        spilled: defaultdict[_Segment, list[StoredGroup]] = defaultdict(list)
        for one in stored:
            if one not in found:
                spilled[one.segment].append(one)
        for segment in spilled:
            segment.readers += 1
        try:
            reads = [
                asyncio.to_thread(self._folder.read, segment.number, [one.row for one in ones])
                for segment, ones in spilled.items()
            ]
            for ones, groups in zip(spilled.values(), await asyncio.gather(*reads), strict=True):
                found.update(zip(ones, groups, strict=True))
        finally:
            for segment in spilled:
                segment.readers -= 1
                self._remove_if_unused(segment)
        return [found[one] for one in stored]

    def drop(self, stored: Iterable[StoredGroup]) -> None:
        """Forget groups that nobody needs any more. Raises RuntimeError for one that was dropped before."""
        for one in stored:
            self._check_live([one])
            one.segment.live.remove(one)
            if one.group is None:
                self._spilled -= one.size
            else:
                del self._in_memory[bisect_left(self._in_memory, _order(one), key=_order)]
                self._memory_used -= one.size
                one.group = None
            self._remove_if_unused(one.segment)

    def retire(self, stored: Iterable[StoredGroup]) -> None:
        """Frees the memory of groups that only a learner that returns to a checkpoint would need; their files stay."""
        for one in stored:
            if one.group is not None:
                del self._in_memory[bisect_left(self._in_memory, _order(one), key=_order)]
                self._memory_used -= one.size
                self._spilled += one.size
                one.group = None

    def write_now(self, groups: Sequence[FinishedGroup]) -> list[StoredGroup]:
        """`write` for an owner that is just being made, outside its event loop; blocks."""
        notes, end = self._notes([])
        number, size = self._folder.write(groups, notes)
        self._written += size
        self._recorded = end
        return self._add_segment(number, groups, end)

    def recover(self) -> Recovered:
        """The groups that an earlier process left in the folder, by segment. Comes before the first write; blocks.

        - Groups that were dropped while companions in their segment were not come back too; the ledger tells which
          (number, attempt) count, and the caller drops the others.
        - The last segment can be half-written by a process that died, and was never acknowledged then. A power failure
          may cut more of the newest short. They are counted and removed, so that they are not taken for damage once
          more segments follow.

        Raises:
            RunError: when a segment is damaged, or cut short though a sound one follows.
        """
        if self._segments or self._calls or self._written:
            raise RuntimeError("recover comes before the first write")
        numbers = self._folder.look()
        half_written = 0
        while numbers and self._folder.half_written(numbers[-1]):
            half_written += 1
            number = numbers.pop()
            log.warning("%s was half-written when its process or machine died; removed", self._folder.file(number))
            self._folder.delete(number)
        groups: list[StoredGroup] = []
        notes: list[dict[str, Any]] = []
        for number in numbers:
            found, noted = self._folder.read_all(number)
            notes.append(noted)
            groups += self._add_segment(number, found, noted.get("end", -1))
        return Recovered(groups, notes, half_written)

    async def settle(self) -> None:
        """Returns when nothing is being written or removed."""
        while tasks := {*self._removals, *([self._writer] if self._writer else [])}:
            await asyncio.wait(tasks)

    def gauges(self) -> dict[str, float]:
        """Bytes in memory and only on disk now, files now, and bytes of segments written since the start."""
        return {
            "held_bytes": float(self._memory_used),
            "spilled_bytes": float(self._spilled),
            "segments": float(len(self._segments)),
            "segment_bytes": float(self._written),
        }

    # -- inside -------------------------------------------------------------------------------------------------

    async def _write_calls(self) -> None:
        """One segment after the other, for as long as calls wait."""
        try:
            while self._calls:
                calls = [call for call in self._calls if not call.stored.cancelled()]
                self._calls = []
                if calls:
                    await self._write_segment(calls)
        finally:
            self._writer = None

    def _notes(self, discarded: list[tuple[int, int]]) -> tuple[dict[str, Any], int]:
        notes, end = self._take_notes(self._recorded) if self._take_notes else ({}, -1)
        return notes | {"end": end, "discarded": discarded}, end

    async def _write_segment(self, calls: list[_Call]) -> None:
        groups = [group for call in calls for group in call.groups]
        notes, end = self._notes([one for call in calls for one in call.discarded])
        try:
            number, size = await asyncio.to_thread(self._folder.write, groups, notes)
        except Exception as error:  # whatever it is, it is its callers' to handle, and none may wait for ever
            for call in calls:
                if not call.stored.cancelled():
                    call.stored.set_exception(RunError(str(error)) if isinstance(error, RunError) else error)
            return
        self._written += size
        self._recorded = end
        stored = iter(self._add_segment(number, groups, end))
        for call in calls:
            own = [next(stored) for _ in call.groups]
            if call.stored.cancelled():
                self.drop(own)
            else:
                call.stored.set_result(own)

    def _add_segment(self, number: int, groups: Sequence[FinishedGroup], end: int) -> list[StoredGroup]:
        segment = self._segments[number] = _Segment(number, end)
        stored = [
            StoredGroup(group.number, group.attempt, group.oldest_version, len(group.payload), segment, row, group)
            for row, group in enumerate(groups)
        ]
        segment.live.update(stored)
        for one in stored:
            insort(self._in_memory, one, key=_order)
            self._memory_used += one.size
            while self._memory_used > self._memory_bytes:
                last = self._in_memory.pop()
                last.group = None
                self._memory_used -= last.size
                self._spilled += last.size
        self._remove_if_unused(segment)  # it may be of notes alone that nobody needs
        return stored

    def _check_live(self, stored: Iterable[StoredGroup]) -> None:
        gone = [one.number for one in stored if one not in one.segment.live]
        if gone:
            raise RuntimeError(f"groups {gone} were dropped before")

    def _remove_if_unused(self, segment: _Segment) -> None:
        if segment.live or segment.readers or segment.end >= self._forgotten:
            return
        if self._segments.pop(segment.number, None) is None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # its owner is being made, outside its loop
            self._remove(segment.number)
        else:
            removal = loop.create_task(asyncio.to_thread(self._remove, segment.number))
            self._removals.add(removal)  # the loop itself keeps only a weak reference
            removal.add_done_callback(self._removals.discard)

    def _remove(self, number: int) -> None:
        try:
            self._folder.delete(number)
        except RunError as error:  # it costs room, but no group
            log.warning("%s", error)


def _order(stored: StoredGroup) -> tuple[int, int, int]:
    """By number, and different for every group that is held."""
    return stored.number, stored.segment.number, stored.row
