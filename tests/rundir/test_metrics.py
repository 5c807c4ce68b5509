"""Metrics: exact errors, rows that survive kills, and TensorBoard files without TensorFlow."""

import io
import json
import os
import pathlib
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.common.errors import UserError
from alexnet_jax.rundir import metrics
from tests.helpers import ROOT


def write_lines(workdir, *lines):
    (workdir / metrics.FILE).write_bytes(b''.join(lines))


def line(kind, step, **values):
    return (json.dumps({'kind': kind, 'step': step, **values}) + '\n').encode()


def test_rows_come_back_bit_for_bit(tmp_path):
    numbers = {
        'float': 0.1 + 0.2,
        'tiny': 5e-324,
        'float32': np.float32(0.1),
        'device': jnp.float32(1) / 3,
        'int': 2**53 + 1,
        'text': 'ümlaut',
        'list': [1, np.float64(2.5)],
        'nested': {'a': True},
    }
    writer = metrics.Writer(tmp_path, start=-1)
    writer.write('train', np.int64(7), numbers)
    assert metrics.read(tmp_path) == [  # before closing, since every row is flushed
        {
            'kind': 'train',
            'step': 7,
            **numbers,
            'float32': float(np.float32(0.1)),
            'device': float(np.float32(1) / np.float32(3)),
            'list': [1, 2.5],
        }
    ]
    writer.close()
    writer.close()


def test_every_row_is_on_the_disk_when_write_returns(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, start=-1)
    file, synced = tmp_path / metrics.FILE, []

    def fsync(descriptor):
        assert os.path.samestat(os.fstat(descriptor), os.stat(file))
        synced.append(file.read_bytes())

    monkeypatch.setattr(os, 'fsync', fsync)
    writer.write('train', 1, {})
    assert synced == [line('train', 1)]
    writer.write('eval', 2, {})
    assert synced[1:] == [line('train', 1) + line('eval', 2)]
    writer.close()


def test_not_a_number_is_null(tmp_path):
    writer = metrics.Writer(tmp_path, start=-1)
    values = {'a': float('nan'), 'b': np.float32('inf'), 'c': [jnp.array([-np.inf, 1])], 'd': None}
    writer.write('train', 0, values)
    writer.close()
    text = (tmp_path / metrics.FILE).read_text()
    assert (
        text
        == '{"kind": "train", "step": 0, "a": null, "b": null, "c": [[null, 1.0]], "d": null}\n'
    )


def test_going_on_removes_what_will_be_repeated(tmp_path):
    kept = [line('train', 8), line('eval', 8, e=1.5), line('train', 9), line('eval', 10)]
    repeated = [line('train', 10), line('train', 11), line('eval', 12), line('profile', 11)]
    write_lines(tmp_path, *kept, *repeated, b'{"kind": "train", "st')
    writer = metrics.Writer(tmp_path, start=10)
    assert (tmp_path / metrics.FILE).read_bytes() == b''.join(kept)
    writer.write('train', 10, {'loss': 1.0})
    writer.close()
    assert (tmp_path / metrics.FILE).read_bytes() == b''.join(kept) + line('train', 10, loss=1.0)
    assert sorted(os.listdir(tmp_path)) == [metrics.FILE, 'tensorboard']  # no temporary file


def test_starting_anew_removes_everything(tmp_path):
    write_lines(tmp_path, line('train', 0), line('eval', 0), line('eval', 5))
    metrics.Writer(tmp_path, start=-1).close()
    assert metrics.read(tmp_path) == []


@pytest.mark.parametrize(
    'tail',
    [
        b'{"kind": "train", "step": 2',
        b'{"kind": "train", "step": 2}',
        b'\0\0\0\0',
        b'\xff\n',
        b'7\n',
    ],
)
def test_a_torn_last_line(tmp_path, tail):
    write_lines(tmp_path, line('train', 1), tail)
    assert [row['step'] for row in metrics.read(tmp_path)] == [1]
    writer = metrics.Writer(tmp_path, start=2)
    writer.write('train', 2, {})
    writer.close()
    assert (tmp_path / metrics.FILE).read_bytes() == line('train', 1) + line('train', 2)


@pytest.mark.parametrize(
    'bad', [b'oops\n', b'{"kind": "train"}\n', b'{"step": 3}\n', b'\n', b'3\n']
)
def test_a_bad_line_in_the_middle_is_named_and_kept(tmp_path, bad):
    write_lines(tmp_path, line('train', 1), bad, line('train', 2))
    before = (tmp_path / metrics.FILE).read_bytes()
    with pytest.raises(UserError, match=r'metrics.jsonl: line 2 is not a row'):
        metrics.read(tmp_path)
    with pytest.raises(UserError, match=r'metrics.jsonl: line 2 is not a row'):
        metrics.Writer(tmp_path, start=1)
    assert (tmp_path / metrics.FILE).read_bytes() == before


def test_removing_is_all_or_nothing(tmp_path, monkeypatch):
    write_lines(tmp_path, line('train', 1), line('train', 2))
    before = (tmp_path / metrics.FILE).read_bytes()

    def killed(source, destination):
        assert pathlib.Path(source).read_bytes() == line('train', 1)  # complete before it counts
        assert pathlib.Path(destination).read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Writer(tmp_path, start=2)
    assert (tmp_path / metrics.FILE).read_bytes() == before
    monkeypatch.undo()
    metrics.Writer(tmp_path, start=2).close()
    assert (tmp_path / metrics.FILE).read_bytes() == line('train', 1)


def test_only_the_first_process_writes(tmp_path):
    writer = metrics.Writer(tmp_path / 'run', start=-1, active=False)
    writer.write('train', 0, {'loss': 1.0})
    writer.image('conv1', 0, np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert not (tmp_path / 'run').exists()
    assert metrics.read(tmp_path / 'run') == []


def test_tensorboard_reads_the_mirror(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    for start in (-1, 10):  # a resumed run adds a file
        writer = metrics.Writer(tmp_path, start=start)
        writer.write('train', start + 1, {'loss': 2.5, 'name': 'x', 'rate': np.float32(0.25)})
        writer.write('eval', start + 2, {'top1_error': 40, 'nothing': float('nan')})
        writer.image('conv1', start + 1, image)
        writer.close()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert set(events.Tags()['scalars']) == {
        *('train/loss', 'train/rate', 'eval/top1_error', 'eval/nothing')
    }
    assert [(e.step, e.value) for e in events.Scalars('train/loss')] == [(0, 2.5), (11, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars('eval/top1_error')] == [(1, 40), (12, 40)]
    assert np.isnan(events.Scalars('eval/nothing')[0].value)
    first, second = events.Images('conv1')
    assert (first.step, second.step, first.height, first.width) == (0, 11, 6, 9)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(first.encoded_image_string))), image
    )


def test_only_pictures_are_images(tmp_path):
    writer = metrics.Writer(tmp_path, start=-1)
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)):
        with pytest.raises(ValueError, match='conv1 is .*not uint8'):
            writer.image('conv1', 0, bad)
    writer.close()


def test_tensorflow_is_not_imported(tmp_path):
    code = f"""
import sys
import numpy as np
from alexnet_jax.rundir import metrics
writer = metrics.Writer({str(tmp_path)!r}, start=-1)
writer.write('train', 0, {{'loss': 1.0}})
writer.image('conv1', 0, np.zeros((4, 4, 3), np.uint8))
writer.close()
sys.exit('tensorflow' in sys.modules)
"""
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=120)


def test_a_full_disk_is_reported(tmp_path):
    writer = metrics.Writer(tmp_path, start=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            UserError, match='metrics.jsonl: cannot be written .*; run the same command'
        ):
            for step in range(100):
                writer.write('train', step, {'loss': 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.close()
    rows = metrics.read(tmp_path)
    assert rows and [row['step'] for row in rows] == list(range(len(rows)))
