"""How CPUs and accelerators compute differently, for speed: all such choices in one place.

Both compute the same function. Choices that depend on anything but the kind of device are made where
they are used, such as XLA flags in `mesh.py`.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Backend(NamedTuple):
    blocks: bool  # strided convolutions on blocks of pixels, since matrix units need many channels
    # donate the state to a step; CPUs would copy it first, since the update reads it twice
    donate: bool
    # several steps in one loop, in which XLA's convolutions on CPUs are many times slower
    loop: bool
    # several programs in flight, with which virtual CPU devices could deadlock
    overlap: bool
    shifts: bool  # depthwise convolutions as shifted products, for which XLA is slow on CPUs
    products: bool  # 1 x 1 convolutions as matrix products, whose gradients are faster on CPUs
    keep_programs: bool  # cache compiled programs on disk; compiling for CPUs takes seconds
    # maximum pooling as one operator, and hidden layers as one product per tower, as other programs have
    operators: bool = False
    # local response normalization and sums over windows as one operator, too, as only ONNX has
    sums: bool = False


CPU = Backend(
    blocks=False,
    donate=False,
    loop=False,
    overlap=False,
    shifts=True,
    products=True,
    keep_programs=False,
)
ACCELERATOR = Backend(
    blocks=True,
    donate=True,
    loop=True,
    overlap=True,
    shifts=False,
    products=False,
    keep_programs=True,
)
PORTABLE = CPU._replace(shifts=False, products=False, operators=True)
_forced = contextvars.ContextVar('_forced', default=None)


@contextlib.contextmanager
def portable(*, sums: bool = False) -> Iterator[None]:
    """Networks traced in this context compute with the operators that other programs have."""
    token = _forced.set(PORTABLE._replace(sums=sums))
    try:
        yield
    finally:
        _forced.reset(token)


def choices(mesh: Mesh | None = None) -> Backend:
    """The choices for a mesh or, without one, for JAX's default devices; commands use no others."""
    if forced := _forced.get():
        return forced
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return CPU if platform == 'cpu' else ACCELERATOR
