"""Local copy: a folder of an object store on this machine, downloaded once by whoever needs it first.

Copies lie in `~/.cache/diffpo/` (`XDG_CACHE_HOME`), one for every state of a folder (names, sizes, times of change),
and are read-only by agreement. Those that nobody has asked for in `KEEP_SECONDS` go when another one is made.

Blocking calls.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import xxhash
from filelock import FileLock

from common.checkpoint_store import CheckpointStore
from common.errors import RunError, UserError, cause
from common.location import is_uri
from common.new_folder import new_folder
from common.place import FAILURES, Place

KEEP_SECONDS = 24 * 3600.0


def local_copy(where: str | Path | Place) -> Path:
    """The folder on this machine: itself where it is local, else a copy. A checkpoint's files are verified.

    Raises:
        UserError: when it is not there, or cannot be read.
        RunError: when there is no room for it.
        CheckpointDamaged: when a file of a checkpoint is not what was committed.
    """
    if not is_uri(str(where)):
        return Path(str(where))
    try:
        place = Place(where)
        if place.folder is not None:
            return place.folder
        files = list(place.files())
    except FAILURES as error:
        raise UserError(f"{where} cannot be read ({cause(error)}); mend the connection or the credentials") from error
    if not files:
        raise UserError(f"{where} is empty or not there; give a folder that holds files")
    target = cache_folder() / f"{place.last}-{xxhash.xxh3_128_hexdigest(repr((place.name, files)).encode())[:16]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():
                _forget_old(target.parent)
                with new_folder(target) as folder:
                    _download(place, [name for name, _, _ in files], folder)
            os.utime(target)
    except OSError as error:
        raise RunError(
            f"{place} cannot be copied to {target} ({cause(error)}); make room there, or set XDG_CACHE_HOME to a "
            "folder that has some"
        ) from error
    return target


def cache_folder() -> Path:
    """Where the copies are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpo"


def _download(place: Place, files: list[str], folder: Path) -> None:
    store = CheckpointStore(place.parent.name)
    committed = next((one for one in store.checkpoints() if one.name == place.last), None)
    if committed is not None:
        store.download(committed, folder)
        return
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.download(name, target)
        except FAILURES as error:
            raise RunError(
                f"{place}/{name} cannot be copied ({cause(error)}); mend the connection, or make room in {folder}"
            ) from error


def _forget_old(folder: Path) -> None:
    """Copies that were not asked for in a long time."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and time.time() - path.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
