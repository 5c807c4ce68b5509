"""The tables and the plot of the command."""

import math
import pathlib
import re
from typing import NamedTuple

import numpy as np

from alexnet_jax.nets import alexnet
from experiments.scaling import compilers, formula, hlo, programs
from experiments.scaling.accelerators import ACCELERATORS, Accelerator, efficiency
from experiments.scaling.formula import Move

ROWS = 24  # of the costs of layers
# Colors of Okabe and Ito that also differ in gray, with distinct lines and markers.
STYLES = {
    'data parallel': ('#000000', '-', 'o'),
    "the paper's split": ('#d55e00', '--', 's'),
}


class Point(NamedTuple):
    """One scheme on one number of devices."""

    devices: int
    megabytes: float  # sent by each device per step
    none: float  # efficiency without overlap, 0..1
    full: float  # efficiency if all gradient sums overlap


def schemes(devices: int, net: alexnet.AlexNet) -> dict[str, tuple[int, int]]:
    """Returns the meshes to compare on this many devices: {name: (data, model)}."""
    out = {'data parallel': (devices, 1)}
    if net.towers > 1 and devices % net.towers == 0:
        out["the paper's split"] = (devices // net.towers, net.towers)
    return out


def curves(
    net, crop: int, accelerator: Accelerator, *, images: int, devices: list[int], share: float
) -> dict[str, list[Point]]:
    """Returns the predicted curve of every scheme, without device counts that no network connects."""
    net = net.clone(dtype=accelerator.dtype)
    out: dict[str, list[Point]] = {}
    for count in devices:
        for name, mesh in schemes(count, net).items():
            moved = formula.train_step(net, crop, images, mesh)
            flops = formula.flops(net, crop) * images
            none, full = efficiency(accelerator, moved, mesh, flops, share)
            sent = sum(formula.sent(m, formula.members(m.axis, mesh)) for m in moved)
            if none > 0:
                out.setdefault(name, []).append(Point(count, sent / 1e6, none, full))
    return out


def count_lines(moved: list[Move], wanted: list[Move]) -> list[str]:
    """Returns a table of what a program moves, compared with what it must move."""
    counted, expected = programs.totals(moved), programs.totals(wanted)
    out = [f'  {"kind":<16}{"axis":<7}{"dtype":<6}{"arrays":>7}{"bytes":>16}{"formula":>16}']
    for key in sorted(counted.keys() | expected.keys()):
        arrays, size = counted.get(key, (0, 0))
        should = expected.get(key, (0, 0))[1]
        verdict = '' if size == should else '  DIFFERENT'
        out.append(
            '  {:<16}{:<7}{:<6}'.format(*key) + f'{arrays:>7}{size:>16,}{should:>16,}{verdict}'
        )
    return out if len(out) > 1 else ['  no collective']


def program_lines(
    compiled, text: str, chip: compilers.Chip, shape, net, images: int, flops: int
) -> list[str]:
    """Describes a program for devices that are not present; flops: of training on one image, 0 if unknown.

    compiled: for its memory only; images: per device, which computes 1 / shape[1] of the towers for them.
    """
    memory = compiled.memory_analysis()
    kernels = hlo.kernels(text)
    held, peak = peak_memory(memory)
    per_image = images * shape[1]  # images that a device works on, even if only in its own towers
    moved = sum(k.bytes * k.times for k in kernels) / per_image
    products = chip.peak(net.dtype)  # FLOP/s
    count = sum(k.times for k in kernels if not k.op.endswith('-done'))
    times = [_seconds(k, chip, products) for k in kernels]
    total = sum(times)
    speed, share = f'{images / total:,.0f} images/s per device', ''
    if flops and products:
        share = f', {flops * images / total / products:.0%} of {products / 1e12:,.0f} TFLOP/s'
    bound = f'at least {1e3 * total:.4g} ms without collectives: at most {speed}{share}'
    if chip.clock:
        known = sum(t for t, k in zip(times, kernels, strict=True) if k.cycles)
        bound = (
            f'{1e3 * total:.4g} ms estimated without collectives, {1e3 * known:.4g} by the compiler: '
            f'{speed}{share}'
        )
    towers = f' (of one device, which computes 1/{shape[1]} of the towers)' if shape[1] > 1 else ''
    out = [
        "the compiler's model, not measured:",
        f'  memory      {peak / 1e6:,.0f} MB of {chip.memory / 1e6:,.0f}: {held / 1e6:,.0f} of arguments and '
        f'results, {memory.temp_size_in_bytes / 1e6:,.0f} of temporaries',
        f'  kernels     {count}, {moved / 1e6:.2f} MB read and written per image{towers}',
        f'  time        {bound}',
        f'  assumes     {_assumption(chip, products)}',
    ]
    groups: dict[tuple[str, str], list[float]] = {}
    layers = {*net.names}
    for kernel, seconds in zip(kernels, times, strict=True):
        entry = groups.setdefault(_place(kernel, layers), [0.0, 0.0])
        entry[0] += seconds
        entry[1] += kernel.bytes * kernel.times
    out.append(f'  {"layer":<12}{"pass":<10}{"us per image":>14}{"share":>8}{"MB per image":>14}')
    for (layer, way), (seconds, size) in sorted(groups.items(), key=lambda x: -x[1][0])[:ROWS]:
        out.append(
            f'  {layer:<12}{way:<10}{1e6 * seconds / per_image:>14.2f}{seconds / total:>8.1%}'
            f'{size / per_image / 1e6:>14.2f}'
        )
    out += _positions(text, kernels, times, shape)
    return out


def peak_memory(memory) -> tuple[int, int]:
    """Bytes of arguments and results, and with temporaries, by `compiled.memory_analysis()`."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held, held + memory.temp_size_in_bytes


def _seconds(kernel: hlo.Kernel, chip: compilers.Chip, products: float) -> float:
    """The compiler's estimate or, if it gives none, the minimum time for memory traffic or arithmetic.

    products: FLOP/s, 0 if unknown.
    """
    if kernel.op.startswith((*hlo.KINDS, 'async')):
        return 0.0
    if kernel.cycles:
        return kernel.times * kernel.cycles / chip.clock
    if chip.clock and kernel.op.endswith('-start'):  # beside the others
        return 0.0
    arithmetic = kernel.flops / products if products else 0.0
    return kernel.times * max(kernel.bytes / chip.bandwidth, arithmetic)


def _assumption(chip: compilers.Chip, products: float) -> str:
    if chip.clock:
        return (
            f'the cycles that the compiler estimates, at {chip.clock / 1e9:.2f} GHz (inferred from the peak '
            f'and its multipliers, {chip.multipliers}), else the minimum time for memory traffic or '
            'arithmetic; copies that it starts early cost nothing'
        )
    return (
        f'every kernel reads and writes its arrays once at {chip.bandwidth / 1e12:.2f} TB/s, or multiplies '
        f'at {products / 1e12:,.0f} TFLOP/s, whichever takes longer'
    )


def _place(kernel: hlo.Kernel, layers: set[str]) -> tuple[str, str]:
    """The layer of a kernel, and the pass: 'forward', 'backward' or ''."""
    names = [part for part in re.split(r'[/()]', kernel.source) if part in layers]
    if not names:
        return ('dropout' if 'dropout' in kernel.source else 'update, ...'), ''
    return names[-1], 'backward' if 'transpose(' in kernel.source else 'forward'


def _positions(text: str, kernels: list[hlo.Kernel], times: list[float], shape) -> list[str]:
    """Lists the collectives: what they move, and how much of the work is done when they start and end."""
    done = np.cumsum([0.0, *times]) / (sum(times) or 1.0)
    moved: dict[str, list] = {}
    for move in hlo.collectives(text):
        moved.setdefault(move.name, []).append(move)
    out = []
    for name, moves in moved.items():
        size = sum(m.elements * hlo.BYTES[m.dtype] for m in moves)
        own = next((i for i, k in enumerate(kernels) if name in k.parts), None)
        where = ''
        if own is not None:
            ends = [
                i
                for i, k in enumerate(kernels)
                if k.op.endswith('-done') and kernels[own].name in k.operands
            ]
            where = f'after {done[own]:.0%} of the work'
            if ends:
                where = f'from {done[own]:.0%} to {done[ends[0]]:.0%} of the work'
        out.append(
            f'  {moves[0].kind:<16}{hlo.axis(moves[0].groups, shape):<7}{len(moves):>4} arrays '
            f'{size:>14,} bytes  {where}'
        )
    return out or ['  no collective']


def curve_lines(accelerator: Accelerator, images: int, points: dict[str, list[Point]]) -> list[str]:
    """Returns the table of predictions for one accelerator."""
    names = list(points)
    out = [
        f'{accelerator.name}, {accelerator.dtype}, {images} images per device: MB sent by each '
        'device, efficiency without overlap, and if all gradients overlap'
    ]
    out.append(f'  {"devices":<9}' + ''.join(f'{name:>28}' for name in names))
    for count in sorted({p.devices for line in points.values() for p in line}):
        cells = []
        for name in names:
            point = next((p for p in points[name] if p.devices == count), None)
            cells.append(
                f'{point.megabytes:>12,.1f}{point.none:>8.1%}{point.full:>8.1%}' if point else ''
            )
        out.append(f'  {count:<9}' + ''.join(f'{cell:>28}' for cell in cells))
    return out


def draw(
    predicted: dict[tuple[str, int], dict[str, list[Point]]], title: str, out: pathlib.Path
) -> None:
    """Plots efficiency over devices, with a panel per accelerator and number of images per device."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    keys = sorted({key for key, _ in predicted}, key=list(ACCELERATORS).index)
    sizes = sorted({images for _, images in predicted})
    lowest = min(p.none for lines in predicted.values() for line in lines.values() for p in line)
    bottom = 10 * math.floor(10 * lowest)
    figure, panels = plt.subplots(
        len(keys),
        len(sizes),
        figsize=(3.8 * len(sizes), 3.1 * len(keys) + 1.1),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout='constrained',
    )
    figure.suptitle(title, fontsize=10)
    for row, key in zip(panels, keys, strict=True):
        for axes, images in zip(row, sizes, strict=True):
            for name, points in predicted[key, images].items():
                color, line, marker = STYLES[name]
                x = [1, *(p.devices for p in points if p.devices > 1)]
                low = [100, *(100 * p.none for p in points if p.devices > 1)]
                high = [100, *(100 * p.full for p in points if p.devices > 1)]
                axes.plot(x, low, line, color=color, marker=marker, linewidth=1.8, label=name)
                axes.plot(x, high, line, color=color, linewidth=0.9)
            axes.set_xscale('log', base=2)
            axes.set_xticks(x, [str(n) for n in x])
            axes.set_ylim(bottom, 102)
            axes.grid(color='#dddddd', linewidth=0.6)
            axes.set_title(f'{ACCELERATORS[key].name}, {images} images per device', fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel('devices')
    for axes in panels[:, 0]:
        axes.set_ylabel('efficiency, %')
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=len(STYLES),
        fontsize=9,
        frameon=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)
