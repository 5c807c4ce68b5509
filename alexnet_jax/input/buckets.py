"""Copies a store from a bucket to a local disk, once per host: training reads stores from a local disk.

A file gets its name once it is complete; store.json comes last and so marks a complete copy. Records
are copied in parts, several at a time, and checked by their CRC-32s as they arrive. After a kill,
complete parts are not copied again.
"""

import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, reason, say
from alexnet_jax.input import store as stores
from alexnet_jax.input import store_writer
from alexnet_jax.input.threads import ordered_map

PART = 64 << 20  # bytes of records per request; TensorFlow reads this much ahead in any case
THREADS = 8
TRIES = 3  # attempts at a request whose bytes fail their checksum


class Records(NamedTuple):
    """A file of records that is being copied."""

    remote: paths.Path
    local: str
    offsets: np.ndarray  # i64[N+1]
    crc: np.ndarray  # u32[N]

    def parts(self) -> list[tuple[int, int]]:
        """Divides the records into parts of about `PART` bytes -> (first, end) of each."""
        starts = np.searchsorted(self.offsets, np.arange(0, self.offsets[-1], PART))
        ends = np.unique([*starts, len(self.crc)]).tolist()
        return [*zip(ends, ends[1:], strict=False)]


def copy_of(url: str) -> str:
    """Returns where `local_copy` puts the store at gs://BUCKET/.../NAME."""
    remote = paths.path(url.rstrip('/'))
    digest = hashlib.sha1(os.fspath(remote).encode()).hexdigest()[:8]
    return os.path.join('data', f'{remote.name}-{digest}')


def local_copy(url: str) -> str:
    """Copies the store at gs://BUCKET/.../NAME to data/NAME-XXXXXXXX, unless it is there -> its path.

    X are 8 hex digits of the SHA-1 of the URL. Waits if another process on this host is copying it.

    Raises:
      UserError: there is no complete store, it cannot be read, its checksums do not match, the local
        copy is of another store, or the disk is too small.
    """
    remote, path = paths.path(url.rstrip('/')), copy_of(url)
    try:
        content = _read(remote / 'store.json')
    except UserError as error:
        if os.path.exists(os.path.join(path, 'store.json')):
            say(f'{error}; using the copy in {path}')
            return path
        raise
    try:
        if not _is_copied(path, remote, content):
            with store_writer.locked(path, 'copying'):
                if not _is_copied(path, remote, content):
                    _copy(remote, path, content)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error
    return path


def _is_copied(path: str, remote: paths.Path, content: bytes) -> bool:
    """Returns whether a copy is complete; UserError if it is of a store with a different store.json."""
    try:
        with open(os.path.join(path, 'store.json'), 'rb') as file:
            same = file.read() == content
    except FileNotFoundError:
        return False
    if not same:
        raise UserError(
            f'{path} is a copy of an earlier version of {remote}: remove it and start again'
        )
    return True


def _copy(remote: paths.Path, path: str, content: bytes) -> None:
    try:
        info = stores.decode(content)
        if not info['complete']:
            raise UserError(
                f'{remote}: incomplete store: finish preparing it, and copy it there again'
            )
        splits = {split: f'{split}.{info["format"]}' for split in info['counts']}
        small = stores.parts(info)
        if not {*small, *splits.values()} <= {*store_writer.FILES}:
            raise ValueError('unknown files')
        sizes = {name: _size(remote / name) for name in (*small, *splits.values())}
        _check_disk(remote, path, sizes)
        for line in ordered_map(
            lambda name: _copy_file(remote / name, os.path.join(path, name), info),
            small,
            threads=THREADS,
            ahead=2 * THREADS,
        ):
            say(line)
        for split, name in splits.items():
            _copy_records(remote / name, path, split, info)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(remote / 'store.json', f'{type(error).__name__}: {error}') from error
    paths.replace(os.path.join(path, 'store.json'), content)


def _copy_file(remote: paths.Path, target: str, info: dict) -> str:
    """Copies one of `stores.parts` -> a line about it."""

    def is_whole(data: bytes) -> bool:
        return 'crc' not in info or zlib.crc32(data) == info['crc'][remote.name]

    if 'crc' in info and os.path.exists(target):
        with open(target, 'rb') as file:
            data = file.read()
        if is_whole(data):
            return _line(remote, len(data), None)
    began = time.monotonic()
    data = _fetch(remote, is_whole)
    paths.replace(target, data)
    return _line(remote, len(data), began)


def _copy_records(remote: paths.Path, path: str, split: str, info: dict) -> None:
    """Copies the parts of a split's records that are not here yet."""
    crc = np.load(os.path.join(path, f'{split}.crc.npy'))
    if info['format'] != 'u8':
        offsets = np.load(os.path.join(path, f'{split}.offsets.npy'))
    else:
        offsets = np.arange(len(crc) + 1, dtype=np.int64) * info['size'] ** 2 * 3
    size = _size(remote)
    if len(offsets) != len(crc) + 1 or size != offsets[-1]:
        raise _damaged(remote, f'{size} bytes, not {offsets[-1]}')
    target = os.path.join(path, remote.name)
    temporary = f'{target}.tmp'
    began, copied = time.monotonic(), 0
    whole = os.path.exists(target)
    records = Records(remote, target if whole else temporary, offsets, crc)
    with open(records.local, 'ab') as file:
        file.truncate(size)
    for count in ordered_map(
        lambda part: _copy_part(records, *part),
        records.parts(),
        threads=THREADS,
        ahead=2 * THREADS,
    ):
        copied += count
    if not whole:
        os.replace(temporary, target)
    say(_line(remote, size, began if copied else None))


def _copy_part(records: Records, first: int, end: int) -> int:
    """Copies some records, unless they are here -> bytes copied."""
    start, stop = records.offsets[first], records.offsets[end]

    def matches(i: int, record: bytes) -> bool:
        return zlib.crc32(record) == records.crc[i]

    def is_whole(data: bytes) -> bool:
        view = memoryview(data)
        bounds = (records.offsets[first : end + 1] - start).tolist()
        return len(data) == stop - start and all(
            matches(i, view[low:high])
            for i, low, high in zip(range(first, end), bounds, bounds[1:], strict=False)
        )

    with open(records.local, 'r+b') as file:

        def local(i: int) -> bytes:
            low, high = records.offsets[i : i + 2].tolist()
            return os.pread(file.fileno(), high - low, low)

        if all(matches(i, local(i)) for i in range(first, end)):
            return 0
        file.seek(start)
        file.write(_fetch(records.remote, is_whole, int(start), int(stop - start)))
        file.flush()
        os.fsync(file.fileno())
    return int(stop - start)


def _fetch(
    remote: paths.Path, is_whole: Callable[[bytes], bool], start: int = 0, size: int = -1
) -> bytes:
    for _ in range(TRIES):
        data = _read(remote, start, size)
        if is_whole(data):
            return data
    raise _damaged(remote, f'bytes {start:,} to {start + len(data):,} fail their CRC-32')


def _read(remote: paths.Path, start: int = 0, size: int = -1) -> bytes:
    try:
        with remote.open('rb') as file:
            file.seek(start)
            return file.read(size) if size >= 0 else file.read()
    except Exception as error:  # the libraries for buckets have errors of their own
        raise _unreadable(remote, error) from error


def _size(remote: paths.Path) -> int:
    try:
        return remote.stat().length
    except Exception as error:
        raise _unreadable(remote, error) from error


def _unreadable(remote: paths.Path, error: Exception) -> UserError:
    if isinstance(error, ImportError):
        return UserError(
            f'{remote}: a bucket needs more packages ({reason(error)}): pip install gcsfs '
            'google-cloud-storage, or TensorFlow'
        )
    return UserError(
        f'{remote}: cannot be read ({reason(error)}): give --store=gs://BUCKET/STORE of a complete '
        'store, or get access to it (gcloud auth application-default login)'
    )


def _check_disk(remote: paths.Path, path: str, sizes: dict[str, int]) -> None:
    here = [os.path.join(path, f'{name}{end}') for name in sizes for end in ('', '.tmp')]
    allocated = sum(os.stat(file).st_blocks * 512 for file in here if os.path.exists(file))
    total, free = sum(sizes.values()), shutil.disk_usage(path).free
    text = f'{total / 1e9:.2f} GB ({free / 1e9:.2f} GB are free)'
    if free < total - allocated:
        raise UserError(
            f'{path}: not enough disk space for a copy of {remote}, {text}: make room, or make data/ '
            'a link to a larger disk'
        )
    say(f'{remote}: copying to {path}, {text}')


def _damaged(file: paths.Path, why: str) -> UserError:
    return UserError(f'{file} is damaged ({why}): copy the store there again')


def _line(remote: paths.Path, size: int, began: float | None) -> str:
    took = 'already here' if began is None else f'copied in {time.monotonic() - began:.1f} s'
    return f'{remote}: {size / 1e6:,.3f} MB, {took}'
