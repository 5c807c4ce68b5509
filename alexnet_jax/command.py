"""What the commands share: arguments, start-up, and how a command ends."""

import argparse
import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable

from alexnet_jax.common.errors import INTERRUPTED, UNREAD, Stopped, UserError, end

# Flags of a run with several processes, with their defaults: the arguments of `distributed.start`.
DISTRIBUTED = {
    'coordinator': ('', 'several processes: HOST:PORT of process 0'),
    'num_processes': (0, 'how many processes there are'),
    'process_id': (-1, 'the number of this process, from 0'),
    'distributed': (
        False,
        'find the other processes through SLURM, Open MPI, Kubernetes or a TPU pod',
    ),
    'connect_timeout': (120, 'seconds to wait for all processes'),
}


class ArgumentParser(argparse.ArgumentParser):
    """Like Python's, but what is wrong with the arguments is a `UserError`, not several lines."""

    def error(self, message: str):
        raise UserError(f'{message}; --help lists the options')


def make_parser(name: str, description: str) -> ArgumentParser:
    """The parser of `python -m alexnet_jax.NAME`; description: the module's docstring."""
    return ArgumentParser(
        prog=f'python -m alexnet_jax.{name}',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_devices(parser: argparse.ArgumentParser, *, distributed: bool = False) -> None:
    """Adds --cpu_devices and, for a command that can run as several processes, their flags."""
    parser.add_argument('--cpu_devices', type=int, default=0, help='make N virtual CPU devices')
    for name, (default, text) in DISTRIBUTED.items() if distributed else ():
        kind = {'action': 'store_true'} if default is False else {'type': type(default)}
        parser.add_argument(f'--{name}', default=default, help=text, **kind)


def start(cpu_devices: int = 0, *, deterministic: bool = False, **processes) -> None:
    """Sets JAX up, and joins the other processes of the run.

    To be called before JAX is used. processes: values of `DISTRIBUTED`'s flags; without them the
    command is a single process. Raises UserError for values that cannot be.
    """
    if cpu_devices < 0:
        raise UserError(f'--cpu_devices={cpu_devices}: must not be below 0')
    # Imported late: JAX takes a second, and errors in the arguments should appear at once.
    from alexnet_jax.devices import distributed, mesh

    mesh.configure(cpu_devices, deterministic=deterministic)
    if processes:
        distributed.start(**processes)


def log_to_stdout() -> None:
    """Warnings, and what a command lowers the level for, a line each on standard output."""
    handlers = [_Log(sys.stdout)]
    logging.basicConfig(level=logging.WARNING, format='%(message)s', handlers=handlers, force=True)


class _Log(logging.StreamHandler):
    """Training continues quietly after the output pipe was closed."""

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
    """Runs a command; what is no bug becomes one line on stderr and its exit code, no traceback.

    What the terminal's encoding lacks is escaped, and Pillow's warnings about metadata are not shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    warnings.filterwarnings('ignore', module=r'PIL\.')
    try:
        main()
        sys.stdout.flush()
    except (UserError, Stopped, KeyboardInterrupt, OSError) as error:
        # the reader has enough, as `head` has
        if isinstance(error, BrokenPipeError) and _is_unread():
            _discard_output()
            sys.exit(UNREAD)
        line, code = end(error)
        print(line, file=sys.stderr, flush=True)
        if code == INTERRUPTED:  # at once: a usual end waits for threads that save or read
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
