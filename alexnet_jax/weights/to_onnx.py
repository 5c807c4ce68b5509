"""Writes a graph as an ONNX model, also in float16 and 8 bits, and runs one."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable

import numpy as np

from alexnet_jax.common.errors import UserError, install, one_line
from alexnet_jax.weights.graph import Graph

OPSET, IR = 17, 8  # of ONNX 1.12 (2022), which all current runtimes read
# Layers whose factors are rounded to 8 bits.
QUANTIZED = ('Conv', 'Gemm', 'MatMul', 'Relu', 'Clip', 'MaxPool')


def check_installed() -> None:
    """Raises UserError if the packages for ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'--format=onnx: needs the packages onnx and onnxruntime: {install("onnx")}'
        ) from error


def model(graph: Graph, *, shape: tuple[int, ...], dtype, facts: dict[str, str]) -> bytes:
    """Returns the ONNX file of a graph.

    shape: of one image; dtype: of the images; facts: the model's metadata. The file's input is `images`
    [batch, *shape], its output `logits` f32[batch,K].
    """
    from onnx import checker, helper, numpy_helper

    names = {graph.output: 'logits', graph.input: 'images'}
    constants, nodes = {}, []

    def tensor(x, name: str) -> str:
        if x is None:
            return ''
        if isinstance(x, str):
            return names.get(x, x)
        x = np.asarray(x)
        x = x if x.dtype.kind == 'i' else x.astype(np.float32)
        name = next(n for n in _numbered(name) if n not in constants)
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(x), name)
        return name

    taken = set()
    for node in graph.nodes:
        place = node.name or node.output
        roles = ['', 'weight', 'bias'] if node.op in ('Conv', 'Gemm') else []
        inputs = [
            tensor(x, f'{place}.{roles[i]}' if roles else f'{place}.{node.op.lower()}{i}')
            for i, x in enumerate(node.inputs)
        ]
        while inputs and not inputs[-1]:
            inputs.pop()
        name = next(n for n in _numbered(f'{place}/{node.op}') if n not in taken)
        taken.add(name)
        outputs = [names.get(x, x) for x in node.outputs]
        nodes.append(helper.make_node(node.op, inputs, outputs, name, **node.attributes))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    images = helper.make_tensor_value_info('images', kind, ['batch', *shape])
    logits = helper.make_tensor_value_info('logits', 1, ['batch', None])
    made = helper.make_model(
        helper.make_graph(nodes, 'alexnet_jax', [images], [logits], [*constants.values()]),
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=IR,
        producer_name='alexnet_jax',
    )
    helper.set_model_props(made, facts)
    checker.check_model(made, full_check=True)
    return made.SerializeToString()


def _numbered(name: str):
    yield name
    yield from (f'{name}_{i}' for i in range(2, 10_000))


def half(content: bytes) -> bytes:
    """Returns a model with float16 weights and activations, and the same input and output.

    Local response normalization stays float32: its squares exceed float16's range.
    """
    import onnx
    from onnxruntime.transformers import float16

    kept = [*float16.DEFAULT_OP_BLOCK_LIST, 'LRN']
    made = float16.convert_float_to_float16(
        onnx.load_from_string(content), keep_io_types=True, op_block_list=kept
    )
    return made.SerializeToString()


def eight_bits(content: bytes, batches: Iterable[np.ndarray] | None) -> bytes:
    """Returns a model with 8-bit weights.

    batches: inputs that give the ranges of the activations, which then have 8 bits, too; None:
    activations are float32 in the file and rounded to 8 bits at run time, only in matrix products.
    """
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logging.disable(logging.WARNING)  # advice for models that other frameworks made
        stack.callback(logging.disable, logging.NOTSET)
        old, new = (os.path.join(folder, name) for name in ('float.onnx', 'int8.onnx'))
        with open(old, 'wb') as file:
            file.write(content)
        if batches is None:
            quantization.quantize_dynamic(
                old,
                new,
                op_types_to_quantize=['Gemm', 'MatMul'],
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
            )
        else:
            quantization.quantize_static(
                old,
                new,
                _Reader(batches),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[*QUANTIZED],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        with open(new, 'rb') as file:
            return file.read()


class _Reader:
    """What onnxruntime's quantization reads images from."""

    def __init__(self, batches: Iterable[np.ndarray]):
        self._batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self._batches, None)
        return None if batch is None else {'images': batch}


def session(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A model on the CPU, as a function from images to logits f32[B,K]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        made = onnxruntime.InferenceSession(content, options, ['CPUExecutionProvider'])
    except Exception as error:  # its own classes, without a common base
        raise UserError(f'onnxruntime cannot run this network: {one_line(error)}') from error
    return lambda images: made.run(['logits'], {'images': images})[0]
