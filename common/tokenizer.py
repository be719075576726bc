"""Character tokenizer for the small models that a run builds itself.

- Made with `tokenizers`, wrapped as a `PreTrainedTokenizerFast`: saved and loaded by `from_pretrained` like any other.
- One id per character, no normalisation, nothing added around a prompt.
"""

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from common.errors import UserError

SPECIAL = ("<pad>", "<eos>", "<mask>", "<unk>")
VOCABULARY_SIZE = 32


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the special tokens and the characters of `alphabet`, in order, padded to 32 ids.

    The padding ids are reserved names that no text contains; they keep the vocabulary the same for every small task.

    Raises:
        UserError: for an alphabet without characters.
    """
    if not alphabet:
        raise UserError(
            "the task has no `alphabet`, and a new model's tokenizer needs every character of its prompts and "
            "completions; set it in the task's class, or give a model in model.path"
        )
    names = [*SPECIAL, *dict.fromkeys(alphabet)]
    names += [f"<reserved{index}>" for index in range(len(names), VOCABULARY_SIZE)]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>", unk_token="<unk>"
    )
