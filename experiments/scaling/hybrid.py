"""'One weird trick' (Krizhevsky, 2014) as a small program: to be counted, not to train with.

Data-parallel convolutions, fully-connected layers divided by their units. No dropout and no update,
which move nothing; otherwise the function of `alexnet_jax.nets.alexnet`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from alexnet_jax.nets import alexnet, blocks, layers, network

SPECS = {
    ('fc6', 'kernel'): P(None, None, 'model'),
    ('fc6', 'bias'): P(None, 'model'),
    ('fc7', 'kernel'): P(None, None, 'model'),
    ('fc7', 'bias'): P(None, 'model'),
    ('fc8', 'kernel'): P(None, 'model', None),
}  # everything else: P()


def possible(net: alexnet.AlexNet, shards: int) -> bool:
    """Whether this program fits the network: fc6 and fc7 read all towers and divide evenly."""
    return {'fc6', 'fc7'} <= set(net.exchange) and not any(
        net.per_tower(n) % shards for n in net.hidden
    )


def make_gradients(net: alexnet.AlexNet, mesh: Mesh, *, crop: int) -> tuple[Callable, dict, P]:
    """(gradients, the specs of its parameters, the spec of its images and labels).

    gradients(params, images f32[B,H,W,3], labels i32[B]) -> the gradients of the mean loss. The
    images are divided over both axes of the mesh, the fully-connected layers over `model`.
    """
    shapes = network.shapes(net, crop)['params']
    specs = {
        layer: {name: SPECS.get((layer, name), P()) for name in leaves}
        for layer, leaves in shapes.items()
    }
    rows = P(('data', 'model'))
    last = f'{net.ops(len(net.kernels) - 1)[-1]}{len(net.kernels)}'  # 'pool5'

    def trunk(params, images):
        # Zeros in place of what comes after it, of which nothing is used: the compiler drops it all.
        zeros = {
            layer: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[layer])
            for layer in ('fc6', 'fc7', 'fc8')
        }
        return net.apply({'params': {**params, **zeros}}, images)[1][last]

    def loss(params, images, labels):
        def cast(layer):
            return params[layer]['kernel'].astype(net.dtype)

        def hidden(layer, x):
            y = jnp.einsum('bi,tio->bto', x, cast(layer))
            return blocks.ACTIVATIONS[net.activation](layers.add(y, params[layer]['bias'][None]))

        x = layers.exchange(trunk(params, images))
        x = lax.all_gather(x.reshape(x.shape[0], -1), 'model', axis=0, tiled=True)
        x = lax.all_gather(hidden('fc6', x), 'model', axis=2, tiled=True)
        x = hidden('fc7', x.reshape(x.shape[0], -1))
        parts = jnp.einsum('bti,tio->bo', x, cast('fc8')).astype(jnp.float32)
        logits = lax.psum_scatter(parts, 'model', scatter_dimension=0, tiled=True)
        logits = logits + params['fc8']['bias'].reshape(1, -1)
        truth = jax.nn.one_hot(labels, logits.shape[1])
        return -jnp.sum(truth * jax.nn.log_softmax(logits)) / (len(labels) * mesh.size)

    mapped = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(specs, rows, rows), out_specs=specs, check_vma=True
    )
    return jax.jit(mapped), specs, rows
