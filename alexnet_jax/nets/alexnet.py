"""The paper's network and its variants: convolutions, two hidden layers and a softmax, in towers.

Parameters have a leading tower axis, which the mesh axis `model` can shard; activations are tuples with
one array per tower of this device.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.common.errors import UserError, choose, one_each
from alexnet_jax.nets import blocks, layers, network

# Kernel sizes of conv1 to conv6 in pixels (§3.5; conv6: net #146 of the 2012 source code).
SIZES = (11, 5, 3, 3, 3, 3)
PADDINGS = (None, 2, 1, 1, 1, 1)  # pixels on each side; conv1's is a field
# Net #147 pools without overlap and pads less, so that layer 5 again ends at 6 x 6.
DISJOINT_PADDINGS = (None, 1, 1, 1, 0, 1)
POOLING = {'overlapping': (3, 2), 'disjoint': (2, 2)}  # window and stride (§3.4)
MAP_NORM = {'alpha': 0.001 / 25, 'k': 1.0, 'n': 5, 'beta': 0.75}  # the source's `cnorm2`, #145
GROUPED = ('conv2', 'conv4', 'conv5')  # layers that see half of the maps in the paper's network
UNGROUPED = (('conv1', 'conv2'), ('conv3', 'conv4'))  # without the first, the second sees all maps


def padding_of(i: int, pooling: str, size: int, first: int) -> int:
    """Padding of conv{i + 1}, i > 0, in pixels, if it reads `size` rows and conv1 outputs `first`."""
    # With 112-pixel crops #147 would end at 2 x 2, not 3 x 3 as with overlap, so conv5 keeps its padding.
    small = i == 4 and (size + 2 * DISJOINT_PADDINGS[i] - 1) // 2 < first // 8
    return (PADDINGS if small or pooling == 'overlapping' else DISJOINT_PADDINGS)[i]


def check_padding(conv1_padding: tuple[int, ...]) -> None:
    """Raises UserError for an impossible padding of conv1."""
    if len(conv1_padding) != 2:
        raise UserError(
            f'config.model.conv1_padding={conv1_padding}: must be two numbers of pixels'
        )
    if max(conv1_padding) >= SIZES[0]:
        raise UserError(
            f'config.model.conv1_padding={conv1_padding}: must be below {SIZES[0]}, the size of '
            "conv1's kernels"
        )


class AlexNet(blocks.Towers):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name).

    The fields are those of `config.model`, documented in `configs/base.py`, and those of `blocks.Towers`.
    """

    classes: int
    towers: int
    kernels: tuple[int, ...]
    hidden: tuple[int, ...]
    groups: int
    exchange: tuple[str, ...]
    remove: str
    activation: str
    after: tuple[str, ...]
    norms: str
    norm_alpha: float
    norm_alpha_per: str
    norm_k: float
    norm_n: int
    norm_beta: float
    norm_window: str
    pooling: str
    dropout: str
    dropout_at: str
    conv1_padding: tuple[int, int]
    width: float
    initial: str
    std: tuple[float, ...]
    bias: tuple[float, ...]
    dtype: str
    local_towers: int | None = None
    model_axis: str | None = None

    @property
    def names(self) -> list[str]:
        names = []
        for i in range(len(self.kernels)):
            conv = f'conv{i + 1}'
            names += [conv] * (conv != self.remove) + [f'{op}{i + 1}' for op in self.ops(i)]
        return [*names, *(f'fc{i + 6}' for i in range(len(self.hidden))), 'fc8']

    @property
    def bound(self) -> float | None:
        return blocks.BOUNDS.get(self.activation)

    @nn.compact
    def __call__(self, images, train=None):
        out = {}
        xs = (images.astype(self.dtype),) * self._count
        first = 0  # rows that conv1 outputs
        for i, features in enumerate(self.kernels):
            name, after = f'conv{i + 1}', self.ops(i)
            if name in self.exchange:
                xs = self._exchange(xs)
            if name == self.remove:
                if i == 0:
                    xs = tuple(self._centers(x) for x in xs)
            else:
                size = xs[0].shape[1]
                padding = (
                    (padding_of(i, self.pooling, size, first),) * 2 if i else self.conv1_padding
                )
                # conv2 and conv4 read half of the maps, after conv1 and conv3, which read everything.
                # If one of those is removed, the layer after it reads everything instead.
                halves = name in GROUPED and (self.remove, name) not in UNGROUPED
                xs = blocks.Conv(
                    self.per_tower(features),
                    SIZES[i],
                    stride=4 if i == 0 else 1,
                    padding=(padding, padding),
                    groups=self.groups if halves else 1,
                    **self._common(i, name),
                )(xs)
                out[name] = xs
            first = first or xs[0].shape[1]
            for op in after:
                with jax.named_scope(f'{op}{i + 1}'):
                    xs = out[f'{op}{i + 1}'] = self._apply(op, xs)

        for i, features in enumerate(self.hidden):
            name = f'fc{i + 6}'
            if self.dropout_at == 'inputs':
                xs = self._dropout(xs, i, train)
            if name in self.exchange:
                xs = self._exchange(xs)
            xs = tuple(x.reshape(x.shape[0], -1) for x in xs)
            common = self._common(len(self.kernels) + i, name)
            xs = blocks.Hidden(self.per_tower(features), **common)(xs)
            xs = out[name] = self._apply('act', xs)
            if self.dropout_at == 'outputs':
                xs = self._dropout(xs, i, train)
        common = self._common(-1, 'fc8')
        return blocks.Logits(self.classes, axis=self.model_axis, **common)(xs), out

    @nn.nowrap
    def ops(self, i: int) -> list[str]:
        """The operations after conv{i + 1}, without the norms that `norms` leaves out.

        Of a removed layer, only the pooling is left.
        """
        kept = {'all': True, 'first': i == 0, 'none': False}[self.norms]
        ops = [op for op in self.after[i].split() if kept or 'norm' not in op]
        return [op for op in ops if op == 'pool'] if f'conv{i + 1}' == self.remove else ops

    @property
    def norm(self) -> dict:
        """The arguments of `layers.lrn`."""
        per_window = self.norm_n if self.norm_alpha_per == 'window' else 1
        return {
            'alpha': self.norm_alpha / per_window,
            'k': self.norm_k,
            'n': self.norm_n,
            'beta': self.norm_beta,
        }

    @nn.nowrap
    def _common(self, i: int, name: str) -> dict:
        """The arguments that all layers share; i: the layer's index in `std` and `bias`."""
        std, bias = self.std[i], self.bias[i]
        # Narrow networks must compensate for a smaller fan-in, or they start out dead.
        if name != 'conv1':
            std *= self.width**-0.5
        if self.initial == 'torch':
            inits = {'kernel_init': blocks.uniform, 'bias_init': blocks.uniform}
        else:
            inits = {
                'kernel_init': lambda fan_in: blocks.gaussian(std),
                'bias_init': lambda fan_in: nn.initializers.constant(bias),
            }
        return {**inits, 'dtype': jnp.dtype(self.dtype), 'name': name}

    def _apply(self, op, xs):
        if op == 'act':
            return tuple(blocks.ACTIVATIONS[self.activation](x) for x in xs)
        if op == 'pool':
            window, stride = POOLING[self.pooling]
            return tuple(layers.max_pool(x, window=window, stride=stride) for x in xs)
        if op == 'map_norm':
            return tuple(layers.map_norm(x, **MAP_NORM) for x in xs)
        if self.norm_window == 'tower':
            return tuple(layers.lrn(x, **self.norm) for x in xs)
        x = layers.lrn(layers.exchange(xs, self.model_axis), **self.norm)
        c = xs[0].shape[-1]
        starts = [self._tower(t) * c for t in range(self._count)]
        return tuple(lax.dynamic_slice_in_dim(x, start, c, axis=3) for start in starts)

    def _centers(self, x):
        """Replaces a removed conv1: the pixels at the centers of its windows."""
        start = SIZES[0] // 2 - self.conv1_padding[0]
        height, width = ((n + sum(self.conv1_padding) - SIZES[0]) // 4 + 1 for n in x.shape[1:3])
        return x[:, start::4, start::4][:, :height, :width]

    def _dropout(self, xs, i, train):
        """As in §4.2, zeroes half of the units in training without rescaling, and halves all at test time.

        'inverted', as in Caffe and torchvision, gives twice these values, in training and at test time.
        """
        if self.dropout == 'none':
            return xs
        xs = tuple(
            layers.dropout(x, 0.5, train, layer=i, tower=self._tower(t)) for t, x in enumerate(xs)
        )
        return xs if self.dropout == 'inverted' else tuple(0.5 * x for x in xs)

    @nn.nowrap
    def check(self) -> None:
        convs = tuple(f'conv{i + 1}' for i in range(len(self.kernels)))
        if len(convs) not in (5, 6) or len(self.hidden) != 2:
            raise UserError('config.model: kernels must have 5 or 6 values, and hidden must have 2')
        for name, choices in {
            'activation': blocks.ACTIVATIONS,
            'pooling': POOLING,
            'norms': ('all', 'first', 'none'),
            'norm_window': ('tower', 'all'),
            'norm_alpha_per': ('element', 'window'),
            'dropout': ('original', 'inverted', 'none'),
            'dropout_at': ('outputs', 'inputs'),
            'dtype': blocks.dtypes(),
            'remove': ('none', *convs[:5]),
        }.items():
            choose(f'config.model.{name}', getattr(self, name), choices)
        choose('config.model.init', self.initial, ('gaussian', 'torch'))
        for name in self.exchange:
            choose('config.model.exchange', name, (*convs[1:], 'fc6', 'fc7'))
        for op in ' '.join(self.after).split():
            choose('config.model.after', op, ('act', 'norm', 'map_norm', 'pool'))
        check_padding(self.conv1_padding)
        one_each('config.model.after', self.after, len(convs))
        one_each('config.model.std', self.std, len(convs) + 3)
        one_each('config.model.bias', self.bias, len(convs) + 3)
        blocks.check_positive(towers=self.towers, groups=self.groups, width=self.width)
        for channels in (*self.kernels, *self.hidden):
            self.per_tower(channels)
        largest = self.per_tower(max(self.kernels)) * self.towers
        if self.norm_n % 2 == 0 or self.norm_n > 2 * largest:
            raise UserError(
                f'config.model.norm_n={self.norm_n}: must be odd (channels in the window), and at most '
                f'twice the {largest} kernels of the widest layer'
            )


def build(**fields) -> AlexNet:
    """Builds the network described by the fields of `config.model` in `configs/base.py`."""
    return network.make(AlexNet, renamed={'init': 'initial'}, **fields)
