"""Compresses a trained network by pruning, shared weights and Huffman coding ("Deep Compression").

    python -m alexnet_jax.compress RUN

Han, Mao, Dally 2015 (arXiv:1510.00149). Small weights are removed and the others retrained; the rest of each
kernel is grouped by k-means into a few values, which are fine-tuned. Uses RUN's config and images. Writes a
bundle (docs/weights.md), which all commands take in place of RUN. It is smaller to store and to download, but
needs as much memory and time to run: weights are restored to float32 when it is loaded.
"""

import logging
import os

import numpy as np

from alexnet_jax import command
from alexnet_jax.common.errors import UserError, say
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import compression, evaluation, inference, metrics
from alexnet_jax.weights import bundle

OF_THE_ORIGINAL = ('published', 'sha256', 'folded')  # facts that no longer hold


def main() -> None:
    parser = command.make_parser('compress', __doc__)
    parser.add_argument('run', metavar='RUN', help='a run directory or a bundle')
    parser.add_argument(
        '--output', metavar='DIR', default='', help='the folder to write (default: RUN-compressed)'
    )
    parser.add_argument('--step', **command.STEP)
    parser.add_argument('--store', default='', help='path of the store, if it has moved')
    parser.add_argument('--batch', type=int, default=100, help='images per step of evaluation')
    default = compression.DEFAULTS
    for kind, layers in (('conv', 'convolutions'), ('fc', 'fully connected layers')):
        parser.add_argument(
            f'--prune_{kind}',
            type=float,
            default=default.prune[kind],
            metavar='STDS',
            help=f'removes weights of {layers} below this many standard deviations of the '
            "layer's weights",
        )
        parser.add_argument(
            f'--bits_{kind}',
            type=int,
            default=default.bits[kind],
            metavar='N',
            help=f'leaves 2^N distinct weights in each of the {layers}',
        )
    for name, text in (
        ('rounds', 'pruning rounds, each with a higher threshold'),
        ('epochs', 'epochs of retraining in each round'),
        ('tune', 'epochs of fine-tuning the shared weights'),
        ('rate', 'learning rate of retraining, as a fraction of config.optim.rate'),
        ('tune_rate', 'learning rate of fine-tuning, as a fraction of config.optim.rate'),
    ):
        value = getattr(default, name)
        parser.add_argument(f'--{name}', type=type(value), default=value, help=text)
    command.add_devices(parser)
    args = parser.parse_args()
    settings = _settings(args)
    if not args.output and not os.path.isdir(args.run):
        raise UserError(f'{args.run}: not a local folder; name the one to write: --output=DIR')
    command.log_to_stdout()
    logging.getLogger(compression.__name__).setLevel(logging.INFO)
    command.start(args.cpu_devices)
    output = args.output or f'{os.path.normpath(args.run)}-compressed'
    options = {
        'step': args.step,
        'store': args.store,
        'batch': args.batch,
        'made': command.made('compress'),
    }
    card = compress(args.run, output, settings, **options)
    facts, measured = card['compression'], card['measured']
    print(compression.table(facts['layers']))
    say(
        f'{facts["dense"] / 1e3:,.0f} kB of float32 -> {facts["compressed"] / 1e3:,.0f} kB '
        f'({bundle.COMPRESSED}, with the mean image): {facts["times"]:.1f} times smaller'
    )
    say(
        f'validation, center crop: top-1 error {facts["before"]["top1_error"]:.2f}% -> '
        f'{measured["top1_error"]:.2f}%'
    )
    say('this saves storage only: predictions take as much memory and time as before')
    say(f'wrote {output}')


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
    by_kind = {
        part: {kind: getattr(args, f'{part}_{kind}') for kind in compression.KINDS}
        for part in ('prune', 'bits')
    }
    others = {name: getattr(args, name) for name in compression.Settings._fields[2:]}
    return compression.Settings(**by_kind, **others)


@meshes.settings()
def compress(
    path: str | os.PathLike,
    output: str | os.PathLike,
    settings: compression.Settings,
    *,
    step: str | int = 'latest',
    store: str = '',
    batch: int = 100,
    made: str = '',
) -> dict:
    """Compresses a run or a bundle into a new bundle -> its card.

    The card's 'compression' has the settings, what `compression.layers` returns, 'kept' (percent of the
    weights), 'before' (the errors), 'dense' and 'compressed' (bytes) and 'times'. Raises UserError for a
    folder with files in it, and as `inference.open_run`, `open_store` and `compression.compress` do.
    """
    bundle.check_new(output)
    run = inference.describe_run(path)
    opened = inference.open_store([run], store)
    opened.check_split('val')
    batches = {'config.train.batch': run.config['train']['batch'], '--batch': batch}
    mesh = meshes.make((0, 1), towers=1, batches=batches)
    run = inference.restore_run(run, mesh, step)

    def errors(of):
        predict = [inference.predictor(of, mesh, 'center')]
        sums = evaluation.evaluate(predict, mesh, opened, split='val', batch=batch, threads=0)
        return {name: metrics.values(sums)[name] for name in bundle.METRICS}

    before = errors(run)
    variables = compression.compress(run, opened, mesh, settings)
    mean = run.facts.mean
    if (mean != mean[:1, :1]).any():
        mean = np.rint(mean)
    small = compression.with_variables(run, variables, mesh, mean)
    measured = {**errors(small), 'on': 'validation, center crop'}
    found = inference.as_bundle(small, made=made, measured=measured)
    rows = compression.layers(run.net, variables)
    size, dense = len(bundle.encoded(found, compress=True)[bundle.COMPRESSED]), rows[-1]['size']
    facts = {
        'settings': settings._asdict(),
        'layers': rows,
        'kept': compression.share_kept(run.net, variables['params']),
        'before': before,
        'dense': dense,
        'compressed': size,
        'times': dense / size,
    }
    kept = {name: x for name, x in found.card.items() if name not in OF_THE_ORIGINAL}
    found = found._replace(card={**kept, 'compression': facts})
    bundle.write(output, found, compress=True)
    return found.card


if __name__ == '__main__':
    command.run(main)
