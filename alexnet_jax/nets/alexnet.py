"""The network: five or six convolutional layers, two hidden layers, a softmax layer, in towers.

Parameters carry a leading axis over the towers, which the mesh axis `model` may divide; activations
are tuples with the arrays of this device's towers. `build.build` makes the network from the
fields of `config.model`.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from alexnet_jax.nets import layers

# kernel sizes of conv1 to conv6, pixels (§3.5; conv6: the source's #146)
SIZES = (11, 5, 3, 3, 3, 3)
PADDINGS = (None, 2, 1, 1, 1, 1)  # pixels on every side; conv1's is a switch
# Run #147: pooling without overlap comes with less padding, so that layer 5 again ends at 6 x 6.
DISJOINT_PADDINGS = (None, 1, 1, 1, 0, 1)
POOLING = {'overlapping': (3, 2), 'disjoint': (2, 2)}  # window and stride (§3.4)
ACTIVATIONS = {'relu': nn.relu, 'tanh': jnp.tanh}
MAP_NORM = {'alpha': 0.001 / 25, 'k': 1.0, 'n': 5, 'beta': 0.75}  # the source's `cnorm2`, #145
GROUPED = ('conv2', 'conv4', 'conv5')  # what sees only half of the maps in the paper's network
UNGROUPED = (('conv1', 'conv2'), ('conv3', 'conv4'))  # without the first, the second sees them all


def dtypes() -> tuple[str, ...]:
    """The compute dtypes; float64 for tests, since JAX has it off by default."""
    return ('float32', 'bfloat16', *(('float64',) if jax.config.jax_enable_x64 else ()))


def padding_of(i: int, pooling: str, size: int, first: int) -> int:
    """Padding of conv{i + 1}, i > 0, pixels, where it reads `size` rows and conv1 gives `first`."""
    # From 112-pixel crops #147 would end at 2 x 2, not at 3 x 3 as with overlap: conv5 keeps its padding.
    small = i == 4 and (size + 2 * DISJOINT_PADDINGS[i] - 1) // 2 < first // 8
    return (PADDINGS if small or pooling == 'overlapping' else DISJOINT_PADDINGS)[i]


def params_of(module, kernel_shape, bias_shape=None):
    """A layer's kernel [towers,...,I,O] in the compute dtype, and its bias, [towers,O] unless given."""
    fan_in = math.prod(kernel_shape[1:-1])
    bias_shape = bias_shape or (kernel_shape[0], kernel_shape[-1])
    kernel = module.param('kernel', module.kernel_init(fan_in), kernel_shape)
    bias = module.param('bias', module.bias_init(fan_in), bias_shape)
    return kernel.astype(module.dtype), bias


def of_towers(x):
    """[towers,...] -> [...] of each. Split, not indexed: so the gradients are joined, and not added up."""
    return tuple(part[0] for part in lax.split(x, (1,) * x.shape[0]))


def uniform(fan_in: int):
    """PyTorch's default for kernels and biases: uniform within ±1/sqrt(fan-in)."""
    return _drawn(lambda key, shape: fan_in**-0.5 * jax.random.uniform(key, shape, minval=-1))


def gaussian(std: float):
    """Normal, untruncated, of mean 0."""
    return _drawn(lambda key, shape: std * jax.random.normal(key, shape))


def _drawn(draw):
    """An initializer that draws flat: the same numbers, and compiled five times as fast."""
    return lambda key, shape: draw(key, (math.prod(shape),)).reshape(shape)


class Conv(nn.Module):
    """One convolutional layer of every local tower: n x [B,H,W,C] -> n x [B,H',W',features]."""

    features: int
    size: int
    stride: int
    padding: layers.Padding
    groups: int
    kernel_init: Any
    bias_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, xs):
        c, o = xs[0].shape[-1] // self.groups, self.features // self.groups
        kernels, biases = params_of(self, (len(xs), self.size, self.size, c, self.features))

        def conv(x, kernel, bias):
            return layers.conv(x, kernel, bias, stride=self.stride, padding=self.padding)

        def one(x, kernel, bias):
            # Groups are slices: a grouped convolution is many times slower on a CPU.
            parts = [
                conv(
                    x[..., g * c : (g + 1) * c],
                    kernel[..., g * o : (g + 1) * o],
                    bias[g * o : (g + 1) * o],
                )
                for g in range(self.groups)
            ]
            return jnp.concatenate(parts, axis=-1) if self.groups > 1 else parts[0]

        if len(xs) > 1 and self.groups == 1 and all(x is xs[0] for x in xs):
            # The towers read the same maps: one wide convolution is faster than several.
            wide = conv(xs[0], jnp.concatenate(of_towers(kernels), axis=-1), biases.reshape(-1))
            return tuple(jnp.split(wide, len(xs), axis=-1))
        return tuple(map(one, xs, of_towers(kernels), of_towers(biases)))


class Hidden(nn.Module):
    """One fully-connected hidden layer of every local tower: n x [B,I] -> n x [B,features]."""

    features: int
    kernel_init: Any
    bias_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, xs):
        kernels, biases = params_of(self, (len(xs), xs[0].shape[-1], self.features))
        # One product for all towers: nothing of these large kernels and gradients is copied.
        return of_towers(layers.dense(jnp.stack(xs), kernels, biases))


class Logits(nn.Module):
    """The last layer: a partial product per device, summed over all towers; one bias -> f32[B,K]."""

    classes: int
    kernel_init: Any
    bias_init: Any
    dtype: Any
    axis: str | None

    @nn.compact
    def __call__(self, xs):
        shape = (len(xs), xs[0].shape[-1], self.classes)
        kernels, bias = params_of(self, shape, bias_shape=(self.classes,))
        wide = jnp.promote_types(jnp.float32, self.dtype)
        x, kernel = jnp.concatenate(xs, axis=-1), kernels.reshape(-1, self.classes)
        total = layers.dense(x, kernel, dtype=wide)
        total = lax.psum(total, self.axis) if self.axis else total
        return layers.add(total, bias.reshape(1, -1))


class AlexNet(nn.Module):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every intermediate by name).

    `local_towers` counts the towers of this device, `axis` is the mesh axis over which the others
    lie, None if there are none. Channel counts are those of one tower.
    """

    classes: int
    kernels: tuple[int, ...]
    hidden: tuple[int, ...]
    groups: int
    exchange: tuple[str, ...]
    remove: str
    activation: str
    after: tuple[str, ...]
    norm: dict
    norm_window: str
    pooling: str
    dropout: str
    dropout_at: str
    conv1_padding: tuple[int, int]
    kernel_inits: tuple
    bias_inits: tuple
    dtype: Any
    local_towers: int
    axis: str | None

    @property
    def names(self) -> list[str]:
        """Every intermediate in the order of the forward pass, and the last layer."""
        names = []
        for i, ops in enumerate(self.after, start=1):
            names += [f'conv{i}', *(f'{op}{i}' for op in ops.split())]
        return [*names, *(f'fc{i + 6}' for i in range(len(self.hidden))), 'fc8']

    @nn.compact
    def __call__(self, images, dropout_key=None, rows=None):
        """With a dropout key and the images' rows i32[B] in the global batch: as in training."""
        out = {}
        xs = (images.astype(self.dtype),) * self.local_towers
        first = 0  # rows that conv1 gives
        for i, features in enumerate(self.kernels):
            name, after = f'conv{i + 1}', self.after[i].split()
            if name in self.exchange:
                xs = (layers.exchange(xs, self.axis),) * self.local_towers
            if name == self.remove:
                after = [op for op in after if op == 'pool']
                if i == 0:
                    xs = tuple(self._centres(x) for x in xs)
            else:
                size = xs[0].shape[1]
                padding = (
                    (padding_of(i, self.pooling, size, first),) * 2 if i else self.conv1_padding
                )
                # After conv1 or conv3, which read everything, conv2 and conv4 read halves of it.
                # Without them they read everything themselves.
                halves = name in GROUPED and (self.remove, name) not in UNGROUPED
                xs = Conv(
                    features,
                    SIZES[i],
                    stride=4 if i == 0 else 1,
                    padding=(padding, padding),
                    groups=self.groups if halves else 1,
                    kernel_init=self.kernel_inits[i],
                    bias_init=self.bias_inits[i],
                    dtype=self.dtype,
                    name=name,
                )(xs)
                out[name] = xs
            first = first or xs[0].shape[1]
            for op in after:
                xs = out[f'{op}{i + 1}'] = self._apply(op, xs)

        for i, features in enumerate(self.hidden):
            name, n = f'fc{i + 6}', len(self.kernels) + i
            if self.dropout_at == 'inputs':
                xs = self._dropout(xs, i, dropout_key, rows)
            if name in self.exchange:
                xs = (layers.exchange(xs, self.axis),) * self.local_towers
            xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
            inits = self.kernel_inits[n], self.bias_inits[n]
            xs = Hidden(features, *inits, dtype=self.dtype, name=name)(xs)
            xs = out[name] = tuple(ACTIVATIONS[self.activation](x) for x in xs)
            if self.dropout_at == 'outputs':
                xs = self._dropout(xs, i, dropout_key, rows)
        inits = self.kernel_inits[-1], self.bias_inits[-1]
        logits = Logits(self.classes, *inits, dtype=self.dtype, axis=self.axis, name='fc8')(xs)
        return logits, out

    def _apply(self, op, xs):
        if op == 'act':
            return tuple(ACTIVATIONS[self.activation](x) for x in xs)
        if op == 'pool':
            window, stride = POOLING[self.pooling]
            return tuple(layers.max_pool(x, window=window, stride=stride) for x in xs)
        if op == 'map_norm':
            return tuple(layers.map_norm(x, **MAP_NORM) for x in xs)
        if self.norm_window == 'tower':
            return tuple(layers.lrn(x, **self.norm) for x in xs)
        x = layers.lrn(layers.exchange(xs, self.axis), **self.norm)
        c = xs[0].shape[-1]
        starts = [self._tower(t) * c for t in range(self.local_towers)]
        return tuple(lax.dynamic_slice_in_dim(x, start, c, axis=3) for start in starts)

    def _centres(self, x):
        """What stands in for a removed conv1: the pixels at the centres of its windows."""
        start = SIZES[0] // 2 - self.conv1_padding[0]
        height, width = ((n + sum(self.conv1_padding) - SIZES[0]) // 4 + 1 for n in x.shape[1:3])
        return x[:, start::4, start::4][:, :height, :width]

    def _tower(self, t):
        """The number, in the whole network, of this device's tower t."""
        return lax.axis_index(self.axis) * self.local_towers + t if self.axis else t

    def _dropout(self, xs, i, key, rows):
        """§4.2: in training half of the units are 0, at test time all are halved; nothing rescaled.

        'inverted', Caffe's and torchvision's form, doubles in training and does nothing at test time.
        """
        if self.dropout == 'none':
            return xs
        if key is None:
            return xs if self.dropout == 'inverted' else tuple(x * 0.5 for x in xs)
        scale = 2.0 if self.dropout == 'inverted' else 1.0
        key = jax.random.fold_in(key, i)

        def one(t, x):
            units = x.size // x.shape[0]
            mask = layers.dropout_mask(key, rows, self._tower(t), units).reshape(x.shape)
            return jnp.where(mask, x * jnp.asarray(scale, x.dtype), jnp.zeros_like(x))

        return tuple(one(t, x) for t, x in enumerate(xs))


def localize(net: AlexNet, shards: int) -> AlexNet:
    """The network as one of `shards` devices along the mesh axis `model` sees it."""
    if shards == 1:
        return net
    return net.clone(local_towers=net.local_towers // shards, axis='model')


def init(net: AlexNet, seed: int, crop: int) -> dict:
    """Fresh parameters, f32, a pure function of the seed: {layer: {'kernel', 'bias'}}."""
    images = jnp.zeros((1, crop, crop, 3))
    return net.init(jax.random.key(seed), images)['params']


def param_specs(params: dict, shards: int) -> dict:
    """How `shards` devices along the mesh axis `model` divide parameters: over the towers.

    All but the one bias of the last layer. With one shard nothing is divided.
    """

    def spec(layer, name):
        return P() if shards == 1 or (layer, name) == ('fc8', 'bias') else P('model')

    return {layer: {name: spec(layer, name) for name in leaves} for layer, leaves in params.items()}
