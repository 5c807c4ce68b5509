"""Run directories in a fake bucket: train, stop, resume, evaluate, and damage.

Two libraries access a bucket. tensorstore, for the arrays of checkpoints, speaks HTTP: its client talks
to a small server here. etils.epath, for all other files, has a table of file systems, into which these
tests put a stand-in for TensorFlow's. Both work on the same dict, in which nothing can be appended or
renamed. google-cloud-storage, which orbax uses to query the type of bucket, is a fake as well.
"""

import contextlib
import fnmatch
import http.server
import io
import json
import os
import re
import sys
import threading
import types
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend, gpath, stat_utils
from jax.experimental.compilation_cache import compilation_cache

import alexnet_jax
from alexnet_jax.common import paths
from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.devices import distributed
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import directory, metrics
from alexnet_jax.rundir.checkpoint import Checkpoints, SaveError
from alexnet_jax.training import checks, evaluation, loop, progress
from tests.helpers.stores import write_store
from tests.training.test_loop import BATCH, EXAMPLES, make_config


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
            self.bucket.put(_name(path), file.getvalue())
        elif mode in ('r', 'rb'):
            if _name(path) not in self.bucket.objects:
                raise FileNotFoundError(f'404: {path}')
            file = io.BytesIO(self.bucket.objects[_name(path)][0])
            yield file if mode == 'rb' else io.TextIOWrapper(file)
        else:
            raise AssertionError(f'{path}: a bucket has no mode {mode}')

    def exists(self, path):
        return _name(path) in self.bucket.objects or self.isdir(path)

    def isdir(self, path):
        return bool(self.bucket.names(_name(path) + '/'))

    def listdir(self, path):
        folder = _name(path) + '/'
        if not self.isdir(path):
            raise FileNotFoundError(f'404: {path}')
        below = [name.removeprefix(folder) for name in self.bucket.names(folder)]
        return sorted({re.match('[^/]*/?', name)[0] for name in below} - {''})

    def makedirs(self, path, *, exist_ok=False, mode=None):
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)
        if not self.exists(path):
            self.bucket.put(_name(path) + '/', b'')  # how TensorFlow marks a folder

    mkdir = makedirs

    def rmtree(self, path):
        if not self.bucket.remove(_name(path) + '/'):
            raise FileNotFoundError(f'404: {path}')

    def remove(self, path):
        if self.bucket.objects.pop(_name(path), None) is None:
            raise FileNotFoundError(f'404: {path}')

    def glob(self, path):
        folder, _, pattern = os.fspath(path).rpartition('/')
        names = [name.rstrip('/') for name in self.listdir(folder)] if self.isdir(folder) else []
        return [f'{folder}/{name}' for name in fnmatch.filter(names, pattern)]

    def stat(self, path):
        length = 0 if self.isdir(path) else len(self.bucket.objects[_name(path)][0])
        return stat_utils.StatResult(self.isdir(path), length, 0, None, None, None)

    def _refuse(self, *args, **kwargs):
        raise AssertionError(f'a bucket cannot do this: {args}')

    rename = replace = copy = walk = _refuse


def _name(path) -> str:
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


@pytest.fixture(scope='module')
def bucket():
    made = Bucket()
    handler = type('Handler', (Server,), {'bucket': made})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    storage = types.ModuleType('google.cloud.storage')
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TENSORSTORE_GCS_HTTP_URL', f'http://127.0.0.1:{server.server_port}')
        patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'token')
        patch.setenv('no_proxy', '127.0.0.1')
        patch.setattr(gpath, '_is_tf_installed', lambda: False)
        patch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', FileSystem(made))
        patch.setitem(sys.modules, 'google.cloud.storage', storage)
        yield made
    server.shutdown()
    server.server_close()


def truncate(bucket, prefix) -> str:
    """Halves the largest object with a prefix; returns its name."""
    name = max(bucket.names(prefix), key=lambda name: len(bucket.objects[name][0]))
    content, _ = bucket.objects[name]
    bucket.put(name, content[: len(content) // 2])
    return name


def outcome(workdir):
    """The last checkpoint's step, arrays and meta (history and running sums); the rows without times."""
    checkpoints = Checkpoints(paths.path(workdir) / 'checkpoints')
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step, state, meta = checkpoints.restore(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in checkpoints.shapes().items()
        }
    )
    rows = [
        {name: value for name, value in row.items() if name not in progress.TIMES}
        for row in metrics.read(workdir)
    ]
    return step, {name: np.asarray(leaf).tobytes() for name, leaf in state.items()}, meta, rows


@pytest.fixture
def compiled_once(tmp_path):
    """Three starts of the same programs: only the first compiles them."""
    cache = {
        'jax_compilation_cache_dir': str(tmp_path / 'cache'),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for values in (cache, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is cache:
            yield


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=72, classes=3, counts={'train': EXAMPLES, 'val': 7})
    return path


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket, store, compiled_once, tmp_path, caplog):
    """Stopped, last checkpoint truncated, resumed: the same bits as an uninterrupted run on disk."""
    caplog.set_level('INFO', 'alexnet_jax')
    changes = {'optim.epochs': 2.0, 'run.eval_every': 1.0, 'run.checkpoint_every': 1}
    config, run = make_config(store, **changes), 'gs://bucket/run'
    loop.train(config, tmp_path / 'run')
    with pytest.raises(Stopped, match='gs://bucket/run: stopped at step 4'):
        loop.train(make_config(store, **changes, **{'run.stop_after': '4'}), run)
    truncate(bucket, 'bucket/run/checkpoints/4/state/')
    loop.train(config, run)
    assert 'gs://bucket/run/checkpoints/4 is damaged, skipping it' in caplog.text
    assert 'resuming at step 3' in caplog.text
    expected = outcome(tmp_path / 'run')
    found = outcome(run)
    assert found[0] == expected[0] == 5
    assert [name for name in expected[1] if found[1][name] != expected[1][name]] == []
    assert found[2:] == expected[2:]

    # The same files exist (arrays and events have random names), so removed ones are gone.
    names = [name.removeprefix('bucket/run') for name in bucket.names('bucket/run/')]
    files = [path for path in (tmp_path / 'run').rglob('*') if path.is_file()]
    there, here = (
        {
            re.sub('/(state|tensorboard)/.*', '', name)
            for name in each
            if 'commit_success' not in name
        }
        for each in (
            [name for name in names if not name.endswith('/')],
            ['/' + str(path.relative_to(tmp_path / 'run')) for path in files],
        )
    )
    assert there == here
    assert len(bucket.names('bucket/run/tensorboard/events')) == 2
    # No checkpoint counts before the rows of its steps exist.
    rows, seen = b'', []
    for name, content in bucket.written:
        if name == 'bucket/run/metrics.jsonl':
            rows = content
        elif found := re.fullmatch('bucket/run/checkpoints/([0-9]+)/commit_success.txt', name):
            seen.append(int(found[1]))
            steps = [
                row['step'] for row in map(json.loads, rows.splitlines()) if row['kind'] == 'train'
            ]
            assert steps[: seen[-1]] == list(range(seen[-1]))
    assert seen == [1, 2, 3, 4, 4, 5]

    # Everything that reads a run reads this one.
    sums = evaluation.compare([run, tmp_path / 'run'], views=('centre',), batch=BATCH)
    there, here, _ = sums.values()
    assert list(sums)[0][0] == 'gs://bucket/run (step 5)'
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert there['count'] == 7
    assert alexnet_jax.load(run).step == 5
    config = make_config(store, **{'train.init_from': run})
    mesh, net = checks.check(config, tmp_path / 'next', build)
    setup = loop.Setup.make(config, mesh, loop.prepare.ensure(**config.data), net.clone(classes=3))
    state, _, _ = setup.start(Checkpoints(tmp_path / 'none'), run)
    kernel = state.params['conv3']['kernel']
    assert np.asarray(kernel).tobytes() == expected[1]['params/conv3/kernel']

    # Another config is refused, as on disk.
    with pytest.raises(
        UserError, match='gs://bucket/run holds a run of another config .*optim.epochs'
    ):
        loop.train(make_config(store), run)


STATE = {'a': jnp.arange(6000.0), 'b': {'c': jnp.ones((3, 5))}}
TARGET = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


def damage_nothing(bucket, step):
    pass


def truncate_arrays(bucket, step):
    truncate(bucket, f'{step}/state/')


def truncate_record(bucket, step):
    truncate(bucket, f'{step}/meta/metadata')


def lose_record(bucket, step):
    bucket.remove(f'{step}/meta/metadata')


def lose_arrays(bucket, step):
    assert bucket.remove(f'{step}/state/')


def flip_a_bit(bucket, step):
    name = max(bucket.names(f'{step}/state/'), key=lambda name: len(bucket.objects[name][0]))
    content = bytearray(bucket.objects[name][0])
    content[len(content) // 2] ^= 16
    bucket.put(name, bytes(content))


def leave_unfinished(bucket, step):
    assert bucket.remove(f'{step}/commit_success.txt')


@pytest.mark.parametrize(
    ('damage', 'step', 'warning'),
    [
        (damage_nothing, 2, ''),
        (truncate_arrays, 1, 'cannot be read'),
        (truncate_record, 1, 'meta/metadata cannot be read'),
        (lose_record, 1, 'meta/metadata cannot be read'),
        (lose_arrays, 1, 'cannot be read'),
        (flip_a_bit, 1, ''),
        (leave_unfinished, 1, None),
    ],
)
def test_damage_in_a_bucket(bucket, caplog, damage, step, warning):
    """Damaged checkpoints are skipped with a warning, unfinished ones without; later saves work."""
    saved = Checkpoints(f'gs://bucket/{damage.__name__}/checkpoints')
    for number in (1, 2):
        saved.save(number, jax.tree.map(lambda x, n=number: x + n, STATE), {'history': {}})
    saved.close()
    damage(bucket, _name(saved.directory / '2'))
    found, state, _ = saved.restore(TARGET)
    assert found == step
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y + step).all(), state, STATE)))
    skipped = [r.getMessage() for r in caplog.records if 'damaged, skipping it' in r.message]
    assert len(skipped) == (step == 1 and warning is not None)
    assert all(warning in message for message in skipped)
    assert saved.steps() == ([1] if warning is None else [1, 2])
    saved.save(2, STATE, {'history': {}})
    saved.close()
    assert saved.steps() == [1, 2]
    assert saved.restore(TARGET)[0] == 2
    saved.save(3, STATE, {'history': {}})
    saved.close()
    assert saved.steps() == [2, 3]
    assert bucket.names(_name(saved.directory / '1')) == []


def test_rows_reach_a_bucket_whole(bucket):
    run = 'gs://bucket/rows'
    with contextlib.closing(metrics.Writer(run, start=-1)) as writer:
        writer.write('train', 0, {'loss': 1.5})
        assert metrics.read(run) == []
        writer.sync()
        assert [row['step'] for row in metrics.read(run)] == [0]
        writer.write('train', 1, {'loss': 1.25})
    assert [row['step'] for row in metrics.read(run)] == [0, 1]
    with contextlib.closing(metrics.Writer(run, start=1)) as writer:
        writer.write('train', 1, {'loss': 1.0})
    assert metrics.read(run) == [
        {'kind': 'train', 'step': 0, 'loss': 1.5},
        {'kind': 'train', 'step': 1, 'loss': 1.0},
    ]
    events = bucket.names('bucket/rows/tensorboard/events')
    assert [b'train/loss' in bucket.objects[name][0] for name in events] == [True, True]
    bucket.put('bucket/rows/metrics.jsonl', b'nonsense\n{}\n')
    with pytest.raises(UserError, match='gs://bucket/rows/metrics.jsonl: line 1 is not a row'):
        metrics.Writer(run, start=1)


def test_a_bucket_that_fails(bucket, monkeypatch):
    """Any exception from the libraries becomes one line."""
    with pytest.raises(UserError, match='gs://bucket/none: not a run directory .*404'):
        directory.read_config('gs://bucket/none')
    with pytest.raises(UserError, match='s3://bucket/run: .* give a folder or gs://BUCKET/RUN'):
        paths.path('s3://bucket/run')
    with pytest.raises(UserError, match='/gs/run: .*would treat this as a bucket'):
        paths.path('/gs/run')
    workdir = paths.path('gs://bucket/new')
    before = dict(bucket.objects)
    directory.check(None, workdir)
    distributed.check_shared(workdir)
    assert bucket.objects == before  # the trial files are gone

    class Denied(Exception):
        pass

    def deny(*args):
        raise Denied('403:\nno access')

    writer = metrics.Writer(workdir, start=-1)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    monkeypatch.setattr(Bucket, 'put', deny)
    with pytest.raises(
        UserError, match=r'--workdir=gs://bucket/new: .* \(Denied: 403: no access\); give'
    ) as error:
        directory.check(None, workdir)
    assert '\n' not in str(error.value)
    with pytest.raises(
        UserError, match='gs://bucket/new/metrics.jsonl: .*403: no access.* to resume'
    ):
        writer.sync()
    writer.close()
    with pytest.raises(SaveError, match='gs://bucket/new/checkpoints: .*403: no access'):
        checkpoints.save(1, STATE, {})
    monkeypatch.setitem(sys.modules, 'google.cloud.storage', None)
    with pytest.raises(UserError, match='pip install google-cloud-storage'):
        directory.check(None, workdir)
