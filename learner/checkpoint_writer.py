"""CheckpointWriter: makes checkpoints of a run durable while training and generation go on.

    learner thread   copies the trainer's state, asks the buffer for its part, hands both over
    writer thread    writes the files, digests, the manifest last; removes checkpoints that are too many

One checkpoint at a time: the next one waits for the last one's end.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from common.checkpoint_manifest import Checkpoint
from common.checkpoint_store import CheckpointStore
from common.errors import RunError, one_line
from common.lease import Export
from common.recovery import GROUPS_FILE, JOURNAL_FILE

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Owned by the learner actor while it trains."""

    def __init__(self, store: CheckpointStore, *, keep: int) -> None:
        self._store, self._keep = store, keep
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[list[Checkpoint]] | None = None
        self.newest = -1
        """Step of the newest checkpoint that this writer made durable."""
        self.durable_at = time.time()
        """When it became that (Unix time); before the first one, when this writer was made."""
        self.seconds = 0.0
        """How long the last one took to write."""
        self.failures = 0
        self.fault = ""
        """Why the last one that failed could not be written."""
        self.unsound: list[Checkpoint] = []
        """Damaged ones that training went on without: they go once a newer one is durable, and are not kept for it."""

    def start(self, step: int, version: int, save: Callable[[Path], None], export: Export) -> None:
        """Begin to write; call `finished` until there is none under way before the next one."""
        self._writing = self._threads.submit(self._write, step, version, save, export)

    def finished(self, *, wait: bool) -> list[Checkpoint]:
        """The checkpoints that stay, once, after one became durable; else none.

        One that could not be written is counted and logged: training goes on, the last checkpoint stays.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return []
        writing, self._writing = self._writing, None
        try:
            return writing.result()
        except RunError as error:
            self.failures += 1
            self.fault = str(error)
            log.error("checkpoint not written, the last one stays: %s", error)
            return []

    def _write(self, step: int, version: int, save: Callable[[Path], None], export: Export) -> list[Checkpoint]:
        started = time.monotonic()
        draft = self._store.begin(step)
        try:
            save(draft.path)
            (draft.path / JOURNAL_FILE).write_bytes(export.journal)
            groups = draft.path / GROUPS_FILE
            groups.parent.mkdir()
            groups.write_bytes(export.groups)
            draft.commit(version=version, journal_index=export.journal_index, facts=export.facts)
        except Exception as error:  # safetensors and torch have errors of their own for a full disk
            draft.abandon()
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"checkpoint of step {step} in {self._store.name} cannot be written: {one_line(error)}; make room there"
            ) from error
        self.newest, self.seconds, self.durable_at = step, time.monotonic() - started, time.time()
        try:
            while self.unsound:
                gone = self.unsound.pop()
                if gone.step != step:  # else this one took its place
                    self._store.discard(gone)
            return self._store.prune(self._keep)
        except RunError as error:  # it is durable all the same
            log.warning("%s", error)
            return self._store.checkpoints()
