"""Recovery: whoever dies, and whenever, every accepted group is trained once by the learner that lives on."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from circulation_fixtures import Clock, fill, grant, result, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from segment_fixtures import Gate

from common.admission import ADMISSIONS
from common.checkpoint_manifest import Checkpoint
from common.checkpoint_store import CheckpointStore
from common.errors import RunError
from common.journal import decode_journal, encode_journal
from common.lease import Export, FinishedGroup, Lease, RejoinFirst
from common.ledger import GroupState, Ledger, LedgerError
from common.recovery import GROUPS_FILE, JOURNAL_FILE
from common.replay_buffer import ReplayBuffer, Sample
from common.segment_folder import SegmentFolder, decode_segment, encode_segment
from common.segment_store import SegmentStore
from common.version import LINEAGE, first_version, step_of

T = TypeVar("T")
NAN = "nan"
FATES = ["before", "half", "after", "full"]


class Dead(Exception):
    """The buffer's process is gone."""


class Full(RunError):
    """Its disk is."""


class Mortal:
    """A segment folder whose process dies at its next write (before, half way, after it), or whose disk is full."""

    def __init__(self, folder: SegmentFolder, fate: str = "") -> None:
        self._folder, self.fate, self.alive = folder, fate, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._folder, name)

    def write(self, groups: Sequence[FinishedGroup], notes: Any = None) -> tuple[int, int]:
        fate, self.fate = self.fate, ""
        if fate == "full":
            self._folder.next_number += 1
            raise Full("no space left")
        if fate or not self.alive:
            self.alive = False
        if fate == "half":
            whole = encode_segment(groups, notes).to_pybytes()
            with self._folder._filesystem.open_output_stream(self._folder.file(self._folder.next_number)) as stream:
                stream.write(whole[: len(whole) // 2])
        written = self._folder.write(groups, notes) if fate in ("", "after") and (self.alive or fate) else (0, 0)
        if not self.alive:
            raise Dead
        return written

    def delete(self, number: int) -> None:
        if self.alive:
            self._folder.delete(number)


def commit(store: CheckpointStore, step: int, version: int, export: Export, **facts: Any) -> Checkpoint:
    draft = store.begin(step)
    (draft.path / "groups").mkdir()
    (draft.path / JOURNAL_FILE).write_bytes(export.journal)
    (draft.path / GROUPS_FILE).write_bytes(export.groups)
    return draft.commit(version=version, journal_index=export.journal_index, facts={**export.facts, **facts})


class Learner:
    """Its parameters are the groups it was trained on."""

    def __init__(self, version: int, step: int, params: Counter[int]) -> None:
        self.version, self.step, self.params = version, step, params
        self.history: list[tuple[int, list[int]]] = []
        self.batches: list[Sample] = []


class World:
    """Actors, one learner, a buffer that dies, and what is left of each."""

    def __init__(self, *, seed: int, memory_bytes: int, **policy: Any) -> None:
        self.draw, self.clock, self.policy, self.memory_bytes = random.Random(seed), Clock(), policy, memory_bytes
        self.folder = SegmentFolder("mock:///segments")
        self.checkpoints = CheckpointStore("checkpoints", _filesystem=fs.FileSystem.from_uri("mock:///")[0])
        self.granted: set[tuple[int, int]] = set()
        self.leases: list[tuple[str, Lease]] = []
        self.void: list[tuple[str, Lease]] = []
        self.accepted: set[int] = set()
        self.useless: set[int] = set()
        self.aside: set[int] = set()
        self.versions: set[int] = set()
        self.deaths = 0
        self.submits: list[asyncio.Task[None]] = []
        self.damaged: set[int] = set()
        self.calm = False
        self.buffer = self.born()
        self.known = False
        self.learner = Learner(-1, 0, Counter())

    def mishap(self, chance: float) -> bool:
        return not self.calm and self.draw.random() < chance

    # -- the buffer's lives -----------------------------------------------------------------------------------------

    def born(self) -> ReplayBuffer:
        while True:
            self.store = SegmentStore("mock:///unused", memory_bytes=self.memory_bytes)
            self.mortal = Mortal(self.folder, self.draw.choice(FATES) if self.mishap(0.3) else "")
            self.store._folder = self.mortal  # pyright: ignore[reportAttributeAccessIssue]
            try:
                return ReplayBuffer(
                    store=self.store,
                    checkpoints=self.checkpoints,
                    lease_seconds=60.0,
                    drop_no_spread=True,
                    clock=self.clock,
                    **self.policy,
                )
            except (Dead, Full):
                self.deaths += 1

    async def kill(self) -> None:
        """Nobody calls the dead buffer any more, and nothing it still does has an effect."""
        self.mortal.alive = False
        self.deaths += 1
        for task in self.submits:
            task.cancel()
        await asyncio.gather(*self.submits, return_exceptions=True)
        self.submits.clear()
        self.buffer = self.born()
        self.known = False

    async def call(self, call: Coroutine[Any, Any, T], may_block: bool = False) -> T | None:
        """The reply; None for a call that blocked and was cancelled. Raises Dead."""
        task = asyncio.ensure_future(call)
        for _ in range(40):
            await asyncio.sleep(0)
        if not task.done():
            assert may_block
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0] if task.cancelled() else await self.ended(task)

    async def ended(self, task: "asyncio.Future[T]") -> T | None:
        try:
            return await task
        except asyncio.CancelledError:
            return None

    # -- actors -----------------------------------------------------------------------------------------------------

    async def lease(self) -> None:
        worker = self.draw.choice("ab")
        reply = await self.call(self.buffer.lease(worker, self.draw.randint(1, 3)), may_block=True)
        for lease in reply.leases if reply else []:
            assert (lease.number, lease.attempt) not in self.granted  # by whichever buffer
            assert lease.version == max(self.versions)
            self.granted.add((lease.number, lease.attempt))
            self.leases.append((worker, lease))

    async def submit(self) -> None:
        if self.leases:
            worker, lease = self.leases.pop(self.draw.randrange(len(self.leases)))
            spread = self.draw.choice([0.0, 1.0, 1.0, 1.0])
            newest = max(version for version in self.versions if version // LINEAGE == lease.version // LINEAGE)
            oldest = self.draw.choice([lease.version, self.draw.randint(lease.version, newest)])
            group = FinishedGroup(lease.number, lease.attempt, b"%d" % lease.number, spread, oldest, 4)
            self.submits.append(asyncio.ensure_future(self.hand_in(worker, lease, group)))
        if self.draw.random() < 0.8:
            await self.handed_in()

    async def hand_in(self, worker: str, lease: Lease, group: FinishedGroup) -> None:
        try:
            reply = await self.buffer.submit(worker, [group])
        except RunError:  # the disk was full: the actor tries again later
            self.leases.append((worker, lease))
            return
        if reply.accepted:
            (self.accepted if group.spread else self.useless).add(group.number)

    async def handed_in(self) -> None:
        submits, self.submits = self.submits, []
        done = await asyncio.gather(*submits, return_exceptions=True)
        others = [one for one in done if isinstance(one, Exception) and not isinstance(one, Dead)]
        assert not others, others
        if any(isinstance(one, Dead) for one in done):
            raise Dead

    async def zombie(self) -> None:
        """An actor hands in what it was leased before a learner returned to a checkpoint."""
        if self.void:
            worker, lease = self.draw.choice(self.void)
            group = FinishedGroup(lease.number, lease.attempt, b"void", 1.0, lease.version, 4)
            reply = await self.call(self.buffer.submit(worker, [group]))
            assert reply is not None
            assert reply.late == [lease.number]

    async def fail(self) -> None:
        if self.leases:
            worker, lease = self.leases.pop(self.draw.randrange(len(self.leases)))
            await self.call(self.buffer.fail(worker, lease.number, lease.attempt, "x", self.draw.random() < 0.3))

    async def expire(self) -> None:
        self.clock.now += self.draw.choice([20.0, 70.0])

    async def die(self) -> None:
        worker = self.draw.choice("ab")
        await self.call(self.buffer.return_worker(worker))
        self.leases = [one for one in self.leases if one[0] != worker]

    # -- the learner ------------------------------------------------------------------------------------------------

    async def join(self) -> None:
        """Before the learner's next call on a buffer that does not know it, or did not answer it."""
        learner = self.learner
        if self.known:
            return
        if learner.version < 0:
            await self.begin()
            return
        sampled = [number for batch in learner.batches for number in batch.numbers]
        for _ in range(self.draw.randint(1, 2)):
            await self.call(self.buffer.rejoin(weights(learner.version), learner.history, sampled))
            assert self.buffer._ledger.numbers(GroupState.SAMPLED) == sorted(sampled)
        self.known = True

    async def begin(self) -> None:
        """A learner begins from the newest sound checkpoint, or from nothing."""
        found = self.checkpoints.newest_sound()
        index, step, params = 0, 0, Counter()
        if found:
            index, step = found.checkpoint.journal_index, found.checkpoint.step
            params = Counter(dict.fromkeys(found.checkpoint.facts["params"], 1))
        version = None
        while version is None:
            try:
                version = await self.call(self.buffer.rewind(index, step))
            except RunError:
                continue
        self.void += self.leases
        self.leases.clear()
        assert (step_of(version), version in self.versions) == (step, False)
        assert all(version // LINEAGE > other // LINEAGE for other in self.versions)
        self.versions.add(version)
        self.learner = Learner(version, step, params)
        if self.mishap(0.2):
            await self.kill()
        else:
            await self.call(self.buffer.publish(weights(version), []))
            self.known = True

    async def sample(self) -> None:
        await self.join()
        if not self.known or len(self.learner.batches) == 2:
            return
        batch = await self.call(self.buffer.sample(), may_block=True)
        if batch and self.mishap(0.1):
            self.known = False  # the answer is lost
        elif batch:
            assert batch.payloads == [b"%d" % number for number in batch.numbers]
            self.learner.batches.append(batch)

    async def publish(self) -> None:
        await self.join()
        learner = self.learner
        if not self.known or not learner.batches:
            return
        batch = learner.batches.pop(0)
        assert batch.version == learner.version
        learner.params.update(batch.numbers)
        assert set(learner.params.values()) == {1}
        learner.version += 1
        learner.step += 1
        assert learner.version not in self.versions
        self.versions.add(learner.version)
        learner.history.append((learner.version, batch.numbers))
        if self.mishap(0.1):
            await self.kill()  # before the call arrived
        else:
            await self.call(self.buffer.publish(weights(learner.version), batch.numbers))
            self.known = not self.mishap(0.1)  # or the answer is lost

    async def set_aside(self) -> None:
        await self.join()
        if self.known and self.learner.batches:
            batches, self.learner.batches = self.learner.batches, []
            self.aside |= set(batches[0].numbers)
            try:
                await self.call(self.buffer.set_aside(batches[0].numbers, NAN))
                self.learner.batches = [replace(batch, version=batch.version - 1) for batch in batches[1:]]
            except RunError:
                await self.learner_dies()

    async def checkpoint(self) -> None:
        await self.join()
        learner = self.learner
        if not self.known or any(one.version >= learner.version for one in self.checkpoints.checkpoints()):
            return
        exporting = asyncio.ensure_future(self.buffer.export())
        for _ in range(self.draw.randrange(3)):
            await self.draw.choice([self.lease, self.submit, self.fail, self.expire])()
        try:
            export = await exporting
        except RunError:
            return
        checkpoint = commit(self.checkpoints, learner.step, learner.version, export, params=sorted(learner.params))
        learner.history.clear()
        assert set(learner.params) == {
            number for number, state in states(decode_journal(export.journal)).items() if state is GroupState.TRAINED
        }
        if self.mishap(0.2):
            await self.kill()
        sound = [one for one in self.checkpoints.checkpoints() if one.step not in self.damaged]
        if self.draw.random() < 0.2 and len(sound) > 1:
            self.damage(checkpoint)
            return  # it stays with the sound ones
        if self.draw.random() < 0.2 or len(sound) < 2:
            return
        kept = self.checkpoints.prune(2)
        if self.mishap(0.2):
            await self.kill()
        await self.join()
        await self.buffer.settle(min(one.journal_index for one in kept))

    def damage(self, checkpoint: Checkpoint) -> None:
        self.damaged.add(checkpoint.step)
        name = self.draw.choice(list(checkpoint.files))
        with self.checkpoints._filesystem.open_output_stream(f"checkpoints/{checkpoint.name}/{name}") as stream:
            stream.write(b"damaged")

    async def learner_dies(self) -> None:
        self.learner = Learner(-1, 0, Counter())
        self.known = False

    # -- the schedule -----------------------------------------------------------------------------------------------

    async def step(self, event: str) -> None:
        try:
            if event == "kill":
                await self.kill()
            elif event in FATES:
                self.mortal.fate = event
            else:
                await getattr(self, event)()
        except Dead:
            await self.kill()
        await self.check()

    async def check(self) -> None:
        ledger, gauges = self.buffer._ledger, await self.buffer.gauges()
        assert gauges["violations"] == 0
        bound = gauges["staleness_bound"]
        assert all(bound < 0 or age <= bound for batch in self.learner.batches for age in batch.staleness)
        trained = {n for n in range(ledger.next_number) if ledger.state(n) is GroupState.TRAINED}
        assert not self.known or trained == set(self.learner.params)
        needed = ledger.needed_attempts()
        assert {n: one.attempt for n, one in self.buffer._held.items()} == needed
        assert self.aside or self.policy["admission"] == "drop_when_stale" or not gauges["lost_groups"]

    async def finish(self) -> None:
        """Actors and learner go on until every group that has a number is at its end."""
        last, self.calm = self.buffer._ledger.next_number, True
        for _ in range(300):
            ends = [self.buffer._ledger.state(number) for number in range(last)]
            if self.known and all(end in ENDS for end in ends):
                break
            await self.step("lease")
            for event in [*["submit"] * len(self.leases), "sample", "publish"]:
                await self.step(event)
            self.clock.now += 1.0
        ledger, params = self.buffer._ledger, self.learner.params
        assert all(ledger.state(number) in ENDS for number in range(last))
        discarded = {record[0] for record in ledger.journal() if record[2] is GroupState.DISCARDED}
        if self.policy["admission"] == "drop_when_stale":
            self.accepted -= discarded  # or quarantined, when it was generated again
        accepted = {number for number in self.accepted if number < last}
        # what was set aside may come again when the buffer dies before it wrote that down, in whatever shape
        assert all(params[number] == 1 for number in accepted - self.aside)
        assert all(params[number] == 0 and number in discarded for number in self.useless)
        assert vars(Ledger.from_journal(ledger.journal()))["_states"] == ledger._states


ENDS = (GroupState.TRAINED, GroupState.DISCARDED, GroupState.QUARANTINED)


def states(entries: Sequence[Any]) -> dict[int, GroupState]:
    return {entry[0]: GroupState(entry[2]) for entry in entries}


EVENTS = [
    *["lease"] * 8,
    *["submit"] * 14,
    *["sample"] * 8,
    *["publish"] * 8,
    *["checkpoint"] * 4,
    *["set_aside", "fail", "expire", "die", "zombie"],
    *["kill", "learner_dies", *FATES],
]


async def inline(function: Callable[..., T], *arguments: Any) -> T:
    """What goes to a thread takes one turn of the loop instead, so that a schedule is the same each time."""
    await asyncio.sleep(0)
    return function(*arguments)


@settings(max_examples=100)
@given(
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 2**32),
    st.sampled_from([0, 2, 2**20]),
    st.sampled_from(list(ADMISSIONS)),
    st.lists(st.sampled_from(EVENTS), min_size=20, max_size=150),
)
def test_whoever_dies_every_accepted_group_is_trained_once_and_in_bound(
    groups_per_step: int, max_staleness: int, seed: int, memory_bytes: int, admission: str, events: list[str]
) -> None:
    async def scenario() -> None:
        world = World(
            seed=seed,
            memory_bytes=memory_bytes,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            admission=admission,
        )
        await world.step("join")
        for event in events:
            await world.step(event)
        await world.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", inline)
        asyncio.run(scenario())


# -- one thing at a time --------------------------------------------------------------------------------------------


class Place:
    """Folders in which one buffer lives after the other: each `buffer()` is made on the files of the one before."""

    def __init__(self, path: Path) -> None:
        self.segments, self.checkpoints = path / "segments", CheckpointStore(path / "checkpoints")

    def buffer(self, **changed: Any) -> ReplayBuffer:
        values = {"groups_per_step": 2, "max_staleness": 1, "lease_seconds": 60.0, "drop_no_spread": True}
        store = SegmentStore(self.segments, memory_bytes=2**20)
        return ReplayBuffer(store=store, checkpoints=self.checkpoints, **{**values, **changed})

    async def started(self, **changed: Any) -> ReplayBuffer:
        buffer = self.buffer(**changed)
        await buffer.publish(weights(0), [])
        return buffer

    async def save(self, buffer: ReplayBuffer, step: int) -> Checkpoint:
        return commit(self.checkpoints, step, buffer.version, await buffer.export())

    def file(self, checkpoint: Checkpoint, name: str) -> Path:
        return Path(self.checkpoints.name, checkpoint.name, name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.segments.iterdir())


async def train(buffer: ReplayBuffer) -> tuple[int, list[int]]:
    batch = await asyncio.wait_for(buffer.sample(), 30.0)
    assert batch.payloads == [b"group %d" % number for number in batch.numbers]
    await buffer.publish(weights(buffer.version + 1), batch.numbers)
    return buffer.version, batch.numbers


def trained(buffer: ReplayBuffer) -> list[int]:
    ledger = buffer._ledger
    return [number for number in range(ledger.next_number) if ledger.state(number) is GroupState.TRAINED]


def test_a_buffer_may_be_made_outside_its_loop_on_files_that_have_to_go(tmp_path: Path) -> None:
    """As Ray makes it."""
    place = Place(tmp_path)

    async def first() -> None:
        buffer = await place.started()
        await fill(buffer, 2)
        await train(buffer)
        await fill(buffer, 2)
        await place.save(buffer, 1)

    async def second() -> None:
        assert await buffer.rewind(place.checkpoints.checkpoints()[0].journal_index, 1) == first_version(2, 1)
        await buffer.publish(weights(first_version(2, 1)), [])
        assert await train(buffer) == (first_version(2, 2), [2, 3])

    asyncio.run(first())
    assert place.names() == [f"segment-0000000{n}.arrow" for n in range(4)]
    buffer = place.buffer()
    assert place.names() == [f"segment-0000000{n}.arrow" for n in (2, 3, 4)]  # with 0 and 1 went what is settled
    asyncio.run(second())


async def test_a_life_is_used_up_however_short_it_was_and_no_lease_or_version_is_given_twice(tmp_path: Path) -> None:
    place, leases, versions = Place(tmp_path), set(), []
    for life in range(4):
        buffer = place.buffer()
        versions.append(await buffer.rewind(0, 0) if life else 0)
        if life != 2:  # there nothing at all is published
            await buffer.publish(weights(versions[-1]), [])
            leases |= {(lease.number, lease.attempt) for lease in await grant(buffer, 4)}
        if life == 3:
            assert (await buffer.submit("a", [result(Lease(0, 0, 1, 0, 1.0))])).late == [0]
    assert len(leases) == 12
    assert versions == sorted(set(versions))
    for _ in range(3):  # a rewind uses up a life as well, though nothing is left to do
        versions.append(await place.buffer().rewind(0, 0))
    assert versions == sorted(set(versions))


async def test_names_that_were_drained_are_free_for_a_new_fleet_whoever_dies(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = place.buffer()
    await buffer.publish(weights(0), [])
    await buffer.drain("a")
    await buffer.submit("b", [result(lease) for lease in await grant(buffer, 1, "b")])  # it is in a file now
    again = place.buffer()
    assert (await again.lease("a", 1)).closed, "of the fleet that drained it, which lives on"
    await again.new_fleet()
    for one in (lambda: again, place.buffer):
        buffer = one()
        await buffer.publish(weights(await buffer.rewind(0, 0)), [])
        assert len((await buffer.lease("a", 1)).leases) == 1


async def test_a_settled_life_is_not_forgotten_with_its_files(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    await fill(buffer, 2)
    await train(buffer)
    index = (await place.save(buffer, 1)).journal_index
    await buffer.settle(index)
    seen = set()
    for _ in range(3):
        buffer = place.buffer()
        await buffer.rejoin(weights(1), [], [])
        (lease,) = await grant(buffer, 1)
        seen.add((lease.number, lease.attempt))
    assert len(seen) == 3


async def test_a_prompt_that_was_set_aside_for_its_data_stays_so(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    for _ in range(2):
        (lease,) = await grant(buffer, 1)
        assert await buffer.fail("a", lease.number, lease.attempt, "its reward raised", True)
    assert await place.buffer().quarantine() == [(0, "its reward raised")]


async def test_until_a_learner_tells_where_it_is_results_are_taken_and_nothing_is_given(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started(admission="drop_when_stale")
    leases = await grant(buffer, 4)
    await buffer.submit("a", [result(leases[0])])
    buffer = place.buffer(admission="drop_when_stale")
    leasing = asyncio.ensure_future(buffer.lease("b", 1))
    reply = await buffer.submit("a", [result(lease) for lease in leases[:3]])
    assert (reply.accepted, reply.late) == ([1, 2], [0])
    await asyncio.sleep(0.01)
    assert not leasing.done()
    for call in (buffer.sample(), buffer.publish(weights(0), []), buffer.export(), buffer.settle(0)):
        with pytest.raises(RejoinFirst, match="rejoin or rewind comes first"):
            await call
    await buffer.rejoin(weights(0), [], [])
    batch, lease = await asyncio.gather(buffer.sample(), leasing)
    assert (batch.numbers, [one.number for one in lease.leases]) == ([0, 1], [4])
    gauges = await buffer.gauges()
    assert (gauges["violations"], gauges["stale_discards"]) == (0, 0)


async def test_a_learner_rejoins_with_what_the_buffer_lost(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started(max_staleness=3)
    await fill(buffer, 8)
    history = [await train(buffer), await train(buffer)]
    held = (await buffer.sample()).numbers
    buffer = place.buffer(max_staleness=3)
    assert (trained(buffer), buffer._ledger.numbers(GroupState.FINISHED)) == ([], list(range(8)))
    for _ in range(2):  # repeating it changes nothing
        await buffer.rejoin(weights(2), history, held)
        assert (trained(buffer), buffer._ledger.numbers(GroupState.SAMPLED)) == ([0, 1, 2, 3], [4, 5])
    await buffer.publish(weights(3), held)
    for snapshot, done, sampled, needle in [
        (weights(2), [], [], "learner of version 2 cannot rejoin: another began at 3"),
        (weights(4), [(4, [6, 9])], [], r"groups \[9\] of the learner are lost here"),
        (weights(4), [(4, [6, 7])], [0], r"groups \[0\] of the learner are lost here"),
    ]:
        before = buffer._ledger.journal()
        with pytest.raises(RunError, match=needle):
            await buffer.rejoin(snapshot, done, sampled)
        assert (buffer._ledger.journal(), buffer.version) == (before, 3)


async def test_a_learner_that_dies_again_and_again_takes_what_it_had_trained_since_its_checkpoint(
    tmp_path: Path,
) -> None:
    place = Place(tmp_path)
    buffer = await place.started(max_staleness=2)
    await fill(buffer, 6)
    await train(buffer)
    index = (await place.save(buffer, 1)).journal_index
    leases = await fill(buffer, 2)
    for life in range(1, 4):
        await train(buffer)
        await train(buffer)
        await buffer.sample()
        (lease, *_) = await grant(buffer, 4)
        assert (await buffer.gauges())["groups_trained"] == 6
        version = await buffer.rewind(index, 1)
        assert version == first_version(life, 1)
        assert (await buffer.submit("a", [result(lease)])).late == [lease.number]
        with pytest.raises(RuntimeError, match=f"published, expected {version}"):
            await buffer.publish(weights(buffer.version + 1), [])
        await buffer.publish(weights(version), [])
        assert trained(buffer) == [0, 1]
        assert buffer._ledger.numbers(GroupState.FINISHED) == [2, 3, 4, 5, *leases]
        queued = buffer._ledger.numbers(GroupState.QUEUED)
        assert len(queued) == 4  # they wait until fewer than 6 groups below them are active
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(buffer.lease("a", 1), 0.01)
    await buffer.settle(index + 1)
    with pytest.raises(LedgerError, match="settled"):
        await buffer.rewind(index, 1)
    assert buffer._ledger.numbers(GroupState.QUEUED) == queued
    assert (await buffer.gauges())["violations"] == 0


async def test_a_damaged_segment_is_named_and_a_missing_one_too(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    for _ in range(2):
        await fill(buffer, 2)
    path = place.segments / "segment-00000001.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"group 1", b"group 7"))
    with pytest.raises(RunError, match=r"segment-00000001.arrow is missing or damaged: the checksum"):
        place.buffer()
    path.unlink()
    with pytest.raises(RunError, match=r"journal in .* breaks off: entries 0 to 2 are in no file; restore the"):
        place.buffer()
    path.write_bytes(whole)
    assert place.buffer()._ledger.numbers(GroupState.FINISHED) == [0, 1, 2, 3]


async def test_the_longest_journal_is_taken_whatever_its_step(tmp_path: Path) -> None:
    """After a return to an older checkpoint, one of a higher step may have the shorter journal."""
    place = Place(tmp_path)
    buffer = await place.started()
    for step in (9, 3):
        await fill(buffer, 2)
        await train(buffer)
        await place.save(buffer, step)
    entries = buffer._ledger.journal()
    for file in place.segments.iterdir():
        file.unlink()
    assert place.buffer()._ledger.journal()[: len(entries)] == entries


@pytest.mark.parametrize("damaged", [False, True])
async def test_any_sound_journal_of_a_checkpoint_will_do(damaged: bool, tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    for step in (1, 2):
        await fill(buffer, 2)
        await train(buffer)
        checkpoint = await place.save(buffer, step)
    await buffer.settle(min(one.journal_index for one in place.checkpoints.checkpoints()))
    await fill(buffer, 2)
    if damaged:
        place.file(checkpoint, JOURNAL_FILE).write_bytes(b"damaged")
    found = place.buffer()._ledger
    entries = buffer._ledger.journal()
    assert found.journal()[: len(entries)][:-2] == entries[:-2]
    assert found.numbers(GroupState.FINISHED) == [4, 5]


@pytest.mark.parametrize("damaged", [False, True])
async def test_bytes_come_back_from_a_checkpoint_or_their_groups_are_generated_again(
    damaged: bool, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    buffer = await place.started(max_staleness=2)
    await fill(buffer, 6)
    await train(buffer)
    checkpoint = await place.save(buffer, 1)
    await buffer.settle(checkpoint.journal_index)
    await train(buffer)  # 2 and 3, in no durable checkpoint
    if damaged:
        place.file(checkpoint, GROUPS_FILE).write_bytes(b"damaged")
    (place.segments / "segment-00000001.arrow").unlink()
    for life in (1, 2):  # the second finds what the first wrote
        buffer = place.buffer(max_staleness=2)
        missing = [2, 3, 4, 5] if damaged else []
        assert buffer._ledger.numbers(GroupState.QUEUED) == missing
        assert (await buffer.gauges())["lost_groups"] == len(missing), life
        assert sorted(buffer._held) == ([] if damaged else [2, 3, 4, 5])
    if damaged:  # the learner had trained 2 and 3
        with pytest.raises(RunError, match=r"groups \[2, 3\] of the learner are lost here"):
            await buffer.rejoin(weights(2), [(2, [2, 3])], [])
    version = await buffer.rewind(checkpoint.journal_index, 1)
    await buffer.publish(weights(version), [])
    if damaged:
        assert await fill(buffer, 4) == [2, 3, 4, 5]
    assert [(await train(buffer))[1] for _ in range(2)] == [[2, 3], [4, 5]]


async def test_trained_groups_whose_bytes_are_lost_are_missed_only_by_a_learner_that_returns(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    await fill(buffer, 2)
    history = [await train(buffer)]
    await fill(buffer, 2)
    await place.save(buffer, 1)
    commit(place.checkpoints, 0, 0, Export(0, encode_journal([]), b"", {"life": 0, "counters": {}, "drained": []}))
    groups = SegmentFolder(place.segments)
    _, notes = groups.read_all(1)
    groups.delete(1)
    groups.next_number = 1
    groups.write([], notes)
    buffer = place.buffer()
    await buffer.rejoin(weights(1), history, [])
    assert ((await buffer.gauges())["lost_groups"], trained(buffer)) == (0, [0, 1])
    await buffer.rewind(0, 0)
    assert ((await buffer.gauges())["lost_groups"], buffer._ledger.numbers(GroupState.QUEUED)) == (2, [0, 1])


async def test_an_export_is_of_one_moment_though_other_calls_go_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started(max_staleness=3)
    await fill(buffer, 4)
    leases = await grant(buffer, 4)
    batch = await buffer.sample()
    before = buffer._ledger.journal()
    gate = Gate(buffer._store)
    exporting = asyncio.ensure_future(buffer.export())
    while not gate.begun:
        await asyncio.sleep(0.001)
    submitting = asyncio.ensure_future(buffer.submit("a", [result(lease) for lease in leases]))
    assert await buffer.fail("a", leases[0].number, leases[0].attempt, "node lost", False)
    await buffer.publish(weights(1), batch.numbers)
    assert not exporting.done()
    gate.let_through(3)
    assert (await submitting).accepted == [5, 6, 7]
    export = await exporting
    assert export.journal_index == len(before)
    assert decode_journal(export.journal) == [tuple(entry) for entry in before]
    groups = decode_segment(export.groups, name="export")[0]
    assert {group.number for group in groups} == {0, 1, 2, 3}
    await place.save(buffer, 1)
    assert trained(place.buffer(max_staleness=3)) == batch.numbers


async def test_memory_of_trained_groups_is_free_and_their_files_go_when_they_are_settled(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    await fill(buffer, 2)
    assert (await buffer.gauges())["held_bytes"] == 14
    await train(buffer)
    gauges = await buffer.gauges()
    assert (gauges["held_bytes"], gauges["spilled_bytes"]) == (0, 14)
    await buffer.submit("a", [result(lease, spread=0.0) for lease in await grant(buffer, 2)])
    checkpoint = await place.save(buffer, 1)
    assert place.names() == [f"segment-0000000{n}.arrow" for n in range(4)]
    await buffer.settle(checkpoint.journal_index)
    await buffer._store.settle()
    assert place.names() == ["segment-00000003.arrow"]  # it ends where the checkpoint does
    gauges = await buffer.gauges()
    assert (gauges["held_bytes"], gauges["spilled_bytes"], gauges["segments"]) == (0, 0, 1)


async def test_entries_of_a_file_that_could_not_be_written_are_in_the_next(tmp_path: Path) -> None:
    place = Place(tmp_path)
    buffer = await place.started()
    leases = await grant(buffer, 4)
    mortal = Mortal(buffer._store._folder, "full")
    buffer._store._folder = mortal  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RunError, match="no space left"):
        await buffer.submit("a", [result(leases[0])])
    assert (await buffer.submit("a", [result(lease) for lease in leases[:2]])).accepted == [0, 1]
    mortal.fate = "full"
    with pytest.raises(RunError, match="no space left"):
        await buffer.rewind(0, 0)
    version = await buffer.rewind(0, 0)
    assert version == first_version(2, 0)
    found = place.buffer()._ledger
    assert found.journal()[: buffer._ledger.length] == buffer._ledger.journal()
    assert (found.numbers(GroupState.FINISHED), found.numbers(GroupState.QUEUED)) == ([0, 1], [2, 3])
