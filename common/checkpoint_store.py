"""CheckpointStore: the checkpoints of a run, in a local folder or an object store.

- A checkpoint is a folder of files, `step-000120/`. Its `manifest.json` is written last and is the commit point: a
  folder without one is half-written and no checkpoint. Nothing is renamed or appended to: object stores can do neither.
- The manifest names every file with its bytes and its sha256, and carries a digest of itself. What is read back is what
  was committed, or `CheckpointDamaged` names the file. The digests find damage; they are no guard against an attacker.
- A committed checkpoint survives a power failure: local files and their folders are fsynced before the manifest, the
  manifest before `commit` returns. Object stores are durable at the close.
- The newest checkpoint is that of the highest version. Steps do not tell: a run that was resumed from an older
  checkpoint goes through the same steps again, with higher versions.
- One process at a time begins, commits and prunes; any number of others read.

Blocking calls, for a thread.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from common.checkpoint_manifest import (
    MANIFEST,
    Checkpoint,
    StoredFile,
    canonical,
    decode,
    describe,
    folder_name,
)
from common.errors import RunError, UserError, cause
from common.location import below
from common.new_folder import sync
from common.place import FAILURES, Place

_NAME = re.compile(r"step-([0-9]{6,})")
_CHUNK = 2**20
_MAKE_ROOM = "make room there, mend its permissions, or choose another run.root"
_MORE_TEMPORARY = "make room there, or set TMPDIR to a folder that has some"


class CheckpointDamaged(RunError):
    """A checkpoint is not what was committed; `fault` is the message without the way out."""

    def __init__(self, fault: str, way_out: str) -> None:
        super().__init__(fault, way_out)
        self.fault = fault

    def __str__(self) -> str:
        return "; ".join(self.args)


@dataclass(frozen=True, slots=True)
class Found:
    """The newest sound checkpoint, and a line on each that was passed over for it."""

    checkpoint: Checkpoint
    warnings: list[str]
    unsound: list[Checkpoint]
    """Newer ones with files that did not stand."""


class CheckpointStore:
    """Stateless and picklable. Its folder is made by the first `begin`; a missing one holds no checkpoints."""

    def __init__(self, folder: str | Path, *, _filesystem: fs.FileSystem | None = None) -> None:
        """`folder` is a local path or a URI that `pyarrow.fs.FileSystem.from_uri` knows.

        Raises:
            UserError: when the URI is not understood.
        """
        self.name = str(folder).rstrip("/")
        try:
            if _filesystem is not None:
                self._filesystem, self._path = _filesystem, self.name
            else:
                place = Place(folder)
                self.name, self._filesystem, self._path = place.name, place.filesystem, place.path
        except FAILURES as error:
            raise UserError(
                f"checkpoint folder {self.name} cannot be opened: {cause(error)}; give a local folder, or a URI "
                "such as s3://bucket/folder"
            ) from error
        self._local = isinstance(self._filesystem, fs.LocalFileSystem)

    # -- writing ----------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> "Draft":
        """Start the checkpoint of `step`; whatever is there under that step is removed first.

        Raises:
            RunError: when that cannot be removed, or no directory can be made to write into.
        """
        name = folder_name(step)
        self._remove(name)
        with _failure_named(f"checkpoint folder {self.name}/{name} cannot be made", _MAKE_ROOM):
            self._filesystem.create_dir(f"{self._path}/{name}", recursive=True)
        return Draft(self, step, None if self._local else _temporary())

    def prune(self, keep: int) -> list[Checkpoint]:
        """Remove all but the newest `keep` checkpoints, and return those, lowest step first.

        Half-written folders of a lower step than the newest checkpoint go too, and folders with a broken manifest of a
        lower step than all that stay. Nothing is verified: damaged files show only to those who read them.

        Raises:
            UserError: when `keep` is below 1.
            RunError: when the folder cannot be listed, or something cannot be removed.
        """
        if keep < 1:
            raise UserError(f"prune keeps {keep} checkpoints; the newest must be kept, give 1 or more")
        scan = self._scan()
        newest_first = sorted(_complete(scan), key=_age, reverse=True)
        stay = sorted(newest_first[:keep], key=lambda checkpoint: checkpoint.step)
        if not stay:
            return []
        for step, found in scan.items():
            if isinstance(found, Checkpoint):
                gone = found not in stay
            else:
                gone = step < (newest_first[0].step if found is None else stay[0].step)
            if gone:
                self._remove(folder_name(step))
        return stay

    def discard(self, checkpoint: Checkpoint) -> None:
        """Remove one. Raises RunError when it cannot be."""
        self._remove(checkpoint.name)

    def remove(self) -> None:
        """Remove everything, the folder too; what cannot be removed stays."""
        with suppress(RunError):
            for step in self._scan():
                self._remove(folder_name(step))
            with suppress(*FAILURES):
                self._filesystem.delete_dir(self._path)

    def _remove(self, name: str) -> None:
        """The manifest first: whoever dies or looks in between finds no checkpoint rather than half of one."""
        folder = f"{self._path}/{name}"
        way_out = "mend the permissions of its folder, or remove it yourself"
        with _failure_named(f"checkpoint {self.name}/{name} cannot be removed", way_out):
            with suppress(FileNotFoundError):
                self._filesystem.delete_file(f"{folder}/{MANIFEST}")
            with suppress(FileNotFoundError):
                self._filesystem.delete_dir(folder)

    # -- reading ----------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """Those with a sound manifest, lowest step first; their files are not looked at.

        Raises:
            RunError: when the folder cannot be listed.
        """
        return _complete(self._scan())

    def damaged(self) -> list[str]:
        """A line on each folder whose manifest is there but broken, lowest step first.

        Raises:
            RunError: when the folder cannot be listed.
        """
        return [found for found in self._scan().values() if isinstance(found, str)]

    def verify(self, checkpoint: Checkpoint) -> None:
        """Read every file and compare it with the manifest.

        Raises:
            CheckpointDamaged: naming the first file that is missing, unreadable, or not what was committed.
        """
        for name in checkpoint.files:
            for _ in self._chunks(checkpoint, name):
                pass

    def newest_sound(self, *, before: Checkpoint | None = None) -> Found | None:
        """The newest checkpoint that stands `verify`; None when nothing was ever committed.

        With `before` the newest of those that are older than it; None when there is none.

        Broken manifests do not tell their version, and half-written folders have none: each is among the warnings.

        Raises:
            CheckpointDamaged: naming all, when there are checkpoints but none is sound.
            RunError: when the folder cannot be listed.
        """
        scan = self._scan()
        broken = [found for found in scan.values() if isinstance(found, str)]
        faults: list[str] = []
        unsound: list[Checkpoint] = []
        for checkpoint in sorted(_complete(scan), key=_age, reverse=True):
            if before is not None and _age(checkpoint) >= _age(before):
                continue
            try:
                self.verify(checkpoint)
            except CheckpointDamaged as error:
                faults.append(error.fault)
                unsound.append(checkpoint)
                continue
            half_written = [
                f"checkpoint {self.name}/{folder_name(step)} is half-written, it has no {MANIFEST}"
                for step, found in scan.items()
                if found is None
            ]
            passed_over = [*faults, *broken, *half_written]
            warnings = [f"{fault}; {checkpoint.name} is used in its place" for fault in passed_over]
            return Found(checkpoint, warnings, unsound)
        if before is not None or not (faults or broken):
            return None
        raise CheckpointDamaged(
            f"{self.name} has no sound checkpoint: {'; '.join([*faults, *broken])}",
            "restore one of them from a copy, or start another run",
        )

    @contextmanager
    def fetch(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """A folder with the checkpoint's files, read-only by agreement.

        Of a local store it is the checkpoint itself, not verified; otherwise a verified download, removed afterwards.

        Raises:
            CheckpointDamaged: when a file that is downloaded is not what was committed.
            RunError: when there is no room for the download.
        """
        if self._local:
            yield Path(self._path, checkpoint.name)
            return
        with _temporary() as directory:
            self.download(checkpoint, Path(directory))
            yield Path(directory)

    def location(self, checkpoint: Checkpoint) -> str:
        """Path or URI of the checkpoint's folder."""
        return below(self.name, checkpoint.name)

    def download(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Copy the checkpoint's files into a folder, each verified. Raises as `fetch`."""
        for name in checkpoint.files:
            target = folder / name
            with _failure_named(f"checkpoint file {checkpoint.name}/{name} cannot become {target}", _MORE_TEMPORARY):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for chunk in self._chunks(checkpoint, name):
                        file.write(chunk)

    def read(self, checkpoint: Checkpoint, name: str) -> bytes:
        """The content of one file.

        Raises:
            LookupError: when the checkpoint has no such file; naming those it has.
            CheckpointDamaged: when it is missing, unreadable, or not what was committed.
        """
        if name not in checkpoint.files:
            raise LookupError(f"checkpoint {checkpoint.name} has no file {name}; it has {', '.join(checkpoint.files)}")
        return b"".join(self._chunks(checkpoint, name))

    def _chunks(self, checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
        """One file piece by piece. Raises CheckpointDamaged, at the latest instead of its end."""
        file = f"{checkpoint.name}/{name}"
        hashed, size, wanted = hashlib.sha256(), 0, checkpoint.files[name]
        try:
            with self._filesystem.open_input_stream(f"{self._path}/{file}", compression=None) as source:
                while chunk := source.read(_CHUNK):
                    hashed.update(chunk)
                    size += len(chunk)
                    yield chunk
        except FileNotFoundError:
            fault = "is missing"
        except FAILURES as error:
            fault = f"cannot be read: {cause(error)}"
        else:
            if size != wanted.bytes:
                fault = f"has {size} bytes instead of {wanted.bytes}"
            elif hashed.hexdigest() != wanted.sha256:
                fault = "has another digest than it was committed with"
            else:
                return
        raise CheckpointDamaged(
            f"checkpoint file {self.name}/{file} {fault}", "restore it from a copy, or use another checkpoint"
        )

    def _scan(self) -> dict[int, Checkpoint | str | None]:
        """What stands under each step: a checkpoint, the fault of its manifest, or None without one. Lowest step first.

        Raises:
            RunError: when the folder cannot be listed.
        """
        with _failure_named(
            f"checkpoint folder {self.name} cannot be listed",
            "mend its permissions or the connection to it, or choose another run.root",
        ):
            listed = self._filesystem.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        names = (_NAME.fullmatch(info.base_name) for info in listed if info.type == fs.FileType.Directory)
        steps = sorted(int(name[1]) for name in names if name and name[0] == folder_name(int(name[1])))
        return {step: self._look(step) for step in steps}

    def _look(self, step: int) -> Checkpoint | str | None:
        file = f"{folder_name(step)}/{MANIFEST}"
        try:
            with self._filesystem.open_input_stream(f"{self._path}/{file}", compression=None) as source:
                return decode(source.read(), step)
        except FileNotFoundError:
            return None
        except (*FAILURES, ValueError) as error:
            return f"checkpoint manifest {self.name}/{file} is damaged: {cause(error)}"


class Draft:
    """A checkpoint that was begun: write its files below `path`, sub-folders too, then commit or abandon it."""

    def __init__(
        self, store: CheckpointStore, step: int, waiting_room: "tempfile.TemporaryDirectory[str] | None"
    ) -> None:
        """For `CheckpointStore.begin`. Files wait in `waiting_room` for their upload; a local store has none."""
        self.step = step
        self._folder = f"{store._path}/{folder_name(step)}"
        self.path = Path(waiting_room.name if waiting_room else self._folder)
        self._store = store
        self._waiting_room = waiting_room
        self._ended = ""

    def commit(self, *, version: int, journal_index: int, facts: Mapping[str, Any] | None = None) -> Checkpoint:
        """Make it a checkpoint; when this returns, it is safe. The files must not change meanwhile.

        Raises:
            RunError: when a file cannot be read, fsynced, uploaded or written. There is no manifest then; commit again,
                or abandon.
            RuntimeError: when it was committed or abandoned before, or there is a `manifest.json` among the files.
            TypeError, ValueError: when JSON cannot express `facts`.
        """
        if self._ended:
            raise RuntimeError(f"draft of step {self.step} was {self._ended} before")
        encoded = describe(
            step=self.step,
            version=int(version),
            journal_index=int(journal_index),
            facts=json.loads(canonical(dict(facts or {}))),
            files=self._secure_files(),
        )
        self._write_manifest(encoded)
        self._end("committed")
        return decode(encoded, self.step)

    def abandon(self) -> None:
        """Remove what was begun; nothing once committed. What cannot be removed stays half-written: no checkpoint."""
        if not self._ended:
            with suppress(RunError):
                self._store._remove(folder_name(self.step))
            self._end("abandoned")

    def _end(self, how: str) -> None:
        self._ended = how
        if self._waiting_room:
            self._waiting_room.cleanup()

    def _secure_files(self) -> dict[str, dict[str, Any]]:
        """Fsync or upload every file; what the manifest says of them."""
        with self._failure_named(f"{self.path} cannot be listed"):
            walked = list(os.walk(self.path, onerror=_raise, followlinks=True))
        names = sorted(Path(at, name).relative_to(self.path).as_posix() for at, _, found in walked for name in found)
        if MANIFEST in names:
            raise RuntimeError(f"{self.path / MANIFEST} is the store's own to write; give that file another name")
        files = {}
        for name in names:
            with self._failure_named(f"file {name} cannot be committed"):
                files[name] = asdict(self._secure(name))
        if self._store._local:
            for directory in [*(at for at, _, _ in walked), self._store._path, Path(self._store._path).parent]:
                with self._failure_named(f"folder {directory} cannot be committed"):
                    sync(directory)
        return files

    def _secure(self, name: str) -> StoredFile:
        local, filesystem, target = self._store._local, self._store._filesystem, f"{self._folder}/{name}"
        if not local and "/" in name:
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        hashed, size = hashlib.sha256(), 0
        with (
            (self.path / name).open("rb") as source,
            nullcontext() if local else filesystem.open_output_stream(target, compression=None) as sink,
        ):
            while chunk := source.read(_CHUNK):
                hashed.update(chunk)
                size += len(chunk)
                if sink is not None:
                    sink.write(chunk)
            if local:
                os.fsync(source.fileno())
        return StoredFile(size, hashed.hexdigest())

    def _write_manifest(self, encoded: bytes) -> None:
        filesystem, file = self._store._filesystem, f"{self._folder}/{MANIFEST}"
        try:
            with self._failure_named(f"file {MANIFEST} cannot be committed"):
                with filesystem.open_output_stream(file, compression=None) as sink:
                    sink.write(encoded)
                if self._store._local:
                    sync(file)
                    sync(self._folder)
        except BaseException:
            with suppress(*FAILURES):
                filesystem.delete_file(file)
            raise

    def _failure_named(self, what: str) -> AbstractContextManager[None]:
        return _failure_named(f"checkpoint {self._store.name}/{folder_name(self.step)}: {what}", _MAKE_ROOM)


def _age(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.version, checkpoint.step


def _complete(scan: Mapping[int, Checkpoint | str | None]) -> list[Checkpoint]:
    return [found for found in scan.values() if isinstance(found, Checkpoint)]


def _temporary() -> "tempfile.TemporaryDirectory[str]":
    with _failure_named("no temporary folder can be made for a checkpoint", _MORE_TEMPORARY):
        return tempfile.TemporaryDirectory(prefix="diffpo-checkpoint-", ignore_cleanup_errors=True)


@contextmanager
def _failure_named(what: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise RunError(f"{what}: {cause(error)}; {way_out}") from error


def _raise(error: OSError) -> None:
    raise error
