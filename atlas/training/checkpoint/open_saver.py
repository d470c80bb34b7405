"""Open the saver that writes a run's checkpoints."""

from __future__ import annotations

from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.devices.world import World
from atlas.training.logs.run_log import RunLog


def open_saver(
    checkpoints: CheckpointManager, world: World, *, sharded: bool, in_background: bool, log: RunLog
) -> BackgroundSaver:
    """The saver of a run: each rank writes its shards, or the first rank writes everything to one file."""
    if not sharded:
        return BackgroundSaver(checkpoints, in_background=in_background, log=log)
    from atlas.training.checkpoint.shard_saver import ShardSaver  # slow to import

    return ShardSaver(checkpoints, world, in_background=in_background, log=log)
