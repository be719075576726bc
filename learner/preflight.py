"""Preflight: everything a user can have got wrong, checked before anything expensive starts."""

from typing import Any

from common.config import Config
from common.errors import UserError
from common.tasks import Task, build_task
from learner.exporter import check_port

SAMPLED_PROMPTS = 64


def preflight(config: Config) -> Task:
    """Check task, data, model folder, special tokens, prompt lengths and metrics port.

    Raises:
        UserError: naming the value, the limit and the way out.
    """
    check_port(config.metrics.host, config.metrics.port)
    task = build_task(config.task)
    chosen = config.evaluation
    if chosen.split == "test" and task.test_size is not None and chosen.prompts > task.test_size:
        raise UserError(
            f"evaluation.prompts={chosen.prompts} exceeds the {task.test_size} rows of task.file; "
            f"set evaluation.prompts={task.test_size} or less"
        )
    if config.warm_start.file is not None:
        from learner.warm_start import read_demonstrations

        read_demonstrations(config.warm_start.file)
    check_lengths(config, task)
    return task


def check_lengths(config: Config, task: Task) -> None:
    """Tokenise some prompts of every split, and demonstrations, and hold them against the limits."""
    from common.policy import open_tokenizer  # imports transformers

    tokenizer, positions = open_tokenizer(config, task)
    sampler = config.sampler
    total = sampler.max_prompt_tokens + sampler.max_completion_tokens
    if total > positions:
        raise UserError(
            f"sampler.max_prompt_tokens + sampler.max_completion_tokens = {total} exceeds the model's {positions} "
            "positions; shorten one of them"
        )
    for split in ("train", "validation", "test"):
        size = task.test_size if split == "test" and task.test_size is not None else SAMPLED_PROMPTS
        for index in range(min(size, SAMPLED_PROMPTS)):
            example = task.example(split, index)
            _check(tokenizer, example.prompt, "prompt", sampler.max_prompt_tokens, f"{split} {index}")
            if split == "train" and config.warm_start.file is None:
                text = task.demonstration(example, index)
                _check(tokenizer, text, "completion", sampler.max_completion_tokens, f"demonstration {index}")


def _check(tokenizer: Any, text: str, kind: str, limit: int, where: str) -> None:
    length = len(tokenizer.encode(text, add_special_tokens=False))
    if length > limit:
        raise UserError(
            f"{where}: {kind} of {length} tokens exceeds sampler.max_{kind}_tokens={limit}; raise the limit "
            f"or use shorter {kind}s"
        )
