"""Predicts scaling efficiency on named accelerators from bytes and FLOPs.

    compute = FLOPs / (share * peak)
    a collective = bytes that each device sends in a ring / bandwidth:
        2 (n-1)/n S for an all-reduce of S bytes over n devices,
        (n-1)/n S for an all-gather to S bytes or a reduce-scatter from S bytes
    efficiency without overlap          = compute / (compute + gradients + exchanges)
    efficiency, all gradients overlap   = compute / (max(compute, gradients) + exchanges)

Gradients can be summed while earlier layers are still computing; an exchange blocks the next layer. Every
device does the same amount of work on every mesh, so the efficiency is the images/s of N devices divided by N
times those of one device with as many images. Assumptions: the same share of peak everywhere, and rings that
run at full link speed. Not modeled: latency, stragglers, the input pipeline, and the parameter update.
"""

import math
from typing import NamedTuple

from experiments.scaling import formula
from experiments.scaling.formula import Move


class Accelerator(NamedTuple):
    """The vendor's public figures; bytes/s in one direction."""

    name: str
    dtype: str  # of the computation
    peak: float  # FLOP/s, dense
    pair: float  # bytes/s from one device to a single neighbor
    ring: float  # bytes/s that each device of a larger group sends
    domain: int  # number of devices connected this way
    network: float  # bytes/s per device beyond the domain; 0: none
    source: str


ACCELERATORS = {
    'gtx580': Accelerator(
        'NVIDIA GTX 580',
        'float32',
        512 * 2 * 1.544e9,
        8e9,
        8e9,
        2,
        0,
        "the paper's. 512 cores x 2 x 1.544 GHz; PCI Express 2.0 x16: 8 GB/s each way (NVIDIA's "
        'specifications of the card)',
    ),
    'h100': Accelerator(
        'NVIDIA H100 SXM (DGX H100)',
        'bfloat16',
        989.4e12,
        450e9,
        450e9,
        8,
        50e9,
        '1,979 TFLOP/s "with sparsity", half without; NVLink 900 GB/s in both directions combined, among '
        'the 8 GPUs of a machine (nvidia.com/en-us/data-center/h100); one 400 Gb/s ConnectX-7 per GPU '
        '(docs.nvidia.com/dgx-basepod)',
    ),
    'v5e': Accelerator(
        'Google TPU v5e',
        'bfloat16',
        197e12,
        50e9,
        100e9,
        256,
        0,
        '197 TFLOP/s; 400 GB/s per chip, both directions and all four links combined; a 2D torus; in slices '
        'below 16x16 the corners have only two links (cloud.google.com/tpu/docs/v5e)',
    ),
}


def bandwidth(accelerator: Accelerator, axis: str, mesh: tuple[int, int]) -> float:
    """Returns the bytes/s that each device of a group over `axis` sends; 0 if nothing connects the group.

    Devices are numbered along `model` first. A group that spans several machines uses the network links of
    its own members, with one ring per link.
    """
    count = formula.members(axis, mesh)
    stride = mesh[1] if axis == 'data' else 1
    if count * stride <= accelerator.domain:
        return accelerator.pair if count == 2 else accelerator.ring
    return min(accelerator.ring, accelerator.network * max(1, accelerator.domain // stride))


def seconds(accelerator: Accelerator, moves: list[Move], mesh: tuple[int, int]) -> float:
    """Returns the total time of all moves in sequence; infinite if there is no link."""
    total = 0.0
    for move in moves:
        speed = bandwidth(accelerator, move.axis, mesh)
        count = formula.members(move.axis, mesh)
        total += formula.sent(move, count) / speed if speed else math.inf
    return total


def efficiency(
    accelerator: Accelerator, moves: list[Move], mesh: tuple[int, int], flops: float, share: float
) -> tuple[float, float]:
    """Returns efficiencies in 0..1: (no overlap, all gradients overlap); flops: per device and step."""
    compute = flops / (share * accelerator.peak)
    waited = seconds(accelerator, [m for m in moves if m.use == 'exchange'], mesh)
    behind = seconds(accelerator, [m for m in moves if m.use != 'exchange'], mesh)
    return compute / (compute + waited + behind), compute / (max(compute, behind) + waited)
