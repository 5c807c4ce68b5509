"""All commands accept a compressed network, and `compress` reports what it did."""

import dataclasses

import jax
import numpy as np
import pytest

from alexnet_jax import compress, evaluate
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import network
from alexnet_jax.training import compression, inference, setup
from alexnet_jax.weights import bundle
from tests.helpers.run_dirs import call, refuses, write_folded, write_run

QUICK = ('--rounds=2', '--epochs=4', '--tune=4', '--batch=4')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


def test_a_run(run, tmp_path, monkeypatch, capsys):
    seen = {}
    real = compression.with_variables

    def spy(*args):
        seen['run'] = real(*args)
        return seen['run']

    monkeypatch.setattr(compression, 'with_variables', spy)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, compress, run.path, '--output=small', *QUICK)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == 'wrote small'
    assert any(line.startswith('conv1 ') and '20.53' in line for line in lines)
    assert any('times smaller' in line for line in lines)

    card = bundle.read_config('small')[1]
    size = (tmp_path / 'small' / 'model.compressed').stat().st_size
    facts = card['compression']
    assert facts['compressed'] == size and facts['times'] == facts['dense'] / size
    assert facts['layers'][-1]['layer'] == 'all' and len(facts['layers']) == 9
    assert 'times smaller' in (tmp_path / 'small' / 'README.md').read_text()

    # The same logits to the last bit as those of the network in memory.
    mesh = meshes.make((1, 1), towers=1, batches={})
    opened = inference.open_run('small', mesh)
    images = run.pictures['val'][:4]
    logits = [
        np.asarray(jax.jit(inference.predictor(r, mesh, 'center'))(images))
        for r in (opened, seen['run'])
    ]
    np.testing.assert_array_equal(*logits)
    assert logits[0].std() > 0
    mean = bundle.read('small').mean
    assert np.abs(mean - run.mean).max() <= 0.5 and (mean == np.rint(mean)).all()

    call(monkeypatch, evaluate, 'small', f'--store={run.store}', '--views=center', '--batch=4')
    assert f'{card["measured"]["top1_error"]:.2f}%' in capsys.readouterr().out
    options = ('--output=again', '--rounds=1', '--epochs=0', '--tune=0', '--batch=4')
    call(monkeypatch, compress, 'small', f'--store={run.store}', *options)
    assert bundle.is_bundle('again')


@pytest.mark.slow
def test_folded_normalizations_get_the_statistics_of_training_images(run, tmp_path):
    """They use the bundle's mean, not the store's; the card drops what applies only to the original."""
    config, net, folded = write_folded(run, tmp_path / 'folded', published={'top1_error': 5.0})
    conv, fc = {'conv': 0.0, 'fc': 0.0}, {'conv': 8, 'fc': 8}
    settings = compression.Settings(conv, fc, 1, epochs=0, tune=0, rate=0.1, tune_rate=0.1)
    options = {'store': str(run.store), 'batch': 4}
    card = compress.compress(tmp_path / 'folded', tmp_path / 'small', settings, **options)
    assert not {'folded', 'published', 'sha256'} & {*card} and card['title'] == 'A network'
    found = bundle.read(tmp_path / 'small').variables
    mean = bundle.read(tmp_path / 'folded').mean
    store = dataclasses.replace(open_store(run.store), mean=mean)
    expected = setup.unfolded(config, store, net, folded)
    jax.tree.map(np.testing.assert_array_equal, found['batch_stats'], expected['batch_stats'])
    images = run.pictures['val'][:, 4:-4, 4:-4].astype(np.float32) - mean[0, 0]
    old, new = (np.asarray(network.apply(net, tree, images)[0]) for tree in (folded, found))
    np.testing.assert_allclose(new, old, atol=0.1 * np.abs(old).max())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['RUN', '--output=.'], 'exists and is not an empty folder'),
        (['RUN', '--output=file/x', '--rate=1e6', '--epochs=9'], 'file/x: cannot be written'),
        (['nothing'], '--output=DIR'),
        (['nothing', '--output=x'], 'nothing'),
        (['RUN', '--bits_fc=9'], '--bits_fc=9: must be from 1 to 8'),
        (['RUN', '--prune_conv=nan'], '--prune_conv=nan: must be from 0'),
        (['RUN', '--rounds=0'], '--rounds=0'),
        (['RUN', '--epochs=-1'], '--epochs=-1.0: must be from 0'),
        (['RUN', '--rate=1e6', '--epochs=9', '--output=x'], 'not finite'),
        (['RUN', '--store=x', '--output=x'], '--store=x'),
    ],
)
def test_refused(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'file').touch()
    refuses(monkeypatch, tmp_path, compress, run.path, arguments, message)
