"""Plan display: the memory plan as tables."""

from rich.console import Console
from rich.table import Table

from learner.memory_plan import (
    RESERVE,
    Activations,
    Model,
    Settings,
    learner_gpus,
    learner_memory,
    node_memory,
    rollout_gpus,
    rollout_memory,
)

MODES = {
    "full": (False, False),
    "full, checkpointing": (False, True),
    "LoRA": (True, False),
    "LoRA, checkpointing": (True, True),
}
"""Whether with LoRA, and whether with activation checkpointing."""


def show(model: Model, activations: Activations, settings: Settings, *, gpu: float, console: Console) -> None:
    """All roles by mode, in GB, and the GPUs of `gpu` bytes that learner and rollout take."""
    console.print(
        f"{model.parameters / 1e9:.3g} billion parameters, {model.embeddings / 1e9:.3g} of them embeddings; "
        f"micro-batches of {settings.tokens} tokens, {settings.slots} rows of {settings.width} tokens in rollout, "
        f"{settings.ranks} learner ranks, {settings.actors} rollout actors; GB = 10^9 bytes, estimates"
    )
    learner = {
        name: learner_memory(model, activations, settings, lora=lora, checkpointing=checkpointing, ranks=settings.ranks)
        for name, (lora, checkpointing) in MODES.items()
    }
    rollout = {name: rollout_memory(model, activations, settings, lora=lora) for name, (lora, _) in MODES.items()}
    node = {name: node_memory(model, settings, lora=lora) for name, (lora, _) in MODES.items()}
    for title, parts in (("learner rank", learner), ("rollout actor", rollout), ("learner's node (host)", node)):
        console.print(_table(title, parts))
    table = Table("GPUs", *MODES)
    ranks = [
        learner_gpus(model, activations, settings, lora=lora, checkpointing=checkpointing, gpu=gpu)
        for lora, checkpointing in MODES.values()
    ]
    actors = [rollout_gpus(model, activations, settings, lora=lora, gpu=gpu) for lora, _ in MODES.values()]
    table.add_row("learner, at least", *(_count(count) for count in ranks))
    table.add_row("rollout", *(_count(count) for count in actors))
    table.add_row("together", *(_count(_sum(a, b)) for a, b in zip(ranks, actors, strict=True)))
    console.print(table)
    console.print(
        f"With model.device=cuda, on GPUs of {gpu / 1e9:g} GB of which {RESERVE:.0%} stay free; none: what ranks do "
        "not share is too much: lower learner.micro_batch_tokens (learner) or rollout.slots (rollout)"
    )


def _table(title: str, parts: dict[str, dict[str, float]]) -> Table:
    table = Table(title, *parts)
    names = list(dict.fromkeys(name for mode in parts.values() for name in mode))
    for name in names:
        table.add_row(name, *(_gigabytes(mode.get(name, 0.0)) for mode in parts.values()))
    table.add_section()
    table.add_row("together", *(_gigabytes(sum(mode.values())) for mode in parts.values()))
    return table


def _gigabytes(size: float) -> str:
    return "-" if size == 0 else f"{size / 1e9:.3g}"


def _count(count: int | None) -> str:
    return "none" if count is None else str(count)


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second
