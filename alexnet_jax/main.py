"""Trains a network: python -m alexnet_jax.main --config=configs/paper.py

The same command again goes on from the last checkpoint. Any field of the config can be set:
--config.model.activation=tanh; `configs/base.py` lists them all.
"""

import logging
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from alexnet_jax.errors import UserError, run

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file('config', None, 'A file in configs/, e.g. configs/paper.py')
WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory; default: runs/<config>[-variant]')
CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 0, 'Make so many virtual CPU devices')


def parse(argv: list[str]) -> None:
    """Reads the flags; whatever is wrong with them is a UserError."""
    try:
        rest = FLAGS(argv)
    except FileNotFoundError as error:
        raise UserError(f'there is no config file {error.filename}; ls configs/') from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(' '.join(str(error).split())) from error
    if rest[1:]:
        raise UserError(f'arguments that are no flags: {" ".join(rest[1:])}')
    if CONFIG.value is None:
        raise UserError('--config is missing, for example --config=configs/paper.py')


def main() -> None:
    parse(sys.argv)
    logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stdout, force=True)
    logging.getLogger('alexnet_jax').setLevel(logging.INFO)
    logging.getLogger('absl').setLevel(logging.WARNING)  # TFDS tells of every file

    from alexnet_jax import mesh, train  # after the flags: an error in those answers at once

    mesh.configure(CPU_DEVICES.value)
    path, _, variant = config_flags.get_config_filename(FLAGS['config']).partition(':')
    name = pathlib.Path(path).stem + (f'-{variant}' if variant else '')
    train.train(CONFIG.value, WORKDIR.value or pathlib.Path('runs') / name)


if __name__ == '__main__':
    run(main)
