"""Finds the training images nearest to query images, as in the paper's Figure 4, right.

    python -m alexnet_jax.retrieve RUN                     # queries: five validation images
    python -m alexnet_jax.retrieve RUN a.jpg b.png         # queries: these files
    python -m alexnet_jax.retrieve RUN --score             # also score the whole validation split

Distances are Euclidean, between the activations of the last hidden layer (§6.1) or, if a network has
none, of its last feature map. Queries are in the first column of the figure. Below each image is its
class or, if unknown, the file name.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from alexnet_jax import command, figures
from alexnet_jax.common import class_names
from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import images as pictures
from alexnet_jax.input.batches import Batch, eval_batches
from alexnet_jax.input.store import Store
from alexnet_jax.training import inference


def make_features(trained: inference.Run, mesh: Mesh) -> Callable[[Batch], np.ndarray]:
    """`inference.make_features` of the last layer before the logits; maps are flattened: f32[b,F]."""
    features = inference.make_features(trained, mesh)

    def flat(batch):
        values = features(batch)
        return values.reshape(len(values), -1)

    return flat


def nearest(
    queries: np.ndarray, batches: Iterable[np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows nearest to each query -> (row indices i64[N,count], distances f64[N,count]).

    queries: f32[N,F]; batches: all rows, f32[b,F] at a time; only the nearest stay in memory.
    The nearest row comes first; among equal distances, the earlier row.
    """
    queries = queries.astype(np.float64)
    lengths = (queries**2).sum(1, keepdims=True)
    distances = np.full((len(queries), count), np.inf)
    rows = np.full((len(queries), count), -1)
    start = 0
    for batch in batches:
        batch = batch.astype(np.float64)
        new = lengths - 2 * queries @ batch.T + (batch**2).sum(1)[None]
        better = new.min(1) < distances[:, -1]  # the queries that this batch changes
        numbers = np.broadcast_to(np.arange(start, start + len(batch)), new[better].shape)
        both = np.concatenate([distances[better], new[better]], axis=1)
        order = np.argsort(both, axis=1, kind='stable')[:, :count]
        distances[better] = np.take_along_axis(both, order, 1)
        both = np.concatenate([rows[better], numbers], axis=1)
        rows[better] = np.take_along_axis(both, order, 1)
        start += len(batch)
    return rows, np.sqrt(distances.clip(0))  # rounding can make equal rows negative


def draw(queries: np.ndarray, neighbors: np.ndarray, names: Sequence[Sequence[str]]) -> np.ndarray:
    """Draws queries u8[N,S,S,3], each with its neighbors u8[N,k,S,S,3] to the right -> u8[H,W,3].

    names: of each query and its neighbors, 1 + k; each is written below its image and cut to its
    width. Small images are enlarged. White lines separate them, with a wider gap after the queries.
    """
    import matplotlib  # its font covers most alphabets

    n, k, size = neighbors.shape[:3]
    scale = -(-128 // size)
    side, line, gap = scale * size, 4, 16
    text = side // 6  # the height of a name
    file = f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf'
    font = ImageFont.truetype(file, round(0.55 * text))
    width = (k + 1) * (side + line) + gap + line
    picture = Image.new('RGB', (width, n * (side + text + line) + line), 'white')
    pen = ImageDraw.Draw(picture)
    for i in range(n):
        y = line + i * (side + text + line)
        for j, image in enumerate([queries[i], *neighbors[i]]):
            x = line + j * (side + line) + gap * (j > 0)
            picture.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (x, y))
            name = _cut(names[i][j], side, font)
            pen.text((x + side / 2, y + side + text / 2), name, 'black', font, anchor='mm')
    return np.asarray(picture)


def _cut(name: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A name on one line, cut to `width` pixels."""
    name = ' '.join(name.split())
    while font.getlength(name) > width:
        name = f'{name[:-2]}…'
    return name


def shared(labels: Sequence[int | None], neighbors: np.ndarray) -> str:
    """Describes how many neighbors (labels i32[N,k]) share the class of their query."""
    known = [i for i, label in enumerate(labels) if label is not None]
    same = sum(int((neighbors[i] == labels[i]).sum()) for i in known)
    total = len(known) * neighbors.shape[1]
    if not total:
        return 'no query has a known class'
    return (
        f'{same:,} of {total:,} neighbors share the class of their query: {100 * same / total:.1f}%'
    )


def _queries(args, store: Store, exif: bool) -> tuple[list[str], list[int | None], np.ndarray]:
    """The titles, labels (None: unknown) and images u8[N,S,S,3] of the queries."""
    if args.files:
        figures.check_drawn(len(args.files))
        labels = [figures.label_of(path, store.names) for path in args.files]
        squares = [pictures.read(path, store.size, exif=exif) for path in args.files]
        return args.files, labels, np.stack(squares)
    count = 5 if args.queries is None else args.queries
    records = figures.chosen(store, 'val', '--queries', count, args.seed)
    figures.check_drawn(len(records))
    titles = [f'validation image {record}' for record in records]
    return titles, store.labels('val')[records].tolist(), figures.squares(store, 'val', records)


def main() -> None:
    parser = figures.parser('retrieve', __doc__, output='PNG file (default: neighbors.png in RUN)')
    figures.add_pictures(parser)
    parser.add_argument('--queries', type=int, help='validation images as queries (default: 5)')
    parser.add_argument('--neighbors', type=int, default=6, help='training images per query')
    parser.add_argument('--score', action='store_true', help='also query the whole split')
    parser.add_argument('--batch', type=int, default=100, help='images per step')
    parser.add_argument('--threads', type=int, default=0, help='reader threads; 0: one per core')
    args = figures.start(parser)
    output, args.files = figures.output(args, 'neighbors.png'), figures.files(args)
    if args.files and args.queries is not None:
        raise UserError('--queries picks validation images: give --queries or files, not both')
    trained = inference.describe_run(args.run)
    mesh = meshes.make((0, 0), towers=trained.net.towers, batches={'--batch': args.batch})
    store = inference.open_store([trained], args.store)
    trained = inference.restore_run(trained, mesh, args.step)
    k, there = args.neighbors, store.counts['train']
    if not 1 <= k <= there:
        raise UserError(
            f'--neighbors={k}: the training split of {store.path} has {there:,} '
            f'images; give a number from 1 to {there}'
        )
    figures.check_drawn(k)
    titles, labels, images = _queries(args, store, trained.facts.exif)
    features = make_features(trained, mesh)

    def of_split(split):
        rows = np.arange(args.batch)
        batches = eval_batches(store, split, batch=args.batch, rows=rows, threads=args.threads)
        return map(features, batches)

    asked = [*map(features, inference.padded(images, args.batch))]
    if args.score:
        asked += of_split('val')
    found, distances = nearest(np.concatenate(asked), of_split('train'), k)
    classes = store.labels('train')[found]
    n, names = len(images), class_names.shown(store.names)
    for i, title in enumerate(titles):
        known = '' if labels[i] is None else f' ({names[labels[i]]})'
        pairs = zip(classes[i], distances[i], strict=True)
        print(f'{printable(title)}{known}: ' + ', '.join(f'{names[c]} {d:.4g}' for c, d in pairs))
    print(shared(labels, classes[:n]))
    if args.score:
        print(f'the whole validation split: {shared(store.labels("val").tolist(), classes[n:])}')
    neighbors = figures.squares(store, 'train', found[:n].ravel()).reshape(n, k, *images.shape[1:])
    captions = [
        [
            printable(title.rpartition('/')[2]) if label is None else names[label],
            *(names[c] for c in row),
        ]
        for title, label, row in zip(titles, labels, classes[:n], strict=True)
    ]
    figures.write(output, figures.png(draw(images, neighbors, captions)))


if __name__ == '__main__':
    command.run(main)
