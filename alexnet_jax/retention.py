"""Which checkpoints are kept."""

from typing import Any


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
