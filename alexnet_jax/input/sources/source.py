"""The interface of all image sources: names, counts, and reading in a fixed order."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError


class Example(NamedTuple):
    """One image as the source stores it."""

    name: str  # a file or an id, for error messages
    data: bytes | np.ndarray  # an encoded image, or u8[H,W,C]
    label: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A labeled set of images with a 'train' and a 'val' split."""

    name: str
    class_names: list[str]  # by label
    splits: dict[str, int]  # {'train': N, 'val': M}
    read: Callable[[str, int], Iterator[Example]]  # (split, start): records start, start + 1, ...
    exif: bool = True  # what `data.exif` 'auto' means: images are turned as their EXIF data say


def is_path(name: str) -> bool:
    """Returns whether a name is a path: a folder, a file with a suffix, or what starts like a path.

    A '/' alone does not decide: TFDS names can contain one, as in imagenet_resized/32x32.
    """
    file = os.path.isfile(name) and bool(os.path.splitext(name)[1])
    return file or os.path.isdir(name) or name.startswith(('/', './', '../', '~'))


def split_off(count: int, fraction: float, seed: int, name: str) -> dict[str, np.ndarray]:
    """Splits records 0..count-1 at random -> {'train': i64[N], 'val': i64[M]}, each ascending."""
    held_out = round(count * fraction)
    if not 0 < held_out < count:
        raise UserError(
            f'val_fraction {fraction} of the {count} pictures of {name} leaves '
            f'{count - held_out} for training and {held_out} for validation: give another '
            '--val_fraction, or a val/ split'
        )
    order = np.random.default_rng(seed).permutation(count)
    return {'train': np.sort(order[held_out:]), 'val': np.sort(order[:held_out])}


def import_tensorflow():
    """Imports TensorFlow, quiet and without accelerators; UserError if it is not installed."""
    os.environ.setdefault(
        'TF_CPP_MIN_LOG_LEVEL', '2'
    )  # no notes about CPU features or missing GPUs
    # not needed here, and it prints a note at every start
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f'this needs TensorFlow, which cannot be imported ({error})') from error
    tf.config.set_visible_devices(
        [], 'GPU'
    )  # reading needs no GPU, and JAX wants all of its memory
    return tf
