"""Replay display: what `diffpo replay` prints of a `GroupReplay`."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from learner.replay_verdict import GroupReplay

TOKENS_SHOWN = 60
LINES_SHOWN = 10
TEXT_SHOWN = 20


def show(source: dict[str, Any], replay: GroupReplay, console: Console) -> None:
    """Where things come from, tables and verdict; `source` as `replay_saved` returns it."""
    version = "unknown" if source["weights_version"] is None else source["weights_version"]
    drew = ", ".join(f"{count} of version {drawn}" for drawn, count in source["token_versions"].items())
    also = f" (also in {', '.join(source['also'])})" if source["also"] else ""
    console.print(f"group: attempt {source['attempt']}, {source['place']}{also}")
    console.print(f"weights: version {version}, {source['weights']} ({source['why']}); tokens: {drew}")
    table = Table(box=box.SIMPLE, title="completions (advantage, weight, objective: inner update 0, this group alone)")
    for name in ("", "text", "NFE", "sets", "reward", "again", "max |Δ ln p|", "advantage", "weight", "objective"):
        table.add_column(name, justify="left" if name == "text" else "right", no_wrap=True)
    for one in replay.completions:
        same = f"{sum(one.steps.values())}/{len(one.steps)}" if one.steps else "-"
        cells = (one.reward.recorded, one.reward.recomputed, one.max_difference, one.advantage)
        cells += (one.mean_weight, one.objective)
        text = one.text if len(one.text) <= TEXT_SHOWN else one.text[: TEXT_SHOWN - 1] + "…"
        formatted = [_number(value, "+" if place in (3, 5) else "") for place, value in enumerate(cells)]
        table.add_row(str(one.index), ascii(text)[1:-1], str(one.nfe), same, *formatted)
    console.print(table)
    differing = replay.differing
    if differing:
        table = Table(box=box.SIMPLE, title=f"tokens that differ by more than {replay.tolerance:g}, or are not finite")
        names = ("completion", "position", "step", "token", "version", "ln p", "again", "Δ", "entropy Δ", "set Δ", "")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for token in differing[:TOKENS_SHOWN]:
            pairs = (token.entropy, token.set_logprob)
            table.add_row(
                *map(str, (token.completion, token.position, token.step)),
                f"{token.token} {token.text!a}",
                str(token.version),
                *map(_number, (token.logprob.recorded, token.logprob.recomputed)),
                _number(token.logprob.difference, "+"),
                *("-" if pair is None else _number(pair.difference, "+") for pair in pairs),
                "" if token.comparable else "other weights",
            )
        console.print(table)
        if len(differing) > TOKENS_SHOWN:
            console.print(f"... and {len(differing) - TOKENS_SHOWN} more tokens; --json has all")
    for line in replay.wrong:
        console.print(f"differs: {line}")
    for line in replay.expected[:LINES_SHOWN]:
        console.print(f"differs, as expected: {line}")
    if len(replay.expected) > LINES_SHOWN:
        console.print(f"... and {len(replay.expected) - LINES_SHOWN} more that are expected; --json has all")
    for line in replay.notes:
        console.print(f"note: {line}")
    console.print("means: " + "  ".join(f"{name} {value:.5g}" for name, value in replay.means.items()))
    console.print(replay.verdict)


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.1e}" if 0 < abs(value) < 1e-4 else f"{value:{sign}.4f}"
