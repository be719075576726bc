"""Family: how the checkpoints of one kind of masked diffusion model become a model that transformers has natively.

- Recognised from `config.json` alone; no code of a checkpoint is run.
- A conversion renames parameters and translates configuration keys; no number changes.
- `prediction_shift` *(ours)* is a key of `config.json` that every family may set: 1 where position `l` is predicted at
  column `l - 1`. It is saved with the model, so it survives; `Policy.hidden` is where it is undone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError

SHIFT_KEY = "prediction_shift"
ADDED_KEYS = ("auto_map", "transformers_version", "_name_or_path")  # of the code and machine that wrote the folder

Keys = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint."""

    name: str
    model_type: str
    """What `config.json` calls it."""
    target: str
    """The model type of transformers that computes the same."""
    masked_lm: bool = False
    """Whether that is an encoder with a masked-language head, not a decoder made bidirectional."""
    shift: int = 0
    """Its `prediction_shift` where `config.json` has none."""
    mask_token: str | None = None
    """Its MASK, where neither the tokenizer nor `config.json` says."""
    turn_ends: tuple[str, ...] = ()
    """Tokens that end an answer beside EOS, where the tokenizer has them."""
    renames: tuple[tuple[str, str], ...] = ()
    """Pairs of a pattern, matched whole, and its replacement; parameters that match none keep their names."""
    translate: Callable[[Keys], Keys] = dict
    """Keys of `config.json` -> keys of the target's configuration."""

    @property
    def native(self) -> bool:
        """Whether transformers reads its folders as they are."""
        return self.model_type == self.target

    def renamed(self, parameter: str) -> str:
        """What the target calls a parameter."""
        for pattern, replacement in self.renames:
            if found := re.fullmatch(pattern, parameter):
                return found.expand(replacement)
        return parameter

    def described(self, given: Keys) -> Keys:
        """The target's `config.json`.

        Args:
            given: the checkpoint's.

        Raises:
            UserError: for a shift other than 0 and 1, or a variant that the target does not compute.
        """
        keys = {key: value for key, value in self.translate(given).items() if key not in ADDED_KEYS}
        shift = given.get(SHIFT_KEY, self.shift)
        if shift not in (0, 1):
            raise UserError(f"config.json: {SHIFT_KEY}={shift!r}; give 0, or 1 where column l-1 predicts position l")
        return keys | {"model_type": self.target, "is_causal": False, SHIFT_KEY: int(shift)}


# LLaDA's block (its modeling_llada.py, block_type llama) is Llama's: ff_proj is the gate, up_proj the up projection
_BLOCK = r"model\.transformer\.blocks\.(\d+)\."
_LLADA_NAMES = (
    (r"model\.transformer\.wte\.weight", "model.embed_tokens.weight"),
    (r"model\.transformer\.ln_f\.weight", "model.norm.weight"),
    (r"model\.transformer\.ff_out\.weight", "lm_head.weight"),
    (_BLOCK + r"([qkv])_proj\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
    (_BLOCK + r"attn_out\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (_BLOCK + r"ff_proj\.weight", r"model.layers.\1.mlp.gate_proj.weight"),
    (_BLOCK + r"up_proj\.weight", r"model.layers.\1.mlp.up_proj.weight"),
    (_BLOCK + r"ff_out\.weight", r"model.layers.\1.mlp.down_proj.weight"),
    (_BLOCK + r"attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (_BLOCK + r"ff_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
)
# keys of LLaDA's configuration that Llama has no equal of, with the value that Llama computes and all releases have
_LLADA_FIXED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "clip_qkv": None,
}


def _llama_of_llada(given: Keys) -> Keys:
    for key, value in _LLADA_FIXED.items():
        if given.get(key, value) not in (value, None):
            raise UserError(
                f"config.json: {key}={given[key]!r} is a LLaDA that Llama does not compute (it has {value!r}); only "
                "the architecture of LLaDA-8B and LLaDA-1.5 is known"
            )
    needed = ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size", "rope_theta")
    lacking = [key for key in needed if given.get(key) is None]
    if lacking:
        raise UserError(f"config.json: a LLaDA without {', '.join(lacking)}; give the checkpoint's own config.json")
    return {
        "vocab_size": given.get("embedding_size") or given["vocab_size"],  # rows may exceed the tokenizer
        "hidden_size": given["d_model"],
        "intermediate_size": given["mlp_hidden_size"],
        "num_hidden_layers": given["n_layers"],
        "num_attention_heads": given["n_heads"],
        "num_key_value_heads": given.get("n_kv_heads") or given["n_heads"],
        "max_position_embeddings": given.get("max_sequence_length", 4096),
        "rms_norm_eps": given.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(given["rope_theta"])},
        "tie_word_embeddings": bool(given.get("weight_tying", False)),
        "mask_token_id": given.get("mask_token_id"),
        "eos_token_id": given.get("eos_token_id"),
        "pad_token_id": given.get("pad_token_id"),
        "bos_token_id": given.get("bos_token_id"),
    } | {key: given[key] for key in ("dtype", "torch_dtype") if key in given}


def _qwen_of_dream(given: Keys) -> Keys:
    if given.get("block_size") is not None:
        raise UserError(f"config.json: a Dream with block_size={given['block_size']}: {_BLOCK_CAUSAL}")
    return {key: value for key, value in given.items() if key != "use_mrope"}


_BLOCK_CAUSAL = (
    "its blocks attend to earlier blocks alone, which no engine of ours does yet (docs/models.md says what it takes); "
    "give a model whose tokens all attend to each other"
)
REFUSED = {
    "llada2_moe": f"LLaDA2 is a block-causal mixture of experts: {_BLOCK_CAUSAL}",
    "llada_moe": "LLaDA-MoE is a mixture of experts that transformers has no equal of (docs/models.md says what it "
    "takes); give a dense model",
    "diffusion_gemma": "DiffusionGemma renoises tokens and has no MASK; give a masked diffusion model",
}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")

FAMILIES = (
    Family(
        name="LLaDA",
        model_type="llada",
        target="llama",
        mask_token="<|mdm_mask|>",
        turn_ends=("<|eot_id|>",),
        renames=_LLADA_NAMES,
        translate=_llama_of_llada,
    ),
    Family(
        name="Dream",
        model_type="Dream",
        target="qwen2",
        shift=1,
        mask_token="<|mask|>",
        turn_ends=("<|im_end|>",),
        translate=_qwen_of_dream,
    ),
    *(
        Family(name=f"A2D {name}", model_type=f"a2d-{kind}", target=kind, turn_ends=_TURN_ENDS)
        for kind, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
    *(
        Family(name=f"bidirectional {name}", model_type=kind, target=kind, turn_ends=_TURN_ENDS)
        for kind, name in (("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
    ),
)


def recognise(given: Any) -> Family:
    """The family of a checkpoint.

    Args:
        given: what its `config.json` holds.

    Raises:
        UserError: for what is not known, naming what is.
    """
    if not isinstance(given, dict) or not isinstance(given.get("model_type"), str):
        raise UserError("config.json names no model_type; give the checkpoint's own config.json")
    kind, architectures = given["model_type"], given.get("architectures") or []
    if given.get("quantization_config") is not None:
        raise UserError("config.json: the checkpoint is quantised; give the original, unquantised one")
    if kind in REFUSED:
        raise UserError(f"config.json: model_type {kind!r}: {REFUSED[kind]}")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    if isinstance(architectures, list) and any(str(name).endswith("ForMaskedLM") for name in architectures):
        return Family(name=f"masked language model {kind}", model_type=kind, target=kind, masked_lm=True)
    known = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
    raise UserError(
        f"config.json: model_type {kind!r}, architectures {architectures} are not known; known are the model types "
        f"{known}, and every architecture …ForMaskedLM, such as ModernBertForMaskedLM (docs/models.md)"
    )
