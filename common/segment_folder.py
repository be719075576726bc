"""SegmentFolder: numbered, immutable files of finished groups, in a local folder or an object store.

- One write makes one new file, `segment-00000042.arrow`: an Arrow IPC file with one record batch per group, under
  `SCHEMA`. The version, the number of groups and the *notes* of who wrote it (JSON) stand in its metadata.
- Nothing is renamed, appended to or overwritten: object stores have no rename and no append. Numbers go on after the
  highest file found when the folder was opened. One process at a time writes into a folder.
- A file counts once its stream is closed. Arrow writes the footer last, so a file without one was half-written, by a
  process that died in the middle: nobody was told that its groups are safe.
- Every group carries a checksum; what is read back is what was written, or `RunError` names the file.
- No fsync: what must be survived is the death of the process, and that closed files do. After a power failure the
  newest files may be cut short; that is seen, and costs generating their groups again. An fsync would cost every
  acknowledgement some milliseconds, `pyarrow.fs` has none, and object stores are durable at the close.

Blocking calls, for a thread.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from pyarrow import fs

from common.errors import RunError, UserError, cause
from common.lease import FinishedGroup
from common.place import FAILURES, Place

SCHEMA_VERSION = "2"
VERSION_KEY, GROUPS_KEY = b"diffpo.segment", b"diffpo.segment.groups"
NOTES_KEY, NOTES_CHECKSUM_KEY = b"diffpo.segment.notes", b"diffpo.segment.notes.checksum"
SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("payload", pa.large_binary(), nullable=False),  # one group as `common.trajectory` encodes it
        pa.field("spread", pa.float64(), nullable=False),
        pa.field("oldest_version", pa.int64(), nullable=False),
        pa.field("completions", pa.int32(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("nfe", pa.float64(), nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),  # of all the others and of the row
    ]
)
_NAME = re.compile(r"segment-(\d{8,})\.arrow")
_MAGIC = b"ARROW1"
_SMALLEST = 2 * len(_MAGIC) + 6  # magic and padding before, footer length and magic after


class SegmentFolder:
    """Opened once by whoever writes, and made if it is not there."""

    def __init__(self, folder: str | Path) -> None:
        """`folder` is a local path or a URI that `pyarrow.fs.FileSystem.from_uri` knows.

        Raises:
            UserError: when it cannot be opened or made.
        """
        self.name = str(folder)
        try:
            place = Place(folder)
            self._filesystem, self._path = place.filesystem, place.path
            self._filesystem.create_dir(self._path, recursive=True)
            self.look()
        except FAILURES as error:
            raise UserError(
                f"segment folder {self.name} cannot be opened: {cause(error)}; give a folder that can be written, "
                "or a URI such as s3://bucket/folder"
            ) from error

    def look(self) -> list[int]:
        """Sorted numbers of the segment files that are there now; the next one is written above them."""
        numbers = self.numbers()
        self.next_number = max(numbers, default=-1) + 1
        return numbers

    def numbers(self) -> list[int]:
        """Sorted numbers of the segment files that are there; other files are none of its business."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._path))
        names = (_NAME.fullmatch(info.base_name) for info in found)
        return sorted(int(name[1]) for name in names if name)

    def file(self, number: int) -> str:
        """Path of one segment inside its file system."""
        return f"{self._path}/segment-{number:08d}.arrow"

    def write(self, groups: Sequence[FinishedGroup], notes: Mapping[str, Any] | None = None) -> tuple[int, int]:
        """Write one new segment, maybe of notes alone; its number and its bytes. When this returns, the file is closed.

        Raises:
            RunError: when it cannot be written; what was begun is removed, and its number is not used again.
        """
        number, self.next_number = self.next_number, self.next_number + 1
        encoded = encode_segment(groups, notes)
        file = self.file(number)
        try:
            if self._filesystem.get_file_info(file).type != fs.FileType.NotFound:
                raise RunError(
                    f"segment {file} is there already: another process writes into {self.name}; end one of the two"
                )
            with self._filesystem.open_output_stream(file) as stream:
                stream.write(encoded)
        except FAILURES as error:
            with suppress(*FAILURES):  # no footer, so it would not count anyway
                self._filesystem.delete_file(file)
            raise RunError(
                f"segment {file} cannot be written: {cause(error)}; make room there, mend its permissions, or "
                "choose another run.root"
            ) from error
        return number, encoded.size

    def read(self, number: int, rows: Sequence[int] | None = None) -> list[FinishedGroup]:
        """The groups of one segment in the order of `rows`, by default all of them.

        Raises:
            RunError: when the file is missing, damaged, or of another schema version.
        """
        with damage_named(self.file(number)), self._filesystem.open_input_file(self.file(number)) as source:
            return decode_segment(source, name=self.file(number), rows=rows)[0]

    def read_all(self, number: int) -> tuple[list[FinishedGroup], dict[str, Any]]:
        """All groups and the notes of one segment. Raises as `read` does."""
        with damage_named(self.file(number)), self._filesystem.open_input_file(self.file(number)) as source:
            return decode_segment(source, name=self.file(number))

    def half_written(self, number: int) -> bool:
        """Whether the file has no end, so that its process died while it wrote."""
        with damage_named(self.file(number)), self._filesystem.open_input_file(self.file(number)) as source:
            size = source.size()
            return size < _SMALLEST or source.read_at(len(_MAGIC), size - len(_MAGIC)) != _MAGIC

    def delete(self, number: int) -> None:
        """Remove one segment.

        Raises:
            RunError: when it cannot be removed.
        """
        try:
            self._filesystem.delete_file(self.file(number))
        except FAILURES as error:
            raise RunError(
                f"segment {self.file(number)} cannot be removed: {cause(error)}; mend the permissions of its folder, "
                "or remove the file yourself"
            ) from error


@contextmanager
def damage_named(file: str) -> Iterator[None]:
    """What goes wrong while a segment is read, as a `RunError` that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise RunError(
            f"segment {file} is missing or damaged: {cause(error)}; restore it from a copy, or move it and all later "
            "ones away: their groups are then generated again"
        ) from error


def encode_segment(groups: Sequence[FinishedGroup], notes: Mapping[str, Any] | None = None) -> pa.Buffer:
    """The bytes of a segment file, as a whole: it gets one write, and nothing that fails here leaves one behind."""
    written = json.dumps(notes or {}).encode()
    metadata = {
        VERSION_KEY: SCHEMA_VERSION.encode(),
        GROUPS_KEY: str(len(groups)).encode(),
        NOTES_KEY: written,
        NOTES_CHECKSUM_KEY: xxhash.xxh3_64_hexdigest(written).encode(),
    }
    schema = SCHEMA.with_metadata(metadata)
    columns: dict[str, list[Any]] = {name: [getattr(group, name) for group in groups] for name in SCHEMA.names[:-1]}
    columns["checksum"] = [_checksum(row, group) for row, group in enumerate(groups)]
    table = pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for row in range(len(groups)):  # a batch each, so that one group is read without its companions
            writer.write_batch(table.slice(row, 1))
    return sink.getvalue()


def decode_segment(
    source: Any, *, name: str, rows: Sequence[int] | None = None
) -> tuple[list[FinishedGroup], dict[str, Any]]:
    """Groups and notes of a segment file or of its bytes.

    Raises:
        RunError: when it is of another schema version; for damage also what `damage_named` turns into one.
    """
    reader = pa.ipc.open_file(source)
    metadata = reader.schema.metadata or {}
    version = metadata.get(VERSION_KEY, b"none").decode()
    if version != SCHEMA_VERSION:
        raise RunError(
            f"segment {name} has schema version {version}, this code reads {SCHEMA_VERSION}; use the code that wrote it"
        )
    if not reader.schema.equals(SCHEMA) or int(metadata[GROUPS_KEY]) != reader.num_record_batches:
        raise ValueError("its columns or its number of groups are not as written")
    if xxhash.xxh3_64_hexdigest(metadata[NOTES_KEY]).encode() != metadata[NOTES_CHECKSUM_KEY]:
        raise ValueError("the checksum of its notes does not match")
    wanted = range(reader.num_record_batches) if rows is None else rows
    return [_decode(reader.get_batch(row), row) for row in wanted], json.loads(metadata[NOTES_KEY])


def _decode(batch: pa.RecordBatch, row: int) -> FinishedGroup:
    """The group of one record batch. Raises ValueError when it is not what was written."""
    batch.validate(full=True)  # flipped bytes can decode and then crash whoever reads them
    (values,) = batch.to_pylist()
    checksum = values.pop("checksum")
    group = FinishedGroup(**values)
    if _checksum(row, group) != checksum:
        raise ValueError(f"the checksum of its group {row} does not match")
    return group


def _checksum(row: int, group: FinishedGroup) -> int:
    """The row counts too: a damaged footer can point to another sound group."""
    facts = (group.number, group.attempt, group.oldest_version, group.completions)
    digest = xxhash.xxh3_64(struct.pack("<5q3d", row, *facts, group.spread, group.reward, group.nfe))
    digest.update(group.payload)
    return digest.intdigest()
