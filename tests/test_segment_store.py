"""Segments: what was acknowledged is in a file, comes back as it was, and goes when nobody needs it."""

import asyncio
import os
import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_fixtures import Gate, until

from common import segment_folder
from common.errors import RunError, UserError
from common.lease import FinishedGroup
from common.segment_folder import SegmentFolder
from common.segment_store import SegmentStore, StoredGroup


def group(number: int, *, attempt: int = 1, size: int = 100) -> FinishedGroup:
    payload = random.Random(f"{number} {attempt}").randbytes(size)
    return FinishedGroup(number, attempt, payload, 0.25 * number, number - 1, 4, 1 / 3, 7.5)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def recovered(folder: Path, memory_bytes: int = 2**20) -> tuple[list[FinishedGroup], int]:
    store = SegmentStore(folder, memory_bytes=memory_bytes)
    found = store.recover()
    return await store.read(found.groups), found.half_written


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_bytes", [2**20, 0])
async def test_groups_come_back_as_they_were(memory_bytes: int, tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=memory_bytes)
    groups = [group(3, size=0), group(7, attempt=2, size=70_000)]
    stored = await store.write(groups)
    assert [(one.number, one.attempt, one.oldest_version, one.size) for one in stored] == [
        (3, 1, 2, 0),
        (7, 2, 6, 70_000),
    ]
    assert stored[1].group == (groups[1] if memory_bytes else None)
    assert await store.read(stored[::-1]) == groups[::-1]
    assert await recovered(tmp_path) == (groups, 0)
    assert await recovered(tmp_path, 0) == (groups, 0)


def test_segments_are_arrow_files_that_others_can_read(tmp_path: Path) -> None:
    SegmentFolder(tmp_path).write([group(3), group(4)])
    table = pa.ipc.open_file(tmp_path / "segment-00000000.arrow").read_all()
    assert table.schema.names == segment_folder.SCHEMA.names
    assert (table["number"].to_pylist(), table["payload"].to_pylist()) == ([3, 4], [group(3).payload, group(4).payload])
    assert table.schema.metadata[segment_folder.VERSION_KEY] == b"2"


async def test_every_write_is_a_new_file_and_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    async def write(number: int) -> None:
        await SegmentStore(tmp_path, memory_bytes=0).write([group(number)])

    await write(0)
    first = (tmp_path / "segment-00000000.arrow").read_bytes()
    (tmp_path / "segment-00000041.arrow").write_bytes(first)
    (tmp_path / "segment-00000099.arrow.partial").write_bytes(b"not ours")
    await write(1)
    await write(2)
    assert names(tmp_path) == [
        *[f"segment-000000{n}.arrow" for n in ("00", "41", "42", "43")],
        "segment-00000099.arrow.partial",
    ]
    assert (tmp_path / "segment-00000000.arrow").read_bytes() == first


async def test_a_write_is_acknowledged_only_when_its_file_is_closed(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=2**20)
    gate = Gate(store)
    call = asyncio.ensure_future(store.write([group(0)]))
    await until(lambda: gate.begun)
    await asyncio.sleep(0.02)
    assert not call.done()
    gate.let_through(1)
    await call
    assert SegmentFolder(tmp_path).read(0) == [group(0)]


async def test_what_arrives_while_a_segment_is_written_shares_the_next(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=2**20)
    gate = Gate(store)
    calls = [asyncio.ensure_future(store.write([group(0)]))]
    await until(lambda: gate.begun)
    calls += [asyncio.ensure_future(store.write([group(n), group(n + 10)])) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    gate.let_through(2)
    stored = await asyncio.gather(*calls)
    assert [[(one.number, one.segment.number) for one in own] for own in stored] == [
        [(0, 0)],
        *[[(n, 1), (n + 10, 1)] for n in (1, 2, 3)],
    ]
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000001.arrow"]
    assert store.gauges()["segment_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    gate.let_through()
    assert await store.write([]) == []
    await store.settle()
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000001.arrow"]  # nobody's journal: no use


# -- memory ---------------------------------------------------------------------------------------------------------


async def test_memory_keeps_the_lowest_numbers_and_the_rest_is_read_back(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=350)
    stored = []
    for number in (5, 1, 4, 2, 3):
        stored += await store.write([group(number)])
    assert sorted(one.number for one in stored if one.group) == [1, 2, 3]
    gauges = store.gauges()
    assert (gauges["held_bytes"], gauges["spilled_bytes"], gauges["segments"]) == (300, 200, 5)
    assert await store.read(stored) == [group(number) for number in (5, 1, 4, 2, 3)]
    assert (await store.write([group(0, size=1000)]))[0].group is None  # alone it is more than the bound
    store.drop(stored[1:])
    await store.write([group(9)])
    gauges = store.gauges()
    assert (gauges["held_bytes"], gauges["spilled_bytes"]) == (100, 1100)


async def test_a_file_goes_when_all_its_groups_are_dropped(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=100)
    one, two = await store.write([group(0), group(1)])
    await store.write([group(2)])
    store.drop([one])
    await store.settle()
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000001.arrow"]
    assert await store.read([two]) == [group(1)]
    store.drop([two])
    await store.settle()
    assert names(tmp_path) == ["segment-00000001.arrow"]
    assert store.gauges()["segments"] == 1
    with pytest.raises(RuntimeError, match=r"groups \[1\] were dropped before"):
        store.drop([two])
    with pytest.raises(RuntimeError, match=r"groups \[1\] were dropped before"):
        await store.read([two])


async def test_a_file_stays_while_it_is_read(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    stored = await store.write([group(0)])
    gate = Gate(store, "read")
    reading = asyncio.ensure_future(store.read(stored))
    await until(lambda: gate.begun == 1)
    store.drop(stored)
    await store.settle()
    assert names(tmp_path) == ["segment-00000000.arrow"]
    gate.let_through()
    assert await reading == [group(0)]
    await store.settle()
    assert names(tmp_path) == []
    stored = await store.write([group(1)])
    reading = asyncio.ensure_future(store.read(stored))
    await until(lambda: gate.begun == 2)
    store.drop(stored)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await store.settle()
    assert (reading.cancelled(), names(tmp_path)) == (True, [])
    gate.let_through()  # its thread finds no file, and nobody minds


# -- cancellation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "being written", "written"])
async def test_a_cancelled_write_keeps_nothing_and_its_companions_everything(when: str, tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=150)
    gate = Gate(store)
    first = asyncio.ensure_future(store.write([group(0)]))
    await until(lambda: gate.begun)
    gone, stays = (asyncio.ensure_future(store.write([group(number)])) for number in (1, 2))
    await asyncio.sleep(0)
    if when == "waiting":
        gone.cancel()
    if when == "written":
        write_segment = store._write_segment

        async def then_cancel(calls: Any) -> None:
            await write_segment(calls)
            gone.cancel()  # its result is there, but it has not gone on yet

        store._write_segment = then_cancel
    gate.let_through(1)
    if when == "being written":
        await until(lambda: gate.begun == 2)
        gone.cancel()
    gate.let_through(1)
    await asyncio.gather(first, gone, stays, return_exceptions=True)
    assert gone.cancelled()
    await store.settle()
    assert await store.read(await stays) == [group(2)]
    assert sum(store.gauges()[key] for key in ("held_bytes", "spilled_bytes")) == 200
    store.drop([*await first, *await stays])
    await store.settle()
    assert names(tmp_path) == []


async def test_a_segment_whose_calls_are_all_cancelled_goes(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=2**20)
    gate = Gate(store)
    under_way = asyncio.ensure_future(store.write([group(0)]))
    await until(lambda: gate.begun)
    waiting = asyncio.ensure_future(store.write([group(1)]))
    await asyncio.sleep(0)
    under_way.cancel()
    waiting.cancel()
    gate.let_through(1)
    await store.settle()
    assert (gate.begun, names(tmp_path), store.gauges()["held_bytes"]) == (1, [], 0)


# -- errors ---------------------------------------------------------------------------------------------------------


async def test_a_full_disk_fails_the_calls_of_its_segment_and_no_others(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the write really fails in its middle."""

    store = SegmentStore(tmp_path, memory_bytes=2**30)
    before = await store.write([group(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        failed = await asyncio.gather(
            store.write([group(1, size=2**21)]), store.write([group(2)]), return_exceptions=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for error in failed:
        assert isinstance(error, RunError)
        assert f"{tmp_path}/segment-00000001.arrow cannot be written" in str(error)
        assert "File too large; make room there" in str(error)
    assert names(tmp_path) == ["segment-00000000.arrow"]
    assert store.gauges()["held_bytes"] == 100
    after = await store.write([group(1)])
    assert await store.read([*before, *after]) == [group(0), group(1)]
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000002.arrow"]


def test_a_folder_that_is_gone_and_a_second_writer_are_named(tmp_path: Path) -> None:
    folder, other = SegmentFolder(tmp_path / "a"), SegmentFolder(tmp_path / "a")
    folder.write([group(0)])
    with pytest.raises(RunError, match=r"segment-00000000.arrow is there already: another process .* end one of"):
        other.write([group(0)])
    assert folder.read(0) == [group(0)]
    folder.delete(0)
    with pytest.raises(RunError, match=r"segment-00000000.arrow cannot be removed.*remove the file yourself"):
        folder.delete(0)
    (tmp_path / "a").rmdir()
    with pytest.raises(
        RunError, match=f"{tmp_path}/a/segment-00000001.arrow cannot be written: No such file or directory; make room"
    ):
        folder.write([group(1)])


async def test_a_group_that_cannot_be_encoded_leaves_no_file_and_nobody_waiting(tmp_path: Path) -> None:
    store = SegmentStore(tmp_path, memory_bytes=0)
    strange: Any = "text"
    with pytest.raises(Exception, match="not a float"):
        await store.write([replace(group(0), spread=strange)])
    await store.write([group(1)])
    assert names(tmp_path) == ["segment-00000001.arrow"]


@pytest.mark.parametrize("folder", ["nowhere://x/y", "file", "file/below"])
def test_a_folder_that_cannot_be_opened_is_the_users_mistake(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = folder if "://" in folder else str(tmp_path / folder)
    with pytest.raises(UserError, match=f"segment folder {where} cannot be opened: .*give a folder"):
        SegmentStore(where, memory_bytes=0)


def test_a_negative_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory_bytes is -1; 0 "):
        SegmentStore(tmp_path, memory_bytes=-1)


# -- recovery -------------------------------------------------------------------------------------------------------


async def test_a_later_process_goes_on_with_what_it_finds(tmp_path: Path) -> None:
    first = SegmentStore(tmp_path, memory_bytes=2**20)
    stored = await first.write([group(0), group(1)])
    stored += await first.write([group(2)])
    first.drop(stored[:1])
    with pytest.raises(RuntimeError, match="before the first write"):
        first.recover()
    second = SegmentStore(tmp_path, memory_bytes=200)
    found = second.recover().groups
    # group 0 is back too: its companion kept the file; the ledger knows better
    assert [(one.number, one.attempt, one.group is None) for one in found] == [
        (0, 1, False),
        (1, 1, False),
        (2, 1, True),
    ]
    second.drop(found[:1])
    await second.write([group(3)])
    assert names(tmp_path) == [f"segment-0000000{n}.arrow" for n in range(3)]
    second.drop(found[1:])
    await second.settle()
    assert names(tmp_path) == ["segment-00000002.arrow"]


async def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert await recovered(tmp_path / "new" / "folder") == ([], 0)


async def test_a_half_written_last_segment_was_never_acknowledged(tmp_path: Path) -> None:
    """At whatever byte the process died."""
    folder = SegmentFolder(tmp_path)
    folder.write([group(0)])
    number, size = folder.write([group(1), group(2)])
    path = Path(folder.file(number))
    whole = path.read_bytes()
    assert len(whole) == size
    for length in [*range(40), *range(40, size - 1, 7), size - 1]:
        path.write_bytes(whole[:length])
        assert await recovered(tmp_path) == ([group(0)], 1)
        assert names(tmp_path) == ["segment-00000000.arrow"]


async def test_all_of_the_newest_that_a_power_failure_cut_short_go(tmp_path: Path) -> None:
    folder = SegmentFolder(tmp_path)
    for number in range(4):
        folder.write([group(number)])
    os.truncate(folder.file(2), 900)
    os.truncate(folder.file(3), 0)
    assert await recovered(tmp_path) == ([group(0), group(1)], 2)
    assert names(tmp_path) == ["segment-00000000.arrow", "segment-00000001.arrow"]


async def test_a_segment_after_a_half_written_one_gets_a_number_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "segment-00000005.arrow").write_bytes(b"ARROW1\0\0")
    store = SegmentStore(tmp_path, memory_bytes=0)
    assert store.recover().half_written == 1
    await store.write([group(1)])
    assert names(tmp_path) == ["segment-00000006.arrow"]
    assert await recovered(tmp_path) == ([group(1)], 0)


async def test_a_segment_cut_short_that_is_not_the_last_is_damage(tmp_path: Path) -> None:
    folder = SegmentFolder(tmp_path)
    for number in range(2):
        folder.write([group(number)])
    os.truncate(folder.file(0), 900)
    with pytest.raises(
        RunError, match=r"segment-00000000.arrow is missing or damaged: .*move it and all later ones away: "
    ):
        await recovered(tmp_path)
    os.remove(folder.file(0))
    assert await recovered(tmp_path) == ([group(1)], 0)


def test_any_damaged_byte_is_named_or_harmless(tmp_path: Path) -> None:
    folder = SegmentFolder(tmp_path)
    groups = [group(0), group(1)]
    folder.write(groups)
    path = Path(folder.file(0))
    whole = path.read_bytes()
    draw, messages = random.Random(0), []
    end = len(whole) - len(b"ARROW1")  # without its end it counts as half-written
    for place in range(0, end, 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert folder.read(0) == groups
        except RunError as error:
            messages.append(str(error))
    assert all("segment-00000000.arrow" in message for message in messages)
    assert len(messages) > 150  # at least every byte of the payloads and their numbers
    path.write_bytes(whole.replace(groups[0].payload, groups[1].payload))
    with pytest.raises(RunError, match="the checksum of its group 0 does not match"):
        folder.read(0)
    path.write_bytes(whole)
    batch = pa.ipc.open_file(path).get_batch(0)
    with pytest.raises(ValueError, match="the checksum of its group 1 does not match"):
        segment_folder._decode(batch, 1)  # as when a damaged footer points to another group


def test_a_missing_file_and_other_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SegmentFolder(tmp_path)
    with pytest.raises(RunError, match=r"segment-00000007.arrow is missing or damaged"):
        folder.read(7)
    with pa.OSFile(folder.file(3), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("x", pa.int8())])):
        pass
    with pytest.raises(RunError, match=r"segment-00000003.arrow has schema version none, this code reads 2; use the"):
        folder.read(3)
    monkeypatch.setattr(segment_folder, "SCHEMA_VERSION", "1")
    number, _ = folder.write([group(0)])
    monkeypatch.undo()
    with pytest.raises(RunError, match="has schema version 1, this code reads 2"):
        folder.read(number)


# -- random sequences -----------------------------------------------------------------------------------------------

OPERATIONS = st.lists(st.sampled_from(["write", "write", "cancel", "drop", "read", "restart"]), max_size=30)


class Model:
    """A store against what it should hold."""

    def __init__(self, memory_bytes: int, seed: int) -> None:
        self.store = SegmentStore("mock:///segments", memory_bytes=memory_bytes)
        self.memory_bytes, self.draw = memory_bytes, random.Random(seed)
        self.held: dict[StoredGroup, FinishedGroup] = {}
        self.attempts = 0

    def some(self) -> list[StoredGroup]:
        return [one for one in self.held if self.draw.random() < 0.4]

    def fresh(self) -> list[FinishedGroup]:
        self.attempts += 1
        numbers = range(self.draw.randint(1, 3))
        return [
            group(self.draw.randrange(50), attempt=10 * self.attempts + n, size=self.draw.randrange(200))
            for n in numbers
        ]

    async def step(self, operation: str) -> None:
        if operation == "write":
            calls = [self.fresh() for _ in range(self.draw.randint(1, 4))]
            for groups, stored in zip(calls, await asyncio.gather(*map(self.store.write, calls)), strict=True):
                self.held.update(zip(stored, groups, strict=True))
        elif operation == "cancel":
            call = asyncio.ensure_future(self.store.write(self.fresh()))
            for _ in range(self.draw.randrange(4)):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await self.store.settle()
            assert call.cancelled()
        elif operation == "drop":
            gone = self.some()
            self.store.drop(gone)
            for one in gone:
                del self.held[one]
        elif operation == "read":
            some = self.some()
            assert await self.store.read(some) == [self.held[one] for one in some]
        elif operation == "restart":
            await self.restart()

    async def restart(self) -> None:
        await self.store.settle()
        folder, wanted = self.store._folder, {(g.number, g.attempt): g for g in self.held.values()}
        self.store = SegmentStore("mock:///other", memory_bytes=self.memory_bytes)
        self.store._folder = folder
        found = self.store.recover().groups
        live = [one for one in found if (one.number, one.attempt) in wanted]
        assert len(live) == len(wanted)
        self.held = {one: wanted[one.number, one.attempt] for one in live}
        self.store.drop(one for one in found if one not in self.held)

    async def check(self) -> None:
        await self.store.settle()
        gauges = self.store.gauges()
        memory = sum(one.size for one in self.held if one.group)
        assert gauges["held_bytes"] == memory <= self.memory_bytes
        assert gauges["spilled_bytes"] == sum(one.size for one in self.held if not one.group)
        assert self.store._folder.numbers() == sorted({one.segment.number for one in self.held})
        assert gauges["segments"] == len(self.store._folder.numbers())


@settings(max_examples=60)
@given(st.sampled_from([0, 150, 400, 10_000]), st.integers(0, 2**32), OPERATIONS)
def test_random_sequences(memory_bytes: int, seed: int, operations: list[str]) -> None:
    async def scenario() -> None:
        model = Model(memory_bytes, seed)
        for operation in operations:
            await model.step(operation)
            await model.check()
        assert await model.store.read(list(model.held)) == list(model.held.values())

    asyncio.run(scenario())
