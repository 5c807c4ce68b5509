"""Trains a network: python -m alexnet_jax.main --config=configs/paper.py

Run the same command again to resume from the last checkpoint. You can set any field of the config on
the command line, as in --config.model.activation=tanh; `configs/base.py` lists all fields.
"""

import difflib
import itertools
import logging
import re
import sys
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax import command
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError

FLAGS = {  # name: (default, help)
    'config': ('', 'a preset (paper or configs/paper.py) or your own file; :VARIANT may follow'),
    'workdir': ('', 'run directory; default: runs/<config>[-variant]'),
    'cpu_devices': (0, 'make N virtual CPU devices'),
    **command.DISTRIBUTED,
}


PREPARE = ('skip_bad', 'verify')  # flags that only `prepare` has


class Arguments(NamedTuple):
    config: ConfigDict
    workdir: str
    cpu_devices: int
    processes: dict  # the flags of `command.DISTRIBUTED`


def parse(argv: list[str]) -> Arguments:
    """Reads the flags and runs the config file, once. Raises UserError if anything is wrong with them."""
    known = flags.FlagValues()
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, bool: flags.DEFINE_bool}
    for name, (default, text) in FLAGS.items():
        define[type(default)](name, default, text, flag_values=known)
    if {'--help', '-h'} & {*argv}:
        print(__doc__)
        for name, (default, text) in FLAGS.items():
            print(f'  --{name:16} {text}' + (f' (default: {default})' if default else ''))
        sys.exit()
    fields = {}
    try:
        rest = known(argv, known_only=True)  # what sets a field of the config
        if not known.config:
            raise UserError('--config is missing; for example, --config=configs/paper.py')
        config = configfile.load(known.config)
        fields = configfile.fields(config)
        for argument in rest:
            if override := re.match(r'--?(no)?(config\.[^=]*)', argument):
                configfile.check_name(override[2], fields)
        rest = _last_of_each(rest, fields)
        overrides = flags.FlagValues()
        config_flags.DEFINE_config_dict('config', config, flag_values=overrides, sys_argv=rest)
        rest = overrides(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        if error.flagname in PREPARE:
            raise UserError(
                f'--{error.flagname}: run python -m alexnet_jax.prepare with it first'
            ) from error
        close = difflib.get_close_matches(error.flagname, FLAGS, n=1)
        meant = f' (did you mean --{close[0]}?)' if close else ''
        raise UserError(
            f'--{error.flagname}: no such flag{meant}; set a field of the config as in '
            '--config.train.batch=64'
        ) from error
    except flags.Error as error:
        flag, _, reason = ' '.join(str(error).split()).removeprefix('flag ').partition(': ')
        field = fields.get(flag.lstrip('-').split('=')[0])
        if field is not None:
            reason = f'must be of type {type(field).__name__}, like {field!r}'
        raise UserError(f'{flag}: {reason}' if reason else flag) from error
    if rest:
        raise UserError(
            f'{" ".join(rest)}: not a flag; flags begin with --, as in --workdir=runs/a'
        )
    for name, value in configfile.fields(config).items():
        configfile.check_value(name, value, fields[name])
    workdir = known.workdir or configfile.run_directory(known.config)
    processes = {name: known[name].value for name in command.DISTRIBUTED}
    return Arguments(config, workdir, known.cpu_devices, processes)


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


def main() -> None:
    args = parse(sys.argv)
    command.log_to_stdout()
    command.start(args.cpu_devices, deterministic=args.config.run.deterministic, **args.processes)
    logging.getLogger('absl').setLevel(logging.WARNING)  # TFDS logs every file

    # Imported late, so that errors in the flags appear at once.
    from alexnet_jax.devices import distributed
    from alexnet_jax.training import loop

    if distributed.is_first():  # the others would say the same
        logging.getLogger('alexnet_jax').setLevel(logging.INFO)
    with distributed.together():
        loop.train(args.config, args.workdir)


if __name__ == '__main__':
    command.run(main)
