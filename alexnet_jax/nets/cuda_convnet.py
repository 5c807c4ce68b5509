"""The CIFAR-10 networks of cuda-convnet, on which the paper tried its ideas (§3.1, §3.3).

`configs/cifar10.py` has them by name; `original.md` §8 says where each number comes from.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose, one_each
from alexnet_jax.nets import alexnet, layers

CONV, LOCAL = 5, 3  # pixels, sides of the kernels; padded to the same size
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

    @nn.compact
    def __call__(self, xs):
        (x,) = xs
        place = (1, *x.shape[1:3])
        kernel_shape = (*place, LOCAL * LOCAL * x.shape[3], self.features)
        kernels, biases = alexnet.params_of(self, kernel_shape, (*place, self.features))
        return (layers.local(x, kernels[0], biases[0]),)


class CudaConvnet(nn.Module):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every intermediate by name).

    Arrays and parameters are those of `alexnet.AlexNet` with one tower. Layers are called by kind and
    number (conv1, local3, fc4), the last one fc10, as in cuda-convnet.
    """

    classes: int
    kinds: tuple[str, ...]
    units: tuple[int, ...]
    after: tuple[str, ...]
    norm_window: str
    norm: dict
    activation: str
    kernel_inits: tuple
    dtype: Any
    local_towers: int = 1

    @property
    def names(self) -> list[str]:
        """Every intermediate in the order of the forward pass, and the last layer."""
        names = []
        for i, (kind, ops) in enumerate(zip(self.kinds, self.after, strict=True), start=1):
            names += [f'{kind}{i}', *(f'{op}{i}' for op in ops.split())]
        return [*names, 'fc10']

    @nn.compact
    def __call__(self, images, dropout_key=None, rows=None):
        """As `alexnet.AlexNet`; these networks have no dropout."""
        out, xs = {}, (images.astype(self.dtype),)
        *inits, last_init = self.kernel_inits
        each = zip(self.kinds, self.units, self.after, inits, strict=True)
        for i, (kind, units, ops, init) in enumerate(each, start=1):
            name = f'{kind}{i}'
            common = {'kernel_init': init, 'bias_init': _zeros, 'dtype': self.dtype, 'name': name}
            if kind == 'conv':
                padding = ((CONV // 2,) * 2,) * 2
                layer = alexnet.Conv(units, CONV, stride=1, padding=padding, groups=1, **common)
            elif kind == 'local':
                layer = Local(units, **common)
            else:
                layer = alexnet.Hidden(units, **common)
                xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
            xs = out[name] = layer(xs)
            for op in ops.split():
                xs = out[f'{op}{i}'] = tuple(self._apply(op, x) for x in xs)
        xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
        logits = alexnet.Logits(self.classes, last_init, _zeros, self.dtype, None, name='fc10')
        return logits(xs), out

    def _apply(self, op, x):
        if op == 'act':
            return alexnet.ACTIVATIONS[self.activation](x)
        if op == 'norm':
            norm = layers.lrn if self.norm_window == 'channels' else layers.map_norm
            return norm(x, **self.norm)
        return {'max': layers.max_pool, 'avg': layers.avg_pool}[op](x, **POOL)


def build(
    *,
    classes: int,
    towers: int,
    layers: tuple[str, ...],
    units: tuple[int, ...],
    after: tuple[str, ...],
    norms: str,
    norm_window: str,
    norm_n: int,
    norm_scale: float,
    activation: str,
    std: tuple[float, ...],
    dtype: str,
) -> CudaConvnet:
    """The network that the fields of `config.model` in `configs/cifar10.py` describe."""
    if towers != 1:
        raise UserError(f'config.model.towers={towers}: these networks have 1')
    if not layers:
        raise UserError('config.model.layers: name at least one layer')
    one_each('config.model.units', units, len(layers))
    one_each('config.model.after', after, len(layers))
    one_each('config.model.std', std, len(layers) + 1)
    for kind, ops in zip(layers, after, strict=True):
        choose('config.model.layers', kind, ('conv', 'local', 'fc'))
        for op in ops.split():
            choose(
                'config.model.after',
                op,
                ('act',) if kind == 'fc' else ('act', 'norm', 'max', 'avg'),
            )
    if 'fc' in layers and any(kind != 'fc' for kind in layers[layers.index('fc') :]):
        raise UserError('config.model.layers: after an fc layer there can only be fc layers')
    choose('config.model.norms', norms, ('all', 'none'))
    choose('config.model.norm_window', norm_window, ('channels', 'map'))
    choose('config.model.activation', activation, tuple(alexnet.ACTIVATIONS))
    choose('config.model.dtype', dtype, alexnet.dtypes())
    if norm_n % 2 == 0:
        raise UserError(f'config.model.norm_n={norm_n}: a window of an odd size')
    if norms == 'none':
        after = tuple(' '.join(op for op in ops.split() if op != 'norm') for ops in after)
    size = norm_n if norm_window == 'channels' else norm_n * norm_n
    return CudaConvnet(
        classes=classes,
        kinds=tuple(layers),
        units=tuple(units),
        after=tuple(after),
        norm_window=norm_window,
        norm={'alpha': norm_scale / size, 'k': K, 'n': norm_n, 'beta': BETA},
        activation=activation,
        kernel_inits=tuple(lambda fan_in, s=s: alexnet.gaussian(s) for s in std),
        dtype=jnp.dtype(dtype),
    )
