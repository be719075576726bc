"""Shards: the safetensors files of a checkpoint, read a tensor at a time and written a file at a time.

- Opening reads headers only. Missing, damaged and contradicting files are refused there, before anything is loaded.
- Nothing is unpickled: a checkpoint of `.bin` files is refused.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What parameters may be stored as, by the names of safetensors."""


@dataclass(frozen=True)
class Stored:
    """One parameter as the headers describe it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


class Shards:
    """All parameters of a folder, closed on leaving the `with`; files are mapped: what is not touched is not read."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: when files are missing or damaged, or do not hold what the index says.
        """
        self.folder = folder
        self._open: dict[str, Any] = {}
        self.parameters: dict[str, Stored] = {}
        expected = self._expected()
        for file in dict.fromkeys(expected.values()) if expected is not None else (SINGLE,):
            self._read_header(file)
        if expected is not None:
            lacking = [name for name, file in expected.items() if self._file_of(name) != file]
            if lacking:
                raise UserError(
                    f"model {folder}: {len(lacking)} parameters are not in the shards that {INDEX} names, e.g. "
                    f"{lacking[0]} in {expected[lacking[0]]}; get the folder again"
                )

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def lazy(self, name: str) -> Any:
        """A parameter that is read when it is indexed, as `transformers` takes them."""
        return self._open[self.parameters[name].file].get_slice(name)

    def tensor(self, name: str) -> Tensor:
        """A parameter.

        Raises:
            UserError: when the file breaks off.
        """
        file = self.parameters[name].file
        try:
            return self._open[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"model {self.folder}: {file} is damaged at {name} ({one_line(error)})") from error

    def _file_of(self, name: str) -> str | None:
        found = self.parameters.get(name)
        return None if found is None else found.file

    def _expected(self) -> dict[str, str] | None:
        """File of each parameter as the index says; None where there is one file."""
        index = self.folder / INDEX
        if not index.is_file():
            if (self.folder / SINGLE).is_file():
                return None
            parts = sorted(file.name for file in self.folder.glob("model-*.safetensors"))
            other = sorted(file.name for pattern in ("*.bin", "*.pt") for file in self.folder.glob(pattern))
            there = f"{other[0]} is a pickle, which is not read" if other else "there is no such file"
            there = f"{parts[0]} is a shard without its index" if parts else there
            raise UserError(
                f"model {self.folder}: neither {SINGLE} nor {INDEX} ({there}); give a folder with safetensors, and "
                "their index where there are several"
            )
        try:
            expected = json.loads(index.read_bytes())["weight_map"]
            sound = bool(expected) and all(isinstance(text, str) for pair in expected.items() for text in pair)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"model {self.folder}: {INDEX} is damaged ({one_line(error)}); get it again") from error
        if not sound or any(Path(file).name != file for file in expected.values()):
            raise UserError(f"model {self.folder}: {INDEX} does not name a file of this folder for each parameter")
        files = sorted(set(expected.values()))
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise UserError(
                f"model {self.folder}: {len(missing)} of {len(files)} shards are missing, e.g. {missing[0]}; get them "
                "again"
            )
        return expected

    def _read_header(self, file: str) -> None:
        try:
            self._open[file] = opened = safe_open(self.folder / file, "pt")
            for name in opened.keys():  # noqa: SIM118 - it cannot be iterated
                described = opened.get_slice(name)
                kind = described.get_dtype()
                if kind not in DTYPES:
                    raise UserError(
                        f"model {self.folder}: {file} holds {name} as {kind}; parameters must be one of "
                        f"{', '.join(DTYPES)}: give the original, unquantised checkpoint"
                    )
                self.parameters[name] = Stored(file, tuple(described.get_shape()), DTYPES[kind])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"model {self.folder}: {file} is damaged ({one_line(error)}); get it again") from error


def write_shards(folder: Path, names: list[list[str]], tensors: Iterable[tuple[str, Tensor]], total: int) -> None:
    """Write a checkpoint; no more than one file's tensors are held at a time.

    Args:
        folder: where to, a folder that is there.
        names: of the parameters in each file, in order.
        tensors: name and value of every parameter, in that order.
        total: bytes of all of them, for the index.
    """
    stream, weight_map = iter(tensors), {}
    for number, group in enumerate(names, 1):
        file = SINGLE if len(names) == 1 else f"model-{number:05}-of-{len(names):05}.safetensors"
        save_file(_take(stream, len(group)), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _take(stream: Iterator[tuple[str, Tensor]], count: int) -> dict[str, Tensor]:
    return dict(next(stream) for _ in range(count))
