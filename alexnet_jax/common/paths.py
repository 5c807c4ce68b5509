"""Paths of run directories: on disk, or in a Google Cloud Storage bucket, gs://BUCKET/RUN.

Both are `etils.epath` paths, with pathlib's methods. Objects in a bucket cannot be appended to, locked
or renamed, but each appears whole or not at all.
"""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import tempfile
import uuid
from collections.abc import Callable
from typing import BinaryIO

from etils import epath

from alexnet_jax.common.errors import UserError, reason

BUCKET = 'gs://'
SCHEMES = ('gs', 's3', 'az', 'hf')  # etils takes /gs/x for gs://x
PLAIN = r'[\w/.+,=@~ -]*'  # paths that every library takes literally
Path = epath.Path


def path(name: str | os.PathLike) -> Path:
    """Makes a path; UserError for URLs other than gs://..."""
    text = os.fspath(name)
    if '://' in text and not text.startswith(BUCKET):
        raise UserError(f'{text}: not supported; give a folder or {BUCKET}BUCKET/RUN')
    if text.startswith(BUCKET):
        if pattern := re.search(r'[][*?\\]', text):
            raise UserError(
                f'{text}: {pattern[0]} would be taken for a pattern; give another folder'
            )
    elif os.path.abspath(text).split('/')[1] in SCHEMES:
        raise UserError(f'{text}: etils would treat this as a bucket; give another folder')
    return Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKET)


def absolute(path: Path) -> Path:
    """The absolute path; paths in a bucket already are."""
    return path if is_remote(path) else path.absolute()


def plain(folder: Path) -> Path:
    """A path to an absolute folder that every library accepts: its own or, if unusual, that of a link to it.

    etils takes brackets for a pattern and tensorstore a backslash for a slash; others want UTF-8.
    Raises UserError if the temporary folder, where the link is, has such a path too.
    """
    if is_remote(folder) or re.fullmatch(PLAIN, str(folder)):
        return folder
    links = _links().name
    if not re.fullmatch(PLAIN, links):
        raise UserError(f'TMPDIR={os.path.dirname(links)}: set it to a folder such as /tmp')
    link = os.path.join(links, hashlib.sha1(os.fsencode(folder)).hexdigest())
    if not os.path.islink(link):
        os.symlink(folder, link)
    return Path(link)


@functools.cache
def _links() -> tempfile.TemporaryDirectory:
    """The folder of the links that `plain` makes; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix='alexnet_jax-')


def existing(path: Path) -> Path:
    """`path` or its nearest parent that exists; always `path` in a bucket, which has no folders."""
    if is_remote(path):
        return path
    return next(there for there in (path, *path.absolute().parents) if there.exists())


def check_links(name: str, path: Path) -> None:
    """Raises UserError for a path on disk that leads through a dangling link; name: its flag."""
    if is_remote(path):
        return
    for there in (path, *path.absolute().parents):
        if os.path.islink(there) and not there.exists():
            raise UserError(
                f'{name}: {there} is a link to {os.readlink(there)}, which does not exist; create or mount '
                'that, or give another path'
            )


def replace(path: str | os.PathLike, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file atomically: after a kill, either the old or the new one exists.

    content: the bytes, or a function that writes them to an open file.
    """
    if is_remote(path):
        if callable(content):
            buffer = io.BytesIO()
            content(buffer)
            content = buffer.getvalue()
        Path(path).write_bytes(content)
        return
    temporary = f'{os.fspath(path)}.tmp'
    try:
        with open(temporary, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # part of a file would keep a full disk full
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def failures(path: Path) -> type[Exception]:
    """The exception to catch when using a path: bucket libraries raise errors of their own."""
    return Exception if is_remote(path) else OSError


def full(error: Exception) -> str:
    """A prefix for the message of a write error: what to do if the disk is full, else ''."""
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return 'disk full, free some space: ' if any(text in str(error) for text in texts) else ''


def try_bucket(path: Path) -> None:
    """Raises UserError if files cannot be written to and removed from `path`, or a package is missing."""
    try:
        from google.cloud import storage  # orbax uses it to query the type of bucket

        storage.Client().get_bucket(str(path).removeprefix(BUCKET).partition('/')[0])
        probe = path / f'.alexnet_jax-{uuid.uuid4().hex}'
        probe.write_bytes(b'')
        probe.unlink()
    except ImportError as error:
        raise UserError(
            f'--workdir={path}: buckets need more packages ({reason(error)}): '
            'pip install google-cloud-storage, and gcsfs if TensorFlow is not installed'
        ) from error
    except Exception as error:
        raise UserError(
            f'--workdir={path}: cannot be written to ({reason(error)}); give another, or get '
            'access (gcloud auth application-default login)'
        ) from error
