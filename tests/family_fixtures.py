"""Tiny checkpoints in each family's own on-disk format, as it is published: names, config.json, shards, tokenizer."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.policy import Policy

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"
LLADA_CHAT = (
    "{% for message in messages %}{{ (bos_token if loop.index0 == 0 else '') + '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
QWEN_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_ratio": 4,
    "mlp_hidden_size": 24,
    "vocab_size": 104,
    "embedding_size": 128,
    "max_sequence_length": 96,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "alibi": False,
    "weight_tying": False,
    "mask_token_id": 5,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
}


def all_logits(policy: Policy, ids: Tensor, attended: Tensor | None = None) -> Tensor:
    attended = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended
    with torch.no_grad():
        return policy.logits(policy.hidden(ids, attended))


def character_tokenizer(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """One id per printable character after the special tokens."""
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate([*special, *CHARACTERS])}, unk_token="\n"))
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def save_shards(folder: Path, weights: Mapping[str, Tensor], count: int) -> None:
    """The parameters in `count` files with an index, or in one."""
    if count == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = list(weights), {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        save_file({name: weights[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in weights.values())
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))


def llada_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random parameters under LLaDA's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    weights = {"model.transformer.wte.weight": draw(128, 16, scale=1.0)}
    for layer in range(2):
        for name, shape in (
            *(("q_proj", (16, 16)), ("k_proj", (8, 16)), ("v_proj", (8, 16)), ("attn_out", (16, 16))),
            *(("ff_proj", (24, 16)), ("up_proj", (24, 16)), ("ff_out", (16, 24))),
        ):
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = draw(*shape)
        for name in ("attn_norm", "ff_norm"):
            weights[f"model.transformer.blocks.{layer}.{name}.weight"] = 1 + draw(16, scale=0.1)
    weights["model.transformer.ln_f.weight"] = 1 + draw(16, scale=0.1)
    weights["model.transformer.ff_out.weight"] = draw(128, 16)
    return weights


def write_llada(folder: Path, **changes: object) -> Path:
    """LLaDA-8B-Instruct in small: three shards, MASK in config.json alone, more embedding rows than tokens."""
    folder.mkdir()
    names = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = character_tokenizer(
        [*names, "<|mdm_mask|>"], bos_token=names[0], eos_token=names[1], pad_token=names[1], cls_token=names[0]
    )
    tokenizer.chat_template = LLADA_CHAT
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(LLADA | changes))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5, "odd": [1]}))
    save_shards(folder, llada_weights(), 3)
    return folder


def write_dream(folder: Path, **changes: object) -> Path:
    """Dream-7B in small: Qwen2's names, byte-level vocab.json and merges.txt, a tokenizer class of its own code."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    added = {str(256 + i): {"content": name, "special": True} for i, name in enumerate(special)}
    described = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
        "additional_special_tokens": special[1:4],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
        "chat_template": QWEN_CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    torch.manual_seed(1)
    config = Qwen2Config(vocab_size=264, **SIZES)
    given = SIZES | {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "vocab_size": 264,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_mrope": False,
        "tie_word_embeddings": False,
        "mask_token_id": 260,
        "pad_token_id": 256,
        "eos_token_id": 256,
        "bos_token_id": 256,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(given | changes))
    save_shards(folder, Qwen2ForCausalLM(config).state_dict(), 2)
    return folder


def write_modernbert(folder: Path) -> Path:
    """ModernBERT in small: a head before the output matrix, tied embeddings, [SEP] for EOS in config.json alone."""
    tokenizer = character_tokenizer(
        ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )
    torch.manual_seed(2)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    special = {"pad_token_id": 3, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = ModernBertConfig(vocab_size=104, local_attention=8, **(sizes | special))
    ModernBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_a2d(folder: Path) -> Path:
    """A Qwen3 turned diffusion, with shift: a model type of its own, tied embeddings, `prediction_shift`."""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    tokenizer = character_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>", mask_token="<|mask|>")
    tokenizer.chat_template = QWEN_CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen3Config(vocab_size=112, head_dim=8, tie_word_embeddings=True, **SIZES)
    given = json.loads(config.to_json_string()) | {
        "model_type": "a2d-qwen3",
        "architectures": ["A2DQwen3LMHeadModel"],
        "auto_map": {"AutoConfig": "modeling_qwen3.A2DQwen3Config"},
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mask_token_id": 3,
        "prediction_shift": 1,
    }
    (folder / "config.json").write_text(json.dumps(given))
    weights = Qwen3ForCausalLM(config).state_dict()
    del weights["lm_head.weight"]
    save_shards(folder, weights, 1)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llada": write_llada,
    "dream": write_dream,
    "modernbert": write_modernbert,
    "a2d": write_a2d,
}
SHIFTED = {"dream", "a2d"}


def llada_logits(weights: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """`[T, V]`: LLaDA's forward written down from its paper and released configuration, for one sequence."""
    heads, kv_heads, size, theta, eps = 4, 2, 4, 500000.0, 1e-5

    def of(layer: int, name: str) -> Tensor:
        return weights[f"model.transformer.blocks.{layer}.{name}.weight"]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(len(ids)), theta ** -(torch.arange(0, size, 2) / size))
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    x = weights["model.transformer.wte.weight"][ids]
    for layer in range(2):
        h = norm(x, of(layer, "attn_norm"))
        q, k, v = (
            (h @ of(layer, name).T).view(len(ids), -1, size).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (rotate(k), v))
        attention = (rotate(q) @ k.transpose(1, 2) / size**0.5).softmax(-1)  # nothing is masked
        x = x + (attention @ v).transpose(0, 1).flatten(1) @ of(layer, "attn_out").T
        h = norm(x, of(layer, "ff_norm"))
        gate = torch.nn.functional.silu(h @ of(layer, "ff_proj").T)
        x = x + (gate * (h @ of(layer, "up_proj").T)) @ of(layer, "ff_out").T
    return norm(x, weights["model.transformer.ln_f.weight"]) @ weights["model.transformer.ff_out.weight"].T
