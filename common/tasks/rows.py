"""Rows of a local data file, a folder of them, or a data set of a hub; every error names the file and the row.

- JSONL (`.jsonl`, `.ndjson`), JSON (`.json`: a list of objects, or one object a line), CSV with a header, Parquet.
- A folder whose file names start with train, validation (val, dev) or test gives the files of the split asked for; any
  other folder gives all its data files, sorted by name.
- `hub:OWNER/NAME[:CONFIG[:SPLIT]]` is loaded through `datasets`, which is imported only then and, from version 4 on,
  runs no code of a data set. The split is the one asked for unless it is named.
- Nothing that is read is executed. Rows are numbered from 1; in text files a row's number is that of its (last) line.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError, cause, one_line

HUB = "hub:"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_FORMATS = f"a file that ends in {', '.join(SUFFIXES)}, a folder of such, or {HUB}OWNER/NAME"
_SPLIT_NAMES = {"train": "train", "validation": "validation|valid|val|dev", "test": "test"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]*(:[\w.-]+)?)?")


@dataclass(frozen=True)
class Row:
    """One record."""

    where: str
    """File and row, for messages."""
    values: dict[str, Any]

    def value(self, field: str, way_out: str) -> Any:
        """The field's value. Raises UserError, ending in `way_out`, where it is missing or null."""
        found = self.values.get(field)
        if found is None and field in self.values:
            raise UserError(f"{self.where}: field {field!r} holds nothing; mend the row, or {way_out}")
        if found is None:
            names = ", ".join(map(repr, list(self.values)[:20])) or "nothing"
            raise UserError(f"{self.where}: no value in field {field!r}; the row has {names}; {way_out}")
        return found

    def text(self, field: str, way_out: str) -> str:
        """The field's text. Raises UserError where it is missing, empty or no text."""
        found = self.value(field, way_out)
        if not isinstance(found, str) or not found.strip():
            raise UserError(f"{self.where}: field {field!r} holds {str(found)[:60]!r}, which is no text; {way_out}")
        return found


def is_hub(source: str) -> bool:
    """Whether a source is a data set of a hub."""
    return source.startswith(HUB)


def read_rows(source: str, key: str, split: str | None = None) -> list[Row]:
    """All rows of a source.

    Args:
        source: file, folder or hub id.
        key: what the user called the source, e.g. `task.data`; for messages.
        split: which split is asked for, where a folder or a hub has several.

    Raises:
        UserError: for what is missing, malformed or empty.
    """
    rows = _hub_rows(source, key, split) if is_hub(source) else []
    for path in [] if is_hub(source) else _files(source, key, split):
        try:
            rows += _READERS[path.suffix.lower()](path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {path} cannot be read ({cause(error)}); give {_FORMATS}") from error
    if not rows:
        raise UserError(f"{key}={source} holds no rows; give {_FORMATS} with rows in it")
    return rows


def _files(source: str, key: str, split: str | None) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        starts = re.compile(rf"({_SPLIT_NAMES.get(split or '', '')})(?![a-z])", re.IGNORECASE)
        every = re.compile(rf"({'|'.join(_SPLIT_NAMES.values())})(?![a-z])", re.IGNORECASE)
        if split is not None and any(every.match(file.name) for file in files):
            files = [file for file in files if starts.match(file.name)]
            if not files:
                raise UserError(f"{key}: folder {path} has no file that starts with {split}; give the file itself")
        if not files:
            raise UserError(f"{key}: folder {path} has no file that ends in {', '.join(SUFFIXES)}; give another")
        return files
    if not path.is_file():
        hint = f"; a data set of a hub is {HUB}{source}" if _looks_like_hub(source) else ""
        raise UserError(f"{key}: {source} is no file or folder here{hint}; give {_FORMATS}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{key}: {path} has an unknown ending {path.suffix!r}; give {_FORMATS}")
    return [path]


def _looks_like_hub(source: str) -> bool:
    named = _HUB_NAME.fullmatch(source) and "/" in source
    return bool(named) and not source.lower().endswith(SUFFIXES)


def _json_lines(path: Path) -> list[Row]:
    # not splitlines(): JSON allows U+2028 inside a string
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(path: Path, number: int, line: str) -> Row:
    where = f"{path}, row {number}"
    try:
        values = json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {line[:60]!r} is no JSON ({one_line(error)[:100]}); mend the row") from error
    return _json_row(where, values)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a name that it has twice, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _json_row(where: str, values: Any) -> Row:
    try:
        json.dumps(values, ensure_ascii=False).encode()  # JSON can say half a character, which is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: it holds what is no text ({one_line(error)[:100]}); mend the row") from error
    return _row(where, values)


def _row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise UserError(f"{where}: {str(values)[:60]!r} is no object with fields; mend the row")
    return Row(where, values)


def _json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    try:
        records = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON list ({one_line(error)[:100]}); mend it") from error
    return [_json_row(f"{path}, row {number}", values) for number, values in enumerate(records, 1)]


def _csv(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _check_header(path, reader)
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path}, row {reader.reader.line_num}: {one_line(error)}; mend the row") from error
            if values is None:
                return rows
            if None in values:
                raise UserError(
                    f"{path}, row {reader.line_num}: more columns than the header's {len(reader.fieldnames or ())}; "
                    "quote texts that hold a comma"
                )
            rows.append(Row(f"{path}, row {reader.line_num}", {str(name): value for name, value in values.items()}))


def _check_header(path: Path, reader: csv.DictReader) -> None:
    try:
        names = list(reader.fieldnames or ())
    except csv.Error as error:
        raise UserError(f"{path}, row 1: {one_line(error)}; mend the header") from error
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}, row 1: the header has {twice!r} twice; name each column once")


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        records = pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet ({one_line(error)[:160]}); mend or replace it") from error
    return [Row(f"{path}, row {number}", values) for number, values in enumerate(records, 1)]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _hub_rows(source: str, key: str, split: str | None) -> list[Row]:
    name = source.removeprefix(HUB)
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{key}={source}: give {HUB}OWNER/NAME[:CONFIG[:SPLIT]], such as {HUB}openai/gsm8k:main")
    owner_name, config, chosen = (*name.split(":"), "", "")[:3]
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{key}={source} needs the package datasets; pip install 'diffpo[hub]', or download the data set and give "
            "its file or folder"
        ) from error
    try:
        records: Iterator[Any] = iter(load_dataset(owner_name, config or None, split=chosen or split or "train"))
        return [_row(f"{source}, row {number}", values) for number, values in enumerate(records, 1)]
    except UserError:
        raise
    except Exception as error:  # whatever datasets, the hub and the network raise
        raise UserError(
            f"{key}={source} cannot be loaded ({one_line(error)[:160]}); commands stay offline unless HF_HUB_OFFLINE=0 "
            "is set; or download the data set and give its file or folder"
        ) from error
