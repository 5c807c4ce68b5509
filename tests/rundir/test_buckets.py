"""Run directories in a fake bucket: train, stop, resume, evaluate, and damage.

google-cloud-storage, which orbax uses to query the type of bucket, is a fake as well.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import alexnet_jax
from alexnet_jax import figures
from alexnet_jax.common import paths
from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.devices import distributed
from alexnet_jax.input.store import open_store
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import directory, metrics
from alexnet_jax.rundir.checkpoint import Checkpoints, SaveError
from alexnet_jax.training import checks, evaluation, loop, progress
from tests.helpers.buckets import Bucket, mounted, object_name, serve
from tests.helpers.stores import write_store
from tests.training.test_loop import BATCH, EXAMPLES, make_config


@pytest.fixture(scope='module')
def bucket():
    made = Bucket()
    storage = types.ModuleType('google.cloud.storage')
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: None)
    with serve(made) as url, mounted(made) as patch:
        patch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
        patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'token')
        patch.setenv('no_proxy', '127.0.0.1')
        patch.setitem(sys.modules, 'google.cloud.storage', storage)
        yield made


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
    sums = evaluation.compare([run, tmp_path / 'run'], views=('center',), batch=BATCH)
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
        UserError, match='gs://bucket/run holds a run with a different config .*optim.momentum'
    ):
        loop.train(make_config(store, **{'optim.momentum': 0.5}), run)


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
    damage(bucket, object_name(saved.directory / '2'))
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
    assert bucket.names(object_name(saved.directory / '1')) == []


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
    with pytest.raises(UserError, match='etils would treat this as a bucket'):
        paths.path('/hf/run')
    with pytest.raises(UserError, match=r'gs://bucket/a\[b]: \[ would be taken for a pattern'):
        paths.path('gs://bucket/a[b]')
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


def test_what_commands_write_by_default_goes_to_the_bucket(bucket, store, monkeypatch, capsys):
    """A failure to write is one line that names the file."""
    directory.write(make_config(store), paths.path('gs://bucket/run'), open_store(store))
    args = argparse.Namespace(run='gs://bucket/run', output=None)
    name = figures.output(args, 'features-fc7.npz')
    assert name == 'gs://bucket/run/features-fc7.npz'
    figures.write(name, lambda file: np.savez(file, features=np.arange(3)))
    assert capsys.readouterr().out == f'wrote {name}\n'
    with np.load(io.BytesIO(bucket.objects['bucket/run/features-fc7.npz'][0])) as found:
        assert found['features'].tolist() == [0, 1, 2]

    def deny(*args):
        raise RuntimeError('403:\nno access')

    monkeypatch.setattr(Bucket, 'put', deny)
    with pytest.raises(
        UserError, match='features-fc7.npz: cannot be written .RuntimeError: 403: no'
    ):
        figures.write(name, b'content')
