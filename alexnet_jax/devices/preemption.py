"""Stops a run early: on SIGTERM or Ctrl-C, after a number of steps or a time."""

import contextlib
import itertools
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from alexnet_jax.common.errors import UserError

log = logging.getLogger(__name__)
SECONDS = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}


def parse(stop_after: str) -> tuple[int | None, float | None]:
    """'100' -> (100 steps, None), '23h' -> (None, 82800 seconds), '' -> (None, None)."""
    if not stop_after:
        return None, None
    match = re.fullmatch(r'(\d{1,9})([smhd]?)', stop_after)
    if not match or not int(match[1]):
        raise UserError(
            f'config.run.stop_after={stop_after!r}: give a number of steps, such as 1000, or a '
            'time, such as 90s, 45m, 23h or 2d'
        )
    number, unit = int(match[1]), match[2]
    return (None, number * SECONDS[unit]) if unit else (number, None)


@contextlib.contextmanager
def watch(stop_after: str, start: int) -> Iterator[Callable[[int], str]]:
    """Yields stop(step) -> why to stop before this step, or ''. Call it at each dispatch from `start` on.

    In a multi-process run, any process can be asked to stop, and all stop at the same step: JAX's
    preemption service coordinates them, even if one was asked during startup. A second Ctrl-C raises
    KeyboardInterrupt immediately.
    """
    steps, seconds = parse(stop_after)
    began, several = time.monotonic(), jax.process_count() > 1
    asked = []
    # The service stops all processes at one more than the highest count it was given, initially 0. A
    # count that starts higher, like the steps of a resumed run, could already be past that.
    calls = itertools.count(1)

    def ask(reason: str) -> None:
        if not asked:
            asked.append(reason)
            log.info('%s: stopping at the next step with a checkpoint', reason)
            if several:  # JAX's own handler passes it on to the other processes
                signal.raise_signal(signal.SIGTERM)

    def on_signal(number: int, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ask('Ctrl-C' if number == signal.SIGINT else 'SIGTERM')

    def stop(step: int) -> str:
        if seconds and time.monotonic() - began >= seconds:
            ask(f'stop_after={stop_after}')
        if steps and step >= start + steps:
            return f'stop_after={stop_after}'
        if not several:
            return asked[0] if asked else ''
        reached = multihost_utils.reached_preemption_sync_point(next(calls))
        return (asked[0] if asked else 'one of the processes was asked to stop') if reached else ''

    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread can set handlers
        before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
