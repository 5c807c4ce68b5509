"""The CPU that this process runs on."""

import os
import platform


def cores() -> int:
    """The number of cores this process can use, which its CPU affinity may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def memory() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def processor() -> str:
    """The model of the CPU."""
    try:
        with open('/proc/cpuinfo') as lines:
            return next(x.partition(': ')[2].strip() for x in lines if x.startswith('model name'))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()
