"""Benchmark `report`: how long a report takes to make, how large it is, and how soon a browser shows it.

Setting: a run of 200 steps with 5,000 completions (quick: 50 and 1,000), drawn at random (`drawn_run`).

- `seconds`: `diffpo report RUN` as a process of its own, median of the repeats, start of Python included; `_spread` is
  half the distance between the quartiles. `python_seconds`: what `diffpo metrics`, which does next to nothing, takes.
- `bytes`: of the file.
- `first_paint_ms`, `_spread`: of Chromium, without a window, from the file on disk; left out where `chromium` or
  Python's `playwright` (in `diffpo[dev]`) is not installed.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from learner.benchmarks import Options
from learner.benchmarks.drawn_run import draw_run

REPEATS = 5
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def run(options: Options) -> dict[str, Any]:
    """Make and open the report, again and again."""
    steps, completions = (50, 1000) if options.quick else (200, 5000)
    folder = Path(tempfile.mkdtemp(prefix="diffpo-report-"))
    made = draw_run(folder, "drawn", steps=steps, per_step=completions // steps)
    repeats = 3 if options.quick else REPEATS
    result: dict[str, Any] = {"steps": steps, "completions": completions}
    result |= _times("seconds", [_seconds("report", str(made)) for _ in range(repeats)])
    result["python_seconds"] = float(np.median([_seconds("metrics") for _ in range(repeats)]))
    page = made / "report.html"
    result["bytes"] = page.stat().st_size
    paints = first_paints(page, repeats)
    result |= _times("first_paint_ms", paints) if paints else {}
    shutil.rmtree(folder)
    options.console.print(result)
    return result


def first_paints(page: Path, repeats: int) -> list[float]:
    """Milliseconds until something is seen; none where there is no browser."""
    browser = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return []
    if browser is None:
        return []
    found = []
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(repeats):
            tab = chromium.new_page()
            tab.goto(page.as_uri())
            while (painted := tab.evaluate(PAINTED)) is None:
                tab.wait_for_timeout(20)
            found.append(float(painted))
            tab.close()
        chromium.close()
    return found


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "learner", *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def _times(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {name: float(middle), f"{name}_spread": float(high - low) / 2}
