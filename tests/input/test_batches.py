"""Batches have the pixels of an independent decode, for every reader, choice of rows and start."""

import atexit
import gc
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import batches, sampler
from alexnet_jax.input.batches import eval_batches, fake_batches, train_batches
from alexnet_jax.input.store import open_store
from tests.helpers.stores import write_store

READERS = [(format, reader) for format in ('jpg', 'u8') for reader in ('tf', 'threads')]
SIZE, CROP, COUNT = 40, 25, 20  # 25: crops at odd offsets, and wider than a JPEG block


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
    """{format: (the store, its images by split, decoded by PIL)}."""
    made = {}
    for format in ('jpg', 'u8'):
        path = tmp_path_factory.mktemp(format)
        pictures = write_store(
            path, format=format, size=SIZE, counts={'train': COUNT, 'val': 10}, classes=7
        )
        made[format] = open_store(path), pictures
    return made


def train(store, **changes):
    kwargs = dict(seed=3, batch=8, start=0, stop=4, crop=CROP, chunk=1, random=True, threads=2)
    kwargs |= changes
    kwargs.setdefault('rows', np.arange(kwargs['batch']))
    return train_batches(store, **kwargs)


def assert_equal(batch, other, rows=slice(None)):
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype
        np.testing.assert_array_equal(batch[name], other[name][rows], err_msg=name)


@pytest.mark.parametrize('format, reader', READERS)
@pytest.mark.parametrize('chunk', [1, 4])
def test_train_batches_equal_an_independent_decode(stores, format, reader, chunk):
    store, pictures = stores[format]
    batch, room = 8, SIZE - CROP
    # 5 steps are 40 positions: two epochs, and the third batch spans both.
    steps = list(train(store, stop=5, batch=batch, reader=reader, chunk=chunk))
    records = sampler.records(3, np.arange(5 * batch), COUNT)
    draws = sampler.draws(3, 0, 5 * batch, room=room, chunk=chunk)
    assert {0, room} <= set(draws.y.tolist() + draws.x.tolist()) or chunk > 1
    expected = []
    for record, y, x, flip in zip(records, *draws[:3], strict=True):
        crop = pictures['train'][record][y : y + CROP, x : x + CROP]
        expected.append(crop[:, ::-1] if flip else crop)
    assert len(steps) == 5
    for s, got in enumerate(steps):
        here = slice(s * batch, (s + 1) * batch)
        wanted = {
            'image': np.stack(expected[here]),
            'z': draws.z[here],
            'label': (records[here] % 7).astype(np.int32),
        }
        assert_equal(got, wanted)


@pytest.mark.parametrize('reader', ['tf', 'threads'])
@pytest.mark.parametrize('x', range(33))
def test_every_column_of_a_jpeg_crop(photograph, x, reader, monkeypatch):
    # Cropping while decoding changes the columns at the edges of a crop, so every offset is
    # compared, at the size of the real store.
    store, pictures = photograph
    y = (x * 7) % 33

    def draws(seed, first, count, *, room, chunk):
        offset = np.full(count, 0, np.int32)
        flip = np.arange(count) % 2 == 1
        return sampler.Draws(offset + y, offset + x, flip, np.zeros((count, 3), np.float32))

    monkeypatch.setattr(batches.sampler, 'draws', draws)
    (got,) = train(store, batch=2, stop=1, crop=224, reader=reader)
    records = sampler.records(3, np.arange(2), 2)
    crops = pictures['train'][records][:, y : y + 224, x : x + 224]
    np.testing.assert_array_equal(got['image'], [crops[0], crops[1][:, ::-1]])


@pytest.fixture(scope='module')
def photograph(tmp_path_factory):
    """Two 256-pixel images with strong color edges everywhere."""
    path = tmp_path_factory.mktemp('photograph')
    noise = np.random.default_rng(0).integers(256, size=(2, 256, 256, 3), dtype=np.uint8)
    pictures = write_store(path, size=256, pictures={'train': noise, 'val': noise[:1]})
    return open_store(path), pictures


@pytest.mark.parametrize('format, reader', READERS)
def test_center_crops(stores, format, reader):
    store, pictures = stores[format]
    (plain,) = train(store, stop=1, random=False, reader=reader)
    (noisy,) = train(store, stop=1, reader=reader)
    records = sampler.records(3, np.arange(8), COUNT)
    margin = (SIZE - CROP) // 2
    center = slice(margin, margin + CROP)
    np.testing.assert_array_equal(plain['image'], pictures['train'][records][:, center, center])
    np.testing.assert_array_equal(plain['z'], noisy['z'])


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_all_readers_give_equal_bytes(stores, format):
    store, _ = stores[format]
    for a, b in zip(train(store, reader='tf'), train(store, reader='threads'), strict=True):
        assert_equal(a, b)
    kwargs = dict(batch=4, rows=np.arange(4), threads=2)
    ours = (eval_batches(store, 'val', reader=r, **kwargs) for r in ('tf', 'threads'))
    for a, b in zip(*ours, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize('format, reader', READERS)
def test_any_start_and_any_rows_give_parts_of_the_same_batches(stores, format, reader):
    store, _ = stores[format]
    whole = list(train(store, stop=6, chunk=3, reader=reader))
    for start in (1, 4):
        later = list(train(store, start=start, stop=6, chunk=3, reader=reader))
        for a, b in zip(later, whole[start:], strict=True):
            assert_equal(a, b)
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [7], [5, 0, 2]):
        part = train(store, stop=6, chunk=3, rows=np.array(rows), reader=reader)
        for a, b in zip(part, whole, strict=True):
            assert_equal(a, b, rows)
    assert list(train(store, start=6, stop=6, reader=reader)) == []


@pytest.mark.parametrize('format, reader', READERS)
def test_every_record_once_an_epoch(stores, format, reader):
    store, pictures = stores[format]
    # With the whole image as its crop, a row identifies its record.
    steps = list(train(store, batch=5, stop=8, crop=SIZE, random=False, reader=reader))
    seen = np.concatenate([s['image'] for s in steps])
    equal = (seen[:, None] == pictures['train'][None]).all((2, 3, 4))  # [position, record]
    assert (equal.sum(1) == 1).all()
    assert (equal.reshape(2, COUNT, COUNT).sum(1) == 1).all()


@pytest.mark.parametrize('format, reader', READERS)
def test_a_far_step_works(stores, format, reader):
    store, _ = stores[format]
    start = 10_000_000_000  # position 8e10: beyond 32 bits
    got = next(train(store, start=start, stop=start + 10, reader=reader))
    records = sampler.records(3, np.arange(start * 8, start * 8 + 8), COUNT)
    np.testing.assert_array_equal(got['label'], records % 7)


def test_reading_starts_where_it_is_asked_to(stores, monkeypatch):
    store, _ = stores['u8']
    calls = []
    draws = sampler.draws
    monkeypatch.setattr(
        batches.sampler, 'draws', lambda *args, **kw: calls.append(args[:2]) or draws(*args, **kw)
    )
    reading = train(store, seed=4, start=10_000_000, stop=20_000_000, reader='threads', threads=2)
    next(reading)
    time.sleep(0.3)  # for anything else that would be read in the meantime
    reading.close()
    # Only the requested step and those read ahead are made. (Another seed: the previous test's threads.)
    calls = [first for seed, first in calls if seed == 4]
    assert min(calls) == 10_000_000 * 8 and max(calls) <= 10_000_010 * 8


@pytest.mark.parametrize('format, reader', READERS)
def test_the_next_batches_are_made_while_the_consumer_is_busy(stores, format, reader, monkeypatch):
    """Once one batch is taken, later ones are begun without anyone asking for them."""
    store, _ = stores[format]
    draws, begun = sampler.draws, threading.Event()
    last = 4 if reader == 'tf' else 3  # TensorFlow begins 3 even if it prefetches nothing

    def watched(seed, first, *args, **kwargs):
        if (seed, first) == (5, 8 * last):
            begun.set()
        return draws(seed, first, *args, **kwargs)

    monkeypatch.setattr(batches.sampler, 'draws', watched)
    reading = train(store, seed=5, stop=20, reader=reader)
    assert not begun.is_set()
    next(reading)
    assert begun.wait(60)
    reading.close()


@pytest.mark.parametrize('format, reader', READERS)
@pytest.mark.parametrize('processes', [1, 2, 4])
@pytest.mark.parametrize('batch', [4, 8, 12])
def test_evaluation_counts_every_picture_once(stores, format, reader, processes, batch):
    store, pictures = stores[format]
    count = 10
    seen = []
    for process in range(processes):
        rows = np.arange(batch).reshape(processes, -1)[process]
        steps = list(eval_batches(store, 'val', batch=batch, rows=rows, threads=2, reader=reader))
        assert len(steps) == -(-count // batch)
        for s, got in enumerate(steps):
            assert got['image'].shape == (len(rows), SIZE, SIZE, 3)
            assert [got[k].dtype for k in ('image', 'label', 'mask')] == [np.uint8, np.int32, 'f4']
            for row, image, label, mask in zip(
                rows, got['image'], got['label'], got['mask'], strict=True
            ):
                record = s * batch + row
                if record < count:
                    seen.append(record)
                    assert mask == 1 and label == record % 7
                    np.testing.assert_array_equal(image, pictures['val'][record])
                else:
                    assert mask == 0 and label == 0 and not image.any()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize('reader', ['tf', 'threads'])
def test_a_damaged_record_reaches_the_consumer_as_one_line(tmp_path, reader):
    write_store(tmp_path)
    file = tmp_path / 'train.jpg'
    file.write_bytes(bytes(b ^ (i == 500) for i, b in enumerate(file.read_bytes())))
    reading = train(open_store(tmp_path), stop=5, reader=reader)
    with pytest.raises(UserError, match="record 0 of split 'train' in .*damaged") as caught:
        list(reading)
    assert '\n' not in str(caught.value) and 'Tensor' not in str(caught.value)


@pytest.mark.parametrize('reader', ['tf', 'threads'])
def test_a_sample_of_raw_records_is_checked(tmp_path, reader, monkeypatch):
    """In training by position, so that every epoch checks different records; in evaluation by index."""
    monkeypatch.setattr(batches, 'CHECK_EVERY', 3)
    write_store(tmp_path, format='u8', size=SIZE, counts={'train': COUNT, 'val': 10})
    store = open_store(tmp_path)
    order = sampler.records(3, np.arange(2 * COUNT), COUNT)
    # Checked in the second epoch, not in the first.
    position = next(p for p in range(COUNT + 1, 2 * COUNT, 3) if order[p] not in order[:COUNT:3])
    bad = order[position]
    for split, record in (('train', bad), ('val', 4), ('val', 6)):
        file = store.splits[split].file
        data = bytearray(file.read_bytes())
        data[int(store.splits[split].offsets[record]) + 7] ^= 1
        file.write_bytes(data)
    steps = []
    with pytest.raises(UserError, match=f"record {bad} of split 'train' in .*damaged"):
        for batch in train(store, batch=4, stop=10, reader=reader):
            steps.append(batch)
    assert len(steps) == position // 4
    # This process has no row of that position.
    rows = np.array([row for row in range(4) if row != position % 4])
    assert list(train(store, batch=4, start=position // 4, stop=position // 4 + 1, rows=rows))
    with pytest.raises(UserError, match="record 6 of split 'val' in .*damaged"):
        list(eval_batches(store, 'val', batch=4, rows=np.arange(4), threads=2, reader=reader))


@pytest.mark.parametrize('reader', ['tf', 'threads'])
def test_an_error_while_reading_reaches_the_consumer_as_it_was(stores, reader, monkeypatch):
    cut = batches._cut

    def fail_later(pixels, plan, crop):
        if plan.rest['label'][0] == later:
            raise UserError('one line')
        return cut(pixels, plan, crop)

    steps = list(train(stores['u8'][0], stop=20, reader=reader))
    first_labels = [int(step['label'][0]) for step in steps]
    later = next(v for v in first_labels if v != first_labels[0])
    monkeypatch.setattr(batches, '_cut', fail_later)
    reading = train(stores['u8'][0], stop=20, reader=reader)
    for _ in range(first_labels.index(later)):
        next(reading)
    with pytest.raises(UserError, match='^one line$'):
        next(reading)


@pytest.mark.parametrize('format, reader', READERS)
@pytest.mark.parametrize('threads', [0, 1, 5])
def test_the_number_of_threads_changes_nothing(stores, format, reader, threads):
    store, _ = stores[format]
    ours = (train(store, stop=10, reader=reader, threads=t) for t in (2, threads))
    for a, b in zip(*ours, strict=True):
        assert_equal(a, b)


def test_errors_come_before_the_first_batch(stores, monkeypatch):
    raw, jpg = stores['u8'][0], stores['jpg'][0]
    with pytest.raises(UserError, match='a crop of 41 pixels does not fit the 40-pixel'):
        train(raw, crop=41)
    with pytest.raises(UserError, match="unknown reader 'grain'"):
        train(raw, reader='grain')
    monkeypatch.setitem(sys.modules, 'tensorflow', None)  # as if it were not installed
    with pytest.raises(UserError, match='needs TensorFlow'):
        train(raw, reader='tf')
    assert len(list(train(raw))) == len(list(train(jpg))) == 4


def test_tensorflow_sees_no_accelerator(stores):
    next(train(stores['jpg'][0], reader='tf'))
    import tensorflow as tf

    assert tf.config.get_visible_devices('GPU') == []


def running() -> list:
    """Returns TensorFlow's iterators and our threads that are still alive."""
    iterators = [o for o in gc.get_objects() if type(o).__name__ == 'OwnedIterator']
    return iterators + [t for t in threading.enumerate() if t.name.startswith('batches')]


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='needs Linux')
@pytest.mark.parametrize('reader', ['tf', 'threads'])
def test_a_reader_that_ended_lets_go_of_the_file(tmp_path, reader):
    def mapped():
        return str(tmp_path) in pathlib.Path('/proc/self/maps').read_text()

    write_store(tmp_path, format='u8', size=SIZE, classes=3, counts={'train': 8, 'val': 5})
    store = open_store(tmp_path)
    batches = eval_batches(store, 'val', batch=2, rows=np.arange(2), threads=1, reader=reader)
    next(batches)
    assert mapped()
    assert len(list(batches)) == 2
    assert not mapped()


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['close', 'collect'])
@pytest.mark.parametrize('format, reader', READERS)
def test_an_abandoned_iterator_stops_reading(stores, format, reader, ending):
    gc.collect()
    before = len(running())
    batches = train(stores[format][0], stop=1_000_000, reader=reader)
    next(batches)
    assert len(running()) > before
    if ending == 'close':
        batches.close()
    else:
        del batches
        gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith('batches'):
            thread.join(5)
    assert len(running()) <= before


def test_nothing_is_left_to_do_at_exit_for_a_reader_that_ended(stores):
    assert len(list(train(stores['u8'][0], reader='threads'))) == 4
    before = atexit._ncallbacks()
    assert len(list(train(stores['u8'][0], reader='threads'))) == 4
    assert atexit._ncallbacks() == before


@pytest.mark.slow
@pytest.mark.parametrize('format, reader', [('jpg', 'tf'), ('u8', 'threads')])
def test_a_process_ends_quietly_while_reading(stores, format, reader):
    # Kept alive by another module, in the middle of a long step: unless it is closed, the interpreter
    # hangs or aborts, because TensorFlow's threads call into it during shutdown.
    code = f"""
        import os
        import numpy as np
        from alexnet_jax.input import batches
        from alexnet_jax.input import store
        os.kept = batches.train_batches(
            store.open_store({str(stores[format][0].path)!r}), seed=0, batch=20_000, start=0,
            stop=1_000_000, rows=np.arange(20_000), crop=32, chunk=1, random=True, threads=2,
            reader={reader!r})
        next(os.kept)
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith('TF_')}
    command = [sys.executable, '-c', textwrap.dedent(code)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, '', '')


def test_fake_batches(stores):
    kwargs = dict(batch=8, crop=CROP, classes=5, seed=1)
    fake = fake_batches(rows=np.arange(8), **kwargs)
    first, second = itertools.islice(fake, 2)
    real = next(train(stores['u8'][0], reader='threads'))
    assert first.keys() == real.keys()
    for name in real:
        assert (first[name].shape, first[name].dtype) == (real[name].shape, real[name].dtype)
    assert_equal(first, second)
    assert len({row.tobytes() for row in first['image']}) == 8
    assert 0 <= first['label'].min() and first['label'].max() < 5
    assert_equal(next(fake_batches(rows=np.array([6, 1]), **kwargs)), first, [6, 1])
