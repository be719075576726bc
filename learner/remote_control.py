"""Remote control: another process reaches the controller of a run that is going.

- `RUN/controller.json` names the Ray cluster and the namespace; the driver writes it. Inside a Ray job it is the job's
  cluster, and the run's name is enough.
- Ray's token is taken from where Ray keeps it, if `RAY_AUTH_MODE=token` was set before Ray was imported.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.failure import DEATHS
from common.config import IN_RAY_JOB
from common.errors import RunError, UserError, one_line
from common.location import above, below
from common.place import FAILURES, Place
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
    name = above(run)[1]
    if in_job:
        where = f"the cluster of this job has no run {name} that is going"
        connect(os.environ.get("RAY_ADDRESS", "auto"), namespace=name, logging_level=logging.ERROR, way_out=where)
        directory = None
    else:
        directory = RunDirectory.find(run)
        where = _connect_to(directory, run)
    try:
        controller = _controller(directory, where)
        yield lambda method, *arguments, seconds=ANSWER_SECONDS: ray.get(
            getattr(controller, method).remote(*arguments), timeout=seconds
        )
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from error
        raise
    except GetTimeoutError as error:
        raise RunError(f"the controller of run {name} does not answer in time; look at its log") from error
    except DEATHS as error:
        raise RunEnded(f"run {name} ended meanwhile: {one_line(error)}") from error
    finally:
        ray.shutdown()


def _connect_to(directory: RunDirectory, run: str) -> str:
    """Connect to the Ray that a run's directory names; what to say where it is not going."""
    file = below(directory.name, CONTROLLER_FILE)
    try:
        where = directory.read_json(CONTROLLER_FILE)
        address, namespace = where["ray_address"], where["namespace"]
        if not re.fullmatch(r"[^/\s]+:[0-9]+", address):
            raise ValueError(f"ray_address {address!r} is not HOST:PORT")
    except FileNotFoundError as error:
        raise NotGoing(
            f"run {run} is not going: {file} is not there; one that is starting gets it in a few seconds"
        ) from error
    except (*FAILURES, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: {one_line(error)}; a run that has started training has it") from error
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


def _controller(directory: RunDirectory | None, where: str) -> Any:
    try:
        controller = ray.get_actor(CONTROLLER)
        found: Any = ray.get(controller.directory.remote(), timeout=ANSWER_SECONDS)
        if directory is not None and Place(found).path != directory.place.path:
            raise RuntimeError(f"another run of that name is going there, in {found}")
    except (RuntimeError, ValueError, OSError) as error:
        raise NotGoing(f"{where} ({one_line(error)})") from error
    return controller
