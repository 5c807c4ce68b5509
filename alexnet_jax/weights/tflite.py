"""TensorFlow Lite's MobileNets (.tflite): 8-bit weights, with batch normalization folded in."""

import functools
import math
from typing import NamedTuple

import numpy as np

from alexnet_jax.nets import network
from alexnet_jax.nets.mobilenet import MobileNet
from alexnet_jax.weights import flatbuffer, variables
from alexnet_jax.weights.flatbuffer import Table
from alexnet_jax.weights.variables import Damaged, Imported, Options, Weights

# From TensorFlow's schema.fbs: codes of operators, types and activations.
ADD, AVERAGE_POOL, CONV, DEPTHWISE, RESHAPE, SOFTMAX = 0, 1, 3, 4, 22, 25
DTYPES = {2: np.int32, 3: np.uint8}
SAME, LINEAR, RELU6 = 0, 0, 3
MAGIC = b'TFL3'  # at byte 4
WIDTHS = (0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4)  # that were published
SIDES = range(32, 1025)  # of images, in pixels
MOST = 16  # inputs, outputs or dimensions


class Tensor(NamedTuple):
    """A tensor of the file: real value = scale * (stored value - zero)."""

    shape: tuple[int, ...]
    dtype: type
    buffer: int
    scale: float
    zero: int


class Op(NamedTuple):
    code: int
    inputs: tuple[int, ...]  # tensor indices
    output: int
    options: Table | None


class Model(NamedTuple):
    tensors: list[Tensor]
    ops: list[Op]
    input: int
    buffers: list[Table]


def read(data: bytes, options: Options) -> Imported:
    """Reads a MobileNet with 8-bit weights.

    In place of normalization, the layers have a bias (`variables.without_norm`); to train further,
    see `folded.unfolded`. TensorFlow's files have a class 0, background, which is dropped. Weights are
    exact; TensorFlow Lite also rounds every activation to 8 bits. Raises Damaged if the file is damaged or
    has none of these networks, and UserError if the user chose another network.
    """
    model = _model(data)
    found, changes, classes = _form(model)
    preset = options.chosen(found, (found,))
    weights = _weights(variables.preset(preset, classes, changes), model)
    return Imported(preset, changes, classes, weights, 'TensorFlow Lite', folded=True)


def _form(model: Model) -> tuple[str, dict, int]:
    """The preset, the fields of config.model and the classes, without background."""
    kernels = [
        _item(model.tensors, _item(op.inputs, 1)).shape for op in model.ops if op.code == DEPTHWISE
    ]
    preset, changes, last = {
        13: ('mobilenet:v1', {}, lambda net: net.channels(1024)),
        17: ('mobilenet', {'padding': 'tensorflow'}, lambda net: 6 * net.channels(160)),
    }.get(len(kernels), ('', {}, None))
    if not preset:
        raise Damaged(f'it has {len(kernels)} depthwise convolutions; MobileNets have 13 or 17')
    pooled = [op.output for op in model.ops if op.code == AVERAGE_POOL]
    classes = _classes(model, pooled[0]) if pooled else 0
    for width in WIDTHS:
        net = variables.preset(preset, 2, {**changes, 'width': width})
        if last(net) == kernels[-1][-1] and classes > 1:
            return preset, {**changes, 'width': width}, classes - (classes == 1001)
    raise Damaged(f'its last depthwise kernel is {[*kernels[-1]]}')


def _model(data: bytes) -> Model:
    model = flatbuffer.root(data, MAGIC)
    codes = [max(code.number(0, 'b'), code.number(3, 'i')) for code in model.tables(1)]
    graphs = model.tables(2)
    if len(graphs) != 1:
        raise Damaged(f'it has {len(graphs)} graphs')
    tensors = [*map(_tensor, graphs[0].tables(0))]
    ops = []
    for op in graphs[0].tables(3):
        inputs, outputs = (tuple(op.array(i, np.int32, MOST).tolist()) for i in (1, 2))
        ops.append(Op(_item(codes, op.number(0, 'I')), inputs, _item(outputs, 0), op.table(4)))
    start = _item(graphs[0].array(1, np.int32, MOST).tolist(), 0)
    return Model(tensors, ops, start, model.tables(4))


def _tensor(table: Table) -> Tensor:
    quantization = table.table(4)
    scale, zero = 0.0, 0
    if quantization:
        scales, zeros = quantization.array(2, np.float32), quantization.array(3, np.int64)
        if len(scales) == 1:  # no tensor that we read has one for each channel
            scale, zero = float(scales[0]), int(zeros[0]) if len(zeros) else 0
    shape = tuple(table.array(0, np.int32, MOST).tolist())
    return Tensor(shape, DTYPES.get(table.number(1, 'b')), table.number(2, 'I'), scale, zero)


def _item(items, index: int):
    if not 0 <= index < len(items):
        raise Damaged(f'it refers to index {index} of {len(items)}')
    return items[index]


def _dequantized(model: Model, number: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    tensor = _item(model.tensors, number)
    if tensor.shape != shape:
        raise Damaged(f'a tensor is {[*tensor.shape]} but should be {[*shape]}')
    limits = np.iinfo(dtype)
    if tensor.dtype != dtype or not limits.min <= tensor.zero <= limits.max:
        raise Damaged(f'a tensor should be {limits.dtype} with one zero point')
    stored = _item(model.buffers, tensor.buffer).array(0, np.uint8)
    if len(stored) != math.prod(shape) * limits.dtype.itemsize:
        raise Damaged(f'{len(stored):,} bytes for a tensor of {[*shape]}')
    values = stored.view(limits.dtype.newbyteorder('<')).reshape(shape)
    with np.errstate(over='ignore'):
        found = (tensor.scale * (values.astype(np.float64) - tensor.zero)).astype(np.float32)
    if not 0 < tensor.scale < np.inf or not np.isfinite(found).all():
        raise Damaged(f'a scale of {tensor.scale}')
    return found


class Layer(NamedTuple):
    """A layer of the network: where its kernel is, the kernel's shape, and [H,W,C] of its output."""

    path: network.Path
    kernel: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def depthwise(self) -> bool:
        return self.path[-1] == 'depthwise'  # the kernel's name


@functools.lru_cache(maxsize=8)
def _layers(net: MobileNet, crop: int) -> list[Layer]:
    """The layers with kernels, in the order of the forward pass; the last is a matrix."""
    leaves = variables.leaves(net)
    kernels = {path[1:-1]: path for path in leaves if path[-1] in ('kernel', 'depthwise')}
    outputs = {tuple(layer.name.split('/')): layer.output for layer in network.summary(net, crop)}
    return [
        Layer(kernels[name], leaves[kernels[name]], output)
        for name, output in outputs.items()
        if name in kernels
    ]


def _weights(net: MobileNet, model: Model) -> Weights:
    """Follows the operators, each of which must be what the network does next."""
    image = _item(model.tensors, model.input)
    if image.shape not in {(1, side, side, 3) for side in SIDES} or image.dtype != np.uint8:
        raise Damaged(f'its input is {[*image.shape]}, not an image of bytes')
    if not 0 < image.scale < np.inf or not 0 <= image.zero <= 255:
        raise Damaged(f'a scale of {image.scale} for images')
    ops = iter([op for op in model.ops if op.code not in (RESHAPE, SOFTMAX)])

    def follow(code: int, inputs: set[int], output: tuple[int, ...]) -> Op:
        op = next(ops, None)
        if op is None or op.code != code or not inputs <= {*op.inputs} or op.options is None:
            raise Damaged('its operators are not those of the network')
        shape = _item(model.tensors, op.output).shape
        if shape != (1, *output):
            raise Damaged(f'an operator returns {[*shape]} but should return {[1, *output]}')
        return op

    def convolve(layer: Layer, start: int, linear: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """-> kernel in the network's layout, bias, the tensor that is the output."""
        op = follow(DEPTHWISE if layer.depthwise else CONV, {start}, layer.output)
        first = 4 if layer.depthwise else 3  # the index of the option `fused_activation_function`
        dilations = [op.options.number(first + i, 'i', 1) for i in (1, 2)]
        if op.options.number(0, 'b') != SAME and layer.kernel[0] > 1 or dilations != [1, 1]:
            raise Damaged("a convolution whose padding is not TensorFlow's")
        if op.options.number(first, 'b') != (LINEAR if linear else RELU6):
            raise Damaged("an operator's activation is not that of the network")
        if layer.depthwise:
            shape = (1, *layer.kernel)
        else:
            *size, inner, outer = layer.kernel
            shape = (outer, *size, inner)
        kernel = _dequantized(model, _item(op.inputs, 1), shape, np.uint8)
        bias = _dequantized(
            model, _item(op.inputs, 2), shape[-1:] if layer.depthwise else shape[:1], np.int32
        )
        return kernel[0] if layer.depthwise else kernel.transpose(1, 2, 3, 0), bias, op.output

    *layers, head = _layers(net, image.shape[1])
    here, block, entry, found = model.input, '', -1, {}
    for layer in layers:
        _, *name, _ = layer.path
        if name[0] != block:
            block, entry = name[0], here
        linear = net.version == 2 and name[-1] == 'project'
        kernel, bias, here = convolve(layer, here, linear)
        found[layer.path] = kernel if found else variables.for_pixels(net, kernel, 1 / image.scale)
        found |= variables.without_norm((*name,), bias, net.norm_epsilon)
        if linear and model.tensors[entry].shape == (1, *layer.output):
            here = follow(ADD, {here, entry}, layer.output).output
    inner, classes = head.kernel
    here = follow(AVERAGE_POOL, {here}, (1, 1, inner)).output
    in_file = _classes(model, here)
    if in_file - classes not in (0, 1):
        raise Damaged(f'it has {in_file} classes, but the network has {classes}')
    layer = Layer(head.path, (1, 1, inner, in_file), (1, 1, in_file))
    kernel, bias, _ = convolve(layer, here, linear=True)
    found[head.path] = kernel[0, 0, :, in_file - classes :]
    found[*head.path[:-1], 'bias'] = bias[in_file - classes :]
    if next(ops, None):
        raise Damaged('it has more operators than the network')
    return Weights(variables.nest(found), (float(image.zero),) * 3, image.shape[1])


def _classes(model: Model, features: int) -> int:
    """The number of classes: of the outputs of the operator that reads the features."""
    for op in model.ops:
        if features in op.inputs:
            return (0, *_item(model.tensors, op.output).shape)[-1]
    return 0
