"""The loop: when it evaluates, saves, stops, and what it refuses to save."""

import pytest

from alexnet_jax import checks, metrics, optim, train
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.errors import UserError
from configs import quickstart
from tests.tiny_store import write_store

EXAMPLES, BATCH = 20, 8


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=72, classes=3, counts={'train': EXAMPLES, 'val': 7})
    return path


def make_config(store, **changes):
    config = quickstart.get_config()
    config.update_from_flattened_dict({
        'data.source': 'made_up', 'data.store': str(store), 'data.size': 72, 'augment.crop': 64,
        'train.batch': BATCH, 'run.eval_batch': BATCH, 'run.mesh': (1, 2), 'run.log_every': 1,
        'optim.epochs': 4.0, 'optim.drops': (), **changes,
    })  # fmt: skip
    return config


@pytest.mark.slow
def test_plateau_drops_the_rate_and_then_ends_the_run(store, tmp_path):
    """No error can fall by 200 points: after the first evaluation each one is a stall."""
    changes = {'schedule': 'plateau', 'patience': 1.0, 'threshold': 200.0, 'max_drops': 2}
    changes = {f'optim.{name}': value for name, value in changes.items()} | {'run.eval_every': 1.0}
    train.train(make_config(store, **changes, **{'optim.epochs': 50.0}), tmp_path / 'run')
    rows = metrics.read(tmp_path / 'run')
    steps = [optim.steps_per(e, EXAMPLES, BATCH) for e in (1, 2, 3, 4)]
    assert [r['step'] for r in rows if r['kind'] == 'eval'] == steps == [3, 5, 8, 10]
    rates = [r['weights'] for r in rows if r['kind'] == 'train']
    assert rates == pytest.approx([0.02] * 5 + [0.002] * 3 + [0.0002] * 2)
    assert Checkpoints(tmp_path / 'run/checkpoints').steps()[-1] == 10


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(store, tmp_path):
    config = make_config(store, **{'optim.rate': 1e30, 'run.checkpoint_every': 1})
    with pytest.raises(UserError, match='not finite') as error:
        train.train(config, tmp_path / 'run')
    assert '\n' not in str(error.value)
    # The first update is huge, but finite; what it leads to is not.
    assert Checkpoints(tmp_path / 'run/checkpoints').steps() == [1]
    assert [row['step'] for row in metrics.read(tmp_path / 'run')] == [0]


@pytest.mark.slow
def test_profile_and_frozen_layers(store, tmp_path):
    config = make_config(store, **{'run.profile': (1, 3), 'train.freeze': ('conv1', 'conv2')})
    train.train(config, tmp_path / 'run')
    assert list((tmp_path / 'run/profile').rglob('*.xplane.pb'))
    checkpoints = Checkpoints(tmp_path / 'run/checkpoints')
    mesh = checks.check(config, tmp_path / 'run')
    job = train.Job.make(config, mesh, train.prepare.ensure(**config.data))
    trained, _, _ = job.start(checkpoints, '')
    fresh, _, _ = job.start(Checkpoints(tmp_path / 'none'), '')
    same = {layer: bool((trained.params[layer]['kernel'] == leaves['kernel']).all())
            for layer, leaves in fresh.params.items()}
    assert [layer for layer in same if same[layer]] == ['conv1', 'conv2']


def test_evaluations_are_due_after_whole_intervals(store):
    config = make_config(store, **{'run.eval_every': 0.5})

    class Counts:
        counts = {'train': EXAMPLES}

    job = object.__new__(train.Job)
    object.__setattr__(job, 'config', config)
    object.__setattr__(job, 'store', Counts)
    # Half epochs end after 1.25, 2.5, 3.75, 5, ... steps.
    assert [s for s in range(11) if job.evaluation_due(s)] == [2, 3, 4, 5, 7, 8, 9, 10]
