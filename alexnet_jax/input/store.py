"""Reads a store: a prepared dataset of square images of one size, with one file per split.

    store.json              format, size, classes, counts, source, ..., complete (`docs/design.md` §5)
    {split}.jpg             concatenated JPEG records, with {split}.offsets.npy i64[N+1]
    {split}.whole           or the same of whole images, whose shorter side is S pixels
    {split}.u8              or raw images u8[N,S,S,3]
    {split}.crc.npy         u32[N], zlib.crc32 of each record
    {split}.labels.npy      i32[N]; the splits are train, val and, if the source has both, test
    names.txt               class names in the order of their labels, one per line
    stats.npz               mean f32[S,S,3], eigenvectors f32[3,3], sigma f32[3]

The records are protected by {split}.crc.npy, the other files by the field 'crc' of store.json, and
store.json by its own field 'checksum'. Stores written before these fields existed lack them.

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

from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.common.paths import Path, is_remote
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input.images import central
from alexnet_jax.input.threads import ordered_map

FORMATS = ('jpg', 'u8', 'whole')
TRAINING = ('train', 'val')  # the splits that training reads; a test split is only evaluated


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
    validation: str  # where the validation images came from, if not from a split of their own
    mean: np.ndarray
    eigenvectors: np.ndarray
    sigma: np.ndarray
    splits: dict[str, Split]

    def labels(self, split: str) -> np.ndarray:
        """Returns the labels of a split's records, i32[N]."""
        return self.splits[split].labels

    def identity(self) -> int:
        """Returns a CRC-32 of the class names and, for train and val, of the record CRCs and labels."""
        value = zlib.crc32('\n'.join(self.names).encode())
        for name in TRAINING:
            for array in (self.splits[name].crc, self.splits[name].labels):
                value = zlib.crc32(np.ascontiguousarray(array), value)
        return value

    def check_split(self, split: str) -> None:
        """Raises UserError unless the store has a split."""
        if split not in self.splits:
            raise UserError(
                f'{self.path} has no split {split!r}, only {", ".join(self.splits)}'
                + (f': its val is {self.validation}' if self.validation else '')
                + '; a store has one if its source has labeled test images besides validation images: add '
                'those, remove the store and prepare it again'
            )

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
            raise UserError(f'cannot read {part.file}: {reason(error)}') from error
        for i, record in zip(indices, records, strict=True):
            self.check(split, i, record)
        return records

    def check(self, split: str, index: int, record: bytes | np.ndarray) -> None:
        """Raises UserError if the CRC-32 of a record does not match."""
        part = self.splits[split]
        if zlib.crc32(record) != part.crc[index]:
            raise UserError(
                f'record {index} of split {split!r} in {part.file} is damaged (its CRC-32 does '
                f'not match): {_again(self.path)}'
            )

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
    """The images of a JPEG store's split, u8[S,S,3] each, read and decoded on access.

    For a store of whole images, these are the central squares; `whole` returns a whole image.
    """

    store: Store
    split: str

    def whole(self, record: int) -> Image.Image:
        """Returns a record's image as it is stored."""
        (data,) = self.store.records(self.split, [record])
        return Image.open(io.BytesIO(data))

    def __getitem__(self, record: int) -> np.ndarray:
        return central(np.asarray(self.whole(record)), self.store.size)


def parts(info: dict) -> list[str]:
    """Returns the names of a store's files other than store.json and the records."""
    kinds = ('crc', 'labels') + ('offsets',) * (info['format'] != 'u8')
    arrays = [f'{split}.{kind}.npy' for split in info['counts'] for kind in kinds]
    skipped = ['skipped.txt'] * ('skipped' in info)
    return ['names.txt', 'stats.npz', *skipped, *arrays]


def encode(info: dict) -> bytes:
    """Returns the content of store.json, with a checksum of the fields if 'crc' is one of them."""
    content = {key: value for key, value in info.items() if key != 'checksum'}
    if 'crc' in content:
        content['checksum'] = _checksum(content)
    return json.dumps(content, indent=2).encode() + b'\n'


def decode(data: bytes) -> dict:
    """Returns the fields of store.json; ValueError if it is not valid or fails its checksum."""
    info = json.loads(data.decode())
    if not isinstance(info, dict):
        raise ValueError('not a JSON object')
    if ('crc' in info or 'checksum' in info) and info.get('checksum') != _checksum(info):
        raise ValueError('its checksum does not match')
    return info


def _checksum(info: dict) -> int:
    content = {key: value for key, value in info.items() if key != 'checksum'}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def open_store(path: str | os.PathLike) -> Store:
    """Opens the store in the folder `path`.

    Raises:
      UserError: there is no store, it is incomplete or has an unknown format, a file is missing,
        has the wrong size or fails its checksum, or a label is out of range.
    """
    if is_remote(path):
        raise UserError(f'{path}: this needs a store on a local disk: copy it there first')
    path = Path(path)
    try:
        info = _description(path)
        if not info['complete']:
            raise UserError(f'the store {path} is incomplete; run its prepare command again')
        if info['format'] not in FORMATS:
            raise UserError(
                f'{path}/store.json: unknown format {info["format"]!r}, must be one of '
                f'{", ".join(FORMATS)}: {_again(path)}'
            )
        size, classes, counts = info['size'], info['classes'], info['counts']
        names = _read(path, 'names.txt', info).read().decode().removesuffix('\n').split('\n')
        _check(len(names) == classes, path / 'names.txt', f'{len(names)} names, not {classes}')
        with np.load(_read(path, 'stats.npz', info)) as stats:
            mean, vectors, sigma = (stats[name] for name in ('mean', 'eigenvectors', 'sigma'))
        shapes = [mean.shape, vectors.shape, sigma.shape]
        expected = [(size, size, 3), (3, 3), (3,)]
        _check(shapes == expected, path / 'stats.npz', f'shapes {shapes}, not {expected}')
        finite = all(np.isfinite(array).all() for array in (mean, vectors, sigma))
        _check(finite, path / 'stats.npz', 'statistics that are not finite')
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
        validation=info.get('validation', ''),
        mean=mean.astype(np.float32),
        eigenvectors=vectors.astype(np.float32),
        sigma=sigma.astype(np.float32),
        splits=splits,
    )


def verify(store: Store) -> None:
    """Checks every record of a store, and every bit of its other files.

    Raises:
      UserError: something is damaged; the error names the file, and the first few records.
    """
    info = _description(store.path)
    for name in info.get('crc', ()):
        _read(store.path, name, info)
    if 'checksum' in info and (store.path / 'store.json').read_bytes() != encode(info):
        raise _damaged(store.path / 'store.json', 'it has changed since it was written')
    step = 1024
    jobs = [(s, i) for s, count in store.counts.items() for i in range(0, count, step)]

    def damaged(job):
        split, start = job
        return [
            f'{split}.{store.format} {i}'
            for i in range(start, min(start + step, store.counts[split]))
            if not _is_whole(store, split, i)
        ]

    found = ordered_map(damaged, jobs, threads=cores(), ahead=2 * cores())
    bad = [name for names in found for name in names]
    if bad:
        shown = ', '.join(bad[:5]) + (', ...' if len(bad) > 5 else '')
        raise UserError(
            f'damaged records in {store.path}: {len(bad)} ({shown}): {_again(store.path)}'
        )


def _is_whole(store: Store, split: str, index: int) -> bool:
    try:
        store.records(split, [index])
    except UserError:
        return False
    return True


def _description(path: Path) -> dict:
    file = path / 'store.json'
    try:
        return decode(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, f'{type(error).__name__}: {error}') from error


def _read(path: Path, name: str, info: dict) -> io.BytesIO:
    """Reads one of `parts` and checks its CRC-32, if the store has one."""
    data = (path / name).read_bytes()
    if 'crc' in info and zlib.crc32(data) != info['crc'][name]:
        raise _damaged(path / name, 'its CRC-32 does not match')
    return io.BytesIO(data)


def _open_split(path: Path, name: str, info: dict) -> Split:
    def load(kind: str) -> np.ndarray:
        return np.load(_read(path, f'{name}.{kind}.npy', info))

    count, picture = info['counts'][name], info['size'] ** 2 * 3
    file = path / f'{name}.{info["format"]}'
    labels, crc = (load(kind) for kind in ('labels', 'crc'))
    if info['format'] != 'u8':
        offsets = load('offsets')
    else:
        offsets = np.arange(count + 1, dtype=np.int64) * picture
    _check(count > 0, path / 'store.json', f'split {name!r} has no images')
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


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f'{file} is damaged ({why}): {_again(file.parent)}')


def _again(path: Path) -> str:
    # `prepare` on its own would find the store complete and do nothing.
    return f'remove {path} and run prepare again'
