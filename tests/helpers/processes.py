"""For programs that tests start: `from tests.helpers.processes import free_port`."""

import os
import socket


def compilation_cache(folder: str | os.PathLike) -> dict[str, str]:
    """An environment for programs that share functions, so that only the first compiles them."""
    return {
        'JAX_COMPILATION_CACHE_DIR': os.fspath(folder),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }


def free_port() -> int:
    """A TCP port that no program on this machine listens on."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]
