"""Reads PyTorch's .pth files of tensors, without PyTorch and without executing pickles.

torch.save writes a zip archive with a pickle, which describes tensors, and a member for the bytes of each
storage. Before PyTorch 1.6, it wrote pickles and storages one after another. Nothing is trusted: the only
things a pickle can make here are dicts, numbers, strings and descriptions of tensors.
"""

import collections
import io
import math
import pickle
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_jax.common.errors import one_line
from alexnet_jax.weights.variables import Damaged

ZIP, PICKLE = b'PK\x03\x04', b'\x80'
# The pickle of the number that older files begin with.
LEGACY = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e')
LONGEST = 2**24  # bytes of a pickle
LOADERS = pickle._Unpickler.dispatch
# Opcodes that tensors do not need: sets, buffers, the registry of extensions, old forms.
USELESS = b'\x8f\x90\x91\x96\x97\x98\x82\x83\x84dio'
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
    """The tensors, by name, of the state dict that a file is or contains; raises Damaged."""
    if not data.startswith((ZIP, PICKLE)):
        raise Damaged('it does not begin like a torch.save file')
    described, storages = _zipped(data) if data.startswith(ZIP) else _legacy(data)
    # DataParallel adds `module` to every name, in front or within.
    names = ['.'.join(x for x in name.split('.') if x != 'module') for name in described]
    if len({*names}) < len(names):
        raise Damaged('two of its names differ only in `module`')
    arrays = [_array(tensor, storages) for tensor in described.values()]
    return dict(zip(names, arrays, strict=True))


def _described(found: Any) -> dict[str, Tensor]:
    """The state dict that a file is or contains, before its arrays are read."""
    if isinstance(found, dict):
        inner = (found[name] for name in NESTED if isinstance(found.get(name), dict))
        found = next(inner, found)
    if not isinstance(found, dict):
        raise Damaged('it contains no state dict; save model.state_dict()')
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise Damaged(f'it contains no state dict: {str(name)[:60]} is not a tensor')
    return found


def _zipped(data: bytes) -> tuple[dict[str, Tensor], dict[str, bytes]]:
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
        if archive.getinfo(f'{root}/data.pkl').file_size > LONGEST:
            raise Damaged(f'its pickle has more than {LONGEST:,} bytes')
        found = _described(_unpickled(archive.read(f'{root}/data.pkl'))[0])
        keys = {tensor.storage.key for tensor in found.values()}
        storages = {key: archive.read(f'{root}/data/{key}') for key in keys}
    except (zipfile.BadZipFile, KeyError, IndexError, EOFError, OSError, ValueError) as error:
        raise Damaged(' '.join(str(error).split())[:100]) from None
    except (NotImplementedError, RuntimeError):
        raise Damaged('its archive is encrypted or has an unsupported version') from None
    return found, storages


def _legacy(data: bytes) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    at, parts, described = 0, [], {}
    for _ in range(5):  # magic number, version, system, the object, the storages' names
        part, size, its = _unpickled(data[at : at + LONGEST])
        at += size
        parts.append(part)
        described |= its
    *_, system, found, keys = parts
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise Damaged('its numbers are not little-endian')
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Damaged('it has no list of storages')
    storages = {}
    for key in keys:
        count, at = int.from_bytes(data[at : at + 8], 'little'), at + 8
        if key not in described:
            raise Damaged(f'it has a storage {key[:60]} that no tensor uses')
        size = count * described[key].dtype.itemsize
        if size > len(data) - at:
            raise Damaged(f'it ends after {len(data):,} bytes')
        storages[key] = data[at : at + size]
        at += size
    return _described(found), storages


def _unpickled(data: bytes) -> tuple[Any, int, dict[str, Storage]]:
    """(what a pickle makes, its length in bytes, the storages that it describes)"""
    storages = {}

    # Functions of this call: a pickle can set attributes of what it gets.
    def tensor(storage, offset, shape, strides, *_):
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or len(shape) != len(strides):
            raise Damaged('a tensor has no storage or shape')
        if not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or len(shape) > 8:
            raise Damaged('a tensor has an impossible shape')
        if math.prod(max(n, 1) for n in shape) >= 2**40:
            raise Damaged('a tensor has an impossible shape')
        return Tensor(storage, offset, (*shape,), (*strides,))

    def parameter(found, *_):
        return found

    def ordered(pairs=()):
        check([key for key, _ in pairs])
        return collections.OrderedDict(pairs)

    def check(keys):  # before they are hashed, which can take forever
        if not all(type(key) in (str, int) for key in keys):
            raise Damaged('a dict has keys that are not names or numbers')

    class Unpickler(pickle._Unpickler):  # the C version cannot check keys
        def find_class(self, module, name):
            if module == 'torch' and name in STORAGES:
                return name
            allowed = {
                ('collections', 'OrderedDict'): ordered,
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
            texts = all(isinstance(x, str) for x in (kind, dtype, key))
            valid = texts and kind == 'storage' and dtype in STORAGES and type(count) is int
            if not valid or not 0 <= count < 2**62:
                raise Damaged('a storage is described wrongly')
            storage = Storage(STORAGES[dtype], key, count)
            if storages.setdefault(key, storage) != storage:
                raise Damaged(f'storage {key[:60]} is described twice')
            return storage

        def load_setitem(self):
            check(self.stack[-2:-1])
            super().load_setitem()

        def load_setitems(self):
            check(self.stack[::2])
            super().load_setitems()

        dispatch = {code: load for code, load in LOADERS.items() if code not in USELESS}
        dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}

    file = io.BytesIO(data)
    try:
        return Unpickler(file).load(), file.tell(), storages
    except Damaged:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Damaged(f'its pickle is damaged: {one_line(error)[:100]}') from None


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
