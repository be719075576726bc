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
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from common.adapter import (
    adapted,
    save_adapter,
)
from common.calibration import Calibration
from common.config import RolloutConfig
from common.errors import UserError
from common.family import SHIFT_KEY
from common.new_folder import open_to_all
from common.prompt import prompt_ids
from common.threshold import ThresholdHead
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
    def takes_segments(self) -> bool:
        """Whether `hidden` can take several sequences in a row: its mask would take a sliding window's place."""
        return not _slides(self.model)

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
        open_to_all(folder)
        partial = folder / f"{THRESHOLD_CONFIG}.partial"  # by it others know that all is there: not even an empty one
        partial.write_text(self.head.config.model_dump_json())
        partial.replace(folder / THRESHOLD_CONFIG)


def check_cache(model: PreTrainedModel) -> None:
    """Refuse a model that `sampler.cache` cannot serve: it hands out no keys and values, or does not attend to all.

    Encoders such as ModernBERT do not hand them out; a sliding window would be lost among cached columns.

    Raises:
        UserError: naming the way out.
    """
    if _slides(model) or "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(f"{type(model).__name__} hands out no keys and values; set sampler.cache=none for this model")


def _slides(model: PreTrainedModel) -> bool:
    config = model.config
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return "sliding_attention" in kinds or (window is not None and not kinds)


def segment_positions(segments: Tensor) -> Tensor:
    """Positions `[N, T]` that begin at 0 with each run of equal numbers in `segments` `[N, T]`."""
    index = torch.arange(segments.shape[-1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(begins, index, 0).cummax(-1).values
