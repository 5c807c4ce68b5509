"""The tables and the plot of the command."""

import math
import pathlib
from typing import NamedTuple

from alexnet_jax.nets import alexnet
from experiments.scaling import formula, programs
from experiments.scaling.accelerators import ACCELERATORS, Accelerator, efficiency
from experiments.scaling.formula import Move

# Colours of Okabe and Ito that also differ in grey, with distinct lines and markers.
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
    """Returns a table of what a program moves beside what it must move."""
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
                colour, line, marker = STYLES[name]
                x = [1, *(p.devices for p in points if p.devices > 1)]
                low = [100, *(100 * p.none for p in points if p.devices > 1)]
                high = [100, *(100 * p.full for p in points if p.devices > 1)]
                axes.plot(x, low, line, color=colour, marker=marker, linewidth=1.8, label=name)
                axes.plot(x, high, line, color=colour, linewidth=0.9)
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
