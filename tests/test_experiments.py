"""The experiments on training, ablations and tables: their arithmetic, and each on a handful of pictures."""

import math

import jax
import pytest

from alexnet_jax import configfile, data, model, switches
from experiments import does_it_train
from tests.small_lab import in_process, make, pretend
from tests.tiny_store import write_store

SIZES = ['--config.data.size=72', '--config.augment.crop=64', '--config.run.eval_batch=8',
         '--config.optim.epochs=0.5', '--config.run.mesh=(1, 1)']  # fmt: skip


@pytest.fixture(autouse=True, scope='module')
def programs_kept(tmp_path_factory):
    """Runs that differ in numbers alone are compiled once."""
    settings = {
        'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('programs')),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Pictures are read without TensorFlow, whose import would take most of the time."""
    monkeypatch.setattr(data.importlib.util, 'find_spec', lambda name: None)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=72, classes=10, counts={'train': 64, 'val': 20})
    return [f'--config.data.store={path}', *SIZES]


def builds(config, changes):
    """Whether a config with its changes is a network of integer widths that fits small crops."""
    config = configfile.load(config)
    config.update_from_flattened_dict({**changes, 'model.width': 0.0625})
    net = switches.build(classes=10, **config.model)
    return bool(jax.eval_shape(lambda: model.init(net, 0, 64)))


def losses(*values):
    return [{'step': 10 * i + 9, 'loss': value * math.log(10)} for i, value in enumerate(values)]


def test_does_it_train(tmp_path, store):
    def start(command, workdir, until):  # one of them in earnest
        return (in_process if 'original' in command[0] else pretend)(command, workdir, until)

    trial = make(tmp_path, store, start=start)
    does_it_train.run(trial)
    assert list(trial.results) == ['paper-0', 'original-0']
    result = trial.results['original-0']
    assert [row['step'] for row in result['train']] == [0, 1, 2, 3]
    begin, end = result['extra']['start'], result['extra']['end']
    assert [*begin['squares']] == ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert result['extra']['classes'] == 10 and begin != end  # four steps at a rate of 0.01
    assert abs(begin['squares']['fc7'] - 1) < 0.5  # biases are 1
    assert trial.results['paper-0']['extra']['start']['logits_std'] < begin['logits_std'] / 3
    table = does_it_train.report(trial.results)
    assert '| original | 0.03 | 1 | 1e-4 / 5 | not within 4 steps |' in table
    assert '| paper bias | 0.01 | 0.1 | 1e-4 | not run |' in table
    assert 'original: the loss left ln(classes) in 0 of 1 seeds within 4 steps.' in table
    does_it_train.plot(trial.results, tmp_path / 'figure.png')
    assert (tmp_path / 'figure.png').stat().st_size > 1000


def test_every_initialisation_builds():
    for *_, config, changes in does_it_train.RUNS.values():
        assert builds(f'configs/{config}.py', changes)
    assert {*does_it_train.STYLES} == {*does_it_train.RUNS}


def test_when_the_loss_leaves_chance():
    assert does_it_train.left(losses(1.0, 0.94, 0.96, 0.94, 0.5), 10) == 40  # not the first dip
    assert does_it_train.left(losses(0.9), 10) == 10
    assert does_it_train.left(losses(0.9, 0.951), 10) is None
    assert does_it_train.left(losses(0.9, math.nan), 10) is None
    assert does_it_train.left([], 10) is None


def test_what_is_said_about_training():
    results = {}
    for seed, values in enumerate([(1, 1, 0.9), (1, 0.9, 0.8), None]):
        measured = {'squares': {'fc8': 1.0}, 'logits_std': 0.5}
        extra = {'classes': 10, 'start': measured, 'end': measured}
        results[f'original-{seed}'] = {
            'name': 'original', 'seed': seed, 'diverged': values is None, 'train': losses(*values or ()),
            'eval': [{'top1_error': 60.0 + seed}], 'extra': extra if values else None,
        }  # fmt: skip
    table = does_it_train.report(results)
    assert '| 30, 20, diverged | 2.07, 1.84 | 60.5 ± 0.7 | 0.5, 0.5 |' in table
    assert 'original: the loss left ln(classes) in 2 of 3 seeds, between steps 20 and 30.' in table
    assert 'Chance: ln(10) = 2.303.' in table
