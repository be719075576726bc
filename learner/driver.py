"""Driver: the thin process a person starts. Joins or starts Ray, starts the controller, shows what it tells.

- Everything a user can have got wrong is checked before Ray starts.
- Ctrl-C and SIGTERM ask the controller to stop: the learner finishes its step and writes a checkpoint; a second
  signal ends at once.
- The exit code says how the run ended (`EXIT`); a run that did not train all its steps never exits with 0.
"""

import time
from collections.abc import Callable, Mapping
from shlex import quote
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.cluster_state import on_this_node
from actors.failure import DEATHS, cause_line
from common.config import Config
from common.errors import RunError, UserError, one_line
from common.place import FAILURES
from learner.controller import Controller
from learner.exporter import check_port
from learner.parts import POLICY, Parts
from learner.ray_connection import LOCAL, chosen_address, connect, dead_daemons
from learner.run_directory import RunDirectory
from learner.run_lock import LockLost
from learner.stop_signals import StopSignals
from learner.trackers import check_trackers

CONTROLLER = "controller"
ENDING_SECONDS = 30.0
MESSAGE_CHARACTERS = 2000
LAST_NEWS_SECONDS = 1.0
ALIVE_SECONDS = 2.0  # between two looks at the local Ray
CONTROLLER_FILE = "controller.json"  # in the run directory: where another process finds the controller


def train(
    config: Config, show: Callable[[str, dict[str, Any]], None], *, resume: bool = False, parts: Parts = POLICY
) -> dict[str, Any]:
    """Run the main job to its end.

    Args:
        config: the run.
        show: called with every event of the controller, in order.
        resume: go on with the run directory that is there (`learner.resumption`) in place of making one.
        parts: what the run is made of.

    Returns:
        The controller's summary; has `stopped` when a signal ended the run early.

    Raises:
        UserError: when something the user gave is wrong.
        RunError: when the run failed; the cause is the message.
    """
    if not resume:
        RunDirectory.check_free(config.run_directory)
        _check(config, parts)
        RunDirectory(config.run_directory).check_unused_checkpoints(config)
        return _run(config, None, show, parts)
    directory = RunDirectory(config.run_directory)
    with directory.lock():
        _check(config, parts)
        return _run(config, directory, show, parts)


def _check(config: Config, parts: Parts) -> None:
    check_port(config.metrics.host, config.metrics.port)
    check_trackers(config)
    RunDirectory(config.run_directory).checkpoint_store(config)  # refuses a URI that is not understood
    if parts is POLICY:
        from learner.preflight import preflight

        preflight(config, here=chosen_address(config.run.ray_address) == LOCAL)


def _run(
    config: Config, directory: RunDirectory | None, show: Callable[[str, dict[str, Any]], None], parts: Parts
) -> dict[str, Any]:
    """With the run's directory, made here once Ray is there and the name is free, if there is none."""
    _connect(config)
    try:
        _check_name_is_free(config.run.name, patience=ENDING_SECONDS if directory else 0.0)
        if directory is None:
            directory = RunDirectory.create(config)
            with directory.lock():
                return _follow_in(config, directory, show, parts)
        try:
            directory.place.remove(CONTROLLER_FILE)  # of the life before: nobody is to be sent there
            directory.write_config(config)
        except FAILURES as error:
            raise RunError(
                f"{error}; make room there, or mend its permissions, and repeat the command: nothing was changed"
            ) from error
        return _follow_in(config, directory, show, parts)
    finally:
        ray.shutdown()


def _follow_in(
    config: Config, directory: RunDirectory, show: Callable[[str, dict[str, Any]], None], parts: Parts
) -> dict[str, Any]:
    cluster = {"ray_address": ray.get_runtime_context().gcs_address, "namespace": config.run.name}
    try:
        directory.write_json(CONTROLLER_FILE, cluster)
        return _follow(config, directory, show, parts)
    except LockLost:  # there is nothing to go on with
        raise
    except RunError as error:
        raise RunError(
            f"{error} -- once its cause is gone, go on with: diffpo train --resume {quote(directory.name)}"
        ) from error


def _connect(config: Config) -> None:
    address = chosen_address(config.run.ray_address)
    way_out = "start it (`ray start --head`), correct run.ray_address, or leave it out for a local one"
    connect(address, namespace=config.run.name, way_out=way_out)
    if address == LOCAL:
        try:
            _check_room(config, ray.cluster_resources())
        except UserError:
            ray.shutdown()
            raise


def _check_room(config: Config, there: Mapping[str, float]) -> None:
    """Refuse what a Ray of this machine alone can never give."""
    rollout, learner = config.rollout, config.learner
    if labels := {**rollout.labels, **rollout.reward_labels, **learner.labels}:
        raise UserError(
            f"rollout.labels, rollout.reward_labels and learner.labels ask for nodes labelled {labels}, and a local "
            "Ray has none; leave them out, or give a cluster in run.ray_address"
        )
    rewards = rollout.reward_cpus or 0.0
    for kind, actor, rank in (("CPU", rollout.cpus + rewards, learner.cpus), ("GPU", rollout.gpus, learner.gpus)):
        wanted, available = rollout.actors * actor + learner.ranks * rank, there.get(kind, 0.0)
        if wanted > available:
            own = f"({rollout.cpus:g} + rollout.reward_cpus={rewards:g})" if kind == "CPU" and rewards else f"{actor:g}"
            raise UserError(
                f"rollout.actors={rollout.actors} x {own} {kind}s + learner {learner.ranks * rank:g} exceed this "
                f"machine's {available:g} {kind}s; lower rollout.actors, or rollout.{kind.lower()}s to share them"
            )


def _check_name_is_free(name: str, *, patience: float) -> None:
    """`patience`: seconds for the controller of a driver that has just died to end."""
    until = time.monotonic() + patience
    while True:
        try:
            ray.get_actor(CONTROLLER)
        except ValueError:
            return
        if time.monotonic() >= until:
            break
        time.sleep(0.5)
    raise _taken(name)


def _taken(name: str) -> UserError:
    return UserError(f"a run of the name {name} is going on this Ray cluster; choose another run.name")


def _follow(
    config: Config, directory: RunDirectory, show: Callable[[str, dict[str, Any]], None], parts: Parts
) -> dict[str, Any]:
    make = ray.remote(Controller).options(
        name=CONTROLLER, num_cpus=0, max_concurrency=100, scheduling_strategy=on_this_node()
    )
    try:
        controller: Any = make.remote(config=config, directory=directory.name, parts=parts)
    except ValueError as error:  # a driver that began at the same moment was faster
        raise _taken(config.run.name) from error
    result = controller.run.remote()

    def newest_step() -> int:
        return max((one.step for one in directory.checkpoint_store(config).checkpoints()), default=-1)

    with StopSignals(controller.stop.remote, newest_step, show) as signals:
        try:
            return _shown(controller, result, directory, signals, show)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError | RunError):  # ours, with the way out at its end
                raise RunError(" ".join(str(cause).split())[:MESSAGE_CHARACTERS]) from error
            named = "" if isinstance(cause, RayError) else f"{type(cause).__name__}: "
            raise RunError(named + cause_line(cause)) from error
        except DEATHS as error:
            raise RunError(f"the controller died: {one_line(error)}") from error


def _shown(
    controller: Any,
    result: Any,
    directory: RunDirectory,
    signals: StopSignals,
    show: Callable[[str, dict[str, Any]], None],
) -> dict[str, Any]:
    """The controller's result, once all events up to the summary have been shown."""
    seen = 0
    while True:
        directory.check_lock()
        news = controller.events.remote(seen)
        while not (ready := ray.wait([news, result], num_returns=1, timeout=ALIVE_SECONDS)[0]):
            directory.check_lock()
            if dead := dead_daemons():
                raise RunError(
                    f"the local Ray is gone ({', '.join(dead)}): killed, out of memory, or ended by a signal to "
                    "the whole process group; to stop a run, send signals to this process alone"
                )
        if news not in ready:  # what was told last may come after the result
            ready += ray.wait([news], num_returns=1, timeout=LAST_NEWS_SECONDS)[0]
        if news not in ready:
            return ray.get(result)
        for kind, values in ray.get(news):
            seen += 1
            signals.phase = values["phase"] if kind == "phase" else signals.phase
            show(kind, values)
            if kind == "summary":
                return ray.get(result)
