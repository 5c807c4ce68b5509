"""What CPUs do otherwise than accelerators, for speed: every such choice of form, in one place.

Both compute the same function. What is decided by other facts than the kind of device stands where it
is used: flags of XLA in `mesh.py`.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Backend(NamedTuple):
    blocks: bool  # strided convolutions on blocks of pixels: matrix units want many channels
    # a step destroys the state it is given; CPUs copy it first: the update reads it twice
    donate: bool
    # several steps as a loop; within one, XLA's convolutions on CPUs are many times slower
    loop: bool
    # several programs in flight: virtual CPU devices could wait for each other for ever
    overlap: bool
    keep_programs: bool  # compiled programs on disk; on CPUs compiling takes seconds


CPU = Backend(blocks=False, donate=False, loop=False, overlap=False, keep_programs=False)
ACCELERATOR = Backend(blocks=True, donate=True, loop=True, overlap=True, keep_programs=True)


def choices(mesh: Mesh | None = None) -> Backend:
    """Those for a mesh, or, where none is known, for JAX's default devices; commands use no others."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return CPU if platform == 'cpu' else ACCELERATOR
