"""The initializers of ONNX files: the ONNX model zoo's bvlcalexnet and caffenet.

The zoo's graphs read 224 pixels and round down in pooling, 54 -> 26 -> 12 -> 6 with pool5 padded. Caffe,
which trained the weights, reads 227 and has 55 -> 27 -> 13 -> 6. This costs the zoo's graphs most of their
accuracy (onnx/models#453, #622). Here the weights are read into Caffe's network.
"""

import numpy as np

from alexnet_jax.weights import caffe, variables
from alexnet_jax.weights.protobuf import Message
from alexnet_jax.weights.variables import Damaged, Imported, Options

DTYPES = {1: '<f4', 10: '<f2', 11: '<f8'}  # TensorProto.DataType; the others are not weights
UP = [0, 0, 1, 1]  # padding that makes pooling round up, as Caffe does; the zoo's pool5 has it
OPS = {'LRN': 'LRN', 'MaxPool': 'Pooling'}  # the names in Caffe


def read(data: bytes, options: Options) -> Imported:
    """Reads an ONNX file of Caffe's AlexNet or CaffeNet; raises Damaged, UserError."""
    graphs = Message(data).messages(7)
    if len(graphs) != 1:
        raise Damaged(f'it has {len(graphs)} graphs')
    arrays, ops, norms, forms = {}, [], [], {}
    for tensor in graphs[0].messages(5):
        if tensor.number(2) in DTYPES:
            layer, kind, _ = (*tensor.text(8).rsplit('_', 2), '', '')[:3]
            if (layer, kind == 'b') in arrays:
                raise Damaged(f'it has two initializers {tensor.text(8)[:60]}')
            arrays[layer, int(kind == 'b')] = _array(tensor)
    for node in graphs[0].messages(1):
        op = node.text(4)
        ops.append(OPS.get(op, op))
        found = {x.text(1): x for x in node.messages(5)}
        if found and op in ('Conv', 'MaxPool'):
            layer, form = _form(node, found, op)
            forms[layer] = form
        if op == 'LRN':
            alpha, beta, k = (
                found[name].float(2, value) if name in found else value
                for name, value in (('alpha', 1e-4), ('beta', 0.75), ('bias', 1.0))
            )
            norms.append(
                caffe.norm(alpha, beta, k, found['size'].number(3) if 'size' in found else 0)
            )
    graph = caffe.Graph(graphs[0].text(2), arrays, ops, norms, forms)
    return caffe.imported(graph, options, caffe.ALEXNETS, 'the ONNX model zoo')


def _form(node: Message, found: dict[str, Message], op: str) -> tuple[str, dict[str, set[int]]]:
    """(the layer's name, its `caffe.Graph.forms`)"""
    names = {'stride': ('strides', 1), 'pad': ('pads', 0)}
    names |= {'dilation': ('dilations', 1)} if op == 'Conv' else {'kernel': ('kernel_shape', 0)}
    form = {
        key: {*found[name].numbers(8)} if name in found else {default}
        for key, (name, default) in names.items()
    }
    if op == 'MaxPool':
        up = 'pads' in found and found['pads'].numbers(8) == UP
        return node.text(2), (form | {'pad': {0}} if up else form)
    weights = str(node.bytes(1)[1], 'utf-8', 'replace') if len(node.bytes(1)) > 1 else ''
    group = found['group'].number(3) if 'group' in found else 1
    return weights.rsplit('_', 2)[0], form | {'group': {group}}


def _array(tensor: Message) -> np.ndarray:
    shape, name, dtype = tensor.numbers(1), tensor.text(8)[:60], tensor.number(2)
    if tensor.number(14):
        raise Damaged(f'{name} is stored in another file')
    data = tensor.array(9, DTYPES[dtype])
    if data is None and dtype == 1:
        data = tensor.array(4, '<f4')
    return variables.shaped(data, shape, name)
