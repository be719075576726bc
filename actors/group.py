"""Group: the completions of one prompt, as they are asked for and as they are handed in.

Every rollout goes through these two functions, whoever drives the engine, so that a completion asked for twice is the
same twice.
"""

from typing import Any

import torch

from actors.request import Request
from common.config import Config
from common.cost import with_cost
from common.keyed_random import derive
from common.lease import FinishedGroup
from common.trajectory import Completion, encode_group


def rollout_threshold(config: Config) -> Any:
    """What the reveal rule gets in training: a draw of the threshold policy where it learns, else its initial value."""
    sampler = config.sampler
    if sampler.rule == "confidence":
        return sampler.confidence_threshold
    if sampler.rule == "top_k":
        return float(sampler.tokens_per_step)
    return "initial" if config.learner.train == "model" else "sample"


def group_requests(config: Config, prompt_ids: tuple[int, ...], *, cursor: int, number: int) -> list[Request]:
    """The requests of one group: one prompt, keyed seeds.

    Args:
        config: the run.
        prompt_ids: the encoded prompt.
        cursor: prompt cursor; with the run's seed it keys every draw.
        number: group number; requests of one number share their first forward.
    """
    return [
        Request(
            prompt_ids=prompt_ids,
            seed=derive(config.run.seed, cursor, index),
            group=number,
            temperature=config.sampler.temperature,
            threshold=rollout_threshold(config),
        )
        for index in range(config.learner.group_size)
    ]


def finished_group(
    config: Config,
    completions: list[Completion],
    scores: list[dict[str, float]],
    *,
    number: int,
    cursor: int,
    attempt: int,
    worker: str,
    model_digest: str,
) -> FinishedGroup:
    """A group with its rewards, encoded; `spread` is that of the rewards after their cost."""
    shared = {
        "group_id": cursor,
        "task": config.task.name,
        "reveal_rule": config.sampler.rule,
        "block_length": config.sampler.block_length or config.sampler.max_completion_tokens,
        "cache": config.sampler.cache,
        "attempt": attempt,
        "worker": worker,
        "model_digest": model_digest,
    }
    reward = torch.tensor([score["reward"] for score in scores])
    nfe = torch.tensor([c.nfe for c in completions])
    costed = with_cost(
        reward,
        nfe,
        length=config.sampler.max_completion_tokens,
        speed_weight=config.learner.speed_weight,
        form=config.learner.cost,
    )
    return FinishedGroup(
        number=number,
        attempt=attempt,
        payload=encode_group(completions, shared, scores),
        spread=float(costed.max() - costed.min()),
        oldest_version=min(c.oldest_version for c in completions),
        completions=len(completions),
        reward=float(reward.mean()),
        nfe=float(nfe.float().mean()),
    )
