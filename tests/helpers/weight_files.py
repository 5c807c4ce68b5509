"""Writes weight files as other frameworks do: .pth, .caffemodel, .binaryproto, .onnx, .tflite."""

import io
import math
import pickle
import struct
import zipfile

import numpy as np

from alexnet_jax.weights import pth, tflite, variables

EVIL = 'a\n\x1b[31mevil'  # a name that must not reach a terminal
SHOWN = r'a\n\x1b[31mevil'  # in errors
STORAGE = {np.dtype(np.float32): 'FloatStorage', np.dtype(np.float16): 'HalfStorage'}
STORAGE |= {np.dtype(np.float64): 'DoubleStorage', np.dtype(np.int64): 'LongStorage'}


def random_arrays(shapes, seed=0):
    """He-initialized weights for {name: shape}, [O,I,...]; vectors are small."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        if len(shape) < 2:
            return rng.normal(0, 0.1, shape)
        return rng.normal(size=shape, scale=(2 / math.prod(shape[1:])) ** 0.5)

    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


def their_shapes(net, name, crop):
    """{name(path): shape}, as PyTorch, Caffe and ONNX have them."""
    shapes = variables.leaves(net, crop)
    return {name(path): variables.their_shape(net, path, x) for path, x in shapes.items()}


# .pth


def _op(x):
    if isinstance(x, bytes):  # opcodes
        return x
    if isinstance(x, bool):
        return b'\x88' if x else b'\x89'
    if isinstance(x, int):
        return b'\x8a\x08' + struct.pack('<q', x)
    if isinstance(x, str):
        return b'X' + struct.pack('<I', len(x.encode())) + x.encode()
    return b'(' + b''.join(map(_op, x)) + b't'


def call(module, name, *arguments):
    """A pickle's opcodes that call a function."""
    return f'c{module}\n{name}\n'.encode() + _op(arguments) + b'R'


def tensor(key, dtype, shape, strides=None, offset=0, count=None):
    """The opcodes of a tensor in the storage KEY."""
    strides = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    kind = f'ctorch\n{STORAGE[np.dtype(dtype)]}\n'.encode()
    saved = _op(('storage', kind, key, 'cpu', math.prod(shape) if count is None else count))
    ordered = call('collections', 'OrderedDict')
    return call(
        'torch._utils',
        '_rebuild_tensor_v2',
        saved + b'Q',
        offset,
        (*shape,),
        (*strides,),
        False,
        ordered,
    )


def table(entries):
    """The opcodes of an OrderedDict {name: opcodes}."""
    items = b''.join(_op(name) + value for name, value in entries.items())
    return call('collections', 'OrderedDict') + b'(' + items + b'u'


def described(entries):
    """A pickle of an OrderedDict {name: opcodes}."""
    return b'\x80\x02' + table(entries) + b'.'


def zipped(members, compression=zipfile.ZIP_STORED, root='archive/'):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(f'{root}{name}', content)
    return file.getvalue()


def pth_of(arrays, legacy=False, checkpoint=False):
    """The bytes of a state dict's file, or of a checkpoint with it and the momentum of every array."""
    entries = {name: tensor(str(i), x.dtype, x.shape) for i, (name, x) in enumerate(arrays.items())}
    if checkpoint:
        moments = {f'{name}, momentum': x / 2 for name, x in arrays.items()}
        state = {
            i: table({'momentum_buffer': tensor(str(len(arrays) + i), x.dtype, x.shape)})
            for i, x in enumerate(moments.values())
        }
        entries = {
            'epoch': _op(7),
            'state_dict': table(entries),
            'optimizer': table({'state': table(state), 'param_groups': b'](' + _op((1, 2)) + b'e'}),
        }
        arrays = arrays | moments
    storages = {str(i): np.ascontiguousarray(x).tobytes() for i, x in enumerate(arrays.values())}
    if not legacy:
        data = {f'data/{key}': content for key, content in storages.items()}
        return zipped({'data.pkl': described(entries), 'byteorder': b'little', **data})
    parts = [pth.LEGACY, pickle.dumps(1001, 2), pickle.dumps({'little_endian': True}, 2)]
    parts += [described(entries), pickle.dumps([*storages], 2)]
    for x, content in zip(arrays.values(), storages.values(), strict=True):
        parts += [struct.pack('<q', x.size), content]
    return b''.join(parts)


# Protocol Buffers


def varint(n):
    low = bytes([n & 127 | (n > 127) << 7])
    return low + varint(n >> 7) if n > 127 else low


def field(number, value):
    """A field of a message: an integer, a float, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack('<f', value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(x, old=False):
    """Caffe's BlobProto; old: with four dimensions."""
    if old:
        shape = (*(1,) * (4 - x.ndim), *x.shape)
        dims = b''.join(field(i, n) for i, n in enumerate(shape, start=1))
    else:
        dims = field(7, field(1, b''.join(map(varint, x.shape))))
    return dims + field(5, x.astype('<f4').tobytes())


def caffe_name(path):
    """('params', LAYER, ..., 'kernel' or 'bias') -> what BVLC's and Han's prototxt call it."""
    parts = {'squeeze': 'conv1x1_1', 'expand1x1': 'conv1x1_2', 'expand3x3': 'conv3x3_2'}
    layer = '/'.join(parts.get(x, x) for x in path[1:-1])
    return layer.replace('conv10', 'conv_final'), int(path[-1] == 'bias')


def caffemodel(
    arrays,
    order=('LRN', 'Pooling'),
    name='AlexNet',
    old=False,
    lrn=None,
    padded=False,
    changes=None,
):
    """{(layer, i): array} -> a .caffemodel; order: of the operations after conv1 and conv2.

    changes: by layer, the fields of its parameters in place of the usual ones, {number: integer}.
    """
    types = {'Convolution': 4, 'LRN': 15, 'Pooling': 17, 'InnerProduct': 14}
    lrn = field(2, 1e-4) if lrn is None else lrn
    layers = []

    def add(layer, kind, parameters=b'', blobs=()):
        names = field(4, layer) + field(5, types[kind]) if old else field(1, layer) + field(2, kind)
        parts = [names, parameters, *(field(6 if old else 7, blob(x, old)) for x in blobs)]
        layers.append(field(2 if old else 100, b''.join(parts)))

    def parameters_of(layer, number, fields):
        return field(
            number, b''.join(field(*x) for x in (fields | (changes or {}).get(layer, {})).items())
        )

    fires = any('/' in layer for layer, _ in arrays)
    for layer in dict.fromkeys(layer for layer, _ in arrays):
        kernel = arrays[layer, 0]
        fields = {1: kernel.shape[0], 3: kernel.shape[-1] // 2, 4: kernel.shape[-1]}
        if layer == 'conv1':
            fields |= {3: 0, 6: 2 if fires else 4}
        if layer in ('conv2', 'conv4', 'conv5'):
            fields[5] = 2
        if padded and layer in ('conv10', 'conv_final'):
            fields[3] = 1
        convolution = parameters_of(layer, 10 if old else 106, fields)
        kind = 'Convolution' if kernel.ndim == 4 else 'InnerProduct'
        add(layer, kind, convolution, [arrays[layer, i] for i in (0, 1)])
        for op in order if layer in ('conv1', 'conv2') else ():
            title = f'{op.lower()}{layer[-1]}'
            pool = parameters_of(title, 19 if old else 121, {2: 3, 3: 2})
            add(title, op, field(18 if old else 118, lrn) if op == 'LRN' else pool)
    return field(1, name) + b''.join(layers)


def onnx_of(arrays, order=('LRN', 'MaxPool'), nodes=()):
    """{name: array} -> an .onnx file of initializers, and nodes without inputs.

    nodes: further ones, (operator, input, output, {attribute: integer or integers}).
    """
    lrn = {'alpha': 1e-4, 'beta': 0.75, 'bias': 1.0, 'size': 5}
    attributes = b''.join(
        field(5, field(1, name) + field(3 if isinstance(x, int) else 2, x))
        for name, x in lrn.items()
    )
    graph = [field(1, field(4, op) + (attributes if op == 'LRN' else b'')) for op in order]
    for op, weights, output, found in nodes:
        parts = [field(1, 'x'), field(1, weights), field(2, output), field(4, op)]
        for name, x in found.items():
            value = field(3, x) if isinstance(x, int) else b''.join(field(8, n) for n in x)
            parts.append(field(5, field(1, name) + value))
        graph.append(field(1, b''.join(parts)))
    for name, x in arrays.items():
        dims = b''.join(field(1, n) for n in x.shape)
        graph.append(field(5, dims + field(2, 1) + field(8, name) + field(9, x.tobytes())))
    shape = field(1, 2) + field(2, 7) + field(8, 'OC2_DUMMY_1') + field(9, bytes(16))
    return field(1, 7) + field(7, b''.join(graph) + field(5, shape))


# FlatBuffers


def flatbuffer(root):
    """A table {field: value} as a .tflite file.

    A value is a table, a list of tables, an array (one object is stored once), bytes to store unchanged,
    or a number in the table itself, as (its code in `struct`, number).
    """
    data, waiting, leaves = bytearray(4) + tflite.MAGIC, [(0, root)], {}
    for at, node in waiting:  # grows
        if isinstance(node, np.ndarray | bytes):  # at the end, after all offsets to it
            leaves.setdefault(id(node), (node, []))[1].append(at)
            continue
        start = len(data)
        struct.pack_into('<I', data, at, start - at)
        if isinstance(node, list):
            data += struct.pack('<I', len(node)) + bytes(4 * len(node))
            waiting += [(start + 4 + 4 * i, x) for i, x in enumerate(node)]
            continue
        body, places = bytearray(4), [0] * (max(node, default=-1) + 1)
        for number, value in node.items():
            places[number] = len(body)
            if not isinstance(value, tuple):
                waiting.append((start + len(body), value))
                value = 'I', 0
            body += struct.pack(f'<{value[0]}', value[1])
        struct.pack_into('<i', body, 0, -len(body))  # the list of places follows the table
        sizes = 4 + 2 * len(places), len(body)
        data += body + struct.pack(f'<{2 + len(places)}H', *sizes, *places)
    for node, places in leaves.values():
        for at in places:
            struct.pack_into('<I', data, at, len(data) - at)
        count = b'' if isinstance(node, bytes) else struct.pack('<I', len(node))
        data += count + bytes(node)
    return bytes(data)


def tflite_tables(net, crop, seed=0):
    """(the tables of a MobileNet v1's file, {kernel's path: what it holds}); one more class, background."""
    rng, tensors, buffers, ops, stored = np.random.default_rng(seed), [], [{}], [], {}

    def tensor(shape, dtype, values=None, scale=1 / 64, zero=0):
        quantization = {2: np.float32([scale]), 3: np.int64([zero])}
        kind = {np.uint8: 3, np.int32: 2}[dtype]
        fields = {0: np.int32(shape), 1: ('b', kind), 2: ('I', 0), 4: quantization}
        if values is not None:
            fields[2] = 'I', len(buffers)
            buffers.append({0: np.frombuffer(values.tobytes(), np.uint8)})
        tensors.append(fields)
        return len(tensors) - 1

    def op(code, inputs, shape, options):
        output = tensor((1, *shape), np.uint8)
        fields = {0: ('I', code), 1: np.int32(inputs), 2: np.int32([output]), 4: options}
        ops.append(fields)
        return output

    here = tensor((1, crop, crop, 3), np.uint8, scale=1 / 128, zero=128)
    for layer in tflite._layers(net, crop):
        head = layer.path[1] == 'fc'
        shape = (1, 1, *layer.kernel) if head else layer.kernel
        output = layer.output
        if head:
            here = op(2, [here], (1, 1, shape[-2]), {})
            shape, output = (*shape[:-1], shape[-1] + 1), (1, 1, shape[-1] + 1)
        theirs = (1, *shape) if layer.depthwise else (shape[-1], *shape[:-1])
        kernel = stored[layer.path] = rng.integers(0, 256, theirs, np.uint8)
        bias = rng.integers(-99, 99, shape[-1], np.int32)
        inputs = [
            here,
            tensor(theirs, np.uint8, kernel, zero=100),
            tensor(bias.shape, np.int32, bias),
        ]
        activation = {4 if layer.depthwise else 3: ('b', 0 if head else 3)}
        here = op(1 if layer.depthwise else 0, inputs, output, activation)
    codes = [{0: ('b', code)} for code in (tflite.CONV, tflite.DEPTHWISE, tflite.AVERAGE_POOL)]
    graph = {0: tensors, 1: np.int32([0]), 2: np.int32([here]), 3: ops}
    return {1: codes, 2: [graph], 4: buffers}, stored
