"""Circulation: which groups may be leased, sampled and trained now, and what each move changes.

- The rules of the replay buffer without its waiting: one call is one change, whole or refused. Whoever calls holds the
  buffer's lock (`common.replay_buffer`, where the contract stands).
- Bytes are dropped from the store in the same call in which their group comes to its end.
- `joined`: until a learner has told what it did, a buffer on the files of a dead one grants and samples nothing.
- `starts`: after a learner's return to a checkpoint nothing is granted before its first publication, of that version.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NoReturn

from common.admission import Admission
from common.errors import RunError
from common.histogram import Histogram
from common.lease import FinishedGroup, Lease, RejoinFirst
from common.ledger import GroupState
from common.recovery import ATTEMPTS_PER_LIFE, NO_SPREAD, Recovered
from common.segment_store import SegmentStore, StoredGroup
from common.version import first_version, staleness
from common.weight_store import Snapshot, WeightStore

MAX_DATA_TRIES = 2
STALE = "stale"
# wasted_groups: leases granted again, each a generation that was lost in part or whole (late results are among them)
TALLIES = ("late_results", "violations", "expired_leases", "returned_leases", "failed_leases")
TALLIES += ("wasted_groups", "completions", "lost_groups", "rewound_groups", "skipped_groups")


class Circulation:
    """Owned by one replay buffer; goes on where `found` ends."""

    def __init__(
        self,
        found: Recovered,
        *,
        store: SegmentStore,
        admission: Admission,
        groups_per_step: int,
        groups_limit: int | None,
        keep_versions: int,
    ) -> None:
        self.ledger = found.ledger
        self.held: dict[int, StoredGroup] = found.held
        self.life = found.life
        self.joined = not found.life  # a learner has told what it did, or there is none yet
        self.starts: int | None = None
        self.weights = WeightStore(keep=keep_versions)
        self.admission = admission
        self.drained: set[str] = set(found.drained)
        self.tally: Counter[str] = Counter({key: int(found.counters.get(key, 0)) for key in TALLIES})
        self.tally["lost_groups"] += len(found.lost)
        self.last_staleness: list[int] = []
        self.staleness = Histogram("replay_group_staleness")
        self._store = store
        self._groups_per_step = groups_per_step
        self._groups_limit = groups_limit
        self._generated: defaultdict[str, float] = defaultdict(float)
        self._told: dict[str, float] = {}

    @property
    def version(self) -> int:
        """The learner's published version, -1 before the first publication."""
        return self.weights.latest.version

    def learning(self) -> bool:
        """Whether there are weights to generate with: not before a learner's first publication, nor a lineage's."""
        return self.version >= 0 and self.starts is None

    # -- leases -------------------------------------------------------------------------------------------------

    def next_to_lease(self) -> int | None:
        """The queue's head (its ticket is charged already), else a fresh number if one may be given, else None."""
        if not self.learning():
            return None
        queued = self.ledger.first_queued()
        if queued is not None:
            # after a rewind more groups are out than there are tickets: those below must be trained again first
            return queued if self.admission.admit(self.ledger.active_below(queued)) else None
        if self._groups_limit is not None:
            counts = self.ledger.counts()
            replaced = counts[GroupState.DISCARDED] + counts[GroupState.QUARANTINED]
            if self.ledger.next_number - replaced >= self._groups_limit:
                return None
        return self.ledger.next_number if self.admission.admit(self.ledger.active_count) else None

    def grant(self, number: int, worker: str, *, deadline: float, seconds: float) -> Lease:
        """queued -> leased, or a fresh group -> leased."""
        self.tally["wasted_groups"] += self.ledger.state(number) is not None
        record = self.ledger.lease(number, worker=worker, deadline=deadline, version=self.version)
        return Lease(number, record.cursor, record.attempt, record.version, seconds)

    def give_back(self, worker: str, *, reason: str, held: Sequence[tuple[int, int]] = ()) -> list[int]:
        """leased -> queued for all leases of a worker but those `held`, by number and attempt; their numbers."""
        numbers = [n for n in self.ledger.leased_to(worker) if (n, self.ledger.record(n).attempt) not in held]
        for number in numbers:
            self.ledger.requeue(number, reason=reason)
        return numbers

    def expire(self, now: float) -> bool:
        """leased -> queued for every lease whose deadline has come; whether there was one."""
        overdue = self.ledger.overdue(now)
        for number in overdue:
            self.ledger.requeue(number, reason="lease expired")
        self.tally["expired_leases"] += len(overdue)
        return bool(overdue)

    def fail(self, number: int, *, reason: str, data: bool) -> bool:
        """leased -> queued, or quarantined at the second data failure; whether it was."""
        self.tally["failed_leases"] += 1
        if data and self.ledger.record(number).tries + 1 >= MAX_DATA_TRIES:
            self.ledger.quarantine(number, reason=reason)
            return True
        self.ledger.requeue(number, reason=reason, data=data)
        return False

    # -- groups -------------------------------------------------------------------------------------------------

    def split(self, worker: str, groups: Sequence[FinishedGroup]) -> tuple[list[FinishedGroup], list[int]]:
        """The groups whose lease is current, each number once, and the numbers of the others: they are late."""
        current: dict[int, FinishedGroup] = {}
        late: list[int] = []
        for group in groups:
            if group.number not in current and self.ledger.is_current(worker, group.number, group.attempt):
                current[group.number] = group
            else:
                late.append(group.number)
        return list(current.values()), late

    def check_versions(self, group: FinishedGroup) -> None:
        """Raises RuntimeError for a token older than its lease, or newer than anything published."""
        record = self.ledger.record(group.number)
        newest = self.version if self.learning() else group.oldest_version  # a learner that lives on will tell
        if not record.version <= group.oldest_version <= newest:
            self._violated(
                f"group {group.number} of worker {record.worker} has a token of version {group.oldest_version}, not of "
                f"{record.version} (its lease's) to {self.version} (the newest); actors adopt first or return the lease"
            )

    def accept(self, group: FinishedGroup, stored: StoredGroup | None) -> None:
        """leased -> finished; without a place in the store, which is for groups with a use, -> discarded."""
        self.ledger.finish(group.number)
        self.tally["completions"] += group.completions
        for name, value in (("groups", 1.0), ("reward", group.reward), ("nfe", group.nfe)):
            self._generated[name] += value
        if stored is None:
            self.ledger.discard(group.number, reason=NO_SPREAD)
        else:
            self.held[group.number] = stored

    def ready(self) -> tuple[list[int], bool]:
        """The groups of the next batch, none while there are too few, once what the policy gives up is discarded; and
        whether anything was."""
        if not self.learning():
            return [], False
        version = self._next_version()
        finished = self.ledger.numbers(GroupState.FINISHED)
        evicted = self.admission.evict(
            {number: staleness(version, self.held[number].oldest_version) for number in finished}
        )
        for number in evicted:
            self.ledger.discard(number, reason=STALE)
            self._store.drop([self.held.pop(number)])
        return self.selectable(), bool(evicted)

    def selectable(self) -> list[int]:
        """By ascending number."""
        return self.admission.select(self.ledger.numbers(GroupState.FINISHED), self.ledger.head())

    def sample(self, numbers: Sequence[int]) -> tuple[int, list[int], dict[str, float]]:
        """finished -> sampled for one batch: the learner's version when it trains it, their staleness, and the means
        over the groups accepted lately. Raises RuntimeError, and changes nothing, when one exceeds the bound."""
        version = self._next_version()
        ages = [staleness(version, self.held[number].oldest_version) for number in numbers]
        self._check_staleness(numbers, ages)
        for number in numbers:
            self.ledger.sample(number)
        for age in ages:
            self.staleness.observe(age)
        self.last_staleness = ages or self.last_staleness  # a closing batch says nothing
        return version, ages, self._take_generated()

    # -- the learner --------------------------------------------------------------------------------------------

    def check_joined(self) -> None:
        """Raises RejoinFirst where only a learner's `rejoin` or `rewind` goes on."""
        if not self.joined:
            raise RejoinFirst("the replay buffer was started anew; rejoin or rewind comes first")

    def publish(self, snapshot: Snapshot, trained: Sequence[int]) -> None:
        """sampled -> trained, and the version is raised.

        Raises RuntimeError, and changes nothing, when the version does not follow the last one, a group was not
        sampled, or it is not one step's groups.
        """
        self._check_publication(snapshot, trained)
        self.weights.publish(snapshot)
        self.starts = None
        self._train(trained)

    def set_aside(self, numbers: Sequence[int], reason: str) -> None:
        """sampled -> discarded. Raises RuntimeError, and changes nothing, when one was not sampled."""
        self._check_sampled(numbers, "set aside")
        for number in numbers:
            self.ledger.discard(number, reason=reason)
            self._store.drop([self.held.pop(number)])
        self.tally["skipped_groups"] += len(numbers)

    def rewind(self, index: int, step: int) -> int:
        """What was trained after journal entry `index`, or was sampled, is finished again, and leases are queued; the
        version of the first publication to come. Raises LedgerError, and changes nothing (`Ledger.rewind`)."""
        rewound = self.ledger.rewind(index, reason=f"the learner returned to step {step}")
        for number in self.ledger.numbers(GroupState.SAMPLED):
            self.ledger.unsample(number)
        for number in self.ledger.numbers(GroupState.LEASED):
            self.ledger.requeue(number, reason="the learner returned to a checkpoint")
        for number in [number for number in rewound if number not in self.held]:
            self.ledger.requeue(number, reason="its bytes are lost")
            self.tally["lost_groups"] += 1
        self.tally["rewound_groups"] += len(rewound)
        self.life += 1
        self.ledger.first_attempt = self.life * ATTEMPTS_PER_LIFE + 1
        self.starts = starts = first_version(self.life, step)
        self.joined = True
        return starts

    def rejoin(self, snapshot: Snapshot, history: Sequence[tuple[int, Sequence[int]]], sampled: Sequence[int]) -> None:
        """Afterwards `snapshot` is the newest, all of `history` is trained, and exactly `sampled` are sampled.

        Raises RunError, and changes nothing, when such a group is not here any more or the learner is not the newest.
        """
        self._check_history(snapshot, [n for _, numbers in history for n in numbers], sampled)
        self.joined = True
        for _, numbers in history:
            self._train([n for n in numbers if self.ledger.state(n) is not GroupState.TRAINED])
        if snapshot.version > self.version:
            self.weights.publish(snapshot)
            self.starts = None
        for number in self.ledger.numbers(GroupState.SAMPLED):
            if number not in sampled:
                self.ledger.unsample(number)
        for number in sampled:
            if self.ledger.state(number) is GroupState.FINISHED:
                self.ledger.sample(number)

    def settle(self, index: int) -> None:
        """Every checkpoint contains the journal up to `index`: bytes of what was trained by then go."""
        for number in self.ledger.settle(index):
            stored = self.held.pop(number, None)
            if stored is not None:
                self._store.drop([stored])
        self._store.forget(index)

    # -- inside -------------------------------------------------------------------------------------------------

    def _train(self, numbers: Sequence[int]) -> None:
        """Sampled -> trained; their bytes stay in their files until `settle`."""
        for number in numbers:
            if self.ledger.state(number) is GroupState.FINISHED:  # of a dead buffer, which alone knew it was sampled
                self.ledger.sample(number)
            self.ledger.train(number)
            if number in self.held:
                self._store.retire([self.held[number]])

    def _take_generated(self) -> dict[str, float]:
        """Means over the groups accepted lately, a step's worth or more: generation may come in bursts."""
        sums = self._generated
        groups = sums["groups"]  # 0 where all were accepted in an earlier life
        if groups and (groups >= self._groups_per_step or not self._told):
            self._told = {"reward": sums["reward"] / groups, "nfe": sums["nfe"] / groups}
            self._generated = defaultdict(float)
        return self._told

    def _next_version(self) -> int:
        """The learner's version when it trains the next batch: those sampled before it count as published."""
        return self.version + len(self.ledger.numbers(GroupState.SAMPLED)) // self._groups_per_step

    def _check_staleness(self, numbers: Sequence[int], ages: list[int]) -> None:
        bound = self.admission.staleness_bound
        if bound is None:
            return
        stale = {number: age for number, age in zip(numbers, ages, strict=True) if age > bound}
        if stale:
            self._violated(f"staleness above the bound {bound}: {stale} (group: staleness)")

    def _check_publication(self, snapshot: Snapshot, numbers: Sequence[int]) -> None:
        expected = self.version + 1 if self.starts is None else self.starts
        if expected > 0 and snapshot.version != expected:
            raise RuntimeError(f"version {snapshot.version} published, expected {expected}; staleness counts ones")
        self._check_sampled(numbers, f"trained in version {snapshot.version}")
        ages = [staleness(self.version, self.held[number].oldest_version) for number in numbers]
        self._check_staleness(numbers, ages)
        step = self._groups_per_step if self.learning() else 0
        if len(numbers) != step:
            raise RuntimeError(f"version {snapshot.version} ends {len(numbers)} groups, not a step of {step}")

    def _check_sampled(self, numbers: Sequence[int], what: str) -> None:
        if len(set(numbers)) < len(numbers):
            raise RuntimeError(f"groups {numbers} {what}: one is named twice")
        strange = [number for number in numbers if self.ledger.state(number) is not GroupState.SAMPLED]
        if strange:
            raise RuntimeError(f"groups {strange} {what}, but they are not sampled")

    def _check_history(self, snapshot: Snapshot, trained: Sequence[int], sampled: Sequence[int]) -> None:
        if snapshot.version < self.version or (self.starts is not None and snapshot.version != self.starts):
            newest = self.version if self.starts is None else self.starts
            raise RunError(
                f"the learner of version {snapshot.version} cannot rejoin: another began at {newest}; end it"
            )
        here = (GroupState.FINISHED, GroupState.SAMPLED)
        gone = [n for n in trained if self.ledger.state(n) not in (*here, GroupState.TRAINED)]
        gone += [n for n in sampled if self.ledger.state(n) not in here]
        if gone:
            raise RunError(f"groups {gone} of the learner are lost here; let it start again from its newest checkpoint")

    def _violated(self, message: str) -> NoReturn:
        self.tally["violations"] += 1
        raise RuntimeError(message)
