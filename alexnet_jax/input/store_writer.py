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
from typing import NamedTuple

import numpy as np
from PIL import Image

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, printable, say
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input import store as stores
from alexnet_jax.input.images import Undecodable, central, square, statistics, whole
from alexnet_jax.input.sources.source import SPLITS, Example, Source
from alexnet_jax.input.threads import ordered_map

FLUSH_SECONDS = 5.0  # between the points at which an interrupted pass can resume
INDEX = np.dtype([('bytes', '<i8'), ('crc', '<u4'), ('label', '<i4')])  # one row per record
LOCK = 'lock.tmp'  # like every .tmp file, not part of a store
PROGRESS = 'progress.npz'
SHOWN = 20  # bad images in a message
FILES = (  # every file that a pass can write
    'store.json',
    'skipped.txt',
    'names.txt',
    'stats.npz',
    PROGRESS,
    *(
        f'{split}.{kind}'
        for split in SPLITS
        for kind in (*stores.FORMATS, 'index', 'crc.npy', 'labels.npy', 'offsets.npy')
    ),
)
TEMPORARY = (LOCK, *(f'{name}.tmp' for name in FILES))


@contextlib.contextmanager
def locked(path: str, action: str = 'preparing') -> Iterator[None]:
    """Makes a store's folder and locks it, waiting for any other process that holds the lock.

    On exit, removes any empty folders that it made. The kernel releases the lock when
    the process ends, however it ends. Best effort: some network file systems have no locks.
    """
    name, made = os.path.join(path, LOCK), []
    while True:
        file, made = _open_lock(path, made)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f'{path}: waiting for another process that is {action} it')
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


class Bad(NamedTuple):
    """An image that cannot be decoded."""

    name: str  # safe to print, relative to its source
    reason: str
    label: int


def read_progress(path: str, size: int, *, skip_bad: bool = False) -> dict:
    """Reads how much of a store has been written; all zeros at the start.

    A pass that has left images out starts over unless `skip_bad`: they may have been repaired.

    Returns:
      written i64[3,3]: each split's number of records, their bytes and the bytes of its index;
      read i64[3]: each split's number of images read from the source, and skipped, a list of `Bad`
      by split, those that were left out; and over the training images, image i64[size,size,3],
      their sum, and products i64[3,3], the sum of r_i r_j over their pixels.
    """
    try:
        with np.load(os.path.join(path, PROGRESS)) as arrays:
            progress = dict(arrays)
    except FileNotFoundError:
        progress = {
            'written': np.zeros((len(SPLITS), 3), np.int64),
            'image': np.zeros((size, size, 3), np.int64),
            'products': np.zeros((3, 3), np.int64),
        }
    for name in {'written', 'read'} & {*progress}:  # earlier versions had no test split
        missing = len(SPLITS) - len(progress[name])
        rows = [(0, missing)] + [(0, 0)] * (progress[name].ndim - 1)
        progress[name] = np.pad(progress[name], rows)
    skipped = json.loads(bytes(progress.get('skipped', b'{}')))
    if skipped and not skip_bad:
        say(f'{path}: starting over, since images were left out with --skip_bad')
        os.remove(os.path.join(path, PROGRESS))
        return read_progress(path, size)
    progress.setdefault('read', progress['written'][:, 0].copy())
    progress['skipped'] = {split: [Bad(*bad) for bad in skipped[split]] for split in skipped}
    return progress


def _write_progress(path: str, progress: dict) -> None:
    skipped = np.frombuffer(json.dumps(progress['skipped']).encode(), np.uint8)
    paths.replace(
        os.path.join(path, PROGRESS),
        lambda file: np.savez(file, **{**progress, 'skipped': skipped}),
    )


def write_description(path: str, description: dict) -> None:
    """Writes store.json, with its checksum once the store is complete."""
    paths.replace(
        os.path.join(path, 'store.json'),
        lambda file: file.write(stores.encode(description)),
    )


def bad_list(path: str) -> str:
    """The file beside a store that lists all images that cannot be decoded, if there are many."""
    return f'{path.rstrip(os.sep)}.bad.txt'


def write_records(
    path: str,
    source: Source,
    *,
    size: int,
    format: str,
    progress: dict,
    exif: bool = False,
    skip_bad: bool = False,
) -> None:
    """Appends the records missing from `progress`; updates it and, in a long pass, its file.

    Images that cannot be decoded are left out with `skip_bad`. Without it, nothing of their split is
    written from the first of them on, so that the pass can resume when they are repaired, but all
    other images are checked.

    Raises:
      UserError: a label is out of range or, after the pass, images cannot be decoded (with
        `skip_bad`: all those of a split, or of a class in the training split). The message has the
        first of them, and `bad_list` has all if there are more.
    """
    began, bad = time.monotonic(), []
    with contextlib.suppress(FileNotFoundError):
        os.remove(bad_list(path))  # of an earlier pass
    for split in source.splits:
        bad += _write_split(
            path,
            source,
            split,
            size=size,
            format=format,
            progress=progress,
            began=began,
            exif=exif,
            skip_bad=skip_bad,
        )
    if bad:
        raise UserError(
            f'{source.name}: {_list(path, bad, sum(source.splits.values()))}; repair or remove '
            'them and run the same command again, or leave them out with --skip_bad'
        )
    if progress['skipped']:
        try:
            _check_rest(path, source, progress)
        except UserError:  # a progress file would keep the repaired images out
            _remove(path, [PROGRESS])
            raise


def _list(path: str, bad: list[Bad], count: int) -> str:
    """Says which images cannot be decoded; writes a file if there are too many for a message."""
    shown = ', '.join(f'{one.name} ({one.reason})' for one in bad[:SHOWN])
    text = f'{len(bad):,} of {count:,} images cannot be decoded: {shown}'
    if len(bad) > SHOWN:
        paths.replace(bad_list(path), _table(bad))
        text += f', ...; the list is in {bad_list(path)}'
    return text


def _table(bad: list[Bad]) -> bytes:
    return ''.join(f'{one.name}\t{one.reason}\n' for one in bad).encode()


def _check_rest(path: str, source: Source, progress: dict) -> None:
    """UserError if nothing is left of a split, or of a class to train with."""
    skipped = {split: progress['skipped'].get(split, []) for split in source.splits}
    repair = 'repair some of them, and run the same command again'
    for split in source.splits:
        if not progress['written'][SPLITS.index(split), 0]:
            listed = _list(path, skipped[split], source.splits[split])
            raise UserError(
                f'{source.name}: no images are left in the {split} split: {listed}; {repair}'
            )
    index = np.fromfile(os.path.join(path, 'train.index'), INDEX)
    gone = sorted({bad.label for bad in skipped['train']} - {*index['label'].tolist()})
    if gone:
        listed = [bad for bad in skipped['train'] if bad.label == gone[0]]
        raise UserError(
            f'{source.name}: no training images of class {source.class_names[gone[0]]!r} are left: '
            f'{_list(path, listed, len(listed))}; {repair}, or remove the class'
        )


def _write_split(path, source, split, *, size, format, progress, began, exif, skip_bad):
    from tqdm import tqdm

    number = SPLITS.index(split)
    written, bad = progress['written'][number], []

    def flush():
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        if time.monotonic() - began > FLUSH_SECONDS:  # a shorter pass starts over
            _write_progress(path, progress)

    total, start = source.splits[split], int(progress['read'][number])
    records = ordered_map(
        lambda example: _record(example, size, format, source, exif),
        source.read(split, start),
        threads=cores(),
        ahead=4 * cores(),
    )
    flushed, count = began, start
    with contextlib.ExitStack() as stack:
        names = [os.path.join(path, f'{split}.{kind}') for kind in (format, 'index')]
        files = [stack.enter_context(open(name, 'ab')) for name in names]
        stack.callback(records.close)
        for file, length in zip(files, written[1:], strict=True):
            file.truncate(length)
        for record in tqdm(records, split, total, initial=start, unit=' images', disable=None):
            count += 1
            if isinstance(record, Bad) and skip_bad:
                progress['skipped'].setdefault(split, []).append(record)
            elif isinstance(record, Bad):
                bad.append(record)
            if bad:
                continue  # the rest is only checked
            progress['read'][number] += 1
            if not isinstance(record, Bad):
                data, row, pixels, products = record
                for file, part in zip(files, (data, row), strict=True):
                    file.write(part)
                written += (1, len(data), len(row))
                if split == 'train':
                    progress['image'] += pixels
                    progress['products'] += products
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flush()
                flushed = time.monotonic()
        if count != total:
            raise UserError(f'{source.name}: {split} gave {count} images, not {total}')
        flush()
    return bad


def finish(path: str, source: Source, *, format: str, progress: dict, description: dict) -> None:
    """Writes the other files of a fully written store from its indices and sums.

    Images that were left out are counted in store.json and listed, with reasons, in skipped.txt.
    """

    def save(name, write):
        paths.replace(os.path.join(path, name), write)

    for split in source.splits:
        index = np.fromfile(os.path.join(path, f'{split}.index'), INDEX)
        arrays = {'crc': index['crc'], 'labels': index['label']}
        if format != 'u8':
            arrays['offsets'] = np.concatenate([[0], index['bytes'].cumsum()]).astype(np.int64)
        for kind, array in arrays.items():
            save(f'{split}.{kind}.npy', lambda file, array=array: np.save(file, array))
    names = ''.join(f'{name}\n' for name in source.class_names)
    save('names.txt', lambda file: file.write(names.encode()))
    counts = {s: int(progress['written'][SPLITS.index(s), 0]) for s in source.splits}
    stats = statistics(progress['image'], progress['products'], counts['train'])
    save('stats.npz', lambda file: np.savez(file, **stats))
    description = {**description, 'counts': counts}
    if progress['skipped']:
        skipped = {split: progress['skipped'].get(split, []) for split in source.splits}
        description['skipped'] = {split: len(bad) for split, bad in skipped.items()}
        bad = [one for split in source.splits for one in skipped[split]]
        save('skipped.txt', _table(bad))
        say(
            f'{path}: images left out because they cannot be decoded: {len(bad):,}; see skipped.txt'
        )
    crc = {}
    for name in stores.parts(description):
        with open(os.path.join(path, name), 'rb') as file:
            crc[name] = zlib.crc32(file.read())
    write_description(path, {**description, 'crc': crc})
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


def _record(example: Example, size: int, format: str, source: Source, exif: bool):
    """Encodes an example, in a thread -> (record bytes, index row, u8[size,size,3], products)."""
    if not 0 <= example.label < len(source.class_names):
        raise UserError(
            f'{example.name}: label {example.label} is outside the {len(source.class_names)} classes'
        )
    try:
        kept = (whole if format == 'whole' else square)(example.data, size, exif=exif)
    except Undecodable as error:
        name = example.name.removeprefix(f'{source.name.rstrip(os.sep)}{os.sep}')
        return Bad(printable(name), printable(str(error)), example.label)
    pixels = central(kept, size)
    if format == 'u8':
        data = pixels.tobytes()
    else:
        encoded = io.BytesIO()
        # 4:2:0, the default of the 2012 code's encoder (OpenCV): 30 kB at 256 pixels.
        Image.fromarray(kept).save(encoded, 'JPEG', quality=95, subsampling='4:2:0')
        data = encoded.getvalue()
    row = np.array([(len(data), zlib.crc32(data), example.label)], INDEX).tobytes()
    colors = pixels.reshape(-1, 3).astype(np.float64)  # exact: sums stay below 2^53
    return data, row, pixels, (colors.T @ colors).astype(np.int64)
