"""Caffe's networks (.caffemodel) and mean images: AlexNet, CaffeNet and SqueezeNet.

These networks read BGR pixels. What `read` returns reads RGB.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets.alexnet import GROUPED
from alexnet_jax.nets.network import Network
from alexnet_jax.weights import variables
from alexnet_jax.weights.protobuf import Message
from alexnet_jax.weights.variables import Damaged, Imported, Options, Weights

ALEXNETS, SQUEEZENETS = ('caffe', 'caffenet'), ('squeezenet', 'squeezenet:1.1')
MEAN = (122.68, 116.67, 104.01)  # RGB, of BVLC's ilsvrc_2012_mean.npy
SQUEEZENET_MEAN = (123.0, 117.0, 104.0)  # of SqueezeNet's train_val.prototxt
CROP = 227
# Deep Compression's prototxt has different names for SqueezeNet's layers.
ALIASES = {
    '/conv1x1_1': '/squeeze1x1',
    '/conv1x1_2': '/expand1x1',
    '/conv3x3_2': '/expand3x3',
    'conv_final': 'conv10',
}
# Field numbers from caffe.proto, for LayerParameter and the older V1LayerParameter.
V2 = {'name': 1, 'type': 2, 'blobs': 7, 'conv': 106, 'lrn': 118, 'pool': 121}
V1 = {'name': 4, 'type': 5, 'blobs': 6, 'conv': 10, 'lrn': 18, 'pool': 19}
TYPES = {15: 'LRN', 17: 'Pooling'}  # V1's numbers
# A layer's parameters: their field numbers (for both sides together, then for each) and the default.
CONV = {
    'stride': ((6, 13, 14), 1),
    'pad': ((3, 9, 10), 0),
    'group': ((5,), 1),
    'dilation': ((18,), 1),
}
POOL = {'kernel': ((2, 5, 6), 0), 'stride': ((3, 7, 8), 1), 'pad': ((4, 9, 10), 0)}
MAX = 0  # the method of pooling


class Graph(NamedTuple):
    """A network read from a file.

    arrays: by layer and index, 0 for the kernel and 1 for the bias: ('conv1', 0); ops: 'LRN' and
    'Pooling' in order; norms: the fields of config.model that each normalization has; forms: by layer,
    what the file says about `CONV` or, for max-pooling, of `POOL`.
    """

    name: str
    arrays: dict[tuple[str, int], np.ndarray]
    ops: list[str]
    norms: list[dict]
    forms: dict[str, dict[str, set[int]]]

    @property
    def padded_head(self) -> bool:
        return self.forms.get('conv10', {}).get('pad') == {1}


def read(data: bytes, options: Options) -> Imported:
    """Reads a .caffemodel of any of these networks in either wire format; raises Damaged, UserError."""
    graph = _graph(Message(data))
    return imported(graph, options, (*ALEXNETS, *SQUEEZENETS), 'Caffe')


def imported(graph: Graph, options: Options, presets: Sequence[str], program: str) -> Imported:
    """The variables of the preset that a graph matches."""
    names = {layer for layer, _ in graph.arrays}
    fires = any('/' in name for name in names)
    if fires and SQUEEZENETS[0] in presets:
        kernel = graph.arrays.get(('conv1', 0))
        known = SQUEEZENETS[kernel is not None and kernel.shape[-1:] == (3,)]
    elif fires:
        raise Damaged('its network is not AlexNet or CaffeNet')
    else:
        known = _alexnet_form(graph, options.net)
    preset = options.chosen(known, presets)
    changes = {} if fires else _norm(graph)
    bias = graph.arrays.get(('conv10' if fires else 'fc8', 1))
    if bias is None or bias.ndim != 1:
        raise Damaged(f'it has no biases for {"conv10" if fires else "fc8"}')
    net, crop = variables.preset(preset, len(bias), changes), options.crop or CROP
    if not fires and crop != CROP:
        raise UserError(f"crop={crop}: the weights of Caffe's AlexNets need {CROP}")
    arrays = _arrays(net, graph, crop, f"the file is not {program}'s {preset}")
    _check_forms(graph, fires)
    first = ('params', 'conv1', 'kernel')
    arrays[first] = variables.for_pixels(net, arrays[first][..., ::-1, :], options.std or 1.0)
    if fires and graph.padded_head:
        variables.unpad_head(net, arrays, crop)
    mean = SQUEEZENET_MEAN if fires else MEAN
    weights = Weights(variables.nest(arrays), mean, crop)
    return Imported(preset, changes, net.classes, weights, program)


def _alexnet_form(graph: Graph, chosen: str) -> str:
    """The preset, by the order of the first normalization and pooling, or else the network's name."""
    order = [op for op in graph.ops if op in ('LRN', 'Pooling')][:2]
    if set(order) == {'LRN', 'Pooling'}:
        return ALEXNETS[order[0] == 'Pooling']
    return {'AlexNet': 'caffe', 'CaffeNet': 'caffenet'}.get(graph.name, chosen)


def _norm(graph: Graph) -> dict:
    if any(norm != graph.norms[0] for norm in graph.norms):
        raise Damaged('its normalizations differ from each other')
    return graph.norms[0] if graph.norms else {}


def _check_forms(graph: Graph, fires: bool) -> None:
    """Raises Damaged for a layer whose stride, padding, ... are not those of the preset."""
    for name, found in graph.forms.items():
        if 'kernel' in found:
            wanted = {'kernel': 3, 'stride': 2, 'pad': 0}
        elif (name, 0) in graph.arrays:
            side, first = graph.arrays[name, 0].shape[-1], name == 'conv1'
            wanted = {
                'stride': (2 if fires else 4) if first else 1,
                'pad': 0 if first else side // 2,
            }
            wanted |= {'group': 2 if name in GROUPED and not fires else 1, 'dilation': 1}
        else:
            continue
        for key, values in found.items():
            if values != {wanted[key]} and (name, key, values) != ('conv10', 'pad', {1}):
                text = ', '.join(map(str, sorted(values)))
                raise Damaged(f'{name[:60]} has {key} {text}, but should have {wanted[key]}')


def norm(alpha: float, beta: float, k: float, n: int) -> dict:
    """The fields of config.model of a normalization whose alpha is divided by n."""
    short = (float(str(np.float32(x))) for x in (alpha, beta, k))
    return dict(zip(('norm_alpha', 'norm_beta', 'norm_k'), short, strict=True)) | {'norm_n': n}


def _arrays(net: Network, graph: Graph, crop: int, title: str) -> dict:
    shapes = variables.leaves(net, crop)

    def name(path):
        _, *layer, leaf = path
        parts = {'squeeze': 'squeeze1x1'}
        return ('/'.join(parts.get(x, x) for x in layer), int(leaf == 'bias'))

    def shown(key):
        return f'{key[0]}.{key[1]}'

    variables.check(
        title,
        {shown(name(path)): variables.their_shape(net, path, x) for path, x in shapes.items()},
        {shown(key): x for key, x in graph.arrays.items()},
        'choose another with --net or --crop, or get a fresh copy of the file',
    )
    return {path: variables.from_theirs(net, path, graph.arrays[name(path)]) for path in shapes}


def _graph(model: Message) -> Graph:
    arrays, ops, norms, forms = {}, [], [], {}
    layers = [(V2, x) for x in model.messages(100)] + [(V1, x) for x in model.messages(2)]
    for fields, layer in layers:
        name = layer.text(fields['name'])
        for old, new in ALIASES.items():
            name = name.replace(old, new)
        kind = layer.text(2) if fields is V2 else TYPES.get(layer.number(5), '')
        ops.append(kind)
        for param in layer.messages(fields['lrn']) if kind == 'LRN' else []:
            if param.number(4):
                raise Damaged(f'{name} normalizes within channels')
            alpha, beta, k = (param.float(i, x) for i, x in ((2, 1.0), (3, 0.75), (5, 1.0)))
            norms.append(norm(alpha, beta, k, param.number(1, 5)))
        for param in layer.messages(fields['conv']):
            if 1 in param.fields:  # num_output: not only some of the parameters
                forms[name] = _form(param, CONV)
        for param in layer.messages(fields['pool']):
            if param.number(1) == MAX and 2 in param.fields:
                forms[name] = _form(param, POOL)
        for i, blob in enumerate(layer.messages(fields['blobs'])):
            if (name, i) in arrays:
                raise Damaged(f'it has two layers {name[:60]}')
            arrays[name, i] = _blob(blob, name)
    if not arrays:
        raise Damaged('it has no layers with weights')
    return Graph(model.text(1), arrays, ops, norms, forms)


def _form(param: Message, fields: dict) -> dict[str, set[int]]:
    return {
        key: {n for number in numbers for n in param.numbers(number)} or {default}
        for key, (numbers, default) in fields.items()
    }


def _blob(blob: Message, name: str) -> np.ndarray:
    data = blob.array(5, '<f4')
    data = blob.array(8, '<f8') if data is None else data
    shapes = blob.messages(7)
    shape = shapes[-1].numbers(1) if shapes else [blob.number(i) for i in (1, 2, 3, 4)]
    while not shapes and len(shape) > 1 and shape[0] == 1:  # biases and matrices of old files
        shape = shape[1:]
    return variables.shaped(data, shape, name)


def mean_image(data: bytes) -> np.ndarray:
    """A mean image, f32[S,S,3] RGB, of a .binaryproto or .npy file; raises Damaged."""
    if data.startswith(b'\x93NUMPY'):
        try:
            image = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise Damaged(' '.join(str(error).split())[:100]) from None
    else:
        image = _blob(Message(data), 'the image')
    valid = image.dtype.kind == 'f' and image.ndim == 3 and image.shape[0] == 3
    if not valid or image.shape[1] != image.shape[2] or not np.isfinite(image).all():
        raise Damaged(f'{image.dtype}{[*image.shape]} is not an image of finite numbers [3,S,S]')
    return np.ascontiguousarray(image[::-1].transpose(1, 2, 0), np.float32)
