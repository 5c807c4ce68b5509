"""Writes the files of a store (design §5), so that a killed pass goes on and ends the same.

While a store grows, a row per record goes to {split}.index, and progress.npz says how far everything
is valid: what lies beyond is cut off when the pass goes on. Sums are integers, so that their order
does not matter.
"""

import collections
import concurrent.futures
import io
import json
import os
import time
import zlib

import numpy as np
from PIL import Image

from alexnet_jax.datasets.pictures import square, statistics
from alexnet_jax.datasets.source import Example, Source
from alexnet_jax.errors import UserError

FLUSH_SECONDS = 5.0  # between the points from which an interrupted pass goes on
INDEX = np.dtype([('bytes', '<i8'), ('crc', '<u4'), ('label', '<i4')])  # one row a record
PROGRESS = 'progress.npz'
SPLITS = ('train', 'val')


def read_progress(path: str, size: int) -> dict[str, np.ndarray]:
    """How far a store has come, all zero at the start.

    Returns:
      written i64[2,3]: records, their bytes, and bytes of the index, of each split; and of the
      training pictures image i64[size,size,3], their sum, and products i64[3,3], the sum of
      r_i r_j over their pixels.
    """
    try:
        with np.load(os.path.join(path, PROGRESS)) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        return {'written': np.zeros((len(SPLITS), 3), np.int64),
                'image': np.zeros((size, size, 3), np.int64), 'products': np.zeros((3, 3), np.int64)}


def write_description(path: str, description: dict) -> None:
    """Writes store.json."""
    _replace(os.path.join(path, 'store.json'),
             lambda file: file.write(json.dumps(description, indent=2).encode() + b'\n'))


def write_split(path: str, source: Source, split: str, *, size: int, format: str,
                progress: dict[str, np.ndarray]) -> None:
    """Appends the records of a split that `progress` lacks, bringing it and its file up to date.

    Raises:
      UserError: a picture does not decode, or its label is outside the class count.
    """
    from tqdm import tqdm

    written = progress['written'][SPLITS.index(split)]
    files = [open(os.path.join(path, f'{split}.{kind}'), 'ab') for kind in (format, 'index')]
    for file, length in zip(files, written[1:], strict=True):
        file.truncate(length)

    def flush():
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        _replace(os.path.join(path, PROGRESS), lambda file: np.savez(file, **progress))

    total, start = source.splits[split], int(written[0])
    records = _in_order(lambda example: _record(example, size, format, len(source.class_names)),
                        source.read(split, start), os.cpu_count())
    flushed = time.monotonic()
    try:
        for data, row, pixels, products in tqdm(
                records, split, total, initial=start, unit=' pictures', disable=None):
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


def finish(path: str, source: Source, *, format: str, progress: dict[str, np.ndarray],
           description: dict) -> None:
    """Turns the indices and sums of a fully written store into its other files."""
    for split in SPLITS:
        index = np.fromfile(os.path.join(path, f'{split}.index'), INDEX)
        np.save(os.path.join(path, f'{split}.crc.npy'), index['crc'])
        np.save(os.path.join(path, f'{split}.labels.npy'), index['label'])
        if format == 'jpg':
            np.save(os.path.join(path, f'{split}.offsets.npy'),
                    np.concatenate([[0], index['bytes'].cumsum()]).astype(np.int64))
    with open(os.path.join(path, 'names.txt'), 'w', encoding='utf-8') as file:
        file.writelines(f'{name}\n' for name in source.class_names)
    np.savez(os.path.join(path, 'stats.npz'),
             **statistics(progress['image'], progress['products'], source.splits['train']))
    write_description(path, description)
    clean(path)


def clean(path: str) -> None:
    """Removes what only an unfinished store needs."""
    for name in os.listdir(path):
        if name.endswith(('.index', '.tmp')) or name == PROGRESS:
            os.remove(os.path.join(path, name))


def _record(example: Example, size: int, format: str, classes: int):
    """Runs in a thread -> (bytes of the record, of its index row, u8[size,size,3], products)."""
    if not 0 <= example.label < classes:
        raise UserError(f'{example.name}: label {example.label} is outside the {classes} classes')
    try:
        pixels = square(example.data, size)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UserError(f'{example.name}: does not decode ({error}): repair it and run the same '
                        'command again') from error
    if format == 'u8':
        data = pixels.tobytes()
    else:
        encoded = io.BytesIO()
        # 4:2:0, the default of the source's encoder (OpenCV): 30 kB at 256 pixels.
        Image.fromarray(pixels).save(encoded, 'JPEG', quality=95, subsampling='4:2:0')
        data = encoded.getvalue()
    row = np.array([(len(data), zlib.crc32(data), example.label)], INDEX).tobytes()
    colours = pixels.reshape(-1, 3).astype(np.float64)  # exact: sums stay below 2^53
    return data, row, pixels, (colours.T @ colours).astype(np.int64)


def _in_order(function, items, threads: int):
    """Maps over an iterator in threads, in order, holding only a few items."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _replace(path: str, write) -> None:
    """Writes a file so that at any moment the old or the new one is there, whole."""
    with open(path + '.tmp', 'wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + '.tmp', path)
