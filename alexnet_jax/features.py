"""Writes the activations of a layer, for files or a split, to an .npz file.

    python -m alexnet_jax.features RUN photos/ --layer=fc7
    python -m alexnet_jax.features RUN --split=val --layer=conv5 --output=conv5.npz

Activations are those of the center crop at test time. The file has `features` f32[N,F] (for
convolutions f32[N,H,W,C], with the channels of all towers in order), `labels` i32[N] (-1: unknown),
`paths` (for a split, `records`: their indices), `names`, `layer` and `step`. An image is labeled if its
folder, or the folder above, is named after a class. Images that cannot be read are reported and left
out, and the exit code is then 2.
"""

from collections.abc import Iterator

import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common.errors import UserError, choose, printable
from alexnet_jax.devices import cpu
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import images
from alexnet_jax.input.batches import Batch, eval_batches
from alexnet_jax.training import inference, steps


class Rows:
    """Collects rows [b,...] of an array whose first axis is at most `count`."""

    def __init__(self, count: int):
        self._count, self._filled, self._array = count, 0, None

    def add(self, rows: np.ndarray) -> None:
        if self._array is None:
            size = self._count * rows[0].nbytes
            if size > cpu.memory():
                raise UserError(
                    f'{self._count:,} x {rows[0].shape} activations are {size / 1e9:.1f} GB, more than the '
                    'memory of this machine: give fewer images, or --layer with fewer activations'
                )
            self._array = np.empty((self._count, *rows.shape[1:]), rows.dtype)
        self._array[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def get(self) -> np.ndarray:
        """The rows added so far."""
        return self._array[: self._filled]


def main() -> None:
    parser = figures.parser(
        'features', __doc__, output='NPZ file (default: features-LAYER.npz in RUN)'
    )
    figures.add_pictures(parser, seed=False)
    parser.add_argument(
        '--split', choices=('val', 'train', 'test'), help='use a split of the store'
    )
    parser.add_argument(
        '--layer', help="(default: the last one before the logits, fc7 in the paper's network)"
    )
    parser.add_argument('--batch', type=int, default=100, help='images per step')
    parser.add_argument('--threads', type=int, default=0, help='reader threads; 0: one per core')
    args = figures.start(parser)
    if bool(args.images or args.list) == bool(args.split):
        raise UserError('give either images, folders or --list=FILE, or --split=val')
    trained = inference.describe_run(args.run)
    there = [*steps.activations(trained.net, trained.config['augment']['crop'])]
    layer = args.layer or there[-1]
    choose('--layer', layer, [*there, trained.net.names[-1]])
    output = figures.output(args, f'features-{layer.replace("/", "-")}.npz')
    paths = [] if args.split else figures.files(args)
    mesh = meshes.make((0, 0), towers=trained.net.towers, batches={'--batch': args.batch})
    if args.split:
        store = inference.open_store([trained], args.store)
        store.check_split(args.split)
    trained = inference.restore_run(trained, mesh, args.step)
    features = inference.make_features(trained, mesh, layer)
    names = trained.facts.names
    pictures, numbers = None, []
    if args.split:
        count = store.counts[args.split]
        rows = np.arange(args.batch)
        batches = eval_batches(store, args.split, batch=args.batch, rows=rows, threads=args.threads)
    else:
        count, size, exif = len(paths), trained.facts.mean.shape[0], trained.facts.exif
        pictures = figures.Pictures(
            count, lambda i: images.read(paths[i], size, exif=exif), args.threads
        )
        batches = _batches(pictures, args.batch, numbers)
    found = Rows(count)
    for batch in batches:
        found.add(features(batch))
    if pictures and pictures.all_failed():
        pictures.check()
    if args.split:
        facts = {'labels': store.labels(args.split), 'records': np.arange(count)}
    else:
        labels = [figures.label_of(paths[i], names) for i in numbers]
        labels = np.array([-1 if label is None else label for label in labels], np.int32)
        facts = {'labels': labels, 'paths': np.array([paths[i] for i in numbers])}
    facts |= {'names': np.array(names), 'layer': layer, 'step': trained.step}
    array = found.get()
    print(printable(f'{trained.title}: {layer}, f32{list(array.shape)}'))
    figures.write(output, lambda file: np.savez(file, features=array, **facts))
    if pictures:
        pictures.check()


def _batches(pictures: figures.Pictures, size: int, numbers: list[int]) -> Iterator[Batch]:
    """Yields padded batches of the images that can be read, and appends their indices."""
    for some, squares in pictures.batches(size):
        numbers += some
        yield from inference.padded(squares, size)


if __name__ == '__main__':
    command.run(main)
