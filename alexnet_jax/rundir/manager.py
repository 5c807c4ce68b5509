"""orbax's manager of checkpoints as a run needs it, and which checkpoints it keeps."""

import logging
import os
from typing import Any

import orbax.checkpoint as ocp


class LatestAndBest:
    """orbax's preservation policy: the latest `keep` steps and the one with the lowest error."""

    def __init__(self, keep: int):
        self.keep = keep
        self.errors: dict[int, float | None] = {}  # of the steps on disk

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], best({s: self.errors.get(s) for s in steps})}
        return [step in kept for step in steps]


def best(errors: dict[int, float | None]) -> int | None:
    evaluated = [step for step in errors if errors[step] is not None]
    return min(evaluated, key=lambda step: (errors[step], step), default=None)


class Manager(ocp.CheckpointManager):
    """Saves in the background whenever it is told to; keeps what `policy` says.

    Making one makes the folder and removes unfinished saves: not for a run that is only being read.
    """

    def __init__(self, directory: str | os.PathLike, policy: LatestAndBest):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        super().__init__(directory, options=options)

    def reached_preemption(self, step: int) -> bool:
        # orbax would tell JAX's preemption service the steps that it saves, and `preemption.py` tells
        # it a count: a lower number in between can make all pass the one at which they are to stop.
        return False


def without_chatter(record: logging.LogRecord) -> bool:
    """Drops what orbax logs, dozens of lines a save, below the level of an error."""
    return record.levelno >= logging.ERROR or '/orbax/' not in record.pathname
