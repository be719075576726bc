"""Journal: the ledger's entries as one Arrow file, for a checkpoint."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from common.errors import RunError, one_line
from common.ledger import GroupRecord

SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64(), nullable=False),
        pa.field("cursor", pa.int64(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("deadline", pa.float64(), nullable=False),
        pa.field("version", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("tries", pa.int32(), nullable=False),
    ],
    metadata={"diffpo.journal": "1"},
)
if tuple(SCHEMA.names) != GroupRecord._fields:
    raise RuntimeError(f"the journal's columns {SCHEMA.names} are not the ledger's {GroupRecord._fields}")


def encode_journal(entries: Sequence[Sequence[Any]]) -> bytes:
    """Arrow IPC file, compressed."""
    columns = list(zip(*entries, strict=True)) if entries else [()] * len(SCHEMA)
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
    return sink.getvalue().to_pybytes()


def decode_journal(data: bytes) -> list[tuple[Any, ...]]:
    """The entries.

    Raises:
        RunError: when the bytes are not such a file.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"journal of {len(data)} bytes is not a sound Arrow file: {one_line(error)}") from error
    if not table.schema.equals(SCHEMA):
        raise RunError(f"journal has the columns {table.schema.names}, this code reads {SCHEMA.names}")
    return list(zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True))
