"""Trains a network: python -m alexnet_jax.main --config=configs/paper.py

The same command again goes on from the last checkpoint. Any field of the config can be set:
--config.model.activation=tanh; `configs/base.py` lists them all.
"""

import logging
import re
import sys

from absl import flags
from ml_collections import config_flags

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError, log_to_stdout, run
from alexnet_jax.devices import allocator

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'A file in configs/, e.g. configs/paper.py'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Run directory; default: runs/<config>[-variant]')
CPU_DEVICES = flags.DEFINE_integer('cpu_devices', 0, 'Make N virtual CPU devices', lower_bound=0)
COORDINATOR = flags.DEFINE_string('coordinator', '', 'Several processes: HOST:PORT of number 0')
PROCESSES = flags.DEFINE_integer('num_processes', 0, 'How many there are', lower_bound=0)
PROCESS = flags.DEFINE_integer('process_id', -1, 'The number of this one, from 0', lower_bound=-1)
AUTOMATIC = flags.DEFINE_bool('distributed', False, 'All three from SLURM, a TPU pod or Open MPI')
CONNECT = flags.DEFINE_integer('connect_timeout', 120, 'Seconds to wait for all', lower_bound=1)


def parse(argv: list[str]) -> None:
    """Reads the flags; whatever is wrong with them, or with the config file, is a UserError."""
    if '--help' in argv:
        print(f'{__doc__}{FLAGS.main_module_help()}')
        sys.exit()
    early = flags.FlagValues()  # only --config: what a preset has, before any field is set
    flags.DEFINE_string('config', None, '', flag_values=early)
    fields = {}
    try:
        early(argv, known_only=True)
        if not early.config:
            raise UserError('--config is missing, for example --config=configs/paper.py')
        fields = configfile.fields(configfile.load(early.config))
        for override in (re.match(r'--?(no)?(config\.[^=]*)', argument) for argument in argv):
            if override:
                configfile.check_name(override[2], fields)
        rest = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f'{error}; fields are set like --config.train.batch=64') from error
    except flags.Error as error:
        flag, _, reason = ' '.join(str(error).split()).removeprefix('flag ').partition(': ')
        field = fields.get(flag.lstrip('-').split('=')[0])
        if field is not None:
            reason = f'not of the type {type(field).__name__}, as {field!r} is'
        raise UserError(f'{flag}: {reason}' if reason else flag) from error
    if rest:
        raise UserError(f'{" ".join(rest)}: no flag; flags begin with --, as in --workdir=runs/a')
    for name, value in configfile.fields(CONFIG.value).items():
        configfile.check_value(name, value, fields[name])


def main() -> None:
    parse(sys.argv)
    allocator.keep_memory()
    log_to_stdout()
    logging.getLogger('absl').setLevel(logging.WARNING)  # TFDS tells of every file

    # Imported late, so that errors in the flags appear at once.
    from alexnet_jax.devices import distributed, mesh
    from alexnet_jax.training import loop

    mesh.configure(CPU_DEVICES.value, deterministic=CONFIG.value.run.deterministic)
    distributed.start(
        COORDINATOR.value, PROCESSES.value, PROCESS.value, AUTOMATIC.value, timeout=CONNECT.value
    )
    if distributed.is_first():  # the others would say the same
        logging.getLogger('alexnet_jax').setLevel(logging.INFO)
    default = configfile.run_directory(config_flags.get_config_filename(FLAGS['config']))
    with distributed.together():
        loop.train(CONFIG.value, WORKDIR.value or default)


if __name__ == '__main__':
    run(main)
