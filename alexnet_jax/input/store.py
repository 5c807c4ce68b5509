"""Reads a store: a prepared data set of square images of one size, with one file per split.

    store.json              format, size, classes, counts, source, ..., complete (`docs/design.md` §5)
    {split}.jpg             concatenated JPEG records, with {split}.offsets.npy i64[N+1]
    {split}.u8              or raw images u8[N,S,S,3]
    {split}.crc.npy         u32[N], zlib.crc32 of each record
    {split}.labels.npy      i32[N]
    names.txt               class names in the order of their labels, one per line
    stats.npz               mean f32[S,S,3], eigenvectors f32[3,3], sigma f32[3]

`prepare` writes it; training and evaluation read nothing else.
"""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from alexnet_jax.common.errors import UserError
from alexnet_jax.common.paths import Path
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input.threads import ordered_map

FORMATS = ('jpg', 'u8')


@dataclass(frozen=True, eq=False)
class Split:
    """Locates a split's records: record i is bytes offsets[i]:offsets[i+1] of `file`."""

    file: Path
    offsets: np.ndarray
    crc: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Store:
    """An open store; everything but the images is in memory.

    `mean` f32[S,S,3] is the mean RGB training image, column k of `eigenvectors` f32[3,3] the k-th
    principal axis of the RGB pixels, and `sigma` f32[3] the standard deviations along the axes,
    largest first; all in units of 0..255 (`docs/original.md` §5).
    """

    path: Path
    format: str
    size: int
    classes: int
    names: list[str]
    counts: dict[str, int]
    source: str
    mean: np.ndarray
    eigenvectors: np.ndarray
    sigma: np.ndarray
    splits: dict[str, Split]

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels of a split's records, i32[N]."""
        return self.splits[split].labels

    def identity(self) -> int:
        """Returns a CRC-32 of the class names and, per split, of the record CRCs and labels."""
        value = zlib.crc32('\n'.join(self.names).encode())
        for name in sorted(self.splits):
            for array in (self.splits[name].crc, self.splits[name].labels):
                value = zlib.crc32(np.ascontiguousarray(array), value)
        return value

    def records(self, split: str, indices: Sequence[int]) -> list[bytes]:
        """Returns the bytes of some records, in the given order; safe to call from several threads.

        Raises:
          UserError: a record cannot be read, or its CRC-32 does not match.
        """
        part = self.splits[split]
        try:
            with open(part.file, 'rb', buffering=0) as file:
                records = [
                    os.pread(file.fileno(), part.offsets[i + 1] - part.offsets[i], part.offsets[i])
                    for i in indices
                ]
        except OSError as error:
            raise UserError(f'cannot read {part.file}: {error.strerror}') from error
        for i, record in zip(indices, records, strict=True):
            if zlib.crc32(record) != part.crc[i]:
                raise UserError(
                    f'record {i} of split {split!r} in {part.file} is damaged (its CRC-32 does '
                    f'not match): {_again(self.path)}'
                )
        return records

    def pictures(self, split: str) -> 'np.ndarray | Jpegs':
        """Returns a split's images, u8[S,S,3] each, indexed by record; thread-safe."""
        return self.pixels(split) if self.format == 'u8' else Jpegs(self, split)

    def pixels(self, split: str) -> np.ndarray:
        """Returns all images of a raw store's split, u8[N,S,S,3], memory-mapped and unchecked."""
        if self.format != 'u8':
            raise ValueError(f'{self.path} holds {self.format!r} records, not raw pixels')
        shape = (self.counts[split], self.size, self.size, 3)
        # As a plain array: slicing an np.memmap costs 5 microseconds, more than copying a small window.
        return np.asarray(np.memmap(self.splits[split].file, np.uint8, 'r', shape=shape))


@dataclass(frozen=True)
class Jpegs:
    """The images of a JPEG store's split, u8[S,S,3] each, read and decoded on access."""

    store: Store
    split: str

    def __getitem__(self, record: int) -> np.ndarray:
        (data,) = self.store.records(self.split, [record])
        return np.asarray(Image.open(io.BytesIO(data)))


def open_store(path: str | os.PathLike) -> Store:
    """Opens the store in the folder `path`.

    Raises:
      UserError: there is no store, it is incomplete or has an unknown format, a file is missing or
        has the wrong size, or a label is out of range.
    """
    path = Path(path)
    try:
        info = json.loads((path / 'store.json').read_text(encoding='utf-8'))
        if not info['complete']:
            raise UserError(f'the store {path} is incomplete; run its prepare command again')
        if info['format'] not in FORMATS:
            raise UserError(
                f'{path}/store.json: unknown format {info["format"]!r}, must be one of '
                f'{", ".join(FORMATS)}: {_again(path)}'
            )
        size, classes, counts = info['size'], info['classes'], info['counts']
        names = (path / 'names.txt').read_text(encoding='utf-8').splitlines()
        _check(len(names) == classes, path / 'names.txt', f'{len(names)} names, not {classes}')
        with np.load(path / 'stats.npz') as stats:
            mean, vectors, sigma = (stats[name] for name in ('mean', 'eigenvectors', 'sigma'))
        shapes = [mean.shape, vectors.shape, sigma.shape]
        expected = [(size, size, 3), (3, 3), (3,)]
        _check(shapes == expected, path / 'stats.npz', f'shapes {shapes}, not {expected}')
        splits = {name: _open_split(path, name, info) for name in counts}
    except FileNotFoundError as error:
        begun = (path / 'store.json').exists()
        advice = _again(path) if begun else 'write one with python -m alexnet_jax.prepare'
        missing = Path(error.filename).name
        raise UserError(f'no complete store in {path} ({missing} is missing): {advice}') from error
    except OSError as error:
        raise UserError(f'cannot read the store {path}: {error}') from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f'the store {path} is damaged ({type(error).__name__}: {error}): {_again(path)}'
        ) from error
    return Store(
        path=path,
        format=info['format'],
        size=size,
        classes=classes,
        names=names,
        counts=counts,
        source=info['source'],
        mean=mean.astype(np.float32),
        eigenvectors=vectors.astype(np.float32),
        sigma=sigma.astype(np.float32),
        splits=splits,
    )


def verify(store: Store) -> None:
    """Checks every record of a store.

    Raises:
      UserError: some records are damaged; the error names the first few.
    """
    step = 1024
    jobs = [(s, i) for s, count in store.counts.items() for i in range(0, count, step)]

    def damaged(job):
        split, start = job
        return [
            f'{split} {i}'
            for i in range(start, min(start + step, store.counts[split]))
            if not _is_whole(store, split, i)
        ]

    found = ordered_map(damaged, jobs, threads=cores(), ahead=2 * cores())
    bad = [name for names in found for name in names]
    if bad:
        shown = ', '.join(bad[:5]) + (', ...' if len(bad) > 5 else '')
        raise UserError(
            f'{len(bad)} damaged records in {store.path} ({shown}): {_again(store.path)}'
        )


def _is_whole(store: Store, split: str, index: int) -> bool:
    try:
        store.records(split, [index])
    except UserError:
        return False
    return True


def _open_split(path: Path, name: str, info: dict) -> Split:
    count, picture = info['counts'][name], info['size'] ** 2 * 3
    file = path / f'{name}.{info["format"]}'
    labels, crc = (np.load(path / f'{name}.{kind}.npy') for kind in ('labels', 'crc'))
    if info['format'] == 'jpg':
        offsets = np.load(path / f'{name}.offsets.npy')
    else:
        offsets = np.arange(count + 1, dtype=np.int64) * picture
    _check(count > 0, path / 'store.json', f'split {name!r} has no pictures')
    for kind, array, length in (('labels', labels, count), ('crc', crc, count)):
        _check(
            len(array) == length, path / f'{name}.{kind}.npy', f'{len(array)} values, not {length}'
        )
    _check(
        len(offsets) == count + 1 and offsets[0] == 0 and (np.diff(offsets) > 0).all(),
        path / f'{name}.offsets.npy',
        f'not {count + 1} increasing offsets from 0',
    )
    length = os.path.getsize(file)
    _check(length == offsets[-1], file, f'{length} bytes, not {offsets[-1]}')
    outside = np.flatnonzero((labels < 0) | (labels >= info['classes']))
    if outside.size:
        raise UserError(
            f'{path}/{name}.labels.npy: record {outside[0]} has label {labels[outside[0]]}, '
            f'outside 0..{info["classes"] - 1}: {_again(path)}'
        )
    return Split(file, offsets.astype(np.int64), crc, labels.astype(np.int32))


def _check(good: bool, file: Path, found: str) -> None:
    if not good:
        raise UserError(f'{file} does not match the store: {found}: {_again(file.parent)}')


def _again(path: Path) -> str:
    # `prepare` on its own would find the store complete and do nothing.
    return f'remove {path} and run prepare again'
