"""Figure 4: five most probable labels of test images, and their nearest training images by fc7 (§6.1).

    python -m experiments.fig4_retrieval --scale=full                     # `original` on ImageNet
    python -m experiments.fig4_retrieval --scale=small -- --config.data.source=FOLDER
    python -m experiments.fig4_retrieval --run=runs/original              # stores nothing

The paper shows eight test images with their labels, and five with the six training images whose activations
in the last hidden layer are nearest in Euclidean distance. It says that these are "generally not close in L2"
by pixels and show the same things. We measure this: of the six nearest neighbors of every validation image,
how many have its class; the same for the six nearest in pixel space (whole images, downscaled to 32 x 32);
and the chance that two independently drawn images share a class. For up to 1,000 validation images, spread
over the split, the pixel distances of the six nearest are compared with those of random training images and
with the smallest possible; and we count how many training images are closer in pixel space. (At full scale
all of this takes about 5e14 multiplications on the host.)

The runs and scales are those of `fig3_filters`; whichever experiment runs first trains them.
"""

import io
from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

from alexnet_jax import figures, predict, retrieve
from alexnet_jax.common import class_names, paths
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.training import inference
from experiments import fig3_filters, statistics
from experiments import lab as labs

TITLE = 'Figure 4: labels and nearest training images (§6.1)'
RUNS_OF, TAKES_RUNS = 'fig3_filters', True
NOTES = fig3_filters.NOTES
LABELED, QUERIES, NEIGHBORS = 8, 5, 6  # as in the paper
BATCH = 100
COMPARED = 1000  # validation images whose pixel distances are compared
SIDE = 128  # maximum side of stored images, pixels


def run(lab):
    fig3_filters.train(lab, look)


def look(workdir) -> dict:
    """Returns predictions and neighbors to draw, and how many neighbors share the query's class."""
    classify = inference.load(workdir)
    store = inference.open_store([classify.run])
    return {'predictions': predictions(classify, store), **neighbors(classify.run, store)}


def predictions(classify, store) -> dict:
    """Predicts some validation images; stores only the classes that the figure shows."""
    records = figures.sample(store.labels('val'), min(LABELED, store.counts['val']), seed=0)
    labels, images = store.labels('val')[records], figures.squares(store, 'val', records)
    made = predict.predict(classify, [''] * len(records), labels.tolist(), images)
    kept = sorted({*labels.tolist()}.union(*(one.top().tolist() for one in made)))
    return {
        'names': [store.names[k] for k in kept],
        'labels': [kept.index(one.label) for one in made],
        'probabilities': [[float(f'{p:.4g}') for p in one.probabilities[kept]] for one in made],
        'pictures': [packed(one.picture) for one in made],
    }


def neighbors(trained, store) -> dict:
    """Finds the training images nearest to every validation image, and stores some of them to draw."""
    mesh = meshes.make((1, 1), towers=1, batches={})
    found, distances = nearest(store, retrieve.make_features(trained, mesh))
    train, val = store.labels('train'), store.labels('val')
    shares = [np.bincount(labels, minlength=store.classes) / len(labels) for labels in (train, val)]
    records = figures.sample(val, min(QUERIES, store.counts['val']), seed=1)
    by_pixels, smallest = nearest(store, pixels)
    return {
        'same': of_the_class(store, found),
        'same_by_pixels': of_the_class(store, by_pixels),
        'pixel_distances': pixel_distances(store, found, smallest),
        'chance': 100 * float(shares[0] @ shares[1]),
        'queries': [
            {
                'name': store.names[val[record]],
                'picture': packed(figures.squares(store, 'val', np.array([record]))[0]),
                'names': [store.names[k] for k in train[found[record]]],
                'pictures': [packed(one) for one in figures.squares(store, 'train', found[record])],
                'distances': [float(f'{d:.4g}') for d in distances[record]],
            }
            for record in records
        ],
    }


def nearest(store, features) -> tuple[np.ndarray, np.ndarray]:
    """Finds the training images nearest to every validation image; returns what `retrieve.nearest` does."""
    queries = np.concatenate([*of_split(store, features, 'val')])
    return retrieve.nearest(queries, of_split(store, features, 'train'), NEIGHBORS)


def of_split(store, features, split: str) -> Iterator[np.ndarray]:
    """Yields the features of all images of a split, a batch at a time."""
    rows = np.arange(BATCH)
    return map(features, eval_batches(store, split, batch=BATCH, rows=rows, threads=0))


def pixel_distances(store, found: np.ndarray, smallest: np.ndarray) -> dict[str, list[float]]:
    """Compares the pixel distances of retrieved training images with others, by rank.

    found i64[N,k]: the training images retrieved for every validation image; smallest f64[N,k]: the smallest
    pixel distances from it. Returns medians over validation images: 'retrieved' and 'smallest', divided by
    the mean distance to random training images, and 'closer', how many training images are closer, %.
    """
    count, total = len(found), store.counts['train']
    chosen = np.linspace(0, count - 1, min(count, COMPARED)).astype(int)
    queries = np.concatenate([*of_split(store, pixels, 'val')])[chosen].astype(np.float64)
    drawn = np.random.default_rng(0).integers(total, size=(len(chosen), NEIGHBORS))

    def distances(query, rows):
        images = figures.squares(store, 'train', rows)
        there = pixels({'image': images, 'mask': np.ones(len(rows))})
        return np.linalg.norm(query - there, axis=1)

    both = np.concatenate([found[chosen], drawn], axis=1)
    own, random = np.split(np.stack([*map(distances, queries, both)]), [found.shape[1]], axis=1)
    closer = np.zeros(own.shape)
    lengths = (queries**2).sum(1, keepdims=True)
    for batch in of_split(store, pixels, 'train'):
        batch = batch.astype(np.float64)
        squared = lengths - 2 * queries @ batch.T + (batch**2).sum(1)
        limits = own**2 * (1 - 1e-5) - 1  # an image is not closer than itself, despite rounding
        closer += [*map(np.searchsorted, np.sort(squared), limits)]
    typical = random.mean(1, keepdims=True)
    values = {
        'retrieved': own / typical,
        'smallest': smallest[chosen] / typical,
        'closer': 100 * closer / total,
    }
    return {name: np.median(value, axis=0).tolist() for name, value in values.items()}


def pixels(batch) -> np.ndarray:
    """Returns the pixels of a batch's images, downscaled to 32 x 32, f32[b,3072]."""
    images = batch['image'][batch['mask'] > 0].astype(np.float32)
    return np.asarray(jax.image.resize(images, (len(images), 32, 32, 3), 'linear')).reshape(
        len(images), -1
    )


def of_the_class(store, found: np.ndarray) -> list[float]:
    """Returns how many neighbors have the class of their validation image, %, by rank."""
    same = store.labels('train')[found] == store.labels('val')[:, None]
    return [float(share) for share in 100 * same.mean(0)]


def packed(picture: np.ndarray) -> str:
    """Encodes a square image as text, downscaled if it is large."""
    side = min(SIDE, picture.shape[0])
    return fig3_filters.packed(np.asarray(Image.fromarray(picture).resize((side, side))), 'JPEG')


def report(results) -> str:
    lines = [
        "| run | top-1 error, center crop, % | six nearest with the query's class, % | nearest, % "
        '| six nearest by pixels, % | by chance, % | pixel distance, six nearest (smallest) '
        '| closer by pixels, % |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for result in results.values():
        extra, name = result['extra'], fig3_filters.called(result)
        if not extra:
            lines.append(f'| {name} | diverged | | | | | | |')
            continue
        error = f'{result["eval"][-1]["top1_error"]:.1f}' if result['eval'] else ''
        lines.append(
            f'| {name} | {error} | {np.mean(extra["same"]):.1f} | {extra["same"][0]:.1f} '
            f'| {np.mean(extra["same_by_pixels"]):.1f} | {extra["chance"]:.2f} '
            f'| {distances(extra)} |'
        )
    sound = [r for r in results.values() if r['extra']]
    if sound:
        shares = statistics.mean_std([np.mean(r['extra']['same']) for r in sound])
        lines += [
            '',
            f'Of the six nearest training images, {shares}% have the class of their query '
            f'(runs: {len(sound)}; every validation image is a query). By pixels: whole '
            'images, downscaled to 32 x 32. Errors use one crop, the predictions in the figure ten; the bar '
            'of the true class is hatched.',
        ]
    if any('pixel_distances' in r['extra'] for r in sound):
        lines += [
            '',
            'Pixel distance: relative to that of random training images; in parentheses, the smallest '
            'possible. Closer by pixels: training images closer to the query than the retrieved one (by '
            'chance: 50%). Means over the six ranks of medians over validation images.',
        ]
    first = drawn(results)
    if first:
        ranks = [rank(made) for made in remade(first)]
        lines += [
            '',
            f'Figure ({fig3_filters.called(first)}): of the {len(ranks)} images at the top, '
            f'{sum(r < 1 for r in ranks)} have their class ranked first and {sum(r < 5 for r in ranks)} '
            'in the top five. Each row below shows a validation image and, to its right, the nearest '
            'training images, with their classes.',
            '',
        ]
        for query in first['extra']['queries']:
            name, *names = class_names.shown([query['name'], *query['names']])
            pairs = zip(names, query['distances'], strict=True)
            lines.append(f'- {name}: ' + ', '.join(f'{n} ({d:.4g})' for n, d in pairs))
    return '\n'.join(lines)


def distances(extra) -> str:
    """Returns the cells about pixel distances; older results have none."""
    if 'pixel_distances' not in extra:
        return '– | –'
    means = {name: np.mean(values) for name, values in extra['pixel_distances'].items()}
    return f'{means["retrieved"]:.2f} ({means["smallest"]:.2f}) | {means["closer"]:.0f}'


def drawn(results) -> dict | None:
    """Returns the result shown in the figure, the first one; None if all diverged."""
    return next((result for result in results.values() if result['extra']), None)


def remade(result) -> list[predict.Prediction]:
    """Returns the predictions of a result, over the stored classes."""
    kept = result['extra']['predictions']
    return [
        predict.Prediction('', label, fig3_filters.unpacked(picture), np.array(probabilities))
        for label, picture, probabilities in zip(
            kept['labels'], kept['pictures'], kept['probabilities'], strict=True
        )
    ]


def rank(made: predict.Prediction) -> int:
    """Returns how many classes rank before the correct one; 5 if it is not in the top five."""
    return [*made.top(), made.label].index(made.label)


def plot(results, file):
    first = drawn(results)
    if not first:
        return
    buffer = io.BytesIO()
    names = first['extra']['predictions']['names']
    predict.figure(remade(first), names).savefig(buffer, format='png', dpi=100)
    above = np.asarray(Image.open(buffer).convert('RGB'))
    queries = first['extra']['queries']
    below = retrieve.draw(
        np.stack([fig3_filters.unpacked(query['picture']) for query in queries]),
        np.stack([[fig3_filters.unpacked(one) for one in query['pictures']] for query in queries]),
        [class_names.shown([query['name'], *query['names']]) for query in queries],
    )
    width = max(above.shape[1], below.shape[1])
    both = [
        np.pad(part, ((0, 20), (0, width - part.shape[1]), (0, 0)), constant_values=255)
        for part in (above, below)
    ]
    paths.replace(file, figures.png(np.concatenate(both)))


if __name__ == '__main__':
    labs.main(__name__)
