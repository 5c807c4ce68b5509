"""A run directory is data: what is opened for it, and what is not."""

import json
import pickle
import shutil

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import buckets, prepare
from alexnet_jax.input.store import open_store
from alexnet_jax.rundir import directory
from alexnet_jax.training import inference
from configs import quickstart
from tests.helpers import fixtures
from tests.helpers.run_dirs import CLASSES, SIZE
from tests.helpers.stores import write_store


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run without checkpoints on a folder of images that could be prepared."""
    monkeypatch.chdir(tmp_path)
    tree = fixtures.write_tree(tmp_path / 'tree', {f'class {k}': 3 for k in range(CLASSES)})
    write_store(tmp_path / 'made', size=SIZE, classes=CLASSES)
    config = quickstart.get_config()
    config.update_from_flattened_dict({'data.source': str(tree), 'data.size': SIZE})
    directory.write(config, tmp_path / 'run', open_store(tmp_path / 'made'))
    return tmp_path / 'run'


def changed(run, **data):
    """The run with different fields in `config.data`."""
    config = json.loads((run / 'config.json').read_text())
    config['data'] |= data
    (run / 'config.json').write_text(json.dumps(config))
    return inference.describe_run(run)


@pytest.mark.parametrize('source', ['tree', 'alexnet_shapes', 'mnist', 'nothing'])
def test_nothing_is_prepared_for_a_run(run, monkeypatch, source):
    """Its store is gone: neither a folder of images nor a TFDS set is read."""
    for function in ('prepare', '_open'):
        monkeypatch.setattr(prepare, function, None)
    shutil.rmtree(run.parent / 'made')
    source = str(run.parent / 'tree') if source == 'tree' else source
    before = sorted(run.parent.rglob('*'))
    command = (
        f'--store=DIR, or prepare it: python -m alexnet_jax.prepare --source={source} .*--size=72'
    )
    with pytest.raises(UserError, match=f'no store here; give {command}') as error:
        inference.open_store([changed(run, source=source)])
    assert '\n' not in str(error.value) and sorted(run.parent.rglob('*')) == before


def test_a_store_that_is_there_is_opened(run):
    """The recorded store, else the config's, else its source's default; or the one named explicitly."""
    made = run.parent / 'made'
    assert inference.open_store([inference.describe_run(run)]).path == made
    (run / 'run.json').unlink()
    assert str(inference.open_store([changed(run, store='made')]).path) == 'made'
    shutil.copytree(made, 'data/tree-72-u8')
    info = json.loads((made / 'store.json').read_text()) | {'source': str(run.parent / 'tree')}
    (run.parent / 'data/tree-72-u8/store.json').write_text(json.dumps(info))
    assert str(inference.open_store([changed(run, store='')]).path) == 'data/tree-72-u8'
    assert inference.open_store([changed(run, store='gone')], str(made)).path == made


def test_an_incomplete_store_is_not_completed(run):
    info = json.loads((run.parent / 'made/store.json').read_text())
    (run.parent / 'made/store.json').write_text(json.dumps(info | {'complete': False}))
    for store in ('', 'made'):
        with pytest.raises(UserError, match='made is incomplete; run its prepare command again'):
            inference.open_store([inference.describe_run(run)], store)


def test_a_bucket_that_only_the_run_names_is_not_copied(run, monkeypatch):
    monkeypatch.setattr(buckets, 'local_copy', None)
    (run / 'run.json').unlink()
    url = 'gs://bucket/made'
    there = changed(run, store=url)
    with pytest.raises(UserError, match=f'no store here; give .* --store={url} to copy it'):
        inference.open_store([there])
    shutil.copytree('made', buckets.copy_of(url))
    assert str(inference.open_store([there]).path) == buckets.copy_of(url)


@pytest.mark.parametrize(
    ('name', 'value'), [('store', 5), ('size', '../..'), ('source', None), ('format', ['u8'])]
)
def test_values_of_other_types(run, name, value):
    with pytest.raises(UserError, match=f'not a run directory .*data.{name} is '):
        changed(run, **{name: value})


def test_nothing_in_a_run_directory_is_unpickled(run):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ('unpickled',))

    array = np.empty(1, object)
    array[0] = Bomb()
    np.savez(run / 'stats.npz', mean=array)
    with pytest.raises(UserError, match='incomplete run directory: Object arrays cannot be loaded'):
        inference.describe_run(run)
    (run / 'stats.npz').write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match='incomplete run directory: '):
        inference.describe_run(run)
