"""Trains and uses AlexNet and its relatives.

    alexnet-jax --config=quickstart         train; short for `alexnet-jax train --config=quickstart`
    alexnet-jax evaluate runs/quickstart    measure the error of a run
    alexnet-jax COMMAND --help              list the flags of a command
    alexnet-jax --version

Commands: train, prepare, evaluate, predict, features, retrieve, visualize, summary, hub, convert, export,
compress.
`python -m alexnet_jax` does the same.
"""

import importlib
import sys

from alexnet_jax import __version__, command
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError

COMMANDS = (
    'train',
    'prepare',
    'evaluate',
    'predict',
    'features',
    'retrieve',
    'visualize',
    'summary',
    'hub',
    'convert',
    'export',
    'compress',
)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments in ([], ['--help'], ['-h']):
        print(__doc__)
        return
    if arguments == ['--version']:
        print(f'alexnet_jax {__version__}')
        return
    name = 'train' if arguments[0].startswith('-') else sys.argv.pop(1)
    if name not in COMMANDS:
        hint = (
            f'; to train a preset: alexnet-jax --config={name}'
            if name in configfile.presets()
            else ''
        )
        raise UserError(f'{name}: no such command; the commands are {", ".join(COMMANDS)}{hint}')
    module = 'main' if name == 'train' else name
    importlib.import_module(f'alexnet_jax.{module}').main()


def run() -> None:
    """The console command `alexnet-jax`."""
    command.run(main)


if __name__ == '__main__':
    run()
