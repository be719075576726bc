"""Buffer actor: the replay buffer of a run as an actor on the driver's node, which Ray starts again when it dies."""

from typing import Any

import ray

from actors.cluster_state import on_this_node
from common.checkpoint_store import CheckpointStore
from common.config import Config
from common.replay_buffer import ReplayBuffer
from common.segment_store import SegmentStore
from learner.run_directory import RunDirectory

BUFFER_CALLS = 1000  # that it answers at once; each rollout actor may block one, in `lease`


def start_buffer(config: Config, directory: RunDirectory, checkpoints: CheckpointStore) -> Any:
    """Its handle; it goes on where the files of the run directory end."""
    replay, learner = config.replay, config.learner
    return (
        ray.remote(ReplayBuffer)
        .options(
            num_cpus=0,
            max_concurrency=BUFFER_CALLS,
            name="buffer",
            max_restarts=replay.max_restarts,
            max_task_retries=0,
            scheduling_strategy=on_this_node(),
        )
        .remote(
            groups_per_step=learner.groups_per_step,
            max_staleness=replay.max_staleness,
            admission=replay.admission,
            lease_seconds=replay.lease_seconds,
            drop_no_spread=replay.drop_no_spread,
            store=SegmentStore(directory.segments, memory_bytes=replay.memory_bytes),
            checkpoints=checkpoints,
            lock=directory.buffer_lock,
            keep_versions=replay.keep_versions,
            groups_limit=learner.steps * learner.groups_per_step,
        )
    )
