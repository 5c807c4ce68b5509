"""Keras's MobileNets (.h5): weights, whole models, and Keras 3's .weights.h5. Needs h5py.

Layers are matched in order, as in Keras, since their names changed between versions.
"""

import collections
import io
from typing import Any

from alexnet_jax.common.errors import UserError, install
from alexnet_jax.nets import network
from alexnet_jax.nets.mobilenet import MobileNet
from alexnet_jax.weights import variables
from alexnet_jax.weights.tflite import WIDTHS
from alexnet_jax.weights.variables import Damaged, Imported, Options, Weights

MAGIC = b'\x89HDF\r\n\x1a\n'
SCALE = 127.5  # keras.applications computes pixel / 127.5 - 1
CROP = 224
FORMS = {  # number of layers with weights -> preset, fields
    55: ('mobilenet:v1', {}),
    105: ('mobilenet', {'padding': 'tensorflow', 'norm_momentum': 0.999, 'norm_epsilon': 1e-3}),
}
NORM = ('scale', 'bias', 'mean', 'var')  # in the file's order

Layer = tuple[str, list]  # its name in the file, and its arrays, of which only shapes were read


def check_installed() -> None:
    """Raises UserError if the package for these files is missing."""
    try:
        import h5py  # noqa: F401
    except ImportError:
        raise UserError(f"Keras's .h5 files need h5py: {install('keras')}") from None


def read(data: bytes, options: Options) -> Imported:
    """Reads the weights of keras.applications' MobileNet or MobileNetV2; raises Damaged, UserError."""
    check_installed()
    import h5py

    try:
        with h5py.File(io.BytesIO(data), 'r') as opened:
            return _imported(h5py, opened, options)
    except (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise Damaged(' '.join(str(error).split())[:100]) from None


def _imported(h5py, opened, options: Options) -> Imported:
    layers = _modern(h5py, opened) if 'layers' in opened else _legacy(h5py, opened)
    if len(layers) not in FORMS:
        raise Damaged(
            f'it has {len(layers)} layers with weights; MobileNet has 55, MobileNet v2 105, both with '
            'their last layer (include_top=True)'
        )
    known, changes = FORMS[len(layers)]
    preset = options.chosen(known, [preset for preset, _ in FORMS.values()])
    ours = _ours(variables.preset(preset, 2, changes))
    if 'layers' in opened:
        layers = _in_order(layers, ours)
    # The width is in the channels that reach the head (v1) or the last convolution (v2).
    kernels = [arrays[0] for _, arrays in layers]
    classes, channels = kernels[-1].shape[-1], kernels[-1 if len(layers) == 55 else -3].shape[-2]
    last = {'mobilenet:v1': 1024, 'mobilenet': 320}[preset]
    nets = [variables.preset(preset, classes, {**changes, 'width': width}) for width in WIDTHS]
    net = next((net for net in nets if net.channels(last) == channels), None)
    if net is None:
        raise Damaged(f'its last layers have {channels} channels, which matches no known width')
    if net.version == 1 and options.crop and options.crop % 32:
        raise UserError(
            f"crop={options.crop}: Keras's MobileNet v1 pads odd sizes in its own way; give a multiple of 32"
        )
    found = _arrays(net, layers, ours)
    first = ('params', 'conv1', 'kernel')
    found[first] = variables.for_pixels(net, found[first], options.std or SCALE)
    weights = Weights(variables.nest(found), (SCALE,) * 3, options.crop or CROP)
    return Imported(preset, {**changes, 'width': net.width}, classes, weights, 'Keras')


def _arrays(net: MobileNet, layers: list[Layer], ours: list[list[network.Path]]) -> dict:
    shapes, wanted, places = variables.leaves(net), {}, {}
    for (name, _), paths in zip(layers, ours, strict=True):
        for i, path in enumerate(paths):
            places[path], shape = f'{name}/{i}', shapes[path]
            if path[-1] == 'depthwise':
                shape = (*shape, 1)
            if path[1:] == ('fc', 'kernel') and net.version == 1:  # a convolution of one pixel
                shape = (1, 1, *shape)
            wanted[places[path]] = shape
    given = {f'{name}/{i}': x for name, arrays in layers for i, x in enumerate(arrays)}
    variables.check(
        "the file is not keras.applications' MobileNet",
        wanted,
        given,
        'get a fresh copy, or save it from a network of keras.applications',
    )
    if sum(x.nbytes for x in given.values()) > variables.LARGEST:
        raise Damaged('its arrays are larger than 2 GiB')
    return {path: given[places[path]][()].reshape(shapes[path]) for path in shapes}


def _ours(net: MobileNet) -> list[list[network.Path]]:
    """The variables of each layer in the file's order."""
    shapes, found = variables.leaves(net), []
    for layer in network.summary(net, variables.ANY_CROP):
        path = tuple(layer.name.split('/'))
        if path[-1] == 'norm':
            kinds = {'mean': 'batch_stats', 'var': 'batch_stats'}
            found.append([(kinds.get(leaf, 'params'), *path, leaf) for leaf in NORM])
        else:
            leaves = [('params', *path, leaf) for leaf in ('kernel', 'depthwise', 'bias')]
            found.append([leaf for leaf in leaves if leaf in shapes])
    return found


def _legacy(h5py, opened) -> list[Layer]:
    """The layers of Keras's own list."""
    root = _inside(h5py, opened, 'model_weights') if 'model_weights' in opened else opened
    found = []
    for name in _texts(root.attrs['layer_names']):
        group = _inside(h5py, root, name)
        arrays = [_array(h5py, group, path) for path in _texts(group.attrs['weight_names'])]
        found += [(name, arrays)] * bool(arrays)
    return found


def _modern(h5py, opened) -> list[Layer]:
    """The layers of a .weights.h5 file, in no particular order."""
    found = []
    for name in _inside(h5py, opened, 'layers'):
        group = _inside(h5py, opened, f'layers/{name}/vars')
        found += [(name, [_array(h5py, group, str(i)) for i in range(len(group))])] * bool(
            len(group)
        )
    return found


def _in_order(layers: list[Layer], ours: list[list[network.Path]]) -> list[Layer]:
    """Keras 3 counts the layers of each class: conv2d, conv2d_1, ..."""
    there, counts, found = dict(layers), collections.Counter(), []
    for paths in ours:
        kinds = {'scale': 'batch_normalization', 'depthwise': 'depthwise_conv2d'}
        kind = kinds.get(paths[0][-1], 'conv2d')
        kind = 'dense' if paths[0][1] == 'fc' and 'dense' in there else kind
        name = f'{kind}_{counts[kind]}' if counts[kind] else kind
        counts[kind] += 1
        found.append((name, there[name]))
    return found


def _texts(values: Any) -> list[str]:
    return [x.decode() if isinstance(x, bytes) else str(x) for x in values]


def _inside(h5py, group, path: str) -> Any:
    """What a path leads to in this file; links to other files are errors."""
    for part in path.split('/'):
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise Damaged(f'it has no {path[:60]} of its own')
        group = group[part]
    return group


def _array(h5py, group, path: str) -> Any:
    found = _inside(h5py, group, path)
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise Damaged(f'{path[:60]} is not an array of this file')
    if not found.ndim:
        raise Damaged(f'{path[:60]} is a single number')
    return found
