"""Shared by the networks: initializers, and layers in towers as Flax modules.

Parameters have a leading tower axis; activations are tuples with one array per tower of this device.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.nets import layers

ACTIVATIONS = {'relu': nn.relu, 'tanh': jnp.tanh}
BOUNDS = {'tanh': 1.0}  # of the outputs' absolute values, if there is one on both sides


def dtypes() -> tuple[str, ...]:
    """The available compute dtypes; float64 only where JAX enables it, as in tests."""
    return ('float32', 'bfloat16', *(('float64',) if jax.config.jax_enable_x64 else ()))


def params_of(module, kernel_shape, bias_shape=None):
    """A layer's kernel [towers,...,I,O] in the compute dtype, and its bias [towers,O] or `bias_shape`."""
    fan_in = math.prod(kernel_shape[1:-1])
    bias_shape = bias_shape or (kernel_shape[0], kernel_shape[-1])
    kernel = module.param('kernel', module.kernel_init(fan_in), kernel_shape)
    bias = module.param('bias', module.bias_init(fan_in), bias_shape)
    return kernel.astype(module.dtype), bias


def of_towers(x):
    """[towers,...] -> [...] of each. Splits, so that gradients are concatenated; indexing sums them."""
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
        wide = jnp.promote_types(jnp.float32, self.dtype)
        x, kernel = jnp.concatenate(xs, axis=-1), kernels.reshape(-1, self.classes)
        total = layers.dense(x, kernel, dtype=wide)
        total = lax.psum(total, self.axis) if self.axis else total
        return layers.add(total, bias.reshape(1, -1))
