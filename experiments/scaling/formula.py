"""Derives what a training step must move between devices and compute, from the architecture alone.

No program is inspected. Sizes are those of the whole array, as in `hlo.Collective`.
"""

from typing import NamedTuple

import jax

from alexnet_jax.nets import alexnet
from alexnet_jax.training import metrics
from experiments.scaling.hlo import BYTES

# METRICS: how many f32 sums a step reduces over the devices.
_IMAGE, _INDEX = jax.ShapeDtypeStruct((1,), 'float32'), jax.ShapeDtypeStruct((1,), 'int32')
_SCORES = jax.ShapeDtypeStruct((1, 10), 'float32')
METRICS = len(jax.eval_shape(metrics.count, _SCORES, _IMAGE, _INDEX, _IMAGE))


class Layer(NamedTuple):
    """One layer of the whole network."""

    name: str
    kernel: int  # parameters over all towers
    bias: int
    macs: int  # multiply-adds per image, forward
    gathered: tuple[int, ...]  # elements per image of each array that the towers exchange here


class Move(NamedTuple):
    """One array that a collective must move; elements as in `hlo.Collective`."""

    kind: str
    axis: str  # of the mesh: 'data', 'model' or 'both'
    dtype: str
    elements: int
    use: str = ''  # 'exchange', which blocks the next layer; 'gradient', 'metrics', 'norm'


def layers(net: alexnet.AlexNet, crop: int) -> list[Layer]:
    """Returns the layers of a network for crops of `crop` pixels."""
    towers = net.towers
    out = []
    size, channels = crop, 3  # of one tower's input
    window, stride = alexnet.POOLING[net.pooling]
    for i, features in enumerate(map(net.per_tower, net.kernels)):
        name, k = f'conv{i + 1}', alexnet.SIZES[i]
        kernel = macs = 0
        gathered = []
        if name in net.exchange:
            channels *= towers
            gathered.append(size * size * channels)
        if i == 0:
            first = size = (size + sum(net.conv1_padding) - k) // 4 + 1
        elif name != net.remove:
            size += 2 * alexnet.padding_of(i, net.pooling, size, first) - k + 1
        if name != net.remove:
            halves = name in alexnet.GROUPED and (net.remove, name) not in alexnet.UNGROUPED
            kernel = towers * k * k * channels // (net.groups if halves else 1) * features
            macs, channels = kernel * size * size, features
        for op in net.ops(i):
            if op == 'pool':
                size = 1 - (window - size) // stride
            if op == 'norm' and net.norm_window == 'all':
                gathered.append(size * size * channels * towers)
        bias = 0 if name == net.remove else towers * features
        out.append(Layer(name, kernel, bias, macs, tuple(gathered)))
    units = size * size * channels
    for i, features in enumerate(map(net.per_tower, net.hidden)):
        name = f'fc{i + 6}'
        units *= towers if name in net.exchange else 1
        kernel = towers * units * features
        gathered = (units,) if name in net.exchange else ()
        out.append(Layer(name, kernel, towers * features, kernel, gathered))
        units = features
    kernel = towers * units * net.classes
    return [*out, Layer('fc8', kernel, net.classes, kernel, ())]


def flops(net: alexnet.AlexNet, crop: int) -> int:
    """Returns the FLOPs of training on one image: multiplications and additions, forward and backward.

    Counts only matrix products and convolutions, not normalization, pooling, activations, masks, the loss or
    the update. The first layer needs no gradient of its input.
    """
    macs = [layer.macs for layer in layers(net, crop) if layer.macs]
    return 2 * (3 * sum(macs) - macs[0])


def train_step(
    net: alexnet.AlexNet, crop: int, images: int, mesh: tuple[int, int], *, lars: bool = False
) -> list[Move]:
    """Returns what `steps.make_train_step` must move on a (data, model) mesh, `images` per device.

    The gradients are summed over `data` in the compute dtype (those of biases in float32, in which biases are
    added), as are the metrics. With one tower per device of `model`, the exchanged maps are all-gathered
    forward, their gradients reduce-scattered backward, and the logits summed in float32. LARS sums two
    squared norms for each parameter that is sharded over `model`.
    """
    data, shards = mesh
    dtype, rows = _dtype(net), images * shards
    plan = layers(net, crop)
    moves = []
    if shards > 1:
        for layer in plan:
            for elements in layer.gathered:
                moves.append(Move('all-gather', 'model', dtype, rows * elements, 'exchange'))
                moves.append(Move('reduce-scatter', 'model', dtype, rows * elements, 'exchange'))
        moves.append(Move('all-reduce', 'model', 'f32', rows * net.classes, 'exchange'))
        if lars:
            arrays = 2 * sum(layer.kernel > 0 for layer in plan) - 1  # all but fc8's bias
            moves += [Move('all-reduce', 'model', 'f32', 1, 'norm')] * 2 * arrays
    if data > 1:
        moves += gradients('data', dtype, plan[:-1], shards)
        moves.append(Move('all-reduce', 'data', dtype, plan[-1].kernel // shards, 'gradient'))
        moves.append(Move('all-reduce', 'data', 'f32', net.classes, 'gradient'))
        moves += [Move('all-reduce', 'data', 'f32', 1, 'metrics')] * METRICS
    return moves


def gradients(axis: str, dtype: str, plan: list[Layer], shards: int = 1) -> list[Move]:
    """Returns the gradient sums of some layers, sharded over `shards` devices; biases in float32."""
    kernels, biases = sum(layer.kernel for layer in plan), sum(layer.bias for layer in plan)
    return [
        Move('all-reduce', axis, dtype, kernels // shards, 'gradient'),
        Move('all-reduce', axis, 'f32', biases // shards, 'gradient'),
    ]


def sent(move: Move, devices: int) -> float:
    """Returns the bytes that each of `devices` devices sends in a ring for a move."""
    share = (devices - 1) / devices
    return (2 if move.kind == 'all-reduce' else 1) * share * move.elements * BYTES[move.dtype]


def members(axis: str, mesh: tuple[int, int]) -> int:
    """Returns how many devices form a group over an axis."""
    return {'data': mesh[0], 'model': mesh[1], 'both': mesh[0] * mesh[1]}[axis]


def _dtype(net) -> str:
    return {'float32': 'f32', 'bfloat16': 'bf16'}[net.dtype]
