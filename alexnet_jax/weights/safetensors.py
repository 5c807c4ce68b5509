"""Reads and writes .safetensors files: a JSON header with the place of each array, then the arrays.

The format: https://github.com/huggingface/safetensors. Nothing is trusted: as in the reference
implementation, the arrays must cover the bytes after the header exactly.
"""

import json
import math
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.weights import variables
from alexnet_jax.weights.variables import Damaged

DTYPES = {
    'BOOL': np.dtype(np.bool_),
    **{f'U{8 * n}': np.dtype(f'<u{n}') for n in (1, 2, 4, 8)},
    **{f'I{8 * n}': np.dtype(f'<i{n}') for n in (1, 2, 4, 8)},
    **{f'F{8 * n}': np.dtype(f'<f{n}') for n in (2, 4, 8)},
    'BF16': np.dtype(jnp.bfloat16),
}
LONGEST = 100_000_000  # bytes of a header, as in the reference implementation
METADATA = '__metadata__'


def read(file: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file -> (arrays by name, metadata). The arrays are views of the bytes read.

    Raises UserError if the file cannot be read or is damaged.
    """
    return decoded(variables.content(file), file)


def decoded(data: bytes, file: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`read` of bytes; file: what errors call them."""
    try:
        return _arrays(data)
    except Damaged as error:
        raise UserError(f'{file}: not a .safetensors file ({error}): get a fresh copy') from None


def write(file: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a file atomically; UserError for an array of an unsupported type, or if it cannot be written."""
    try:
        paths.replace(file, encoded(arrays, metadata))
    except paths.failures(paths.path(file)) as error:
        raise UserError(f'{paths.full(error)}{file}: cannot be written: {reason(error)}') from error


def encoded(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The content of a file with these arrays; the same bytes for the same arrays in any order."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    parts, at = [], 0
    # The widest come first, so that all are aligned.
    for name in sorted(arrays, key=lambda name: (-np.asarray(arrays[name]).itemsize, name)):
        x = np.asarray(arrays[name])
        dtype = x.dtype.newbyteorder('<')
        if dtype not in codes or name == METADATA:
            raise UserError(
                f'{name}: .safetensors cannot hold an array of {x.dtype} under this name'
            )
        parts.append(x.astype(dtype, copy=False).tobytes())
        place = [at, at + len(parts[-1])]
        header[name] = {'dtype': codes[dtype], 'shape': [*x.shape], 'data_offsets': place}
        at = place[1]
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    return b''.join([struct.pack('<Q', len(text)), text, *parts])


def _arrays(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    length = int.from_bytes(data[:8], 'little')
    if len(data) < 8 or length > LONGEST:
        raise Damaged('its header has no valid length')
    start = 8 + length
    if start > len(data):
        raise Damaged(f'truncated: a header of {length:,} bytes in a file of {len(data):,}')
    try:
        header = json.loads(data[8:start].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise Damaged('its header is not JSON') from None
    metadata = header.pop(METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise Damaged('its header is not a table of arrays')
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, (dtype, shape, first, last) in sorted(places.items(), key=lambda x: x[1][2:]):
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise Damaged(f'{name[:60]} does not begin or end where its shape and neighbors say')
        end = last
    if start + end > len(data):
        raise Damaged(f'truncated: {len(data):,} of {start + end:,} bytes')
    if start + end < len(data):
        raise Damaged(f'{len(data) - start - end:,} bytes too many')
    try:
        found = {
            name: np.ndarray(shape, dtype, data, start + first)
            for name, (dtype, shape, first, _) in places.items()
        }
    except (ValueError, TypeError):  # an empty array with an enormous side
        raise Damaged('an array has a shape that is too large') from None
    return found, metadata


def _unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError('a name appears twice')
    return found


def _place(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, end) of an array, from its entry in the header."""
    try:
        dtype, shape, (first, last) = DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
        numbers = [*shape, first, last]
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > 32:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise Damaged(f'its header describes {name[:60]} wrongly') from None
    return dtype, tuple(shape), first, last
