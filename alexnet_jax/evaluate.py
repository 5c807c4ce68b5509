"""Evaluates networks as in the paper: center crop, ten crops (§4.1), and ensembles.

    python -m alexnet_jax.evaluate RUN [RUN ...]

Prints a table with the top-1 and top-5 errors of each run and of the ensemble of all runs. Every
image counts exactly once. --confusion writes confusion.csv (a row per true class, a column per
predicted class), confusion.png and per_class.csv to the run directory or to --output; for splits other
than val their names begin with the split. The matrix is that of the table's last row.
"""

import csv
import functools
import io
import os
from collections.abc import Sequence

import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common import class_names
from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.devices import distributed
from alexnet_jax.input import threads
from alexnet_jax.training import evaluation, inference, metrics, steps

DPI = 100
# The most classes for which cells have numbers, and rows and columns have names.
NUMBERED, NAMED = 20, 60


def main() -> None:
    parser = command.make_parser('evaluate', __doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run directories')
    parser.add_argument(
        '--split', default='val', choices=('val', 'train', 'test'), help='images to evaluate'
    )
    parser.add_argument(
        '--views', default='both', choices=('both', *steps.VIEWS), help='crops (§4.1)'
    )
    parser.add_argument('--step', **command.STEP)
    parser.add_argument('--store', default='', help='path of the store, if it has moved')
    parser.add_argument('--batch', type=int, default=100, help='images per step')
    parser.add_argument('--threads', type=int, default=0, help='reader threads; 0: one per core')
    parser.add_argument('--per_class', action='store_true', help='also print the errors by class')
    parser.add_argument(
        '--confusion', action='store_true', help='also write the confusion matrix: CSV and PNG'
    )
    parser.add_argument('--output', metavar='DIR', help='folder for --confusion (default: RUN)')
    command.add_devices(parser, distributed=True)
    args = parser.parse_args()
    threads.check('--threads', args.threads)
    if args.output is not None and not args.confusion:
        raise UserError('--output is the folder for --confusion: give both flags')
    if args.confusion and args.output is None and len(args.runs) > 1:
        raise UserError('--confusion of several runs needs a folder of its own: give --output=DIR')
    prefix = os.path.join(
        args.runs[0] if args.output is None else args.output,
        '' if args.split == 'val' else f'{args.split}_',
    )
    command.log_to_stdout()
    command.start(args.cpu_devices, **{name: vars(args)[name] for name in command.DISTRIBUTED})
    with distributed.together():
        distributed.agree(
            {name: value for name, value in vars(args).items() if name != 'process_id'}
        )
        if args.confusion and distributed.is_first():
            figures.check_folder(args.runs[0], args.output)
            figures.check_file('--output', f'{prefix}confusion.csv')
        results = evaluation.compare(
            args.runs,
            views=tuple(steps.VIEWS) if args.views == 'both' else (args.views,),
            split=args.split,
            step=args.step,
            store=args.store,
            batch=args.batch,
            threads=args.threads,
            confusion=args.confusion,
        )
        if distributed.is_first():
            print(evaluation.table(results))
            names = inference.describe_run(args.runs[0]).facts.names
            if args.per_class:
                print(evaluation.class_table(results, class_names.shown(names)))
            if args.confusion:
                write_confusion(prefix, results, names)


def write_confusion(
    prefix: str, results: dict[tuple[str, str], dict], names: Sequence[str]
) -> None:
    """Prints the most frequent confusions of the last result, and writes its matrix and all class errors."""
    (*_, ((name, view), last)) = results.items()
    matrix, shown = last['confusion'], class_names.shown(names)
    print(printable(f'most often confused by {name}, {view}:'))
    for count, i, j in most_confused(matrix):
        share = 100 * count / matrix[i].sum()
        print(f'  {shown[i]} classified as {shown[j]}: {count:,} ({share:.1f}% of {shown[i]})')
    counts = last['class_count'].astype(int)
    errors = [metrics.class_errors(sums) for sums in results.values()]
    heads = [f'top-1 error %: {name}, {view}' for name, view in results]
    rows = [
        [name, counts[k], *('' if np.isnan(e[k]) else f'{e[k]:.4g}' for e in errors)]
        for k, name in enumerate(names)
    ]
    _write_csv(f'{prefix}per_class.csv', [['class', 'images', *heads], *rows])
    rows = [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)]
    _write_csv(f'{prefix}confusion.csv', [['true \\ predicted', *names], *rows])
    save = functools.partial(figure(matrix, shown).savefig, format='png', dpi=DPI)
    figures.write(f'{prefix}confusion.png', save)


def most_confused(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """The five largest entries of i64[K,K] off the diagonal -> (images, true class, predicted class)."""
    off = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-off, axis=None, kind='stable')[:5]
    places = zip(*np.unravel_index(order, off.shape), strict=True)
    return [(int(off[i, j]), int(i), int(j)) for i, j in places if off[i, j]]


def figure(matrix: np.ndarray, names: Sequence[str]):
    """Draws a confusion matrix i64[K,K], in percent of each row, as a matplotlib figure.

    Up to 20 classes, cells have numbers; up to 60, rows and columns have names. Up to 2,000, a cell has
    a whole number of pixels, so that none is lost.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(matrix)
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = classes <= NAMED
    cell = 40 if classes <= NUMBERED else 18 if named else max(1, round(1000 / classes))
    side = min(classes * cell, 2000)  # in pixels, as all lengths here
    names = [*map(figures.short, names)] if named else ['0' * 5]
    blank, style = Figure(dpi=DPI), {'fontsize': 9, 'parse_math': False}
    margin = 50 + max(blank.text(0, 0, n, **style).get_window_extent().width for n in names)
    width, height = margin + max(side, 120) + 130, margin + max(side, 120) + 40
    made = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = made.add_axes((margin / width, margin / height, side / width, side / height))
    # Rare confusions are visible, too, even in a single pixel.
    colors, power = ('Blues', 0.5) if classes <= 200 else ('inferno_r', 0.3)
    drawn = axes.imshow(share, cmap=colors, norm=PowerNorm(power, vmin=0, vmax=100))
    axes.set(xlabel='predicted class', ylabel='true class')
    if named:
        axes.set_xticks(range(classes), names, rotation=90, **style)
        axes.set_yticks(range(classes), names, **style)
    if classes <= NUMBERED:
        for i, j in zip(*np.nonzero(share), strict=True):
            text = f'{share[i, j]:.0f}' if share[i, j] >= 0.5 else '<1'
            color = 'white' if share[i, j] > 35 else 'black'
            axes.text(j, i, text, ha='center', va='center', color=color, fontsize=9)
    bar = made.add_axes(((margin + side + 25) / width, margin / height, 18 / width, side / height))
    ticks = [0, 1, 5, 20, 50, 100] if side > 200 else [0, 20, 100]
    made.colorbar(drawn, cax=bar, ticks=ticks).set_label('% of the true class')
    return made


def _write_csv(name: str, rows: Sequence[Sequence]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerows(rows)
    figures.write(name, buffer.getvalue().encode())


if __name__ == '__main__':
    command.run(main)
