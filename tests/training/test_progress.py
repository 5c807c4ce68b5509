"""What a run reports when it starts."""

import dataclasses
import pathlib

import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.input import store as stores
from alexnet_jax.training import progress
from tests.helpers.stores import write_store

SMALLER = 'set a smaller config.train.batch, and config.optim.rate in proportion'


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """Eight training images of three classes: one, three and four."""
    path = tmp_path_factory.mktemp('progress') / 'store'
    labels = {'train': np.array([2, 2, 1, 0, 2, 1, 2, 1]), 'val': np.array([0, 1])}
    counts = {'train': 8, 'val': 2}
    write_store(path, format='u8', size=8, classes=3, counts=counts, labels=labels)
    return dataclasses.replace(stores.open_store(path), names=['ape', 'bee', 'c\x1bat'])


def test_a_run_says_what_it_trains_on(store):
    store = dataclasses.replace(store, validation='test/')
    assert progress.data_lines(store, batch=3, total=20) == [
        f'data: {store.source}, in the store {store.path}',
        'classes: 3, with 1 (ape) to 4 (c\\x1bat) training images each',
        'images: 8 for training, 2 for validation (test/)',
        'steps: 2.7 per epoch, at most 20 in all, 7.5 epochs',
    ]


def with_labels(store, labels):
    split = dataclasses.replace(store.splits['train'], labels=np.array(labels))
    counts = {**store.counts, 'train': len(labels)}
    return dataclasses.replace(store, splits={**store.splits, 'train': split}, counts=counts)


def test_classes_of_one_size(store):
    lines = progress.data_lines(with_labels(store, [0, 1, 2] * 4), batch=3, total=20)
    assert lines[1] == 'classes: 3, with 4 training images each'


@pytest.mark.parametrize(
    ('labels', 'batch', 'warning'),
    [
        ([0, 1, 2], 3, ''),
        ([0, 1, 2], 4, f'a batch of 4 repeats the 3 training images; {SMALLER}'),
        ([0] * 100 + [1, 2], 3, ''),
        ([0] * 101 + [1, 2], 3, 'the largest class has 101 images and the smallest 1'),
        ([0, 1], 2, '1 of the 3 classes have no training images'),
    ],
)
def test_unusual_data(store, labels, batch, warning):
    assert progress.data_warning(with_labels(store, labels), batch=batch) == warning


def test_a_single_class(store):
    store = dataclasses.replace(with_labels(store, [0, 0]), classes=1, names=['ape'])
    assert progress.data_warning(store, batch=9) == (
        f'a batch of 9 repeats the 2 training images; {SMALLER}; there is only one class, so there is '
        'nothing to learn'
    )


@pytest.mark.parametrize(
    ('changes', 'batch', 'warning'),
    [
        ({}, 128, ''),
        (
            {'rate': 0.21},
            128,
            'the loss may diverge; with batches of 128, try 0.05 (rate / (1 - momentum) is 4.2 per 256 '
            'images, and such networks train with 0.02 to 1.0)',
        ),
        ({}, 12, ''),
        ({}, 4096, ''),
        (
            {'rate': 0.0002},
            128,
            'training may be very slow; with batches of 128, try 0.001 (',
        ),
        ({'rate': 5.0, 'name': 'lars'}, 128, ''),
        ({'rate': 0.2, 'momentum': 0.0}, 128, ''),
    ],
)
def test_unusual_rates(changes, batch, warning):
    config = configfile.load('paper')
    config.optim.update(changes)
    found = progress.rate_warning(config.optim, batch=batch)
    assert found == warning == '' or warning and warning in found


def test_rates_of_fine_tuning():
    optim = configfile.load('squeezenet').optim
    found = progress.rate_warning(optim, batch=512, tuned=True)
    assert 'may destroy what the network' in found and 'with batches of 512, try 0.0055 (' in found
    optim.rate = 0.0003
    assert not progress.rate_warning(optim, batch=50, tuned=True)


def test_no_preset_has_an_unusual_rate():
    for file in (pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'):
        config = configfile.load(str(file))
        assert not progress.rate_warning(config.optim, batch=config.train.batch)


def test_what_happens_once_does_not_count_in_the_time_to_go(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
    clock = progress.Clock()
    with clock.once() as seconds:
        now[0] += 90
    assert seconds == [90]
    with clock.waiting():
        now[0] += 2
    with clock.paused():
        now[0] += 7
    now[0] += 8
    times, steady = clock.interval(100)
    assert times == {'images_per_second': 1.0, 'waiting': 0.02} and steady == 10
    now[0] += 5
    assert clock.interval(100) == ({'images_per_second': 20.0, 'waiting': 0.0}, 20)
    values = {'epoch': 1, 'loss': 1, 'top1_error': 2, 'top5_error': 3, 'weights': 0.1, **times}
    line = progress.line(10, 50, 5, 3, values, steady)
    assert 'top-5' not in line and 'top-5' in progress.line(10, 50, 5, 6, values, steady)
    assert '1 images/s' in line and line.endswith('  0m20s to go')


def test_a_long_interval_says_how_long_it_will_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])
    clock = progress.Clock()
    with clock.once():
        now[0] += 10
    clock.said()
    now[0] += progress.QUIET - 0.1
    assert not clock.overdue(300, 1000)
    now[0] += 0.1
    assert not clock.overdue(300, 290)  # the next line comes soon
    assert clock.overdue(300, 300) == 10 and not clock.overdue(300, 300)
    now[0] += progress.QUIET
    assert clock.overdue(300, 300) == 5
    with clock.paused():
        now[0] += 100
    assert not clock.overdue(300, 300)  # the evaluation has just been logged
    now[0] += progress.QUIET
    assert clock.overdue(900, 300) == 10
    assert progress.short_line(3, 1003, 36, 2.0) == 'step 3/1,003  2 images/s  5h00m to go'
    assert clock.interval(100)[0]['images_per_second'] == 100 / (10 + 3 * progress.QUIET)
    with clock.once():  # such as a save, which logs nothing
        now[0] += progress.QUIET - 5
    now[0] += 5
    assert clock.overdue(50, 1000) == 10
