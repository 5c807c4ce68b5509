"""From bytes and FLOPs to predicted efficiency on named accelerators, by one formula.

    compute = FLOPs / (share * peak)
    a collective = the bytes that each device sends in a ring / bandwidth:
        2 (n-1)/n S for an all-reduce of S bytes over n devices,
        (n-1)/n S for an all-gather to S bytes or a reduce-scatter from S bytes
    efficiency, nothing overlaps = compute / (compute + gradients + exchanges)
    efficiency, all gradients do = compute / (max(compute, gradients) + exchanges)

Gradients can be summed while the layers below still compute; for an exchange the next layer waits.
Every device computes equally much on every mesh, so the efficiency is images/s of N devices over N
times those of one that has as many images. Assumed: the same share of the peak everywhere; rings at
the full speed of the links. Left out: latency, waiting for the slowest, the input pipeline, and the
update of the parameters.
"""

import math
from typing import NamedTuple

from experiments.scaling import formula
from experiments.scaling.formula import Move


class Accelerator(NamedTuple):
    """Vendor's public figures; bytes/s in one direction."""

    name: str
    dtype: str  # of the arithmetic
    peak: float  # FLOP/s, dense
    pair: float  # bytes/s from one device to a single neighbour
    ring: float  # bytes/s that a device of a larger group sends
    domain: int  # devices joined that way
    network: float  # bytes/s of each device beyond; 0: there is none
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
        '1,979 TFLOP/s "with sparsity", half without; NVLink 900 GB/s, both ways together, among '
        'the 8 of a machine (nvidia.com/en-us/data-center/h100); a 400 Gb/s ConnectX-7 for each GPU '
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
        '197 TFLOP/s; 400 GB/s per chip, both ways and four links together; a 2D torus, whose slices '
        'below 16x16 have corners with only two links (cloud.google.com/tpu/docs/v5e)',
    ),
}


def bandwidth(accelerator: Accelerator, axis: str, mesh: tuple[int, int]) -> float:
    """Bytes/s that each device of a group over `axis` sends; 0 where the groups cannot be reached.

    Devices are numbered along `model` first. A group that spans several machines has the network
    links of its own members there: a ring for each.
    """
    count = formula.members(axis, mesh)
    stride = mesh[1] if axis == 'data' else 1
    if count * stride <= accelerator.domain:
        return accelerator.pair if count == 2 else accelerator.ring
    return min(accelerator.ring, accelerator.network * max(1, accelerator.domain // stride))


def seconds(accelerator: Accelerator, moves: list[Move], mesh: tuple[int, int]) -> float:
    """The time of all moves one after the other; infinite where there is no link."""
    total = 0.0
    for move in moves:
        speed = bandwidth(accelerator, move.axis, mesh)
        count = formula.members(move.axis, mesh)
        total += formula.sent(move, count) / speed if speed else math.inf
    return total


def efficiency(
    accelerator: Accelerator, moves: list[Move], mesh: tuple[int, int], flops: float, share: float
) -> tuple[float, float]:
    """(nothing overlaps, all gradients do), in 0..1; flops: of one device in one step."""
    compute = flops / (share * accelerator.peak)
    waited = seconds(accelerator, [m for m in moves if m.use == 'exchange'], mesh)
    behind = seconds(accelerator, [m for m in moves if m.use != 'exchange'], mesh)
    return compute / (compute + waited + behind), compute / (max(compute, behind) + waited)
