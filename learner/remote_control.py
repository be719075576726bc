"""Remote control: another process reaches the controller of a run that is going, through what the run's folder says.

- `RUN/controller.json` names the Ray cluster and the namespace; the driver writes it.
- Ray's token is taken from where Ray keeps it, if `RAY_AUTH_MODE=token` was set before Ray was imported.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.errors import RunError, UserError, one_line
from learner.driver import CONTROLLER, CONTROLLER_FILE
from learner.ray_connection import LOOPBACK, connect
from learner.run_directory import RunDirectory


@contextmanager
def controller_of(run: str) -> Iterator[Any]:
    """The controller of a run, by the run's folder or its name below `runs/`.

    Raises:
        UserError: when there is no such run, or it is not going; errors of the controller as they are.
    """
    folder = RunDirectory.find(run).path
    try:
        where = json.loads((folder / CONTROLLER_FILE).read_text())
        address, namespace = where["ray_address"], where["namespace"]
        if not re.fullmatch(r"[^/\s]+:[0-9]+", address):
            raise ValueError(f"ray_address {address!r} is not HOST:PORT")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONTROLLER_FILE}: {one_line(error)}; a run that has started training has it"
        ) from error
    way_out = f"run {run} is not going any more, or its Ray wants another RAY_AUTH_MODE (token, unless you changed it)"
    connect(
        address,
        namespace=str(namespace),
        logging_level=logging.ERROR,
        way_out=way_out,
        loopback=address.startswith(f"{LOOPBACK}:"),
    )
    try:
        controller = ray.get_actor(CONTROLLER)
        found: Any = ray.get(controller.directory.remote())
        if Path(found) != folder:
            raise RuntimeError(f"another run of that name is going there, in {found}")
    except (RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        raise UserError(f"run {run} is not going: its Ray at {address} does not know it ({one_line(error)})") from error
    try:
        yield controller
    except RayTaskError as error:
        if isinstance(error.cause, UserError | RunError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise RunError(f"run {run} ended meanwhile: {one_line(error)}") from error
    finally:
        ray.shutdown()
