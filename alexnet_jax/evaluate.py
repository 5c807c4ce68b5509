"""Evaluates networks as in the paper: center crop, ten crops (§4.1), and ensembles.

    python -m alexnet_jax.evaluate RUN [RUN ...]

Prints a table with the top-1 and top-5 errors of each run and of the ensemble of all runs. Every
picture counts exactly once.
"""

from alexnet_jax import command
from alexnet_jax.common import class_names
from alexnet_jax.devices import distributed
from alexnet_jax.input import threads
from alexnet_jax.rundir import directory
from alexnet_jax.training import evaluation, steps


def main() -> None:
    parser = command.make_parser('evaluate', __doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run directories')
    parser.add_argument('--split', default='val', choices=('val', 'train'))
    parser.add_argument('--views', default='both', choices=('both', *steps.VIEWS))
    parser.add_argument('--step', default='latest', help="checkpoint: 'best', 'latest' or a step")
    parser.add_argument('--store', default='', help='path of the store, if it has moved')
    parser.add_argument('--batch', type=int, default=100, help='images per step')
    parser.add_argument('--threads', type=int, default=0, help='reader threads; 0: one per core')
    parser.add_argument('--per_class', action='store_true', help='also print the errors by class')
    command.add_devices(parser, distributed=True)
    args = parser.parse_args()
    threads.check('--threads', args.threads)
    command.log_to_stdout()
    command.start(args.cpu_devices, **{name: vars(args)[name] for name in command.DISTRIBUTED})
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
            if args.per_class:
                names = directory.read_facts(args.runs[0]).names
                print(evaluation.class_table(results, class_names.shown(names)))


if __name__ == '__main__':
    command.run(main)
