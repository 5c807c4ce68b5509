"""Classifies images with a trained network and draws the result as in the paper's Figure 4, left.

    python -m alexnet_jax.predict RUN a.jpg b.png
    python -m alexnet_jax.predict RUN photos/ --top=1
    python -m alexnet_jax.predict RUN --list=paths.txt --csv=predictions.csv
    python -m alexnet_jax.predict RUN --val=8 --output=predictions.png

Prints the most probable classes of each image, or writes them to a table. An image is labeled if
its folder, or the folder above, is named after a class. Images that cannot be read are reported and
left out, and the exit code is then 2.
"""

import contextlib
import csv
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common import class_names
from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.input import images
from alexnet_jax.training import inference, steps

COLUMNS, BATCH = 4, 20  # columns of a figure, as in the paper; images per batch
TOP = 5  # most probable classes, as in the paper
SPLITS = ('val', 'test')  # splits to draw images from
# Safe for color-blind readers; in gray, lightness and hatching tell them apart.
OTHER, CORRECT = '#a6cee3', '#e08214'


class Prediction(NamedTuple):
    """A network's prediction for one image."""

    title: str
    label: int | None  # the correct class; None: unknown
    picture: np.ndarray  # u8[S,S,3], the square that was classified
    probabilities: np.ndarray  # f32[K]

    def top(self, count: int = TOP) -> np.ndarray:
        """The labels of the most probable classes, most probable first."""
        return np.argsort(-self.probabilities, kind='stable')[:count]


def predict(
    classify: inference.Classifier,
    titles: Sequence[str],
    labels: Sequence[int | None],
    pictures: Sequence[np.ndarray],
) -> list[Prediction]:
    """Classifies square images u8[S,S,3]."""
    probabilities = classify(list(pictures))
    return [Prediction(*row) for row in zip(titles, labels, pictures, probabilities, strict=True)]


def stream(
    classify: inference.Classifier,
    titles: Sequence[str],
    labels: Sequence[int | None],
    pictures: figures.Pictures,
) -> Iterator[Prediction]:
    """Classifies images a batch at a time; titles and labels: one for every image."""
    for numbers, squares in pictures.batches(BATCH):
        # All batches have the same size: a different one would need another compilation.
        (batch,) = inference.padded(squares, min(BATCH, len(titles)))
        for i, square, row in zip(numbers, squares, classify(batch['image']), strict=False):
            yield Prediction(titles[i], labels[i], square, row)


def describe(prediction: Prediction, names: Sequence[str], count: int = TOP) -> str:
    """The most probable classes, one per line; a single one follows the title."""
    label, names = prediction.label, class_names.shown(names)
    title = printable(prediction.title) + ('' if label is None else f' (correct: {names[label]})')
    lines = []
    for i in prediction.top(count):
        mark = '  <' if i == label else ''
        lines.append(f'  {100 * prediction.probabilities[i]:5.1f}%  {names[i]}{mark}')
    return f'{title}:{lines[0]}' if count == 1 else '\n'.join([title, *lines])


def figure(predictions: Sequence[Prediction], names: Sequence[str]):
    """Draws each image with its name and five bars as a matplotlib figure.

    The name is the correct class or, if unknown, the file name. The bar of the correct class is dark
    and hatched.
    """
    from matplotlib import patheffects
    from matplotlib.figure import Figure

    names = class_names.shown(names)
    outline = [patheffects.withStroke(linewidth=2.5, foreground='white')]
    columns = min(COLUMNS, len(predictions))
    rows = -(-len(predictions) // columns)
    made = Figure(figsize=(2.6 * columns, 4.2 * rows), layout='constrained')
    axes = made.subplots(2 * rows, columns, squeeze=False, height_ratios=[5, 3] * rows)
    for one in axes.flat:
        one.set_axis_off()
    for i, prediction in enumerate(predictions):
        above, below = axes[2 * (i // columns) :, i % columns][:2]
        label, top = prediction.label, prediction.top()
        above.imshow(prediction.picture, interpolation='nearest')
        caption = names[label] if label is not None else prediction.title.rpartition('/')[2]
        below.set_title(
            figures.short(printable(caption)), fontsize=11, fontweight='bold', parse_math=False
        )
        heights = range(len(top))
        bars = below.barh(heights, prediction.probabilities[top], color=OTHER)
        for bar, y, k in zip(bars, heights, top, strict=True):
            if k == label:
                bar.set(facecolor=CORRECT, edgecolor='black', hatch='//')
            text = {'va': 'center', 'fontsize': 9, 'path_effects': outline, 'parse_math': False}
            below.text(0.02, y, figures.short(names[k]), **text)
            below.text(1.2, y, f'{100 * prediction.probabilities[k]:.0f}%', ha='right', **text)
        below.set(xlim=(0, 1.2), ylim=(4.6, -0.6))
    return made


class Table:
    """A table of predictions: lines for a file, or printed immediately for '-'."""

    def __init__(self, name: str, head: str, between: str = '', end: str = ''):
        self._name, self._next, self._between, self._end = name, head, between, end
        self._lines, self._stdout = [], sys.stdout

    def add(self, row: str) -> None:
        self._emit(f'{self._next}{row}')
        self._next = self._between

    def close(self) -> None:
        """Ends the table, and writes its file."""
        self._emit(self._end)
        if self._name != '-':
            figures.write(self._name, ''.join(self._lines).encode('utf-8', 'surrogateescape'))

    def _emit(self, text: str) -> None:
        if self._name == '-':
            print(text, end='', flush=True, file=self._stdout)
        else:
            self._lines.append(text)


def csv_line(cells: Sequence) -> str:
    """One line of a CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator='\n').writerow(cells)
    return buffer.getvalue()


def cells(prediction: Prediction, names: Sequence[str], count: int) -> list:
    """The path, the correct class ('': unknown), and the top classes with their probabilities."""
    correct = '' if prediction.label is None else names[prediction.label]
    best = [(names[k], f'{prediction.probabilities[k]:.6g}') for k in prediction.top(count)]
    return [prediction.title, correct, *(cell for pair in best for cell in pair)]


def as_json(prediction: Prediction, names: Sequence[str], count: int) -> str:
    """The content of `cells`, as a JSON object."""
    title, correct, *best = cells(prediction, names, count)
    top = [{'class': c, 'probability': float(p)} for c, p in zip(*[iter(best)] * 2, strict=True)]
    return json.dumps({'path': title, 'correct': correct or None, 'top': top})


def main() -> None:
    parser = figures.parser(
        'predict', __doc__, output='PNG file to draw them in (default: none), at most 100'
    )
    figures.add_pictures(parser)
    for split in SPLITS:
        text = f'classify N {figures.SPLITS[split]} images instead'
        parser.add_argument(f'--{split}', type=int, metavar='N', help=text)
    for name in ('csv', 'json'):
        text = f'write a table as {name.upper()} instead of printing; -: to standard output'
        parser.add_argument(f'--{name}', metavar='FILE', help=text)
    parser.add_argument(
        '--top',
        type=int,
        default=TOP,
        metavar='N',
        help='classes per image in the output and in tables; 1: one line per image',
    )
    parser.add_argument('--views', default='ten', choices=tuple(steps.VIEWS), help='crops (§4.1)')
    args = figures.start(parser)
    asked = [split for split in SPLITS if getattr(args, split) is not None]
    if bool(args.images or args.list) + len(asked) != 1:
        raise UserError(
            'give either image files or --val=N for validation images (--test=N for test images)'
        )
    if args.csv == args.json == '-':
        raise UserError('--csv=- and --json=- cannot share standard output: give one a file')
    if args.csv and args.csv == args.json:
        raise UserError(f'--csv={args.csv} and --json={args.json}: give each its own file')
    for name in ('csv', 'json'):
        if getattr(args, name) not in (None, '-'):
            figures.check_file(f'--{name}', getattr(args, name))
    if args.top < 1:
        raise UserError(f'--top={args.top}: must be at least 1')
    output = None if args.output is None else figures.output(args, 'predictions.png')
    titles = [] if asked else figures.files(args)
    classify = inference.load(args.run, args.views, args.step)
    names = classify.names
    if asked:
        titles, labels, read = _of_store(args, classify, *asked)
    else:
        exif = classify.run.facts.exif
        labels = [figures.label_of(path, names) for path in titles]

        def read(i):
            return images.read(titles[i], classify.size, exif=exif)

    if output:
        figures.check_drawn(len(titles))
    tables: list[tuple[Table, Callable]] = []
    if args.csv:
        best = [
            f'{word}{i + 1}'
            for i in range(min(args.top, len(names)))
            for word in ('class', 'probability')
        ]
        tables.append(
            (
                Table(args.csv, csv_line(['path', 'correct', *best])),
                lambda *one: csv_line(cells(*one)),
            )
        )
    if args.json:
        tables.append((Table(args.json, '[\n', ',\n', '\n]\n'), as_json))
    pictures, drawn = figures.Pictures(len(titles), read), []
    for prediction in stream(classify, titles, labels, pictures):
        for table, row in tables:
            table.add(row(prediction, names, args.top))
        if not tables:
            print(describe(prediction, names, args.top))
        if output:
            drawn.append(prediction)
    # If a table goes to standard output, nothing else does.
    with contextlib.redirect_stdout(sys.stderr if '-' in (args.csv, args.json) else sys.stdout):
        if not pictures.all_failed():
            for table, _ in tables:
                table.close()
        if drawn:
            save = functools.partial(figure(drawn, names).savefig, format='png', dpi=120)
            figures.write(output, save)
    pictures.check()


def _of_store(args, classify: inference.Classifier, split: str) -> tuple[list, list, Callable]:
    """The titles, labels and reader of some images of a split."""
    store = inference.open_store([classify.run], args.store)
    records = figures.chosen(store, split, f'--{split}', getattr(args, split), args.seed)
    pictures = store.pictures(split)

    def read(i):
        picture = pictures[records[i]]
        if store.format == 'u8':
            store.check(split, records[i], picture)
        return picture

    titles = [f'{figures.SPLITS[split]} image {record}' for record in records]
    return titles, store.labels(split)[records].tolist(), read


if __name__ == '__main__':
    command.run(main)
