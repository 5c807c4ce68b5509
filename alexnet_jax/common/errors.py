"""How commands end: exit codes, and errors that are not bugs.

0    done
1    a bug, with a traceback
2    a user error, in one line (`UserError`)
75   stopped early with a checkpoint: run the same command to resume (`Stopped`)
76   another process of the run was lost: restart all of them (`distributed.py`)
130  Ctrl-C, twice
141  the output pipe was closed, for example by `| head`
"""

import errno
import importlib.metadata
import traceback

DONE, BUG, MISTAKE, STOPPED, LOST, INTERRUPTED, UNREAD = 0, 1, 2, 75, 76, 130, 141
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)  # to a path


class UserError(Exception):
    """One line: what is wrong, where, and what to do.

    Names from files can contain anything, hence `printable`.
    """

    def __str__(self):
        return printable(super().__str__())


class InputError(UserError, ValueError):
    """A UserError about an argument of a function that other programs call."""


def choose(name: str, value, choices) -> None:
    """Raises UserError if a field's value is not one of the choices."""
    if value not in [*choices]:  # not hashed: it can be a list
        raise UserError(f'{name}={value!r}: choose one of {", ".join(map(str, choices))}')


def one_each(name: str, values, layers: int) -> None:
    """Raises UserError unless a field has one value for each layer."""
    if len(values) != layers:
        raise UserError(f'{name}: must have {layers} values, one per layer, not {len(values)}')


def install(extra: str) -> str:
    """The command that installs the packages of an extra, such as 'onnx'."""
    try:
        importlib.metadata.version('alexnet_jax')
    except importlib.metadata.PackageNotFoundError:  # run from a clone
        return f"pip install '.[{extra}]'"
    return f"pip install 'alexnet_jax[{extra}]'"


def printable(text: str) -> str:
    """Escapes everything in a text that is not safe on a terminal, such as control characters.

    Bytes of a file name that are not UTF-8 appear as \\xNN.
    """
    return ''.join(c if c.isprintable() else _escaped(c) for c in text)


def say(text: str) -> None:
    """Prints a line immediately, escaping what should not reach a terminal."""
    print(printable(text), flush=True)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode
        return f'\\x{code - 0xDC00:02x}'
    return character.encode('unicode_escape').decode()


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:400]


def reason(error: BaseException) -> str:
    """Like `one_line`, but only the cause of a failed system call: the message names the file itself."""
    return getattr(error, 'strerror', None) or one_line(error)


class Stopped(Exception):
    """Stopped on request: one line that says where, and how to resume."""


def end(error: BaseException) -> tuple[str, int]:
    """What to print for an exception (one line unless it is a bug), and the exit code."""
    text, code = _end(error)
    lines = text.split('\n') if code == BUG else [text]
    return '\n'.join(map(printable, lines)), code


def _end(error: BaseException) -> tuple[str, int]:
    if isinstance(error, UserError):
        return f'error: {error}', MISTAKE
    if isinstance(error, Stopped):
        return str(error), STOPPED
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f'error: {error.filename or "cannot write"}: {error.strerror}; free some space and try again',
            MISTAKE,
        )
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        return (
            f'error: {error.filename}: {error.strerror}; give another path or make this one accessible',
            MISTAKE,
        )
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted', INTERRUPTED  # what shells report for it
    return ''.join(traceback.format_exception(error)), BUG
