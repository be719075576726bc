"""Remote control: another process reaches the controller of a run that is going.

- `RUN/controller.json` names the Ray cluster and the namespace; the driver writes it. Inside a Ray job it is the job's
  cluster, and the run's name is enough.
- Ray's token is taken from where Ray keeps it, if `RAY_AUTH_MODE=token` was set before Ray was imported.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from common.config import IN_RAY_JOB
from common.errors import RunError, UserError, one_line
from learner.driver import CONTROLLER, CONTROLLER_FILE
from learner.ray_connection import LOOPBACK, connect, probe
from learner.run_directory import RunDirectory

ANSWER_SECONDS = 30.0


class NotGoing(UserError):
    """The run is there, and no process works on it."""


class RunEnded(RunError):
    """The run ended while it was asked."""


@contextmanager
def controller_of(run: str) -> Iterator[Callable[..., Any]]:
    """A function that calls a method of a run's controller, by name and arguments, for up to `seconds`.

    Args:
        run: the run's folder or its name below `runs/`; in a Ray job, a run of its cluster by either.

    Raises:
        UserError: when there is no such run, or what the controller says was wrong.
        NotGoing: when it is not going.
        RunEnded: when it ends meanwhile.
    """
    in_job = IN_RAY_JOB in os.environ
    name = Path(run).name
    if in_job:
        where = f"the cluster of this job has no run {name} that is going"
        connect(os.environ.get("RAY_ADDRESS", "auto"), namespace=name, logging_level=logging.ERROR, way_out=where)
        folder = None
    else:
        folder = RunDirectory.find(run).path
        where = _connect_to(folder, run)
    try:
        controller = _controller(folder, where)
        yield lambda method, *arguments, seconds=ANSWER_SECONDS: ray.get(
            getattr(controller, method).remote(*arguments), timeout=seconds
        )
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from error
        raise
    except GetTimeoutError as error:
        raise RunError(f"the controller of run {name} does not answer in time; look at its log") from error
    except RayActorError as error:
        raise RunEnded(f"run {name} ended meanwhile: {one_line(error)}") from error
    finally:
        ray.shutdown()


def _connect_to(folder: Path, run: str) -> str:
    """Connect to the Ray of a run's folder; what to say where it is not going."""
    if not (folder / CONTROLLER_FILE).is_file():
        raise NotGoing(f"run {run} is not going: {folder / CONTROLLER_FILE} is not there; one that trains has it")
    try:
        where = json.loads((folder / CONTROLLER_FILE).read_text())
        address, namespace = where["ray_address"], where["namespace"]
        if not re.fullmatch(r"[^/\s]+:[0-9]+", address):
            raise ValueError(f"ray_address {address!r} is not HOST:PORT")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONTROLLER_FILE}: {one_line(error)}; a run that has started training has it"
        ) from error
    try:
        probe(address)
    except OSError as error:
        raise NotGoing(f"run {run} is not going any more: nothing listens at {address}, where its Ray was") from error
    connect(
        address,
        namespace=str(namespace),
        logging_level=logging.ERROR,
        way_out="it may want another token (RAY_AUTH_TOKEN, ~/.ray/auth_token), or be another run's by now",
        loopback=address.startswith(f"{LOOPBACK}:"),
    )
    return f"run {run} is not going: its Ray at {address} does not know it"


def _controller(folder: Path | None, where: str) -> Any:
    try:
        controller = ray.get_actor(CONTROLLER)
        found: Any = ray.get(controller.directory.remote(), timeout=ANSWER_SECONDS)
        if folder is not None and Path(found) != folder:
            raise RuntimeError(f"another run of that name is going there, in {found}")
    except (RuntimeError, ValueError, OSError) as error:
        raise NotGoing(f"{where} ({one_line(error)})") from error
    return controller
