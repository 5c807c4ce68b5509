"""Compresses a trained network by pruning, shared weights and Huffman coding ("Deep Compression").

    python -m alexnet_jax.compress RUN

Han, Mao, Dally 2015 (arXiv:1510.00149). Small weights are removed and the others retrained; the rest of each
kernel is grouped by k-means into a few values, which are fine-tuned. RUN's config and images are used. Writes
a bundle (docs/weights.md), which all commands take in place of RUN. It needs less storage and takes less
time to download, but not less memory or time to run: weights are restored to float32 when it is loaded.
"""

import logging
import os
import shlex
import sys

import numpy as np

from alexnet_jax import command
from alexnet_jax.common.errors import UserError, say
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import compression, evaluation, inference, metrics
from alexnet_jax.weights import bundle


def main() -> None:
    parser = command.make_parser('compress', __doc__)
    parser.add_argument('run', metavar='RUN', help='a run directory or a bundle')
    parser.add_argument(
        '--output', metavar='DIR', default='', help='the folder to write (default: RUN-compressed)'
    )
    parser.add_argument('--step', default='latest', help="checkpoint: 'best', 'latest' or a step")
    parser.add_argument('--store', default='', help='path of the store, if it has moved')
    for name, layers, factor, bits in (
        ('conv', 'convolutions', 0.8, 8),
        ('fc', 'fully connected layers', 1.5, 5),
    ):
        parser.add_argument(
            f'--prune_{name}',
            type=float,
            default=factor,
            metavar='STDS',
            help=f'remove weights of {layers} below this many standard deviations of the kernel '
            f'({factor})',
        )
        parser.add_argument(
            f'--bits_{name}',
            type=int,
            default=bits,
            metavar='N',
            help=f'2^N values in a kernel of {layers} ({bits})',
        )
    parser.add_argument('--rounds', type=int, default=3, help='of pruning, each further (3)')
    parser.add_argument(
        '--epochs', type=float, default=3.0, help='of retraining after each round (3)'
    )
    parser.add_argument(
        '--tune', type=float, default=1.0, help='epochs of fine-tuning the shared values (1)'
    )
    parser.add_argument(
        '--rate', type=float, default=0.1, help='of retraining, times config.optim.rate (0.1)'
    )
    parser.add_argument(
        '--tune_rate', type=float, default=0.001, help='the same, of fine-tuning (0.001)'
    )
    parser.add_argument('--batch', type=int, default=100, help='images per step of evaluation')
    command.add_devices(parser)
    args = parser.parse_args()
    settings = _settings(args)
    command.log_to_stdout()
    logging.getLogger('alexnet_jax.training.compression').setLevel(logging.INFO)
    command.start(args.cpu_devices)
    compress(args, settings)


def _settings(args) -> compression.Settings:
    """The flags' values; UserError for invalid ones."""
    for name, lowest, most in (
        ('prune_conv', 0, 100),
        ('prune_fc', 0, 100),
        ('bits_conv', 1, 8),
        ('bits_fc', 1, 8),
        ('rounds', 1, 1000),
        ('epochs', 0, 1e6),
        ('tune', 0, 1e6),
        ('rate', 0, 1e6),
        ('tune_rate', 0, 1e6),
    ):
        value = getattr(args, name)
        if not lowest <= value <= most:
            raise UserError(f'--{name}={value}: must be from {lowest:g} to {most:g}')
    return compression.Settings(
        prune={kind: getattr(args, f'prune_{kind}') for kind in compression.KINDS},
        bits={kind: getattr(args, f'bits_{kind}') for kind in compression.KINDS},
        rounds=args.rounds,
        epochs=args.epochs,
        tune=args.tune,
        rate=args.rate,
        tune_rate=args.tune_rate,
    )


def compress(args, settings: compression.Settings) -> None:
    """Compresses args.run, compares it with the original, and writes it."""
    run = inference.describe_run(args.run)
    output = args.output or f'{os.path.normpath(run.path)}-compressed'
    bundle.check_new(output)
    store = inference.open_store([run], args.store)
    store.check_split('val')
    batches = {'config.train.batch': run.config['train']['batch'], '--batch': args.batch}
    mesh = meshes.make((0, 1), towers=1, batches=batches)
    run = inference.restore_run(run, mesh, int(args.step) if args.step.isdigit() else args.step)

    def error(of):
        predict = inference.predictor(of, mesh, 'centre')
        sums = evaluation.evaluate(
            [predict], mesh, store, split='val', batch=args.batch, threads=0
        )
        return metrics.values(sums)

    before = error(run)
    variables = compression.compress(run, store, mesh, settings)
    mean = run.facts.mean
    if (mean != mean[:1, :1]).any():
        mean = np.rint(mean)
    small = compression.with_variables(run, variables, mesh, mean)
    after = error(small)
    rows = compression.layers(run.net, variables)
    dense = rows[-1]['size']
    facts = {
        'settings': settings._asdict(),
        'layers': rows,
        'kept': compression.share_kept(run.net, variables['params']),
        'before': {key: before[key] for key in bundle.METRICS},
    }
    measured = {key: after[key] for key in bundle.METRICS} | {'on': 'validation, center crop'}
    made = inference.as_bundle(small, made=_made(), measured=measured, compression=facts)
    size = len(bundle.encoded(made, compress=True)[bundle.COMPRESSED])
    facts |= {'dense': dense, 'compressed': size, 'times': dense / size}
    bundle.write(output, made, compress=True)
    print(compression.table(rows))
    say(
        f'{dense / 1e3:,.0f} kB of float32 -> {size / 1e3:,.0f} kB ({bundle.COMPRESSED}, with the mean image): '
        f'{dense / size:.1f} times smaller'
    )
    say(
        f'{store.counts["val"]:,} validation pictures, center crop: top-1 error {before["top1_error"]:.2f} % '
        f'-> {after["top1_error"]:.2f} %'
    )
    say('only storage: in memory, and in the time that a prediction takes, nothing changes')
    say(f'wrote {output}')


def _made() -> str:
    """The command, without the folders of its files."""
    parts = [word.rpartition('=') for word in sys.argv[1:]]
    words = [f'{flag}{sign}{os.path.basename(value)}' for flag, sign, value in parts]
    return shlex.join(['python', '-m', 'alexnet_jax.compress', *words])


if __name__ == '__main__':
    command.run(main)
