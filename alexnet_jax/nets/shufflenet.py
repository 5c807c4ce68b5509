"""ShuffleNet v2 (Ma et al., 2018) in torchvision's form: halves of the channels, shuffled by each unit.

The authors' own code (Megvii) keeps the projection's input width in blocks with stride 2, and its last
layer has no bias: 2,278,760 parameters at x1.0 instead of 2,278,604.
"""

import flax.linen as nn
import jax.numpy as jnp

from alexnet_jax.common.errors import choose
from alexnet_jax.nets import blocks, layers, network

# channels of stages 2 to 4 and conv5
SIZES = {'x0.5': (48, 96, 192, 1024), 'x1.0': (116, 232, 464, 1024)}
REPEATS = (4, 8, 4)


def shuffle(x):
    """[B,H,W,C] -> the same, with the channels of the two halves alternating."""
    x = x.reshape(*x.shape[:3], 2, -1)
    return jnp.swapaxes(x, 3, 4).reshape(*x.shape[:3], -1)


class Unit(nn.Module):
    """Half of the channels bypass the convolutions (stride 1) or are downsampled too (stride 2)."""

    features: int
    stride: int
    common: blocks.Common

    @nn.compact
    def __call__(self, x, train):
        half, linear = self.features // 2, self.common._replace(activation=None)

        def depthwise(x, name):
            padding = blocks.same(3, self.stride, 'torch', x)
            conv = blocks.ConvNorm(
                x.shape[-1], 3, self.stride, padding, depthwise=True, common=linear, name=name
            )
            return conv(x, train)

        def pointwise(x, name):
            return blocks.ConvNorm(half, 1, common=self.common, name=name)(x, train)

        if self.stride == 1:
            kept, x = jnp.split(x, 2, axis=-1)
        else:
            kept = pointwise(depthwise(x, 'left_depthwise'), 'left_project')
        x = pointwise(x, 'expand')
        x = pointwise(depthwise(x, 'depthwise'), 'project')
        return shuffle(jnp.concatenate([kept, x], axis=-1))


class ShuffleNet(blocks.OneTower):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name)."""

    classes: int
    size: str
    input_std: float
    norm_momentum: float
    norm_epsilon: float
    dtype: str
    data_axis: str | None = None

    @property
    def names(self) -> list[str]:
        units = [
            f'stage{s + 2}_{i + 1}' for s, repeats in enumerate(REPEATS) for i in range(repeats)
        ]
        return ['conv1', 'pool1', *units, 'conv5', 'features', 'fc']

    @nn.compact
    def __call__(self, images, train=None):
        common = blocks.Common(
            nn.relu,
            self.data_axis,
            self.norm_momentum,
            self.norm_epsilon,
            jnp.dtype(self.dtype),
        )
        *stages, last = SIZES[self.size]
        out = {}
        x = (images / self.input_std).astype(self.dtype)
        conv1 = blocks.ConvNorm(
            24, 3, 2, blocks.same(3, 2, 'torch', x), common=common, name='conv1'
        )
        x = out['conv1'] = conv1(x, train)
        # After a ReLU, zero padding does not change the maximum.
        x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
        x = out['pool1'] = layers.max_pool(x, window=3, stride=2)
        for s, (features, repeats) in enumerate(zip(stages, REPEATS, strict=True)):
            for i in range(repeats):
                name = f'stage{s + 2}_{i + 1}'
                x = out[name] = Unit(features, 1 if i else 2, common, name=name)(x, train)
        x = out['conv5'] = blocks.ConvNorm(last, 1, common=common, name='conv5')(x, train)
        x = out['features'] = x.astype(layers.wide(x.dtype)).mean((1, 2))
        return blocks.head(self.classes, x.dtype)(x), out

    @nn.nowrap
    def check(self) -> None:
        choose('config.model.size', self.size, SIZES)
        choose('config.model.dtype', self.dtype, blocks.dtypes())
        blocks.check_norm(self.norm_momentum, self.norm_epsilon)
        blocks.check_positive(input_std=self.input_std)


def build(**fields) -> ShuffleNet:
    """Builds the network described by the fields of `config.model` in `configs/shufflenet.py`."""
    return network.make(ShuffleNet, **fields)
