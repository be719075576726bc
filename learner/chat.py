"""Chat: a conversation as token ids, through the tokenizer's chat template where it has one."""

from typing import Any

from common.errors import UserError, one_line
from common.family import FAMILIES

TURN_ENDS = frozenset(name for family in FAMILIES for name in family.turn_ends)


def chat_ids(
    tokenizer: Any, messages: list[dict[str, str]], where: str, *, chat_template: str = "auto"
) -> tuple[list[int], list[int]]:
    """Ids of all messages but the last, as they stand when the model is to answer, and of the last, the assistant's.

    The second part holds what the template puts after an answer (the end of the turn). Each is tokenised by itself, as
    in generation, where the prompt is all there is. A template that is deaf to `add_generation_prompt` may begin one
    more answer after the last (LLaDA's does); there the second part ends with the end of the turn.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: `role` and `content` of each; the last is the one to learn.
        where: what to call the conversation in an error.
        chat_template: `off` leaves the template out.

    Raises:
        UserError: when the template, or a tokenizer without one, cannot take these messages.
    """
    deaf = False
    if not tokenizer.chat_template or chat_template == "off":
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise UserError(
                f"{where}: the tokenizer has no chat template, so only one user's message and its answer can be taken; "
                "give `prompt` and `completion`, or a tokenizer with a template"
            )
        prompt, answer = (message["content"] for message in messages)
    else:
        try:
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
            deaf = prompt == tokenizer.apply_chat_template(messages[:-1], tokenize=False)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates are programs of the model's maker
            raise UserError(f"{where}: the chat template refuses it ({one_line(error)}); mend the row") from error
        if not whole.startswith(prompt):
            raise UserError(
                f"{where}: the chat template writes the messages before the answer differently once the answer is "
                "there, so it cannot be told what is the answer; give a tokenizer with another template"
            )
        answer = whole[len(prompt) :]
    ids = tokenizer.encode(answer, add_special_tokens=False)
    return tokenizer.encode(prompt, add_special_tokens=False), _turn(tokenizer, ids) if deaf else ids


def _turn(tokenizer: Any, ids: list[int]) -> list[int]:
    """Up to the first token that ends a turn, and with it; all where none does."""
    ends = TURN_ENDS | {tokenizer.eos_token}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return ids[: next((count for count, token in enumerate(tokens, 1) if token in ends), len(ids))]
