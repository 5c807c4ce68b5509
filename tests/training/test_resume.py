"""A run killed at any moment and restarted ends with the same bits as an uninterrupted one."""

import dataclasses
import signal
import subprocess

import ml_collections
import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.store import open_store
from alexnet_jax.rundir import directory
from tests.helpers.commands import (
    EXAMPLES,
    ROOT,
    assert_same,
    command,
    environment,
    make_store,
    outcome,
)

ENDS = {'never': 0, 'TensorFlow': 0, 'SIGTERM': 75, 'SIGINT': 75, 'stop_after': 75}


# Settings that differ from those of the machine where the run began; ASCII must still be read as ASCII.
OTHERS = {
    'JAX_ENABLE_X64': '1',
    'JAX_DEFAULT_PRNG_IMPL': 'rbg',
    'JAX_THREEFRY_PARTITIONABLE': '0',
    'JAX_RANDOM_SEED_OFFSET': '3',
    'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
    'JAX_NUMPY_RANK_PROMOTION': 'raise',
    'JAX_TRANSFER_GUARD': 'disallow',
    'JAX_DISABLE_JIT': '1',
    'LC_ALL': 'C',
    'PYTHONUTF8': '0',
    'PYTHONCOERCECLOCALE': '0',
}


def start(workdir, store, event='never', number=1, settings=()):
    if event == 'stop_after':
        line = command(workdir, store, '--cpu_devices=2', f'--config.run.stop_after={number}')
    else:
        line = command(workdir, store, '--cpu_devices=2', event=event, number=number)
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=environment(store) | dict(settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    expected = ENDS.get(event, -signal.SIGKILL)
    assert done.returncode == expected, (event, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp('store') / 'tiny')


@pytest.fixture(scope='module')
def alone(store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('alone') / 'run'
    start(workdir, store)
    return outcome(workdir)


@pytest.mark.slow
def test_uninterrupted_run_is_what_the_others_are_compared_with(alone):
    step, arrays, meta, rows = alone
    assert step == 20 and set(meta['history']) == {'5', '10', '15', '20'}
    assert [r['step'] for r in rows if r['kind'] == 'train'] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert {r['weights'] for r in rows if r['kind'] == 'train'} > {0.02}
    assert sum(name.startswith('opt_state') for name in arrays) == 16  # one velocity per parameter


@pytest.mark.slow
@pytest.mark.parametrize(
    'kills',
    [[('step', 8), ('before evaluation', 2)], [('save', 2), ('after evaluation', 2)]],
    ids=str,
)
def test_killed_and_resumed_is_bit_for_bit_the_same(store, alone, tmp_path, kills):
    """On two devices, one tower each, with dropout, color noise and chunked crops."""
    workdir = tmp_path / 'run'
    for event, number in kills:
        start(workdir, store, event, number)
        if event == 'save':  # the second save, at step 5, after that at step 3
            names = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
            assert names[0] == '3' and '5' not in names
            assert any(name.startswith('5.') for name in names)  # orbax had started
    start(workdir, store)
    assert_same(outcome(workdir), alone)


@pytest.mark.slow
def test_stopped_on_purpose_and_resumed_is_the_same(store, alone, tmp_path):
    workdir = tmp_path / 'run'
    # Step 7 has neither a checkpoint nor an evaluation; the signals arrive while batches are read,
    # at most three steps ahead.
    said = start(workdir, store, 'stop_after', 7)
    assert outcome(workdir)[0] == 7 and 'stopped at step 7 (stop_after=7), saved' in said
    for event, reason in (('SIGTERM', 'SIGTERM'), ('SIGINT', 'Ctrl-C')):
        before = outcome(workdir)[0]
        said = start(workdir, store, event, 4)
        assert before < outcome(workdir)[0] <= before + 4
        assert f'stopped at step {outcome(workdir)[0]} ({reason}), saved' in said
        assert 'Traceback' not in said
    start(workdir, store)
    assert_same(outcome(workdir), alone)


@pytest.mark.slow
def test_one_start_with_other_settings_is_the_same(store, alone, tmp_path):
    workdir = tmp_path / 'läuft'
    start(workdir, store, 'stop_after', 7)
    start(workdir, store, settings=OTHERS)
    assert_same(outcome(workdir), alone)


@pytest.mark.full
def test_with_tensorflow_it_is_the_same(store, alone, tmp_path):
    """From a raw store, which the other runs read without TensorFlow."""
    workdir = tmp_path / 'run'
    start(workdir, store, 'TensorFlow')
    assert_same(outcome(workdir), alone)


@pytest.mark.parametrize(
    'changed',
    [
        {'names': ['a', 'b', 'c']},
        {'mean': np.zeros((72, 72, 3))},
        {'counts': {'train': EXAMPLES, 'val': 11}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_run_goes_on_with_the_pictures_it_began_with(store, tmp_path, changed):
    opened = open_store(store)
    other = dataclasses.replace(opened, **changed)
    run = tmp_path / 'run'
    directory.check_store(run, other)  # the run has not started
    directory.write(ml_collections.ConfigDict({'seed': 0}), run, opened)
    directory.check_store(run, opened)
    with pytest.raises(UserError, match='was trained on different images'):
        directory.check_store(run, other)


def test_a_run_directory_without_store_json_goes_on(store, tmp_path):
    """Run directories made before counts were compared have no store.json."""
    opened = open_store(store)
    directory.write(ml_collections.ConfigDict({'seed': 0}), tmp_path, opened)
    (tmp_path / 'store.json').unlink()
    directory.check_store(tmp_path, opened)
    (tmp_path / 'store.json').write_text('{')
    with pytest.raises(UserError, match='store.json cannot be read'):
        directory.check_store(tmp_path, opened)
