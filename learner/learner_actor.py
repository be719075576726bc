"""LearnerActor: the learner's loop as a Ray actor.

    warm_start()  ->  run(buffer): first publication, then {sample, train, publish, report} until done or closed

- It waits for nobody but the buffer; generation goes on while it learns.
- It starts from the newest sound checkpoint of its run, if there is one: the buffer takes back what was trained since,
  and a new lineage of versions begins. Else it writes the checkpoint of step 0 before anything is generated.
- A batch that cannot be trained on is set aside with the weights it met, and its step is done with another batch; too
  many in a row end the run.
- A closed buffer ends the loop after the step in hand; the last checkpoint is always written.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.failure import cause_line
from common.checkpoint_manifest import Checkpoint
from common.checkpoint_store import Found
from common.config import Config
from common.config_file import dump_config
from common.errors import RunError, cause
from common.lease import FinishedGroup, Sample
from common.ledger import LedgerError
from common.place import FAILURES
from common.segment_folder import SegmentFolder
from learner.buffer_link import BufferLink
from learner.checkpoint_writer import CheckpointWriter
from learner.run_directory import RUN_CONFIG, WHY, RunDirectory
from learner.run_record import RunRecord
from learner.trainer import BatchRefused, Trainer

log = logging.getLogger(__name__)

MOST_SET_ASIDE = 20  # batches that are kept with the weights that they met

MakeTrainer = Callable[[Config, Path], Trainer]


class LearnerActor:
    """Started by the controller, again when it dies; its trainer holds the weights, its run directory the rest."""

    def __init__(self, *, config: Config, directory: str, controller: Any, make: MakeTrainer) -> None:
        self.config = config
        self._directory = RunDirectory(directory)
        self._controller = controller
        self._checkpoints = self._directory.checkpoint_store(config)
        self._start = self._directory.warm_start_here()
        self._trainer = make(config, self._start)
        warn = self._controller.warn.remote
        self._record = RunRecord(self._directory.place, groups=config.run.record_groups, warn=warn)
        self._skipped = self._skipped_in_row = 0
        self._blocked = 0.0
        self._doing, self._since = "starts", time.monotonic()

    def lead(self, others: list[Any]) -> None:
        """Called by the controller where there are several ranks: the others' actors obey this one from now on."""
        ranked: Any = self._trainer
        ranked.lead(others)

    def doing(self) -> str:
        """Called by the watchdog, from another thread."""
        return f"{self._doing} for {time.monotonic() - self._since:.0f} s"

    def warm_start(self) -> None:
        """Make or load the weights that training starts from."""
        self._note("makes or loads the weights that training starts from")
        self._trainer.warm_start(self._report)
        self._directory.keep_warm_start(self._start)

    def run(self, buffer: Any) -> dict[str, float]:
        """The training loop; returns steps and version reached."""
        try:
            return self._run(buffer)
        finally:
            self._trainer.close()

    def _run(self, buffer: Any) -> dict[str, float]:
        config, trainer = self.config, self._trainer
        link = BufferLink(buffer)
        writer = CheckpointWriter(self._checkpoints, keep=config.run.keep_checkpoints)
        version = self._begin(link, writer)
        while trainer.steps < config.learner.steps:
            self._note("waits for a batch from the buffer")
            sampled = link.sample()
            self._note("trains")
            if not sampled.numbers:
                log.warning("buffer closed after %d of %d steps", trainer.steps, config.learner.steps)
                break
            started = time.monotonic()
            try:
                metrics = trainer.train(sampled.payloads, sampled.version)
            except BatchRefused as refused:
                self._set_aside(link, sampled, str(refused))
                continue
            self._skipped_in_row = 0
            version = sampled.version + 1
            if (rows := trainer.recorded(sampled)) is not None:
                self._record.add(rows)
            flat = trainer.weights()
            link.publish(version, flat, sampled.numbers)
            metrics["weights_bytes"] = float(flat.nbytes)
            metrics |= {f"rollout_generated_{name}": value for name, value in sampled.generated.items()}
            metrics["learner_step_seconds"] = time.monotonic() - started
            if not link.closed:
                metrics |= trainer.gauges()
                self._settle(link, writer, wait=False)
                every = config.run.checkpoint_every
                if every and trainer.steps % every == 0 and trainer.steps < config.learner.steps:
                    self._checkpoint(link, writer, version)
            metrics |= {"learner_steps": float(trainer.steps), "weights_version": float(version)}
            self._report("step", metrics | self._counters(writer))
        self._settle(link, writer, wait=True)
        if writer.newest < trainer.steps:
            self._checkpoint(link, writer, version)
            self._settle(link, writer, wait=True)
            if writer.newest < trainer.steps:
                raise RunError(writer.fault)
        return {"steps": float(trainer.steps), "version": float(version)}

    def _begin(self, link: BufferLink, writer: CheckpointWriter) -> int:
        """The first publication, from a checkpoint or from the warm start; its version."""
        found = self._checkpoints.newest_sound()
        if found is None:
            version = link.rewind(0, 0)
            self._checkpoint(link, writer, version)
            self._settle(link, writer, wait=True)
            if writer.newest < 0:
                raise RunError(writer.fault)
        else:
            found, version = self._return_to(found, link, writer)
            self._record.rewind(self._trainer.steps)
            writer.newest = found.checkpoint.step
        link.publish(version, self._trainer.weights(), [], self._trainer.base())
        begun = {"learner_steps": float(self._trainer.steps), "weights_version": float(version)}
        self._report("started", begun | self._counters(writer) | self._trainer.gauges())
        return version

    def _return_to(self, found: Found, link: BufferLink, writer: CheckpointWriter) -> tuple[Found, int]:
        """The checkpoint that training goes on from, `found` or an older one, and the version to publish next."""
        left: list[Checkpoint] = []
        while True:
            for warning in found.warnings:
                self._controller.warn.remote(warning)
            writer.unsound += found.unsound
            with self._checkpoints.fetch(found.checkpoint) as folder:
                self._trainer.restore(folder)
            try:
                version = link.rewind(found.checkpoint.journal_index, self._trainer.steps)
                break
            except LedgerError as error:  # it could not be read once, and training went on from an older one
                older = self._checkpoints.newest_sound(before=found.checkpoint)
                if older is None:
                    raise
                self._controller.warn.remote(
                    f"checkpoint {found.checkpoint.name} was left behind and goes; {older.checkpoint.name} is used in "
                    f"its place ({cause_line(error)})"
                )
                left.append(found.checkpoint)
                found = older
        for checkpoint in left:  # nothing can return to it, and it would take the place of one that is kept
            self._checkpoints.discard(checkpoint)
        return found, version

    def _checkpoint(self, link: BufferLink, writer: CheckpointWriter, version: int) -> None:
        started = time.monotonic()
        self._settle(link, writer, wait=True)
        self._record.write()
        save, described = self._trainer.saved(), dump_config(self.config)

        def save_all(folder: Path) -> None:
            save(folder)
            (folder / RUN_CONFIG).write_text(described)

        writer.start(self._trainer.steps, version, save_all, link.export())
        self._blocked += time.monotonic() - started

    def _settle(self, link: BufferLink, writer: CheckpointWriter, *, wait: bool) -> None:
        """Tell the buffer what it need not keep any more, once a checkpoint is durable."""
        failures = writer.failures
        kept = writer.finished(wait=wait)
        if writer.failures > failures:
            self._controller.warn.remote(f"a checkpoint is missing, the last one stays: {writer.fault}")
        if kept:
            link.settle(min(one.journal_index for one in kept), max(one.version for one in kept))

    def _set_aside(self, link: BufferLink, sampled: Sample, reason: str) -> None:
        """Keep a batch, with the weights that it met, for `diffpo replay`; not without end, since these are large."""
        self._skipped += 1
        self._skipped_in_row += 1
        kept = self._directory.set_aside
        try:
            full = len(kept.folders()) >= MOST_SET_ASIDE
        except FAILURES as error:
            raise RunError(f"{kept} cannot be listed ({cause(error)}); mend it and go on with --resume") from error
        if full:
            where = f"is not kept, {kept} has {MOST_SET_ASIDE} already (move some away to keep more)"
        else:
            where = f"is set aside in {self._keep_aside(sampled, reason)}"
        link.set_aside(sampled.numbers, f"skipped: {reason}")
        self._controller.warn.remote(f"a batch that cannot be trained on {where}: {reason}")
        self._report("skipped", {"learner_skipped_steps": float(self._skipped)})
        most = self.config.learner.max_skipped_steps
        if self._skipped_in_row > most:
            raise RunError(
                f"{self._skipped_in_row} batches in a row could not be trained on (learner.max_skipped_steps={most}); "
                f"the last: {reason}; look at those in {kept} with `diffpo replay`"
            )

    def _keep_aside(self, sampled: Sample, reason: str) -> str:
        step = self._trainer.steps
        with self._directory.setting_aside(step, sampled.version, sampled.numbers[0]) as (folder, name):
            self._trainer.saved()(folder)
            SegmentFolder(folder / "groups").write(
                [
                    FinishedGroup(number, 0, payload, 0.0, sampled.version - age, 0)
                    for number, payload, age in zip(sampled.numbers, sampled.payloads, sampled.staleness, strict=True)
                ]
            )
            why = {"step": step, "version": sampled.version, "reason": reason, "numbers": sampled.numbers}
            (folder / WHY).write_text(json.dumps(why, indent=1) + "\n")
        return name

    def _note(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _counters(self, writer: CheckpointWriter) -> dict[str, float]:
        return {
            "learner_skipped_steps": float(self._skipped),
            "checkpoint_step": float(writer.newest),
            "checkpoint_timestamp_seconds": writer.durable_at,
            "checkpoint_blocked_seconds": self._blocked,
            "checkpoint_write_seconds": writer.seconds,
            "checkpoint_failures": float(writer.failures),
        }

    def _report(self, kind: str, values: dict[str, float]) -> None:
        self._controller.report.remote(kind, values)
