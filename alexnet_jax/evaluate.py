"""Evaluation as in the paper: centre crop, ten crops (§4.1), and ensembles, with exact counts.

    python -m alexnet_jax.evaluate RUN [RUN ...]

prints a table of the top-1 and top-5 errors of every run, and of all of them together.
"""

import argparse

from alexnet_jax.common.errors import ArgumentParser, UserError, log_to_stdout, run
from alexnet_jax.devices import allocator, distributed, mesh
from alexnet_jax.training import evaluation, steps


def main() -> None:
    parser = ArgumentParser(
        prog='python -m alexnet_jax.evaluate',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run directories')
    parser.add_argument('--split', default='val', choices=('val', 'train'))
    parser.add_argument('--views', default='both', choices=('both', *steps.VIEWS))
    parser.add_argument('--step', default='latest', help="'best', 'latest' or a number")
    parser.add_argument('--store', default='', help='the prepared pictures, if not where they were')
    parser.add_argument('--batch', type=int, default=100, help='images a step')
    parser.add_argument('--threads', type=int, default=0, help='for reading; 0: one per core')
    parser.add_argument('--cpu_devices', type=int, default=0, help='make N virtual CPU devices')
    parser.add_argument(
        '--coordinator', default='', help='several processes: HOST:PORT of number 0'
    )
    parser.add_argument('--num_processes', type=int, default=0, help='how many there are')
    parser.add_argument('--process_id', type=int, default=-1, help='the number of this one, from 0')
    parser.add_argument('--distributed', action='store_true', help='all three from SLURM, TPU pods')
    parser.add_argument('--connect_timeout', type=int, default=120, help='seconds to wait for all')
    args = parser.parse_args()
    log_to_stdout()
    if args.threads < 0 or args.cpu_devices < 0:
        raise UserError('--threads and --cpu_devices must not be below 0')
    allocator.keep_memory()
    mesh.configure(args.cpu_devices)
    distributed.start(
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.distributed,
        timeout=args.connect_timeout,
    )
    with distributed.together():
        distributed.agree(
            {name: value for name, value in vars(args).items() if name != 'process_id'}
        )
        results = evaluation.compare(
            args.runs,
            views=tuple(steps.VIEWS) if args.views == 'both' else (args.views,),
            split=args.split,
            step=int(args.step) if args.step.isdigit() else args.step,
            store=args.store,
            batch=args.batch,
            threads=args.threads,
        )
        if distributed.is_first():
            print(evaluation.table(results))


if __name__ == '__main__':
    run(main)
