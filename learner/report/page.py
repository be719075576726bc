"""Page: one HTML file with all that it needs inside: style, script, plots, data.

Everything that a run wrote is untrusted. Jinja escapes it; what the script gets is JSON in which no tag can end; the
script sets texts, never HTML; and the page forbids every other script, and fetching anything.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from common.release import release
from learner.report.arms import Arm, Estimate, arms, differences
from learner.report.completions import shown_groups, slowest, standouts
from learner.report.curves import curves, frontier_figure
from learner.report.figure import Figure
from learner.report.run_data import RunData

TEMPLATES = Path(__file__).parent / "templates"
MOST_FAILURES = 20
LEARNED = "learned, greedy"
COLUMNS = ("reward", "NFE", "accuracy before", "accuracy after", "NFE before", "NFE after", "frontier gain")


def report_page(runs: Sequence[RunData]) -> str:
    """The report of some runs; those of one name are numbered by their position."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs, 1):
        run.label = run.name if names.count(run.name) == 1 else f"{run.name} ({number})"
    found = arms(runs)
    completions, groups = [], []
    for run in runs:
        best, worst = standouts(run)
        wanted = [one.row["group"] for one in (*best, *worst)]
        views = shown_groups(run, wanted) if len(runs) == 1 or len(runs) <= 4 else []
        why = {one.row["group"]: one.why for one in (*worst, *best)}
        groups += [view | {"why": " · ".join(filter(None, (_of(run, runs), why.get(view["group"]))))} for view in views]
        if best:
            shown = {view["group"]: at for at, view in enumerate(views, len(groups) - len(views))}
            completions.append(
                {
                    "name": run.label,
                    "count": f"{len(run.record):,}",
                    "standouts": [*best, *worst],
                    "slowest": slowest(run),
                    "shown": shown,
                }
            )
    failures = [_failures(run) for run in runs if run.quarantined or run.set_aside]
    frontier, lines = frontier_figure(runs), curves(found)
    parts = {
        "comparison": ("Comparison", len(runs) > 1),
        "frontier": ("Frontier", frontier is not None),
        "curves": ("Curves", bool(lines)),
        "reveal": ("Reveal viewer", bool(groups)),
        "completions-1": ("Best and worst", bool(completions)),
        "failures": ("Failures", bool(failures)),
        "configuration": ("Configuration", True),
    }
    return _rendered(
        "report.html.j2",
        groups,
        title=f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        notes=[note if len(runs) == 1 else f"{run.label}: {note}" for run in runs for note in run.notes],
        parts=[(anchor, name) for anchor, (name, there) in parts.items() if there],
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        comparison={"columns": COLUMNS, "rows": [_compared(arm) for arm in found]} if len(runs) > 1 else None,
        frontier=_safe(frontier) if frontier is not None else None,
        evaluations=[_settings(run) for run in runs if run.evaluation is not None],
        curves=[_safe(figure) for figure in lines],
        completions=completions,
        failures=failures,
        differences=differences(runs) if len(runs) > 1 else [],
        configs=[yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs],
    )


def view_page(group: dict[str, Any]) -> str:
    """The viewer alone, with one group."""
    return _rendered("view.html.j2", [group], title=f"Group {group['group']} of run {group['run']}")


def _rendered(template: str, groups: list[dict[str, Any]], **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (TEMPLATES / "viewer.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        version=release(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup((TEMPLATES / "style.css").read_text()),
        script=Markup(script),
        script_hash=digest,
        groups=_embedded(groups) if groups else None,
        **values,
    )


def _embedded(value: Any) -> Markup:
    """JSON for a script element: no character of it can end one, or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _safe(figure: Figure) -> dict[str, Any]:
    """For the template: matplotlib has escaped the texts inside of the SVG, `alt` those of its own."""
    return {"title": figure.title, "about": figure.about, "svg": Markup(figure.svg), "alt": Markup(figure.alt)}


def _of(run: RunData, runs: Sequence[RunData]) -> str:
    return run.label if len(runs) > 1 else ""


def _tiles(run: RunData) -> list[dict[str, str]]:
    found = []
    before, after = run.setting("before", LEARNED), run.setting("after", LEARNED)
    if before is not None and after is not None:
        for name, key, form in (("accuracy", "accuracy", "{:.3f}"), ("forward passes", "nfe", "{:.2f}")):
            told = f"learned threshold, greedy; was {form.format(before[key])}"
            found.append({"name": name, "value": form.format(after[key]), "more": told})
    if run.evaluation is not None and "frontier_gain" in run.evaluation:
        gain = run.evaluation["frontier_gain"]
        told = f"accuracy over NFE {run.evaluation['nfe_range'][0]:g} to {run.evaluation['nfe_range'][1]:g}; 95 % over "
        told += f"prompts: {gain['low']:+.3f} to {gain['high']:+.3f}"
        found.append({"name": "frontier gain", "value": f"{gain['gain']:+.3f}", "more": told})
    for name, key, more in (
        ("reward", "rollout_generated_reward", "generated, over the last tenth of the steps"),
        ("NFE", "rollout_generated_nfe", "generated, over the last tenth of the steps"),
        ("effective sample size", "learner_weight_ess", "share, over the last tenth of the steps"),
    ):
        if (value := run.ending(key)) is not None:
            found.append({"name": name, "value": f"{value:.3g}", "more": more})
    if run.seconds:
        found.append({"name": "time", "value": f"{run.seconds / 60:.1f} min", "more": "warm start and training"})
    return found


def _compared(arm: Arm) -> dict[str, Any]:
    def gain(run: RunData) -> float | None:
        return (run.evaluation or {}).get("frontier_gain", {}).get("gain")

    def learned(policy: str, key: str) -> Any:
        return lambda run: (run.setting(policy, LEARNED) or {}).get(key)

    def said(one: Estimate | None) -> str:
        if one is None:
            return "-"
        return f"{one}" if one.count == arm.seeds else f"{one} ({one.count} of {arm.seeds})"

    estimates = [
        arm.estimate(lambda run: run.ending("rollout_generated_reward")),
        arm.estimate(lambda run: run.ending("rollout_generated_nfe")),
        *(arm.estimate(learned(policy, "accuracy")) for policy in ("before", "after")),
        *(arm.estimate(learned(policy, "nfe")) for policy in ("before", "after")),
        arm.estimate(gain),
    ]
    return {"label": arm.label, "seeds": arm.seeds, "values": [said(one) for one in estimates]}


def _settings(run: RunData) -> dict[str, Any]:
    pairs = zip(run.settings("before"), run.settings("after"), strict=False)
    rows = [
        {"setting": a["setting"], "values": [f"{one[key]:.3f}" for one in (a, b) for key in ("accuracy", "nfe")]}
        for a, b in pairs
    ]
    return {"name": run.label, "rows": rows}


def _failures(run: RunData) -> dict[str, Any]:
    return {
        "name": run.label,
        "quarantined": run.quarantined[:MOST_FAILURES],
        "set_aside": run.set_aside[:MOST_FAILURES],
        "more": max(0, len(run.quarantined) - MOST_FAILURES),
    }
