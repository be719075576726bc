"""An object store that is full, or whose process dies."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

from pyarrow import NativeFile, PythonFile, fs

from common.checkpoint_store import CheckpointStore


class Died(BaseException):
    """The process is no more: it cleans nothing up."""


class Faulty(fs.FileSystemHandler):
    """A folder as an object store that is full after `room` bytes, or whose process dies at its change `death`."""

    def __init__(self, folder: Path, *, room: int = 2**30, death: int = 2**30, by_signal: bool = False) -> None:
        self.inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.room, self.death, self.by_signal = room, death, by_signal

    def changed(self) -> None:
        self.death -= 1
        if self.death < 0:
            if self.by_signal:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Died

    def create_dir(self, path: str, recursive: bool) -> None:
        self.changed()
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.changed()
        self.inner.delete_dir(path)

    def delete_file(self, path: str) -> None:
        self.changed()
        self.inner.delete_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> NativeFile:
        self.changed()
        return PythonFile(FaultyFile(self, self.inner.open_output_stream(path, compression=None)), mode="w")

    def get_file_info(self, paths: list[str]) -> Any:
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self.inner.get_file_info(selector)

    def open_input_stream(self, path: str) -> NativeFile:
        return self.inner.open_input_stream(path, compression=None)

    def get_type_name(self) -> str:
        return "faulty"

    def unused(self, *arguments: Any) -> Any:
        raise AssertionError("object stores cannot do that, or it was not needed so far")

    normalize_path = copy_file = move = open_append_stream = open_input_file = unused
    delete_dir_contents = delete_root_dir_contents = unused


class FaultyFile:
    def __init__(self, owner: Faulty, inner: NativeFile) -> None:
        self.owner, self.inner, self.closed = owner, inner, False

    def write(self, content: bytes) -> int:
        self.owner.changed()
        fits = content[: self.owner.room]
        self.owner.room -= len(fits)
        self.inner.write(fits)
        if len(fits) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.inner.close()
        self.closed = True


def faulty_store(folder: Path, **how: Any) -> CheckpointStore:
    return CheckpointStore("checkpoints", _filesystem=fs.PyFileSystem(Faulty(folder, **how)))
