"""MobileNet v1 (Howard et al., 2017) and v2 (Sandler et al., 2018): depthwise separable convolutions.

`width` is the papers' multiplier alpha; the resolution multiplier is `config.augment.crop`. TensorFlow
pads a convolution with stride 2 on the bottom and right; PyTorch on all sides (`padding`): published
weights need the one that they were trained with.
"""

import flax.linen as nn
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.nets import blocks, layers, network

V1 = [
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
]
# v2's Table 2: expansion, output channels, repeats, stride of the first
V2 = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
ACTIVATIONS = {'relu': nn.relu, 'relu6': nn.relu6}


def divisible(channels: float) -> int:
    """Rounds to a multiple of 8, but never down by more than 10%, as in v2's code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class Separable(nn.Module):
    """A block of v1: a 3 x 3 depthwise convolution, then a 1 x 1 convolution."""

    features: int
    stride: int
    padding: str
    common: blocks.Common

    @nn.compact
    def __call__(self, x, train):
        padding = blocks.same(3, self.stride, self.padding, x)
        depthwise = blocks.ConvNorm(
            x.shape[-1],
            3,
            self.stride,
            padding,
            depthwise=True,
            common=self.common,
            name='depthwise',
        )
        return blocks.ConvNorm(self.features, 1, common=self.common, name='project')(
            depthwise(x, train), train
        )


class InvertedResidual(nn.Module):
    """A block of v2: expand, 3 x 3 depthwise, project without activation; added to x if shapes allow."""

    features: int
    stride: int
    expansion: int
    padding: str
    common: blocks.Common

    @nn.compact
    def __call__(self, x, train):
        y, wide = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = blocks.ConvNorm(wide, 1, common=self.common, name='expand')(y, train)
        padding = blocks.same(3, self.stride, self.padding, y)
        y = blocks.ConvNorm(
            wide, 3, self.stride, padding, depthwise=True, common=self.common, name='depthwise'
        )(y, train)
        linear = self.common._replace(activation=None)
        y = blocks.ConvNorm(self.features, 1, common=linear, name='project')(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNet(blocks.OneTower):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name)."""

    classes: int
    version: int
    width: float
    padding: str
    activation: str
    input_std: float
    dropout: float
    norm_momentum: float
    norm_epsilon: float
    dtype: str
    data_axis: str | None = None

    @property
    def names(self) -> list[str]:
        count = len(V1) if self.version == 1 else sum(repeats for _, _, repeats, _ in V2)
        last = ['conv_last'] * (self.version == 2)
        return ['conv1', *(f'block{i + 1}' for i in range(count)), *last, 'features', 'fc']

    @nn.nowrap
    def channels(self, count: int) -> int:
        return int(count * self.width) if self.version == 1 else divisible(count * self.width)

    @nn.compact
    def __call__(self, images, train=None):
        common = blocks.Common(
            ACTIVATIONS[self.activation],
            self.data_axis,
            self.norm_momentum,
            self.norm_epsilon,
            jnp.dtype(self.dtype),
        )
        out = {}
        x = (images / self.input_std).astype(self.dtype)
        padding = blocks.same(3, 2, self.padding, x)
        first = blocks.ConvNorm(self.channels(32), 3, 2, padding, common=common, name='conv1')
        x = out['conv1'] = first(x, train)
        for i, block in enumerate(self.each(common)):
            x = out[f'block{i + 1}'] = block(x, train)
        if self.version == 2:
            last = 1280 if self.width <= 1 else self.channels(1280)
            x = blocks.ConvNorm(last, 1, common=common, name='conv_last')(x, train)
            out['conv_last'] = x
        x = out['features'] = x.astype(layers.wide(x.dtype)).mean((1, 2))
        x = layers.dropout(x, self.dropout, train)
        return blocks.head(self.classes, x.dtype)(x), out

    @nn.nowrap
    def each(self, common: blocks.Common):
        """The blocks in order."""
        names = (f'block{i + 1}' for i in range(len(self.names)))
        if self.version == 1:
            for features, stride in V1:
                features = self.channels(features)
                yield Separable(features, stride, self.padding, common, name=next(names))
            return
        for expansion, features, repeats, stride in V2:
            for i in range(repeats):
                yield InvertedResidual(
                    self.channels(features),
                    stride if i == 0 else 1,
                    expansion,
                    self.padding,
                    common,
                    name=next(names),
                )

    @nn.nowrap
    def check(self) -> None:
        choose('config.model.version', self.version, (1, 2))
        choose('config.model.padding', self.padding, blocks.PADDINGS)
        choose('config.model.activation', self.activation, ACTIVATIONS)
        choose('config.model.dtype', self.dtype, blocks.dtypes())
        blocks.check_dropout(self.dropout)
        blocks.check_norm(self.norm_momentum, self.norm_epsilon)
        blocks.check_positive(width=self.width, input_std=self.input_std)
        if not self.channels(32):
            raise UserError(
                f'config.model.width={self.width}: leaves no kernels; give at least 1/32'
            )


def build(**fields) -> MobileNet:
    """Builds the network described by the fields of `config.model` in `configs/mobilenet.py`."""
    return network.make(MobileNet, **fields)
