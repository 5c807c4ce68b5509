"""What a checkpoint records about its arrays: names, shapes, dtypes, and a fingerprint of the bits."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_jax.common.errors import UserError
from alexnet_jax.common.paths import Path


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, such as 'params/conv1/kernel'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def fingerprints(tree: Any) -> dict[str, int]:
    """A 32-bit fingerprint of every leaf of a pytree of jax.Arrays, by name.

    It is the sum mod 2^32 of the leaf's 32-bit words, each times an odd number derived from its
    position. Any single changed bit changes it, and so do misplaced values. Integer sums do not
    depend on their order, so it is the same on every mesh.
    """
    leaves = named_leaves(tree)
    values = jax.device_get(_fingerprints(list(leaves.values())))
    return {name: int(value) for name, value in zip(leaves, values, strict=True)}


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    def fingerprint(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        # The flat index, axis by axis, since flattening a sharded array would move it.
        place = jnp.zeros(words.shape, jnp.uint32)
        for axis, size in enumerate(words.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, words.shape, axis
            )
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return [fingerprint(x) for x in leaves]


def describe(state: Any) -> dict[str, dict]:
    """Shape, dtype and fingerprint of every leaf, by name."""
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):  # orbax would restore others unsharded and unchecked
            raise TypeError(f'{name} is a {type(leaf).__name__}, not a jax.Array')
    values = fingerprints(state)
    return {
        name: {'shape': leaf.shape, 'dtype': str(leaf.dtype), 'fingerprint': values[name]}
        for name, leaf in leaves.items()
    }


def crc32(content: dict) -> int:
    """The CRC-32 of a JSON object."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_same_model(where: Path, stored: dict, target: Any, *, whole: bool) -> None:
    """Raises UserError unless the leaves `stored` at `where` match `target` by name, shape and dtype.

    With `whole`, there must be no other leaves either.
    """
    wanted = named_leaves(target)
    for name, leaf in wanted.items():
        if name not in stored:
            raise UserError(f'{where}: has no {name}; it belongs to another model')
        there = (tuple(stored[name]['shape']), stored[name]['dtype'])
        here = (tuple(leaf.shape), str(leaf.dtype))
        if there != here:
            raise UserError(
                f'{where}: {name} is {there[1]}{list(there[0])} there and '
                f'{here[1]}{list(here[0])} here; it belongs to another model'
            )
    left_over = [name for name in stored if name not in wanted]
    if whole and left_over:
        raise UserError(
            f'{where}: has {left_over[0]}, which this model lacks; it belongs to another model'
        )
