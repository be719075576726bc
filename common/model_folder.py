"""ModelFolder: a checkpoint on disk, recognised: its family, the configuration it is loaded with, its tokenizer.

One way in for loading, preflight and conversion. Nothing of a folder is executed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from common.errors import UserError, one_line
from common.family import SHIFT_KEY, Family, recognise
from common.shards import Shards
from common.vocabulary import read_vocabulary, settle_special_tokens


def read_described(folder: Path, *, shift: int | None = None) -> tuple[Family, Any]:
    """Family of a checkpoint, and the configuration of transformers that it is loaded with; only config.json is read.

    Raises:
        UserError: for an unknown architecture; other errors for a damaged file.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model {folder}: no config.json there; give a folder in Hugging Face layout")
    try:
        given = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"model {folder}: config.json is damaged ({one_line(error)[:160]}); get it again") from error
    if shift is not None and isinstance(given, dict):
        given |= {SHIFT_KEY: shift}
    try:
        family = recognise(given)
        described = family.described(given)
        if described["model_type"] not in CONFIG_MAPPING:
            raise UserError(
                f"config.json: model_type {described['model_type']!r} is not one that transformers has natively"
            )
    except UserError as error:
        raise UserError(f"model {folder}: {error}") from error
    return family, CONFIG_MAPPING[described["model_type"]].from_dict(described)


class ModelFolder:
    """Everything about a checkpoint but its weights."""

    def __init__(self, folder: Path, *, mask_token: str | None = None, shift: int | None = None) -> None:
        """
        Args:
            folder: the checkpoint, in its family's own layout or in that of transformers.
            mask_token: the user's choice of MASK.
            shift: replaces the family's `prediction_shift`.

        Raises:
            UserError: for an unknown architecture, or special tokens that do not fit; other errors for damaged files.
        """
        self.folder = folder
        self.family, self.config = read_described(folder, shift=shift)
        try:
            self.tokenizer = self._open_tokenizer()
            settle_special_tokens(self.tokenizer, self.config, self.family, mask_token)
            self.vocabulary = read_vocabulary(self.tokenizer, self.config)
        except UserError as error:
            raise UserError(f"model {folder}: {error}") from error

    @property
    def model_class(self) -> Any:
        """The class of transformers that holds the model."""
        classes = MODEL_FOR_MASKED_LM_MAPPING if self.family.masked_lm else MODEL_FOR_CAUSAL_LM_MAPPING
        if type(self.config) not in classes:
            raise UserError(
                f"model {self.folder}: transformers has no language model of type {self.config.model_type!r}; give "
                "another architecture"
            )
        return classes[type(self.config)]

    def skeleton(self) -> Any:
        """The model without memory for its weights: names, shapes and methods."""
        with torch.device("meta"):
            return self.model_class(self.config)

    @property
    def max_positions(self) -> int | None:
        """Longest prompt plus completion, in tokens; None where the configuration does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    def parameter_names(self, shards: Shards) -> dict[str, str]:
        """The checkpoint's name of each parameter, by the target's.

        Raises:
            UserError: when two parameters would become one, or two that are tied differ.
        """
        names: dict[str, str] = {}
        for own in shards.parameters:
            if own.endswith("rotary_emb.inv_freq"):
                continue  # computed from the configuration; old checkpoints hold it
            name = self.family.renamed(own)
            if name in names:
                raise UserError(f"model {self.folder}: {names[name]} and {own} would both become {name}")
            names[name] = own
        for name, other in self.tied().items():
            held = {name, other} <= names.keys()
            if held and not torch.equal(shards.tensor(names[name]), shards.tensor(names[other])):
                raise UserError(
                    f"model {self.folder}: {names[name]} is not {names[other]}, and config.json says that they are one "
                    'matrix; set "tie_word_embeddings" (of a LLaDA "weight_tying") to false there'
                )
        return names

    def tied(self) -> dict[str, str]:
        """Parameters that are another one's matrix, and whose; none where config.json ties none."""
        if not self.config.tie_word_embeddings:
            return {}
        return dict(getattr(self.skeleton(), "all_tied_weights_keys", None) or {})

    def _open_tokenizer(self) -> PreTrainedTokenizerBase:
        """Families name tokenizers of their own code: what these read, transformers' classes read too."""
        whole = (self.folder / "tokenizer.json").is_file()
        try:
            if self.family.native:
                return AutoTokenizer.from_pretrained(
                    self.folder, config=self.config, local_files_only=True, trust_remote_code=False
                )
            kind: Any = PreTrainedTokenizerFast if whole or self.family.target == "llama" else Qwen2Tokenizer
            return kind.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged file may raise anything, a bare Exception too
            files = "tokenizer.json is damaged" if whole else "there is no tokenizer.json"
            raise UserError(
                f"its tokenizer cannot be read: {files}, or what stands beside it does not fit "
                f"({type(error).__name__}: {one_line(error)[:120]}); get the tokenizer's files again"
            ) from error
