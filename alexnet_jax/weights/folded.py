"""Batch normalization for networks whose published weights have it folded into the convolutions."""

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.nets import layers
from alexnet_jax.nets.network import Network, names_of
from alexnet_jax.weights import variables


def unfolded(net: Network, folded: dict, batches: Iterable) -> dict:
    """Returns variables of the same function whose normalizations have the statistics of these images.

    folded: variables whose normalizations only add a bias (`variables.without_norm`) or, more generally,
    are not those of the images; batches: f32[B,H,W,3] each, of equal size, mean subtracted. With mu and
    sigma² of a channel before its normalization, the scale becomes sigma and the bias b + mu, so training
    mode now computes almost what test mode does, and training can continue from here.
    """
    moments = jax.jit(lambda images: _moments(net, folded, images))
    total, count = None, 0
    for images in batches:
        one = moments(images)
        total = one if total is None else jax.tree.map(jnp.add, total, one)
        count += 1
    found = {names_of(path): leaf for path, leaf in jax.tree.leaves_with_path(folded)}
    for layer, sums in jax.device_get(total).items():
        mean, square = (x.astype(np.float64) / count for x in sums)
        scale, bias, old_mean, old_var = (
            np.asarray(found[(kind, *layer, name)], np.float64)
            for kind, name in (
                ('params', 'scale'),
                ('params', 'bias'),
                ('batch_stats', 'mean'),
                ('batch_stats', 'var'),
            )
        )
        factor = scale / np.sqrt(old_var + net.norm_epsilon)
        var = np.maximum(square - mean**2, 0)
        new = {
            ('params', 'scale'): factor * np.sqrt(var + net.norm_epsilon),
            ('params', 'bias'): bias + factor * (mean - old_mean),
            ('batch_stats', 'mean'): mean,
            ('batch_stats', 'var'): var,
        }
        for (kind, name), value in new.items():
            old = found[(kind, *layer, name)]
            found[(kind, *layer, name)] = value.astype(old.dtype)
    return variables.nest(found)


def _moments(net: Network, folded: dict, images) -> dict:
    """{layer: (mean, mean of squares) of what its normalization gets at test time}, of one batch."""
    found = {}

    def keep(call, args, kwargs, context):
        if isinstance(context.module, layers.BatchNorm):
            x = args[0].astype(layers.wide(args[0].dtype))
            axes = (*range(x.ndim - 1),)
            found[context.module.path] = x.mean(axes), (x**2).mean(axes)
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        net.apply(folded, images)
    return found
