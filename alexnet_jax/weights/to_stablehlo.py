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


def run(content: bytes, arrays: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Runs a program on the default device -> logits f32[B,K]."""
    return np.asarray(export.deserialize(bytearray(content)).call(arrays, images))
