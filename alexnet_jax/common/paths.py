"""Where run directories are: on a disk, or in a bucket of Google Cloud Storage, gs://BUCKET/RUN.

A path on a disk is pathlib's; one in a bucket is etils.epath's, which has the same methods. In a
bucket nothing can be appended to, locked or renamed, but an object appears whole or not at all.
"""

import errno
import os
import pathlib
import uuid

from etils import epath

from alexnet_jax.common.errors import UserError

BUCKET = 'gs://'
Path = pathlib.Path | epath.Path


def path(name: str | os.PathLike) -> Path:
    """A path, to be made before anything is joined to it: pathlib turns gs://b into gs:/b."""
    text = os.fspath(name)
    if '://' in text and not text.startswith(BUCKET):
        raise UserError(f'{text}: give a folder, or {BUCKET}BUCKET/RUN')
    return epath.Path(text) if text.startswith(BUCKET) else pathlib.Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith(BUCKET)


def absolute(path: Path) -> Path:
    """The same without regard to the current folder."""
    return path if is_remote(path) else path.absolute()


def existing(path: Path) -> Path:
    """The nearest that is there, `path` or a folder above it; a bucket has no folders: `path`."""
    if is_remote(path):
        return path
    return next(there for there in (path, *path.absolute().parents) if there.exists())


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a kill in between leaves the one before."""
    if is_remote(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(f'{path.name}.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def failures(path: Path) -> type[Exception]:
    """What to catch where a path is used: the libraries for buckets have errors of their own."""
    return Exception if is_remote(path) else OSError


def reason(error: Exception) -> str:
    """One line about what went wrong with a path."""
    return ' '.join(str(getattr(error, 'strerror', None) or error).split())[:300]


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
