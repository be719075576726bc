"""Replay verdict: what a replayed group shows, number beside number, and whether it agrees with its record."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compared:
    """One number, as it was recorded and as it is under the weights."""

    recorded: float
    recomputed: float

    @property
    def difference(self) -> float:
        return self.recomputed - self.recorded

    def beyond(self, tolerance: float) -> bool:
        """Whether they differ by more, or one of them is no number."""
        return not abs(self.difference) <= tolerance


@dataclass(frozen=True)
class TokenReplay:
    """One drawn token; nats."""

    completion: int
    position: int
    step: int
    """Reveal step, 1-based."""
    token: int
    text: str
    version: int
    comparable: bool
    """Whether record and weights must agree."""
    logprob: Compared
    entropy: Compared
    set_logprob: Compared | None
    """Of the set that was revealed in its step; None under rules that draw none."""
    scored: bool
    """Whether the loss is about it."""
    surrogate: float | None
    """Log-prob under the surrogate of inner update 0; this and the rest None where not scored, or no model learns."""
    weight: float | None
    ratio: float | None
    objective: float | None

    @property
    def pairs(self) -> list[Compared]:
        return [pair for pair in (self.logprob, self.entropy, self.set_logprob) if pair is not None]

    @property
    def finite(self) -> bool:
        values = [pair.difference for pair in self.pairs]
        values += [value for value in (self.surrogate, self.weight, self.ratio, self.objective) if value is not None]
        return all(map(math.isfinite, values))

    def agrees(self, tolerance: float) -> bool:
        return self.finite and not any(pair.beyond(tolerance) for pair in self.pairs)


@dataclass(frozen=True)
class CompletionReplay:
    """One completion of the group."""

    index: int
    text: str
    nfe: int
    gamma: float
    comparable: bool
    """Whether threshold log-prob and weights must agree."""
    gamma_logprob: Compared
    reward: Compared
    steps: dict[int, bool]
    """By reveal step, whether the rule chooses the recorded set under the weights; empty where that is not checked."""
    max_difference: float
    """Largest of its log-probs; NaN if one is no number."""
    advantage: float
    mean_weight: float | None
    objective: float | None
    """Mean over its scored tokens."""
    gamma_weight: float | None
    gamma_objective: float | None


@dataclass(frozen=True)
class GroupReplay:
    """What a replay found."""

    tolerance: float
    completions: list[CompletionReplay]
    tokens: list[TokenReplay]
    """All drawn ones, by completion, step and position."""
    means: dict[str, float]
    """Of the loss terms over the group."""
    notes: list[str]
    """What limits the comparison."""
    wrong: list[str] = field(default_factory=list)
    """What should agree and does not, besides tokens."""
    expected: list[str] = field(default_factory=list)
    """What differs, as it may under other weights, besides tokens."""

    @property
    def differing(self) -> list[TokenReplay]:
        return [token for token in self.tokens if not token.agrees(self.tolerance)]

    @property
    def agrees(self) -> bool:
        """Whether everything that must agree does."""
        return not self.wrong and not any(token.comparable or not token.finite for token in self.differing)

    @property
    def verdict(self) -> str:
        """One line."""
        comparable = sum(token.comparable for token in self.tokens)
        bad = [token for token in self.differing if token.comparable or not token.finite]
        parts = []
        if bad:
            first = bad[0]
            parts.append(
                f"{len(bad)} of {len(self.tokens)} tokens, first at completion {first.completion}, position "
                f"{first.position} (step {first.step})"
            )
        parts += self.wrong[:3] + ([f"{len(self.wrong) - 3} more"] if len(self.wrong) > 3 else [])
        if parts:
            return f"differs: {'; '.join(parts)}"
        others = len(self.tokens) - comparable
        if not others and not self.expected:
            return f"agrees within {self.tolerance:g}: {comparable} tokens"
        agreed = (
            f"agrees within {self.tolerance:g} on the {comparable} tokens" if comparable else "not comparable: none"
        )
        return (
            f"{agreed} that these weights must agree on; {len(self.differing)} of the other {others} differ, as is "
            "expected of other weights or a cache"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become strings."""
        tokens = [asdict(token) | {"differs": not token.agrees(self.tolerance)} for token in self.tokens]
        found = asdict(self) | {"tokens": tokens, "agrees": self.agrees, "verdict": self.verdict}
        return _plain(found)


def _plain(value: Any) -> Any:
    """The same tree with strings for what JSON has no numbers for."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
