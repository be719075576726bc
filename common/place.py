"""Place: a folder in a local file system or an object store, by a path or a URI.

URIs are those of `pyarrow.fs.FileSystem.from_uri`: s3://bucket/folder, gs://…, file://…; options follow a question mark
(s3://bucket/folder?region=eu-central-1). Credentials come from where the store's own tools find them.

Blocking calls.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from common.location import above, below, is_uri, parted

CHUNK = 2**20
FAILURES = (pa.ArrowException, OSError)


class Place:
    """Picklable; nothing is made or looked at until it is asked for."""

    def __init__(self, where: "str | Path | Place") -> None:
        """Raises pa.ArrowException, OSError: when a URI is not understood."""
        base, mark, options = parted(str(where))
        self.name = f"{base}{mark}{options}"
        """Absolute path or URI."""
        self.folder: Path | None = None
        """Where it is on this machine; None of an object store."""
        self.filesystem: fs.FileSystem
        self.path: str
        """Inside the file system."""
        if is_uri(self.name):
            self.filesystem, self.path = fs.FileSystem.from_uri(self.name)
            if isinstance(self.filesystem, fs.LocalFileSystem):
                self.folder = Path(self.path)
        else:
            self.folder = Path(str(where)).absolute()
            self.filesystem, self.path = fs.LocalFileSystem(), str(self.folder)
        if self.folder is not None:
            self.name = self.path

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __truediv__(self, name: str) -> "Place":
        return Place(below(self.name, name))

    @property
    def parent(self) -> "Place":
        return Place(above(self.name)[0])

    @property
    def last(self) -> str:
        """Name of the folder inside its parent."""
        return above(self.name)[1]

    def read(self, name: str) -> bytes:
        """Content of a file. Raises FileNotFoundError, and others of `FAILURES`."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as source:
            return source.read()

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Table of a Parquet file. Raises as `read`.

        Python owns none of what Arrow's threads hold, and none is started: a thread that lets go of a Python object
        while the process ends aborts it, now and then (apache/arrow#34314).
        """
        with self.filesystem.open_input_file(f"{self.path}/{name}") as source:
            return pq.ParquetFile(source).read(columns=columns, use_threads=False)

    def download(self, name: str, target: Path) -> None:
        """Copy a file of any size to this machine. Raises as `read`, and OSError where there is no room."""
        with (
            self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, CHUNK)

    def upload(self, folder: Path, *, last: str) -> None:
        """Copy all files of a folder of this machine into it; `last` is written last, for those who look for it.

        Raises:
            pa.ArrowException, OSError: when one cannot be read or written.
        """
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        for name in sorted(files, key=lambda name: name == last):
            with (
                (folder / name).open("rb") as source,
                self.filesystem.open_output_stream(f"{self.path}/{name}", compression=None) as sink,
            ):
                shutil.copyfileobj(source, sink, CHUNK)

    def write(self, name: str, content: bytes) -> None:
        """Write a file as a whole or not at all; of two who write it at once, one wins.

        Raises:
            pa.ArrowException, OSError: naming the file.
        """
        if self.folder is not None:
            write_whole(self.folder / name, content)
            return
        with self.filesystem.open_output_stream(f"{self.path}/{name}", compression=None) as sink:
            sink.write(content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.filesystem.delete_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return

    def remove_all(self) -> None:
        """Remove the folder with everything in it, if it is there."""
        try:
            self.filesystem.delete_dir(self.path)
        except FileNotFoundError:
            return

    def holds(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.File

    def exists(self) -> bool:
        """Whether there is anything at all; also a file in the folder's place."""
        return self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound

    def folders(self) -> list[str]:
        """Sorted names of the folders inside it; none of one that is not there."""
        return sorted(info.base_name for info in self._inside() if info.type == fs.FileType.Directory)

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Name below it, bytes and time of change (ns) of every file, at any depth, in order of the names."""
        found = sorted(self._inside(recursive=True), key=lambda info: info.path)
        for info in found:
            if info.type == fs.FileType.File:
                yield info.path[len(self.path) :].lstrip("/"), info.size, info.mtime_ns or 0

    def _inside(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        return self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True, recursive=recursive))


def write_whole(path: Path, content: bytes) -> Path:
    """Write a local file as a whole or not at all; of two processes that write it at once, one wins.

    Raises:
        OSError: naming the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:  # of a full disk it would name none
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    return path
