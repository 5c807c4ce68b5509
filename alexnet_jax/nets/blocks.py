"""Shared by the networks: initializers, and layers in towers as Flax modules.

Parameters have a leading tower axis; activations are tuples with one array per tower of this device.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices.backend import choices
from alexnet_jax.nets import layers, network

ACTIVATIONS = {'relu': nn.relu, 'tanh': jnp.tanh}
BOUNDS = {'tanh': 1.0}  # of the outputs' absolute values, for activations bounded on both sides


def dtypes() -> tuple[str, ...]:
    """The available compute dtypes; float64 only where JAX enables it, as in tests."""
    return ('float32', 'bfloat16', *(('float64',) if jax.config.jax_enable_x64 else ()))


def params_of(module, kernel_shape, bias_shape=None):
    """A layer's kernel [towers,...,I,O] in the compute dtype, and its bias [towers,O] or `bias_shape`.

    A layer whose `bias_init` is None has no bias; it is 0.
    """
    fan_in = math.prod(kernel_shape[1:-1])
    bias_shape = bias_shape or (kernel_shape[0], kernel_shape[-1])
    kernel = module.param('kernel', module.kernel_init(fan_in), kernel_shape)
    if module.bias_init is None:
        return kernel.astype(module.dtype), jnp.zeros(bias_shape)
    bias = module.param('bias', module.bias_init(fan_in), bias_shape)
    return kernel.astype(module.dtype), bias


def of_towers(x):
    """[towers,...] -> one [...] per tower.

    Uses a split, whose gradients are concatenated; with indexing they would be summed.
    """
    return tuple(part[0] for part in lax.split(x, (1,) * x.shape[0]))


def uniform(fan_in: int):
    """PyTorch's default for kernels and biases: uniform within ±1/sqrt(fan-in)."""
    return _drawn(lambda key, shape: fan_in**-0.5 * jax.random.uniform(key, shape, minval=-1))


def gaussian(std: float):
    """An untruncated normal distribution with mean 0."""
    return _drawn(lambda key, shape: std * jax.random.normal(key, shape))


def _drawn(draw):
    """An initializer that draws a flat array: the same numbers, but it compiles five times as fast."""
    return lambda key, shape: draw(key, (math.prod(shape),)).reshape(shape)


class Conv(nn.Module):
    """One convolutional layer in each local tower: n x [B,H,W,C] -> n x [B,H',W',features]."""

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
            # Convolve slices, since a grouped convolution is many times slower on CPUs.
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
    """One fully connected hidden layer in each local tower: n x [B,I] -> n x [B,features]."""

    features: int
    kernel_init: Any
    bias_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, xs):
        kernels, biases = params_of(self, (len(xs), xs[0].shape[-1], self.features))
        if choices().operators:
            return tuple(map(layers.dense, xs, of_towers(kernels), of_towers(biases)))
        # One product for all towers avoids copying these large kernels and gradients.
        return of_towers(layers.dense(jnp.stack(xs), kernels, biases))


class Logits(nn.Module):
    """The last layer: one partial product per device, summed over all towers, plus a bias -> f32[B,K]."""

    classes: int
    kernel_init: Any
    bias_init: Any
    dtype: Any
    axis: str | None

    @nn.compact
    def __call__(self, xs):
        shape = (len(xs), xs[0].shape[-1], self.classes)
        kernels, bias = params_of(self, shape, bias_shape=(self.classes,))
        wide = layers.wide(self.dtype)
        x, kernel = jnp.concatenate(xs, axis=-1), kernels.reshape(-1, self.classes)
        total = layers.dense(x, kernel, dtype=wide)
        total = lax.psum(total, self.axis) if self.axis else total
        return layers.add(total, bias.reshape(1, -1))


class Towers(network.Network):
    """The base of networks in towers that begin with a convolution `conv1` and end with `fc8`.

    They have the fields width, towers, local_towers (those on this device) and model_axis (the mesh axis that
    has the others), and perhaps groups and data_axis (see `layers.BatchNorm`).
    """

    @property
    def first(self) -> tuple[str, ...]:
        return ('conv1',)

    @nn.nowrap
    def first_kernels(self, params: dict) -> jax.Array | None:
        return params['conv1']['kernel'] if 'conv1' in params else None

    @nn.nowrap
    def partition(self, path: network.Path) -> P:
        """Shards everything over the towers except the single bias of the last layer."""
        return P() if path == ('fc8', 'bias') else P('model')

    @nn.nowrap
    def local(self, shards: int, data_axis: str | None) -> network.Network:
        changes = {'data_axis': data_axis} if hasattr(self, 'data_axis') else {}
        axis = 'model' if shards > 1 else None
        return self.clone(local_towers=self.towers // shards, model_axis=axis, **changes)

    @nn.nowrap
    def per_tower(self, channels: int) -> int:
        """One tower's share of `channels` kernels or units, counted at width 1 over all towers.

        Raises UserError if towers and groups do not divide them.
        """
        groups = getattr(self, 'groups', 1)
        each = channels * self.width / self.towers / groups
        if each < 1 or each != int(each):
            raise UserError(
                f'config.model: {channels} kernels or units at width={self.width} cannot be divided '
                f'over towers={self.towers} and groups={groups} ({each:.4g} each): choose '
                'counts that divide evenly'
            )
        return int(each) * groups

    @property
    def _count(self) -> int:
        """The number of towers on this device."""
        return self.local_towers or self.towers

    def _tower(self, t):
        """The index in the whole network of this device's tower t."""
        return lax.axis_index(self.model_axis) * self._count + t if self.model_axis else t

    def _exchange(self, xs):
        """Every tower of this device gets the channels of all towers."""
        return (layers.exchange(xs, self.model_axis),) * self._count


# For networks without towers.


class OneTower(network.Network):
    """The base of networks without towers that begin with a convolution `conv1`.

    One with batch normalization has a field `data_axis`, see `layers.BatchNorm`.
    """

    towers = 1

    @property
    def first(self) -> tuple[str, ...]:
        return ('conv1',)

    @nn.nowrap
    def first_kernels(self, params: dict) -> jax.Array:
        return params['conv1']['kernel'][None]

    @nn.nowrap
    def local(self, shards: int, data_axis: str | None) -> network.Network:
        del shards
        return self.clone(data_axis=data_axis) if hasattr(self, 'data_axis') else self


PADDINGS = ('tensorflow', 'torch')
he_uniform = nn.initializers.variance_scaling(2.0, 'fan_in', 'uniform')
_he_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def same(size: int, stride: int, convention: str, x) -> layers.Padding:
    """The padding of a convolution of x[B,H,W,C] that keeps the size (stride 1) or halves it, rounded up.

    With stride 2, 'tensorflow' pads even sizes by one pixel less at the top and left.
    """
    after, less = size // 2, convention == 'tensorflow' and stride == 2
    return tuple((after - (less and side % 2 == 0), after) for side in x.shape[1:3])


class Common(NamedTuple):
    """What the `ConvNorm`s of a network share."""

    activation: Callable | None
    data_axis: str | None
    momentum: float  # of the running statistics
    epsilon: float
    dtype: Any


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization, an activation: [B,H,W,C] -> [B,H',W',features].

    depthwise: each channel has its own kernel, and `features` is the number of channels.
    """

    features: int
    size: int
    stride: int = 1
    padding: layers.Padding = ((0, 0), (0, 0))
    depthwise: bool = False
    _: dataclasses.KW_ONLY
    common: Common

    @nn.compact
    def __call__(self, x, train):
        spatial = (self.size, self.size)
        where = {'stride': self.stride, 'padding': self.padding}
        if self.depthwise:
            init = nn.initializers.normal((2 / self.size**2) ** 0.5)
            kernel = self.param('depthwise', init, (*spatial, self.features))
            x = layers.depthwise(x, kernel.astype(self.common.dtype), **where)
        else:
            kernel = self.param('kernel', _he_normal, (*spatial, x.shape[-1], self.features))
            x = layers.conv(x, kernel.astype(self.common.dtype), **where)
        _, axis, momentum, epsilon, _ = self.common
        x = layers.BatchNorm(axis, momentum, epsilon, name='norm')(x, train)
        return self.common.activation(x) if self.common.activation else x


def head(classes: int, dtype) -> nn.Dense:
    """The last layer of a network that ends with the average of its maps."""
    return nn.Dense(classes, dtype=dtype, kernel_init=nn.initializers.normal(0.01), name='fc')


def check_positive(**fields: float) -> None:
    """Raises UserError for fields of `config.model` that are not above 0."""
    for name, value in fields.items():
        if not value > 0:
            raise UserError(f'config.model.{name}={value}: must be above 0')


def check_dropout(rate: float) -> None:
    """Raises UserError for an impossible dropout rate."""
    if not 0 <= rate < 1:
        raise UserError(f'config.model.dropout={rate}: must be at least 0 and below 1')


def check_norm(momentum: float, epsilon: float) -> None:
    """Raises UserError for impossible values of batch normalization."""
    if not 0 <= momentum < 1:
        raise UserError(f'config.model.norm_momentum={momentum}: must be at least 0 and below 1')
    check_positive(norm_epsilon=epsilon)
