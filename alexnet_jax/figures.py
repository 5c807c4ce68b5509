"""Shared by the commands that draw figures: arguments, choice of pictures, and picture files.

`visualize`, `retrieve` and `predict` draw Figures 3 and 4 of the paper from a run directory.
"""

import argparse
import io
import os
from collections import Counter

import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import UserError, printable, reason
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.input.images import Undecodable, square
from alexnet_jax.input.store import Store

DRAWN = 100  # most pictures in a row or column of a figure


def parser(name: str, description: str, *, output: str | None) -> argparse.ArgumentParser:
    """Makes a parser with the common arguments; output: the default of --output, None for no picture."""
    made = command.make_parser(name, description)
    made.add_argument('run', metavar='RUN', help='run directory')
    made.add_argument(
        '--step',
        default='latest',
        help="checkpoint: 'best', 'latest' or a step",
        type=lambda text: int(text) if text.isdigit() else text,
    )
    made.add_argument(
        '--output',
        default=output,
        metavar='FILE.png',
        help=f'PNG file to write (default: {output or "none"})',
    )
    command.add_devices(made)
    return made


def add_pictures(made: argparse.ArgumentParser) -> None:
    """Adds the arguments for pictures: files, or some of the validation split."""
    made.add_argument('images', nargs='*', metavar='IMAGE', help='image files')
    made.add_argument('--seed', type=int, default=0, help='seed for choosing validation pictures')
    made.add_argument('--store', default='', help='path of the store, if it has moved')


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the arguments and configures JAX; UserError for invalid arguments."""
    args = made.parse_intermixed_args()  # options can appear between pictures
    if getattr(args, 'seed', 0) < 0:
        raise UserError(f'--seed={args.seed}: must be at least 0')
    if args.output is not None:
        check_output(args.output)
    command.start(args.cpu_devices)
    return args


def check_output(output: str) -> None:
    """Raises UserError unless a PNG file can be written to `output`."""
    path = paths.path(output)
    if path.suffix.lower() != '.png':
        raise UserError(f'--output={output}: pictures are written as PNG; end the name in .png')
    if paths.is_remote(path):
        return
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f'--output={output}: {path.parent} is not a writable folder; create it or give another'
        )
    if path.is_dir():
        raise UserError(f'--output={output}: this is a folder; give a file name')


def check_drawn(count: int) -> None:
    """Raises UserError for more pictures than fit in a figure."""
    if count > DRAWN:
        raise UserError(f'{count:,} pictures are too many for one figure; give at most {DRAWN}')


def png(picture: np.ndarray) -> bytes:
    """Encodes a picture u8[H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    return buffer.getvalue()


def write(output: str, content: bytes) -> None:
    """Writes a file atomically and prints its name."""
    paths.replace(paths.path(output), content)
    print(printable(f'wrote {output}'))


def read(path: str, size: int, *, exif: bool) -> np.ndarray:
    """Reads a picture file of any format -> the square that the network gets, u8[size,size,3].

    exif: see `images.decode`. Raises UserError if the file cannot be read or decoded.
    """
    try:
        content = paths.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}; give a picture file') from error
    try:
        return square(content, size, exif=exif)
    except Undecodable as error:
        raise UserError(
            f'{path}: cannot be decoded ({error}); repair it or leave it out'
        ) from error


def label_of(path: str, names: list[str]) -> int | None:
    """The label of a picture if its folder, or the folder above, is named after a class; else None.

    The folder above counts because Tiny ImageNet has its training pictures in CLASS/images.
    """
    folders = [
        class_names.as_utf8(folder.name) for folder in paths.Path(path).absolute().parents[:2]
    ]
    return next((names.index(name) for name in folders if name in names), None)


def choose(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws distinct pictures from as many classes as possible: i32[N] -> records i64[count]."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen, turns = Counter(), []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    return order[np.argsort(turns, kind='stable')[:count]]


def chosen(store: Store, flag: str, count: int, seed: int) -> np.ndarray:
    """`choose` from the validation split; UserError that names the flag for an invalid count."""
    there = store.counts['val']
    if not 1 <= count <= there:
        raise UserError(
            f'{flag}={count}: the validation split of {store.path} has {there:,} '
            f'pictures; give a number from 1 to {there}'
        )
    return choose(store.labels('val'), count, seed)


def squares(store: Store, split: str, records: np.ndarray) -> np.ndarray:
    """Reads some pictures of a split: records i64[n] -> u8[n,S,S,3]."""
    count = store.counts[split]
    (batch,) = eval_batches(store, split, batch=count, rows=records, threads=1)
    return batch['image']
