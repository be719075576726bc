"""Ray connection: joins a Ray that is there, or starts a local one; what goes wrong is one line.

- A local Ray listens on the loopback address alone. Ray binds to all addresses unless it thinks that this machine can
  have no cluster; it is told so.
- Ray asks for its token by default (`RAY_AUTH_MODE`); nothing here changes that.
"""

import logging
import os
import socket
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker

from common.errors import UserError, one_line

LOCAL = "local"
LOOPBACK = "127.0.0.1"
_USUAL = ray_constants.ENABLE_RAY_CLUSTER
PROBE_SECONDS = 5.0
LOCAL_TRIES = 2  # to start one: on a busy machine its parts may miss each other's deadlines


# it says at every start, to people who did nothing about it, that all is well
logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(
    lambda record: "authentication is enabled" not in record.getMessage()
)


def chosen_address(address: str | None = None) -> str:
    """The address given, else that of `RAY_ADDRESS`, else `local`: a Ray of this process alone."""
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def connect(
    address: str,
    *,
    way_out: str,
    namespace: str | None = None,
    logging_level: int = logging.WARNING,
    loopback: bool = False,
) -> None:
    """Connect this process to Ray.

    Args:
        address: from `chosen_address`.
        way_out: what to do where nothing answers at the address; ends the message.
        namespace: Ray namespace of named actors.
        logging_level: of Ray's own messages.
        loopback: whether the Ray at that address is the local one of another process.

    Raises:
        UserError: when Ray cannot be reached or started; nothing is left connected.
    """
    tries = LOCAL_TRIES if address == LOCAL else 1
    while True:
        tries -= 1
        try:
            probe(address)
            _bind(loopback=loopback or address == LOCAL)
            ray.init(
                address=address,
                namespace=namespace,
                logging_level=logging_level,
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=False if address == LOCAL else None,
            )
            return
        except Exception as error:  # a node that does not start in time is a bare Exception of Ray's
            ray.shutdown()
            if tries:
                continue
            if address == LOCAL:
                raise UserError(
                    f"a local Ray does not start ({one_line(error)}); try again when this machine has less to do and "
                    "more free memory, or start one (`ray start --head`) and give its address in RAY_ADDRESS"
                ) from error
            raise UserError(f"Ray at {address!r} cannot be reached ({one_line(error)}); {way_out}") from error


def _bind(*, loopback: bool) -> None:
    """Of this process and of those that Ray starts from it."""
    enabled = _USUAL and not loopback
    ray_constants.ENABLE_RAY_CLUSTER = enabled
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = str(int(enabled))


def probe(address: str) -> None:
    """Open a connection to `host:port`: Ray itself tries for minutes where nothing listens (measured)."""
    found = host_and_port(address)
    if found is not None:
        socket.create_connection(found, timeout=PROBE_SECONDS).close()


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of `host:port` or `ray://host:port`; None of anything else."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdecimal() else None


def dead_daemons() -> list[str]:
    """Which of those that a local Ray cannot do without have ended; Ray itself gives up after a minute."""
    node: Any = ray_worker._global_node
    vital = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    return sorted({kind for kind, _ in node.dead_processes() if kind in vital}) if node is not None else []
