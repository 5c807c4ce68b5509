"""What CPUs, GPUs and TPUs do differently for speed, all in one place.

All compute the same function, up to the rounding stated here. Choices that depend on anything but the kind
of device are made where they are used, such as XLA flags in `mesh.py`. docs/scaling.md gives the gain
of each.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Backend(NamedTuple):
    # donate the state to a step; CPUs would copy it first, since the update reads it twice
    donate: bool
    # several steps in one loop, in which XLA's convolutions on CPUs are many times slower
    loop: bool
    # several programs in flight, with which virtual CPU devices could deadlock
    overlap: bool
    shifts: bool  # depthwise convolutions as shifted products, since XLA's are slow on CPUs
    products: bool  # 1 x 1 convolutions as matrix products, whose gradients are faster on CPUs
    keep_programs: bool  # cache compiled programs on disk; compiling for CPUs takes seconds
    # the gradient of max pooling: 'interleaved' arrays, one per kind of pixel; the same arrays 'spread',
    # with zeros between their pixels, and summed; or a sum of such arrays, one per position in the 'window'
    pooling: str
    # sums over channels in bfloat16 networks as products with a band matrix, of terms rounded to bfloat16
    band: bool = False
    # the gradient of normalization recomputes the squares, which XLA would keep in float32 otherwise,
    # and rounds what it sums over channels to the dtype of the network
    barrier: bool = False
    # max pooling as one operator, and hidden layers as one product per tower, as in other frameworks
    operators: bool = False
    # local response normalization and sums over windows as one operator, too, which only ONNX has
    sums: bool = False


CPU = Backend(
    donate=False,
    loop=False,
    overlap=False,
    shifts=True,
    products=True,
    keep_programs=False,
    pooling='interleaved',
)
GPU = Backend(
    donate=True,
    loop=True,
    overlap=True,
    shifts=False,
    products=False,
    keep_programs=True,
    pooling='window',
    barrier=True,
)
TPU = GPU._replace(barrier=False, band=True, pooling='spread')
PORTABLE = CPU._replace(shifts=False, products=False, operators=True)
_forced = contextvars.ContextVar('_forced', default=None)


@contextlib.contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Networks traced in this context make these choices."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def portable(*, sums: bool = False) -> contextlib.AbstractContextManager:
    """Networks traced in this context compute with the operators that other frameworks have."""
    return using(PORTABLE._replace(sums=sums))


def on(mesh: Mesh, function: Callable) -> Callable:
    """Returns the function, traced with the choices for a mesh, whose devices need not be present."""

    @functools.wraps(function)
    def traced(*args):
        with using(choices(mesh)):
            return function(*args)

    return traced


def choices(mesh: Mesh | None = None) -> Backend:
    """The choices of the context (`using`), else those for a mesh, else for JAX's default devices."""
    if forced := _forced.get():
        return forced
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return {'cpu': CPU, 'tpu': TPU}.get(platform, GPU)
