"""Shared by the commands that use a run: arguments, choice and reading of images, and files to write.

`visualize`, `retrieve` and `predict` draw Figures 3 and 4 of the paper.
"""

import argparse
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from alexnet_jax import command
from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import UserError, printable, reason
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input import threads
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.input.sources.source import image_files
from alexnet_jax.input.store import Store
from alexnet_jax.input.threads import ordered_map
from alexnet_jax.rundir import directory
from alexnet_jax.weights import hub

DRAWN = 100  # most images in a row or column of a figure
KINDS = {'.png': 'images are written as PNG', '.npz': 'features are written as NPZ'}
SPLITS = {'val': 'validation', 'train': 'training', 'test': 'test'}  # what to call them


def parser(name: str, description: str, *, output: str) -> argparse.ArgumentParser:
    """Makes a parser with the common arguments; output: what --output is and its default."""
    made = command.make_parser(name, description)
    made.add_argument('run', metavar='RUN', help='run directory')
    made.add_argument('--step', **command.STEP)
    made.add_argument('--output', metavar='FILE', help=output)
    command.add_devices(made)
    return made


def add_pictures(made: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """Adds the arguments for images: files, or some of a split of the store."""
    made.add_argument('images', nargs='*', metavar='IMAGE', help='image files, or folders of them')
    made.add_argument('--list', metavar='FILE', help='a text file with a path per line; -: stdin')
    made.add_argument('--store', default='', help='path of the store, if it has moved')
    if seed:
        made.add_argument('--seed', type=int, default=0, help='seed for choosing from a split')


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the arguments and configures JAX; UserError for invalid arguments."""
    args = made.parse_intermixed_args()  # options can appear between images
    if getattr(args, 'seed', 0) < 0:
        raise UserError(f'--seed={args.seed}: must be at least 0')
    threads.check('--threads', getattr(args, 'threads', 0))
    command.start(args.cpu_devices)
    return args


def output(args: argparse.Namespace, default: str) -> str:
    """Returns the file to write: --output, or else `default` in the run directory.

    Raises UserError if there is no such run, the suffix is not that of `default`, or no file can be
    written there.
    """
    kind = os.path.splitext(default)[1]
    if args.output is None:
        check_folder(args.run, None)
        args.output = os.path.join(args.run, default)
    elif paths.path(args.output).suffix.lower() != kind:
        raise UserError(f'--output={args.output}: {KINDS[kind]}; end the name in {kind}')
    check_file('--output', args.output)
    return args.output


def check_folder(run: str, output: str | None) -> None:
    """Raises UserError if the results of a run would go to its folder, and it has none."""
    if not hub.is_folder(run):
        if output is None:
            raise UserError(f'{run}: has no folder for results; give --output')
    else:
        directory.read_config(run)


def check_file(flag: str, name: str) -> None:
    """Raises UserError, naming the flag, unless a file of this name can be written."""
    path = paths.path(name)
    if paths.is_remote(path):
        return
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(
            f'{flag}={name}: {path.parent} is not a writable folder; create it or give another'
        )
    if path.is_dir():
        raise UserError(f'{flag}={name}: this is a folder; give a file name')


def check_drawn(count: int) -> None:
    """Raises UserError for more images than fit in a figure."""
    if count > DRAWN:
        raise UserError(f'{count:,} images are too many for one figure; give at most {DRAWN}')


def png(picture: np.ndarray) -> bytes:
    """Encodes an image u8[H,W,3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    return buffer.getvalue()


def short(text: str) -> str:
    """Shortens a class name for a figure."""
    return text if len(text) <= 26 else f'{text[:25]}…'


def write(name: str, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file atomically and prints its name; content: see `paths.replace`."""
    path = paths.path(name)
    try:
        paths.replace(path, content)
    except paths.failures(path) as error:
        raise UserError(
            f'{paths.full(error)}{name}: cannot be written ({reason(error)}); give another file'
        ) from error
    print(printable(f'wrote {name}'))


def files(args: argparse.Namespace) -> list[str]:
    """Returns the paths of the images: the arguments, then --list; a folder means those below it.

    Raises UserError for a list that cannot be read, and for folders without images.
    """
    found = []
    for name in [*args.images, *(_lines(args.list) if args.list else [])]:
        if not os.path.isdir(name):
            found.append(name)
            continue
        folder = os.path.abspath(name)
        inside = image_files(folder, Counter())
        if not inside:
            raise UserError(f'{name}: no images in this folder; give another, or files')
        found += [os.path.join(name, os.path.relpath(file, folder)) for file in inside]
    return found


def _lines(name: str) -> list[str]:
    """Returns the lines of a text file, '-' for standard input, that are not empty."""
    try:
        data = sys.stdin.buffer.read() if name == '-' else paths.path(name).read_bytes()
    except OSError as error:
        raise UserError(f'--list={name}: cannot be read: {reason(error)}') from error
    lines = os.fsdecode(data.removeprefix(b'\xef\xbb\xbf')).split('\n')
    lines = [line.removesuffix('\r') for line in lines if line.strip()]
    if not lines:
        raise UserError(f'--list={name}: is empty; write a path per line')
    return lines


class Pictures:
    """Reads squares in threads, in order. What cannot be read is reported and left out."""

    def __init__(self, count: int, read: Callable[[int], np.ndarray], threads: int = 0):
        """read(i): image i as u8[S,S,3]; may raise UserError. threads: 0 means one per core."""
        self._count, self._read, self._threads = count, read, threads or cores()
        self._failed = []

    def batches(self, size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yields (image indices, squares u8[n,S,S,3]), `size` at a time."""
        numbers, squares = [], []
        found = ordered_map(
            self._try, range(self._count), threads=self._threads, ahead=size + self._threads
        )
        for number, square in enumerate(found):
            if isinstance(square, UserError):
                self._failed.append(square)
                if self._count > 1:
                    print(printable(f'error: {square}'), file=sys.stderr, flush=True)
                continue
            numbers.append(number)
            squares.append(square)
            if len(numbers) == size:
                yield numbers, np.stack(squares)
                numbers, squares = [], []
        if numbers:
            yield numbers, np.stack(squares)

    def _try(self, number: int) -> np.ndarray | UserError:
        try:
            return self._read(number)
        except UserError as error:
            return error

    def all_failed(self) -> bool:
        """Whether no image could be read."""
        return len(self._failed) == self._count

    def check(self) -> None:
        """Raises UserError if some images could not be read."""
        if self._failed and self._count == 1:
            raise self._failed[0]
        if self._failed:
            raise UserError(
                f'{len(self._failed):,} of {self._count:,} images could not be read; they are '
                'listed above'
            )


def label_of(path: str, names: list[str]) -> int | None:
    """The label of an image if its folder, or the folder above, is named after a class; else None.

    The folder above counts because Tiny ImageNet has its training images in CLASS/images.
    """
    folders = [
        class_names.as_utf8(folder.name) for folder in paths.Path(path).absolute().parents[:2]
    ]
    return next((names.index(name) for name in folders if name in names), None)


def sample(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws distinct images from as many classes as possible: i32[N] -> records i64[count]."""
    order = np.random.default_rng(seed).permutation(len(labels))
    seen, turns = Counter(), []
    for label in labels[order].tolist():
        turns.append(seen[label])
        seen[label] += 1
    return order[np.argsort(turns, kind='stable')[:count]]


def chosen(store: Store, split: str, flag: str, count: int, seed: int) -> np.ndarray:
    """`sample` from a split; UserError that names the flag for an invalid count."""
    store.check_split(split)
    there = store.counts[split]
    if not 1 <= count <= there:
        raise UserError(
            f'{flag}={count}: the {SPLITS[split]} split of {store.path} has {there:,} '
            f'images; give a number from 1 to {there}'
        )
    return sample(store.labels(split), count, seed)


def squares(store: Store, split: str, records: np.ndarray) -> np.ndarray:
    """Reads some images of a split: records i64[n] -> u8[n,S,S,3]."""
    count = store.counts[split]
    (batch,) = eval_batches(store, split, batch=count, rows=records, threads=1)
    return batch['image']
