"""Reads PyTorch's .pth files of tensors, without PyTorch and without running what a pickle says.

torch.save writes a zip archive with a pickle, which describes tensors, and a member for the bytes of each
storage. Before PyTorch 1.6, it wrote pickles and storages one after another. Nothing is trusted: the only
things a pickle can make here are dicts, numbers, strings and descriptions of tensors.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_jax.weights.variables import Damaged

ZIP = b'PK\x03\x04'
# The pickle of the number that older files begin with.
LEGACY = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e')
LONGEST = 2**24  # bytes of a pickle
STORAGES = {
    'DoubleStorage': np.dtype('<f8'),
    'FloatStorage': np.dtype('<f4'),
    'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': np.dtype(jnp.bfloat16),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'),
    'CharStorage': np.dtype('i1'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
}
NESTED = (
    'state_dict',
    'model_state_dict',
    'model',
    'net',
)  # where training scripts put the state dict


class Storage(NamedTuple):
    dtype: np.dtype
    key: str
    count: int


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def state_dict(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file by name, of the state dict that it is or has; raises Damaged."""
    found = _zipped(data) if data.startswith(ZIP) else _legacy(data)
    for name in NESTED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict):
        raise Damaged('it holds no state dict; save model.state_dict()')
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, np.ndarray):
            raise Damaged(f'it holds no state dict: {str(name)[:60]} is not a tensor')
    # DataParallel puts this before or into every name.
    return {name.replace('module.', ''): x for name, x in found.items()}


def _zipped(data: bytes) -> Any:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = archive.infolist()
        root = members[0].filename.split('/')[0]
        for member in members:
            if member.filename.split('/')[0] != root or '..' in member.filename.split('/'):
                raise Damaged(f'its archive has a file {member.filename[:60]}')
        if any(x.compress_type or x.file_size != x.compress_size for x in members):
            raise Damaged('its archive is compressed, which torch.save does not do')
        if sum(x.file_size for x in members) > len(data):
            raise Damaged('the files in its archive overlap')
        names = {x.filename for x in members}
        if f'{root}/byteorder' in names and archive.read(f'{root}/byteorder') != b'little':
            raise Damaged('its numbers are not little-endian')
        found, _ = _unpickled(archive.read(f'{root}/data.pkl'))
        keys = {tensor.storage.key for tensor in _tensors(found)}
        storages = {key: archive.read(f'{root}/data/{key}') for key in keys}
    except (zipfile.BadZipFile, KeyError, IndexError, EOFError, OSError, ValueError) as error:
        raise Damaged(' '.join(str(error).split())[:100]) from None
    except (NotImplementedError, RuntimeError):
        raise Damaged('its archive is encrypted or in another version') from None
    return _with_arrays(found, storages)


def _legacy(data: bytes) -> Any:
    at, parts = 0, []
    for _ in range(5):  # magic number, version, system, the object, the storages' names
        part, size = _unpickled(data[at : at + LONGEST])
        at += size
        parts.append(part)
    *_, system, found, keys = parts
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise Damaged('its numbers are not little-endian')
    described = {tensor.storage.key: tensor.storage for tensor in _tensors(found)}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Damaged('it has no list of storages')
    storages = {}
    for key in keys:
        count, at = int.from_bytes(data[at : at + 8], 'little'), at + 8
        if key not in described:
            raise Damaged(f'it has a storage {key[:60]} that no tensor has')
        size = count * described[key].dtype.itemsize
        if size > len(data) - at:
            raise Damaged(f'it ends after {len(data):,} bytes')
        storages[key] = data[at : at + size]
        at += size
    return _with_arrays(found, storages)


def _unpickled(data: bytes) -> tuple[Any, int]:
    """(what a pickle makes, its length in bytes)"""

    # Functions of this call: a pickle can set attributes of what it gets.
    def tensor(storage, offset, shape, strides, *_):
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise Damaged('a tensor has no storage or shape')
        if not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or len(shape) > 8:
            raise Damaged('a tensor has an impossible shape')
        return Tensor(storage, offset, (*shape,), (*strides,))

    def parameter(found, *_):
        return found

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module == 'torch' and name in STORAGES:
                return name
            allowed = {
                ('collections', 'OrderedDict'): collections.OrderedDict,
                ('torch._utils', '_rebuild_tensor'): tensor,
                ('torch._utils', '_rebuild_tensor_v2'): tensor,
                ('torch._utils', '_rebuild_parameter'): parameter,
            }
            if (module, name) not in allowed:
                raise Damaged(
                    f'its pickle asks for {module[:60]}.{name[:60]}, which only a program would need; '
                    'save model.state_dict()'
                )
            return allowed[module, name]

        def persistent_load(self, saved):
            kind, dtype, key, _, count, *_ = saved
            if kind != 'storage' or dtype not in STORAGES or type(count) is not int:
                raise Damaged('a storage is described wrongly')
            return Storage(STORAGES[dtype], str(key), count)

    try:
        end = 0
        for code, argument, place in pickletools.genops(data[:LONGEST]):
            end = place + 1
            if 'PUT' in code.name and int(argument) > len(data):
                raise Damaged('its pickle reserves memory')  # for as many objects
        return Unpickler(io.BytesIO(data)).load(), end
    except Damaged:
        raise
    except Exception as error:  # a damaged pickle can raise any
        raise Damaged(f'its pickle is damaged: {" ".join(str(error).split())[:100]}') from None


def _tensors(found: Any) -> list[Tensor]:
    """The descriptions of tensors in dicts, at most two deep."""
    if not isinstance(found, dict):
        return []
    inner = [x for value in found.values() if isinstance(value, dict) for x in value.values()]
    return [x for x in (*found.values(), *inner) if isinstance(x, Tensor)]


def _with_arrays(found: Any, storages: dict[str, bytes]) -> Any:
    if isinstance(found, Tensor):
        return _array(found, storages)
    if isinstance(found, dict):
        return {
            name: _with_arrays(x, storages) if isinstance(x, Tensor | dict) else x
            for name, x in found.items()
        }
    return found


def _array(tensor: Tensor, storages: dict[str, bytes]) -> np.ndarray:
    storage, offset, shape, strides = tensor
    stored = storages.get(storage.key)
    if stored is None or len(stored) != storage.count * storage.dtype.itemsize:
        raise Damaged(f'storage {storage.key[:60]} does not have {storage.count:,} numbers')
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    if last >= storage.count or math.prod(shape) > storage.count:
        raise Damaged(f'a tensor lies outside storage {storage.key[:60]}')
    array = np.frombuffer(stored, storage.dtype)[offset:]
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(array, shape, steps, writeable=False)
