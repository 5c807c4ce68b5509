"""Runs a graph of ONNX operators with NumPy, as their specification says."""

import functools

import jax
import numpy as np


def _conv(x, kernel, bias, *, strides, pads, group, dilations, kernel_shape):
    padding = [*zip(pads[:2], pads[2:], strict=True)]
    y = jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilations, feature_group_count=group
    )
    return np.asarray(y) + (0 if bias is None else bias.reshape(-1, 1, 1))


def _pool(reduce, fill, x, *, kernel_shape, strides, pads, count_include_pad=0):
    width = [(0, 0), (0, 0), *zip(pads[:2], pads[2:], strict=True)]
    x = np.pad(x, width, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel_shape, (2, 3))
    return reduce(windows[:, :, :: strides[0], :: strides[1]], (-2, -1))


def _lrn(x, *, alpha, beta, bias, size):
    squares = np.pad(x**2, [(0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)])
    sums = np.lib.stride_tricks.sliding_window_view(squares, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


def _reduce(reduce, x, *, axes, keepdims):
    return reduce(x, axis=tuple(axes), keepdims=bool(keepdims))


OPS = {
    **{'Add': np.add, 'Mul': np.multiply, 'Sub': np.subtract, 'Div': np.divide, 'Max': np.maximum},
    **{
        'Sqrt': np.sqrt,
        'Reciprocal': np.reciprocal,
        'Pow': np.power,
        'Exp': np.exp,
        'Tanh': np.tanh,
        'MatMul': np.matmul,
        'Relu': lambda x: np.maximum(x, 0),
    },
    'Gemm': lambda x, kernel, bias: x @ kernel + (0 if bias is None else bias),
    'Conv': _conv,
    'LRN': _lrn,
    'MaxPool': functools.partial(_pool, np.max, -np.inf),
    'AveragePool': functools.partial(_pool, np.mean, 0),
    'ReduceMax': functools.partial(_reduce, np.max),
    'ReduceMean': functools.partial(_reduce, np.mean),
    'Transpose': lambda x, perm: x.transpose(perm),
    'Reshape': lambda x, shape: x.reshape(len(x), *shape[1:]),
    'Squeeze': lambda x, axes: x.squeeze(tuple(axes)),
    'Unsqueeze': lambda x, axes: np.expand_dims(x, tuple(axes)),
    'Concat': lambda *x, axis: np.concatenate(x, axis),
    'Split': lambda x, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
}


def run(graph, images):
    """graph: of `weights.graph`; images as it takes them -> its output."""
    known = {graph.input: np.asarray(images, np.float32)}
    for node in graph.nodes:
        inputs = [known[x] if isinstance(x, str) else x for x in node.inputs]
        found = OPS[node.op](*inputs, **node.attributes)
        found = found if isinstance(found, list) else [found]
        known |= dict(zip(node.outputs, found, strict=True))
    return known[graph.output]
