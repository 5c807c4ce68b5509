"""Classifies pictures with a trained network and draws the result as in the paper's Figure 4, left.

    python -m alexnet_jax.predict RUN a.jpg b.png
    python -m alexnet_jax.predict RUN --val=8 --output=predictions.png

Prints the five most probable classes of each picture. A picture is labeled if its folder, or the
folder above, is named after a class.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common import class_names
from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.training import inference, steps

COLUMNS, BATCH = 4, 20  # columns of a figure, as in the paper; pictures per batch
# Safe for colour-blind readers; in grey, lightness and hatching tell them apart.
OTHER, CORRECT = '#a6cee3', '#e08214'


class Prediction(NamedTuple):
    """A network's prediction for one picture."""

    title: str
    label: int | None  # the correct class; None: unknown
    picture: np.ndarray  # u8[S,S,3], the square that was classified
    probabilities: np.ndarray  # f32[K]

    def top(self) -> np.ndarray:
        """The labels of the five most probable classes, most probable first."""
        return np.argsort(-self.probabilities, kind='stable')[:5]


def predict(
    classify: inference.Classifier,
    titles: Sequence[str],
    labels: Sequence[int | None],
    pictures: Sequence[np.ndarray],
) -> list[Prediction]:
    """Classifies square pictures u8[S,S,3]."""
    probabilities = [
        row
        for start in range(0, len(pictures), BATCH)
        for row in classify(pictures[start : start + BATCH])
    ]
    return [Prediction(*row) for row in zip(titles, labels, pictures, probabilities, strict=True)]


def describe(prediction: Prediction, names: Sequence[str]) -> str:
    """The five most probable classes, one per line."""
    label, names = prediction.label, class_names.shown(names)
    lines = [printable(prediction.title) + ('' if label is None else f' (correct: {names[label]})')]
    for i in prediction.top():
        mark = '  <' if i == label else ''
        lines.append(f'  {100 * prediction.probabilities[i]:5.1f} %  {names[i]}{mark}')
    return '\n'.join(lines)


def figure(predictions: Sequence[Prediction], names: Sequence[str]):
    """Draws each picture with its name and five bars as a matplotlib figure.

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
            _short(printable(caption)), fontsize=11, fontweight='bold', parse_math=False
        )
        heights = range(len(top))
        bars = below.barh(heights, prediction.probabilities[top], color=OTHER)
        for bar, y, k in zip(bars, heights, top, strict=True):
            if k == label:
                bar.set(facecolor=CORRECT, edgecolor='black', hatch='//')
            text = {'va': 'center', 'fontsize': 9, 'path_effects': outline, 'parse_math': False}
            below.text(0.02, y, _short(names[k]), **text)
            below.text(1.2, y, f'{100 * prediction.probabilities[k]:.0f} %', ha='right', **text)
        below.set(xlim=(0, 1.2), ylim=(4.6, -0.6))
    return made


def _short(text: str) -> str:
    return text if len(text) <= 26 else f'{text[:25]}…'


def main() -> None:
    parser = figures.parser('predict', __doc__, output=None)
    figures.add_pictures(parser)
    parser.add_argument('--val', type=int, help='classify N validation pictures instead')
    parser.add_argument('--views', default='ten', choices=tuple(steps.VIEWS), help='crops (§4.1)')
    args = figures.start(parser)
    if bool(args.images) == (args.val is not None):
        raise UserError('give either picture files or --val=N for validation pictures')
    classify = inference.load(args.run, args.views, args.step)
    if args.images:
        titles, names, facts = args.images, classify.names, classify.run.facts
        labels = [figures.label_of(path, names) for path in titles]
        pictures = [figures.read(path, classify.size, exif=facts.exif) for path in titles]
    else:
        store = inference.open_store([classify.run], args.store)
        records = figures.chosen(store, '--val', args.val, args.seed)
        titles = [f'validation picture {record}' for record in records]
        labels = store.labels('val')[records].tolist()
        pictures = figures.squares(store, 'val', records)
    if args.output:
        figures.check_drawn(len(pictures))
    predictions = predict(classify, titles, labels, pictures)
    for prediction in predictions:
        print(describe(prediction, classify.names))
    if args.output:
        buffer = io.BytesIO()
        figure(predictions, classify.names).savefig(buffer, format='png', dpi=120)
        figures.write(args.output, buffer.getvalue())


if __name__ == '__main__':
    command.run(main)
