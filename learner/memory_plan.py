"""Memory plan: what a run needs, by part and by role, before any weights are there.

- The model is built from its config.json alone, of tensors without memory; what autograd keeps of a forward pass is
  counted on them as it is on real ones, so it holds for every family, attention and precision.
- All of it is an estimate in bytes: no fragmentation, no workspaces of kernels. `RESERVE` of a GPU stays free for them.
- Learner ranks share weights, gradients and optimizer (FSDP2), those of the output head excepted; they do not share
  activations and logits.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from common.adapter import target_layers
from common.autocast import has_bfloat16
from common.config import Config, LoraConfig
from common.errors import UserError
from common.local_copy import local_copy
from common.model_folder import read_described
from common.policy_loading import build_policy
from common.tasks import build_task
from common.token_scores import row_bytes
from learner.activation_checkpointing import activation_checkpointing, checkpointing_layers

FULL, HALF = 4, 2  # bytes of float32 and bfloat16
ADAM = 2 * FULL
PIECES = 4  # tensors of the size of a piece's logits: logits, log-probabilities, and both gradients
RESERVE = 0.1
MOST_GPUS = 4096


@dataclass(frozen=True)
class Model:
    """What of a model the plan counts with."""

    parameters: int
    embeddings: int
    """Of them in the embedding and the output head."""
    head: int
    """Of them in the output head, which every rank has whole; with the embedding's where they are one."""
    adapters: int
    """Parameters of LoRA adapters, were there some."""
    layers: int
    vocabulary: int
    cache_per_token: int
    """Keys and values, in numbers."""


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of one forward pass of a micro-batch, by whether the layers are computed again."""

    kept: int
    """All that a layer computes; under autocast also the weights in bfloat16."""
    recomputed: int
    """Inputs of the layers, and the one layer that is being computed again."""
    head: int
    """The output head in bfloat16; 0 without autocast."""

    def of(self, *, checkpointing: bool) -> int:
        return self.head + (self.recomputed if checkpointing else self.kept)


@dataclass(frozen=True)
class Settings:
    """What of a configuration the plan counts with."""

    ranks: int
    reference: bool
    """Whether a KL term keeps a second model; adapters switched off are one for nothing."""
    inner_updates: int
    tokens: int
    """Of a micro-batch."""
    slots: int
    width: int
    """Prompt and completion, tokens."""
    rollout_bytes: int
    """Of one weight in rollout."""
    rollout_autocast: bool
    published_bytes: int
    """Of one number of a snapshot."""
    keep_versions: int
    replay: int
    actors: int
    cached: bool
    logits: int
    """Bytes of one piece of logits in float32."""
    drift: bool
    """Whether the drift gauge is measured; rank 0 of several has a whole policy for that."""


def learner_memory(
    model: Model, activations: Activations, settings: Settings, *, lora: bool, checkpointing: bool, ranks: int
) -> dict[str, float]:
    """Bytes of one learner rank's device, by part."""
    adapters = model.adapters if lora else 0
    share = (model.parameters + adapters - model.head) / ranks + model.head
    trained = adapters / ranks if lora else share
    parts = {
        "weights": FULL * share,
        "gradients": FULL * trained,
        "optimizer": ADAM * trained,
        "reference policy": 0 if lora or not settings.reference else FULL * share,
        "copy for a refused batch": (FULL + ADAM) * trained if settings.inner_updates > 1 else 0,
        "activations": activations.of(checkpointing=checkpointing),
        "logits": PIECES * settings.logits,
        "head's gradient": 0 if lora else 2 * FULL * model.head,  # of one piece of logits, and of those before it
    }
    if ranks > 1:
        layer, ends = (model.parameters - model.embeddings) / model.layers, model.embeddings - model.head
        parts["whole layers"] = FULL * (2 * layer + ends)  # one is computed while the next is fetched
        parts["their gradients"] = 0 if lora else 2 * FULL * (layer + ends)  # of one, and as they are sent
        parts["drift gauge (rank 0)"] = settings.published_bytes * (model.parameters + adapters) * settings.drift
    return {name: float(size) for name, size in parts.items() if size}


def rollout_memory(model: Model, activations: Activations, settings: Settings, *, lora: bool) -> dict[str, float]:
    """Bytes of one rollout actor's device, by part."""
    numbers = model.parameters + (model.adapters if lora else 0)
    tokens = settings.slots * settings.width
    bytes_each = settings.rollout_bytes + (HALF if settings.rollout_autocast else 0)
    per_layer = activations.kept / model.layers / settings.tokens
    parts = {
        "weights": bytes_each * numbers,
        "activations": per_layer * tokens,
        "cached keys and values": settings.rollout_bytes * model.cache_per_token * tokens if settings.cached else 0,
        "logits": PIECES * settings.logits,
    }
    return {name: float(size) for name, size in parts.items() if size}


def node_memory(model: Model, settings: Settings, *, lora: bool) -> dict[str, float]:
    """Bytes of the host's memory, by part: Ray's object store on the learner's node, the buffer, a checkpoint."""
    trained, base = (model.adapters, model.parameters) if lora else (model.parameters, 0)
    copied = settings.drift and settings.ranks > 1  # for rank 0's whole policy
    parts = {
        "broadcasts": (settings.keep_versions + 1) * settings.published_bytes * trained,
        "base": settings.published_bytes * base,
        "drift gauge": settings.published_bytes * (trained + base) if copied else 0,
        "replay": settings.replay,
        "checkpoint copy": (FULL + ADAM) * trained,
    }
    return {name: float(size) for name, size in parts.items() if size}


def learner_gpus(
    model: Model, activations: Activations, settings: Settings, *, lora: bool, checkpointing: bool, gpu: float
) -> int | None:
    """Fewest ranks whose share fits a GPU of so many bytes; None where activations alone do not."""
    ranks = 1
    while ranks <= MOST_GPUS:
        parts = learner_memory(model, activations, settings, lora=lora, checkpointing=checkpointing, ranks=ranks)
        if sum(parts.values()) <= (1 - RESERVE) * gpu:
            return ranks
        ranks += 1
    return None


def rollout_gpus(model: Model, activations: Activations, settings: Settings, *, lora: bool, gpu: float) -> int | None:
    """GPUs of all rollout actors, which share one as far as they fit it; None where one actor does not."""
    each = sum(rollout_memory(model, activations, settings, lora=lora).values())
    fitting = int((1 - RESERVE) * gpu // each)
    return math.ceil(settings.actors / fitting) if fitting else None


def measure(config: Config) -> tuple[Model, Activations]:
    """The model of a configuration, counted without weights.

    Raises:
        UserError: when there is no config.json, or transformers builds no model from it.
    """
    described = _described(config)
    with FakeTensorMode():
        model = _fake_model(described, config.model.attention)
        layers = len(checkpointing_layers(model))
        width = config.sampler.max_prompt_tokens + config.sampler.max_completion_tokens
        rows = max(1, config.learner.micro_batch_tokens // width)
        device = torch.device(config.model.device).type
        half = config.learner.autocast and (
            device == "cuda" or has_bfloat16(device)
        )  # of the run's device, not of ours
        kept, again = (_kept_bytes(model, rows, width, half, checkpointing) for checkpointing in (False, True))
        around = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
        ends = {id(p): p.numel() for part in around for p in part.parameters()}
        heads = described.num_attention_heads
        head_size = getattr(described, "head_dim", None) or described.hidden_size // heads
        lora = config.model.lora or LoraConfig()
        output = model.get_output_embeddings()
        head = 0 if output is None else sum(p.numel() for p in output.parameters())
        return Model(
            parameters=sum(p.numel() for p in model.parameters()),
            embeddings=sum(ends.values()),
            head=head,
            adapters=adapter_parameters(model, lora),
            layers=layers,
            vocabulary=described.vocab_size,
            cache_per_token=2 * layers * head_size * (getattr(described, "num_key_value_heads", None) or heads),
        ), Activations(kept=kept, recomputed=again + kept // layers, head=HALF * head if half else 0)


def adapter_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Parameters of an adapter. Raises UserError for targets that the model does not have."""
    layers = [model.get_submodule(name) for name in target_layers(model, lora.targets)]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers if isinstance(layer, nn.Linear))


def settings_of(config: Config, model: Model) -> Settings:
    """The numbers that the plan takes from a configuration."""
    rollout = config.rollout
    return Settings(
        ranks=config.learner.ranks,
        reference=config.learner.kl_beta > 0,
        inner_updates=config.learner.inner_updates,
        tokens=config.learner.micro_batch_tokens,
        slots=rollout.slots,
        width=config.sampler.max_prompt_tokens + config.sampler.max_completion_tokens,
        rollout_bytes=HALF if rollout.precision == "bfloat16" else FULL,
        rollout_autocast=rollout.precision == "autocast",
        published_bytes=HALF if rollout.precision == "bfloat16" else FULL,
        keep_versions=config.replay.keep_versions,
        replay=config.replay.memory_bytes,
        actors=rollout.actors,
        cached=config.sampler.cache != "none",
        drift=bool(config.evaluation.drift_every) and "entropy_bound" in config.sampler.rule,
        logits=row_bytes(config.learner.micro_batch_tokens, model.vocabulary, torch.device(config.model.device)),
    )


def _described(config: Config) -> PreTrainedConfig:
    if config.model.path is None:
        alphabet = build_task(config.task).alphabet
        return build_policy(config.model, config.sampler.threshold, alphabet=alphabet, seed=0).model.config
    folder = local_copy(config.model.path)
    try:
        return read_described(folder)[1]
    except UserError:
        raise
    except Exception as error:  # a config.json can be wrong in more ways than transformers has errors for
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"model {folder}: config.json cannot be read: {reason}; give the model's own") from error


def _fake_model(described: PreTrainedConfig, attention: str) -> PreTrainedModel:
    kind = AutoModelForCausalLM if type(described) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMaskedLM
    try:
        return kind.from_config(described, dtype=torch.float32, attn_implementation=attention).eval()
    except Exception as error:  # as above
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"no {described.model_type} model can be built from its config.json: {reason}") from error


def _kept_bytes(model: PreTrainedModel, rows: int, width: int, bfloat16: bool, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one forward pass, each storage once, the weights not."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.int64)
    positions = torch.arange(width).expand_as(ids)
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
        activation_checkpointing(model, enabled=checkpointing),
    ):
        output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    del output
    return sum(storage.nbytes() for storage in storages.values())
