"""The process's memory allocator, for arithmetic on CPUs: memory that is given back is paid for again.

XLA takes its temporary arrays from malloc and frees them after every step, and glibc hands blocks of
that size back to the kernel at once. The next step then waits while the kernel clears the pages again,
4 KiB at a time: a fifth of a training step at full width (`docs/performance.md`). So a command keeps its
memory, in huge pages where the kernel has them. glibc reads these settings only when a process starts.
"""

import os
import platform
import sys

TUNABLES = ':'.join(
    (
        'glibc.malloc.mmap_max=0',  # large blocks come from the heap, not from mappings of their own,
        'glibc.malloc.arena_max=1',  # of which there is one, since the others cannot hold them,
        'glibc.malloc.trim_threshold=1099511627776',  # and which does not shrink
        'glibc.malloc.hugetlb=1',  # pages of 2 MiB, where the kernel allows them
    )
)
ACCELERATORS = ('/dev/nvidiactl', '/dev/kfd', '/dev/accel0', '/dev/vfio/0')  # NVIDIA, AMD, TPUs


def settings() -> dict[str, str]:
    """The environment variables that help here: none with an accelerator or another C library."""
    name, version = platform.libc_ver()
    known = name == 'glibc' and tuple(map(int, version.split('.')[:2])) >= (2, 35)
    # Whoever has set some has reasons, and a program that has been started again has them.
    if not known or 'GLIBC_TUNABLES' in os.environ or any(map(os.path.exists, ACCELERATORS)):
        return {}
    return {'GLIBC_TUNABLES': TUNABLES}


def keep_memory() -> None:
    """Starts this program again, in its own place, with `settings`; at once, if there are any.

    For the beginning of a command, before JAX is imported: the process keeps its number, its files
    and its arguments, and whatever it has computed so far is lost.
    """
    found = settings()
    if found:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **found})
