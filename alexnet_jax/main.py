"""Trains a network: python -m alexnet_jax.main --config=configs/paper.py

Run the same command again to resume from the last checkpoint. You can set any field of the config on
the command line, as in --config.model.activation=tanh; `configs/base.py` lists all fields.
"""

import logging
import sys
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from alexnet_jax import command
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError

FLAGS = {  # name: (default, help)
    'config': ('', 'a preset (paper or configs/paper.py) or your own file; :VARIANT may follow'),
    'workdir': ('', 'run directory; default: runs/<config>[-variant]'),
    'cpu_devices': (0, 'make N virtual CPU devices'),
    **command.DISTRIBUTED,
}


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
        print(f'Presets: {", ".join(configfile.presets())}; docs/presets.md describes them.\n')
        for name, (default, text) in FLAGS.items():
            print(f'  --{name:16} {text}' + (f' (default: {default})' if default else ''))
        sys.exit()
    try:
        rest = known(argv, known_only=True)  # what sets a field of the config
    except flags.Error as error:
        raise UserError(command.flag_error(error)) from error
    if not known.config:
        raise UserError('--config is missing; for example, --config=configs/paper.py')
    config = command.config(known.config, rest[1:], known=[*FLAGS])
    workdir = known.workdir or configfile.run_directory(known.config)
    processes = {name: known[name].value for name in command.DISTRIBUTED}
    return Arguments(config, workdir, known.cpu_devices, processes)


def main() -> None:
    args = parse(sys.argv)
    command.log_to_stdout()
    command.start(args.cpu_devices, deterministic=args.config.run.deterministic, **args.processes)
    logging.getLogger('absl').setLevel(logging.WARNING)  # TFDS logs every file

    # Imported late, so that errors in the flags appear immediately.
    from alexnet_jax.devices import distributed
    from alexnet_jax.training import loop

    if distributed.is_first():  # the others would log the same
        logging.getLogger('alexnet_jax').setLevel(logging.INFO)
    with distributed.together():
        loop.train(args.config, args.workdir)


if __name__ == '__main__':
    command.run(main)
