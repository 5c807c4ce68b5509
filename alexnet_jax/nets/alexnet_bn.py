"""AlexNet with batch normalization after every convolution and hidden layer, in place of the norms.

The two towers, their shapes and exchanges are those of the paper. Batch normalization makes biases
redundant, except in fc8.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.nets import blocks, layers, network
from alexnet_jax.nets.alexnet import PADDINGS, SIZES, check_padding

POOLED = ('conv1', 'conv2', 'conv5')


class AlexNetBN(blocks.Towers):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name).

    The fields are those of `config.model` in `configs/alexnet_bn.py`, and those of `blocks.Towers`.
    """

    classes: int
    towers: int
    kernels: tuple[int, ...]
    hidden: tuple[int, ...]
    exchange: tuple[str, ...]
    dropout: float
    conv1_padding: tuple[int, int]
    width: float
    norm_momentum: float
    norm_epsilon: float
    dtype: str
    local_towers: int | None = None
    model_axis: str | None = None
    data_axis: str | None = None

    @property
    def convs(self) -> list[str]:
        return [f'conv{i + 1}' for i in range(len(self.kernels))]

    @property
    def names(self) -> list[str]:
        names = []
        for i, conv in enumerate(self.convs, start=1):
            names += [conv, f'norm{i}', *([f'pool{i}'] if conv in POOLED else [])]
        return [*names, 'fc6', 'norm6', 'fc7', 'norm7', 'fc8']

    @nn.compact
    def __call__(self, images, train=None):
        common = {
            'kernel_init': lambda fan_in: blocks.gaussian((2 / fan_in) ** 0.5),
            'bias_init': None,
            'dtype': jnp.dtype(self.dtype),
        }
        out = {}

        def normalize(name, xs):
            norm = layers.BatchNorm(
                self.data_axis, self.norm_momentum, self.norm_epsilon, name=name
            )
            xs = out[name] = tuple(map(nn.relu, norm(xs, train)))
            return xs

        def exchange(name, xs):
            return self._exchange(xs) if name in self.exchange else xs

        xs = (images.astype(self.dtype),) * self._count
        for i, (name, features) in enumerate(zip(self.convs, self.kernels, strict=True)):
            conv = blocks.Conv(
                self.per_tower(features),
                SIZES[i],
                stride=1 if i else 4,
                padding=((PADDINGS[i],) * 2 if i else self.conv1_padding,) * 2,
                groups=1,
                name=name,
                **common,
            )
            xs = out[name] = conv(exchange(name, xs))
            xs = normalize(f'norm{i + 1}', xs)
            if name in POOLED:
                with jax.named_scope(f'pool{i + 1}'):
                    xs = tuple(layers.max_pool(x, window=3, stride=2) for x in xs)
                out[f'pool{i + 1}'] = xs
        for i, features in enumerate(self.hidden):
            name = f'fc{i + 6}'
            xs = tuple(x.reshape(x.shape[0], -1) for x in exchange(name, xs))
            xs = out[name] = blocks.Hidden(self.per_tower(features), name=name, **common)(xs)
            xs = normalize(f'norm{i + 6}', xs)
            xs = tuple(
                layers.dropout(x, self.dropout, train, layer=i, tower=self._tower(t))
                for t, x in enumerate(xs)
            )
        common['kernel_init'] = lambda fan_in: blocks.gaussian(0.01)
        common['bias_init'] = lambda fan_in: nn.initializers.zeros
        logits = blocks.Logits(self.classes, axis=self.model_axis, name='fc8', **common)(xs)
        return logits, out

    @nn.nowrap
    def check(self) -> None:
        if len(self.kernels) != 5 or len(self.hidden) != 2:
            raise UserError('config.model: kernels must have 5 values, and hidden must have 2')
        for name in self.exchange:
            choose('config.model.exchange', name, (*self.convs[1:], 'fc6', 'fc7'))
        choose('config.model.dtype', self.dtype, blocks.dtypes())
        check_padding(self.conv1_padding)
        blocks.check_positive(towers=self.towers, width=self.width)
        blocks.check_dropout(self.dropout)
        blocks.check_norm(self.norm_momentum, self.norm_epsilon)
        for channels in (*self.kernels, *self.hidden):
            self.per_tower(channels)


def build(**fields) -> AlexNetBN:
    """Builds the network described by the fields of `config.model` in `configs/alexnet_bn.py`."""
    return network.make(AlexNetBN, **fields)
