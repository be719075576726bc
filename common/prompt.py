"""Prompt: from a text to the ids that the model reads, the one way for training, evaluation and `diffpo generate`.

With a chat template (`model.chat_template: auto`) the text is a user's message; the ids end where the answer begins.
"""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import UserError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, chat_template: str = "auto") -> list[int]:
    """Ids of a prompt.

    Args:
        tokenizer: the model's own.
        text: what the model shall read.
        chat_template: `auto` goes through the tokenizer's template if it has one; `off` takes the text as it is.

    Raises:
        UserError: when a template, a program of the model's maker, cannot be applied.
    """
    if chat_template == "off" or not tokenizer.chat_template:
        return tokenizer.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": text}]
    special: Any = tokenizer
    try:
        return list(special.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"prompt {text[:60]!a} cannot be made into tokens by the chat template ({reason}); set "
            "model.chat_template=off (--raw)"
        ) from error


def has_unknown(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> bool:
    """Whether the tokenizer did not know a part of the text; byte-level ones know all, and name EOS as unknown."""
    special: Any = tokenizer
    unknown = special.unk_token_id
    return unknown is not None and unknown != special.eos_token_id and unknown in ids
