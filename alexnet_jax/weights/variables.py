"""From the arrays of another program's file to the variables of a network."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, printable, reason
from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network

ANY_CROP = 64  # the variables of these networks do not depend on the images' size
LARGEST = 2**31  # bytes of a file


class Damaged(Exception):
    """A file is not what its format says, in a few words."""


class Weights(NamedTuple):
    """The content of a file of weights, for one network.

    variables: {'params', 'batch_stats'}; mean: of the pixels (0 to 255, RGB), to be subtracted from
    images; crop: the images' size.
    """

    variables: dict
    mean: tuple[float, float, float]
    crop: int


def content(file: str) -> bytes:
    """Reads a whole file of weights. Raises UserError if it cannot be read or is too large."""
    path = paths.path(file)
    try:
        if path.stat().length > LARGEST:
            raise UserError(f'{file}: larger than 2 GiB, so not a file of weights in this format')
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{file}: cannot be read: {reason(error)}') from error


@functools.lru_cache(maxsize=8)
def leaves(net: Network) -> dict[network.Path, tuple[int, ...]]:
    """The shape of every variable of a network, by its path: ('params', 'conv1', 'kernel')."""
    found = jax.tree.leaves_with_path(network.shapes(net, ANY_CROP))
    return {network.names_of(path): leaf.shape for path, leaf in found}


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
    """The first kernel [...,3,O] of a network that gets pixels (0 to 255), from another that divides them.

    std: what the other divides pixels by, for each channel or all; ours divides by `net.input_std`.
    """
    factor = net.input_std / np.broadcast_to(np.asarray(std, np.float64), (3,))
    return (kernel * factor[:, None]).astype(kernel.dtype)


def listed(what: str, names: Sequence[str]) -> list[str]:
    """['missing: a, b'], at most four names; [] if there are none."""
    more = f' and {len(names) - 4} more' * (len(names) > 4)
    return [f'{what}: {", ".join(map(printable, names[:4]))}{more}'] * bool(names)
