"""Converts the arrays of another framework's file to the variables of a network."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import UserError, printable, reason
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.nets.network import Network

ANY_CROP = 64  # for networks whose variables do not depend on the images' size
LARGEST = 2**31  # bytes of a file


class Damaged(Exception):
    """A file does not follow its format; the message says why in a few words."""


class Weights(NamedTuple):
    """The content of a weight file, for one network.

    variables: {'params', 'batch_stats'}; mean: of the pixels (0 to 255, RGB), to be subtracted from
    images; crop: the images' size.
    """

    variables: dict
    mean: tuple[float, float, float]
    crop: int


class Options(NamedTuple):
    """What the user specifies about a file; '', None and 0 leave it to the file or its format."""

    net: str = ''  # a preset
    std: tuple[float, float, float] | None = None  # that the file's network divides pixels by
    crop: int = 0

    def chosen(self, found: str, presets: Sequence[str]) -> str:
        """The preset found in a file, unless the user chose another; UserError if there is none."""
        preset = self.net or found
        if preset not in presets:
            wrong = (
                f'--net={preset}: not a network of this format'
                if preset
                else 'its network cannot be determined'
            )
            raise UserError(f'{wrong}; choose one with --net: {", ".join(presets)}')
        return preset


class Imported(NamedTuple):
    """A network found in a file: a preset, the fields of config.model that differ from it, the weights."""

    preset: str
    model: dict
    classes: int
    weights: Weights
    program: str
    folded: bool = False  # batch normalization is folded in


def content(file: str) -> bytes:
    """Reads a whole weight file. Raises UserError if it cannot be read or is too large."""
    path = paths.path(file)
    try:
        if path.stat().length > LARGEST:
            raise UserError(f'{file}: larger than 2 GiB, so not a weight file in this format')
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {reason(error)}') from error


@functools.lru_cache(maxsize=8)
def leaves(net: Network, crop: int = ANY_CROP) -> dict[network.Path, tuple[int, ...]]:
    """The shape of every variable of a network, by its path: ('params', 'conv1', 'kernel')."""
    found = jax.tree.leaves_with_path(network.shapes(net, crop))
    return {network.names_of(path): leaf.shape for path, leaf in found}


def preset(name: str, classes: int, changes: dict) -> Network:
    """The network of a preset, such as 'mobilenet:v1', with changes to some fields of config.model."""
    return build(classes=classes, **{**configfile.load(name).model, **changes})


def check(
    title: str,
    wanted: dict[str, tuple[int, ...]],
    given: dict[str, np.ndarray],
    advice: str,
) -> None:
    """Raises UserError, which lists all differences, unless arrays have the names and shapes wanted."""
    problems = [
        *listed('missing', [name for name in wanted if name not in given]),
        *listed('extra', [name for name in given if name not in wanted]),
        *listed(
            'shapes',
            [
                f'{name} is {[*x.shape]} but should be {[*wanted[name]]}'
                for name, x in given.items()
                if name in wanted and x.shape != wanted[name]
            ],
        ),
        *listed(
            'not floats',
            [name for name, x in given.items() if not jnp.issubdtype(x.dtype, jnp.floating)],
        ),
    ]
    if problems:
        raise UserError(f'{title} ({"; ".join(problems)}): {advice}')


def shaped(data: np.ndarray | None, shape: Sequence[int], name: str) -> np.ndarray:
    """The numbers of an array in its shape; raises Damaged unless they fit."""
    if len(shape) > 8 or any(n >= 2**31 for n in shape):
        raise Damaged(f'{name[:60]} has an impossible shape')
    if data is None or math.prod(shape) != len(data):
        count = 0 if data is None else len(data)
        raise Damaged(f'{name[:60]} has {count:,} numbers for {[*shape]}')
    return data.reshape(shape)


def _in_towers(net: Network, path: network.Path) -> bool:
    return net.partition(path[1:]) != P()


def their_shape(net: Network, path: network.Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch, Caffe and ONNX give to a variable of one tower: OIHW, C1HW, OI."""
    shape = shape[1:] if _in_towers(net, path) else shape
    if path[-1] == 'depthwise':
        return (shape[2], 1, *shape[:2])
    return (*shape[:-3:-1], *shape[:-2]) if path[-1] == 'kernel' else shape


def from_theirs(net: Network, path: network.Path, x: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO, C1HW -> HWC, OI -> IO; fc6's inputs, the maps of conv5, from CHW to HWC."""
    if path[1] == 'fc6' and path[-1] == 'kernel':
        channels = net.per_tower(net.kernels[-1])
        side = math.isqrt(x.shape[1] // channels)
        x = x.reshape(-1, channels, side, side).transpose(0, 2, 3, 1).reshape(x.shape)
    if path[-1] == 'depthwise':
        x = x[:, 0].transpose(1, 2, 0)
    elif path[-1] == 'kernel':
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    return x[None] if _in_towers(net, path) else x


def nest(arrays: dict[network.Path, np.ndarray]) -> dict:
    """{path: array} -> {'params', 'batch_stats'}."""
    tree = {'params': {}, 'batch_stats': {}}
    for (*outer, name), array in arrays.items():
        inner = tree
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = array
    return tree


def without_norm(layer: network.Path, bias: np.ndarray, epsilon: float) -> dict:
    """The variables of a normalization that only adds a bias, which a file has in its place.

    The scale is 1, the mean 0 and the variance 1 - epsilon, so that the factor is exactly 1 at test time.
    """
    return {
        ('params', *layer, 'norm', 'scale'): np.ones_like(bias),
        ('params', *layer, 'norm', 'bias'): bias,
        ('batch_stats', *layer, 'norm', 'mean'): np.zeros_like(bias),
        ('batch_stats', *layer, 'norm', 'var'): np.full_like(bias, 1 - epsilon),
    }


def for_pixels(net: Network, kernel: np.ndarray, std: float | Sequence[float]) -> np.ndarray:
    """Converts the first kernel [...,3,O] of a network that divides pixels (0 to 255) for one that does not.

    std: what the other divides pixels by, for each channel or all; ours divides by `net.input_std`, if any.
    """
    factor = getattr(net, 'input_std', 1.0) / np.broadcast_to(np.asarray(std, np.float64), (3,))
    return (kernel * factor[:, None]).astype(np.result_type(kernel.dtype, np.float32))


def unpad_head(net: Network, arrays: dict, crop: int) -> None:
    """Makes SqueezeNet's conv10 give the logits of one that pads by a pixel, as the authors' v1.0 does.

    It is a 1 x 1 convolution, so the mean also counts the border's rectified biases. Without them it is
    over fewer values; what remains is at most 56/225 of a class's positive bias.
    """
    side = network.summary(net, crop)[-1].output[0]
    for name in ('kernel', 'bias'):
        path = ('params', 'conv10', name)
        arrays[path] = (arrays[path] * (side / (side + 2)) ** 2).astype(arrays[path].dtype)


def listed(what: str, names: Sequence[str]) -> list[str]:
    """['missing: a, b'], at most four names; [] if there are none."""
    more = f' and {len(names) - 4} more' * (len(names) > 4)
    return [f'{what}: {", ".join(map(printable, names[:4]))}{more}'] * bool(names)
