"""Adapter: low-rank weights beside a frozen base (LoRA, arXiv 2106.09685), injected by `peft`.

- The model keeps its class and its interface; its linear layers become a frozen layer plus `alpha / rank * B A`. B
  starts at 0, so an adapted policy begins as its base.
- Base: the folder in Hugging Face layout that the frozen weights come from. It is named, with a digest, never copied.
- What is published, saved and optimised is what `learned_parameters` lists; `frozen_parameters` are all others. Without
  an adapter nothing is frozen.
- Saved in peft's own layout (`adapter_config.json`, `adapter_model.safetensors`), so that others can read it.

`peft` is imported only where an adapter is made.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config import LoraConfig
from common.errors import UserError, cause

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "adapter_base.json"
NAME = "default"  # of the one adapter that a model has
MARK = ".lora_"  # in the names of all parameters of an adapter
PREFIX = "base_model.model."  # of all names in peft's files
AUTO = ("auto",)
READ = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
}
"""Settings of a saved adapter that are understood. Others of peft's import modules, or change the base."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of `init_lora_weights`: others take weights out of the base
SAMPLE = 1 << 16  # bytes of each end of a weight file that the digest of a base sees


@dataclass(frozen=True)
class Base:
    """Where frozen weights come from."""

    folder: Path
    digest: str
    """Of config.json and of the ends of all weight files: tells models and trainings apart without reading 16 GB."""

    @classmethod
    def of(cls, folder: Path) -> "Base":
        """The base in a folder that holds a whole model."""
        found = xxhash.xxh3_128((folder / "config.json").read_bytes())
        for file in sorted(one for one in folder.glob("*.safetensors") if one.is_file()):
            size = file.stat().st_size
            found.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                found.update(stream.read(SAMPLE))
                stream.seek(max(0, size - SAMPLE))
                found.update(stream.read(SAMPLE))
        return cls(folder.absolute(), found.hexdigest())


def adapted(module: nn.Module) -> bool:
    """Whether a model, or a policy's, has an adapter."""
    return any(MARK in name for name, _ in module.named_parameters())


def learned_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is published, saved and optimised, in the module's order: all but what is frozen beside an adapter."""
    return [(name, parameter) for name, parameter, frozen in _parameters(module) if not frozen]


def frozen_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base's weights beside an adapter; none without one."""
    return [(name, parameter) for name, parameter, frozen in _parameters(module) if frozen]


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict` without what is frozen, under any of its names: weights that are shared have several there."""
    inside = _adapted_parts(module)
    return {name: value for name, value in module.state_dict().items() if not _is_frozen(name, inside)}


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    inside = _adapted_parts(module)
    for name, parameter in module.named_parameters():
        yield name, parameter, _is_frozen(name, inside)


def _adapted_parts(module: nn.Module) -> tuple[str, ...]:
    """How the names begin that are inside of an adapted model."""
    roots = [name for name, part in module.named_modules() if "peft_config" in vars(part)]
    return tuple(f"{name}." if name else "" for name in roots)


def _is_frozen(name: str, inside: tuple[str, ...]) -> bool:
    return name.startswith(inside) and MARK not in name


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """The base alone, as long as this lasts; nothing changes where there is no adapter."""
    if not adapted(module):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # the public switch also changes which weights learn
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapt(model: PreTrainedModel, config: LoraConfig, base: Base | None, *, seed: int) -> None:
    """Freeze a model and put an adapter beside it.

    Args:
        model: changed in place.
        config: rank, alpha, dropout, targets.
        base: where the model's weights come from; None where they are not loaded, and nothing is saved.
        seed: of A.

    Raises:
        UserError: when a target names no linear layer.
    """
    from peft import LoraConfig as Settings

    settings = Settings(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]: it divides
        lora_dropout=config.dropout,
        target_modules=target_layers(model, config.targets),
    )
    _inject(model, settings, base, seed=seed)


def _inject(model: PreTrainedModel, settings: Any, base: Base | None, *, seed: int) -> None:
    from peft import inject_adapter_in_model

    settings.base_model_name_or_path = None if base is None else str(base.folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=NAME)
    model.train(model.training)  # the adapter's dropout begins in training, whatever the model does
    for _, parameter in frozen_parameters(model):
        parameter.requires_grad_(False)
    vars(model)["adapter_base"] = base


def target_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that get an adapter: `auto` is all of them but the output head.

    Raises:
        UserError: with the nearest names, for a target that is none of them.
    """
    head = model.get_output_embeddings()
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    if tuple(targets) == AUTO:
        return layers
    chosen: list[str] = []
    for target in targets:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            known = sorted(
                {name.rpartition(".")[2] for name in layers} | set(layers), key=lambda name: (len(name), name)
            )
            near = get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.0)
            raise UserError(
                f"model.lora.targets: {target!r} is no linear layer of {type(model).__name__} below its output head; "
                f"nearest: {', '.join(near)}; give names of its layers, or auto for all of them"
            )
        chosen += found
    return sorted(set(chosen), key=layers.index)


def merge(model: PreTrainedModel) -> None:
    """Add the adapter to the base's weights and remove it; the model is a plain one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, part) for n, part in model.named_modules() if isinstance(part, BaseTunerLayer)]:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del vars(model)["peft_config"], vars(model)["adapter_base"]
    model.requires_grad_(True)


def save_adapter(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """Write an adapter beside the configuration of its base, which is named by path and digest.

    Args:
        model: adapted.
        folder: made if it is not there.
        state: of the model, as `state_dict` names it.
    """
    described: Any = model
    base: Base = described.adapter_base
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    described.peft_config[NAME].save_pretrained(folder)
    weights = {
        PREFIX + name.replace(f".{NAME}.", "."): value.contiguous() for name, value in state.items() if MARK in name
    }
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    where = {
        "path": str(base.folder),
        "relative": os.path.relpath(base.folder, folder.absolute()),
        "digest": base.digest,
    }
    (folder / ADAPTER_BASE).write_text(json.dumps(where, indent=1) + "\n")


def read_base(folder: Path) -> Base | None:
    """The base of the adapter in a folder; None where the folder holds a whole model.

    Raises:
        UserError: when the base is not there, or is not what the adapter was trained on.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    try:
        where = {"path": _read_settings(folder).base_model_name_or_path}
        if (folder / ADAPTER_BASE).is_file():
            where = json.loads((folder / ADAPTER_BASE).read_text())
        candidates = [Path(str(where["path"])), folder / str(where.get("relative", ""))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"adapter {folder}: cannot be read ({cause(error)}); take another checkpoint") from error
    found = [path for path in candidates if (path / "config.json").is_file() and path.resolve() != folder.resolve()]
    if not found:
        raise UserError(
            f"adapter {folder}: its base model {where['path']} is not there; put it back, or give a merged export "
            "(diffpo export --merge)"
        )
    bases = [Base.of(path) for path in found]
    right = [base for base in bases if where.get("digest") in (None, base.digest)]
    if not right:
        raise UserError(
            f"adapter {folder}: its base model {found[0]} is another one than it was trained on (digest "
            f"{bases[0].digest[:12]}, not {str(where['digest'])[:12]}); put the old one back"
        )
    return right[0]


def _read_settings(folder: Path) -> Any:
    from peft import LoraConfig as Settings

    written = json.loads((folder / ADAPTER_CONFIG).read_text())
    if written.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder}: it is of the kind {written.get('peft_type')}; give one of the kind LORA")
    usual = Settings()
    known = {key: value for key, value in written.items() if hasattr(usual, key) and value is not None}
    odd = {key: value for key, value in known.items() if key not in READ and value and value != getattr(usual, key)}
    if known.get("init_lora_weights", True) not in PLAIN_STARTS:
        odd["init_lora_weights"] = known["init_lora_weights"]
    if odd:
        key = min(odd)
        raise UserError(
            f"adapter {folder}: {ADAPTER_CONFIG} has {key}={odd[key]!r:.60}, which is not supported; give a plain "
            "LoRA, or merge it into its base with peft"
        )
    return Settings(**{key: value for key, value in known.items() if key in READ})


def load_adapter(model: PreTrainedModel, folder: Path, base: Base, config: LoraConfig | None) -> None:
    """Put the adapter of a folder beside its base; merged into it where the configuration asks for none.

    Raises:
        UserError: when the configuration asks for another adapter than the folder's, or its weights do not fit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = _read_settings(folder)
    settings.inference_mode = False
    wanted = None
    if config is not None:
        settings.lora_dropout = config.dropout
        wanted = set(target_layers(model, config.targets))
        if settings.r != config.rank or not math.isclose(settings.lora_alpha, config.alpha):
            raise UserError(
                f"model.lora has rank {config.rank} and alpha {config.alpha:g}, the adapter in {folder} rank "
                f"{settings.r} and alpha {settings.lora_alpha:g}; give these, or its merged export (diffpo export)"
            )
    _inject(model, settings, base, seed=0)
    given = {name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    if wanted is not None and given != wanted:
        raise UserError(
            f"model.lora.targets are {len(wanted)} layers, the adapter in {folder} is for {len(given)}, and they "
            f"differ in {min(given ^ wanted)}; give its own, or a merged export (diffpo export --merge)"
        )
    own = dict(learned_parameters(model))
    with torch.no_grad():
        for name, value in read_adapter(folder, set(own)).items():
            own[name].copy_(value)
    if config is None:
        merge(model)


def read_adapter(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """The weights of a saved adapter under the names that an adapted model has for them.

    Raises:
        UserError: when these are not the `names`.
    """
    written = load_file(folder / ADAPTER_WEIGHTS)
    found = {}
    for name, value in written.items():
        before, mark, after = name.removeprefix(PREFIX).rpartition(MARK)
        matrix, _, rest = after.partition(".")
        found[f"{before}{mark}{matrix}.{NAME}.{rest}"] = value
    if set(found) != names:
        odd = min(set(found) ^ names)
        raise UserError(
            f"adapter {folder}: its weights are not those of its model, e.g. {odd}; take another checkpoint"
        )
    return found
