"""Paths of run directories: on a disk, or in a bucket of Google Cloud Storage, gs://BUCKET/RUN.

All are etils.epath's, which has pathlib's methods for both. In a bucket nothing can be appended to,
locked or renamed, but an object appears whole or not at all.
"""

import errno
import os
import uuid
from collections.abc import Callable
from typing import BinaryIO

from etils import epath

from alexnet_jax.common.errors import UserError, reason

BUCKET = 'gs://'
Path = epath.Path


def path(name: str | os.PathLike) -> Path:
    """A path; UserError for a URL other than gs://..."""
    text = os.fspath(name)
    if '://' in text and not text.startswith(BUCKET):
        raise UserError(f'{text}: give a folder, or {BUCKET}BUCKET/RUN')
    if text.startswith(('/gs/', '/s3/')):
        raise UserError(f'{text}: etils takes this for a bucket; give another folder')
    return Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path: Path) -> Path:
    """The same without regard to the current folder."""
    return path if is_remote(path) else path.absolute()


def existing(path: Path) -> Path:
    """The nearest that is there, `path` or a folder above it; a bucket has no folders: `path`."""
    if is_remote(path):
        return path
    return next(there for there in (path, *path.absolute().parents) if there.exists())


def replace(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all: after a kill the old one or the new one is there.

    content: the bytes, or a function that writes them to a file on a disk, such as np.save.
    """
    if is_remote(path):
        Path(path).write_bytes(content)
        return
    temporary = f'{os.fspath(path)}.tmp'
    with open(temporary, 'wb') as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def failures(path: Path) -> type[Exception]:
    """What to catch where a path is used: the libraries for buckets have errors of their own."""
    return Exception if is_remote(path) else OSError


def full(error: Exception) -> str:
    """The start of a message about an error of writing: what to do if the disk is full, or ''."""
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return 'the disk is full, make room: ' if any(text in str(error) for text in texts) else ''


def try_bucket(path: Path) -> None:
    """UserError if nothing can be written to and removed from `path`, or a package is missing."""
    try:
        from google.cloud import storage  # orbax asks it for the kind of the bucket

        storage.Client().get_bucket(str(path).removeprefix(BUCKET).partition('/')[0])
        probe = path / f'.alexnet_jax-{uuid.uuid4().hex}'
        probe.write_bytes(b'')
        probe.unlink()
    except ImportError as error:
        raise UserError(
            f'--workdir={path}: a bucket needs more packages ({reason(error)}): '
            'pip install google-cloud-storage, and gcsfs where TensorFlow is not installed'
        ) from error
    except Exception as error:
        raise UserError(
            f'--workdir={path}: cannot be written to ({reason(error)}); give another, or get '
            'access to it (gcloud auth application-default login)'
        ) from error
