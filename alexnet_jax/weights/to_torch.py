"""Writes PyTorch's state dicts, without PyTorch: torchvision's, or one for the towers of AlexNet.

The class that takes the latter is in `docs/weights.md`.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable

import jax
import numpy as np

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.alexnet import AlexNet
from alexnet_jax.nets.mobilenet import MobileNet
from alexnet_jax.nets.network import Network
from alexnet_jax.nets.squeezenet import SqueezeNet
from alexnet_jax.weights import pth, torch, variables

EPSILON = 1e-5  # of torchvision's batch normalization
# Fields that torchvision's networks do not have, with their values there.
FIXED = {MobileNet: {'padding': 'torch', 'activation': 'relu6'}, SqueezeNet: {'width': 1.0}}
STORAGES = {'<f4': 'FloatStorage', '<f2': 'HalfStorage', '<i8': 'LongStorage'}


def state_dict(net: Network, arrays: dict[network.Path, np.ndarray], crop: int) -> dict:
    """Returns the state dict of a network that gets pixels (0 to 255) minus the mean, [B,3,crop,crop].

    arrays: the variables by path. Raises UserError for networks that have no such class.
    """
    if isinstance(net, AlexNet) and not _is_torchvisions(net, crop):
        return _of_towers(net, arrays, crop)
    try:
        name, found = torch.names(net), {}
    except UserError:
        raise UserError(
            f'--format=torch: torchvision has no class for this {type(net).__name__}; export another format'
        ) from None
    _check(net)
    for path, x in arrays.items():
        shape = variables.their_shape(net, path, x.shape)
        y = _inverse(lambda a, path=path: variables.from_theirs(net, path, a), shape, x)
        y = y / _std(net, path) + _shift(net, path)
        if path[-1] == 'var':
            counter = name(path).rpartition('.')[0] + f'.{torch.COUNTER}'
            found[counter] = np.zeros((), np.int64)
        found[name(path)] = y
    return found


def variables_of(net: Network, state: dict[str, np.ndarray], crop: int) -> dict:
    """The variables of our network from `state_dict`, to compare what was written."""
    if isinstance(net, AlexNet) and not _is_torchvisions(net, crop):
        return variables.nest(
            {
                path: ours(state[f'{path[1]}.{torch.LEAVES[path[2]]}']) / factor
                for path, _, ours, factor in _layout(net, crop)
            }
        )
    found = torch.from_state_dict(net, state, crop=crop)
    named = {network.names_of(path): x for path, x in jax.tree.leaves_with_path(found)}
    return variables.nest(
        {path: (x - _shift(net, path)) * _std(net, path) for path, x in named.items()}
    )


def _shift(net: Network, path: network.Path) -> np.float32:
    """What to add to a variable, since torchvision's normalization uses a different epsilon."""
    return np.float32(net.norm_epsilon - EPSILON if path[-1] == 'var' else 0)


def _std(net: Network, path: network.Path) -> np.float32:
    """What to divide a variable by, since torchvision's network does not divide pixels."""
    first = path == ('params', 'conv1', 'kernel')
    return np.float32(getattr(net, 'input_std', 1.0) if first else 1)


def _check(net: Network) -> None:
    """Raises UserError for fields that torchvision's class does not have."""
    for name, value in FIXED.get(type(net), {}).items():
        if getattr(net, name) != value:
            raise UserError(
                f'--format=torch: torchvision has no {type(net).__name__} with config.model.{name}='
                f'{getattr(net, name)}; export another format'
            )


def _is_torchvisions(net: AlexNet, crop: int) -> bool:
    try:
        torch.names(net)
    except UserError:
        return False
    return crop in torch.CROPS


def _inverse(function: Callable, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """The array y of this shape with function(y) = x, for a function that only moves numbers."""
    y = np.empty(math.prod(shape), x.dtype)
    y[function(np.arange(y.size).reshape(shape)).reshape(-1)] = x.reshape(-1)
    return y.reshape(shape)


# The towers of AlexNet: their channels are concatenated, and convolutions that read one tower are groups.


def _of_towers(net: AlexNet, arrays: dict, crop: int) -> dict:
    separate = [name for name in ('fc6', 'fc7') if net.towers > 1 and name not in net.exchange]
    if separate:
        raise UserError(
            f'--format=torch: {separate[0]} reads only its own tower (config.model.exchange), which a '
            'torch.nn.Linear cannot do; export another format'
        )
    for name, value in {'remove': 'none', 'pooling': 'overlapping'}.items():
        if getattr(net, name) != value:
            raise UserError(
                f'--format=torch: the class in docs/weights.md has no config.model.{name}='
                f'{getattr(net, name)}; export another format'
            )
    return {
        f'{path[1]}.{torch.LEAVES[path[2]]}': factor * _inverse(ours, shape, arrays[path])
        for path, shape, ours, factor in _layout(net, crop)
    }


def _layout(net: AlexNet, crop: int):
    """Yields (path, shape in the state dict, function from that to ours, factor) of every parameter.

    The factor of 0.5 after dropout (§4.2 of the paper) is part of the next layer, as in PyTorch.
    """
    halved = {'outputs': ('fc7', 'fc8'), 'inputs': ('fc6', 'fc7')}[net.dropout_at]
    maps = net.per_tower(net.kernels[-1]) * net.towers
    for path, shape in variables.leaves(net, crop).items():
        _, layer, leaf = path
        factor = np.float32(0.5 if net.dropout == 'original' and layer in halved else 1)
        factor = factor if leaf == 'kernel' else np.float32(1)
        if leaf == 'bias':
            yield path, (math.prod(shape),), lambda x, shape=shape: x.reshape(shape), factor
        elif layer.startswith('conv'):
            towers, side, _, inner, outer = shape

            def conv(x, towers=towers):
                return x.reshape(towers, -1, *x.shape[1:]).transpose(0, 3, 4, 2, 1)

            yield path, (towers * outer, inner, side, side), conv, factor
        elif layer == 'fc8':
            towers, inner, outer = shape

            def last(x, towers=towers):
                return x.reshape(len(x), towers, -1).transpose(1, 2, 0)

            yield path, (outer, towers * inner), last, factor
        else:
            towers, inner, outer = shape
            side = math.isqrt(inner // maps) if layer == 'fc6' else 1

            def hidden(x, towers=towers, side=side):
                x = x.reshape(towers, len(x) // towers, -1, side, side).transpose(0, 3, 4, 2, 1)
                return x.reshape(towers, -1, x.shape[-1])

            yield path, (towers * outer, inner), hidden, factor


# The file


def encoded(state: dict[str, np.ndarray]) -> bytes:
    """Returns the .pth file of a state dict, as torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:

        def write(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f'archive/{name}'), data)

        write('data.pkl', _pickled(state))
        write('byteorder', b'little')
        for i, x in enumerate(state.values()):
            write(f'data/{i}', np.ascontiguousarray(x).tobytes())
        write('version', b'3\n')
    return buffer.getvalue()


def decoded(data: bytes) -> dict[str, np.ndarray]:
    """Reads what `encoded` returned."""
    return pth.state_dict(data)


def _pickled(state: dict[str, np.ndarray]) -> bytes:
    """The pickle of protocol 2 that describes the tensors; its names are only those of PyTorch.

    Python's own pickler would import PyTorch to check them.
    """
    parts = [pickle.PROTO + b'\x02', _called('collections', 'OrderedDict', b')'), pickle.MARK]
    for i, (name, x) in enumerate(state.items()):
        storage = STORAGES[x.dtype.str]
        strides = [math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)]
        saved = [_text('storage'), _global('torch', storage), _text(str(i)), _text('cpu')]
        saved = _tuple([*saved, _number(x.size)]) + pickle.BINPERSID
        sizes = [_tuple(map(_number, numbers)) for numbers in (x.shape, strides)]
        hooks = _called('collections', 'OrderedDict', b')')
        arguments = _tuple([saved, _number(0), *sizes, pickle.NEWFALSE, hooks])
        parts += [_text(name), _called('torch._utils', '_rebuild_tensor_v2', arguments)]
    return b''.join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


def _called(module: str, name: str, arguments: bytes) -> bytes:
    return _global(module, name) + arguments + pickle.REDUCE


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack('<I', len(text.encode())) + text.encode()


def _number(n: int) -> bytes:
    return pickle.LONG1 + bytes([8]) + struct.pack('<q', n)


def _tuple(parts) -> bytes:
    return pickle.MARK + b''.join(parts) + pickle.TUPLE
