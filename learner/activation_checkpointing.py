"""Activation checkpointing: the layers of a model keep their inputs alone, and compute the rest again going backwards.

- By transformers' own checkpointing layers, so for every family; what a layer computes again is what it had computed.
- In force for one forward pass of training, never in rollout or evaluation, which share the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.errors import UserError


def checkpointing_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of a model that can be computed again.

    Raises:
        UserError: when there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"learner.activation_checkpointing=true, but {type(model).__name__} has no layers that transformers can "
            "compute again; set it to false and lower learner.micro_batch_tokens"
        )
    return layers


@contextmanager
def activation_checkpointing(model: PreTrainedModel, *, enabled: bool) -> Iterator[None]:
    """Forward passes inside keep the inputs of layers alone; the backward pass may come outside."""
    layers = checkpointing_layers(model) if enabled else []
    # transformers asks for training mode; what stands inside the layers stays as it is, dropout too
    before = [layer.training for layer in layers]
    for layer in layers:
        setattr(layer, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.gradient_checkpointing, layer.training = False, training
