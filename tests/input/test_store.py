"""The store reads back what was written, and reports any damage in one clear line."""

import json
import os
import re

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input.store import open_store, verify
from tests.helpers.stores import decode, write_store


def damage(path, position):
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def again(path):
    return f'remove {path} and run prepare again$'


def edit(path, **values):
    info = json.loads((path / 'store.json').read_text())
    (path / 'store.json').write_text(json.dumps(info | values))


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_reads_what_was_written(tmp_path, format):
    pictures = write_store(tmp_path, format=format, size=24, classes=3)
    store = open_store(tmp_path)
    verify(store)
    assert (store.format, store.size, store.classes, store.source) == (format, 24, 3, 'made_up')
    assert store.names == ['class 0', 'class 1', 'class 2']
    assert store.counts == {'train': 20, 'val': 7}
    np.testing.assert_array_equal(store.labels('val'), np.arange(7) % 3)
    assert store.labels('val').dtype == np.int32
    indices = [5, 0, 5, 19]
    records = store.records('train', indices)
    if format == 'jpg':
        read = np.stack([decode(r) for r in records])
        with pytest.raises(ValueError, match='not raw pixels'):
            store.pixels('train')
    else:
        read = store.pixels('train')[indices]
        assert records[1] == pictures['train'][0].tobytes()
    np.testing.assert_array_equal(read, pictures['train'][indices])


def test_statistics(tmp_path):
    pixels = write_store(tmp_path, format='u8')['train'].astype(np.float64)
    store = open_store(tmp_path)
    np.testing.assert_allclose(store.mean, pixels.mean(0), rtol=1e-6)
    # Along the k-th COLUMN the pixels have standard deviation sigma[k], largest first.
    spread = (pixels.reshape(-1, 3) @ store.eigenvectors).std(0)
    np.testing.assert_allclose(spread, store.sigma, rtol=1e-3)
    assert (np.diff(store.sigma) <= 0).all()
    assert {a.dtype for a in (store.mean, store.eigenvectors, store.sigma)} == {np.dtype('f4')}


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_a_damaged_record_is_named(tmp_path, format):
    write_store(tmp_path, format=format)
    store = open_store(tmp_path)
    damage(store.splits['val'].file, int(store.splits['val'].offsets[3]) + 100)
    store.records('val', [0, 1, 2, 4, 5, 6])
    named = rf"record 3 of split 'val' in .*val\.{format}.*: {again(tmp_path)}"
    with pytest.raises(UserError, match=named):
        store.records('val', [2, 3])
    with pytest.raises(
        UserError, match=rf'damaged records in .*: 1 \(val.{format} 3\): {again(tmp_path)}'
    ):
        verify(store)


def test_verify_names_the_first_of_many(tmp_path):
    write_store(tmp_path)
    store = open_store(tmp_path)
    for i in range(8):
        damage(store.splits['train'].file, int(store.splits['train'].offsets[i + 1]) - 5)
    with pytest.raises(
        UserError, match=r'damaged records in .*: 8 \(train.jpg 0, .* train.jpg 4, \.\.\.\): '
    ):
        verify(store)


def test_a_file_that_is_cut_while_it_is_open(tmp_path):
    write_store(tmp_path)
    store = open_store(tmp_path)
    with open(store.splits['train'].file, 'r+b') as file:
        file.truncate(10)
    with pytest.raises(UserError, match='record 19 '):
        store.records('train', [19])
    store.splits['train'].file.unlink()
    with pytest.raises(UserError, match='cannot read .*train.jpg'):
        store.records('train', [19])


def cut(name, keep):
    def change(path):
        file = path / name
        file.write_bytes(file.read_bytes()[:keep])

    return change


def label(value):
    def change(path):
        labels = np.load(path / 'train.labels.npy')
        labels[4] = value
        np.save(path / 'train.labels.npy', labels)

    return change


def swap_offsets(path):
    offsets = np.load(path / 'train.offsets.npy')
    offsets[[3, 4]] = offsets[[4, 3]]
    np.save(path / 'train.offsets.npy', offsets)


def shrink(name):
    return lambda path: np.save(path / name, np.load(path / name)[:-1])


def poison(name):
    def change(path):
        with np.load(path / 'stats.npz') as stats:
            values = dict(stats)
        values[name].flat[0] = np.nan
        np.savez(path / 'stats.npz', **values)

    return change


BROKEN = {
    'no folder': (lambda p: p.rename(p.parent / 'elsewhere'), 'store.json is missing'),
    'incomplete': (lambda p: edit(p, complete=False), 'is incomplete; run its prepare command'),
    'format': (lambda p: edit(p, format='png'), "unknown format 'png', must be one of jpg, u8"),
    'json cut': (cut('store.json', 20), 'is damaged'),
    'json list': (lambda p: (p / 'store.json').write_text('[]'), 'is damaged'),
    'json field': (lambda p: (p / 'store.json').write_text('{}'), 'is damaged.*complete'),
    'label too large': (label(3), r'train.labels.npy: record 4 has label 3, outside 0\.\.2'),
    'label negative': (label(-1), r'record 4 has label -1, outside 0\.\.2'),
    'names': (cut('names.txt', 10), r'names.txt does not match .*2 names, not 3'),
    'no names': (lambda p: (p / 'names.txt').unlink(), 'names.txt is missing'),
    'stats cut': (cut('stats.npz', 300), 'is damaged'),
    'stats shape': (lambda p: edit(p, size=41), 'stats.npz does not match .*41'),
    'stats NaN': (poison('mean'), 'stats.npz does not match .* not finite'),
    'axes NaN': (poison('eigenvectors'), 'stats.npz does not match .* not finite'),
    'no records': (lambda p: (p / 'train.jpg').unlink(), 'train.jpg is missing'),
    'records cut': (cut('val.jpg', 1000), 'val.jpg does not match the store: 1000 bytes, not'),
    'crc cut': (cut('train.crc.npy', 100), 'is damaged'),
    'crc empty': (cut('train.crc.npy', 0), 'is damaged'),
    'crc short': (shrink('train.crc.npy'), 'train.crc.npy does not match .*: 19 values, not 20'),
    'labels short': (shrink('val.labels.npy'), 'val.labels.npy does not match .*: 6 values, not 7'),
    'offsets short': (shrink('val.offsets.npy'), 'val.offsets.npy .*: not 8 increasing offsets'),
    'offsets swapped': (swap_offsets, 'train.offsets.npy .*: not 21 increasing offsets'),
    'count': (lambda p: edit(p, counts={'train': 20, 'val': 0}), "'val' has no images"),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_broken_store_is_one_line(tmp_path, case):
    change, message = BROKEN[case]
    write_store(tmp_path / 'store')
    change(tmp_path / 'store')
    with pytest.raises(UserError, match=message) as caught:
        open_store(tmp_path / 'store')
    assert '\n' not in str(caught.value) and str(tmp_path / 'store') in str(caught.value)
    if case not in ('no folder', 'incomplete'):  # prepare on its own would find it complete
        assert re.search(again(tmp_path / 'store'), str(caught.value))


def test_cores_are_those_that_the_process_is_bound_to(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {1, 3}, raising=False)
    assert cores() == 2
