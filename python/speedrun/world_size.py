"""On how many ranks a recipe can run, and whether the run can be a record.

Up to 8 ranks a step has the same eight parts. On more it has one a rank: where documents are cut to
fill a part, the tokens are others then, and what the run reaches is no record.
"""

from __future__ import annotations

from speedrun.config import NUM_PARTS, Config, ConfigError, Stage, num_parts

NAMED_UP_TO = 64  # ranks: what is allowed is listed so far, and up to the number asked for


def check_world_size(config: Config, world_size: int) -> None:
    """ConfigError, naming what is allowed, unless the ranks can share the parts of each step."""
    problem = _problem(config, world_size)
    if problem is None:
        return
    sizes = range(1, max(NAMED_UP_TO, world_size) + 1)
    *allowed, last = (str(n) for n in sizes if _problem(config, n) is None)
    raise ConfigError(f"{world_size} ranks: {problem}; use {', '.join(allowed)} or {last} ranks")


def _problem(config: Config, world_size: int) -> str | None:
    if world_size < 1 or num_parts(world_size) % world_size:
        return f"a step has {NUM_PARTS} parts on up to {NUM_PARTS} ranks, which must share them"
    for i, stage in enumerate(_stages(config)):
        if stage.tokens_per_step % num_parts(world_size):
            return (
                f"each has a part of a step, but the {stage.tokens_per_step:,} tokens of stage {i} "
                f"(schedule.stages.{i}.tokens_per_step) are not divisible by {world_size}"
            )
    return None


def _stages(config: Config) -> list[Stage]:
    """Those of the schedule, then its extension."""
    return [*config.schedule.stages, *filter(None, [config.schedule.extension])]


def record_obstacles(config: Config, world_size: int) -> list[str]:
    """Why a run on so many ranks is no record whatever its loss, one sentence each."""
    parts = num_parts(world_size)
    whole_sequences = config.data.batching == "consecutive" and all(
        stage.tokens_per_step // parts % stage.max_seq_len == 0 for stage in _stages(config)
    )
    if parts == NUM_PARTS or whole_sequences:
        return []
    return [
        f"on {world_size} ranks a step has {parts} parts: its tokens are not those of a step on 1 "
        f"to {NUM_PARTS} ranks"
    ]
