"""Silence for libraries that write to stderr from C++."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what C++ code writes to stderr, which no log level affects, and absl's warnings."""
    logger, level, kept = logging.getLogger('absl'), logging.getLogger('absl').level, os.dup(2)
    sys.stderr.flush()
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        os.dup2(kept, 2)
        os.close(kept)
