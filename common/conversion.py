"""Conversion: a checkpoint of any known family becomes a standard Hugging Face folder (`diffpo convert`).

- Streams: no more than one output file's tensors are in memory, at most `SHARD_BYTES` and one tensor.
- All or nothing: what is missing, left over or of another shape is refused before anything is written, and the folder
  appears under its name when it is complete.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.family import SHIFT_KEY
from common.model_folder import ModelFolder
from common.new_folder import new_folder
from common.policy import THRESHOLD_CONFIG, THRESHOLD_WEIGHTS
from common.shards import Shards, write_shards
from common.vocabulary import Vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2 * 2**30
GENERATION = "generation_config.json"
GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the others are of autoregressive sampling


@dataclass(frozen=True)
class Converted:
    """What was recognised and written."""

    family: str
    architecture: str
    parameters: int
    dtypes: tuple[str, ...]
    shards: int
    vocabulary_size: int
    vocabulary: Vocabulary
    tokens: dict[int, str]
    """Texts of the special ids."""
    shift: int
    chat_template: bool


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    shift: int | None = None,
    mask_token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write `source` as a folder that `from_pretrained` reads.

    Args:
        source: a checkpoint of a known family.
        target: must not be there.
        dtype: name of the type that parameters are written as; None keeps each one's.
        shift: replaces the family's `prediction_shift`.
        mask_token: the MASK token, where neither tokenizer nor configuration names it.
        shard_bytes: size from which on a new file is begun.

    Raises:
        UserError: for anything that does not fit; nothing is left behind.
        RunError: when there is no room; nothing is left behind either.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; give one of {', '.join(DTYPES)}, or leave it out to keep types")
    if target.exists():
        raise UserError(f"{target} is there already; give a name that is free")
    try:
        found = ModelFolder(source, mask_token=mask_token, shift=shift)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"model {source}: cannot be read: {reason}; give the checkpoint's own files") from error
    with Shards(source) as shards:
        names = _names(found, shards)
        wanted = None if dtype is None else DTYPES[dtype]
        types = {name: wanted or shards.parameters[own].dtype for name, own in names.items()}
        sizes = {name: shards.parameters[own].count * types[name].itemsize for name, own in names.items()}
        files = _files(sizes, shard_bytes)
        with new_folder(target) as partial:
            write_shards(partial, files, _cast(shards, names, types), sum(sizes.values()))
            _describe(found, partial, source, types)
        ids = found.vocabulary
        return Converted(
            family=found.family.name,
            architecture=found.model_class.__name__,
            parameters=sum(shards.parameters[own].count for own in names.values()),
            dtypes=tuple(sorted({str(kind).removeprefix("torch.") for kind in types.values()})),
            shards=len(files),
            vocabulary_size=found.config.vocab_size,
            vocabulary=ids,
            tokens={
                token: str(found.tokenizer.convert_ids_to_tokens(token))
                for token in (ids.mask_id, ids.eos_id, ids.pad_id, *ids.stop_ids)
            },
            shift=getattr(found.config, SHIFT_KEY),
            chat_template=bool(found.tokenizer.chat_template),
        )


def _names(found: ModelFolder, shards: Shards) -> dict[str, str]:
    """The checkpoint's name of each parameter, by the target's, held against what the model really has."""
    names = found.parameter_names(shards)
    model = found.skeleton()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(found.tied())
    for name in tied & names.keys():
        del names[name]  # the same matrix twice
    missing = sorted(expected.keys() - names.keys() - tied)
    unexpected = sorted(names.keys() - expected.keys())
    for kind, wrong in (("are missing", missing), ("are unknown", unexpected)):
        if wrong:
            raise UserError(
                f"model {found.folder}: {len(wrong)} parameters {kind}, e.g. {wrong[0]}; weights and config.json must "
                "belong together"
            )
    for name, own in names.items():
        if shards.parameters[own].shape != expected[name]:
            raise UserError(
                f"model {found.folder}: {own} has shape {list(shards.parameters[own].shape)}, config.json says "
                f"{list(expected[name])}; weights and config.json must belong together"
            )
    return {name: names[name] for name in expected if name in names}


def _files(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Parameters of each file: as many as do not exceed the limit, and one at least."""
    files: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if files[-1] and held + size > limit:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def _cast(shards: Shards, names: dict[str, str], types: dict[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    for name, own in names.items():
        yield name, shards.tensor(own).to(types[name]).contiguous()


def _describe(found: ModelFolder, folder: Path, source: Path, types: dict[str, torch.dtype]) -> None:
    """Everything beside the weights."""
    config = found.config
    config.architectures = [found.model_class.__name__]
    kinds = set(types.values())
    config.dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    config.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    for name in (THRESHOLD_CONFIG, THRESHOLD_WEIGHTS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    try:
        given = json.loads((source / GENERATION).read_bytes())
        kept = {key: given[key] for key in GENERATION_KEYS if given.get(key) is not None}
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"model {source}: {GENERATION} cannot be read ({error}); mend it or take it away") from error
    kept["eos_token_id"] = list(found.vocabulary.stop_ids)
    (folder / GENERATION).write_text(json.dumps(kept, indent=2) + "\n")
