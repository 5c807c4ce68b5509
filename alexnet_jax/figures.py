"""What the commands that look at a network share: arguments, which pictures, and picture files.

`visualize`, `retrieve` and `predict` draw the paper's figures 3 and 4 from a run directory.
"""

import argparse
import io
import os
from collections import Counter

import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.input.images import Undecodable, square
from alexnet_jax.input.store import Store

DRAWN = 100  # pictures that are drawn below, or beside, each other at the most


def parser(name: str, description: str, *, output: str | None) -> argparse.ArgumentParser:
    """The arguments that all have; output: the default of --output, None for no picture."""
    made = command.make_parser(name, description)
    made.add_argument('run', metavar='RUN', help='a run directory')
    made.add_argument(
        '--step',
        default='latest',
        help="'best', 'latest' or a number",
        type=lambda text: int(text) if text.isdigit() else text,
    )
    made.add_argument(
        '--output',
        default=output,
        metavar='FILE.png',
        help=f'the picture to write (default: {output or "none"})',
    )
    command.add_devices(made)
    return made


def add_pictures(made: argparse.ArgumentParser) -> None:
    """The arguments of a command that is given pictures, or draws some of the validation split."""
    made.add_argument('images', nargs='*', metavar='IMAGE', help='files with pictures of any kind')
    made.add_argument('--seed', type=int, default=0, help='chooses the validation pictures')
    made.add_argument('--store', default='', help='the prepared pictures, if not where they were')


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the arguments, and sets JAX up; UserError for what is wrong with them."""
    args = made.parse_intermixed_args()  # options may stand between pictures
    if getattr(args, 'seed', 0) < 0:
        raise UserError(f'--seed={args.seed}: must not be below 0')
    if args.output is not None:
        check_output(args.output)
    command.start(args.cpu_devices)
    return args


def check_output(output: str) -> None:
    """UserError unless a PNG file can be written there."""
    path = paths.path(output)
    if path.suffix.lower() != '.png':
        raise UserError(f'--output={output}: pictures are written as PNG: end the name in .png')
    if paths.is_remote(path):
        return
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f'--output={output}: {path.parent} is not a folder that can be written to; '
            'make it, or give another'
        )
    if path.is_dir():
        raise UserError(f'--output={output}: this is a folder; give the name of a file')


def check_drawn(count: int) -> None:
    """UserError for more pictures than a figure has room for."""
    if count > DRAWN:
        raise UserError(f'{count:,} pictures are too many for one figure; give at most {DRAWN}')


def png(picture: np.ndarray) -> bytes:
    """A picture u8[H,W,3] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    return buffer.getvalue()


def write(output: str, content: bytes) -> None:
    """Writes the file whole or not at all, and says so."""
    paths.replace(paths.path(output), content)
    print(f'wrote {output}')


def read(path: str, size: int, *, exif: bool) -> np.ndarray:
    """A file with a picture of any kind -> the square the network is given, u8[size,size,3].

    exif: as the run's images were prepared. Raises UserError for what cannot be read or decoded.
    """
    try:
        content = paths.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}; give a picture') from error
    try:
        return square(content, size, exif=exif)
    except Undecodable as error:
        raise UserError(
            f'{path}: cannot be decoded ({error}); repair it, or leave it out'
        ) from error


def label_of(path: str, names: list[str]) -> int | None:
    """The label of a picture whose folder, or the one above it, is called like a class; else None.

    The one above: Tiny ImageNet has its training pictures in CLASS/images.
    """
    folders = [
        class_names.as_utf8(folder.name) for folder in paths.Path(path).absolute().parents[:2]
    ]
    return next((names.index(name) for name in folders if name in names), None)


def choose(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Different pictures at random, of as many classes as possible: i32[N] -> records i64[count]."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen, turns = Counter(), []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    return order[np.argsort(turns, kind='stable')[:count]]


def chosen(store: Store, flag: str, count: int, seed: int) -> np.ndarray:
    """`choose` from the validation split; UserError, with the flag's name, for a wrong count."""
    there = store.counts['val']
    if not 1 <= count <= there:
        raise UserError(
            f'{flag}={count}: the validation split of {store.path} has {there:,} '
            'pictures; give a number from 1 to that'
        )
    return choose(store.labels('val'), count, seed)


def squares(store: Store, split: str, records: np.ndarray) -> np.ndarray:
    """Some pictures of a split, i64[n] -> u8[n,S,S,3]."""
    count = store.counts[split]
    (batch,) = eval_batches(store, split, batch=count, rows=records, threads=1)
    return batch['image']
