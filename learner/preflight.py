"""Preflight: everything a user can have got wrong, checked before anything expensive starts."""

import torch

from common.config import Config
from common.errors import UserError
from common.policy import open_tokenizer
from common.tasks import Task, build_task
from learner.demonstrations import Demonstrations, checked_ids

SAMPLED_PROMPTS = 64
CHECKED_ROWS = 10_000  # of a file of demonstrations; a bad one among more ends the warm start when it comes


def preflight(config: Config) -> Task:
    """Check device, task, data, model folder, special tokens and lengths.

    Raises:
        UserError: naming the value, the limit and the way out.
    """
    check_device(config.model.device)
    task = build_task(config.task)
    chosen = config.evaluation
    if chosen.split == "test" and task.test_size is not None and chosen.prompts > task.test_size:
        raise UserError(
            f"evaluation.prompts={chosen.prompts} exceeds the {task.test_size} rows of task.file; "
            f"set evaluation.prompts={task.test_size} or less"
        )
    check_texts(config, task)
    return task


def check_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    if name.partition(":")[0] in ("meta", "privateuseone"):
        raise UserError(f"model.device={name!r} computes nothing; use cpu, or cuda with a CUDA build")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0][:160]
        raise UserError(
            f"model.device={name!r} cannot be used here ({reason}); use cpu, or cuda with a CUDA build"
        ) from error


def check_texts(config: Config, task: Task) -> None:
    """Tokenise some prompts of every split, and demonstrations (a file's: all, or many), and check them."""
    tokenizer, positions = open_tokenizer(config, task)
    sampler, file = config.sampler, config.warm_start.file
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
            checked_ids(tokenizer, example.prompt, "prompt", sampler, f"{split} example {index}")
            if split == "train" and file is None:
                text = task.demonstration(example, index)
                checked_ids(tokenizer, text, "completion", sampler, f"demonstration {index}")
    longest = config.warm_start.max_tokens
    if longest is not None and longest > positions:
        raise UserError(
            f"warm_start.max_tokens={longest} exceeds the model's {positions} positions; give {positions} or less"
        )
    Demonstrations(config, task, tokenizer).check(CHECKED_ROWS)
