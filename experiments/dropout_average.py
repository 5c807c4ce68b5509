"""Measures how well halved outputs approximate the average of all dropout networks (§4.2).

    python -m experiments.dropout_average quickstart --store=FOLDER

The paper: multiplying outputs by 0.5 at test time is "a reasonable approximation to taking the geometric mean
of the predictive distributions produced by the exponentially-many dropout networks". The normalized geometric
mean of softmaxes is the softmax of the mean logits, here over random masks, drawn for each image. Prints the
mean Kullback-Leibler divergence from it and how often the most probable class agrees, in test mode and, as a
control, in test mode without halving.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import figures
from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import central
from alexnet_jax.nets import network
from alexnet_jax.training import inference, steps

BATCH = 100


def compare(net, variables, x: jax.Array, masks: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compares test mode, 'halved' and 'not halved', with the geometric mean over random masks.

    x: f32[B,H,W,3], normalized. Returns the divergence in nats, f32[B], and whether the most probable class
    is the same, bool[B].
    """

    def add(total, key):
        train = network.Training(key, jnp.arange(len(x)))
        return total + network.apply(net, variables, x, train)[0], None

    keys = jax.random.split(jax.random.key(0), masks)
    mean = jax.lax.scan(add, jnp.zeros((len(x), net.classes)), keys)[0] / masks
    target, found = jax.nn.log_softmax(mean), {}
    for name, one in {'halved': net, 'not halved': net.clone(dropout='none')}.items():
        logits = network.apply(one, variables, x)[0]
        gap = jnp.exp(target) * (target - jax.nn.log_softmax(logits))
        found[name] = (gap.sum(1), logits.argmax(1) == mean.argmax(1))
    return found


def batches(trained: inference.Run, store, images: int) -> Iterator[jax.Array]:
    """Yields normalized center crops of validation images spread over the split, f32[B,H,W,3]."""
    crop, count = trained.config['augment']['crop'], store.counts['val']
    chosen = np.linspace(0, count - 1, min(count, images)).astype(int)
    mean = central(trained.facts.mean, crop)
    for start in range(0, len(chosen), BATCH):
        squares = figures.squares(store, 'val', chosen[start : start + BATCH])
        yield steps.normalize(central(squares, crop), mean)


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.dropout_average', description=__doc__, formatter_class=Help
    )
    parser.add_argument('run', help='a run directory, or the name of a pre-trained network')
    parser.add_argument('--store', default='', help='a folder written by prepare')
    parser.add_argument('--images', type=int, default=1000, help='validation images')
    parser.add_argument('--masks', type=int, default=1000, help='dropout networks per image')
    args = parser.parse_args()
    for name in ('images', 'masks'):
        if (value := getattr(args, name)) < 1:
            raise UserError(f'--{name}={value}: must be at least 1')
    meshes.configure()
    trained = inference.open_run(args.run, meshes.make((1, 1), towers=1, batches={}))
    if getattr(trained.net, 'dropout', '') != 'original':
        raise UserError(
            f"{args.run}: has no dropout with halved outputs; give a run with config.model.dropout='original'"
        )
    measure = jax.jit(lambda variables, x: compare(trained.net, variables, x, args.masks))
    images = batches(trained, inference.open_store([trained], args.store), args.images)
    found = [jax.device_get(measure(trained.variables, x)) for x in images]
    for name in found[0]:
        gap, same = (np.concatenate(parts) for parts in zip(*(f[name] for f in found), strict=True))
        print(f'{name:<11} divergence {gap.mean():.4f} nats, same class {100 * same.mean():.1f}%')
    print(f'{len(gap):,} images, {args.masks:,} masks each')


if __name__ == '__main__':
    run(main)
