"""The released SqueezeNet v1.0 of "Deep Compression" (Han, Mao, Dally, 2016): 4.8 MB compressed to 0.66 MB.

`compressed_SqueezeNet.net` of github.com/songhan/SqueezeNet-Deep-Compression: u32 counts of the kept
weights of all layers; then, layer by layer, 256 float32 centroids, the float32 biases, the index of a
centroid for each kept weight (u8), and the distances between kept weights minus 1 (4 bits each, low half
first).
"""

import numpy as np

from alexnet_jax.nets.squeezenet import FIRES, SqueezeNet
from alexnet_jax.weights import variables
from alexnet_jax.weights.variables import Damaged, Imported, Options, Weights

CENTROIDS, CLASSES = 256, 1000
MEAN, CROP = (123.0, 117.0, 104.0), 227


def read(data: bytes, options: Options) -> Imported:
    """Reads SqueezeNet v1.0 from this format.

    The authors' network pads conv10 (`variables.unpad_head`). Raises Damaged if the file is damaged, and
    UserError if the user chose another network.
    """
    preset = options.chosen('squeezenet', ('squeezenet',))
    net = variables.preset(preset, CLASSES, {})
    arrays = _arrays(net, data)
    variables.unpad_head(net, arrays, CROP)
    weights = Weights(variables.nest(arrays), MEAN, CROP)
    return Imported(preset, {}, CLASSES, weights, 'Deep Compression')


def _arrays(net: SqueezeNet, data: bytes) -> dict:
    at, shapes = 0, variables.leaves(net)
    parts = ('squeeze', 'expand1x1', 'expand3x3')
    fires = [(f'fire{i + 2}', part) for i in range(len(FIRES)) for part in parts]
    layers = [('params', *name) for name in (('conv1',), *fires, ('conv10',))]

    def read(count: int, dtype) -> np.ndarray:
        nonlocal at
        if count * np.dtype(dtype).itemsize > len(data) - at:
            raise Damaged(f'it ends after {len(data):,} bytes')
        found = np.frombuffer(data, dtype, count, at)
        at += found.nbytes
        return found

    found = {}
    for layer, kept in zip(layers, read(len(layers), '<u4').tolist(), strict=True):
        *size, inner, outer = shapes[*layer, 'kernel']
        kernel = np.zeros((outer, inner, *size), np.float32)
        centroids, bias = read(CENTROIDS, '<f4'), read(outer, '<f4')
        codes, pairs = read(kept, 'u1'), read(-(-kept // 2), 'u1')
        gaps = np.stack([pairs % 16, pairs // 16], axis=1).reshape(-1)[:kept]
        places = np.cumsum(gaps.astype(np.int64) + 1) - 1
        if kept and places[-1] >= kernel.size:
            raise Damaged(f'{"/".join(layer[1:])} has more weights than the network')
        kernel.reshape(-1)[places] = centroids[codes]
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise Damaged(f'{"/".join(layer[1:])} has weights that are not finite')
        kernel = kernel.transpose(2, 3, 1, 0)
        if layer[-1] == 'conv1':  # for RGB in place of BGR
            kernel = variables.for_pixels(net, kernel[:, :, ::-1], 1.0)
        found[*layer, 'kernel'], found[*layer, 'bias'] = kernel, bias.astype(np.float32)
    if at != len(data):
        raise Damaged(f'{len(data) - at:,} bytes too many')
    return found
