"""A JAX function as a graph of ONNX operators, with its constants folded in.

The graph is read from the function's jaxpr, so any network can be exported whose test mode uses the
primitives below. Images and maps get ONNX's order, [B,C,H,W], and are only transposed where a flattening
needs ours. Then the graph is simplified until it is what one would write by hand: normalizations and
factors are folded into the layer before or after them, and towers that compute the same become groups.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets.layers import LRN

FLOAT = 1  # ONNX's code for float32
UNARY = {
    'tanh': 'Tanh',
    'logistic': 'Sigmoid',
    'exp': 'Exp',
    'log': 'Log',
    'neg': 'Neg',
    'abs': 'Abs',
    'sqrt': 'Sqrt',
}
BINARY = {'add': 'Add', 'mul': 'Mul', 'pow': 'Pow'}
BATCH = 1009  # stands for any number of images while a function is traced


class Node:
    """An operator of ONNX; an input is the name of a tensor, a constant, or None."""

    def __init__(self, op: str, inputs: Sequence, outputs: list[str], attributes: dict, name: str):
        self.op, self.outputs = op, outputs
        self.inputs = [x if isinstance(x, str) or x is None else np.asarray(x) for x in inputs]
        self.attributes, self.name = attributes, name

    @property
    def output(self) -> str:
        return self.outputs[0]

    def tensors(self) -> list[str]:
        return [x for x in self.inputs if isinstance(x, str)]


class Graph(NamedTuple):
    """Nodes in an order in which they can run."""

    nodes: list[Node]
    input: str
    output: str


class Tensor(NamedTuple):
    """A tensor of the graph. maps: stored as [B,C,...,H,W] where JAX has [B,H,W,C,...]."""

    name: str
    maps: bool = False


def read(function: Callable, crop: int, dtype, *, maps: bool) -> Graph:
    """Translates function(images [B,crop,crop,3]) -> array into a graph for any B, and simplifies it.

    maps: the graph gets [B,3,crop,crop]. Raises UserError for an operation that has no counterpart here.
    """
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((BATCH, crop, crop, 3), dtype))
    translator = _Translator()
    (result,) = translator.run(closed.jaxpr, closed.consts, [Tensor('images', maps)])
    if not isinstance(result, Tensor):
        raise UserError('this network does not depend on its images, so it cannot be exported')
    result = translator.rows(result, closed.out_avals[0].ndim)
    graph = Graph(translator.nodes, 'images', result.name)
    return _simplified(graph)


def _physical(rank: int) -> list[int]:
    """The order in which maps store JAX's axes."""
    return [0, *range(3, rank), 1, 2]


def _inner(eqn) -> tuple | None:
    """The jaxpr that an equation calls, and its constants; None if it calls none."""
    found = [eqn.params[key] for key in ('jaxpr', 'call_jaxpr') if key in eqn.params]
    return (
        (getattr(found[0], 'jaxpr', found[0]), getattr(found[0], 'consts', ())) if found else None
    )


def _constants(eqn, args) -> list[np.ndarray]:
    """What an equation computes from constants."""
    found = eqn.primitive.bind(*map(jnp.asarray, args), **eqn.params)
    return [*map(np.asarray, found if eqn.primitive.multiple_results else [found])]


def folded(function: Callable, image: jax.ShapeDtypeStruct) -> Callable:
    """The same function, with everything that does not depend on the images precomputed.

    TensorFlow's converter would take minutes and gigabytes for it.
    """
    closed = jax.make_jaxpr(function)(image)

    def run(jaxpr, consts, args):
        known = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def value(x):
            return np.asarray(x.val) if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            args = [*map(value, eqn.invars)]
            if inner := _inner(eqn):
                found = run(*inner, args)
            elif all(isinstance(x, np.ndarray) for x in args):
                with jax.ensure_compile_time_eval():
                    found = _constants(eqn, args)
            else:
                found = eqn.primitive.bind(*args, **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
            known |= dict(zip(eqn.outvars, found, strict=True))
        return [*map(value, jaxpr.outvars)]

    return lambda images: run(closed.jaxpr, closed.consts, [images])[0]


class _Translator:
    def __init__(self):
        self.nodes, self.count, self.scope = [], Counter(), ''

    def run(self, jaxpr, consts, args) -> list:
        """Translates a jaxpr; args: tensors or constants. Returns the same for its results."""
        known = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def value(x):
            return np.asarray(x.val) if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            if scope := str(eqn.source_info.name_stack):
                self.scope = scope
            found = self.equation(eqn, [*map(value, eqn.invars)])
            known |= dict(zip(eqn.outvars, found, strict=True))
        return [*map(value, jaxpr.outvars)]

    def equation(self, eqn, args) -> list:
        name, params = eqn.primitive.name, eqn.params
        if name == 'composite' and params['name'] == LRN:
            numbers = {key: values[0] for key, values, _ in params['attributes']}
            return [self.lrn(args[0], **numbers)]
        if inner := _inner(eqn):
            return self.run(*inner, args)
        whole = any(out.aval.shape[:1] == (BATCH,) for out in eqn.outvars)
        if not whole and not any(isinstance(x, Tensor) for x in args):
            return _constants(eqn, args)
        if name in UNARY:
            return [self.unary(UNARY[name], args)]
        if name in BINARY:
            return [self.binary(BINARY[name], args, eqn)]
        rule = getattr(self, f'_{name}', None)
        if rule is None:
            raise UserError(f'this network uses {name}, which cannot be written as ONNX')
        found = rule(args, eqn)
        return found if isinstance(found, list) else [found]

    def emit(self, op: str, *inputs, outputs: int = 1, **attributes):
        """Appends a node, and returns the names of its outputs."""
        inputs = [x.name if isinstance(x, Tensor) else x for x in inputs]
        self.count[op] += 1
        names = [f'{op.lower()}{self.count[op]}' + f'_{i}' * (outputs > 1) for i in range(outputs)]
        name = '/'.join(self.scope.split('/')[1:])
        self.nodes.append(Node(op, inputs, names, attributes, name))
        return names if outputs > 1 else names[0]

    def rows(self, x, rank: int):
        """The same tensor with its axes in JAX's order."""
        if not x.maps:
            return x
        order = _physical(rank)
        return Tensor(self.emit('Transpose', x, perm=[order.index(i) for i in range(rank)]))

    def maps(self, x, rank: int = 4):
        """The same tensor or constant as maps."""
        if isinstance(x, Tensor):
            if x.maps:
                return x
            return Tensor(self.emit('Transpose', x, perm=_physical(rank)), True)
        return x.transpose(_physical(rank)) if x.ndim == rank else x

    # One value of each

    def binary(self, op: str, args, eqn) -> Tensor:
        rank = len(eqn.outvars[0].aval.shape)
        maps = any(isinstance(x, Tensor) and x.maps for x in args)
        if maps:
            args = [self.maps(x, rank) for x in args]
        return Tensor(self.emit(op, *args), maps)

    def _sub(self, args, eqn):
        if isinstance(args[1], Tensor):
            return self.binary('Sub', args, eqn)
        return self.binary('Add', [args[0], -args[1]], eqn)

    def _div(self, args, eqn):
        if isinstance(args[1], Tensor):
            return self.binary('Div', args, eqn)
        return self.binary('Mul', [args[0], 1 / args[1].astype(np.float64)], eqn)

    def _integer_pow(self, args, eqn):
        return self.binary('Pow', [args[0], np.array(eqn.params['y'], np.float32)], eqn)

    def _square(self, args, eqn):
        return self.binary('Mul', [args[0], args[0]], eqn)

    def _max(self, args, eqn):
        tensors = [x for x in args if isinstance(x, Tensor)]
        consts = [x for x in args if not isinstance(x, Tensor)]
        if consts and not consts[0].any():
            return self.unary('Relu', tensors)
        return self.binary('Max', [*tensors, *consts], eqn)

    def _min(self, args, eqn):
        return self.binary('Min', sorted(args, key=lambda x: not isinstance(x, Tensor)), eqn)

    def _clamp(self, args, eqn):
        low, x, high = args
        return self._min([self._max([x, low], eqn), high], eqn)

    def unary(self, op: str, args) -> Tensor:
        return Tensor(self.emit(op, args[0]), args[0].maps)

    def _rsqrt(self, args, eqn):
        return self.unary('Reciprocal', [self.unary('Sqrt', args)])

    def _copy(self, args, eqn):
        return args[0]

    def _convert_element_type(self, args, eqn):
        old, new = eqn.invars[0].aval.dtype, eqn.params['new_dtype']
        if new != np.float32:
            raise UserError(f'this network computes in {new}, which cannot be written as ONNX')
        return args[0] if old == new else Tensor(self.emit('Cast', args[0], to=FLOAT), args[0].maps)

    # Shapes

    def _reshape(self, args, eqn):
        (x,), old, new = args, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        maps = x.maps and len(new) >= 4 and old[:3] == new[:3]
        if maps:
            shape = [new[0], *new[3:], *new[1:3]]
        else:
            x, shape = self.rows(x, len(old)), new
        if shape[0] != old[0]:
            raise UserError('this network reshapes the batch, which cannot be written as ONNX')
        return Tensor(self.emit('Reshape', x, np.array([0, *shape[1:]], np.int64)), maps)

    def _transpose(self, args, eqn):
        (x,), order = args, eqn.params['permutation']
        if x.maps and order[:3] == (0, 1, 2):
            axes = _physical(len(order))
            return Tensor(
                self.emit('Transpose', x, perm=[axes.index(order[axis]) for axis in axes]), True
            )
        return Tensor(self.emit('Transpose', self.rows(x, len(order)), perm=[*order]))

    def _squeeze(self, args, eqn):
        x = self.rows(args[0], len(eqn.invars[0].aval.shape))
        return Tensor(self.emit('Squeeze', x, np.array(eqn.params['dimensions'], np.int64)))

    def _broadcast_in_dim(self, args, eqn):
        (x,), kept, shape = args, eqn.params['broadcast_dimensions'], eqn.params['shape']
        new = [axis for axis in range(len(shape)) if axis not in kept]
        if isinstance(x, Tensor):
            if any(shape[axis] != 1 for axis in new):
                raise UserError('this network repeats maps, which cannot be written as ONNX')
            return Tensor(self.emit('Unsqueeze', self.rows(x, len(kept)), np.array(new, np.int64)))
        # A constant is repeated by the operator that uses it.
        return x.reshape([x.shape[kept.index(i)] if i in kept else 1 for i in range(len(shape))])

    def _concatenate(self, args, eqn):
        axis, rank = eqn.params['dimension'], len(eqn.outvars[0].aval.shape)
        maps = any(isinstance(x, Tensor) and x.maps for x in args)
        if maps:
            args, axis = [self.maps(x, rank) for x in args], _physical(rank).index(axis)
        return Tensor(self.emit('Concat', *args, axis=axis), maps)

    def _split(self, args, eqn):
        rank = len(eqn.invars[0].aval.shape)
        return self.parts(args[0], rank, eqn.params['axis'], eqn.params['sizes'])

    def parts(self, x, rank: int, axis: int, sizes: Sequence[int]) -> list[Tensor]:
        axis = _physical(rank).index(axis) if x.maps else axis
        if len(sizes) == 1:
            return [x]
        names = self.emit('Split', x, np.array(sizes, np.int64), outputs=len(sizes), axis=axis)
        return [Tensor(name, x.maps) for name in names]

    def _slice(self, args, eqn):
        starts, ends = eqn.params['start_indices'], eqn.params['limit_indices']
        return self.cut(args[0], eqn, starts, ends, eqn.params['strides'])

    def _dynamic_slice(self, args, eqn):
        x, *starts = args
        if any(isinstance(start, Tensor) for start in starts):
            raise UserError(
                'this network crops at data-dependent positions, which cannot be written as ONNX'
            )
        sizes = eqn.params['slice_sizes']
        starts = [int(start) for start in starts]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        return self.cut(x, eqn, starts, ends, None)

    def cut(self, x, eqn, starts, ends, strides) -> Tensor:
        old, rank = eqn.invars[0].aval.shape, len(starts)
        strides = strides or (1,) * rank
        cuts = [*zip(range(rank), starts, ends, strides, strict=True)]
        cuts = [cut for cut in cuts if cut[1:] != (0, old[cut[0]], 1)]
        if not cuts:
            return x
        (axis, start, end, step), size = cuts[0], old[-1]
        width = end - start
        if len(cuts) == step == 1 and axis == rank - 1 and start % width == size % width == 0:
            return self.parts(x, rank, axis, [width] * (size // width))[start // width]
        axes = _physical(rank) if x.maps else [*range(rank)]
        starts, ends, axes, steps = np.array(
            [(start, end, axes.index(axis), step) for axis, start, end, step in cuts], np.int64
        ).T.copy()
        return Tensor(self.emit('Slice', x, starts, ends, axes, steps), x.maps)

    def _pad(self, args, eqn):
        (x, value), config = args, eqn.params['padding_config']
        if any(inner for _, _, inner in config):
            raise UserError('this network pads between pixels, which cannot be written as ONNX')
        if x.maps:
            config = [config[axis] for axis in _physical(len(config))]
        pads = np.array([[low for low, *_ in config], [high for _, high, _ in config]], np.int64)
        return Tensor(self.emit('Pad', x, pads.reshape(-1), value), x.maps)

    def _select_n(self, args, eqn):
        case, no, yes = args
        return self.binary('Where', [case, yes, no], eqn)

    # Sums and products

    def reduction(self, op: str, args, eqn) -> Tensor:
        (x,), axes = args, eqn.params['axes']
        rank = len(eqn.invars[0].aval.shape)
        if x.maps and axes == (1, 2):
            axes = [_physical(rank).index(axis) for axis in axes]
        else:
            x = self.rows(x, rank)
        return Tensor(self.emit(op, x, axes=[*axes], keepdims=0))

    def _reduce_max(self, args, eqn):
        return self.reduction('ReduceMax', args, eqn)

    def _reduce_sum(self, args, eqn):
        shape = eqn.invars[0].aval.shape
        count = np.array(math.prod(shape[axis] for axis in eqn.params['axes']), np.float64)
        return Tensor(self.emit('Mul', self.reduction('ReduceMean', args, eqn), count))

    def window(self, op: str, x, eqn, **attributes) -> Tensor:
        sizes, strides, padding = (
            eqn.params[f'window_{name}'] if name != 'padding' else eqn.params[name]
            for name in ('dimensions', 'strides', 'padding')
        )
        plain = all({*eqn.params[f'{name}_dilation']} == {1} for name in ('base', 'window'))
        if not (plain and len(sizes) == 4 and sizes[0] == sizes[3] == 1):
            raise UserError('this network has windows that cannot be written as ONNX')
        attributes |= {'kernel_shape': [*sizes[1:3]], 'strides': [*strides[1:3]]}
        return Tensor(self.emit(op, self.maps(x), pads=_pads(padding[1:3]), **attributes), True)

    def _reduce_window_max(self, args, eqn):
        return self.window('MaxPool', args[0], eqn)

    def _reduce_window_sum(self, args, eqn):
        mean = self.window('AveragePool', args[0], eqn, count_include_pad=1)
        count = np.array(math.prod(eqn.params['window_dimensions']), np.float64)
        return Tensor(self.emit('Mul', mean, count), True)

    def lrn(self, x, *, alpha, k, n, beta) -> Tensor:
        numbers = {'alpha': float(alpha * n), 'beta': float(beta), 'bias': float(k), 'size': int(n)}
        return Tensor(self.emit('LRN', self.maps(x), **numbers), True)

    def _conv_general_dilated(self, args, eqn):
        (x, kernel), p = args, eqn.params
        usual = p['dimension_numbers'] == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        plain = {*p['lhs_dilation']} == {1} and p['batch_group_count'] == 1
        if not usual or not plain or isinstance(kernel, Tensor):
            raise UserError('this network has a convolution that cannot be written as ONNX')
        attributes = {
            'kernel_shape': [*kernel.shape[:2]],
            'strides': [*p['window_strides']],
            'dilations': [*p['rhs_dilation']],
            'pads': _pads(p['padding']),
            'group': p['feature_group_count'],
        }
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        return Tensor(self.emit('Conv', self.maps(x), kernel, None, **attributes), True)

    def _dot_general(self, args, eqn):
        x, kernel = args
        (inner, inner_k), (batch, batch_k) = eqn.params['dimension_numbers']
        swapped = isinstance(kernel, Tensor)
        if swapped:
            x, kernel, inner, inner_k, batch, batch_k = kernel, x, inner_k, inner, batch_k, batch
        rank = len(eqn.invars[swapped].aval.shape)
        if isinstance(kernel, Tensor):
            raise UserError('this network multiplies activations, which cannot be written as ONNX')
        free = [axis for axis in range(rank) if axis not in (*inner, *batch)]
        free_k = [axis for axis in range(kernel.ndim) if axis not in (*inner_k, *batch_k)]
        if len(inner) != 1 or len(free) != 1 or len(free_k) != 1:
            raise UserError('this network has a product that cannot be written as ONNX')
        kernel = np.ascontiguousarray(kernel.transpose(*batch_k, *inner_k, *free_k))
        x, order = self.rows(x, rank), [*batch, *free, *inner]
        if order != [*range(rank)]:
            x = self.emit('Transpose', x, perm=order)
        y = self.emit('MatMul', x, kernel) if batch else self.emit('Gemm', x, kernel, None)
        if swapped:
            count = len(batch)
            y = self.emit('Transpose', y, perm=[*range(count), count + 1, count])
        return Tensor(y)


def _pads(padding) -> list[int]:
    return [*(before for before, _ in padding), *(after for _, after in padding)]


# Simplification: each rule changes one place of the graph and returns whether it did.


class _Editor:
    """The nodes of a graph, with the makers and users of each tensor."""

    def __init__(self, graph: Graph):
        self.nodes, self.result = graph.nodes, graph.output
        self.index()

    def index(self) -> None:
        """Finds makers and users again, and drops unused nodes."""
        before = None
        while before != len(self.nodes):
            before = len(self.nodes)
            self.users = {self.result: [None]}
            for node in self.nodes:
                for name in node.tensors():
                    self.users.setdefault(name, []).append(node)
            self.nodes = [n for n in self.nodes if any(x in self.users for x in n.outputs)]
        self.maker = {name: node for node in self.nodes for name in node.outputs}

    def only_user(self, name: str) -> Node | None:
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 else None

    def replace(self, old: str, new: str) -> None:
        for node in self.nodes:
            node.inputs = [new if isinstance(x, str) and x == old else x for x in node.inputs]
        self.result = new if self.result == old else self.result


def _simplified(graph: Graph) -> Graph:
    editor = _Editor(graph)
    changed = True
    while changed:
        changed = False
        for rule in RULES:
            for node in [*editor.nodes]:
                if node in editor.nodes and rule(editor, node):
                    editor.index()
                    changed = True
    done, order, left = {graph.input}, [], editor.nodes
    while left:
        ready = [node for node in left if done.issuperset(node.tensors())]
        order += ready
        done.update(name for node in ready for name in node.outputs)
        left = [node for node in left if node not in ready]
    return Graph(order, graph.input, editor.result)


def _constant(node: Node) -> np.ndarray | None:
    """The constant of a Mul or Add by one, which becomes the second input."""
    if node.op not in ('Mul', 'Add'):
        return None
    if isinstance(node.inputs[0], np.ndarray):
        node.inputs.reverse()
    return node.inputs[1] if isinstance(node.inputs[1], np.ndarray) else None


def _clip(editor: _Editor, node: Node) -> bool:
    """Min(Relu(x), c) -> Clip(x, 0, c)."""
    if node.op != 'Min' or not isinstance(node.inputs[1], np.ndarray) or node.inputs[1].size != 1:
        return False
    relu = editor.maker.get(node.inputs[0])
    if relu is None or relu.op != 'Relu' or not editor.only_user(relu.output):
        return False
    node.op = 'Clip'
    node.inputs = [relu.inputs[0], np.zeros(()), node.inputs[1].reshape(())]
    return True


def _nothing(editor: _Editor, node: Node) -> bool:
    """Drops x * 1 and x + 0."""
    constant = _constant(node)
    if constant is None or not (constant == (node.op == 'Mul')).all():
        return False
    editor.replace(node.output, node.inputs[0])
    return True


def _factors(editor: _Editor, node: Node) -> bool:
    """(x * a) * b -> x * (a * b), if a or b is a number."""
    constant, before = _constant(node), editor.maker.get(node.inputs[0])
    if constant is None or node.op != 'Mul' or before is None or before.op != 'Mul':
        return False
    other = _constant(before)
    if other is None or not editor.only_user(before.output) or 1 not in (constant.size, other.size):
        return False
    a, b = (x.reshape(()) if x.size == 1 else x for x in (constant, other))
    product = a.astype(np.float64) * b
    node.inputs = [before.inputs[0], np.where(abs(product - 1) < 1e-6, 1.0, product)]
    return True


def _per_output(node: Node, constant: np.ndarray) -> np.ndarray | None:
    """A constant as one number for each output channel of a Conv or Gemm, or None."""
    channels = node.inputs[1].shape[0 if node.op == 'Conv' else 1]
    axis = -3 if node.op == 'Conv' else -1
    if constant.size == 1:
        return np.full(channels, constant.reshape(()), np.float64)
    if constant.size == channels and constant.ndim >= -axis and constant.shape[axis] == channels:
        return constant.reshape(channels).astype(np.float64)
    return None


def _into_layer(editor: _Editor, node: Node) -> bool:
    """Conv(x) * a + b -> another Conv(x); and Gemm."""
    constant, layer = _constant(node), editor.maker.get(node.inputs[0])
    if constant is None or layer is None or layer.op not in ('Conv', 'Gemm'):
        return False
    values = _per_output(layer, constant)
    if values is None or not editor.only_user(layer.output):
        return False
    _, kernel, bias = layer.inputs
    bias = np.zeros(len(values)) if bias is None else bias
    if node.op == 'Mul':
        shape = (-1, 1, 1, 1) if layer.op == 'Conv' else (1, -1)
        layer.inputs[1], layer.inputs[2] = kernel * values.reshape(shape), bias * values
    else:
        layer.inputs[2] = bias + values
    editor.replace(node.output, layer.output)
    return True


def _before_layer(editor: _Editor, node: Node) -> bool:
    """Conv(x * a) -> another Conv(x), for a number a; and Gemm."""
    before = editor.maker.get(node.inputs[0]) if node.op in ('Conv', 'Gemm') else None
    if before is None or before.op != 'Mul' or not editor.only_user(before.output):
        return False
    constant = _constant(before)
    if constant is None or constant.size != 1:
        return False
    node.inputs[0], node.inputs[1] = before.inputs[0], node.inputs[1] * constant.reshape(())
    return True


def _twice(editor: _Editor, node: Node) -> bool:
    """Drops a node that computes the same as another one."""
    for other in editor.users.get((node.tensors() or [''])[0], []):
        if other not in (None, node) and _alike(node, other):
            pairs = zip(node.inputs, other.inputs, strict=True)
            if all(x is y or np.array_equal(x, y) for x, y in pairs):
                for old, new in zip(other.outputs, node.outputs, strict=True):
                    editor.replace(old, new)
                return True
    return False


def _transposes(editor: _Editor, node: Node) -> bool:
    """Transpose(Transpose(x)) -> Transpose(x)."""
    before = editor.maker.get(node.inputs[0]) if node.op == 'Transpose' else None
    if before is None or before.op != 'Transpose':
        return False
    node.inputs = before.inputs
    node.attributes = {'perm': [before.attributes['perm'][i] for i in node.attributes['perm']]}
    return True


def _rejoined(editor: _Editor, node: Node) -> bool:
    """Concat(Split(x)) -> x."""
    split = editor.maker.get(node.inputs[0]) if node.op == 'Concat' else None
    if split is None or split.op != 'Split' or split.outputs != node.inputs:
        return False
    if split.attributes['axis'] != node.attributes['axis']:
        return False
    editor.replace(node.output, split.inputs[0])
    return True


def _siblings(editor: _Editor, node: Node) -> bool:
    """Layers of the same shape with the same input become one wide layer and a Split."""
    if node.op not in ('Conv', 'Gemm') or node.attributes.get('group', 1) != 1:
        return False
    alike = [
        other
        for other in editor.users[node.inputs[0]]
        if other and other.inputs[0] == node.inputs[0] and _alike(node, other)
    ]
    if len(alike) < 2 or not isinstance(node.inputs[0], str):
        return False
    axis = 0 if node.op == 'Conv' else 1
    size = node.inputs[1].shape[axis]
    wide = Node(node.op, [node.inputs[0], *_joined(alike, axis)], [f'{node.output}_wide'], {}, '')
    wide.attributes, wide.name = node.attributes, node.name
    sizes = np.full(len(alike), size, np.int64)
    outputs = [other.output for other in alike]
    split = Node('Split', [wide.output, sizes], outputs, {'axis': 1}, node.name)
    editor.nodes = [n for n in editor.nodes if n not in alike] + [wide, split]
    return True


def _alike(a: Node, b: Node) -> bool:
    """Whether two nodes differ only in the values of their inputs."""
    shapes = [[isinstance(x, str) or np.shape(x) for x in node.inputs] for node in (a, b)]
    return a.op == b.op and a.attributes == b.attributes and shapes[0] == shapes[1]


def _joined(layers: Sequence[Node], axis: int) -> tuple[np.ndarray, np.ndarray | None]:
    kernels = np.concatenate([layer.inputs[1] for layer in layers], axis)
    biases = [layer.inputs[2] for layer in layers]
    return kernels, None if biases[0] is None else np.concatenate(biases)


POINTWISE = {
    *('Relu', 'Tanh', 'Sigmoid', 'Clip', 'Add', 'Mul', 'Sub', 'Div', 'Pow', 'Sqrt', 'Reciprocal'),
    *('Neg', 'Exp', 'Log', 'Abs', 'Max', 'Min', 'MaxPool', 'AveragePool'),
}


def _hoisted(editor: _Editor, node: Node) -> bool:
    """Moves what all towers do after a Split to before it, as one node; convolutions become groups.

    After a normalization, which has to be done for each tower, the towers are joined again.
    """
    if node.op != 'Split' or node.attributes['axis'] != 1 or len({*node.inputs[1].tolist()}) != 1:
        return False
    return any(
        user is not None and _hoist(editor, node, user) for user in editor.users[node.output]
    )


def _hoist(editor: _Editor, split: Node, first: Node) -> bool:
    towers = _towers(editor, split, first)
    if towers is None:
        return False
    outputs = [user.output for user in towers]
    sizes, attributes = split.inputs[1], first.attributes
    if first.op == 'LRN':
        after = {id(user) for name in outputs for user in editor.users[name]}
        return len(after) > 1 and _joined_after(editor, towers, sizes)
    if first.op == 'Conv':
        inputs = [split.inputs[0], *_joined(towers, 0)]
        attributes = {**attributes, 'group': attributes['group'] * len(towers)}
        sizes = np.full(len(towers), first.inputs[1].shape[0], np.int64)
    elif first.op in POINTWISE:
        inputs = _together(editor, [user.inputs for user in towers])
        if inputs is None:
            return False
    else:
        return False
    wide = Node(first.op, inputs, [f'{first.output}_wide'], attributes, first.name)
    split = Node('Split', [wide.output, sizes], outputs, {'axis': 1}, split.name)
    editor.nodes = [n for n in editor.nodes if n not in towers] + [wide, split]
    return True


def _towers(editor: _Editor, split: Node, first: Node) -> list[Node] | None:
    """The nodes that do what `first` does, for every part of a Split; None unless all do."""
    found = [first]
    for i in range(1, len(split.outputs)):
        wanted = [_part(editor, split, x, i) for x in first.inputs]
        same = [
            user
            for user in dict.fromkeys(editor.users.get(split.outputs[i], []))
            if user is not None
            and _alike(first, user)
            and [x for x in user.inputs if isinstance(x, str)]
            == [x for x in wanted if isinstance(x, str)]
        ]
        if len(same) != 1:
            return None
        found += same
    return found if len({*map(id, found)}) == len(found) else None


def _part(editor: _Editor, split: Node, name, i: int):
    """Part i of the tensor whose part 0 has this name, if a similar Split makes it."""
    maker = editor.maker.get(name) if isinstance(name, str) else None
    if maker is None or maker.op != 'Split' or maker.output != name:
        return name
    same = np.array_equal(maker.inputs[1], split.inputs[1])
    return maker.outputs[i] if same and maker.attributes == split.attributes else name


def _joined_after(editor: _Editor, users: list[Node], sizes: np.ndarray) -> bool:
    outputs = [user.output for user in users]
    for user in users:
        user.outputs = [f'{user.output}_tower']
    joined = Node('Concat', [u.output for u in users], [f'{outputs[0]}_all'], {'axis': 1}, '')
    split = Node('Split', [joined.output, sizes], outputs, {'axis': 1}, '')
    editor.nodes += [joined, split]
    return True


def _together(editor: _Editor, each: list[list]) -> list | None:
    """The inputs of operators on parts of the channels, for one operator on all; None if there are none."""
    found = []
    for inputs in zip(*each, strict=True):
        first = inputs[0]
        if isinstance(first, str):
            maker = editor.maker.get(first)
            if maker is None or maker.outputs != [*inputs]:
                return None
            found.append(maker.inputs[0])
        elif np.size(first) == 1 and all(x == first for x in inputs):
            found.append(first)
        elif np.ndim(first) in (2, 4) and all(x.shape[1] > 1 for x in inputs):
            found.append(np.concatenate(inputs, 1))
        else:
            return None
    return found


RULES = (
    *(_clip, _nothing, _factors, _twice, _into_layer, _before_layer),
    *(_transposes, _rejoined, _siblings, _hoisted),
)
