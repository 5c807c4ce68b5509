"""Writes a network as a StableHLO program (`jax.export`), whose parameters are arguments."""

from collections.abc import Callable

import jax
import numpy as np
from jax import export

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def program(function: Callable, arrays: dict[str, np.ndarray], crop: int, dtype) -> bytes:
    """Returns the program of function(arrays, images [B,crop,crop,3]) -> f32[B,K] for any B.

    `jax.export.deserialize(program).call(arrays, images)` runs it on any of `PLATFORMS`.
    """
    (batch,) = export.symbolic_shape('batch')
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    images = jax.ShapeDtypeStruct((batch, crop, crop, 3), dtype)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(shapes, images)
    return bytes(exported.serialize())


def runner(content: bytes, arrays: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A program on the default device, as a function from images to logits f32[B,K]."""
    call = export.deserialize(bytearray(content)).call
    return lambda images: np.asarray(call(arrays, images))
