"""Group replay: a saved group's log-probs, rewards and loss terms under given weights, held against its record.

- Exact: each drawn token is scored on the latent of its own step, as rollout drew it (`rollout.precision`, the policy's
  calibration), NFE passes. Entropies, threshold log-probs and, under `entropy_bound`, the revealed sets likewise.
- These must agree for tokens of the version that the weights have, if no cache was in use; the threshold is of the
  version of step 1. For all others differences are expected, and shown.
- Rewards, the prompt, and that nothing is NaN or infinite do not depend on the weights: they must always agree.
- Loss terms are `Learner.terms`: inner update 0 on this group alone, in the learner's precision.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from actors.group import rollout_threshold
from actors.reveal_rules import REVEAL_RULES
from actors.reward_pool import score_apart
from common.autocast import autocast
from common.config import Config
from common.errors import RunError, UserError, one_line
from common.policy import Policy
from common.policy_loading import load_policy
from common.tasks import Task, build_task
from common.trajectory import NOT_DRAWN, SCHEMA, decode_group
from learner.batch import Batch, build_batch
from learner.learner import Learner, Terms
from learner.objective import token_mean
from learner.preflight import check_device
from learner.replay_verdict import Compared, CompletionReplay, GroupReplay, TokenReplay
from learner.run_directory import RunDirectory
from learner.saved_group import choose_weights, find_group
from learner.surrogate import mean_field, surrogate_log_probs, with_decision

PER_POSITION = [field.name for field in SCHEMA if pa.types.is_list(field.type) and field.name != "prompt_ids"]


def replay_saved(
    run: RunDirectory, config: Config, number: int, given: str | None, tolerance: float
) -> tuple[dict[str, Any], GroupReplay]:
    """Find a group of a run and weights for it, and replay it.

    Args:
        run: the run.
        config: what it was started with.
        number: of the group.
        given: folder of the weights; None chooses (`learner.saved_group.choose_weights`).
        tolerance: see `replay_group`.

    Returns:
        What was found where (plain values), and the replay.

    Raises:
        UserError: when group or weights cannot be found or loaded.
        RunError: when the group's payload is damaged, or nothing can be computed.
    """
    saved = find_group(run, number)
    table = decode_group(saved.group.payload)
    weights = choose_weights(run, saved, table, given)
    try:
        check_device(config.model.device)
        model = config.model
    except UserError:  # the run had a GPU and this machine has none
        model = config.model.model_copy(update={"device": "cpu"})
    policy = load_policy(weights.folder.name, model, config.sampler.threshold)
    reference = None
    if config.learner.kl_beta > 0 and model.lora is None:  # else it is the weights' own base
        reference = load_policy(run.warm_start.name, model, config.sampler.threshold)
    task = build_task(config.task)
    found = replay_group(policy, config, task, table, version=weights.version, tolerance=tolerance, reference=reference)
    versions = Counter(token.version for token in found.tokens)
    source = {
        "attempt": saved.group.attempt,
        "place": str(saved.place),
        "also": [str(place) for place in saved.also],
        "weights": str(weights.folder),
        "weights_version": weights.version,
        "why": weights.why,
        "token_versions": {str(version): count for version, count in sorted(versions.items())},
    }
    return source, found


def replay_group(
    policy: Policy,
    config: Config,
    task: Task,
    table: pa.Table,
    *,
    version: int | None,
    tolerance: float,
    reference: Policy | None = None,
) -> GroupReplay:
    """Recompute a group and compare.

    Args:
        policy: the weights; becomes the replay's own: its precision may change.
        config: of the run that drew the group.
        task: that run's.
        table: the group, under `common.trajectory.SCHEMA`.
        version: of the weights; None is unknown, then nothing that depends on weights must agree.
        tolerance: largest difference that counts as none, in nats, and in units of the reward.
        reference: of the KL term (`learner.kl_beta`); None takes the policy, and the term is 0.

    Raises:
        RunError: when ids or reveal steps are such that nothing can be computed.
    """
    width = config.sampler.max_prompt_tokens if config.deterministic else None
    _check(table, policy, width)
    batch = build_batch([table], policy.vocabulary, width=width, device=policy.device)
    learner = Learner(policy, config.learner)
    if learner.reference is not None and reference is not None:
        learner.reference = reference.requires_grad_(False)
    terms = learner.terms(batch)
    exact = _recompute(policy.for_rollout(config.rollout), config, table, batch, tolerance)
    return _compare(policy, config, task, table, batch, terms, exact, version=version, tolerance=tolerance)


def _check(table: pa.Table, policy: Policy, width: int | None) -> None:
    """Refuse what would break a forward pass, or loop for ever."""
    size = policy.model.config.vocab_size
    rows = table.to_pylist()
    if not rows or not 0 < len(rows[0]["prompt_ids"]) <= (width or policy.max_positions):
        raise RunError(f"a group of {len(rows)} completions has no prompt that these weights take; it is damaged")
    for row in rows:
        index, length = row["completion_index"], len(rows[0]["completion_ids"])
        short = [name for name in PER_POSITION if len(row[name]) != length]
        if short or row["prompt_ids"] != rows[0]["prompt_ids"]:
            raise RunError(
                f"completion {index} has another {short[0] if short else 'prompt_ids'} than the group's first one "
                f"({length} positions); the group is damaged"
            )
        wrong = [token for token in row["prompt_ids"] + row["completion_ids"] if not 0 <= token < size]
        if wrong:
            raise RunError(
                f"completion {index} has token id {wrong[0]}, these weights know 0 to {size - 1}; give weights "
                "of its run"
            )
        drawn = [step for step, v in zip(row["reveal_step"], row["token_version"], strict=True) if v != NOT_DRAWN]
        odd = [step for step in drawn if not 1 <= step <= length]
        if odd or not drawn:
            found = f"reveal step {odd[0]}" if odd else "no drawn token"
            raise RunError(f"completion {index} has {found}; it must have drawn tokens, in steps 1 to {length}")


@dataclass(frozen=True)
class _Exact:
    """What the weights say of `N` completions on their true latents; float64, nats, NaN where nothing was drawn."""

    logprob: Tensor
    """`[N, L]`."""
    entropy: Tensor
    """`[N, L]`, at reveal."""
    set_logprob: Tensor
    """`[N, L]`, of the set revealed with each token."""
    gamma_logprob: Tensor
    """`[N]`."""
    steps: list[dict[int, bool]]
    """As in `CompletionReplay`."""


@torch.no_grad()
def _recompute(policy: Policy, config: Config, table: pa.Table, batch: Batch, tolerance: float) -> _Exact:
    """A forward pass for each reveal step, on all completions that had it."""
    drawn = batch.token_version != NOT_DRAWN
    last = batch.reveal_step.masked_fill(~drawn, 0).amax(-1)
    logprob = torch.full(drawn.shape, torch.nan, dtype=torch.float64, device=drawn.device)
    entropy, set_logprob = logprob.clone(), logprob.clone()
    gamma_logprob = torch.zeros_like(batch.gamma_logprob)
    steps: list[dict[int, bool]] = [{} for _ in range(len(drawn))]
    for step in range(1, int(last.max()) + 1):
        rows = (last >= step).nonzero().squeeze(-1)
        part = batch.select(rows)
        now = drawn[rows] & (part.reveal_step == step)
        part = replace(part, scored=now)
        taus = torch.full_like(part.nfe, step - 1).unsqueeze(-1)
        latents = with_decision(part, mean_field(part, taus), taus)
        with autocast(policy.device, enabled=config.rollout.precision == "autocast"):
            found = surrogate_log_probs(policy, part, latents, features=step == 1)
        if found.entropy is None or latents.decided is None or found.reveal_logprob is None:
            raise RuntimeError("a decision was asked for and not scored")
        if found.features is not None and rollout_threshold(config) == "sample":
            gamma_logprob = policy.head.log_prob(found.features[part.group], part.gamma)
        for recomputed, values in (
            (logprob, found.logprob),
            (entropy, found.entropy),
            (set_logprob, found.reveal_logprob.unsqueeze(-1).expand_as(found.entropy)),
        ):
            recomputed[rows] = torch.where(now, values.double(), recomputed[rows])
        if table["reveal_rule"][0].as_py() == "entropy_bound":
            gamma = part.gamma * policy.calibration.gamma_scale
            same = same_sets(found.entropy, latents.decided.any(1), now, gamma, tolerance)
            for row, agrees in zip(rows.tolist(), same.tolist(), strict=True):
                steps[row][step] = agrees
    return _Exact(logprob, entropy, set_logprob, gamma_logprob, steps)


def same_sets(entropy: Tensor, active: Tensor, revealed: Tensor, gamma: Tensor, tolerance: float) -> Tensor:
    """Whether the entropy bound reveals these sets, for entropies that are off by at most the tolerance each.

    Within it the rule gets the entropies and the budget that suit the recorded set best.

    Args:
        entropy: `[N, L]`, nats.
        active: `[N, L]` bool, the positions that the rule chose from.
        revealed: `[N, L]` bool, what it chose.
        gamma: `[N]`, nats.
        tolerance: nats.

    Returns:
        `[N]` bool.
    """
    rule = REVEAL_RULES["entropy_bound"]
    tilted = torch.where(revealed, entropy - tolerance, entropy + tolerance)
    worst = tilted.masked_fill(~revealed, -torch.inf).amax(-1)
    in_order = worst <= tilted.masked_fill(revealed | ~active, torch.inf).amin(-1)
    slack = 2 * tolerance * revealed.sum(-1)  # of the sum over the revealed set, which was lowered already
    least = rule(tilted, tilted, active, gamma - slack)  # none at a budget below 0
    most = rule(tilted, tilted, active, gamma)
    return in_order & ((~least | revealed) & (~revealed | most)).all(-1) & revealed.any(-1)


def _compare(
    policy: Policy,
    config: Config,
    task: Task,
    table: pa.Table,
    batch: Batch,
    terms: Terms,
    exact: _Exact,
    *,
    version: int | None,
    tolerance: float,
) -> GroupReplay:
    cached = table["cache"][0].as_py() != "none"
    drawn = batch.token_version != NOT_DRAWN
    comparable = drawn & (batch.token_version == version) & (not cached) if version is not None else drawn & False
    completions, tokens = [], []
    wrong, expected = [], []
    scores = _rewards(policy, config, task, table, wrong)
    for n, row in enumerate(table.to_pylist()):
        own = _tokens(policy, batch, terms, exact, comparable, n)
        tokens += own
        begun = comparable[n][drawn[n] & (batch.reveal_step[n] == 1)]
        worst = torch.tensor([abs(token.logprob.difference) for token in own])
        completion = CompletionReplay(
            index=row["completion_index"],
            text=policy.decode(row["completion_ids"]),
            nfe=row["nfe"],
            gamma=row["gamma"],
            comparable=bool(len(begun)) and bool(begun.all()),
            gamma_logprob=Compared(row["gamma_logprob"], float(exact.gamma_logprob[n])),
            reward=Compared(row["reward"], scores[n].get("reward", math.nan)),
            steps=exact.steps[n],
            max_difference=float(worst.max()),  # torch's maximum of anything with NaN is NaN
            advantage=float(terms.advantage[n]),
            mean_weight=_mean(terms.weight, batch.scored, n),
            objective=_mean(terms.objective, batch.scored, n),
            gamma_weight=None if terms.gamma_weight is None else float(terms.gamma_weight[n]),
            gamma_objective=None if terms.gamma_objective is None else float(terms.gamma_objective[n]),
        )
        completions.append(completion)
        _judge(completion, own, dict(row["rewards"]), scores[n], tolerance, wrong, expected)
    return GroupReplay(
        tolerance, completions, tokens, _means(config, batch, terms), _notes(config, table), wrong, expected
    )


def _rewards(policy: Policy, config: Config, task: Task, table: pa.Table, wrong: list[str]) -> list[dict[str, float]]:
    """The task's scores of the completions, empty where they cannot be had; and whether the prompt is the task's."""
    cursor, prompt = table["group_id"][0].as_py(), table["prompt_ids"][0].as_py()
    try:
        example = task.example("train", cursor)
        if policy.encode_prompt(example.prompt) != prompt:
            wrong.append(f"the prompt is not the task's at cursor {cursor}")
        texts = [policy.decode(ids) for ids in table["completion_ids"].to_pylist()]
        return [found.rewards for found in score_apart(task, example, texts, config.rollout)]
    except Exception as error:  # rewards are programs of a task's maker
        wrong.append(f"rewards cannot be recomputed: {type(error).__name__}: {one_line(error)}")
        return [{} for _ in range(len(table))]


def _tokens(policy: Policy, batch: Batch, terms: Terms, exact: _Exact, comparable: Tensor, n: int) -> list[TokenReplay]:
    """The drawn tokens of completion `n` in the order of their reveal."""

    def term(values: Tensor | None, at: int) -> float | None:
        return None if values is None or not batch.scored[n, at] else float(values[n, at])

    model = terms.objective is not None
    ratio = (terms.logprob - terms.proximal).exp()
    found = []
    for at in (batch.token_version[n] != NOT_DRAWN).nonzero().flatten().tolist():
        token = int(batch.completion_ids[n, at])
        found.append(
            TokenReplay(
                completion=n,
                position=at,
                step=int(batch.reveal_step[n, at]),
                token=token,
                text=str(policy.tokenizer.decode([token])),
                version=int(batch.token_version[n, at]),
                comparable=bool(comparable[n, at]),
                logprob=Compared(float(batch.behaviour_logprob[n, at]), float(exact.logprob[n, at])),
                entropy=Compared(float(batch.entropy[n, at]), float(exact.entropy[n, at])),
                set_logprob=Compared(float(batch.reveal_logprob[n, at]), float(exact.set_logprob[n, at]))
                if batch.draws_sets
                else None,
                scored=bool(batch.scored[n, at]),
                surrogate=term(terms.logprob, at) if model else None,
                weight=term(terms.weight, at),
                ratio=term(ratio, at) if model else None,
                objective=term(terms.objective, at),
            )
        )
    return sorted(found, key=lambda token: (token.step, token.position))


def _judge(
    completion: CompletionReplay,
    tokens: list[TokenReplay],
    recorded: dict[str, float],
    scores: dict[str, float],
    tolerance: float,
    wrong: list[str],
    expected: list[str],
) -> None:
    """Add what differs in one completion, besides tokens, to what is wrong or to what was to be expected."""
    name = f"completion {completion.index}"
    pairs = {"reward": completion.reward} | {
        f"reward {part}": Compared(value, scores.get(part, math.nan)) for part, value in recorded.items()
    }
    for what, pair in pairs.items():
        if not math.isfinite(pair.recorded) or (scores and pair.beyond(tolerance)):
            wrong.append(f"{name}: {what} recorded {pair.recorded:.6g}, recomputed {pair.recomputed:.6g}")
    threshold = completion.gamma_logprob
    if threshold.beyond(tolerance):
        finite = math.isfinite(threshold.difference)
        found = f"{name}: log-prob of gamma recorded {threshold.recorded:.6g}, recomputed {threshold.recomputed:.6g}"
        (wrong if completion.comparable or not finite else expected).append(found)
    for step, same in completion.steps.items():
        if not same:
            own = [token for token in tokens if token.step == step]
            found = f"{name}, step {step}: revealed {[token.position for token in own]}, the rule chooses otherwise"
            (wrong if all(token.comparable for token in own) else expected).append(found)
    last = max(token.step for token in tokens)
    if completion.nfe != last:
        wrong.append(f"{name}: NFE recorded {completion.nfe}, last reveal step {last}")
    terms = ("gamma", "advantage", "mean_weight", "objective", "gamma_weight", "gamma_objective")
    broken = [term for term in terms if not math.isfinite(getattr(completion, term) or 0.0)]
    if broken:
        wrong.append(f"{name}: {', '.join(broken)} not finite")


def _mean(values: Tensor | None, scored: Tensor, n: int) -> float | None:
    """Mean over the scored tokens of one completion."""
    if values is None:
        return None
    return float(token_mean(values[n : n + 1], scored[n : n + 1], kind="completion", completions=1.0, tokens=1.0))


def _means(config: Config, batch: Batch, terms: Terms) -> dict[str, float]:
    count = float(len(batch.nfe))
    totals = {"completions": count, "tokens": float(batch.scored.sum())}
    found = {}
    if terms.objective is not None and terms.weight is not None:
        found["model_objective"] = float(
            token_mean(terms.objective, batch.scored, kind=config.learner.loss_mean, **totals)
        )
        found["weight"] = float(token_mean(terms.weight, batch.scored, kind="token", **totals))
    if terms.kl is not None:
        found["kl"] = float(token_mean(terms.kl, batch.scored, kind="token", **totals))
    if terms.gamma_objective is not None and terms.gamma_weight is not None:
        found["threshold_objective"] = float(terms.gamma_objective.sum()) / count
        found["threshold_weight"] = float(terms.gamma_weight.mean())
    return found


def _notes(config: Config, table: pa.Table) -> list[str]:
    notes = []
    cache, rule = table["cache"][0].as_py(), table["reveal_rule"][0].as_py()
    if cache != "none":
        notes.append(f"sampler.cache={cache}: what is recorded is of cached passes, what is recomputed is exact")
    if rule != "entropy_bound":
        notes.append(f"sampler.rule={rule}: which sets were revealed is not checked")
    if config.rollout.precision != "float32":
        notes.append(
            f"rollout.precision={config.rollout.precision}: on another kind of processor products round otherwise; "
            "raise --tolerance then"
        )
    if config.learner.importance_weight == "self_normalised":
        notes.append("self-normalised weights: their mean is this group's, not that of the batch it was or will be in")
    return notes
