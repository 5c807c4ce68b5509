"""Shared by the commands: arguments, startup, and exit handling."""

import argparse
import difflib
import io
import itertools
import logging
import os
import re
import select
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import INTERRUPTED, UNREAD, Stopped, UserError, end, printable

# Flags for multi-process runs and their defaults: the arguments of `distributed.start`.
DISTRIBUTED = {
    'coordinator': ('', 'for multi-process runs: HOST:PORT of process 0'),
    'num_processes': (0, 'number of processes'),
    'process_id': (-1, 'index of this process, counting from 0'),
    'distributed': (
        False,
        'find the other processes through SLURM, Open MPI, Kubernetes or a TPU pod',
    ),
    'connect_timeout': (120, 'seconds to wait for all processes to connect'),
}

STEP = {  # the argument --step
    'default': 'latest',
    'help': "checkpoint: 'best', 'latest' or a step",
    'type': lambda text: int(text) if text.isdecimal() else text,
}
PREPARE = ('skip_bad', 'verify')  # flags that only `prepare` has


class ArgumentParser(argparse.ArgumentParser):
    """Python's parser, except that invalid arguments raise a one-line `UserError`."""

    def error(self, message: str):
        raise UserError(f'{message}; --help lists the options')


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Lists options with their defaults, and keeps the description's line breaks."""

    def _get_help_string(self, action):
        if not action.default:  # the text says what happens then
            return action.help
        return super()._get_help_string(action)


def make_parser(name: str, description: str) -> ArgumentParser:
    """Makes the parser of the command NAME; description: the module's docstring."""
    console = os.path.basename(sys.argv[0]) == 'alexnet-jax'
    return ArgumentParser(
        prog=f'alexnet-jax {name}' if console else f'python -m alexnet_jax.{name}',
        description=description,
        formatter_class=Help,
    )


def config(file: str, arguments: list[str], known: Iterable[str] = ()) -> ConfigDict:
    """Runs a config file, once, and sets some of its fields, as in ['--config.model.width=0.5'].

    known: names of the command's other flags, which an error can suggest. Raises UserError if anything is
    wrong with the file or the arguments.
    """
    found = configfile.load(file)
    fields = configfile.fields(found)
    for argument in arguments:
        if override := re.match(r'--?(no)?(config\.[^=]*)', argument):
            configfile.check_name(override[2], fields)
    arguments = ['', *_last_of_each(arguments, fields)]
    overrides = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict('config', found, flag_values=overrides, sys_argv=arguments)
        rest = overrides(arguments)[1:]
    except flags.UnrecognizedFlagError as error:
        if error.flagname in PREPARE:
            raise UserError(
                f'--{error.flagname}: run python -m alexnet_jax.prepare with it first'
            ) from error
        close = difflib.get_close_matches(error.flagname, known, n=1)
        meant = f' (did you mean --{close[0]}?)' if close else ''
        raise UserError(
            f'--{error.flagname}: no such flag{meant}; set a field of the config as in '
            '--config.train.batch=64'
        ) from error
    except flags.Error as error:
        raise UserError(flag_error(error, fields)) from error
    if rest:
        raise UserError(
            f'{" ".join(rest)}: not a flag; flags begin with --, as in --workdir=runs/a'
        )
    for name, value in configfile.fields(found).items():
        configfile.check_value(name, value, fields[name])
    return found


def flag_error(error: flags.Error, fields: dict | None = None) -> str:
    """Describes an invalid value in one line; fields: those of the config, with values of the right type."""
    flag, _, reason = ' '.join(str(error).split()).removeprefix('flag ').partition(': ')
    field = (fields or {}).get(flag.lstrip('-').split('=')[0])
    if field is not None:
        reason = f'must be of type {type(field).__name__}, like {field!r}'
    return f'{flag}: {reason}' if reason else flag


def _last_of_each(arguments: list[str], fields: dict) -> list[str]:
    """Keeps only the last value of each tuple field: config_flags would join them."""
    kept, rest = [], iter(arguments)  # (the field, the arguments that set it)
    for argument in rest:
        name, equals, _ = argument.lstrip('-').partition('=')
        if not argument.startswith('-') or not isinstance(fields.get(name), tuple):
            kept.append(('', [argument]))
            continue
        value = [] if equals else [*itertools.islice(rest, 1)]
        kept = [pair for pair in kept if pair[0] != name] + [(name, [argument, *value])]
    return [argument for _, setting in kept for argument in setting]


def add_devices(parser: argparse.ArgumentParser, *, distributed: bool = False) -> None:
    """Adds --cpu_devices and, if `distributed`, the flags for multi-process runs."""
    parser.add_argument('--cpu_devices', type=int, default=0, help='create N virtual CPU devices')
    for name, (default, text) in DISTRIBUTED.items() if distributed else ():
        kind = {'action': 'store_true'} if default is False else {'type': type(default)}
        parser.add_argument(f'--{name}', default=default, help=text, **kind)


def made(name: str) -> str:
    """The command line of this invocation of NAME, with paths reduced to file names."""
    parts = [word.rpartition('=') for word in sys.argv[1:]]
    words = [f'{flag}{sign}{os.path.basename(value)}' for flag, sign, value in parts]
    return shlex.join(['python', '-m', f'alexnet_jax.{name}', *words])


def start(cpu_devices: int = 0, *, deterministic: bool = False, **processes) -> None:
    """Configures JAX and joins the other processes of the run, if any. Call this before using JAX.

    processes: values of the flags in `DISTRIBUTED`; without them the command runs as a single
    process. Raises UserError for invalid values and for missing devices.
    """
    if cpu_devices < 0:
        raise UserError(f'--cpu_devices={cpu_devices}: must be at least 0')
    # Imported here because JAX takes a second, and argument errors should appear immediately.
    from alexnet_jax.devices import distributed, mesh

    mesh.configure(cpu_devices, deterministic=deterministic)
    if processes:
        distributed.start(**processes)
    mesh.start_devices()


def log_to_stdout() -> None:
    """Logs to standard output, one line per message; only warnings unless a command lowers the level."""
    handlers = [_Log(sys.stdout)]
    logging.basicConfig(level=logging.WARNING, format='%(message)s', handlers=handlers, force=True)


class _Log(logging.StreamHandler):
    """A handler that goes quiet once the output pipe is closed, so that training continues."""

    def format(self, record):
        return '\n'.join(map(printable, super().format(record).split('\n')))

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
    poll.register(sys.stdout.fileno(), 0)  # errors are always reported
    return bool(poll.poll(0))


def _use_utf8() -> None:
    """Restarts Python in UTF-8 mode, including for file names, if the locale uses another encoding.

    Otherwise paths stored in a run directory or a store would differ between locales.
    """
    if sys.getfilesystemencoding() != 'utf-8':
        encoding = {'PYTHONIOENCODING': sys.stdout.encoding, **os.environ}  # the terminal's
        os.execve(sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]], encoding)


def run(main: Callable[[], None]) -> None:
    """Runs a command; errors that are not bugs become one line on stderr and an exit code.

    Characters that the terminal's encoding lacks are escaped; Pillow's warnings about metadata are
    hidden.
    """
    _use_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    warnings.filterwarnings('ignore', module=r'PIL\.')
    try:
        main()
        sys.stdout.flush()
    except (UserError, Stopped, KeyboardInterrupt, OSError) as error:
        # the reader has stopped reading, as `head` does
        if isinstance(error, BrokenPipeError) and _is_unread():
            _discard_output()
            sys.exit(UNREAD)
        line, code = end(error)
        print(line, file=sys.stderr, flush=True)
        if code == INTERRUPTED:  # immediately: a normal exit waits for threads that save or read
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)
