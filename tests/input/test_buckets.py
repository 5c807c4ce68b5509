"""Stores in buckets: copied whole, resumed, verified, by one process of several."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import buckets, prepare, store, store_writer
from alexnet_jax.training import inference
from tests.helpers import ROOT, fixtures, run_dirs
from tests.helpers.buckets import Bucket, mounted
from tests.helpers.stores import write_store

URL = 'gs://bucket/sets/flowers'
COPY = f'data/flowers-{hashlib.sha1(URL.encode()).hexdigest()[:8]}'


@pytest.fixture(scope='module', params=['jpg', 'u8'])
def made(request, tmp_path_factory):
    """A store on a local disk, of 18 and 5 images."""
    folder = tmp_path_factory.mktemp('made')
    fixtures.write_tree(folder / 'tree' / 'train', {'ape': 9, 'bee': 9})
    fixtures.write_tree(folder / 'tree' / 'val', {'ape': 2, 'bee': 3}, seed=1000)
    tree, path = str(folder / 'tree'), str(folder / 'store')
    return prepare.prepare(tree, store=path, size=24, format=request.param)


@pytest.fixture
def bucket(made, tmp_path, monkeypatch):
    """The store in a bucket, and an empty working directory; parts are a few records long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(buckets, 'PART', 4000)
    bucket = Bucket()
    bucket.put_folder('bucket/sets/flowers', made.path)
    with mounted(bucket):
        yield bucket


@pytest.fixture
def reads(monkeypatch):
    """What is read from the bucket: (name, start) -> how often."""
    counts, lock, real = collections.Counter(), threading.Lock(), buckets._read

    def read(remote, start=0, size=-1):
        with lock:
            counts[remote.name, start] += 1
        return real(remote, start, size)

    monkeypatch.setattr(buckets, '_read', read)
    return counts


def contents(folder) -> dict[str, bytes]:
    return {name: open(os.path.join(folder, name), 'rb').read() for name in os.listdir(folder)}


def ensure(made, url=URL):
    return prepare.ensure(source='tree', store=url, size=24, format=made.format, alone=False)


def test_a_store_is_copied_once(made, bucket, reads, capsys):
    opened = ensure(made)
    assert str(opened.path) == COPY
    assert contents(COPY) == contents(made.path)
    store.verify(opened)
    assert opened.identity() == made.identity()
    assert max(reads.values()) == 1
    assert len([name for name, _ in reads if name == f'train.{made.format}']) > 3
    lines = capsys.readouterr().out.splitlines()
    for name in {*os.listdir(made.path)} - {'store.json'}:
        size = os.path.getsize(made.path / name) / 1e6
        (line,) = [line for line in lines if line.startswith(f'{URL}/{name}: ')]
        assert re.fullmatch(rf'.*: {size:.3f} MB, copied in [0-9.]+ s', line)

    reads.clear()
    assert ensure(made, f'{URL}/').path == opened.path
    assert [*reads] == [('store.json', 0)]
    bucket.remove('bucket/')  # no longer there, or out of reach
    assert ensure(made).path == opened.path
    out = capsys.readouterr().out
    assert f'{URL}/store.json: cannot be read' in out and f'; using the copy in {COPY}' in out


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the library may catch it."""


def test_a_killed_copy_resumes(made, bucket, reads, monkeypatch):
    monkeypatch.setattr(buckets, 'THREADS', 1)
    monkeypatch.setattr(buckets, 'ordered_map', lambda function, items, **_: map(function, items))
    counting, total = buckets._read, collections.Counter()

    def kill(remote, start=0, size=-1):
        if sum(reads.values()) == 4:  # three files or parts in every start, after store.json
            raise Killed
        return counting(remote, start, size)

    monkeypatch.setattr(buckets, '_read', kill)
    for starts in range(1, 100):  # noqa: B007  read below
        reads.clear()
        try:
            ensure(made)
            break
        except Killed:
            assert not os.path.exists(f'{COPY}/store.json')
            total += reads
            for name in os.listdir(COPY):
                if name.endswith('.tmp'):  # a torn write
                    with open(f'{COPY}/{name}', 'ab') as file:
                        file.write(b'torn')
    total += reads
    assert starts > 4
    del total['store.json', 0]
    assert max(total.values()) == 1  # nothing that was whole is read again
    assert contents(COPY) == contents(made.path)


def test_what_is_damaged_on_the_disk_is_copied_again(made, bucket, reads):
    ensure(made)
    os.remove(f'{COPY}/store.json')
    for name in (f'train.{made.format}', 'names.txt'):
        data = bytearray(open(f'{COPY}/{name}', 'rb').read())
        data[-1] ^= 1
        open(f'{COPY}/{name}', 'wb').write(data)
    reads.clear()
    ensure(made)
    assert len(reads) == 3
    assert contents(COPY) == contents(made.path)


def test_a_transfer_that_fails_once_is_repeated(made, bucket, monkeypatch):
    real, seen = buckets._read, set()

    def read(remote, start=0, size=-1):
        data = bytearray(real(remote, start, size))
        if remote.name != 'store.json' and (remote.name, start) not in seen:
            seen.add((remote.name, start))
            data[len(data) // 2] ^= 4
        return bytes(data)

    monkeypatch.setattr(buckets, '_read', read)
    ensure(made)
    assert contents(COPY) == contents(made.path)


def change(bucket, name, function):
    content, _ = bucket.objects[f'bucket/sets/flowers/{name}']
    bucket.put(f'bucket/sets/flowers/{name}', function(content))


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def incomplete(data):
    info = json.loads(data) | {'complete': False}
    return json.dumps({k: info[k] for k in info if k not in ('crc', 'checksum')}).encode()


def elsewhere(data):
    info = json.loads(data) | {'counts': {'../../train': 18, 'val': 5}}
    return store.encode(info)


def records(made):
    return f'val.{made.format}'


BROKEN = {
    'no store': (lambda b, m: b.remove('bucket/'), f'{URL}/store.json: cannot be read .*404'),
    'no labels': (
        lambda b, m: b.remove('bucket/sets/flowers/val.labels.npy'),
        'flowers/val.labels.npy: cannot be read .*404',
    ),
    'no records': (
        lambda b, m: b.remove(f'bucket/sets/flowers/{records(m)}'),
        'flowers/val.(jpg|u8): cannot be read .*404',
    ),
    'incomplete': (
        lambda b, m: change(b, 'store.json', incomplete),
        f'{URL}: incomplete store: finish preparing it',
    ),
    'description': (lambda b, m: change(b, 'store.json', flip), 'flowers/store.json is damaged'),
    'elsewhere': (lambda b, m: change(b, 'store.json', elsewhere), 'store.json is damaged .*files'),
    'labels': (
        lambda b, m: change(b, 'train.labels.npy', flip),
        r'flowers/train.labels.npy is damaged \(bytes 0 to .* fail their CRC-32\): copy the store',
    ),
    'records': (
        lambda b, m: change(b, records(m), flip),
        r'flowers/val.(jpg|u8) is damaged \(bytes [1-9].* fail their CRC-32\): copy the store',
    ),
    'cut': (
        lambda b, m: change(b, records(m), lambda data: data[:-9]),
        r'flowers/val.(jpg|u8) is damaged \([0-9]+ bytes, not [0-9]+\): copy the store',
    ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_is_wrong_in_a_bucket_is_one_line(made, bucket, case):
    damage, message = BROKEN[case]
    damage(bucket, made)
    with pytest.raises(UserError, match=message) as error:
        ensure(made)
    assert '\n' not in str(error.value)
    assert not os.path.exists(f'{COPY}/store.json')
    if case not in ('labels', 'records', 'cut'):
        assert os.listdir() == []


def test_after_an_error_nothing_more_is_written(made, bucket, monkeypatch):
    """Another process may hold the lock by then."""
    change(bucket, 'train.labels.npy', flip)
    read = buckets._read

    def slow(remote, *args):
        if remote.name == 'val.labels.npy':
            time.sleep(0.5)  # the error comes first
        return read(remote, *args)

    monkeypatch.setattr(buckets, '_read', slow)
    with pytest.raises(UserError, match='train.labels.npy is damaged'):
        ensure(made)
    before = sorted(os.listdir(COPY))
    time.sleep(1)
    assert sorted(os.listdir(COPY)) == before


def test_too_small_a_disk(made, bucket, monkeypatch):
    usage = collections.namedtuple('usage', 'free')
    monkeypatch.setattr(buckets.shutil, 'disk_usage', lambda path: usage(1000))
    with pytest.raises(UserError, match=f'{COPY}: not enough disk space for a copy of {URL}, 0.0'):
        ensure(made)
    assert os.listdir() == []


def test_libraries_that_are_missing(made, bucket, monkeypatch):
    def missing(*args):
        raise ImportError('Please install gcsfs')

    monkeypatch.setattr(paths.Path(URL).__class__, 'open', missing)
    with pytest.raises(
        UserError, match=r'a bucket needs more packages .*gcsfs\): pip install gcsfs'
    ):
        ensure(made)
    with pytest.raises(UserError, match='s3://bucket/flowers: .* give a folder or gs://'):
        ensure(made, 's3://bucket/flowers')


def test_another_store_under_the_same_url(made, bucket):
    ensure(made)
    change(bucket, 'store.json', lambda data: store.encode(json.loads(data) | {'source': 'other'}))
    with pytest.raises(
        UserError, match=f'{COPY} is a copy of an earlier version of {URL}: remove it'
    ):
        ensure(made)


def test_a_store_without_checksums(made, bucket, tmp_path):
    """As earlier versions wrote it: only the records have checksums."""
    write_store(tmp_path / 'old', format=made.format, size=24)
    bucket.put_folder('bucket/old', tmp_path / 'old')
    opened = ensure(made, 'gs://bucket/old')
    store.verify(opened)
    assert contents(opened.path) == contents(tmp_path / 'old')


def test_another_size_is_refused(made, bucket):
    with pytest.raises(UserError, match=f'{COPY} is a different store .size 24, not 32'):
        prepare.ensure(source='tree', store=URL, size=32, format=made.format)


def test_prepare_writes_to_no_bucket(bucket):
    with pytest.raises(UserError, match='writes to a local disk: .* gcloud storage cp -r FOLDER'):
        prepare.prepare('tree', store=URL)
    with pytest.raises(UserError, match=f'{URL}: this needs a store on a local disk'):
        store.open_store(URL)
    assert os.listdir() == []


def test_evaluation_opens_a_store_in_a_bucket(tmp_path, monkeypatch):
    run = run_dirs.write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    bucket = Bucket()
    bucket.put_folder('bucket/made', tmp_path / 'store')
    with mounted(bucket):
        opened = inference.open_store([inference.describe_run(run.path)], 'gs://bucket/made')
    assert str(opened.path).startswith('data/made-')
    np.testing.assert_array_equal(opened.pixels('val'), run.pictures['val'])


PROGRAM = """
import pathlib, sys, time
from alexnet_jax.input import buckets, prepare, store
from tests.helpers.buckets import Bucket, mounted
folder, format = sys.argv[1:]
bucket, read = Bucket(), buckets._read
bucket.put_folder('bucket/sets/flowers', pathlib.Path(folder))
def slow(remote, start=0, size=-1):
    if remote.name != 'store.json':
        with open('reads', 'a') as file:
            file.write(f'{remote.name} {start}\\n')
        time.sleep(0.2)
    return read(remote, start, size)
buckets._read, buckets.PART = slow, 4000
with mounted(bucket):
    print('ready', flush=True)
    sys.stdin.readline()
    opened = prepare.ensure(source='x', store='gs://bucket/sets/flowers', size=24, format=format)
store.verify(opened)
print(opened.path, opened.identity())
"""


@pytest.mark.slow
@pytest.mark.parametrize('kill', [False, True])
def test_two_processes_on_a_host(made, tmp_path, kill):
    """One copies, the other waits; if the first is killed, the other one takes over."""
    command = [sys.executable, '-c', PROGRAM, str(made.path), made.format]
    pipes = {name: subprocess.PIPE for name in ('stdin', 'stdout', 'stderr')}
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == 'ready\n'
        for process in processes:  # at the same moment
            process.stdin.write('\n')
            process.stdin.flush()
        if kill:
            said = {process.stdout.readline(): process for process in processes}
            (holder,) = [one for line, one in said.items() if 'copying to' in line]
            assert any('waiting for another process that is copying it' in line for line in said)
            holder.kill()
            processes.remove(holder)
            holder.communicate()
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        assert out.endswith(f'{COPY} {made.identity()}\n')
    reads = (tmp_path / 'reads').read_text().splitlines()
    if not kill:
        assert len(reads) == len({*reads})  # each part by one of them
        assert sum('copying to' in out for out, _ in outputs) == 1
        assert sum('waiting for another process' in out for out, _ in outputs) == 1
    assert contents(tmp_path / COPY) == contents(made.path)
    assert store_writer.LOCK not in os.listdir(tmp_path / COPY)
