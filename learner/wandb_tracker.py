"""WandbTracker: curves in Weights & Biases.

- `RUN/wandb.json` has the id of its run there, so one that is resumed goes on in it.
- W&B cannot take a step back: of steps that are done again the first row stays.
- Who, where to and whether at all is W&B's own to say: `wandb login`, `WANDB_API_KEY`, `WANDB_ENTITY`,
  `WANDB_MODE=offline` in the environment of the controller (that of `diffpo train` on a local Ray).
"""

import uuid
from collections.abc import Mapping

import wandb  # pyright: ignore[reportMissingImports]  # an extra

from common.config import Config
from common.local_copy import cache_folder
from common.metrics import CATALOGUE
from learner.run_directory import RunDirectory
from learner.trackers import CLOSE_SECONDS, STEP_KEYS, WANDB_FILE, tag

LOGIN_SECONDS = 1  # that W&B waits for someone to type a key


class WandbTracker:
    """`learner.trackers.Tracker` that logs to one run of W&B."""

    def __init__(self, config: Config, directory: RunDirectory, before: Mapping[str, int]) -> None:
        """
        Args:
            config: what W&B shows as the run's configuration.
            directory: of the run.
            before: last step by kind that it was told before this process.

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


def _id_of(directory: RunDirectory) -> str:
    if directory.place.holds(WANDB_FILE):
        return directory.read_json(WANDB_FILE)["id"]
    made = uuid.uuid4().hex[:12]
    directory.write_json(WANDB_FILE, {"id": made})
    return made
