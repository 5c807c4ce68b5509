"""How a command ends: the exit codes, and the errors that are no bugs.

0    done
1    a bug, with a traceback
2    the user's to mend, one line (`UserError`)
75   stopped before the end, with a checkpoint: the same command goes on (`Stopped`)
76   another process of the run was lost: start all of them again (`distributed.py`)
130  Ctrl-C, twice
141  nobody reads the output any more, as after `| head`
"""

import argparse
import errno
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable

DONE, BUG, MISTAKE, STOPPED, LOST, INTERRUPTED, UNREAD = 0, 1, 2, 75, 76, 130, 141
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)  # to a path


class UserError(Exception):
    """One line: what is wrong, where, and what to do."""


def choose(name: str, value, choices) -> None:
    """UserError if a field's value is none of the choices."""
    if value not in choices:
        raise UserError(f'{name}={value!r}: choose one of {", ".join(choices)}')


def one_each(name: str, values, layers: int) -> None:
    """UserError unless a field has one value for each of so many layers."""
    if len(values) != layers:
        raise UserError(f'{name} has {len(values)} values, but {layers} layers need one each')


class Stopped(Exception):
    """Asked to stop, and stopped: one line that says where, and that the same command goes on."""


class ArgumentParser(argparse.ArgumentParser):
    """Like Python's, but what is wrong with the arguments is a `UserError`, not several lines."""

    def error(self, message: str):
        raise UserError(f'{message}; --help lists the options')


def log_to_stdout() -> None:
    """Warnings, and what a command lowers the level for, a line each on standard output."""
    handlers = [_Log(sys.stdout)]
    logging.basicConfig(level=logging.WARNING, format='%(message)s', handlers=handlers, force=True)


class _Log(logging.StreamHandler):
    """A training goes on where nobody reads its log any more, quietly."""

    def handleError(self, record):  # noqa: N802
        if isinstance(sys.exception(), BrokenPipeError):
            _discard_output()
        else:
            super().handleError(record)


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unread() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error is reported unasked
    return bool(poll.poll(0))


def run(main: Callable[[], None]) -> None:
    """Runs a command; what is no bug becomes one line on stderr and its exit code, no traceback."""
    try:
        main()
        sys.stdout.flush()
    except (UserError, Stopped, KeyboardInterrupt, OSError) as error:
        # who reads it has enough, as `head` has
        if isinstance(error, BrokenPipeError) and _is_unread():
            _discard_output()
            sys.exit(UNREAD)
        line, code = end(error)
        print(line, file=sys.stderr, flush=True)
        if code == INTERRUPTED:  # at once: a usual end waits for threads that save or read
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)


def end(error: BaseException) -> tuple[str, int]:
    """What to print about an exception, one line where it is no bug, and the exit code."""
    if isinstance(error, UserError):
        return f'error: {error}', MISTAKE
    if isinstance(error, Stopped):
        return str(error), STOPPED
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f'error: {error.filename or "writing"}: {error.strerror}; make room, and start again',
            MISTAKE,
        )
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        return (
            f'error: {error.filename}: {error.strerror}; give another path, or get access to it',
            MISTAKE,
        )
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted', INTERRUPTED  # what shells report for it
    return ''.join(traceback.format_exception(error)), BUG
