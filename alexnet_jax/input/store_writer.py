"""Writes a store (`docs/design.md` §5). A killed pass resumes and ends with the same bytes.

While a store grows, each record adds a row to {split}.index, and progress.npz says how much of each
file is valid: the rest is cut off when the pass resumes. Sums are integers, so their order does not
matter.
"""

import contextlib
import fcntl
import io
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input.images import square, statistics
from alexnet_jax.input.sources.source import Example, Source
from alexnet_jax.input.threads import ordered_map

FLUSH_SECONDS = 5.0  # between the points at which an interrupted pass can resume
INDEX = np.dtype([('bytes', '<i8'), ('crc', '<u4'), ('label', '<i4')])  # one row per record
LOCK = 'lock.tmp'  # like every .tmp file, not part of a store
PROGRESS = 'progress.npz'
SPLITS = ('train', 'val')
FILES = (  # all that are ever written
    'store.json',
    'names.txt',
    'stats.npz',
    PROGRESS,
    *(
        f'{split}.{kind}'
        for split in SPLITS
        for kind in ('jpg', 'u8', 'index', 'crc.npy', 'labels.npy', 'offsets.npy')
    ),
)
TEMPORARY = (LOCK, *(f'{name}.tmp' for name in FILES))


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Makes a store's folder and locks it, waiting for any other process that holds the lock.

    On exit, removes those of the folders it made that are empty. The kernel releases the lock when
    the process ends, however it ends. Best effort: some network file systems have no locks.
    """
    name, made = os.path.join(path, LOCK), []
    while True:
        file, made = _open_lock(path, made)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f'{path}: waiting for another process that is preparing it', flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass  # this file system has no locks
            if not _is_open(name, file):
                continue  # its holder has removed it, and another process may hold a new one
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.remove(name)
                with contextlib.suppress(OSError):
                    for folder in made:
                        os.rmdir(folder)
            return


def read_progress(path: str, size: int) -> dict[str, np.ndarray]:
    """Reads how much of a store has been written; all zeros at the start.

    Returns:
      written i64[2,3]: each split's number of records, their bytes and the bytes of its index; and
      over the training images, image i64[size,size,3], their sum, and products i64[3,3], the sum
      of r_i r_j over their pixels.
    """
    try:
        with np.load(os.path.join(path, PROGRESS)) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {
            'written': np.zeros((len(SPLITS), 3), np.int64),
            'image': np.zeros((size, size, 3), np.int64),
            'products': np.zeros((3, 3), np.int64),
        }


def write_description(path: str, description: dict) -> None:
    """Writes store.json."""
    paths.replace(
        os.path.join(path, 'store.json'),
        lambda file: file.write(json.dumps(description, indent=2).encode() + b'\n'),
    )


def write_records(
    path: str, source: Source, *, size: int, format: str, progress: dict[str, np.ndarray]
) -> None:
    """Appends the records missing from `progress`; updates it and, in a long pass, its file.

    Raises:
      UserError: an image cannot be decoded, or its label is out of range.
    """
    began = time.monotonic()
    for split in SPLITS:
        _write_split(path, source, split, size=size, format=format, progress=progress, began=began)


def _write_split(path, source, split, *, size, format, progress, began):
    from tqdm import tqdm

    written = progress['written'][SPLITS.index(split)]
    files = [open(os.path.join(path, f'{split}.{kind}'), 'ab') for kind in (format, 'index')]
    for file, length in zip(files, written[1:], strict=True):
        file.truncate(length)

    def flush():
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        if time.monotonic() - began > FLUSH_SECONDS:  # a shorter pass starts over
            paths.replace(os.path.join(path, PROGRESS), lambda file: np.savez(file, **progress))

    total, start = source.splits[split], int(written[0])
    records = ordered_map(
        lambda example: _record(example, size, format, len(source.class_names)),
        source.read(split, start),
        threads=cores(),
        ahead=4 * cores(),
    )
    flushed = began
    try:
        for data, row, pixels, products in tqdm(
            records, split, total, initial=start, unit=' pictures', disable=None
        ):
            for file, part in zip(files, (data, row), strict=True):
                file.write(part)
            written += (1, len(data), len(row))
            if split == 'train':
                progress['image'] += pixels
                progress['products'] += products
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flush()
                flushed = time.monotonic()
        if written[0] != total:
            raise UserError(f'{source.name}: {split} gave {written[0]} pictures, not {total}')
        flush()
    finally:
        records.close()
        for file in files:
            file.close()


def finish(
    path: str, source: Source, *, format: str, progress: dict[str, np.ndarray], description: dict
) -> None:
    """Writes the other files of a fully written store from its indices and sums."""

    def save(name, write):
        paths.replace(os.path.join(path, name), write)

    for split in SPLITS:
        index = np.fromfile(os.path.join(path, f'{split}.index'), INDEX)
        arrays = {'crc': index['crc'], 'labels': index['label']}
        if format == 'jpg':
            arrays['offsets'] = np.concatenate([[0], index['bytes'].cumsum()]).astype(np.int64)
        for kind, array in arrays.items():
            save(f'{split}.{kind}.npy', lambda file, array=array: np.save(file, array))
    names = ''.join(f'{name}\n' for name in source.class_names)
    save('names.txt', lambda file: file.write(names.encode()))
    stats = statistics(progress['image'], progress['products'], source.splits['train'])
    save('stats.npz', lambda file: np.savez(file, **stats))
    write_description(path, description)
    clean(path)


def clean(path: str) -> None:
    """Removes the files that only an unfinished store needs."""
    _remove(path, (PROGRESS, *(f'{split}.index' for split in SPLITS), *TEMPORARY))


def empty(path: str) -> None:
    """Removes the files of a store, except for the lock, which its holder removes."""
    # store.json last: without it, the other files would not look like a store to another process.
    _remove(path, [name for name in (*TEMPORARY, *reversed(FILES)) if name != LOCK])


def _remove(path: str, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # not there, or another process removed it
            os.remove(os.path.join(path, name))


def _open_lock(path: str, made: list[str]):
    """Opens the lock in a store's folder -> (file, the folders made for it, deepest first)."""
    for _ in range(100):
        made = max(made, _missing(path), key=len)
        try:
            os.makedirs(path, exist_ok=True)
            return open(os.path.join(path, LOCK), 'ab'), made
        except (FileNotFoundError, FileExistsError) as error:
            failure = error  # a holder that failed has just removed the folder
    raise failure


def _missing(path: str) -> list[str]:
    """Returns the folders of `path` that do not exist yet, deepest first."""
    path = os.path.abspath(path)
    return [] if os.path.exists(path) else [path, *_missing(os.path.dirname(path))]


def _is_open(name: str, file) -> bool:
    """Returns whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(name), os.fstat(file.fileno()))
    except OSError:
        return False


def _record(example: Example, size: int, format: str, classes: int):
    """Encodes an example, in a thread -> (record bytes, index row, u8[size,size,3], products)."""
    if not 0 <= example.label < classes:
        raise UserError(f'{example.name}: label {example.label} is outside the {classes} classes')
    try:
        pixels = square(example.data, size)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UserError(
            f'{example.name}: cannot be decoded ({error}): repair it and run the same command again'
        ) from error
    if format == 'u8':
        data = pixels.tobytes()
    else:
        encoded = io.BytesIO()
        # 4:2:0, the default of the 2012 code's encoder (OpenCV): 30 kB at 256 pixels.
        Image.fromarray(pixels).save(encoded, 'JPEG', quality=95, subsampling='4:2:0')
        data = encoded.getvalue()
    row = np.array([(len(data), zlib.crc32(data), example.label)], INDEX).tobytes()
    colours = pixels.reshape(-1, 3).astype(np.float64)  # exact: sums stay below 2^53
    return data, row, pixels, (colours.T @ colours).astype(np.int64)
