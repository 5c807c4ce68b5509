"""A run and a store made by an earlier version are resumed and evaluated.

`tests/old_runs/b8adf87` holds files written by commit b8adf87: a narrow run stopped at step 6 of 16, and
its store; `after.jsonl`, the rows of the same run trained to its end by that version; and
`evaluated.json`, the sums from that version's `evaluate` at step 6.
"""

import json
import shutil

import numpy as np
import pytest

from alexnet_jax.nets.build import build
from alexnet_jax.rundir import fingerprint, metrics
from alexnet_jax.rundir.checkpoint import Checkpoints
from alexnet_jax.training import checks, evaluation, loop
from configs import quickstart
from tests.helpers import ROOT
from tests.helpers.commands import outcome

OLD = ROOT / 'tests/old_runs/b8adf87'
CHANGES = {
    'data.source': 'made_up',
    'data.store': 'store',
    'data.size': 72,
    'data.format': 'jpg',
    'augment.crop': 64,
    'model.width': 0.0625,
    'model.hidden': (512, 512),
    'optim.epochs': 8.0,
    'optim.drops': (4.0,),
    'train.batch': 8,
    'run.eval_every': 2.0,
    'run.eval_batch': 6,
    'run.log_every': 1,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the old run and its store, in the current folder, as its config expects."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_config(shape):
    config = quickstart.get_config()
    config.update_from_flattened_dict({**CHANGES, 'run.mesh': shape})
    return config


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (2, 2)], ids=str)
def test_every_leaf_is_restored(folder, shape):
    config = make_config(shape)
    mesh, net = checks.check(config, loop.paths.path('run'), build)
    store = loop.prepare.ensure(**config.data)
    setup = loop.Setup.make(config, mesh, store, net.clone(classes=store.classes))
    state, history, running = setup.start(Checkpoints('run/checkpoints'), '')
    step, arrays, meta, _ = outcome(folder / 'run')
    found = {n: np.asarray(x).tobytes() for n, x in fingerprint.named_leaves(state).items()}
    assert found == arrays and step == int(state.step) == 6
    assert {str(s): error for s, error in history.items()} == meta['history'] and history
    assert running == meta['running']


@pytest.mark.slow
def test_it_is_trained_to_the_same_end(folder):
    """Up to rounding, since another machine may sum in a different order."""
    loop.train(make_config((1, 2)), 'run')
    expected = [json.loads(line) for line in (folder / 'after.jsonl').read_text().splitlines()]
    rows = metrics.read('run')
    assert [(r['kind'], r['step']) for r in rows] == [(r['kind'], r['step']) for r in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row['loss'] == pytest.approx(wanted['loss'], rel=1e-4), row['step']
        assert row.get('weights') == wanted.get('weights')


def test_it_is_evaluated_to_the_same_table(folder):
    expected = json.loads((folder / 'evaluated.json').read_text())
    sums = evaluation.compare(['run'], batch=6)
    assert [view for _, view in sums] == list(expected)
    for (_, view), found in sums.items():
        for name, value in expected[view].items():
            assert found[name] == pytest.approx(value, rel=1e-5), (view, name)
