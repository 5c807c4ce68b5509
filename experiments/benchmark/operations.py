"""The operations of a network, one by one: how much arithmetic each is, and how long it takes.

And what a compiled program asks of libraries, whose traffic its compiler does not count.
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
    """A call of a function of `layers`."""

    name: str  # layer and function, 'conv1 lrn'
    function: Any
    args: tuple  # abstract arrays, or other values
    kwargs: dict


def operations(net: alexnet.AlexNet, batch: int, crop: int) -> list[Operation]:
    """All calls of `layers` in one training pass, in order; a layer has one for each tower."""
    calls, layer = [], ['images']  # what comes before the first layer works on them

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
    """Multiplications and additions of one call forward; 0 for all but products."""
    name = operation.name.split()[1]
    if name == 'dense':
        x, kernel = operation.args[:2]
        return 2 * math.prod(x.shape) * kernel.shape[-1]
    if name == 'local':  # a kernel of its own for every place
        x, kernel = operation.args[:2]
        return 2 * x.shape[0] * math.prod(kernel.shape)
    if name == 'conv':
        out = jax.eval_shape(
            lambda *args: operation.function(*args, **operation.kwargs), *operation.args
        )
        return 2 * math.prod(out.shape) * math.prod(operation.args[1].shape[:3])
    return 0


def totals(net: alexnet.AlexNet, batch: int, crop: int) -> dict[str, int]:
    """FLOP of a batch, by task: the first layer needs no gradient of its input."""
    ops = operations(net, batch, crop)
    forward, first = sum(map(flops, ops)), first_product(ops)
    return {
        'infer': forward,
        'train': 3 * forward - sum(flops(op) for op in ops if op.name == first),
    }


def first_product(ops: list[Operation]) -> str:
    """The name of the first product, whose input, the images, needs no gradient."""
    return next(op.name for op in ops if flops(op))


def table(net: alexnet.AlexNet, batch: int, crop: int, repeats: int = 5) -> list[dict]:
    """Times every operation alone: rows of name, calls, flops, products, forward and backward in seconds.

    `products`: how many of `flops` a training step makes, 2 where the input needs no gradient, else 3.
    `backward` is forward and backward together minus forward. Medians over rounds in which every
    operation has its turn.
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
    """{'forward': (compiled, arguments), 'both': ...} of a call, on random numbers."""
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
    """Seconds of a call, the mean over about a tenth of a second."""

    def run(count):
        began = time.perf_counter()
        for _ in range(count):
            out = function(*args)
        # once: small operations take less time than to hear of their end
        jax.block_until_ready(out)
        return time.perf_counter() - began

    run(1)
    count = math.ceil(0.1 / run(1))
    return run(count) / count


def library_bytes(text: str) -> int:
    """Bytes that a program's calls of libraries (cuDNN, cuBLAS) read and write, from its HLO text.

    Without their scratch memory, bytes that are a result beside the real one: it need not be touched.
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
