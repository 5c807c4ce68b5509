"""The machine that a process runs on."""

import os


def cores() -> int:
    """The cores that this process may use: fewer than there are where it is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
