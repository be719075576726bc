"""Benchmark `chaos`: what is lost, twice, late or wrong when parts of a run are killed.

Real are the driver, Ray, the controller, fleet, replay buffer, learner actor and checkpoints. In `kills`,
`throughput_under_kills` and `all_dead_*` generation and training only take their time, and the learner's "weights" are
how often it has trained on each group (`chaos_parts`), so what the final weights contain is read from them, and what
was acknowledged from files that the rollout actors write. The other figures come from the policy itself.

- `kills`: SIGKILLs of rollout actors, replay buffer, learner and driver, in an order drawn from a seed, at drawn
  intervals; a killed driver is resumed; two runs for each of `--seeds`. `groups_lost`: acknowledged groups with spread
  that the final weights do not contain (but for one batch of each run that is set aside on purpose); `groups_twice`:
  groups that they contain twice; `regenerated`: groups whose generation started after they had been acknowledged.
  `kills_by`: how many of each; `unfinished`: runs that did not come to their end.
- `throughput_under_kills`: acknowledged groups per second while one of 4 rollout actors is killed every 10 s, over the
  same without, windows of both in turn; generation is the bottleneck, so a place that is empty is missed.
- `recovery_s`: from the kill of a rollout actor of the tiny model to the first group that its replacement hands in,
  less the time that a fresh interpreter takes for the same imports right before, while the victim stands still; the
  median of several kills.
- `all_dead_exit_s`, `all_dead_exit_code`: from the death of the last rollout actor, all out of restarts, to the end of
  the driver; its exit code.
- `resume_max_diff`: largest difference of any parameter between an uninterrupted run at `max_staleness` 0 and one whose
  learner and then driver were killed, resumed.
- `checkpoint_cost`: seconds that the learner stood still for one checkpoint over the seconds of 10 learner steps; the
  model of the main job.
- `corruption_found`: share of damages to a checkpoint (each of its files truncated, with a byte flipped, missing; the
  manifest half-written; a full disk) that were named, with the previous checkpoint used; `corruption_cases`: how many.
"""

import atexit
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from common.checkpoint_manifest import MANIFEST
from common.checkpoint_store import CheckpointStore
from common.config_file import dump_config, load_config, parse_config
from common.errors import RunError, UserError
from learner.benchmarks import Options
from learner.benchmarks.chaos_parts import AUDIT, COUNTS, audit, has_spread
from learner.run_directory import RunDirectory

ACTOR, BUFFER, LEARNER, DRIVER = "rollout actor", "replay buffer", "learner", "driver"
TITLES = {ACTOR: "ray::AuditedActor", BUFFER: "ray::ReplayBuffer", LEARNER: "ray::LearnerActor"}
SHARES = {ACTOR: 0.5, BUFFER: 0.2, LEARNER: 0.2, DRIVER: 0.1}
SMALL_MODEL = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "attention": "eager"}
IMPORTS = "import actors.rollout_actor, actors.group_producer"
PATIENCE = 240.0  # seconds for anything that should take some


def run(options: Options) -> dict[str, Any]:
    """All measurements; each is printed as it comes."""
    if options.config is not None or options.overrides:
        raise UserError("bench chaos has its own configurations; leave --config and overrides out")
    folder = Path(tempfile.mkdtemp(prefix="diffpo-chaos-"))
    result: dict[str, Any] = {}
    with ThreadPoolExecutor() as pool:
        for together in ((_kills, _all_dead), (_throughput,), (_resume,), (_recovery,), (_checkpoints,)):
            started = time.monotonic()
            for found in pool.map(lambda measure: measure(folder, options), together):
                options.console.print(found, f"in {time.monotonic() - started:.0f} s")
                result |= found
    shutil.rmtree(folder)
    return result


class ChaosRun:
    """A driver in a process of its own, and what lives below it."""

    def __init__(self, folder: Path, name: str, parts: str, tree: dict[str, Any]) -> None:
        run = {"root": str(folder), "name": name} | tree.pop("run", {})
        self.config = parse_config({"task": {"name": "sudoku"}, "run": run} | tree)
        self.path = folder / name
        self.log = folder / f"{name}.log"
        self._parts = parts
        self._file = folder / f"{name}.yaml"
        self._file.write_text(dump_config(self.config))
        self.start()

    def start(self, *rest: str) -> None:
        command = [sys.executable, "-m", "learner.benchmarks.chaos_parts", self._parts, str(self._file), *rest]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        atexit.register(self.process.kill)

    def victims(self, kind: str) -> list[psutil.Process]:
        """Processes of a part, the youngest last."""
        if kind == DRIVER:
            return [psutil.Process(self.process.pid)]
        found = []
        for process in _descendants(self.process.pid):
            try:
                if process.name().startswith(TITLES[kind]):
                    found.append((process.create_time(), process.pid, process))
            except psutil.Error:
                continue
        return [process for *_, process in sorted(found)]

    def wait_for(self, what: str, reached: Any) -> Any:
        """The first true value of `reached`, asked again and again."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            value = reached()
            if value:
                return value
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RunError(
            f"chaos: {what} did not come in {PATIENCE:g} s, driver's exit code {self.process.poll()}; log:"
            f" {self.log.read_text()[-1500:]}"
        )

    def steps(self) -> int:
        """Learner steps reported since the last start of the driver."""
        return self.log.read_text().count("\nstep {")

    def end(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def simulated(steps: int, *, actors: int, slots: int, **rollout: Any) -> dict[str, Any]:
    return {
        "rollout": {"actors": actors, "slots": slots, "cpus": 0.1, "max_restarts": 1000} | rollout,
        "learner": {"steps": steps, "groups_per_step": 8, "group_size": 2, "cpus": 0.1, "max_restarts": 1000},
        "replay": {"max_restarts": 1000},
        "evaluation": {"drift_every": 0},
        "run": {"checkpoint_every": 10},
    }


def _kills(folder: Path, options: Options) -> dict[str, Any]:
    """Two runs at a time: mostly they wait."""
    wanted = 25 if options.quick else 50
    total: Counter[str] = Counter()
    by: Counter[str] = Counter()
    with ThreadPoolExecutor(2) as pool:
        for found, killed in pool.map(lambda seed: _killed_run(folder, seed, wanted), range(2 * options.seeds)):
            total.update(found)
            by.update(killed)
            options.console.print(f"{dict(by)}, {dict(total)}")
    return {**total, "kills_by": dict(by)}


def _killed_run(folder: Path, seed: int, wanted: int) -> tuple[dict[str, int], Counter[str]]:
    """What became of the groups of one run, and which parts were killed."""
    draw = random.Random(seed)
    by: Counter[str] = Counter()
    run = ChaosRun(folder, f"kills-{seed}", "simulated", simulated(7 * wanted, actors=3, slots=6))
    run.wait_for("the first step", run.steps)
    while by.total() < wanted and run.process.poll() is None:
        time.sleep(draw.uniform(0.2, 1.4))
        kind = draw.choices([*SHARES], [*SHARES.values()])[0]
        victims = run.victims(kind)
        if not victims:
            continue  # it is just being started again
        draw.choice(victims).kill()
        by[kind] += 1
        if kind == DRIVER:
            run.end()
            before = run.steps()
            run.start("resume")
            run.wait_for("a step after the resumption", lambda before=before: run.steps() > before)
    unfinished = int(run.end() != 0)
    return {"unfinished": unfinished, "kills": by.total()} | account(run), by


def account(run: ChaosRun) -> dict[str, int]:
    """What was promised against what the final weights contain."""
    promised = audit(run.path)
    store = CheckpointStore(run.path / "checkpoints")
    last = max(store.checkpoints(), key=lambda one: one.version)
    counts = np.load(run.path / "checkpoints" / last.name / COUNTS, allow_pickle=False)[1:]
    acknowledged = {number: min(times) for number, times in promised["acknowledged"].items()}
    set_aside = {n for file in run.path.glob("set_aside/*/why.json") for n in json.loads(file.read_text())["numbers"]}
    again = [
        number
        for number, times in promised["started"].items()
        if number in acknowledged and max(times) > acknowledged[number]
    ]
    return {
        "groups": len(acknowledged),
        "set_aside": len(set_aside),
        "groups_lost": sum(
            bool(has_spread(number) and counts[number] == 0) for number in acknowledged.keys() - set_aside
        ),
        "groups_twice": int((counts > 1).sum()),
        "regenerated": len(again),
        "trained": int(counts.sum()),
    }


def _throughput(folder: Path, options: Options) -> dict[str, Any]:
    windows, seconds, every = (2, 20.0, 10.0) if options.quick else (6, 30.0, 10.0)
    tree = simulated(100_000, actors=4, slots=4)
    tree["replay"]["max_staleness"] = 8  # else there are fewer tickets than places, and no actor is missed
    run = ChaosRun(folder, "throughput", "simulated", tree)
    run.wait_for("some steps", lambda: run.steps() > 10)
    rates: dict[bool, list[float]] = {False: [], True: []}
    victim = 0
    for window in range(2 * windows):
        killing = bool(window % 2)
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            if killing:
                alive = run.victims(ACTOR)
                alive[victim % len(alive)].kill()
                victim += 1
            time.sleep(every)
        ended = time.monotonic()
        times = [t for found in audit(run.path)["acknowledged"].values() for t in found]
        rates[killing].append(sum(started <= t < ended for t in times) / (ended - started))
    run.stop()
    ratios = [killed / plain for plain, killed in zip(rates[False], rates[True], strict=True)]
    return {
        "throughput_under_kills": sum(ratios) / len(ratios),
        "throughput_ratios": ratios,
        "groups_per_second": rates,
    }


def _all_dead(folder: Path, options: Options) -> dict[str, Any]:
    run = ChaosRun(folder, "dead", "simulated", simulated(100_000, actors=2, slots=6, max_restarts=1))
    run.wait_for("some steps", lambda: run.steps() > 2)
    killed: set[int] = set()
    last = time.monotonic()
    while len(killed) < 4:
        for process in run.victims(ACTOR):
            if process.pid not in killed:
                time.sleep(0.5)
                process.kill()
                killed.add(process.pid)
                last = time.monotonic()
        time.sleep(0.05)
    code = run.end()
    return {"all_dead_exit_s": time.monotonic() - last, "all_dead_exit_code": code}


def _tiny(steps: int, **replay: Any) -> dict[str, Any]:
    return {
        "task": {"name": "sudoku", "blanks_min": 4, "blanks_max": 6},
        "model": SMALL_MODEL,
        "warm_start": {"steps": 60},
        "sampler": {"max_prompt_tokens": 16, "max_completion_tokens": 16},
        "rollout": {"slots": 64, "precision": "autocast"},
        "replay": replay,
        "learner": {"steps": steps, "groups_per_step": 4, "group_size": 4},
        "evaluation": {"drift_every": 0},
        "run": {"checkpoint_every": 5},
    }


def _resume(folder: Path, options: Options) -> dict[str, Any]:
    whole = ChaosRun(folder, "whole", "policy", _tiny(24, max_staleness=0))
    killed = ChaosRun(folder, "killed", "policy", _tiny(24, max_staleness=0))
    for kind, step in ((LEARNER, 8), (DRIVER, 19)):
        killed.wait_for(f"step {step}", lambda step=step: killed.steps() >= step)
        for victim in killed.victims(kind):
            victim.kill()
    killed.end()
    killed.start("resume")
    code = killed.end()
    whole.end()
    names = ("model", "threshold")
    one, other = (
        {key: value for name in names for key, value in load_file(run.path / LAST / f"{name}.safetensors").items()}
        for run in (whole, killed)
    )
    found, cases = _corruption(killed.path / "checkpoints", folder)
    return {
        "resume_exit_code": code,
        "resume_max_diff": max(float(np.abs(one[key] - other[key]).max()) for key in one),
        "resume_regenerated": _regenerated(killed),
        "corruption_found": found / cases,
        "corruption_cases": cases,
    }


LAST = Path("checkpoints/step-000024")


def _regenerated(run: ChaosRun) -> int:
    promised = audit(run.path)
    return sum(max(promised["started"][number]) > min(times) for number, times in promised["acknowledged"].items())


def _corruption(checkpoints: Path, folder: Path) -> tuple[int, int]:
    """Damages found and tried: named, and the previous checkpoint used."""
    names = sorted(path.name for path in checkpoints.iterdir())
    newest, previous = names[-1], names[-2]
    files = [path.relative_to(checkpoints / newest) for path in (checkpoints / newest).rglob("*") if path.is_file()]
    found = cases = 0
    for file in files:
        for damage in (_truncate, _flip, Path.unlink):
            copy = folder / "damaged"
            shutil.copytree(checkpoints, copy)
            damage(copy / newest / file)
            sound = CheckpointStore(copy).newest_sound()
            named = sound is not None and any(newest in line and file.name in line for line in sound.warnings)
            half = file.name == MANIFEST and damage is Path.unlink  # then it is no checkpoint, and named as that
            named = named or (half and sound is not None and any(newest in line for line in sound.warnings))
            found += named and sound is not None and sound.checkpoint.name == previous
            cases += 1
            shutil.rmtree(copy)
    full = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(checkpoints), str(folder / "full")], capture_output=True, text=True
    )
    return found + (full.returncode == 0), cases + 1


FULL_DISK = """
import shutil, signal, sys
from learner.benchmarks.chaos import fills_the_disk
sys.exit(0 if fills_the_disk(*sys.argv[1:]) else 1)
"""


def fills_the_disk(checkpoints: str, copy: str) -> bool:
    """In a process of its own, whose files cannot grow beyond some bytes: the checkpoint fails by name, others stay."""
    shutil.copytree(checkpoints, copy)
    store = CheckpointStore(copy)
    before = store.newest_sound()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    draft = store.begin(999)
    try:
        for number in range(20):
            (draft.path / f"file-{number}").write_bytes(b"x" * 900)
        draft.commit(version=10**9, journal_index=0)  # its manifest is larger
    except RunError as error:
        named = "step-000999" in str(error)
    else:
        return False
    after = store.newest_sound()
    return named and before is not None and after is not None and after.checkpoint == before.checkpoint


def _truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _recovery(folder: Path, options: Options) -> dict[str, Any]:
    tree = _tiny(100_000)
    tree["rollout"]["max_restarts"] = 1000
    run = ChaosRun(folder, "recovery", "policy", tree)
    run.wait_for("some steps", lambda: run.steps() > 2)
    recoveries, imports = [], []
    for _ in range(3 if options.quick else 10):
        (victim,) = run.victims(ACTOR)
        victim.suspend()  # what is imported after its death has its share of the machine too
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        imports.append(time.monotonic() - started)
        known = set((run.path / AUDIT).iterdir())
        killed = time.monotonic()
        victim.kill()
        recoveries.append(run.wait_for("a group of the replacement", lambda k=known: _first_group(run, k)) - killed)
    run.stop()
    return {
        "recovery_s": median(r - i for r, i in zip(recoveries, imports, strict=True)),
        "recovery_with_imports_s": recoveries,
        "imports_s": imports,
    }


def _checkpoints(folder: Path, options: Options) -> dict[str, Any]:
    tree = load_config(Path("deploy/configs/sudoku.yaml"), []).model_dump(mode="json")
    tree["warm_start"]["steps"] = 20
    tree["learner"]["steps"] = 20 if options.quick else 60
    tree["evaluation"]["drift_every"] = 0
    tree["run"] = {"checkpoint_every": 5}
    run = ChaosRun(folder, "checkpoints", "policy", tree)
    run.end()
    rows = [row for row in RunDirectory(run.path).read_metrics() if row["kind"] == "step"]
    written = [row for row in rows[:-1] if row["learner_steps"] % 5 == 0]
    first = rows[0]["checkpoint_blocked_seconds"]  # of step 0, when nothing else goes on
    blocked = (written[-1]["checkpoint_blocked_seconds"] - first) / len(written)
    step = sum(row["learner_step_seconds"] for row in rows) / len(rows)
    return {"checkpoint_cost": blocked / (10 * step), "checkpoint_blocked_s": blocked, "learner_step_s": step}


def _first_group(run: ChaosRun, known: set[Path]) -> float | None:
    """When a process that was not there before had its first group acknowledged."""
    for file in set((run.path / AUDIT).iterdir()) - known:
        for line in file.read_text().splitlines(keepends=True):
            if line.startswith("acknowledged") and line.endswith("\n"):
                return float(line.split()[2])
    return None
