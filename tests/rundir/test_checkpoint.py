"""Checkpoints: a state is restored bit for bit on any mesh, and damage is never loaded."""

import logging
import pathlib
import random
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.rundir import fingerprint
from alexnet_jax.rundir.checkpoint import Checkpoints
from tests.helpers import ODD, ROOT
from tests.helpers.processes import free_port


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


def make_state(*, data=1, model=2, seed=0, step=0):
    """A small state: towers over 'model', an optimizer chain with its named tuples."""
    random = np.random.default_rng(seed)
    params = {
        'conv1': {
            'kernel': random.normal(size=(2, 5, 5, 3, 16)).astype(np.float32),
            'bias': random.normal(size=(2, 16)).astype(np.float32),
        },
        'fc8': {'bias': random.normal(size=10).astype(np.float32)},
    }
    params['conv1']['bias'][0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9))
    velocity = optimizer.init(jax.tree.map(lambda x: x + 1, params))
    velocity = jax.tree.map(lambda x: x + random.normal(size=x.shape).astype(np.float32), velocity)
    state = State(np.int32(step), params, velocity)
    return jax.tree.map(lambda x: jax.device_put(x, sharding(np.ndim(x), data, model)), state)


def sharding(ndim, data, model):
    devices = jax.devices()[: data * model]
    mesh = jax.make_mesh(
        (data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=devices
    )
    return NamedSharding(mesh, PartitionSpec('model') if ndim > 1 else PartitionSpec())


def target_of(state, *, data=1, model=2):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x.ndim, data, model)),
        state,
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def contents(folder):
    return {path: path.read_bytes() for path in pathlib.Path(folder).rglob('*') if path.is_file()}


@pytest.fixture
def two_steps(tmp_path):
    """Checkpoints of steps 1 and 2, with different values."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(seed=1, step=1), {'history': {'1': 50.5}})
    checkpoints.save(2, make_state(seed=2, step=2), {'history': {'1': 50.5, '2': 33.25}})
    checkpoints.close()
    return tmp_path


def test_other_meshes_get_the_same_bits_and_fingerprints(tmp_path):
    state = make_state(data=1, model=2)
    prints = fingerprint.fingerprints(state)
    for step, (data, model) in enumerate([(1, 1), (2, 2), (4, 1), (1, 2)]):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(step, state, {'history': {}, 'mesh': [data, model], 'x': 0.1})
        checkpoints.close()
        target = target_of(state, data=data, model=model)
        restored_step, restored, meta = Checkpoints(tmp_path).restore(target)
        assert restored_step == step
        assert meta == {'history': {}, 'mesh': [data, model], 'x': 0.1}
        assert_same_bits(state, restored)
        assert fingerprint.fingerprints(restored) == prints
        for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
            assert x.sharding == wanted.sharding
        state = restored


def test_small_and_odd_dtypes(tmp_path):
    state = {
        'bfloat16': jnp.arange(-3, 4, dtype=jnp.bfloat16),
        'bool': jnp.array([[True, False], [False, False]]),
        'uint8': jnp.arange(7, dtype=jnp.uint8),
        'int32': jnp.array([-1, 2**31 - 1]),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, {})
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert_same_bits(checkpoints.restore(target)[1], state)


@pytest.mark.parametrize('keep', [1, 2])
def test_the_latest_and_the_best_survive(tmp_path, keep):
    errors = {2: 50.0, 4: 30.0, 6: 40.0, 8: 35.0, 10: 20.0, 12: 20.0}
    history = {}
    state = make_state()
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in range(1, 14):
        if step in errors:
            history[str(step)] = errors[step]
        checkpoints.save(step, state, {'history': history})
        checkpoints.wait()
        evaluated = [s for s in errors if s <= step]
        best = min(evaluated, key=errors.get, default=None)
        latest = list(range(1, step + 1))[-keep:]
        assert checkpoints.steps() == sorted({*latest, *([best] if best else [])})
        assert checkpoints.best_step() == best
        if step % 5 == 0:  # another process continues; the best step is read from disk
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep=keep)


def test_a_step_saved_without_its_own_entry_is_not_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(), {'history': {'1': 40.0}})
    checkpoints.save(2, make_state(), {'history': {'1': 40.0, '0': 10.0}})
    checkpoints.save(3, make_state(), {'history': {'1': 40.0, '2': 10.0}})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.best_step() == 1


def test_nothing_evaluated_has_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best_step() is None
    checkpoints.save(1, make_state(), {})
    checkpoints.wait()
    assert checkpoints.best_step() is None


def test_a_state_donated_and_a_history_changed_right_after_save(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, 1 << 21)).astype(np.float32)
    state = {'x': jax.device_put(values, sharding(2, 1, 2))}
    target = target_of(state)
    overwrite = jax.jit(lambda s: {'x': s['x'] * 0 - 7}, donate_argnums=0)
    history = {}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {'history': history})
    history['1'] = 5.0
    assert np.all(np.asarray(overwrite(state)['x']) == -7)
    _, restored, meta = checkpoints.restore(target)
    assert np.asarray(restored['x']).tobytes() == values.tobytes()
    assert meta == {'history': {}}


def array_file(step_folder):
    """The file that holds the values of the largest leaf."""
    return max((step_folder / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


DAMAGES = {
    'truncated arrays': (lambda d: truncate(array_file(d)), 'conv1/kernel'),
    'a flipped bit in the arrays': (lambda d: flip_bit(array_file(d)), 'conv1/kernel'),
    'arrays deleted': (lambda d: array_file(d).unlink(), 'conv1/kernel'),
    'index of the arrays emptied': (
        lambda d: (d / 'state/manifest.ocdbt').write_bytes(b''),
        'manifest.ocdbt',
    ),
    'state deleted': (lambda d: shutil.rmtree(d / 'state'), '/state'),
    "orbax's list of leaves truncated": (lambda d: truncate(d / 'state/_METADATA'), 'step cannot'),
    "a letter in orbax's list of leaves": (
        lambda d: replace(d / 'state/_METADATA', b'params/fc8', b'params/fb8'),
        'params/fc8/bias',
    ),
    'meta deleted': (lambda d: (d / 'meta/metadata').unlink(), 'meta/metadata'),
    'meta emptied': (lambda d: (d / 'meta/metadata').write_bytes(b''), 'meta/metadata'),
    'meta is not an object': (lambda d: (d / 'meta/metadata').write_bytes(b'[]'), 'meta/metadata'),
    'a digit of the history': (
        lambda d: replace(d / 'meta/metadata', b'33.25', b'33.24'),
        'meta/metadata',
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_step_is_passed_over_and_kept(two_steps, damage, caplog, capfd):
    inflict, name = DAMAGES[damage]
    inflict(two_steps / '2')
    before = contents(two_steps)
    target = target_of(make_state())

    step, state, meta = Checkpoints(two_steps).restore(target)

    assert (step, meta) == (1, {'history': {'1': 50.5}})
    assert_same_bits(state, make_state(seed=1, step=1))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert f'{two_steps}/2 is damaged' in warning and name in warning
    assert '\n' not in warning
    assert 'Traceback' not in capfd.readouterr().err
    assert contents(two_steps) == before
    with pytest.raises(UserError, match='/2 is damaged: ') as error:
        Checkpoints(two_steps).restore(target, step=2)
    assert name in str(error.value)
    assert contents(two_steps) == before


def test_flipped_bits_anywhere_never_change_what_is_restored(two_steps):
    dice = random.Random(0)
    files = sorted(path for path in (two_steps / '2').rglob('*') if path.is_file())
    wanted = {seed: fingerprint.fingerprints(make_state(seed=seed, step=seed)) for seed in (1, 2)}
    target = target_of(make_state())
    steps = []
    for path in dice.choices(files, k=40):
        original = path.read_bytes()
        data = bytearray(original)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        step, state, _ = Checkpoints(two_steps).restore(target)
        assert fingerprint.fingerprints(state) == wanted[step], path
        steps.append(step)
        path.write_bytes(original)
    assert set(steps) == {1, 2}  # some files matter, others do not


def test_everything_damaged(two_steps):
    for step in (1, 2):
        flip_bit(array_file(two_steps / str(step)))
    with pytest.raises(UserError, match=r'every checkpoint here is damaged.*conv1/kernel'):
        Checkpoints(two_steps).restore(target_of(make_state()))


def test_no_checkpoint_is_an_error_and_leaves_no_folder(tmp_path):
    folder = tmp_path / 'run' / 'checkpoints'
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == []
    for call in (checkpoints.restore, checkpoints.restore_part):
        with pytest.raises(UserError, match='no checkpoint here'):
            call(target_of(make_state()))
    checkpoints.close()
    assert not folder.parent.exists()


def test_a_step_that_is_not_there(two_steps):
    with pytest.raises(UserError, match=r'no checkpoint of step 7; available: \[1, 2\]'):
        Checkpoints(two_steps).restore(target_of(make_state()), step=7)


@pytest.mark.parametrize('what', ['shape', 'transposed', 'dtype', 'missing', 'surplus'])
def test_another_model_is_an_error_that_names_the_leaf(two_steps, what, caplog):
    target = target_of(make_state())
    place = sharding(1, 1, 2)
    if what == 'shape':
        target.params['fc8']['bias'] = jax.ShapeDtypeStruct((7,), jnp.float32, sharding=place)
        message = r'params/fc8/bias is float32\[10\] there and float32\[7\] here'
    elif what == 'transposed':
        target.params['conv1']['bias'] = jax.ShapeDtypeStruct(
            (16, 2), jnp.float32, sharding=sharding(2, 1, 2)
        )
        message = r'params/conv1/bias is float32\[2, 16\] there and float32\[16, 2\] here'
    elif what == 'dtype':
        target.params['fc8']['bias'] = jax.ShapeDtypeStruct((10,), jnp.bfloat16, sharding=place)
        message = r'params/fc8/bias is float32\[10\] there and bfloat16\[10\] here'
    elif what == 'missing':
        target.params['fc9'] = {'bias': target.params['fc8']['bias']}
        message = 'has no params/fc9/bias'
    else:
        del target.params['fc8']
        message = 'has params/fc8/bias, which this model lacks'
    with pytest.raises(UserError, match=message):
        Checkpoints(two_steps).restore(target)
    assert not caplog.records  # not damage: no fallback


def test_params_alone_and_some_of_them(two_steps, caplog):
    target = {'params': target_of(make_state(), data=2, model=2).params}
    checkpoints = Checkpoints(two_steps)
    step, found, meta = checkpoints.restore_part(target)
    assert (step, meta['history']['2']) == (2, 33.25)
    assert_same_bits(found, {'params': make_state(seed=2).params})

    some = {'params': {'conv1': target['params']['conv1']}}
    step, found, _ = checkpoints.restore_part(some, step=1)
    assert step == 1
    assert_same_bits(found, {'params': {'conv1': make_state(seed=1).params['conv1']}})

    shapes = checkpoints.shapes()
    assert shapes['params/fc8/bias'].shape == (10,)
    assert shapes['params/fc8/bias'].dtype == jnp.float32
    assert set(shapes) == set(fingerprint.fingerprints(make_state()))

    shutil.rmtree(two_steps / '2/state/ocdbt.process_0')
    step, _, _ = checkpoints.restore_part(target)
    assert step == 1 and 'params/conv1/kernel' in caplog.text
    target['params']['fc8']['bias'] = jax.ShapeDtypeStruct(
        (3,), jnp.float32, sharding=sharding(1, 1, 2)
    )
    with pytest.raises(UserError, match='params/fc8/bias is float32'):
        checkpoints.restore_part(target)


@pytest.mark.parametrize('keep', [1, 2])
def test_the_steps_after_a_fallback_replace_damaged_ones(two_steps, keep):
    flip_bit(array_file(two_steps / '2'))
    shutil.copytree(two_steps / '2', two_steps / '3')
    target = target_of(make_state())
    checkpoints = Checkpoints(two_steps, keep=keep)
    assert checkpoints.restore(target)[0] == 1
    again = make_state(seed=5, step=2)
    checkpoints.save(2, again, {'history': {'1': 50.5, '2': 60.0}})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]  # 1 is the best step again, or one of the latest
    assert checkpoints.best_step() == 1
    step, state, _ = Checkpoints(two_steps).restore(target)
    assert step == 2
    assert_same_bits(state, again)


def test_saving_a_step_again_replaces_it(two_steps):
    checkpoints = Checkpoints(two_steps)
    step, state, meta = checkpoints.restore(target_of(make_state()))
    meta['history']['2'] = 20.0
    checkpoints.save(step, state, meta)
    checkpoints.close()
    assert Checkpoints(two_steps).restore(target_of(state))[2]['history']['2'] == 20.0


def test_an_unfinished_save_is_ignored_and_removed_at_the_next_save(two_steps):
    unfinished = two_steps / '7.orbax-checkpoint-tmp'
    shutil.copytree(two_steps / '2', unfinished)
    (unfinished / 'state/_METADATA').unlink()
    (two_steps / '.DS_Store').write_bytes(b'')
    checkpoints = Checkpoints(two_steps)
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore(target_of(make_state()))[0] == 2
    assert unfinished.exists()  # another process may be saving this run
    checkpoints.save(3, make_state(), {})
    checkpoints.close()
    assert not unfinished.exists()
    assert checkpoints.steps() == [2, 3]


def test_a_save_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot save step 1'):
        Checkpoints(tmp_path / 'file' / 'checkpoints').save(1, make_state(), {})


def test_a_disk_that_fills_up(tmp_path, monkeypatch, capfd):
    """One line says so: orbax logs each failure several times, and tensorstore reports what is left."""
    monkeypatch.setattr(sys, 'unraisablehook', lambda error: print(error.exc_value))
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UserError, match='saving failed: disk full, free some space: '):
            checkpoints.save(2, state, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError('Event loop is closed')))
    assert capfd.readouterr() == ('', '')
    assert checkpoints.restore(target_of(state))[0] == 1
    checkpoints.save(2, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_only_arrays_and_at_least_one_checkpoint(tmp_path):
    with pytest.raises(TypeError, match='b is a ndarray'):
        Checkpoints(tmp_path).save(1, {'a': jnp.zeros(3), 'b': np.zeros(3)}, {})
    with pytest.raises(UserError, match='at least 1'):
        Checkpoints(tmp_path, keep=0)


def test_orbax_is_quiet(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger='absl')
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    checkpoints.restore(target_of(make_state()))
    checkpoints.close()
    assert not [record for record in caplog.records if record.name == 'absl']
    from absl import logging as absl_logging

    absl_logging.info('ours')
    assert 'ours' in caplog.text


def test_the_fingerprint_is_the_weighted_sum_of_all_words():
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    weights = 2 * np.arange(x.size, dtype=np.uint32) + 1
    expected = (x.view(np.uint32).ravel() * weights).sum(dtype=np.uint32)
    assert fingerprint.fingerprints({'a': [jnp.array(x)]}) == {'a/0': expected}


def test_any_bit_and_any_exchange_change_the_fingerprint():
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    words = x.view(np.uint32).reshape(-1)
    original = fingerprint.fingerprints(jnp.array(x))
    for i in range(words.size):
        for bit in range(32):
            words[i] ^= np.uint32(1 << bit)
            assert fingerprint.fingerprints(jnp.array(x)) != original
            words[i] ^= np.uint32(1 << bit)
    assert fingerprint.fingerprints(jnp.array(x)) == original
    assert fingerprint.fingerprints(jnp.array(x[::-1])) != original


WORKER = """
import json, logging, pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from alexnet_jax.rundir import checkpoint
from alexnet_jax.rundir import fingerprint
from alexnet_jax.common import errors

folder, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=process)
logging.basicConfig()
mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
split = NamedSharding(mesh, PartitionSpec('model', 'data'))
values = np.random.default_rng(0).normal(size=(2, 64, 100)).astype(np.float32)

def state(seed):
    x = np.float32(seed) + values
    return {'params': {'x': jax.make_array_from_callback(x.shape, split, x.__getitem__)}}

target = {'params': {'x': jax.ShapeDtypeStruct(values.shape, np.float32, sharding=split)}}
checkpoints = checkpoint.Checkpoints(folder)
for step in (1, 2, 3):
    checkpoints.save(step, state(step), {'history': {str(step): 10.0 * step}})
checkpoints.wait()
assert checkpoints.steps() == [1, 2, 3] and checkpoints.best_step() == 1
jax.experimental.multihost_utils.sync_global_devices('saved')
if process == 0:
    path = max((folder / '3/state').rglob('d/*'), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])
jax.experimental.multihost_utils.sync_global_devices('damaged')
checkpoints = checkpoint.Checkpoints(folder)
read = checkpoints._read

def read_in_one_process(step, name, leaf):  # the other does not see that step 2 is damaged
    if (step, process) == (2, 1):
        raise OSError('bad sector')
    return read(step, name, leaf)

checkpoints._read = read_in_one_process
step, restored, meta = checkpoints.restore(target)
assert (step, meta) == (1, {'history': {'1': 10.0}}), step
assert fingerprint.fingerprints(restored) == fingerprint.fingerprints(state(1))
checkpoints.save(2, restored, meta)
checkpoints.close()
assert checkpoints.steps() == [1, 2]
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_is_damaged(tmp_path):
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(tmp_path), str(port), str(process)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], '\n'.join(outputs)
    for output, reason in zip(outputs, ('in another process', 'bad sector'), strict=True):
        assert '3 is damaged' in output and '2 is damaged' in output and reason in output
    # One process reads what two wrote.
    x = jax.ShapeDtypeStruct((2, 64, 100), jnp.float32, sharding=sharding(3, 1, 2))
    _, found, _ = Checkpoints(tmp_path).restore_part({'params': {'x': x}}, step=2)
    values = np.random.default_rng(0).normal(size=(2, 64, 100)).astype(np.float32)
    np.testing.assert_array_equal(found['params']['x'], np.float32(1) + values)


@pytest.mark.parametrize(
    'name', [ODD, 'a[b]', '**', '*', '?', 'a\\b', 'a\\', '~', '-x', ' ', '%20']
)
def test_a_folder_of_any_name(tmp_path, name):
    """Saved, read again, and continued; folders that the name matches as a pattern are left alone."""
    for other in ('ab', 'a/b'):
        (tmp_path / other).mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    states = {step: make_state(seed=step, step=step) for step in (1, 2)}
    for step, state in states.items():
        checkpoints = Checkpoints(tmp_path / name / 'checkpoints')
        checkpoints.save(step, state, {'history': {step: 50.0 + step}})
        checkpoints.close()
    for step, state in states.items():
        there = Checkpoints(tmp_path / name / 'checkpoints')
        assert_same_bits(there.restore(target_of(state), step)[1], state)
    assert there.best_step() == 1
    shutil.rmtree(tmp_path / name)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_temporary_folder_with_an_odd_name_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, '_links', lambda: pathlib.Path(tmp_path / 'a[b]'))
    with pytest.raises(UserError, match='TMPDIR=.*: set it to a folder such as /tmp'):
        Checkpoints(tmp_path / 'c[d]')


def test_meta_can_be_amended(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), make_state()
    for step in (1, 2):
        checkpoints.save(step, state, {'history': {step: float(step)}})
    checkpoints.amend(1, {'history': {}})
    assert checkpoints.best_step() == 2
    checkpoints.close()
    assert_same_bits(Checkpoints(tmp_path).restore(target_of(state), 1)[1], state)
    assert Checkpoints(tmp_path).restore(target_of(state), 1)[2] == {'history': {}}
