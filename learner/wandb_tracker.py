"""WandbTracker: curves in Weights & Biases.

- `RUN/wandb.json` has the id of its run there, so one that is resumed goes on in it.
- W&B cannot take a step back: of steps that are done again the first row stays.
- Who, where to and whether at all is W&B's own to say: `wandb login`, `WANDB_API_KEY`, `WANDB_ENTITY`,
  `WANDB_MODE=offline` in the environment of the controller (that of `diffpo train` on a local Ray).
"""

import uuid
from collections.abc import Mapping
from contextlib import suppress

import wandb

from common.config import Config
from common.local_copy import cache_folder
from common.metrics import CATALOGUE
from common.place import FAILURES
from learner.run_directory import RunDirectory
from learner.trackers import CLOSE_SECONDS, STEP_KEYS, tag

ID_FILE = "wandb.json"
LOGIN_SECONDS = 1  # that W&B waits for someone to type a key


class WandbTracker:
    """`learner.trackers.Tracker` that logs to one run of W&B."""

    def __init__(self, config: Config, directory: RunDirectory, before: Mapping[str, int]) -> None:
        """
        Args:
            config: what W&B shows as the run's configuration.
            directory: of the run.
            before: last step by kind that was told before this process, from `told_before`.

        Raises:
            Exception: of W&B, e.g. when nobody is logged in.
        """
        self._last = dict(before)
        self._offset = {"warm_start": 0, "step": config.warm_start.steps}
        local = directory.place.folder
        if local is None:
            local = cache_folder()
            local.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.metrics.wandb_project,
            id=_id_of(directory),
            resume="allow",
            reinit="create_new",
            name=config.run.name,
            dir=str(local),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off", silent=True, disable_code=True, login_timeout=LOGIN_SECONDS, finish_timeout=CLOSE_SECONDS
            ),
        )
        for section in sorted({tag(name).partition("/")[0] for name in CATALOGUE}):
            kind = "warm_start" if section == "warm_start" else "step"
            self._run.define_metric(f"{section}/*", step_metric=tag(STEP_KEYS[kind]))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if step > self._last.get(kind, 0):
            self._last[kind] = step
            self._run.log(dict(values), step=self._offset[kind] + step)

    def close(self) -> None:
        self._run.finish()


def told_before(directory: RunDirectory) -> dict[str, int]:
    """The last step of each kind of a run that W&B knows; nothing of one that it does not."""
    last: dict[str, int] = {}
    with suppress(*FAILURES):
        if directory.place.holds(ID_FILE):
            for row in directory.read_metrics():
                key = STEP_KEYS.get(row.get("kind", ""))
                if key is not None and key in row:
                    last[row["kind"]] = max(last.get(row["kind"], 0), int(row[key]))
    return last


def _id_of(directory: RunDirectory) -> str:
    if directory.place.holds(ID_FILE):
        return directory.read_json(ID_FILE)["id"]
    made = uuid.uuid4().hex[:12]
    directory.write_json(ID_FILE, {"id": made})
    return made
