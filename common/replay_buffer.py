"""ReplayBuffer: hands prompts out, takes finished groups in, and gives the learner its batches.

Who waits for whom, who wakes it:

    lease()     an actor waits for a ticket, a returned group,      publish, set_aside, return_worker, drain, fail,
                or the learner's weights                            expiry, rejoin, close
    sample()    the learner waits for P groups inside the window    submit, fail (a quarantine moves the head), close
    submit()    an actor waits for the file of its groups           the store (so do fail at a quarantine and
                                                                    the learner's sample, set_aside, rewind, export)
    the rest    never waits for anything but the lock               -

Contract:
- Every group is in exactly one state (`common.ledger`), holds a ticket from its first lease to a terminal state, and is
  trained at most once. Only the result of a group's current lease is stored; any other is late, counted and dropped.
- No trained group exceeds the staleness bound of its policy (`common.admission`), so long as each publication ends
  exactly one step and raises the version by one, in the order of sampling. What is needed is enforced, and the
  staleness of every group is checked when it is sampled and again when it is published as trained.
- Blocked calls wake by notification. Leases expire on a timer set for the nearest deadline. Nothing polls.
- A call changes state (`common.circulation`) only while it holds the lock, and never waits between its first change and
  its reply, or only for a file that says so: a cancelled call has either done nothing or all; what it wrote in vain is
  dropped. A reply that reaches nobody is mended by its owner's end: an actor's leases by `return_worker` or their
  deadline, the learner's batch by `unsample`.
- A group is accepted only after its bytes are in a closed segment file (`common.segment_store`). It is held from then
  until it is trained or discarded: in memory up to the store's bound, else in its file only.
- Bytes stay until a durable checkpoint contains their training (`settle`); until then a learner may return to before it
  (`rewind`), and what was trained since is finished again.
- A buffer that is made on the files of a dead one goes on where that one was (`common.recovery`). It knows what was
  acknowledged; what the learner did since is told by the learner (`rejoin`, or `rewind` by one that starts anew). Until
  then it grants nothing and answers the learner's other calls with `RejoinFirst`, since one that was busy while the
  buffer died has seen nothing of it; results are taken.
- Nobody holds the lock while a file is written or read; then, under the lock, it is decided anew: a lease that ended
  meanwhile makes its group late, a lower number that finished goes into the batch.

Plain class for one event loop; `ray.remote(ReplayBuffer)` makes it an actor. Use the default concurrency group only:
Ray runs others on loops of their own, and a condition does not cross loops.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.admission import ADMISSIONS
from common.checkpoint_store import CheckpointStore
from common.circulation import STALE, TALLIES, Circulation
from common.errors import RunError, UserError
from common.journal import encode_journal
from common.lease import Export, FinishedGroup, Lease, LeaseReply, RenewReply, Sample, SubmitReply
from common.ledger import GroupState
from common.recovery import NO_SPREAD, recover
from common.segment_folder import encode_segment
from common.segment_store import SegmentStore, StoredGroup
from common.waits import Waits
from common.weight_store import Snapshot

LOCK_SECONDS = 60.0
MOST_SECONDS = 10_000  # noted, before those of groups that are gone are dropped


class ReplayBuffer:
    """Waits for the first weights, circulates groups between actors and learner, and is closed once."""

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_staleness: int,
        lease_seconds: float,
        drop_no_spread: bool,
        store: SegmentStore,
        checkpoints: CheckpointStore | None = None,
        admission: str = "windowed_fifo",
        keep_versions: int = 2,
        groups_limit: int | None = None,
        lock: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on where the files in `store` and `checkpoints` end; blocks while it reads them.

        `lock` is held for life: of a driver that was killed, the buffer may live on for a moment and write.
        `groups_limit`: how many groups the learner will consume; one that is discarded or quarantined is replaced.

        Raises `UserError` for values under which nothing could ever be trained, `RunError` for files that are damaged.
        """
        policy = ADMISSIONS[admission](groups_per_step=groups_per_step, max_staleness=max_staleness)
        _check_limits(lease_seconds, groups_limit, groups_per_step)
        self._lease_seconds = lease_seconds
        self._drop_no_spread = drop_no_spread
        self._clock = clock
        if lock is not None:
            self._lock = _lock(lock)
        found = recover(store, checkpoints)
        self._born = found.life
        self._lost_before = found.counters.get("lost_groups", 0.0)
        self._joins = 0  # learners that began, or told anew what they did
        self._groups = Circulation(
            found,
            store=store,
            admission=policy,
            groups_per_step=groups_per_step,
            groups_limit=groups_limit,
            keep_versions=keep_versions,
        )
        self._ledger, self._held = self._groups.ledger, self._groups.held
        self._store = store
        self._timer: asyncio.TimerHandle | None = None
        self._sweeps: set[asyncio.Task[None]] = set()
        self._returns: Counter[str] = Counter()
        self._closed = False
        self._seconds: dict[int, float] = {}  # less the clock's reading at the lease, until it is handed in
        self._lease_waits = Waits(clock, found.counters.get("lease_wait_seconds", 0.0))
        self._sample_waits = Waits(clock, found.counters.get("sample_wait_seconds", 0.0))
        for number in self._ledger.numbers(GroupState.LEASED):
            self._ledger.renew(number, deadline=clock() + lease_seconds)  # deadlines were of a clock that is gone
        store.follow(self._notes, found.recorded)
        # written at once, though there may be nothing to restore: from now on nobody else begins this life
        self._held.update({one.number: one for one in store.write_now(found.restored)})
        store.retire(self._held[number] for number in self._ledger.unsettled() if number in self._held)
        # Binds to the loop at its first wait: it may be made here although Ray builds an actor outside its loop.
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """The learner's published version, -1 before the first publication."""
        return self._groups.version

    # -- actors -------------------------------------------------------------------------------------------------

    async def lease(self, worker: str, want: int) -> LeaseReply:
        """Called by an actor's loop when it has `want` free places: queued -> leased, or a fresh group -> leased.

        Blocks until at least one lease may be granted, the worker is returned or drained, or the buffer is closed.
        """
        if want < 1:
            raise ValueError(f"worker {worker} wants {want} leases; ask for at least 1")
        # A worker that dies or drains while it waits here must not be granted anything afterwards.
        returns = self._returns[worker]
        async with self._changed:
            self._expire_overdue()
            with self._lease_waits.running():
                await self._changed.wait_for(
                    lambda: (
                        self._no_more(worker)
                        or self._returns[worker] != returns
                        or self._groups.next_to_lease() is not None
                    )
                )
            leases: list[Lease] = []
            while not self._no_more(worker) and self._returns[worker] == returns and len(leases) < want:
                number = self._groups.next_to_lease()
                if number is None:
                    break
                deadline = self._clock() + self._lease_seconds
                self._note_lease(number)
                leases.append(self._groups.grant(number, worker, deadline=deadline, seconds=self._lease_seconds))
            self._set_timer()
            return LeaseReply(leases, self._groups.weights.latest, self._no_more(worker))

    async def submit(self, worker: str, groups: Sequence[FinishedGroup]) -> SubmitReply:
        """Called by an actor's loop with rewarded groups: leased -> finished (-> discarded without spread).

        A group whose lease is not current (expired, even while it was written, submitted before, unknown) is late.
        Stores nothing of the call and leaves its leases as they were when it raises: RuntimeError when a token is older
        than the lease or newer than anything published, RunError when the groups cannot be written.
        """
        async with self._changed:
            current, late = self._groups.split(worker, groups)
            for group in current:
                self._groups.check_versions(group)
        worth = [group for group in current if group.spread != 0 or not self._drop_no_spread]
        useful = {group.number for group in worth}
        useless = [(group.number, group.attempt) for group in current if group.number not in useful]
        stored = await self._store.write(worth, useless) if current else []
        try:
            async with self._changed:
                accepted, expired = self._groups.split(worker, current)
                held = {one.number: one for one in stored}
                for group in accepted:
                    self._groups.accept(group, held.get(group.number))
                    self._seconds[group.number] = self._seconds.get(group.number, nan) + self._clock()
                self._groups.tally["late_results"] += len(late) + len(expired)
                self._wake_if_useful()
                return SubmitReply([group.number for group in accepted], late + expired, self._groups.weights.latest)
        finally:
            self._store.drop([one for one in stored if self._held.get(one.number) is not one])

    def _note_lease(self, number: int) -> None:
        if len(self._seconds) >= MOST_SECONDS:  # of groups that were discarded or quarantined, too
            states = GroupState.LEASED, GroupState.FINISHED
            wanted = {one for state in states for one in self._ledger.numbers(state)}
            self._seconds = {one: value for one, value in self._seconds.items() if one in wanted}
        self._seconds[number] = -self._clock()

    async def fail(self, worker: str, number: int, attempt: int, reason: str, data: bool) -> bool:
        """Called by an actor's loop that gives a group up: leased -> queued, or quarantined at the second data failure.

        False when the lease was not current any more; nothing changes then. A quarantine is in a file before the reply;
        RunError when it cannot be written.
        """
        async with self._changed:
            if not self._ledger.is_current(worker, number, attempt):
                return False
            quarantined = self._groups.fail(number, reason=reason, data=data)
            self._wake_if_useful()
        if quarantined:
            await self._store.write([])
        return True

    async def renew(self, worker: str, leases: Sequence[tuple[int, int]]) -> RenewReply:
        """Called by an actor's loop while generation goes on: leased -> leased with a new deadline.

        Leases are given by number and attempt: an earlier attempt's may have come back to the same worker.
        """
        async with self._changed:
            deadline, lost = self._clock() + self._lease_seconds, []
            for number, attempt in leases:
                if self._ledger.is_current(worker, number, attempt):
                    self._ledger.renew(number, deadline=deadline)
                else:
                    lost.append((number, attempt))
            return RenewReply(lost, self._groups.weights.latest)

    async def reattach(self, worker: str, held: Sequence[tuple[int, int]]) -> None:
        """Called by an actor whose call failed: leased -> queued for leases of which it never heard."""
        async with self._changed:
            self._groups.give_back(worker, held=held, reason=f"worker {worker} never heard of its lease")
            self._wake_if_useful()

    async def return_worker(self, worker: str) -> list[int]:
        """Called by the fleet when a worker died or drains: all its leases, leased -> queued, at once.

        Its blocked `lease` calls end without leases. Gives the numbers that went back.
        """
        async with self._changed:
            self._returns[worker] += 1
            numbers = self._groups.give_back(worker, reason=f"worker {worker} returned")
            self._groups.tally["returned_leases"] += len(numbers)
            self._changed.notify_all()
            return numbers

    async def new_fleet(self) -> None:
        """Called by a fleet before its first actor: no worker of it was drained yet, though an earlier fleet's, of the
        same name, may have been. Returns when that is in a file; RunError when it cannot be written.
        """
        async with self._changed:
            self._groups.drained.clear()
        await self._store.write([])

    async def drain(self, worker: str) -> None:
        """Called by the fleet when a worker shall end: it keeps the leases it has and is never granted another."""
        async with self._changed:
            self._groups.drained.add(worker)
            self._changed.notify_all()

    # -- learner ------------------------------------------------------------------------------------------------

    async def sample(self) -> Sample:
        """Called by the learner's loop before each step: finished -> sampled, for P groups by ascending number.

        Blocks until P groups may be taken or the buffer is closed. Takes nothing when it raises: RuntimeError when a
        group exceeds the staleness bound, or a learner has begun or joined anew since; RunError when a group cannot be
        read back from its file.
        """
        read: dict[StoredGroup, FinishedGroup] = {}
        joins = self._joins
        with self._sample_waits.running():
            while True:
                async with self._changed:
                    self._groups.check_joined()
                    await self._changed.wait_for(lambda: self._closed or self._joins != joins or self._ready())
                    if self._joins != joins:  # nobody hears this answer, and the batch is another call's
                        raise RuntimeError("the learner that asked for a batch is gone, or has asked again")
                    numbers = [] if self._closed else self._groups.selectable()
                    chosen = [self._held[number] for number in numbers]
                    groups = [one.group or read.get(one) for one in chosen]
                    payloads = [group.payload for group in groups if group is not None]
                    if len(payloads) == len(chosen):
                        version, ages, generated = self._groups.sample(numbers)
                        seconds = [self._seconds.pop(number, nan) for number in numbers]
                        return Sample(numbers, payloads, version, ages, seconds, generated)
                missing = [one for one, group in zip(chosen, groups, strict=True) if group is None]
                read.update(zip(missing, await self._store.read(missing), strict=True))

    async def publish(self, snapshot: Snapshot, trained: Sequence[int]) -> bool:
        """Called by the learner's loop after each step: sampled -> trained, tickets freed, version raised.

        Answers whether the buffer is closed. The first publication, and the first after a `rewind`, have no groups.
        Raises RuntimeError, and changes nothing, when the version does not follow the last one, a group was not
        sampled, or it is not one step's groups.
        """
        async with self._changed:
            self._groups.check_joined()
            self._groups.publish(snapshot, trained)
            self._changed.notify_all()
            return self._closed

    async def set_aside(self, numbers: Sequence[int], reason: str) -> None:
        """Called by the learner's loop for a batch that it must not train on: sampled -> discarded, tickets freed.

        Returns when that is in a file: a group that came back after others had overtaken it would be too old. A learner
        whose call failed therefore does a `rejoin` with nothing sampled. Raises RuntimeError, and changes nothing, when
        a group was not sampled; RunError when it cannot be written, and then the learner must not go on.
        """
        async with self._changed:
            self._groups.check_joined()
            self._groups.set_aside(numbers, reason)
            self._changed.notify_all()
        await self._store.write([])

    async def rewind(self, index: int, step: int) -> int:
        """Called by a learner that starts, before its first publication; gives the version of that. 0 in a new run.

        What was trained after journal entry `index`, or was sampled, is finished again. Leases are void: their groups
        are queued, since tokens of the version to come are older than the leases are. `step` is the learner's.
        Raises LedgerError, and changes nothing, for a checkpoint that is not a place to return to (`Ledger.rewind`).
        """
        async with self._changed:
            if not self._groups.life and self.version < 0:
                return 0  # nothing has happened yet
            starts = self._groups.rewind(index, step)
            self._joins += 1
            self._changed.notify_all()
        await self._store.write([])  # the life is used up, whatever comes
        return starts

    async def rejoin(
        self, snapshot: Snapshot, history: Sequence[tuple[int, Sequence[int]]], sampled: Sequence[int]
    ) -> None:
        """Called by a learner whose call failed: the buffer may have died and may have lost what the learner did.

        Afterwards `snapshot` is the newest, all of `history` (version, trained groups; since the last durable
        checkpoint) is trained, and exactly the groups `sampled` are sampled. Repeating it changes nothing.
        Raises RunError, and changes nothing, when such a group is not here any more or the learner is not the newest:
        only a return to a checkpoint goes on then.
        """
        async with self._changed:
            self._groups.rejoin(snapshot, history, sampled)
            self._joins += 1
            self._set_timer()
            self._changed.notify_all()

    async def export(self) -> Export:
        """Called by the learner's loop for a checkpoint, between two publications: the buffer's part of it."""
        async with self._changed:
            self._groups.check_joined()
            index, entries = self._ledger.length, self._ledger.journal()
            states = (GroupState.FINISHED, GroupState.SAMPLED)
            chosen = [self._held[number] for state in states for number in self._ledger.numbers(state)]
            facts = self._facts()
        groups = await self._store.read(chosen)
        await self._store.write([])  # no entry is in a checkpoint alone: an older one must lead on to it
        journal, encoded = await asyncio.gather(
            asyncio.to_thread(encode_journal, entries),
            asyncio.to_thread(lambda: encode_segment(groups).to_pybytes()),
        )
        return Export(index, journal, encoded, facts)

    async def settle(self, index: int) -> None:
        """Called by the learner's loop: every checkpoint that it may return to contains the journal up to `index`."""
        async with self._changed:
            self._groups.check_joined()
            self._groups.settle(index)

    # -- controller ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Called by the controller at the end of the run: wakes every waiter; no leases or batches from then on."""
        async with self._changed:
            self._closed = True
            self._set_timer()
            self._changed.notify_all()

    async def gauges(self) -> dict[str, float]:
        """Called by the controller's metrics loop. Totals count from the start of the run."""
        counts, tickets = self._ledger.counts(), self._ledger.active_count
        ages, bound = self._groups.last_staleness, self._groups.admission.staleness_bound
        return {
            **{f"groups_{state}": float(count) for state, count in counts.items()},
            "tickets": float(tickets),
            "fill": (counts[GroupState.FINISHED] + counts[GroupState.SAMPLED]) / tickets if tickets else 0.0,
            **self._store.gauges(),
            **self._counters(),
            **self._groups.staleness.values(),
            "no_spread_discards": float(self._ledger.discards().get(NO_SPREAD, 0)),
            "stale_discards": float(self._ledger.discards().get(STALE, 0)),
            "batch_staleness_max": float(max(ages, default=0)),
            "batch_staleness_mean": sum(ages) / max(1, len(ages)),
            "staleness_bound": -1.0 if bound is None else bound,
            "born": float(self._born),
            "lost_before": self._lost_before,
            "version": float(self.version),
        }

    async def waiting(self) -> dict[str, Any]:
        """Called by the controller's watchdog: who waits here, and what for."""
        return {
            "version": self.version,
            "closed": self._closed,
            "groups": {str(state): count for state, count in self._ledger.counts().items() if count},
            "head": self._ledger.head(),
            "calls of lease that wait": len(self._lease_waits.since),
            "the learner waits for groups": bool(self._sample_waits.since),
            "leases": {
                record.worker: sorted(self._ledger.leased_to(record.worker))
                for record in map(self._ledger.record, self._ledger.numbers(GroupState.LEASED))
            },
        }

    async def quarantine(self) -> list[tuple[int, str]]:
        """Called by the controller's report: number and last reason of each quarantined group."""
        return self._ledger.quarantined()

    # -- under the lock -----------------------------------------------------------------------------------------

    def _no_more(self, worker: str) -> bool:
        return self._closed or worker in self._groups.drained

    def _ready(self) -> bool:
        """Whether a batch may be taken; what the policy gives up may let actors go on."""
        numbers, evicted = self._groups.ready()
        if evicted:
            self._changed.notify_all()
        return bool(numbers)

    def _expire_overdue(self) -> None:
        if self._groups.expire(self._clock()):
            self._changed.notify_all()

    def _notes(self, since: int) -> tuple[dict[str, Any], int]:
        """What goes into a segment file beside its groups."""
        notes = {"start": since, "entries": self._ledger.journal(since)}
        return notes | self._facts(), self._ledger.length

    def _facts(self) -> dict[str, Any]:
        """What the journal does not say."""
        return {
            "life": self._groups.life,
            "counters": self._counters(),
            "drained": sorted(self._groups.drained),
        }

    def _counters(self) -> dict[str, float]:
        return {
            **{key: float(self._groups.tally[key]) for key in TALLIES},
            "sample_wait_seconds": self._sample_waits.seconds(),
            "lease_wait_seconds": self._lease_waits.seconds(),
        }

    def _wake_if_useful(self) -> None:
        """Wakes the waiters only if one of them could go on: dozens of actors wait here while tickets are short."""
        if self._groups.next_to_lease() is not None or self._groups.selectable():
            self._changed.notify_all()

    def _set_timer(self) -> None:
        """One timer, for the nearest deadline; a renewed lease makes it fire early once, which sets it anew."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._ledger.next_deadline()
        if deadline is not None and not self._closed:
            delay = max(0.0, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._start_sweep)

    def _start_sweep(self) -> None:
        sweep = asyncio.get_running_loop().create_task(self._sweep())
        self._sweeps.add(sweep)  # the loop itself keeps only a weak reference
        sweep.add_done_callback(self._sweeps.discard)

    async def _sweep(self) -> None:
        async with self._changed:
            self._expire_overdue()
            self._set_timer()


def _check_limits(lease_seconds: float, groups_limit: int | None, groups_per_step: int) -> None:
    if not lease_seconds > 0:
        raise UserError(f"lease_seconds is {lease_seconds}; give more than the time one group takes to generate")
    if groups_limit is not None and (groups_limit < 0 or groups_limit % groups_per_step):
        raise UserError(
            f"groups_limit is {groups_limit}, not a whole number of steps of {groups_per_step} groups, so the last "
            f"step could never be filled; give {max(0, groups_limit) // groups_per_step * groups_per_step}"
        )


def _lock(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RunError(
            f"{path} is held: another replay buffer of this run did not end in {LOCK_SECONDS:g} s; end its process"
        ) from error
    return lock
