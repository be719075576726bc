"""Policy loading: where a policy comes from: sizes of a small model, or a folder of a known family.

- A folder holds a whole model, or an adapter and the name of its base; both with or without a threshold head.
- Nothing of a folder is executed: safetensors only, no pickles; no code of its own.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from common.adapter import (
    ADAPTER_WEIGHTS,
    Base,
    adapt,
    learned_parameters,
    load_adapter,
    read_adapter,
    read_base,
)
from common.config import Config, ModelConfig, ThresholdConfig
from common.errors import UserError
from common.local_copy import local_copy
from common.model_folder import ModelFolder
from common.policy import CALIBRATION, THRESHOLD_CONFIG, THRESHOLD_WEIGHTS, UNLIMITED, Policy, check_cache
from common.shards import Shards
from common.tasks import Task
from common.threshold import build_threshold_head
from common.tokenizer import character_tokenizer


def build_policy(config: ModelConfig, threshold: ThresholdConfig, *, alphabet: str, seed: int) -> Policy:
    """A small bidirectional Llama with a character tokenizer, initialised from `seed`."""
    tokenizer = character_tokenizer(alphabet)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "is_causal": False,  # attends in both directions; a guard test holds it to that
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        model.set_attn_implementation(config.attention)
        head = build_threshold_head(config.hidden_size, threshold)
    return Policy(model, head, tokenizer).to(config.device).eval()


def load_policy(
    path: str | Path,
    config: ModelConfig,
    threshold: ThresholdConfig,
    *,
    seed: int = 0,
    empty: torch.dtype | None = None,
    trains: bool = False,
) -> Policy:
    """Read a checkpoint of a known family; a threshold head saved beside it replaces a fresh one of `threshold`.

    With `model.lora` the policy has an adapter, that of the folder or a new one; without it, a folder's adapter is
    merged into its base.

    Args:
        path: a whole model, or an adapter and the name of its base; or a URI of that, of which a copy is made.
        config: device, attention, adapter.
        threshold: of a fresh head.
        seed: of a new adapter.
        empty: leave the model's weights out: they are as memory was, in this type, until they are overwritten.
        trains: a run starts from it: a saved head that never learned gives way to one of `threshold`.

    Raises:
        UserError: when the folder, the model or its MASK token is missing or does not fit, or a run would start from a
            head that learned under other settings than `threshold`.
    """
    folder = local_copy(path)
    try:
        base = read_base(folder)
        found = ModelFolder(folder, mask_token=config.mask_token)
        whole = found if base is None else ModelFolder(base.folder, mask_token=config.mask_token)
        model = _load_model(whole) if empty is None else _empty_model(whole, empty)
        model.set_attn_implementation(config.attention)
        own = _read_own(folder)
        saved = _saved_threshold(folder)
        if trains and _gives_way(saved, threshold, own, folder):
            own, saved = {}, threshold
        head = build_threshold_head(model.config.hidden_size, saved or threshold)
        policy = Policy(model, head, found.tokenizer, chat_template=config.chat_template)
        _load_own(policy, own)
        if found.family.masked_lm and empty is None:
            _check_masked_lm(policy)
        if base is not None:
            load_adapter(model, folder, base, config.lora)
        elif config.lora is not None:
            adapt(model, config.lora, Base.of(folder), seed=seed)
    except UserError:
        raise
    except Exception as error:  # a folder can be wrong in more ways than transformers has errors for
        raise _not_loadable(folder, error) from error
    return policy.to(config.device).eval()


def _empty_model(found: ModelFolder, dtype: torch.dtype) -> Any:
    """Of a folder's architecture; memory is reserved for its weights, and not touched."""
    kind: Any = AutoModelForMaskedLM if found.family.masked_lm else AutoModelForCausalLM
    with no_init_weights():
        model = kind.from_config(found.config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def _read_own(folder: Path) -> dict[str, Tensor]:
    """Head and calibration from beside a model, under a policy's names; a folder from elsewhere has none."""
    if not (folder / THRESHOLD_WEIGHTS).is_file():
        return {}
    weights = load_file(folder / THRESHOLD_WEIGHTS)
    return {name if name.startswith(CALIBRATION) else f"head.{name}": value for name, value in weights.items()}


def _saved_threshold(folder: Path) -> ThresholdConfig | None:
    file = folder / THRESHOLD_CONFIG
    return ThresholdConfig.model_validate_json(file.read_bytes()) if file.is_file() else None


def _gives_way(saved: ThresholdConfig | None, wanted: ThresholdConfig, own: dict[str, Tensor], folder: Path) -> bool:
    """Whether a saved head is left for a fresh one of `wanted`: it has other settings and never learned.

    Raises:
        UserError: when it has other settings, and learned.
    """
    if saved is None or saved == wanted:
        return False
    learned = {name.removeprefix("head."): value for name, value in own.items() if name.startswith("head.")}
    if not learned:
        return True
    fresh = build_threshold_head(learned["linear.weight"].shape[-1], saved).state_dict()
    if all(torch.allclose(value, fresh[name], rtol=0.0, atol=1e-5) for name, value in learned.items()):
        return True  # but for what another machine rounds
    asked, given = wanted.model_dump(), saved.model_dump()
    other = [name for name in asked if asked[name] != given[name]]
    raise UserError(
        f"model.path={folder} has a threshold head that learned with "
        + ", ".join(f"{name}={given[name]}" for name in other)
        + ", not "
        + ", ".join(f"sampler.threshold.{name}={asked[name]}" for name in other)
        + f"; set them as there to go on with it, or take {THRESHOLD_CONFIG} and {THRESHOLD_WEIGHTS} out of a copy of "
        "the folder for a new head"
    )


def check_threshold_of_folder(config: Config) -> None:
    """Refuse a `sampler.threshold` that is not that of the head which learned in `model.path`. Raises UserError."""
    if config.model.path is not None:
        folder = local_copy(config.model.path)
        _gives_way(_saved_threshold(folder), config.sampler.threshold, _read_own(folder), folder)


def _load_own(policy: Policy, own: dict[str, Tensor]) -> None:
    for prefix, part in (("head.", policy.head), (CALIBRATION, policy.calibration)):
        found = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
        if found:
            part.load_state_dict(found)


def read_learned(policy: Policy, folder: Path) -> dict[str, Tensor]:
    """What `save` wrote of an adapted policy, under the names of `learned_state`; its base is not read.

    Raises:
        UserError: when the folder's adapter has another base, or other weights.
    """
    base, own = read_base(folder), vars(policy.model)["adapter_base"]
    if base is None or base.digest != own.digest:
        raise UserError(f"the adapter in {folder} has another base than {own.folder}")
    names = {name for name, _ in learned_parameters(policy.model)}
    adapter = {f"model.{name}": value for name, value in read_adapter(folder, names).items()}
    return adapter | _read_own(folder)


def on_cpu(config: Config) -> Config:
    """The same configuration with a policy that is opened there, whatever its device."""
    return config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})


def open_policy(config: Config, task: Task) -> Policy:
    """The policy that a run starts from: `model.path` if given, else a small one built for the task, unadapted."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.model, config.sampler.threshold, seed=config.run.seed, trains=True)
    return build_policy(config.model, config.sampler.threshold, alphabet=task.alphabet, seed=config.run.seed)


def open_rollout_policy(config: Config, task: Task) -> Policy:
    """The policy of a rollout actor, for weights that the learner publishes before any lease; a folder's are not read.

    Raises:
        UserError: as `load_policy`.
    """
    dtype = torch.bfloat16 if config.rollout.precision == "bfloat16" else torch.float32
    return open_empty_policy(config, task, dtype).for_rollout(config.rollout)


def open_empty_policy(config: Config, task: Task, dtype: torch.dtype) -> Policy:
    """What a run trains, its adapter included, for weights that come from elsewhere: a folder's are not read."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.model, config.sampler.threshold, empty=dtype, trains=True)
    policy = open_policy(config, task)
    if config.model.lora is not None:
        adapt(policy.model, config.model.lora, None, seed=config.run.seed)
    return policy


def open_tokenizer(config: Config, task: Task) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer and number of positions of the policy that a run starts from, without its weights; ids are checked,
    and that weights and threshold can be read."""
    if config.model.path is None:
        return character_tokenizer(task.alphabet), config.model.max_positions
    folder = local_copy(config.model.path)
    try:
        found = ModelFolder(folder, mask_token=config.model.mask_token)
        base = read_base(folder)
        with Shards(folder if base is None else base.folder):
            pass  # their headers, held against the files' lengths
        for file in (THRESHOLD_WEIGHTS, ADAPTER_WEIGHTS):
            if (folder / file).is_file():
                safe_open(folder / file, "pt").keys()
        if (folder / THRESHOLD_CONFIG).is_file():
            ThresholdConfig.model_validate_json((folder / THRESHOLD_CONFIG).read_bytes())
    except UserError:
        raise
    except Exception as error:
        raise _not_loadable(folder, error) from error
    return found.tokenizer, found.max_positions or UNLIMITED


def check_cache_of_folder(config: Config) -> None:
    """Refuse a `sampler.cache` that `model.path` cannot serve, without reading its weights. Raises UserError."""
    if config.sampler.cache != "none" and config.model.path is not None:
        check_cache(ModelFolder(local_copy(config.model.path), mask_token=config.model.mask_token).skeleton())


def _load_model(found: ModelFolder) -> Any:
    """The model in float32, parameter by parameter from mapped files."""
    with Shards(found.folder) as shards:
        names = found.parameter_names(shards)
        model, info = found.model_class.from_pretrained(
            None,
            config=found.config,
            state_dict={name: shards.lazy(own) for name, own in names.items()},
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    for kind, wrong in (("are not in", info["missing_keys"]), ("are too many in", info["unexpected_keys"])):
        if wrong:
            raise UserError(
                f"model {found.folder}: {len(wrong)} parameters {kind} its weights, e.g. {min(wrong)}; "
                "config.json and the weights must belong together"
            )
    return model


@torch.no_grad()
def _check_masked_lm(policy: Policy) -> None:
    """Refuse an encoder that counts positions in a way of its own, or whose head `logits` does not apply."""
    ids = policy.vocabulary
    row = torch.tensor([[ids.eos_id, ids.mask_id, ids.mask_id, ids.eos_id]])
    whole = policy.model(input_ids=row).logits
    mine = policy.logits(policy.hidden(row, torch.ones_like(row, dtype=torch.bool)))
    if policy.shift:
        whole, mine = whole[:, :-1], mine[:, 1:]
    if not torch.allclose(mine, whole, rtol=1e-4, atol=1e-4):
        raise UserError(
            f"{type(policy.model).__name__} numbers positions or computes logits in a way that is not known; give "
            "another masked language model, such as ModernBERT"
        )


def _not_loadable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(f"model {folder}: cannot be loaded: {reason}; give a folder that transformers reads")
