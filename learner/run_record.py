"""RunRecord: the completions that a run was trained on, in `RUN/record/`, for report and viewer.

- One Parquet file for the steps between two checkpoints, written before the checkpoint: `steps-000051-000100.parquet`.
  What a run that goes on from an older checkpoint trains anew is taken out first, so no step is there twice.
- Every completion has its row (`learner.record_rows`). Position by position it is kept for `run.record_groups` groups
  of each step, and in each file for those with the best and the worst completion and the one that took longest.
- It is for people: where it cannot be written, a warning says so and training goes on.

Blocking calls.
"""

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import cause
from common.place import FAILURES, Place
from learner.record_rows import POSITIONS, SCHEMA

FOLDER = "record"
_NAME = re.compile(r"steps-(\d{6,})-(\d{6,})\.parquet")
MOST_ROWS = 50_000  # in memory, between two files


class RunRecord:
    """Owned by the learner actor."""

    def __init__(self, run: Place, *, groups: int, warn: Callable[[str], object]) -> None:
        """
        Args:
            run: the run directory.
            groups: of each step, that are kept position by position.
            warn: takes the word that it cannot be written, once.
        """
        self._place = run / FOLDER
        self._groups = groups
        self._warn = warn
        self._warned = False
        self._tables: list[pa.Table] = []

    def add(self, rows: pa.Table) -> None:
        """The rows of a step, under `learner.record_rows.SCHEMA`."""
        self._tables.append(rows)
        if sum(map(len, self._tables)) >= MOST_ROWS:
            self.write()

    def write(self) -> None:
        """Write what was added since the last time, if anything was."""
        if not self._tables:
            return
        table, self._tables = pa.concat_tables(self._tables), []
        try:
            self._put(_thinned(table, self._groups))
        except FAILURES as error:
            self._say(error)

    def rewind(self, step: int) -> None:
        """Take out all steps after `step`, before they are done again."""
        self._tables = []
        try:
            for name, first, last in _files(self._place):
                if last <= step:
                    continue
                if first <= step:
                    table = self._place.read_parquet(name)  # of whichever version
                    self._put(table.filter(pa.array(table["step"].to_numpy() <= step)))
                self._place.remove(name)
        except (*FAILURES, ValueError) as error:
            self._say(error)

    def _put(self, table: pa.Table) -> None:
        steps = table["step"].to_numpy()
        first, last = steps.min(), steps.max()
        encoded = pa.BufferOutputStream()
        pq.write_table(table, encoded, compression="zstd")
        self._place.filesystem.create_dir(self._place.path, recursive=True)
        self._place.write(f"steps-{first:06d}-{last:06d}.parquet", encoded.getvalue().to_pybytes())

    def _say(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"{self._place} lacks completions, it cannot be written: {cause(error)}")


def read_record(run: Place, *, columns: list[str] | None = None) -> tuple[pa.Table, list[str]]:
    """All rows that a run has kept so far, in order of steps, without files that cannot be read.

    Args:
        run: the run directory.
        columns: some of them; None is all.

    Returns:
        The rows, none of a run that has kept nothing; and each file that is damaged or of another version, with what
        is wrong with it.

    Raises:
        pa.ArrowException, OSError: when the folder cannot be looked at.
    """
    place, wanted = run / FOLDER, SCHEMA.names if columns is None else columns
    tables = [SCHEMA.empty_table().select(wanted)]
    unread = []
    for name, *_ in _files(place):
        try:
            tables.append(_read(place, name, wanted))
        except (*FAILURES, ValueError) as error:
            unread.append(f"{name}: {cause(error)}")
    return pa.concat_tables(tables), unread


def _files(place: Place) -> list[tuple[str, int, int]]:
    found = (_NAME.fullmatch(name) for name, _, _ in place.files())
    return sorted(((one[0], int(one[1]), int(one[2])) for one in found if one), key=lambda file: file[1:])


def _read(place: Place, name: str, wanted: list[str]) -> pa.Table:
    table = place.read_parquet(name, wanted)
    lacks = [column for column in wanted if column not in table.column_names]
    if lacks:
        raise ValueError(f"it is of another version and lacks {', '.join(lacks)}")
    return table.select(wanted).cast(pa.schema([SCHEMA.field(column) for column in wanted]))


def _thinned(table: pa.Table, groups: int) -> pa.Table:
    """Without the positions of all but some groups."""
    step, group = table["step"].to_numpy(), table["group"].to_numpy()
    kept: set[int] = set()
    for one in np.unique(step):
        kept.update(np.unique(group[step == one])[:groups].tolist())
    if groups:
        earned, seconds = table["earned"].to_numpy(), table["seconds"].to_numpy()
        kept.update(int(group[at]) for at in (earned.argmax(), earned.argmin(), np.nan_to_num(seconds).argmax()))
    inside = np.isin(group, sorted(kept))
    kept_rows = pa.array(np.arange(len(group)), mask=~inside)  # taking at null gives null
    for name in POSITIONS:
        column = table.schema.get_field_index(name)
        values = table[name].combine_chunks()
        table = table.set_column(column, SCHEMA.field(name), values.take(kept_rows))
    return table
