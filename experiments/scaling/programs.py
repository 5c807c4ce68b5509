"""Lowers training and evaluation for a mesh from shapes alone, without running or allocating anything."""

import collections
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import alexnet
from alexnet_jax.nets.build import build
from alexnet_jax.training import optim, steps
from alexnet_jax.training.setup import make_optimizer
from experiments.scaling import hlo
from experiments.scaling.formula import Move

Total = dict[tuple[str, str, str], list[int]]  # (kind, axis, dtype) -> [arrays, bytes]


def _array(shape, dtype, mesh, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def make_mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    """Makes a mesh of the first devices, as training does."""
    return meshes.make(shape, towers=shape[1], batches={})


def make_net(config, classes: int) -> alexnet.AlexNet:
    """Builds a config's network; UserError if it is not AlexNet, the only one that `formula` knows."""
    net = build(classes=classes, **config.model)
    if not isinstance(net, alexnet.AlexNet):
        raise UserError(
            f'config.model.net={config.model.net!r}: the formula only knows alexnet; give another --config'
        )
    return net


def train_step(config, classes: int, mesh: jax.sharding.Mesh, images: int) -> jax.stages.Lowered:
    """Lowers the step of `steps.make_train_step`, with `images` per device; no device is needed."""
    net, crop = make_net(config, classes), config.augment.crop
    optimizer = make_optimizer(config, net, mesh)
    step = steps.make_train_step(
        net,
        optimizer,
        mesh,
        seed=config.seed,
        mean=np.zeros((crop, crop, 3), np.float32),
        eigenvectors=np.eye(3),
        sigma=np.ones(3),
        **config.colour,
    )
    count = images * mesh.size
    batch = {
        'image': _array((count, crop, crop, 3), jnp.uint8, mesh, P('data')),
        'z': _array((count, 3), jnp.float32, mesh, P('data')),
        'label': _array((count,), jnp.int32, mesh, P('data')),
    }
    rates = optim.make_rates(examples=1000, batch=config.train.batch, **config.optim)(0, {})
    rates = {name: _array((), jnp.float32, mesh, P()) for name in rates if name != 'stop'}
    return _lower(step, mesh, steps.abstract_state(net, optimizer, mesh, crop), batch, rates)


def predict_step(
    config, classes: int, mesh: jax.sharding.Mesh, images: int, views: str
) -> jax.stages.Lowered:
    """Lowers `steps.make_predict`, with `images` per device."""
    net, crop, size = make_net(config, classes), config.augment.crop, config.data.size
    mean = np.zeros((size, size, 3), np.float32)
    predict = steps.make_predict(net, mesh, mean=mean, views=views, crop=crop)
    pixels = _array((images * mesh.size, size, size, 3), jnp.uint8, mesh, P('data'))
    return _lower(predict, mesh, steps.abstract_variables(net, mesh, crop), pixels)


def score_step(classes: int, mesh: jax.sharding.Mesh, images: int) -> jax.stages.Lowered:
    """Lowers `steps.make_score`, what `evaluate` adds to prediction, with `images` per device."""
    count = images * mesh.size
    probabilities = _array((count, classes), jnp.float32, mesh, P('data'))
    labels, mask = (_array((count,), dtype, mesh, P('data')) for dtype in (jnp.int32, jnp.float32))
    return _lower(steps.make_score(mesh), mesh, probabilities, labels, mask)


def _lower(function, mesh: jax.sharding.Mesh, *args) -> jax.stages.Lowered:
    platform = mesh.devices.flat[0].platform
    platforms = ('cuda' if platform == 'gpu' else platform,)
    return function.trace(*args).lower(lowering_platforms=platforms)


def written(lowered: jax.stages.Lowered, shape: tuple[int, int]) -> list[Move]:
    """Returns what a program moves before compilation, in order.

    Dtypes are read here because XLA's CPU backend sends bfloat16 as float32, which accelerators do not.
    """
    return found(lowered.as_text(dialect='hlo'), shape)


def found(text: str, shape: tuple[int, int]) -> list[Move]:
    """Returns the collectives of HLO text as moves on a (data, model) mesh."""
    return [
        Move(c.kind, hlo.axis(c.groups, shape), c.dtype, c.elements) for c in hlo.collectives(text)
    ]


def totals(moves: Iterable[Move]) -> Total:
    """Returns the number of arrays and bytes of each kind, axis and dtype."""
    total: Total = {}
    for move in moves:
        entry = total.setdefault((move.kind, move.axis, move.dtype), [0, 0])
        entry[0] += 1
        entry[1] += move.elements * hlo.BYTES[move.dtype]
    return total


def same(one: Iterable[Move], other: Iterable[Move], *, dtypes: bool = True) -> bool:
    """Returns whether both move the same number of elements by kind and axis (and dtype, if `dtypes`)."""

    def count(moves):
        total = collections.Counter()
        for move in moves:
            total[move.kind, move.axis, move.dtype if dtypes else ''] += move.elements
        return total

    return count(one) == count(other)
