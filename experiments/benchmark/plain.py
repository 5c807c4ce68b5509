"""A straightforward JAX implementation of the network, as a baseline for the library's optimized one.

Both towers are in one array with grouped convolutions, pooling is `reduce_window` with the compiler's
gradient, normalization is a window sum and a power, and dropout draws a random number for every unit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import alexnet, blocks


def logits(net: alexnet.AlexNet, params: dict, images, key=None):
    """Computes the logits of `net.apply` from the same parameters; as in training if given a key."""
    same = net.exchange == ('conv3', 'fc6', 'fc7') and net.remove == 'none' and net.groups == 1
    if not same or net.norm_window != 'tower' or net.dropout_at != 'outputs':
        raise UserError('--plain supports only the networks of configs/paper.py and original.py')
    x = images.astype(net.dtype)
    for i in range(len(net.kernels)):
        kernel, bias = (params[f'conv{i + 1}'][name].astype(x.dtype) for name in ('kernel', 'bias'))
        padding = net.conv1_padding if i == 0 else (alexnet.PADDINGS[i],) * 2
        x = lax.conv_general_dilated(
            x,
            jnp.concatenate(list(kernel), axis=-1),
            (4, 4) if i == 0 else (1, 1),
            (padding, padding),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=1 if i in (0, 2) else net.towers,
        )
        x = x + bias.reshape(-1)
        for op in net.ops(i):
            x = _after(net, op, x)
    x = x.reshape(x.shape[0], -1)
    for i in range(2):
        layer = params[f'fc{6 + i}']
        x = x @ jnp.concatenate(list(layer['kernel'].astype(x.dtype)), axis=-1)
        x = blocks.ACTIVATIONS[net.activation](x + layer['bias'].astype(x.dtype).reshape(-1))
        if key is not None:
            x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape), x, 0)
        factor = {'original': 0.5 if key is None else 1.0, 'inverted': 1.0 if key is None else 2.0}
        x = x * factor.get(net.dropout, 1.0)
    kernel = params['fc8']['kernel'].astype(x.dtype)
    out = x @ kernel.reshape(-1, kernel.shape[-1])
    return out.astype(jnp.promote_types(jnp.float32, x.dtype)) + params['fc8']['bias']


def _after(net, op, x):
    if op == 'act':
        return blocks.ACTIVATIONS[net.activation](x)
    if op == 'pool':
        window, stride = alexnet.POOLING[net.pooling]
        ends = [(0, -(n - window) % stride) for n in x.shape[1:3]]
        return lax.reduce_window(
            x,
            np.array(-np.inf, x.dtype),
            lax.max,
            (1, window, window, 1),
            (1, stride, stride, 1),
            ((0, 0), *ends, (0, 0)),
        )
    norm = net.norm if op == 'norm' else alexnet.MAP_NORM
    n, towers = norm['n'], net.towers if op == 'norm' else 1
    window = (1, 1, 1, 1, n) if op == 'norm' else (1, n, n, 1, 1)
    split = x.reshape(*x.shape[:3], towers, -1)
    sums = lax.reduce_window(split**2, np.zeros((), x.dtype), lax.add, window, (1,) * 5, 'SAME')
    return (split / (norm['k'] + norm['alpha'] * sums) ** norm['beta']).reshape(x.shape)


def make_train_step(net: alexnet.AlexNet, optimizer, mean):
    """Like `steps.make_train_step`, but on one device and without color noise."""

    def step(state, batch, rates):
        x = batch['image'].astype(jnp.float32) - mean
        key = jax.random.fold_in(jax.random.key(0), state.step)

        def loss(params):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(net, params, x, key), batch['label']
            )
            return losses.mean(), losses

        grads, losses = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, rates=rates)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), losses

    return jax.jit(step, donate_argnums=0)


def make_predict(net: alexnet.AlexNet, mean):
    """Like `steps.make_predict` for the center crop, but on one device."""
    return jax.jit(
        lambda variables, images: jax.nn.softmax(
            logits(net, variables['params'], images.astype(jnp.float32) - mean)
        )
    )
