"""The machine that a process runs on."""

import os
import platform


def cores() -> int:
    """The cores that this process may use: fewer than there are where it is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def processor() -> str:
    """The model of the CPU."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(x.partition(': ')[2].strip() for x in lines if x.startswith('model name'))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()
