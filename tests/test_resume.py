"""Killed at any moment and started again, a run ends with the same bits as one left alone."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alexnet_jax import metrics, progress, rundir
from alexnet_jax.errors import UserError
from alexnet_jax.store import open_store
from tests.tiny_store import write_store

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES, BATCH = 40, 8  # five steps an epoch, twenty steps in all

# The program as users start it, but for one event at which it kills itself.
DRIVER = """
import os, signal, sys, time
from alexnet_jax import checkpoint, data, evaluate, main, metrics
from alexnet_jax.errors import run

event, number = sys.argv[1], int(sys.argv[2])
if event == 'no TensorFlow':
    sys.modules['tensorflow'] = None  # importing it fails
sys.argv = ['alexnet_jax.main', *sys.argv[3:]]
count = 0

def kill_at(where, *args):
    global count
    if where == event:
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

read = data.train_batches
def train_batches(*args, **kwargs):
    for batch in read(*args, **kwargs):
        kill_at('step')  # while the device computes the step before
        yield batch
data.train_batches = train_batches

saves, unfinished = 0, None
rename = os.rename
def rename_but_one(source, target, *args, **kwargs):
    if os.path.basename(target) == unfinished:
        time.sleep(600)  # orbax's last act: it must not come before the kill
    rename(source, target, *args, **kwargs)
os.rename = rename_but_one

save = checkpoint.Checkpoints.save
def save_and_kill(self, step, *args):
    global saves, unfinished
    saves += 1
    if (event, number) == ('save', saves):
        unfinished = str(step)
    save(self, step, *args)  # returns while orbax still writes
    if unfinished:
        while not list(self.directory.glob(unfinished + '.*')):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = save_and_kill

real = evaluate.evaluate
def evaluate_and_kill(*args, **kwargs):
    kill_at('before evaluation')
    return real(*args, **kwargs)
evaluate.evaluate = evaluate_and_kill

write = metrics.Writer.write
def write_and_kill(self, kind, step, values):
    write(self, kind, step, values)
    kill_at('after evaluation' if kind == 'eval' else 'after row')
metrics.Writer.write = write_and_kill

run(main.main)
"""


def start(workdir, store, event='never', number=1, stop_after=0):
    command = [
        sys.executable, '-c', DRIVER, event, str(number),
        f'--config={ROOT}/configs/quickstart.py', '--cpu_devices=2', f'--workdir={workdir}',
        '--config.data.source=made_up', f'--config.data.store={store}', '--config.data.size=72',
        '--config.augment.crop=64', '--config.augment.chunk=4', '--config.optim.epochs=4.0',
        '--config.optim.drops=(2.0,3.0)', f'--config.train.batch={BATCH}',
        '--config.run.eval_every=1.0', f'--config.run.eval_batch={BATCH}',
        '--config.run.checkpoint_every=3', '--config.run.log_every=2',
        f'--config.run.stop_after={stop_after}',
    ]  # fmt: skip
    cache = {  # the same programs again and again: only the first start compiles them
        'JAX_COMPILATION_CACHE_DIR': str(store.parent / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | cache, capture_output=True, text=True, timeout=300,
        check=False,
    )
    if event in ('never', 'no TensorFlow'):
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == -signal.SIGKILL, (event, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout


def outcome(workdir):
    """The last checkpoint's step, arrays and meta (history and running sums); rows without times."""
    folder = max((workdir / 'checkpoints').iterdir(), key=lambda p: int(p.name))
    arrays = ocp.PyTreeCheckpointer().restore(folder / 'state')
    meta = json.loads((folder / 'meta' / 'metadata').read_text())['meta']
    rows = metrics.read(workdir)
    for row in rows:
        for name in progress.TIMES:
            row.pop(name, None)
    return int(folder.name), {name: np.asarray(x).tobytes() for name, x in arrays.items()}, meta, rows


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    rng = np.random.default_rng(0)
    pictures = {split: rng.integers(0, 256, (n, 72, 72, 3), dtype=np.uint8)
                for split, n in (('train', EXAMPLES), ('val', 12))}
    write_store(path, format='u8', size=72, classes=3, pictures=pictures)
    return path


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
    assert sum(name.startswith('opt_state') for name in arrays) == 16  # the velocity of each


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert [name for name in expected[1] if found[1][name] != expected[1][name]] == []
    assert found[2:] == expected[2:]


@pytest.mark.slow
@pytest.mark.parametrize(
    'kills',
    [[('step', 8), ('before evaluation', 2)], [('save', 2), ('after evaluation', 2)]],
    ids=str,
)
def test_killed_and_resumed_is_bit_for_bit_the_same(store, alone, tmp_path, kills):
    """On two devices, a tower each; dropout, colour noise and chunked crops on."""
    workdir = tmp_path / 'run'
    for event, number in kills:
        start(workdir, store, event, number)
        if event == 'save':  # the second, of step 5, after that of step 3
            names = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
            assert names[0] == '3' and '5' not in names
            assert any(name.startswith('5.') for name in names)  # orbax had begun
    start(workdir, store)
    assert_same(outcome(workdir), alone)


@pytest.mark.slow
def test_stopped_on_purpose_and_resumed_is_the_same(store, alone, tmp_path):
    workdir = tmp_path / 'run'
    start(workdir, store, stop_after=7)  # neither a checkpoint's nor an evaluation's step
    assert outcome(workdir)[0] == 7
    start(workdir, store)
    assert_same(outcome(workdir), alone)


@pytest.mark.slow
def test_a_machine_without_tensorflow_trains_the_same(store, alone, tmp_path):
    """From a raw store."""
    workdir = tmp_path / 'run'
    start(workdir, store, 'no TensorFlow')
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
    rundir.check_store(run, other)  # it has not begun
    rundir.write(ml_collections.ConfigDict({'seed': 0}), run, opened)
    rundir.check_store(run, opened)
    with pytest.raises(UserError, match='began with other pictures'):
        rundir.check_store(run, other)


def test_a_run_directory_without_store_json_goes_on(store, tmp_path):
    """As those had none that were made before counts were compared."""
    opened = open_store(store)
    rundir.write(ml_collections.ConfigDict({'seed': 0}), tmp_path, opened)
    (tmp_path / 'store.json').unlink()
    rundir.check_store(tmp_path, opened)
    (tmp_path / 'store.json').write_text('{')
    with pytest.raises(UserError, match='store.json cannot be read'):
        rundir.check_store(tmp_path, opened)
