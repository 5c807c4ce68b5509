"""The CIFAR-10 networks of cuda-convnet, on which the paper tested its ideas (§3.1, §3.3).

`configs/cifar10.py` lists them by name; `docs/original.md` §8 says where each number comes from.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose, one_each
from alexnet_jax.nets import blocks, network
from alexnet_jax.nets import layers as ops

CONV, LOCAL = 5, 3  # kernel sizes in pixels; padding keeps the size
POOL = {'window': 3, 'stride': 2}
BETA, K = 0.75, 1.0  # of all norms


def _zeros(fan_in: int):
    return nn.initializers.zeros


class Local(nn.Module):
    """A locally connected layer: 1 x [B,H,W,C] -> 1 x [B,H,W,features]."""

    features: int
    kernel_init: Any
    bias_init: Any
    dtype: Any
    positions = 0  # each of its weights is used at one position, see `network.summary`

    @nn.compact
    def __call__(self, xs):
        (x,) = xs
        place = (1, *x.shape[1:3])
        kernel_shape = (*place, LOCAL * LOCAL * x.shape[3], self.features)
        kernels, biases = blocks.params_of(self, kernel_shape, (*place, self.features))
        return (ops.local(x, kernels[0], biases[0]),)


class CudaConvnet(network.Network):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name).

    The fields are those of `config.model` in `configs/cifar10.py`. Arrays and parameters are laid out
    as in `alexnet.AlexNet` with one tower. As in cuda-convnet, layers are named by kind and number
    (conv1, local3, fc4), the last one fc10.
    """

    classes: int
    towers: int
    layers: tuple[str, ...]
    units: tuple[int, ...]
    after: tuple[str, ...]
    norms: str
    norm_window: str
    norm_n: int
    norm_scale: float
    activation: str
    std: tuple[float, ...]
    dtype: str

    @property
    def names(self) -> list[str]:
        names = []
        for i, (kind, _, after) in enumerate(self.each(), start=1):
            names += [f'{kind}{i}', *(f'{op}{i}' for op in after)]
        return [*names, 'fc10']

    @property
    def first(self) -> tuple[str, ...]:
        return ('conv1',) if self.layers[0] == 'conv' else ()

    @property
    def bound(self) -> float | None:
        return blocks.BOUNDS.get(self.activation)

    @nn.nowrap
    def first_kernels(self, params: dict) -> jax.Array | None:
        return params['conv1']['kernel'] if 'conv1' in params else None

    @nn.nowrap
    def each(self) -> list[tuple[str, int, list[str]]]:
        """The kind, units and following operations of every layer but the last."""
        operations = [
            [op for op in after.split() if op != 'norm' or self.norms == 'all']
            for after in self.after
        ]
        return list(zip(self.layers, self.units, operations, strict=True))

    @property
    def norm(self) -> dict:
        """The arguments of `lrn` or `map_norm`."""
        size = self.norm_n if self.norm_window == 'channels' else self.norm_n * self.norm_n
        return {'alpha': self.norm_scale / size, 'k': K, 'n': self.norm_n, 'beta': BETA}

    @nn.compact
    def __call__(self, images, train=None):
        del train  # no dropout, no statistics
        out, xs = {}, (images.astype(self.dtype),)
        for i, (kind, units, after) in enumerate(self.each(), start=1):
            name = f'{kind}{i}'
            common = self._common(i - 1, name)
            if kind == 'conv':
                padding = ((CONV // 2,) * 2,) * 2
                layer = blocks.Conv(units, CONV, stride=1, padding=padding, groups=1, **common)
            elif kind == 'local':
                layer = Local(units, **common)
            else:
                layer = blocks.Hidden(units, **common)
                xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
            xs = out[name] = layer(xs)
            for op in after:
                with jax.named_scope(f'{op}{i}'):
                    xs = out[f'{op}{i}'] = tuple(self._apply(op, x) for x in xs)
        xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
        logits = blocks.Logits(self.classes, axis=None, **self._common(-1, 'fc10'))
        return logits(xs), out

    @nn.nowrap
    def _common(self, i: int, name: str) -> dict:
        """The arguments that all layers share; i: the layer's index in `std`."""
        std = self.std[i]
        return {
            'kernel_init': lambda fan_in: blocks.gaussian(std),
            'bias_init': _zeros,
            'dtype': jnp.dtype(self.dtype),
            'name': name,
        }

    def _apply(self, op, x):
        if op == 'act':
            return blocks.ACTIVATIONS[self.activation](x)
        if op == 'norm':
            norm = ops.lrn if self.norm_window == 'channels' else ops.map_norm
            return norm(x, **self.norm)
        return {'max': ops.max_pool, 'avg': ops.avg_pool}[op](x, **POOL)

    @nn.nowrap
    def check(self) -> None:
        if self.towers != 1:
            raise UserError(f'config.model.towers={self.towers}: must be 1 for these networks')
        if not self.layers:
            raise UserError('config.model.layers: name at least one layer')
        one_each('config.model.units', self.units, len(self.layers))
        one_each('config.model.after', self.after, len(self.layers))
        one_each('config.model.std', self.std, len(self.layers) + 1)
        for kind, after in zip(self.layers, self.after, strict=True):
            choose('config.model.layers', kind, ('conv', 'local', 'fc'))
            allowed = ('act',) if kind == 'fc' else ('act', 'norm', 'max', 'avg')
            for op in after.split():
                choose('config.model.after', op, allowed)
        hidden = self.layers[self.layers.index('fc') :] if 'fc' in self.layers else ()
        if any(kind != 'fc' for kind in hidden):
            raise UserError('config.model.layers: only fc layers can follow an fc layer')
        for name, choices in {
            'norms': ('all', 'none'),
            'norm_window': ('channels', 'map'),
            'activation': blocks.ACTIVATIONS,
            'dtype': blocks.dtypes(),
        }.items():
            choose(f'config.model.{name}', getattr(self, name), choices)
        if self.norm_n % 2 == 0:
            raise UserError(f'config.model.norm_n={self.norm_n}: must be odd')


def build(**fields) -> CudaConvnet:
    """Builds the network described by the fields of `config.model` in `configs/cifar10.py`."""
    return network.make(CudaConvnet, **fields)
