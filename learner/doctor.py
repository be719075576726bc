"""Doctor: what of this machine and its packages a run needs, for bug reports (`diffpo doctor`).

Each check looks at one thing and says what it found; one that fails itself is a finding too, so that a broken package
does not hide the rest. Nothing is changed, and no secrets are read.
"""

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil

from common.errors import UserError, one_line, without_secrets
from common.location import is_uri
from common.release import release

GIGABYTE = 10**9
LEAST_DISK = 1 * GIGABYTE  # a tiny run, its checkpoints and Ray's logs
GOOD_DISK = 10 * GIGABYTE
FULL = 0.95  # of a disk: Ray spills no objects beyond it
GOOD_MEMORY = 2 * GIGABYTE
GOOD_SHARED = 1 * GIGABYTE
LEAST_FILES, GOOD_FILES = 256, 1024
OLDEST_PYTHON = (3, 11)
DASHBOARD, AGENT = 8265, 52365
LOOPBACK = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")


class State(StrEnum):
    """How a finding bears on a run."""

    OK = "ok"
    NOTE = "note"
    """Runs work, worse or not all of them."""
    MISSING = "missing"
    """No run works without it."""


@dataclass(frozen=True)
class Finding:
    """What one check found; where it is not ok, `advice` says what to do."""

    part: str
    name: str
    found: str
    state: State = State.OK
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(checks: Iterable[Check]) -> list[Finding]:
    """Everything that the checks find."""
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:
            name = getattr(check, "__name__", "check").replace("_", " ")
            said = f"{type(error).__name__}: {one_line(error)}"
            found.append(Finding("checks", name, said, State.MISSING, f"mend what {name} stumbled over, or report it"))
    return found


def checks(*, root: str | Path, starts_ray: bool = False) -> list[Check]:
    """All of them, in the order of a report; `root` is where runs are to lie, a folder or a URI."""

    def room() -> Iterable[Finding]:
        return disk(root)

    last: list[Check] = [start_of_ray] if starts_ray else []
    return [python, machine, packages, extras, torch_build, gpu, ray_cluster, ports, room, *last]


def python() -> Iterator[Finding]:
    """The interpreter, the system and DiFFPO itself."""
    enough = sys.version_info[:2] >= OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    yield Finding(
        "system",
        "Python",
        f"{platform.python_version()} ({sys.executable})",
        State.OK if enough else State.MISSING,
        "" if enough else f"make the virtual environment with Python {wanted} or newer",
    )
    yield Finding("system", "OS", platform.platform())
    yield Finding("system", "DiFFPO", f"{release()} ({Path(__file__).parents[1]})")


def machine() -> Iterator[Finding]:
    """CPUs, memory, open files."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("system", "CPUs", f"{usable} of {os.cpu_count()} usable, load {os.getloadavg()[0]:.1f}")
    memory = psutil.virtual_memory()
    yield _room("system", "memory", memory.available, memory.total, GOOD_MEMORY, "end other programs")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    state = State.MISSING if 0 <= soft < LEAST_FILES else State.NOTE if 0 <= soft < GOOD_FILES else State.OK
    advice = f"ulimit -n {GOOD_FILES} or more (the hard limit is {_limit(hard)})" if state is not State.OK else ""
    yield Finding("system", "open files", f"{_limit(soft)} of {_limit(hard)}", state, advice)


def packages() -> Iterator[Finding]:
    """What DiFFPO cannot do without, at versions that it can do with."""
    from packaging.requirements import Requirement

    for wanted in map(Requirement, requires("diffpo") or []):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        way_out = f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            have = version(wanted.name)
        except PackageNotFoundError:
            yield Finding("packages", wanted.name, "not installed", State.MISSING, way_out)
            continue
        if wanted.specifier.contains(have, prereleases=True):
            yield Finding("packages", wanted.name, have)
        else:
            said = f"{have}, and {wanted.specifier} is needed"
            yield Finding("packages", wanted.name, said, State.MISSING, way_out)


def extras() -> Iterator[Finding]:
    """What some options need."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("diffpo") or []]
    for extra in metadata("diffpo").get_all("Provides-Extra") or []:
        for one in wanted:
            if extra != "dev" and one.marker is not None and not one.marker.evaluate({"extra": ""}):
                if not one.marker.evaluate({"extra": extra}):
                    continue
                try:
                    found = version(one.name)
                except PackageNotFoundError:
                    found = f"not installed; pip install 'diffpo[{extra}]' where it is wanted"
                yield Finding("optional", f"{extra}: {one.name}", found)
    offline = os.environ.get("HF_HUB_OFFLINE", "not set")
    yield Finding("optional", "HF_HUB_OFFLINE", f"{offline} (DiFFPO sets 1 where nothing is set: no downloads)")


def torch_build() -> Iterator[Finding]:
    """What torch computes with on the CPU."""
    import torch

    from common.autocast import has_bfloat16

    yield Finding("torch", "build", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    yield Finding("torch", "threads", f"{torch.get_num_threads()} (a run sets its own: rollout.threads, ...)")
    fast = "yes" if has_bfloat16("cpu") else "no: autocast stays float32 here"
    yield Finding("torch", "bfloat16 on the CPU", fast)


def gpu() -> Iterator[Finding]:
    """GPUs that torch can use, and those that it cannot."""
    import torch

    if torch.cuda.is_available():
        from common.autocast import has_bfloat16

        for index in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(index)
            half = "bfloat16" if has_bfloat16("cuda") else "no bfloat16"
            yield Finding("GPU", f"cuda:{index}", f"{known.name}, {known.total_memory / GIGABYTE:.1f} GB, {half}")
    elif Path("/dev/nvidia0").exists():
        why = "torch is built without CUDA" if torch.version.cuda is None else "its driver does not work with torch's"
        way_out = f"install a torch for it (https://pytorch.org; this is {torch.__version__}), or leave it unused"
        yield Finding("GPU", "NVIDIA", f"there is one, and {why}", State.NOTE, way_out)
    else:
        yield Finding("GPU", "CUDA", "none; runs use the CPU")


def ray_cluster() -> Iterator[Finding]:
    """Which Ray runs would use, and whether it answers."""
    from learner.ray_connection import LOCAL, chosen_address, host_and_port, probe

    address = chosen_address()
    if address in (LOCAL, "auto"):
        yield Finding("Ray", "address", "a local one for each run" if address == LOCAL else address)
    else:
        shown = without_secrets(address)
        try:
            if host_and_port(address) is None:
                raise OSError("no host:port")
            probe(address)
            yield Finding("Ray", "address", f"{shown} answers (RAY_ADDRESS)")
        except OSError as error:
            way_out = "start it (`ray start --head`), correct RAY_ADDRESS, or unset it for a local one"
            yield Finding("Ray", "address", f"{shown}: {one_line(error)}", State.MISSING, way_out)
    yield Finding("Ray", "RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "not set (Ray's default)"))


def start_of_ray() -> Iterator[Finding]:
    """A Ray that is really joined, or started and ended."""
    import ray

    from learner.ray_connection import chosen_address, connect

    began = time.monotonic()
    try:
        connect(chosen_address(), way_out="mend RAY_ADDRESS, or unset it")
    except UserError as error:
        said, _, way_out = str(error).partition("; ")
        yield Finding("Ray", "start", one_line(UserError(said)), State.MISSING, way_out)
        return
    took = time.monotonic() - began
    try:
        there = ray.cluster_resources()
        has = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"
        yield Finding("Ray", "start", f"came up in {took:.1f} s with {has}")
    finally:
        ray.shutdown()


def ports() -> Iterator[Finding]:
    """Whether a run can listen."""
    for port, name in ((DASHBOARD, "Ray's dashboard"), (AGENT, "its agent, which jobs need")):
        with socket.socket() as asked:
            asked.settimeout(1.0)
            taken = asked.connect_ex((LOOPBACK, port)) == 0
        said = "in use, by a Ray or another program" if taken else "free"
        yield Finding("ports", f"{port} ({name})", said)
    try:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
        yield Finding("ports", "metrics", f"{LOOPBACK} has free ones")
    except OSError as error:
        way_out = "set metrics.port=-1, or let this user open ports on loopback (Ray needs some too)"
        yield Finding("ports", "metrics", f"{LOOPBACK} has none ({error.strerror})", State.MISSING, way_out)


def disk(root: str | Path) -> Iterator[Finding]:
    """Room for runs, for Ray's files and for its objects."""
    path = Path(root).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))  # Path.exists may raise
    if is_uri(str(root)):
        yield Finding("disk", f"runs ({without_secrets(str(root))})", "an object store, which is not looked at here")
    elif os.access(there, os.W_OK | os.X_OK):
        yield _disk(f"runs ({there})", there, "choose another run.root")
    else:
        yield Finding("disk", f"runs ({there})", "cannot be written to", State.MISSING, "choose another run.root")
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield _disk(f"Ray's files ({temporary})", temporary, "set RAY_TMPDIR to a folder on another disk")
    if SHARED_MEMORY.exists():
        free = shutil.disk_usage(SHARED_MEMORY)
        way_out = "give the container more (docker run --shm-size=8g); Ray's objects go to disk instead, which is slow"
        yield _room("disk", str(SHARED_MEMORY), free.free, free.total, GOOD_SHARED, way_out)
    else:
        yield Finding("disk", str(SHARED_MEMORY), "none; Ray keeps objects in its files")


def _disk(name: str, folder: Path, other: str) -> Finding:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding("disk", name, error.strerror or one_line(error), State.MISSING, other)
    if usage.free < LEAST_DISK:
        said = f"{usage.free / GIGABYTE:.1f} of {usage.total / GIGABYTE:.1f} GB free"
        return Finding("disk", name, said, State.MISSING, f"make {LEAST_DISK / GIGABYTE:g} GB free, or {other}")
    enough = GOOD_DISK if usage.used < FULL * usage.total else usage.total
    return _room("disk", name, usage.free, usage.total, enough, f"make room, or {other}")


def _room(part: str, name: str, free: int, total: int, enough: int, way_out: str) -> Finding:
    said = f"{free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
    return Finding(part, name, said) if free >= enough else Finding(part, name, said, State.NOTE, way_out)


def _limit(count: int) -> str:
    return "unlimited" if count in (resource.RLIM_INFINITY, -1) else str(count)
