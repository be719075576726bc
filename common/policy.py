"""Policy: a Hugging Face model, its MASK id, its tokenizer, and the threshold head on top.

- Everything downstream sees this and nothing of the model's family.
- `hidden` is one function evaluation; `logits` applies the output head to selected positions only.
- The hidden state at column `l` is what predicts position `l`. Models that predict it at column `l - 1` (Dream) are put
  right in `hidden`, and nowhere else.
- Positions are counted from the first attended token, so left padding changes nothing.
- Nothing of a folder is executed: safetensors only, no pickles; no code of its own.
- Saved as a standard Hugging Face folder plus `threshold.safetensors`; `from_pretrained` reads the folder. With an
  adapter (`common.adapter`) the folder holds that in place of the model, and names its base.
"""

import inspect
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from common.adapter import (
    ADAPTER_WEIGHTS,
    Base,
    adapt,
    adapted,
    learned_parameters,
    load_adapter,
    read_adapter,
    read_base,
    save_adapter,
)
from common.calibration import Calibration
from common.config import Config, ModelConfig, RolloutConfig, ThresholdConfig
from common.errors import UserError
from common.family import SHIFT_KEY
from common.model_folder import ModelFolder
from common.prompt import prompt_ids
from common.shards import Shards
from common.tasks import Task
from common.threshold import ThresholdHead, build_threshold_head
from common.tokenizer import character_tokenizer
from common.vocabulary import read_vocabulary

transformers_logging.disable_progress_bar()  # the command line draws its own

THRESHOLD_WEIGHTS = "threshold.safetensors"
THRESHOLD_CONFIG = "threshold.json"
CALIBRATION = "calibration."  # prefix of its names beside the head's weights
UNLIMITED = 1 << 30


BEFORE_OUTPUT = {"modernbert": "head", "bert": "cls.predictions.transform"}
"""What stands between the hidden states and the output matrix, by model type; nothing elsewhere."""


class Policy(nn.Module):
    """Model and threshold head, built or loaded once per process and overwritten by each adopted snapshot."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: ThresholdHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.calibration = Calibration(model.config.hidden_size)
        self.tokenizer = tokenizer
        self.vocabulary = read_vocabulary(tokenizer, model.config)
        self.shift = int(getattr(model.config, SHIFT_KEY, 0))
        """1 where position `l` is predicted at column `l - 1`: a pass on some columns begins that much earlier."""
        self._chat_template = chat_template
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
            Last hidden states `[N, Q, H]`, each at the column of the position that it predicts. With a `shift` the
            first of `columns` must be the one before the first that is to be predicted.
        """
        if segments is not None:
            own = segments.unsqueeze(-1) == segments.unsqueeze(-2)
            states = self.model.base_model(
                input_ids=ids,
                attention_mask=self._taken(own.unsqueeze(1)),
                position_ids=segment_positions(segments),
                use_cache=False,
            ).last_hidden_state
            return self._shifted(states, segments == segments.roll(1, 1)) if self.shift else states
        positions = (attended.cumsum(-1) - 1).clamp(min=0)
        if columns is not None:
            positions = positions.gather(1, columns)
        mask = attended.long() if cache is None else self._square(attended, ids.shape[1])
        cached = {} if cache is None else {"past_key_values": cache}
        states = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=cache is not None, **cached
        ).last_hidden_state
        if not self.shift:
            return states
        if columns is None:
            return self._shifted(states, attended.roll(1, 1))
        before = attended.gather(1, (columns - 1).clamp(min=0))
        return self._shifted(states, (columns.roll(1, 1) == columns - 1) & before)

    def _shifted(self, states: Tensor, follows: Tensor) -> Tensor:
        """Each state `[N, Q, H]` one column later; what follows padding, or nothing, stays, as in Dream's sampler.

        Args:
            states: of the columns that predict.
            follows: `[N, Q]` bool, whether the state before is that of the token before. The first has none.
        """
        follows = follows.clone()
        follows[:, 0] = False
        return torch.where(follows.unsqueeze(-1), states.roll(1, 1), states)

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
        return output(self.before_output(hidden))

    def before_output(self, hidden: Tensor) -> Tensor:
        """What the output matrix is applied to; the hidden states themselves but in masked language models."""
        name = BEFORE_OUTPUT.get(self.model.config.model_type)
        return hidden if name is None else self.model.get_submodule(name)(hidden)

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
            for parameter in self.model.parameters():  # not the buffers: rotary frequencies need float32
                parameter.data = parameter.data.bfloat16()
        return self

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, through the tokenizer's chat template as the configuration says."""
        return prompt_ids(self.tokenizer, text, chat_template=self._chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Text of a completion's ids up to, not including, the first stop token."""
        stops = [index for index, token in enumerate(ids) if token in self.vocabulary.stop_ids]
        return str(self.tokenizer.decode(ids[: stops[0]] if stops else ids, skip_special_tokens=True))

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder, or an adapter's, and the threshold head beside it.

        Args:
            folder: made if it is not there.
            weights: what to write in place of the present ones, as `state_dict` gives them.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "head": {}, "calibration": {}}
        for name, value in (self.state_dict() if weights is None else weights).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        if adapted(self.model):
            save_adapter(self.model, folder, parts["model"])
        else:  # not in the checkpoint's original format: its config.json is that of transformers
            self.model.save_pretrained(folder, state_dict=parts["model"], save_original_format=False)
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


def load_policy(
    path: str | Path,
    config: ModelConfig,
    threshold: ThresholdConfig,
    *,
    seed: int = 0,
    empty: torch.dtype | None = None,
) -> Policy:
    """Read a checkpoint of a known family; a threshold head saved beside it replaces a fresh one of `threshold`.

    With `model.lora` the policy has an adapter, that of the folder or a new one; without it, a folder's adapter is
    merged into its base.

    Args:
        path: a whole model, or an adapter and the name of its base.
        config: device, attention, adapter.
        threshold: of a fresh head.
        seed: of a new adapter.
        empty: leave the model's weights out: they are as memory was, in this type, until they are overwritten.

    Raises:
        UserError: when the folder, the model or its MASK token is missing or does not fit.
    """
    folder = Path(path)
    try:
        base = read_base(folder)
        found = ModelFolder(folder, mask_token=config.mask_token)
        whole = found if base is None else ModelFolder(base.folder, mask_token=config.mask_token)
        model = _load_model(whole) if empty is None else _empty_model(whole, empty)
        model.set_attn_implementation(config.attention)
        if (folder / THRESHOLD_CONFIG).is_file():
            threshold = ThresholdConfig.model_validate_json((folder / THRESHOLD_CONFIG).read_bytes())
        head = build_threshold_head(model.config.hidden_size, threshold)
        policy = Policy(model, head, found.tokenizer, chat_template=config.chat_template)
        _load_own(policy, folder)
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


def _load_own(policy: Policy, folder: Path) -> None:
    own = _read_own(folder)
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


def open_policy(config: Config, task: Task) -> Policy:
    """The policy that a run starts from: `model.path` if given, else a small one built for the task, unadapted."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.model, config.sampler.threshold, seed=config.run.seed)
    return build_policy(config.model, config.sampler.threshold, alphabet=task.alphabet, seed=config.run.seed)


def open_rollout_policy(config: Config, task: Task) -> Policy:
    """The policy of a rollout actor, for weights that the learner publishes; a frozen base is not read here either.

    Raises:
        UserError: as `load_policy`.
    """
    if config.model.lora is None:
        return open_policy(config, task).for_rollout(config.rollout)
    dtype = torch.bfloat16 if config.rollout.precision == "bfloat16" else torch.float32
    return open_empty_policy(config, task, dtype).for_rollout(config.rollout)


def open_empty_policy(config: Config, task: Task, dtype: torch.dtype) -> Policy:
    """What a run trains, its adapter included, for weights that come from elsewhere: a folder's are not read."""
    if config.model.path is not None:
        return load_policy(config.model.path, config.model, config.sampler.threshold, empty=dtype)
    policy = open_policy(config, task)
    if config.model.lora is not None:
        adapt(policy.model, config.model.lora, None, seed=config.run.seed)
    return policy


def open_tokenizer(config: Config, task: Task) -> tuple[PreTrainedTokenizerBase, int]:
    """Tokenizer and number of positions of the policy that a run starts from, without its weights; ids are checked,
    and that weights and threshold can be read."""
    if config.model.path is None:
        return character_tokenizer(task.alphabet), config.model.max_positions
    folder = Path(config.model.path)
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
