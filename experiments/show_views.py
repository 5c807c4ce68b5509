"""Draws what the network sees of one image: 16 training views and the ten test crops (§4.1).

    python -m experiments.show_views --store=DIR [--index=0 --out=views.png]

A training view is exactly what one epoch of training sees: the image cropped and mirrored by the data
pipeline at its position in that epoch, with that position's color noise. The mean image is added back after
being subtracted, and values outside 0..255 are clipped.
"""

import numpy as np

from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import sampler
from alexnet_jax.input.batches import eval_batches, train_batches
from alexnet_jax.input.images import central
from alexnet_jax.input.store import Store, open_store
from alexnet_jax.training import steps

View = tuple[str, np.ndarray]  # a label, and u8[crop,crop,3]


def training_views(
    store: Store, index: int, *, crop: int, epochs: int, seed: int, chunk: int, std: float
) -> list[View]:
    """Returns the views of training image `index` in the first epochs of a run with this seed.

    seed, chunk and std are `config.seed`, `config.augment.chunk` and `config.colour.std`.
    """
    mean = central(store.mean, crop)
    total, room = store.counts['train'], store.size - crop
    views = []
    for epoch in range(epochs):
        order = sampler.records(seed, epoch * total + np.arange(total), total)
        position = epoch * total + int(np.flatnonzero(order == index)[0])
        # With a batch of one, steps are positions.
        batches = train_batches(
            store,
            seed=seed,
            batch=1,
            start=position,
            stop=position + 1,
            rows=np.arange(1),
            crop=crop,
            chunk=chunk,
            random=True,
            threads=1,
        )
        batch = next(batches)
        noise = batch['z'] @ steps.noise_axes(store.eigenvectors, store.sigma, std).T
        seen = np.asarray(steps.normalize(batch['image'], mean, noise))[0] + mean
        draw = sampler.draws(seed, position, 1, room=room, chunk=chunk)
        mirrored = ', mirrored' if draw.flip[0] else ''
        levels = ' '.join(f'{level:+.0f}' for level in noise[0])
        label = f'({draw.y[0]}, {draw.x[0]}){mirrored}\nRGB {levels}'
        views.append((label, np.clip(np.round(seen), 0, 255).astype(np.uint8)))
    return views


def ten_crops(store: Store, index: int, *, crop: int) -> list[View]:
    """Returns the ten views that are averaged at test time, in the order of `steps.VIEWS`."""
    total, room = store.counts['train'], store.size - crop
    batches = eval_batches(store, 'train', batch=total, rows=np.array([index]), threads=1)
    picture = next(batches)['image'][0]
    names = ['top left', 'top right', 'center', 'bottom left', 'bottom right']
    views = []
    for name, (y, x, flip) in zip(names * 2, steps.VIEWS['ten'], strict=True):
        y, x = int(y * room), int(x * room)
        view = picture[y : y + crop, x : x + crop]
        views.append((name + ', mirrored' * flip, view[:, ::-1] if flip else view))
    return views


def draw(training: list[View], testing: list[View], title: str, out: str) -> None:
    """Draws both sets of views into one image file."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 10), layout='constrained')
    figure.suptitle(title)
    for part, views, name in zip(
        figure.subfigures(2, 1), (training, testing), ('training', 'test'), strict=True
    ):
        part.suptitle(f'{len(views)} {name} views')
        for axes, (label, picture) in zip(
            part.subplots(2, len(views) // 2).flat, views, strict=True
        ):
            axes.imshow(picture, interpolation='nearest')
            axes.set_title(label, fontsize=8)
            axes.axis('off')
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.show_views', description=__doc__, formatter_class=Help
    )
    parser.add_argument('--store', required=True, help='a folder written by prepare')
    parser.add_argument('--index', type=int, default=0, help='the training image to show')
    parser.add_argument('--out', default='views.png', help='the image file to write')
    parser.add_argument(
        '--crop', type=int, default=0, help='pixels; 0: 7/8 of the image size (224 of 256)'
    )
    parser.add_argument('--seed', type=int, default=0, help="the run's seed")
    parser.add_argument('--chunk', type=int, default=1, help='images that share a crop and flip')
    parser.add_argument(
        '--std', type=float, default=0.1, help='standard deviation of the color noise'
    )
    args = parser.parse_args()
    store = open_store(args.store)
    crop = args.crop or store.size * 7 // 8
    count = store.counts['train']
    if not 0 <= args.index < count:
        raise UserError(f'--index={args.index}: {store.path} has training images 0..{count - 1}')
    training = training_views(
        store, args.index, crop=crop, epochs=16, seed=args.seed, chunk=args.chunk, std=args.std
    )
    name = store.names[store.labels('train')[args.index]]
    title = f'{store.source}, training image {args.index}: {name}'
    draw(training, ten_crops(store, args.index, crop=crop), title, args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
