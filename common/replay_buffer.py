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
- A call changes state only while it holds the lock and never waits between its first change and its reply, so a
  cancelled call has either done nothing or all; what it wrote in vain is dropped. A reply that reaches nobody is mended
  by its owner's end: an actor's leases by `return_worker` or their deadline, the learner's batch by `unsample`.
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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from common.admission import ADMISSIONS, Admission
from common.checkpoint_store import CheckpointStore
from common.errors import RunError, UserError
from common.journal import encode_journal
from common.lease import Batch, Export, FinishedGroup, Lease, LeaseReply, RejoinFirst, RenewReply, SubmitReply
from common.ledger import GroupState
from common.recovery import ATTEMPTS_PER_LIFE, NO_SPREAD, recover
from common.segment_folder import encode_segment
from common.segment_store import SegmentStore, StoredGroup
from common.version import first_version, staleness
from common.waits import Waits
from common.weight_store import Snapshot, WeightStore

MAX_DATA_TRIES = 2
LOCK_SECONDS = 60.0
STALE = "stale"
# wasted_groups: leases granted again, each a generation that was lost in part or whole (late results are among them)
_TALLIES = ("late_results", "violations", "expired_leases", "returned_leases", "failed_leases")
_TALLIES += ("wasted_groups", "completions", "lost_groups", "rewound_groups", "skipped_groups")


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
        self._admission: Admission = ADMISSIONS[admission](groups_per_step=groups_per_step, max_staleness=max_staleness)
        if not lease_seconds > 0:
            raise UserError(f"lease_seconds is {lease_seconds}; give more than the time one group takes to generate")
        if groups_limit is not None and (groups_limit < 0 or groups_limit % groups_per_step):
            raise UserError(
                f"groups_limit is {groups_limit}, not a whole number of steps of {groups_per_step} groups, so the last "
                f"step could never be filled; give {max(0, groups_limit) // groups_per_step * groups_per_step}"
            )
        self._groups_per_step = groups_per_step
        self._lease_seconds = lease_seconds
        self._drop_no_spread = drop_no_spread
        self._groups_limit = groups_limit
        self._clock = clock
        if lock is not None:
            self._lock = _lock(lock)
        found = recover(store, checkpoints)
        self._ledger = found.ledger
        self._held: dict[int, StoredGroup] = found.held
        self._life = found.life
        self._joined = not found.life  # a learner has told what it did, or there is none yet
        self._weights = WeightStore(keep=keep_versions)
        self._starts: int | None = None  # the version of a learner that has just returned to a checkpoint
        self._store = store
        self._timer: asyncio.TimerHandle | None = None
        self._sweeps: set[asyncio.Task[None]] = set()
        self._returns: Counter[str] = Counter()
        self._drained: set[str] = set(found.drained)
        self._closed = False
        self._tally: Counter[str] = Counter({key: int(found.counters.get(key, 0)) for key in _TALLIES})
        self._tally["lost_groups"] += len(found.lost)
        self._last_staleness: list[int] = []
        self._generated: defaultdict[str, float] = defaultdict(float)
        self._told: dict[str, float] = {}
        self._lease_waits = Waits(clock, found.counters.get("lease_wait_seconds", 0.0))
        self._sample_waits = Waits(clock, found.counters.get("sample_wait_seconds", 0.0))
        for number in self._ledger.numbers(GroupState.LEASED):
            self._ledger.renew(number, deadline=clock() + lease_seconds)  # deadlines were of a clock that is gone
        store.follow(self._notes, found.recorded)
        # written at once, though there may be nothing to restore: from now on nobody else begins this life
        self._held |= {one.number: one for one in store.write_now(found.restored)}
        store.retire(self._held[number] for number in self._ledger.unsettled() if number in self._held)
        # Binds to the loop at its first wait: it may be made here although Ray builds an actor outside its loop.
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        """The learner's published version, -1 before the first publication."""
        return self._weights.latest.version

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
                        self._no_more(worker) or self._returns[worker] != returns or self._next_to_lease() is not None
                    )
                )
            leases: list[Lease] = []
            while not self._no_more(worker) and self._returns[worker] == returns and len(leases) < want:
                number = self._next_to_lease()
                if number is None:
                    break
                leases.append(self._grant(number, worker))
            self._set_timer()
            return LeaseReply(leases, self._weights.latest, self._no_more(worker))

    async def submit(self, worker: str, groups: Sequence[FinishedGroup]) -> SubmitReply:
        """Called by an actor's loop with rewarded groups: leased -> finished (-> discarded without spread).

        A group whose lease is not current (expired, even while it was written, submitted before, unknown) is late.
        Stores nothing of the call and leaves its leases as they were when it raises: RuntimeError when a token is older
        than the lease or newer than anything published, RunError when the groups cannot be written.
        """
        async with self._changed:
            current, late = self._split(worker, groups)
            for group in current:
                self._check_versions(group)
        worth = [group for group in current if group.spread != 0 or not self._drop_no_spread]
        useful = {group.number for group in worth}
        useless = [(group.number, group.attempt) for group in current if group.number not in useful]
        stored = await self._store.write(worth, useless) if current else []
        try:
            async with self._changed:
                accepted, expired = self._split(worker, current)
                held = {one.number: one for one in stored}
                for group in accepted:
                    self._accept(group, held.get(group.number))
                self._tally["late_results"] += len(late) + len(expired)
                self._wake_if_useful()
                return SubmitReply([group.number for group in accepted], late + expired, self._weights.latest)
        finally:
            self._store.drop([one for one in stored if self._held.get(one.number) is not one])

    async def fail(self, worker: str, number: int, attempt: int, reason: str, data: bool) -> bool:
        """Called by an actor's loop that gives a group up: leased -> queued, or quarantined at the second data failure.

        False when the lease was not current any more; nothing changes then. A quarantine is in a file before the reply;
        RunError when it cannot be written.
        """
        async with self._changed:
            if not self._ledger.is_current(worker, number, attempt):
                return False
            last = data and self._ledger.record(number).tries + 1 >= MAX_DATA_TRIES
            if last:
                self._ledger.quarantine(number, reason=reason)
            else:
                self._ledger.requeue(number, reason=reason, data=data)
            self._tally["failed_leases"] += 1
            self._wake_if_useful()
        if last:
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
            return RenewReply(lost, self._weights.latest)

    async def reattach(self, worker: str, held: Sequence[tuple[int, int]]) -> None:
        """Called by an actor whose call failed: leased -> queued for leases of which it never heard."""
        async with self._changed:
            for number in self._ledger.leased_to(worker):
                if (number, self._ledger.record(number).attempt) not in held:
                    self._ledger.requeue(number, reason=f"worker {worker} never heard of its lease")
            self._wake_if_useful()

    async def return_worker(self, worker: str) -> list[int]:
        """Called by the fleet when a worker died or drains: all its leases, leased -> queued, at once.

        Its blocked `lease` calls end without leases. Gives the numbers that went back.
        """
        async with self._changed:
            self._returns[worker] += 1
            numbers = self._ledger.leased_to(worker)
            for number in numbers:
                self._ledger.requeue(number, reason=f"worker {worker} returned")
            self._tally["returned_leases"] += len(numbers)
            self._changed.notify_all()
            return numbers

    async def drain(self, worker: str) -> None:
        """Called by the fleet when a worker shall end: it keeps the leases it has and is never granted another."""
        async with self._changed:
            self._drained.add(worker)
            self._changed.notify_all()

    # -- learner ------------------------------------------------------------------------------------------------

    async def sample(self) -> Batch:
        """Called by the learner's loop before each step: finished -> sampled, for P groups by ascending number.

        Blocks until P groups may be taken or the buffer is closed. Takes nothing when it raises: RuntimeError when a
        group exceeds the staleness bound, RunError when one cannot be read back from its file.
        """
        started = self._clock()
        read: dict[StoredGroup, FinishedGroup] = {}
        with self._sample_waits.running():
            while True:
                async with self._changed:
                    self._check_joined()
                    await self._changed.wait_for(lambda: self._closed or self._ready())
                    chosen = [] if self._closed else [self._held[number] for number in self._selectable()]
                    groups = [one.group or read.get(one) for one in chosen]
                    payloads = [group.payload for group in groups if group is not None]
                    if len(payloads) == len(chosen):
                        return self._take(chosen, payloads, started)
                missing = [one for one, group in zip(chosen, groups, strict=True) if group is None]
                read.update(zip(missing, await self._store.read(missing), strict=True))

    async def publish(self, snapshot: Snapshot, trained: Sequence[int]) -> bool:
        """Called by the learner's loop after each step: sampled -> trained, tickets freed, version raised.

        Answers whether the buffer is closed. The first publication, and the first after a `rewind`, have no groups.
        Raises RuntimeError, and changes nothing, when the version does not follow the last one, a group was not
        sampled, or it is not one step's groups.
        """
        async with self._changed:
            self._check_joined()
            self._check_publication(snapshot, trained)
            self._weights.publish(snapshot)
            self._starts = None
            self._train(trained)
            self._changed.notify_all()
            return self._closed

    async def set_aside(self, numbers: Sequence[int], reason: str) -> None:
        """Called by the learner's loop for a batch that it must not train on: sampled -> discarded, tickets freed.

        Returns when that is in a file: a group that came back after others had overtaken it would be too old. A learner
        whose call failed therefore does a `rejoin` with nothing sampled. Raises RuntimeError, and changes nothing, when
        a group was not sampled; RunError when it cannot be written, and then the learner must not go on.
        """
        async with self._changed:
            self._check_joined()
            self._check_sampled(numbers, "set aside")
            for number in numbers:
                self._ledger.discard(number, reason=reason)
                self._store.drop([self._held.pop(number)])
            self._tally["skipped_groups"] += len(numbers)
            self._changed.notify_all()
        await self._store.write([])

    async def rewind(self, index: int, step: int) -> int:
        """Called by a learner that starts, before its first publication; gives the version of that. 0 in a new run.

        What was trained after journal entry `index`, or was sampled, is finished again. Leases are void: their groups
        are queued, since tokens of the version to come are older than the leases are. `step` is the learner's.
        Raises LedgerError, and changes nothing, for a checkpoint that is not a place to return to (`Ledger.rewind`).
        """
        async with self._changed:
            if not self._life and self.version < 0:
                return 0  # nothing has happened yet
            rewound = self._ledger.rewind(index, reason=f"the learner returned to step {step}")
            for number in self._ledger.numbers(GroupState.SAMPLED):
                self._ledger.unsample(number)
            for number in self._ledger.numbers(GroupState.LEASED):
                self._ledger.requeue(number, reason="the learner returned to a checkpoint")
            for number in [number for number in rewound if number not in self._held]:
                self._ledger.requeue(number, reason="its bytes are lost")
                self._tally["lost_groups"] += 1
            self._tally["rewound_groups"] += len(rewound)
            self._life += 1
            self._ledger.first_attempt = self._life * ATTEMPTS_PER_LIFE + 1
            self._starts = starts = first_version(self._life, step)
            self._joined = True
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
            self._check_history(snapshot, [n for _, numbers in history for n in numbers], sampled)
            self._joined = True
            for _, numbers in history:
                self._train([n for n in numbers if self._ledger.state(n) is not GroupState.TRAINED])
            if snapshot.version > self.version:
                self._weights.publish(snapshot)
                self._starts = None
            for number in self._ledger.numbers(GroupState.SAMPLED):
                if number not in sampled:
                    self._ledger.unsample(number)
            for number in sampled:
                if self._ledger.state(number) is GroupState.FINISHED:
                    self._ledger.sample(number)
            self._set_timer()
            self._changed.notify_all()

    async def export(self) -> Export:
        """Called by the learner's loop for a checkpoint, between two publications: the buffer's part of it."""
        async with self._changed:
            self._check_joined()
            index, entries = self._ledger.length, self._ledger.journal()
            states = (GroupState.FINISHED, GroupState.SAMPLED)
            chosen = [self._held[number] for state in states for number in self._ledger.numbers(state)]
            facts = {"life": self._life, "counters": self._counters(), "drained": sorted(self._drained)}
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
            self._check_joined()
            for number in self._ledger.settle(index):
                stored = self._held.pop(number, None)
                if stored is not None:
                    self._store.drop([stored])
            self._store.forget(index)

    # -- controller ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Called by the controller at the end of the run: wakes every waiter; no leases or batches from then on."""
        async with self._changed:
            self._closed = True
            self._set_timer()
            self._changed.notify_all()

    async def snapshot(self, version: int | None = None) -> Snapshot:
        """Called by whoever needs weights outside its leases: the newest, or a kept version (else LookupError)."""
        return self._weights.latest if version is None else self._weights.get(version)

    async def gauges(self) -> dict[str, float]:
        """Called by the controller's metrics loop. Totals count from the start of the run."""
        counts, tickets = self._ledger.counts(), self._ledger.active_count
        return {
            **{f"groups_{state}": float(count) for state, count in counts.items()},
            "tickets": float(tickets),
            "fill": counts[GroupState.FINISHED] / tickets if tickets else 0.0,
            **self._store.gauges(),
            **self._counters(),
            "no_spread_discards": float(self._ledger.discards().get(NO_SPREAD, 0)),
            "stale_discards": float(self._ledger.discards().get(STALE, 0)),
            "batch_staleness_max": float(max(self._last_staleness, default=0)),
            "batch_staleness_mean": sum(self._last_staleness) / max(1, len(self._last_staleness)),
            "staleness_bound": -1.0 if self._admission.staleness_bound is None else self._admission.staleness_bound,
            "restarts": float(self._life),
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

    async def journal(self, since: int = 0) -> list[tuple[Any, ...]]:
        """Called by whoever looks into a run: the ledger's entries from index `since` on."""
        return self._ledger.journal(since)

    # -- under the lock -----------------------------------------------------------------------------------------

    def _no_more(self, worker: str) -> bool:
        return self._closed or worker in self._drained

    def _learning(self) -> bool:
        """Whether there are weights to generate with: not before a learner's first publication, nor a lineage's."""
        return self.version >= 0 and self._starts is None

    def _next_to_lease(self) -> int | None:
        """The queue's head (its ticket is charged already), else a fresh number if one may be given, else None."""
        if not self._learning():
            return None
        queued = self._ledger.first_queued()
        if queued is not None:
            # after a rewind more groups are out than there are tickets: those below must be trained again first
            return queued if self._admission.admit(self._ledger.active_below(queued)) else None
        if self._groups_limit is not None:
            counts = self._ledger.counts()
            replaced = counts[GroupState.DISCARDED] + counts[GroupState.QUARANTINED]
            if self._ledger.next_number - replaced >= self._groups_limit:
                return None
        return self._ledger.next_number if self._admission.admit(self._ledger.active_count) else None

    def _grant(self, number: int, worker: str) -> Lease:
        deadline = self._clock() + self._lease_seconds
        self._tally["wasted_groups"] += self._ledger.state(number) is not None
        record = self._ledger.lease(number, worker=worker, deadline=deadline, version=self.version)
        return Lease(number, record.cursor, record.attempt, record.version, self._lease_seconds)

    def _split(self, worker: str, groups: Sequence[FinishedGroup]) -> tuple[list[FinishedGroup], list[int]]:
        """The groups whose lease is current, each number once, and the numbers of the others: they are late."""
        current: dict[int, FinishedGroup] = {}
        late: list[int] = []
        for group in groups:
            if group.number not in current and self._ledger.is_current(worker, group.number, group.attempt):
                current[group.number] = group
            else:
                late.append(group.number)
        return list(current.values()), late

    def _accept(self, group: FinishedGroup, stored: StoredGroup | None) -> None:
        """leased -> finished; without a place in the store, which is for groups with a use, -> discarded."""
        self._ledger.finish(group.number)
        self._tally["completions"] += group.completions
        for name, value in (("groups", 1.0), ("reward", group.reward), ("nfe", group.nfe)):
            self._generated[name] += value
        if stored is None:
            self._ledger.discard(group.number, reason=NO_SPREAD)
        else:
            self._held[group.number] = stored

    def _train(self, numbers: Sequence[int]) -> None:
        """Sampled -> trained; their bytes stay in their files until `settle`."""
        for number in numbers:
            if self._ledger.state(number) is GroupState.FINISHED:  # of a dead buffer, which alone knew it was sampled
                self._ledger.sample(number)
            self._ledger.train(number)
            if number in self._held:
                self._store.retire([self._held[number]])

    def _notes(self, since: int) -> tuple[dict[str, Any], int]:
        """What goes into a segment file beside its groups."""
        notes = {"start": since, "entries": self._ledger.journal(since), "life": self._life}
        return notes | {"counters": self._counters(), "drained": sorted(self._drained)}, self._ledger.length

    def _counters(self) -> dict[str, float]:
        return {
            **{key: float(self._tally[key]) for key in _TALLIES},
            "sample_wait_seconds": self._sample_waits.seconds(),
            "lease_wait_seconds": self._lease_waits.seconds(),
        }

    def _take(self, chosen: list[StoredGroup], payloads: list[bytes], started: float) -> Batch:
        """finished -> sampled for the groups of one batch, all or none."""
        numbers = [one.number for one in chosen]
        version = self._next_version()
        ages = [staleness(version, one.oldest_version) for one in chosen]
        self._check_staleness(numbers, ages)
        for number in numbers:
            self._ledger.sample(number)
        self._last_staleness = ages or self._last_staleness  # a closing batch says nothing
        return Batch(numbers, payloads, version, ages, self._clock() - started, self._take_generated())

    def _take_generated(self) -> dict[str, float]:
        """Means over the groups accepted lately, a step's worth or more: generation may come in bursts."""
        sums = self._generated
        if sums["groups"] >= self._groups_per_step or not self._told:
            groups = max(1.0, sums["groups"])
            if not sums["groups"]:
                return {}  # its groups were all accepted in an earlier life
            self._told = {"groups": sums["groups"], "reward": sums["reward"] / groups, "nfe": sums["nfe"] / groups}
            self._generated = defaultdict(float)
        return self._told

    def _next_version(self) -> int:
        """The learner's version when it trains the next batch: those sampled before it count as published."""
        return self.version + len(self._ledger.numbers(GroupState.SAMPLED)) // self._groups_per_step

    def _ready(self) -> bool:
        """Whether a batch may be taken, once what the policy gives up is discarded."""
        if not self._learning():
            return False
        version = self._next_version()
        finished = self._ledger.numbers(GroupState.FINISHED)
        evicted = self._admission.evict(
            {number: staleness(version, self._held[number].oldest_version) for number in finished}
        )
        for number in evicted:
            self._ledger.discard(number, reason=STALE)
            self._store.drop([self._held.pop(number)])
        if evicted:
            self._changed.notify_all()
        return bool(self._selectable())

    def _selectable(self) -> list[int]:
        return self._admission.select(self._ledger.numbers(GroupState.FINISHED), self._ledger.head())

    def _wake_if_useful(self) -> None:
        """Wakes the waiters only if one of them could go on: dozens of actors wait here while tickets are short."""
        if self._next_to_lease() is not None or self._selectable():
            self._changed.notify_all()

    def _expire_overdue(self) -> None:
        """leased -> queued for every lease whose deadline has come."""
        overdue = self._ledger.overdue(self._clock())
        for number in overdue:
            self._ledger.requeue(number, reason="lease expired")
        self._tally["expired_leases"] += len(overdue)
        if overdue:
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

    def _check_versions(self, group: FinishedGroup) -> None:
        record = self._ledger.record(group.number)
        newest = self.version if self._learning() else group.oldest_version  # a learner that lives on will tell
        if not record.version <= group.oldest_version <= newest:
            self._violated(
                f"group {group.number} of worker {record.worker} has a token of version {group.oldest_version}, not of "
                f"{record.version} (its lease's) to {self.version} (the newest); actors adopt first or return the lease"
            )

    def _check_staleness(self, numbers: Sequence[int], ages: list[int]) -> None:
        bound = self._admission.staleness_bound
        if bound is None:
            return
        stale = {number: age for number, age in zip(numbers, ages, strict=True) if age > bound}
        if stale:
            self._violated(f"staleness above the bound {bound}: {stale} (group: staleness)")

    def _check_publication(self, snapshot: Snapshot, numbers: Sequence[int]) -> None:
        expected = self.version + 1 if self._starts is None else self._starts
        if expected > 0 and snapshot.version != expected:
            raise RuntimeError(f"version {snapshot.version} published, expected {expected}; staleness counts ones")
        self._check_sampled(numbers, f"trained in version {snapshot.version}")
        ages = [staleness(self.version, self._held[number].oldest_version) for number in numbers]
        self._check_staleness(numbers, ages)
        step = self._groups_per_step if self._learning() else 0
        if len(numbers) != step:
            raise RuntimeError(f"version {snapshot.version} ends {len(numbers)} groups, not a step of {step}")

    def _check_joined(self) -> None:
        if not self._joined:
            raise RejoinFirst("the replay buffer was started anew; rejoin or rewind comes first")

    def _check_sampled(self, numbers: Sequence[int], what: str) -> None:
        if len(set(numbers)) < len(numbers):
            raise RuntimeError(f"groups {numbers} {what}: one is named twice")
        strange = [number for number in numbers if self._ledger.state(number) is not GroupState.SAMPLED]
        if strange:
            raise RuntimeError(f"groups {strange} {what}, but they are not sampled")

    def _check_history(self, snapshot: Snapshot, trained: Sequence[int], sampled: Sequence[int]) -> None:
        if snapshot.version < self.version or (self._starts is not None and snapshot.version != self._starts):
            newest = self.version if self._starts is None else self._starts
            raise RunError(
                f"the learner of version {snapshot.version} cannot rejoin: another began at {newest}; end it"
            )
        here = (GroupState.FINISHED, GroupState.SAMPLED)
        gone = [n for n in trained if self._ledger.state(n) not in (*here, GroupState.TRAINED)]
        gone += [n for n in sampled if self._ledger.state(n) not in here]
        if gone:
            raise RunError(f"groups {gone} of the learner are lost here; let it start again from its newest checkpoint")

    def _violated(self, message: str) -> NoReturn:
        self._tally["violations"] += 1
        raise RuntimeError(message)


def _lock(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RunError(
            f"{path} is held: another replay buffer of this run did not end in {LOCK_SECONDS:g} s; end its process"
        ) from error
    return lock
