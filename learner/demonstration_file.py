"""DemonstrationFile: the rows of a JSONL or Parquet file, read one at a time.

- Opening it reads all of it once: every row is checked, and where it begins is kept (16 bytes a row), nothing else.
- A Parquet file is written out as JSONL first, a batch of rows at a time, into a temporary file.
- A row is a conversation: `messages`, or `prompt` and `completion`, which are a user's and an assistant's message.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError, one_line

Message = dict[str, str]
COLUMNS = ("messages", "prompt", "completion")
BOM = b"\xef\xbb\xbf"
EXPECTED = (
    "a JSONL or Parquet file with the texts `prompt` and `completion` in each row, or `messages`: a list of {role, "
    "content}, one of them the assistant's, but not the first"
)


class _Place(NamedTuple):
    start: int
    number: int


class DemonstrationFile:
    """Owned by who trains; holds the file open as long as it lives."""

    def __init__(self, path: str) -> None:
        """Raises UserError naming file and row when something is missing or malformed, or when there is nothing."""
        self.path = path
        self._unit = "line"
        try:
            self._file = self._opened()
            places = list(self._scan())
        except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"warm_start.file={path} cannot be read ({one_line(error)}); give {EXPECTED}") from error
        if not places:
            raise UserError(f"warm_start.file={path} holds no demonstrations; add rows or leave the key out")
        self._places = np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> list[Message]:
        """The messages of a row, from 0 on."""
        self._file.seek(int(self._places[row, 0]))
        return self._parsed(self._file.readline().removeprefix(BOM).decode(), self.name(row))

    def name(self, row: int) -> str:
        """What to call a row in an error."""
        return f"{self.path}, {self._unit} {self._places[row, 1]}"

    def _opened(self) -> IO[bytes]:
        if not self.path.endswith(".parquet"):
            return Path(self.path).open("rb")
        self._unit = "row"
        table = pq.ParquetFile(self.path)
        file = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this object lives
        for batch in table.iter_batches(columns=[name for name in COLUMNS if name in table.schema_arrow.names]):
            for row in batch.to_pylist():
                file.write(json.dumps(row, default=_text_of).encode() + b"\n")
        file.seek(0)
        return file

    def _scan(self) -> Iterator[_Place]:
        start = 0
        for number, line in enumerate(self._file, 1):  # JSON allows U+2028 inside a string: bytes know only \n
            text = line.removeprefix(BOM if number == 1 else b"").decode()
            if text.strip():
                self._parsed(text, f"{self.path}, {self._unit} {number}")
                yield _Place(start, number)
            start += len(line)

    def _parsed(self, line: str, name: str) -> list[Message]:
        shown = repr(line.rstrip("\n")[:60])
        try:
            row = json.loads(line)
            messages = _messages(row)
            json.dumps(messages, ensure_ascii=False).encode()  # half a character is no text
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{name}: {shown} ({one_line(error)}); give {EXPECTED}") from error
        if not all(isinstance(text, str) for message in messages for text in message.values()):
            raise UserError(f"{name}: {shown} holds a value that is no text; give {EXPECTED}")
        if "assistant" not in [message["role"] for message in messages[1:]]:
            raise UserError(f"{name}: {shown} has no assistant's message after another; give {EXPECTED}")
        return messages


def _text_of(value: Any) -> Any:
    """Of a Parquet value that JSON does not know: text is text, and all else none, which is refused by its row."""
    try:
        return value.decode() if isinstance(value, bytes) else None
    except UnicodeDecodeError:
        return None


def _messages(row: Any) -> list[Message]:
    given = row.get("messages") if isinstance(row, dict) else None
    if given is None:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return [{"role": message["role"], "content": message["content"]} for message in given]
