"""SqueezeNet (Iandola et al., 2016): AlexNet's accuracy with a fiftieth of its parameters.

Versions 1.0 (the paper's, Table 1) and 1.1 (the authors' later one, 2.4 times cheaper). As in their
prototxt, convolutions have biases, conv1 has no padding, pooling rounds up, and a ReLU follows conv10.
Unlike there, 1.0's conv10 has no padding (1 pixel in the prototxt).
"""

import flax.linen as nn
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.nets import blocks, layers, network

# conv1's size and kernels, and the layers that a 3 x 3 pooling with stride 2 follows
VERSIONS = {
    '1.0': (7, 96, ('conv1', 'fire4', 'fire8')),
    '1.1': (3, 64, ('conv1', 'fire3', 'fire5')),
}
# squeeze 1x1, expand 1x1 and expand 3x3 of fire2 to fire9
FIRES = [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]


class Fire(nn.Module):
    """A fire module: [B,H,W,C] -> [B,H,W,2 * expand]."""

    squeeze: int
    expand: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def conv(features, size, name):
            size, init = (size, size), blocks.he_uniform
            return nn.Conv(features, size, dtype=self.dtype, kernel_init=init, name=name)

        x = nn.relu(conv(self.squeeze, 1, 'squeeze')(x))
        each = [conv(self.expand, size, f'expand{size}x{size}')(x) for size in (1, 3)]
        return nn.relu(jnp.concatenate(each, axis=-1))


class SqueezeNet(blocks.OneTower):
    """images f32[B,H,W,3], mean subtracted -> (logits f32[B,K], every activation by name)."""

    classes: int
    version: str
    width: float
    input_std: float
    dropout: float
    dtype: str

    @property
    def names(self) -> list[str]:
        names = []
        for name in ('conv1', *(f'fire{i + 2}' for i in range(len(FIRES)))):
            names += [name, *([f'pool_{name}'] if name in VERSIONS[self.version][2] else [])]
        return [*names, 'conv10']

    @nn.compact
    def __call__(self, images, train=None):
        size, features, _ = VERSIONS[self.version]
        dtype, out = jnp.dtype(self.dtype), {}
        x = (images / self.input_std).astype(dtype)
        for name in self.names[:-1]:
            if name == 'conv1':
                conv = nn.Conv(
                    self.scaled(features),
                    (size, size),
                    strides=2,
                    padding='VALID',
                    dtype=dtype,
                    kernel_init=blocks.he_uniform,
                    name=name,
                )
                x = nn.relu(conv(x))
            elif name.startswith('fire'):
                squeeze, expand = map(self.scaled, FIRES[int(name[4:]) - 2])
                x = Fire(squeeze, expand, dtype, name=name)(x)
            else:
                x = layers.max_pool(x, window=3, stride=2)
            out[name] = x
        x = layers.dropout(x, self.dropout, train)
        init = nn.initializers.normal(0.01)
        head = nn.Conv(self.classes, (1, 1), dtype=dtype, kernel_init=init, name='conv10')
        return nn.relu(head(x)).astype(layers.wide(dtype)).mean((1, 2)), out

    @nn.nowrap
    def scaled(self, features: int) -> int:
        return round(features * self.width)

    @nn.nowrap
    def check(self) -> None:
        choose('config.model.version', self.version, VERSIONS)
        choose('config.model.dtype', self.dtype, blocks.dtypes())
        blocks.check_dropout(self.dropout)
        blocks.check_positive(width=self.width, input_std=self.input_std)
        if self.scaled(FIRES[0][0]) < 1:
            raise UserError(
                f'config.model.width={self.width}: leaves a fire module without kernels'
            )


def build(**fields) -> SqueezeNet:
    """Builds the network described by the fields of `config.model` in `configs/squeezenet.py`."""
    return network.make(SqueezeNet, **fields)
