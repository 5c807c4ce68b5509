"""A fake of Google Cloud Storage: `from tests.helpers.buckets import Bucket, mounted, serve`.

Two libraries access a bucket. tensorstore, for the arrays of checkpoints, speaks HTTP: its client talks
to a small server here. etils.epath, for all other files, has a table of file systems, into which
`mounted` puts a stand-in for TensorFlow's. Both work on the same dict, in which nothing can be appended
or renamed.
"""

import contextlib
import fnmatch
import http.server
import io
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils.epath import backend, gpath, stat_utils


class Bucket:
    """The objects of all buckets, by '<bucket>/<name>', and every write in order."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # content, generation
        self.written: list[tuple[str, bytes]] = []
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> int:
        with self.lock:
            self.written.append((name, content))
            self.objects[name] = content, len(self.written)
            return len(self.written)

    def put_folder(self, name: str, folder: Path) -> None:
        """Puts the files of a folder below a name, as `gcloud storage cp -r` does."""
        for file in folder.iterdir():
            self.put(f'{name}/{file.name}', file.read_bytes())

    def names(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def remove(self, prefix: str) -> list[str]:
        with self.lock:
            return [
                self.objects.pop(name) for name in list(self.objects) if name.startswith(prefix)
            ]


class FileSystem(backend.Backend):
    """The file system interface of epath, behaving like TensorFlow's for buckets."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket

    @contextlib.contextmanager
    def open(self, path, mode):
        if mode in ('w', 'wb'):
            file = io.BytesIO()
            yield file if mode == 'wb' else io.TextIOWrapper(file, write_through=True)
            self.bucket.put(object_name(path), file.getvalue())
        elif mode in ('r', 'rb'):
            if object_name(path) not in self.bucket.objects:
                raise FileNotFoundError(f'404: {path}')
            file = io.BytesIO(self.bucket.objects[object_name(path)][0])
            yield file if mode == 'rb' else io.TextIOWrapper(file)
        else:
            raise AssertionError(f'{path}: a bucket has no mode {mode}')

    def exists(self, path):
        return object_name(path) in self.bucket.objects or self.isdir(path)

    def isdir(self, path):
        return bool(self.bucket.names(object_name(path) + '/'))

    def listdir(self, path):
        folder = object_name(path) + '/'
        if not self.isdir(path):
            raise FileNotFoundError(f'404: {path}')
        below = [name.removeprefix(folder) for name in self.bucket.names(folder)]
        return sorted({re.match('[^/]*/?', name)[0] for name in below} - {''})

    def makedirs(self, path, *, exist_ok=False, mode=None):
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)
        if not self.exists(path):
            self.bucket.put(object_name(path) + '/', b'')  # how TensorFlow marks a folder

    mkdir = makedirs

    def rmtree(self, path):
        if not self.bucket.remove(object_name(path) + '/'):
            raise FileNotFoundError(f'404: {path}')

    def remove(self, path):
        if self.bucket.objects.pop(object_name(path), None) is None:
            raise FileNotFoundError(f'404: {path}')

    def glob(self, path):
        folder, _, pattern = os.fspath(path).rpartition('/')
        names = [name.rstrip('/') for name in self.listdir(folder)] if self.isdir(folder) else []
        return [f'{folder}/{name}' for name in fnmatch.filter(names, pattern)]

    def stat(self, path):
        if not self.exists(path):
            raise FileNotFoundError(f'404: {path}')
        length = 0 if self.isdir(path) else len(self.bucket.objects[object_name(path)][0])
        return stat_utils.StatResult(self.isdir(path), length, 0, None, None, None)

    def _refuse(self, *args, **kwargs):
        raise AssertionError(f'a bucket cannot do this: {args}')

    rename = replace = copy = walk = _refuse


def object_name(path) -> str:
    return os.fspath(path).removeprefix('gs://').rstrip('/')


class Server(http.server.BaseHTTPRequestHandler):
    """The part of Google Cloud Storage's JSON API that tensorstore uses."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # headers and content are sent separately: 40 ms each
    bucket: Bucket

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        found = re.fullmatch(r'(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?', url.path)
        name = query.get('name') or urllib.parse.unquote(found[2] or '')
        if not name:
            prefix = f'{found[1]}/{query.get("prefix", "")}'
            items = [self.describe(n, found[1]) for n in self.bucket.names(prefix)]
            return self.answer(200, json.dumps({'items': items}).encode())
        name = f'{found[1]}/{name}'
        content, generation = self.bucket.objects.get(name, (b'', 0))
        if query.get('ifGenerationMatch', str(generation)) != str(generation):
            return self.answer(412)
        if self.command == 'POST':
            self.bucket.put(name, body)
            return self.answer(200, json.dumps(self.describe(name, found[1])).encode())
        if not generation:
            return self.answer(404)
        if query.get('ifGenerationNotMatch') == str(generation):
            return self.answer(304)
        if self.command == 'DELETE':
            self.bucket.objects.pop(name, None)
            return self.answer(204)
        return self.send_content(content, generation)

    do_GET = do_POST = do_DELETE = handle_one

    def describe(self, name, bucket):
        content, generation = self.bucket.objects[name]
        return {
            'name': name.removeprefix(f'{bucket}/'),
            'size': str(len(content)),
            'generation': str(generation),
        }

    def send_content(self, content, generation):
        headers = {'x-goog-generation': generation}
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if part is None:
            return self.answer(200, content, headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if first > last:
            return self.answer(416)
        headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        return self.answer(206, content[first : last + 1], headers)

    def answer(self, status, content=b'', headers=None):
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def mounted(bucket: Bucket) -> Iterator[pytest.MonkeyPatch]:
    """Makes gs:// stand for `bucket` in epath until the block ends; yields the patch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpath, '_is_tf_installed', lambda: False)
        patch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', FileSystem(bucket))
        yield patch


@contextlib.contextmanager
def serve(bucket: Bucket) -> Iterator[str]:
    """A server of the JSON API, for tensorstore -> its URL."""
    handler = type('Handler', (Server,), {'bucket': bucket})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
