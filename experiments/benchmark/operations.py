"""Counts the FLOPs of each operation of a network, and times it alone.

Also counts the memory traffic of library calls in a compiled program, which its compiler does not.
"""

import math
import re
import statistics
import time
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.nets import alexnet, layers, network
from experiments.scaling import hlo

NAMES = ('conv', 'local', 'lrn', 'map_norm', 'max_pool', 'avg_pool', 'dropout_mask', 'dense')


class Operation(NamedTuple):
    """One call of a function in `layers`."""

    name: str  # layer and function, 'conv1 lrn'
    function: Any
    args: tuple  # abstract arrays, or other values
    kwargs: dict


def operations(net: alexnet.AlexNet, batch: int, crop: int) -> list[Operation]:
    """Returns all calls of `layers` in one training pass, in order; some layers have one per tower."""
    calls, layer = [], ['images']  # the name for calls before the first layer

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x

    def recorded(name):
        function = getattr(layers, name)

        def call(*args, **kwargs):
            calls.append(
                Operation(f'{layer[0]} {name}', function, tuple(map(abstract, args)), kwargs)
            )
            return function(*args, **kwargs)

        return mock.patch.object(layers, name, call)

    def follow(call, args, kwargs, context):
        layer[0] = context.module.name or layer[0]
        return call(*args, **kwargs)

    variables = network.shapes(net, crop)
    images = jax.ShapeDtypeStruct((batch, crop, crop, 3), jnp.float32)
    patches = [recorded(name) for name in NAMES]
    for patch in patches:
        patch.start()
    try:
        with nn.intercept_methods(follow):
            jax.eval_shape(
                lambda v, x, train: network.apply(net, v, x, train)[0],
                variables,
                images,
                network.Training(jax.random.key(0), jnp.arange(batch)),
            )
    finally:
        for patch in patches:
            patch.stop()
    return calls


def flops(operation: Operation) -> int:
    """Returns the multiplications and additions of one forward call; 0 for all but matrix products."""
    name = operation.name.split()[1]
    if name == 'dense':
        x, kernel = operation.args[:2]
        return 2 * math.prod(x.shape) * kernel.shape[-1]
    if name == 'local':  # a separate kernel for every position
        x, kernel = operation.args[:2]
        return 2 * x.shape[0] * math.prod(kernel.shape)
    if name == 'conv':
        out = jax.eval_shape(
            lambda *args: operation.function(*args, **operation.kwargs), *operation.args
        )
        return 2 * math.prod(out.shape) * math.prod(operation.args[1].shape[:3])
    return 0


def totals(net: alexnet.AlexNet, batch: int, crop: int) -> dict[str, int]:
    """Returns the FLOPs of a batch, by task; the first layer needs no gradient of its input."""
    ops = operations(net, batch, crop)
    forward, first = sum(map(flops, ops)), first_product(ops)
    return {
        'infer': forward,
        'train': 3 * forward - sum(flops(op) for op in ops if op.name == first),
    }


def first_product(ops: list[Operation]) -> str:
    """Returns the name of the first product, whose input (the images) needs no gradient."""
    return next(op.name for op in ops if flops(op))


def table(net: alexnet.AlexNet, batch: int, crop: int, repeats: int = 5) -> list[dict]:
    """Times every operation alone -> rows of name, calls, flops, products, forward_s and backward_s.

    `products`: how many times `flops` a training step computes, 2 if the input needs no gradient, else 3.
    `backward_s` is the time of forward and backward together minus forward. Times are medians over rounds
    that time every operation in turn.
    """
    kinds, calls = {}, operations(net, batch, crop)
    first = first_product(calls)
    for op in calls:
        kinds.setdefault(op.name, []).append(op)
    rows, programs = [], {}
    for name, ops in kinds.items():
        rows.append(
            {
                'name': name,
                'calls': len(ops),
                'flops': sum(map(flops, ops)),
                'products': 2 if name == first else 3,
            }
        )
        programs[name] = _programs(ops[0], first=name == first)
    times = {(name, kind): [] for name in programs for kind in ('forward', 'both')}
    for _ in range(repeats):
        for name, kind in times:
            if kind in programs[name]:
                times[name, kind].append(_time(*programs[name][kind]))
    for row in rows:
        forward, both = (times[row['name'], kind] for kind in ('forward', 'both'))
        row['forward_s'] = statistics.median(forward) * row['calls']
        row['backward_s'] = (
            statistics.median(both) * row['calls'] - row['forward_s'] if both else 0.0
        )
    return rows


def _programs(op: Operation, first: bool):
    """Returns {'forward': (compiled, arguments), 'both': ...} for a call, on random numbers."""
    rng = np.random.default_rng(0)
    dynamic = [i for i, x in enumerate(op.args) if isinstance(x, jax.ShapeDtypeStruct)]

    def make(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.arange(math.prod(x.shape), dtype=x.dtype).reshape(x.shape)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)

    arrays = [make(op.args[i]) for i in dynamic]

    def forward(*arrays):
        args = list(op.args)
        for i, x in zip(dynamic, arrays, strict=True):
            args[i] = x
        return op.function(*args, **op.kwargs)

    programs = {'forward': (jax.jit(forward), arrays)}
    if op.name.endswith('dropout_mask') or op.name.startswith('images '):
        return programs
    gradient = jnp.ones_like(jax.eval_shape(forward, *arrays))

    def both(x, rest, gradient):
        if first:  # no gradient of the images
            out, pullback = jax.vjp(lambda *rest: forward(x, *rest), *rest)
        else:
            out, pullback = jax.vjp(forward, x, *rest)
        return out, pullback(gradient)

    programs['both'] = (jax.jit(both), (arrays[0], arrays[1:], gradient))
    return programs


def _time(function, args) -> float:
    """Returns the seconds per call, averaged over about a tenth of a second."""

    def run(count):
        began = time.perf_counter()
        for _ in range(count):
            out = function(*args)
        # only once: synchronizing takes longer than a small operation
        jax.block_until_ready(out)
        return time.perf_counter() - began

    run(1)
    count = math.ceil(0.1 / run(1))
    return run(count) / count


def library_bytes(text: str) -> int:
    """Returns the bytes that a program's library calls (cuDNN, cuBLAS) read and write, from its HLO text.

    Excludes their scratch memory, byte arrays returned beside the actual result: it may remain unused.
    """
    sizes, total = {}, 0
    for name, result, kind, operands in re.findall(
        r'^\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)', text, re.MULTILINE
    ):
        sizes[name] = sum(
            hlo.BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(',') if n)
            for dtype, shape in hlo.SHAPE.findall(result)
            if dtype not in ('u8', 's8') or result[0] != '('
        )
        if kind == 'custom-call':
            total += sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r'%([\w.-]+)', operands))
    return total
