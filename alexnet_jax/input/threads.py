"""A map over threads that preserves order, and how many threads are allowed."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from alexnet_jax.common.errors import UserError

MOST = 1000


def check(name: str, threads: int) -> None:
    """Raises UserError for an impossible number of reader threads; name: the flag or field."""
    if not 0 <= threads <= MOST:
        raise UserError(f'{name}={threads}: must be 0 (one per core) to {MOST}')


def ordered_map(
    function: Callable, items: Iterable, *, threads: int, ahead: int, name: str = 'map'
) -> Iterator:
    """Yields function(item) for every item, in order, with at most `ahead` in flight.

    Closing the iterator cancels calls that have not started. An error of a call also waits for those under
    way, because they may be writing files. name: the prefix of thread names.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    items, waiting = iter(items), deque()
    try:
        while True:
            for item in itertools.islice(items, ahead - len(waiting)):
                waiting.append(pool.submit(function, item))
            if not waiting:
                return
            yield waiting.popleft().result()
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
