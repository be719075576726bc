"""Chaos parts: simulated parts whose weights say what they were trained on, and actors that note what was promised.

- The weights of `CountingTrainer` are how often it has trained on each group: what a checkpoint forgets, they forget.
- `AuditedActor` notes when a group was started and when the buffer acknowledged it, in RUN/audit, one file a process.
- `python -m learner.benchmarks.chaos_parts PARTS CONFIG [resume]` is a driver of such a run.

Nothing here loads torch, unless the policy's parts are asked for.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from actors.rollout_actor import RolloutActor
from common.config import Config
from common.errors import RunError, Stopped, UserError
from common.lease import FinishedGroup, LeaseReply, Sample, SubmitReply
from learner.benchmarks.event_model import Workload
from learner.benchmarks.simulated_producer import MakeSimulated, SimulatedProducer
from learner.parts import POLICY, Parts
from learner.trainer import BatchRefused, Report

COUNTS = "counts.npy"
AUDIT = "audit"
NUMBER_BYTES = 8
PAYLOAD_BYTES = 10_000
REFUSED = 30  # the batch that holds this group is set aside
FLAT_EVERY = 7  # every so-manieth group has no spread
GENERATION_SECONDS, CV = 0.5, 0.5
TRAIN_SECONDS = 0.1


class CountingTrainer:
    """A trainer that takes its time and counts."""

    def __init__(self, config: Config, warm_start: Path) -> None:
        self._counts = np.zeros(2 * config.learner.steps * config.learner.groups_per_step + 1000, np.float32)
        self._steps = 0

    @property
    def steps(self) -> int:
        return self._steps

    def warm_start(self, report: Report) -> None:
        """It starts from nothing."""

    def restore(self, folder: Path) -> None:
        saved = np.load(folder / COUNTS, allow_pickle=False)
        self._steps, self._counts = int(saved[0]), saved[1:].astype(np.float32)

    def train(self, payloads: Sequence[bytes], version: int) -> dict[str, float]:
        time.sleep(TRAIN_SECONDS)
        numbers = [int.from_bytes(payload[:NUMBER_BYTES], "little") for payload in payloads]
        if REFUSED in numbers:
            raise BatchRefused(f"group {REFUSED} is refused, to see its batch set aside")
        self._counts[numbers] += 1
        self._steps += 1
        return {}

    def recorded(self, sample: Sample) -> None:
        """Its completions are none to look at."""

    def weights(self) -> np.ndarray:
        return self._counts.copy()

    def base(self) -> list[np.ndarray]:
        return []

    def saved(self) -> Callable[[Path], None]:
        state = np.concatenate([[self._steps], self._counts])
        return lambda folder: np.save(folder / COUNTS, state, allow_pickle=False)

    def gauges(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing was started."""


class NumberedProducer(SimulatedProducer):
    """Its groups carry their number; some have no spread."""

    def step(self) -> list[Any]:
        return [replace(group, **_numbered(group)) for group in super().step() if isinstance(group, FinishedGroup)]


def _numbered(group: FinishedGroup) -> dict[str, Any]:
    payload = group.number.to_bytes(NUMBER_BYTES, "little") + group.payload[NUMBER_BYTES:]
    return {"payload": payload, "spread": 1.0 if has_spread(group.number) else 0.0}


def has_spread(number: int) -> bool:
    """Whether the learner gets this group."""
    return number % FLAT_EVERY != FLAT_EVERY - 1


class AuditedActor(RolloutActor):
    """A rollout actor that writes down, before it goes on, which groups it started and which were acknowledged."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        folder = Path(arguments["make"].args[0].run_directory) / AUDIT
        folder.mkdir(parents=True, exist_ok=True)
        self._audit = (folder / f"{self.name}-{os.getpid()}").open("a", buffering=1)

    def _leased(self, reply: LeaseReply) -> None:
        super()._leased(reply)
        self._note("started", [lease.number for lease in reply.leases if (lease.number, lease.attempt) in self._leases])

    def _submitted(self, keys: list[tuple[int, int]], reply: SubmitReply) -> None:
        self._note("acknowledged", reply.accepted)
        super()._submitted(keys, reply)

    def _note(self, what: str, numbers: list[int]) -> None:
        for number in numbers:
            self._audit.write(f"{what} {number} {time.monotonic()}\n")


def audit(run: Path) -> dict[str, dict[int, list[float]]]:
    """`started` and `acknowledged`: the times, in seconds of the machine's clock, of each group."""
    found: dict[str, dict[int, list[float]]] = {"started": defaultdict(list), "acknowledged": defaultdict(list)}
    for file in sorted((run / AUDIT).iterdir()):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a killed process may leave half a line
                what, number, seconds = line.split()
                found[what][int(number)].append(float(seconds))
    return found


def _producer(config: Config, name: str, wake: Callable[[], None]) -> NumberedProducer:
    workload = Workload(
        generation_seconds=GENERATION_SECONDS, cv=CV, train_seconds=0.0, steps=0, slots=config.rollout.slots
    )
    return NumberedProducer(MakeSimulated(workload=workload, slots=config.rollout.slots, payload_bytes=PAYLOAD_BYTES))


def _trainer(config: Config, warm_start: Path) -> CountingTrainer:
    return CountingTrainer(config, warm_start)


PARTS = {
    "simulated": Parts(producer=_producer, trainer=_trainer, actor=AuditedActor, evaluates=False),
    "policy": replace(POLICY, actor=AuditedActor, evaluates=False),
}


def _show(kind: str, values: dict[str, Any]) -> None:
    typer.echo(f"{kind} {values}")


def main() -> int:
    """Driver of one run; its exit code is that of `diffpo train`."""
    from common.config_file import load_config
    from learner.driver import train

    parts, file, *rest = sys.argv[1:]
    try:
        summary = train(load_config(file, []), _show, resume="resume" in rest, parts=PARTS[parts])
    except UserError as error:
        typer.echo(f"error: {error}")
        return 2
    except (RunError, Stopped) as error:
        typer.echo(f"run failed: {error}")
        return 1
    return 143 if "stopped" in summary else 0


if __name__ == "__main__":
    sys.exit(main())
