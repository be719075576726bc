"""Vocabulary: the special ids of a tokenizer, found and held against the model.

- MASK: `model.mask_token`, else the tokenizer's, else `mask_token_id` of `config.json`, else the family's by name.
- EOS: the tokenizer's, else `eos_token_id` of `config.json`.
- Stop ids: EOS, all of `eos_token_id`, the family's turn ends.
- What is found is set in the tokenizer and the model's configuration, so a saved folder tells every other tool.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from common.family import Family


@dataclass(frozen=True)
class Vocabulary:
    """The ids that sampling needs to know."""

    mask_id: int
    pad_id: int
    eos_id: int
    stop_ids: tuple[int, ...]


def settle_special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, family: Family, mask_token: str | None = None
) -> None:
    """Complete a tokenizer and a model's configuration in place by what the other, the family or the user knows.

    Args:
        tokenizer: gets `mask_token` and `eos_token` where it has none.
        config: gets `mask_token_id`, and `eos_token_id` with the turn ends.
        family: knows the names.
        mask_token: the user's choice (`model.mask_token`), which wins.

    Raises:
        UserError: for a chosen or declared token that the tokenizer does not have, or two that disagree.
    """
    special: Any = tokenizer
    known = tokenizer.get_vocab()
    declared = getattr(config, "mask_token_id", None)
    if mask_token is not None:
        if mask_token not in known:
            raise UserError(
                f"model.mask_token={mask_token!r} is no single token of the tokenizer; give one that its vocabulary has"
            )
        special.mask_token = mask_token
    elif special.mask_token is None and declared is not None:
        special.mask_token = _token(tokenizer, declared, "mask_token_id")
    elif special.mask_token is None and family.mask_token in known:
        special.mask_token = family.mask_token
    elif special.mask_token is not None and declared not in (None, special.mask_token_id):
        raise UserError(
            f"MASK is id {special.mask_token_id} ({special.mask_token}) in the tokenizer and {declared} in config.json"
            "; tokenizer and model must belong together, or set model.mask_token"
        )
    stops = _ids(getattr(config, "eos_token_id", None))
    if special.eos_token is None and stops:
        special.eos_token = _token(tokenizer, stops[0], "eos_token_id")
    ends = [known[name] for name in family.turn_ends if name in known]
    every = list(dict.fromkeys([*stops, *ends]))
    if every != stops:
        own = [] if special.eos_token_id is None else [special.eos_token_id]
        config.eos_token_id = list(dict.fromkeys([*own, *every]))
    if special.mask_token is not None:
        config.mask_token_id = special.mask_token_id


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Vocabulary:
    """Special ids of a tokenizer, checked against the model's configuration.

    Raises:
        UserError: without a MASK token, with MASK equal to PAD or EOS, or with an id outside the vocabulary.
    """
    special: Any = tokenizer
    mask, eos = special.mask_token_id, special.eos_token_id
    if mask is None:
        raise UserError(
            "the tokenizer has no MASK token; set tokenizer.mask_token and save the folder again, or name one of its "
            "tokens by model.mask_token"
        )
    if eos is None:
        raise UserError("the tokenizer has no EOS token; set tokenizer.eos_token and save the folder again")
    pad = eos if special.pad_token_id is None else special.pad_token_id
    if mask in (pad, eos):
        which = "PAD" if mask == pad else "EOS"
        raise UserError(f"MASK and {which} are both id {mask}; padding would be denoised: give them different tokens")
    declared = getattr(config, "eos_token_id", None)
    stops = {eos, *_ids(declared)}
    if mask in stops:
        raise UserError(f"MASK id {mask} is among the model's eos_token_id {declared}; every row would end at once")
    for name, token in (("MASK", mask), ("PAD", pad), *(("EOS", stop) for stop in sorted(stops))):
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"{name} id {token} is outside the model's vocabulary of {config.vocab_size}; use a matching tokenizer"
            )
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {largest}, the model a vocabulary of {config.vocab_size}; use a matching "
            "tokenizer"
        )
    return Vocabulary(mask_id=mask, pad_id=pad, eos_id=eos, stop_ids=tuple(sorted(stops)))


def _ids(declared: Any) -> list[int]:
    return list(declared) if isinstance(declared, list) else [] if declared is None else [declared]


def _token(tokenizer: PreTrainedTokenizerBase, token_id: Any, key: str) -> str:
    """The token that `config.json` declares by its id."""
    found: Any = None
    if isinstance(token_id, int) and 0 <= token_id <= max(tokenizer.get_vocab().values()):
        found = tokenizer.convert_ids_to_tokens(token_id)
    if found is None:
        raise UserError(
            f"{key}={token_id} of config.json is no token of the tokenizer; tokenizer and model must belong together"
        )
    return str(found)
