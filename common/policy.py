"""Policy: a Hugging Face model, its MASK id, its tokenizer, and the threshold head on top.

- Everything downstream sees this and nothing of the model's family.
- `hidden` is one function evaluation; `logits` applies the output head to selected positions only.
- Positions are counted from the first attended token, so left padding changes nothing.
- Nothing of a folder is executed: safetensors only, no pickles; no code of its own.
- Saved as a standard Hugging Face folder plus `threshold.safetensors`; `from_pretrained` reads the folder.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from common.calibration import Calibration
from common.config import Config, ModelConfig, RolloutConfig, ThresholdConfig
from common.errors import UserError
from common.tasks import Task
from common.threshold import ThresholdHead, build_threshold_head
from common.tokenizer import character_tokenizer

transformers_logging.disable_progress_bar()  # the command line draws its own

THRESHOLD_WEIGHTS = "threshold.safetensors"
THRESHOLD_CONFIG = "threshold.json"
CALIBRATION = "calibration."  # prefix of its names beside the head's weights
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Vocabulary:
    """The ids that sampling needs to know."""

    mask_id: int
    pad_id: int
    eos_id: int
    stop_ids: tuple[int, ...]


class Policy(nn.Module):
    """Model and threshold head, built or loaded once per process and overwritten by each adopted snapshot."""

    def __init__(self, model: PreTrainedModel, head: ThresholdHead, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.calibration = Calibration(model.config.hidden_size)
        self.tokenizer = tokenizer
        self.vocabulary = read_vocabulary(tokenizer, model.config)
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise UserError(
                f"{type(model).__name__} takes no position ids, so padded prompts would shift its positions; give "
                "another architecture"
            )
        if model.get_output_embeddings() is None:
            raise UserError(f"{type(model).__name__} has no output head; give a causal or masked language model")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", UNLIMITED))

    def hidden(
        self,
        ids: Tensor,
        attended: Tensor,
        *,
        columns: Tensor | None = None,
        cache: Cache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """One forward pass.

        Args:
            ids: `[N, Q]` int64.
            attended: `[N, T]` bool; False at padding, which nothing attends to.
            columns: `[N, Q]` int64, the columns of `T` that `ids` stand in; None when they are all (`Q = T`).
            cache: takes the keys and values that the pass computes and answers with those of all `T` columns.
            segments: `[N, T]` int64, of rows that hold several sequences: equal within each of them, and different
                between neighbours. A token attends to its own sequence, and positions begin anew with each; see
                `takes_segments`. None when a row is one sequence.

        Returns:
            Last hidden states `[N, Q, H]`.
        """
        if segments is not None:
            own = segments.unsqueeze(-1) == segments.unsqueeze(-2)
            return self.model.base_model(
                input_ids=ids,
                attention_mask=self._taken(own.unsqueeze(1)),
                position_ids=segment_positions(segments),
                use_cache=False,
            ).last_hidden_state
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        if columns is not None:
            positions = positions.gather(1, columns)
        mask = attended.long() if cache is None else self._square(attended, ids.shape[1])
        cached = {} if cache is None else {"past_key_values": cache}
        return self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=cache is not None, **cached
        ).last_hidden_state

    def _square(self, attended: Tensor, queries: int) -> Tensor:
        """The mask `[N, 1, Q, T]` in which every query sees what is attended."""
        return self._taken(attended[:, None, None, :].expand(-1, 1, queries, -1))

    def _taken(self, mask: Tensor) -> Tensor:
        """A bool mask `[N, 1, Q, T]` in the form that the attention implementation takes as it is."""
        if self.model.config._attn_implementation != "eager":
            return mask
        least = torch.finfo(self.model.dtype).min
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill(~mask, least)

    @property
    def takes_cache(self) -> bool:
        """Whether the model hands its keys and values to a cache, and attends to all of them.

        Encoders such as ModernBERT do not hand them out; a sliding window would be lost among cached columns.
        """
        return not self._slides and "past_key_values" in inspect.signature(self.model.base_model.forward).parameters

    @property
    def takes_segments(self) -> bool:
        """Whether `hidden` can take several sequences in a row: its mask would take a sliding window's place."""
        return not self._slides

    @property
    def _slides(self) -> bool:
        config = self.model.config
        kinds = getattr(config, "layer_types", None) or ()
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return "sliding_attention" in kinds or (window is not None and not kinds)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head on selected positions: `[..., H]` -> `[..., V]`."""
        output: Any = self.model.get_output_embeddings()
        return output(hidden)

    def prompt_features(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        """Mean hidden state over the prompt, detached from the trunk, standardised as the calibration says.

        Args:
            hidden: `[N, T, H]` of a forward on `z_0`.
            prompt: `[N, T]` bool, attended prompt positions.

        Returns:
            `[N, H]`, fp32 or wider.
        """
        wide = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        weight = prompt.to(wide.dtype).unsqueeze(-1)
        return self.calibration.standardised((wide * weight).sum(1) / weight.sum(1).clamp(min=1))

    def for_rollout(self, config: RolloutConfig) -> Self:
        """The same policy in the weights that rollout computes with; the threshold head stays in fp32."""
        if config.precision == "bfloat16":
            self.model.bfloat16()
        return self

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of a completion's ids up to, not including, the first stop token."""
        stops = [index for index, token in enumerate(ids) if token in self.vocabulary.stop_ids]
        return str(self.tokenizer.decode(ids[: stops[0]] if stops else ids, skip_special_tokens=True))

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder and the threshold head beside it.

        Args:
            folder: made if it is not there.
            weights: what to write in place of the present ones, as `state_dict` gives them.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "head": {}, "calibration": {}}
        for name, value in (self.state_dict() if weights is None else weights).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.save_pretrained(folder, state_dict=parts["model"])
        self.tokenizer.save_pretrained(folder)
        own = {f"{CALIBRATION}{name}": value for name, value in parts["calibration"].items()}
        save_file(parts["head"] | own, folder / THRESHOLD_WEIGHTS)
        (folder / THRESHOLD_CONFIG).write_text(self.head.config.model_dump_json())


def segment_positions(segments: Tensor) -> Tensor:
    """Positions `[N, T]` that begin at 0 with each run of equal numbers in `segments` `[N, T]`."""
    index = torch.arange(segments.shape[-1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(begins, index, 0).cummax(-1).values


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


def load_policy(path: str | Path, config: ModelConfig, threshold: ThresholdConfig) -> Policy:
    """Read a Hugging Face folder; a threshold head saved beside it replaces a fresh one of `threshold`.

    Raises:
        UserError: when the folder, the model or its MASK token is missing or does not fit.
    """
    folder = _folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        read_vocabulary(tokenizer, AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"model {folder}: {len(missing)} parameters are not in its weights, e.g. {missing[0]}; "
                "config.json and the weights must belong together"
            )
        model.config.is_causal = False
        model.set_attn_implementation(config.attention)
        if (folder / THRESHOLD_CONFIG).is_file():
            threshold = ThresholdConfig.model_validate_json((folder / THRESHOLD_CONFIG).read_bytes())
        head = build_threshold_head(model.config.hidden_size, threshold)
        calibration = {}
        if (folder / THRESHOLD_WEIGHTS).is_file():
            weights = load_file(folder / THRESHOLD_WEIGHTS)
            names = [name for name in weights if name.startswith(CALIBRATION)]
            calibration = {name.removeprefix(CALIBRATION): weights.pop(name) for name in names}
            head.load_state_dict(weights)
        policy = Policy(model, head, tokenizer)
        if calibration:
            policy.calibration.load_state_dict(calibration)
    except UserError:
        raise
    except Exception as error:  # a folder can be wrong in more ways than transformers has errors for
        raise _not_loadable(folder, error) from error
    return policy.to(config.device).eval()


def open_policy(config: Config, task: Task) -> Policy:
    """The policy that a run starts from: `model.path` if given, else a small one built for the task."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.model, config.sampler.threshold)
    return build_policy(config.model, config.sampler.threshold, alphabet=task.alphabet, seed=config.run.seed)


def open_tokenizer(config: Config, task: Task) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer and number of positions of the policy that a run starts from, without its weights; ids are checked,
    and that weights and threshold can be read."""
    if config.model.path is None:
        return character_tokenizer(task.alphabet), config.model.max_positions
    folder = _folder(config.model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for file in sorted(folder.glob("*.safetensors")):
            safe_open(file, "pt").keys()  # its header, held against the file's length
        if (folder / THRESHOLD_CONFIG).is_file():
            ThresholdConfig.model_validate_json((folder / THRESHOLD_CONFIG).read_bytes())
    except Exception as error:
        raise _not_loadable(folder, error) from error
    read_vocabulary(tokenizer, described)
    return tokenizer, int(getattr(described, "max_position_embeddings", UNLIMITED))


def _not_loadable(folder: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(f"model {folder}: cannot be loaded: {reason}; give a folder that transformers reads")


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json there; give a folder in Hugging Face layout")
    return folder


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Vocabulary:
    """Special ids of a tokenizer, checked against the model's configuration.

    Raises:
        UserError: without a MASK token, with MASK equal to PAD or EOS, or with an id outside the vocabulary.
    """
    special: Any = tokenizer
    mask, eos = special.mask_token_id, special.eos_token_id
    if mask is None:
        raise UserError("the tokenizer has no MASK token; set tokenizer.mask_token and save the folder again")
    if eos is None:
        raise UserError("the tokenizer has no EOS token; set tokenizer.eos_token and save the folder again")
    pad = eos if special.pad_token_id is None else special.pad_token_id
    if mask in (pad, eos):
        which = "PAD" if mask == pad else "EOS"
        raise UserError(f"MASK and {which} are both id {mask}; padding would be denoised: give them different tokens")
    declared = getattr(config, "eos_token_id", None)
    stops = {eos, *(declared if isinstance(declared, list) else [] if declared is None else [declared])}
    if mask in stops:
        raise UserError(f"MASK id {mask} is among the model's eos_token_id {declared}; every row would end at once")
    for name, token in (("MASK", mask), ("PAD", pad), *(("EOS", stop) for stop in sorted(stops))):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"{name} id {token} is outside the model's vocabulary of {config.vocab_size}; use a matching tokenizer"
            )
    return Vocabulary(mask_id=mask, pad_id=pad, eos_id=eos, stop_ids=tuple(sorted(stops)))
