"""Bundles in place of run directories: the same results, also as the start of training."""

import jax
import numpy as np
import pytest

from alexnet_jax import evaluate, predict, visualize
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import checkpoint
from alexnet_jax.training import evaluation, inference, loop, steps
from alexnet_jax.training.setup import Setup
from alexnet_jax.weights import bundle
from configs import quickstart
from tests.helpers.run_dirs import CLASSES, CROP, SIZE, TRAIN, call, write_folded, write_run


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A run, and the folder of a bundle of it."""
    folder = tmp_path_factory.mktemp('tiny')
    run = write_run(folder)
    mesh = meshes.make((1, 1), towers=1, batches={})
    bundle.write(
        folder / 'bundle', inference.as_bundle(inference.open_run(run.path, mesh), made='x')
    )
    return run, folder / 'bundle'


def test_a_bundle_classifies_like_its_run(tiny):
    run, folder = tiny
    images = list(run.pictures['val'][:3])
    one, other = (inference.load(path) for path in (run.path, folder))
    np.testing.assert_array_equal(one(images), other(images))
    np.testing.assert_array_equal(one.features(images), other.features(images))
    assert (other.names, other.size, other.run.title) == (one.names, SIZE, str(folder))
    sums = evaluation.compare([run.path, folder], store=str(run.store), views=('center',))
    first, second, _ = sums.values()
    assert first['top1'] == second['top1'] and first['count'] == 12
    assert inference.describe_run('hub:quickstart').title == 'hub:quickstart'
    with pytest.raises(UserError, match='a bundle has no steps'):
        inference.load(folder, step=3)


def test_a_bundle_has_no_paths_of_this_machine(tiny):
    run, folder = tiny
    assert str(run.store) in (run.path / 'config.json').read_text()
    files = [folder / name for name in (bundle.CONFIG, bundle.NAMES, bundle.CARD)]
    assert not [file for file in files if str(run.path.parent) in file.read_text()]
    card = bundle.read_config(folder)[1]
    assert card == {'title': 'run', 'data': 'made_up', 'made': 'x'}
    described = inference.describe_run(run.path)
    for source, start, expected in (
        ('/data/flowers/', '/runs/first', ('flowers', 'first')),
        ('imagenet_resized/32x32', 'torchvision/alexnet', None),
        ('hf://datasets/a/b', 'hub:quickstart', None),
        ('flowers', 'runs/first', ('flowers', 'first')),
        ('clients/acme/photos', '', ('photos', '')),  # relative to a folder that is not this one
    ):
        config = {**described.config, 'data': {**described.config['data'], 'source': source}}
        config['train'] = {**config['train'], 'init_from': start}
        found = inference.as_bundle(described._replace(config=config)).config
        names = found['data']['source'], found['train']['init_from']
        assert names == (expected or (source, start))


def test_commands(tiny, tmp_path, monkeypatch, capsys):
    _, folder = tiny
    call(monkeypatch, visualize, folder, f'--output={tmp_path}/kernels.png')
    assert f'{folder}: 6 kernels of 11 x 11' in capsys.readouterr().out
    call(monkeypatch, visualize, folder)
    assert (folder / 'kernels.png').exists()
    monkeypatch.chdir(tmp_path)
    for module, arguments in ((visualize, ()), (evaluate, ('--confusion',))):
        with pytest.raises(UserError, match='quickstart: has no folder for results; give --output'):
            call(monkeypatch, module, 'quickstart', *arguments)
    with pytest.raises(UserError, match='no network of this name'):
        call(monkeypatch, predict, 'hub:nothing', 'a.jpg')


def start(config, workdir, mesh=(1, 1)):
    """Trains for a step -> the variables that training began with, by name."""
    config.run.update({'mesh': mesh, 'stop_after': '1', 'checkpoint_every': 1, 'keep': 5})
    with pytest.raises(Stopped):
        loop.train(config, workdir)
    net = build(classes=CLASSES, **config.model)
    target = steps.abstract_variables(
        net, meshes.make((1, 1), towers=1, batches={}), config.augment.crop
    )
    _, found, _ = checkpoint.Checkpoints(workdir / 'checkpoints').restore_part(target, 0)
    return jax.device_get(found)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def config_of(run, **changes):
    config = quickstart.get_config()
    fields = {'store': str(run.store), 'source': 'made_up', 'size': SIZE}
    config.data.update(fields)
    config.augment.crop = CROP
    config.model.width = 0.0625
    config.train.batch = 8
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize('mesh', [(1, 1), (2, 2)], ids=str)
def test_training_starts_from_a_bundle_as_from_its_run(tiny, tmp_path, caplog, mesh):
    run, folder = tiny
    caplog.set_level('INFO', 'alexnet_jax')
    changes = {'model.activation': 'tanh'}
    found = [
        start(config_of(run, **{**changes, 'train.init_from': str(path)}), tmp_path / name, mesh)
        for name, path in (('a', run.path), ('b', folder))
    ]
    same(*found)
    same(found[1]['params'], run.params)
    assert caplog.text.count("config.model.activation: 'relu' there, 'tanh' here") == 2
    assert caplog.text.count(' there, ') == 2


def test_the_start_must_fit(tiny, tmp_path):
    run, folder = tiny
    config = config_of(run, **{'train.init_from': str(folder), 'model.width': 0.125})
    with pytest.raises(UserError, match='init_from=.*bundle: a run of another network: its conv1/'):
        loop.train(config, tmp_path / 'a')
    other = configfile.load('squeezenet')
    other.train.init_from = str(folder)
    with pytest.raises(UserError, match='alexnet there, config.model.net=squeezenet here'):
        loop.train(other, tmp_path / 'a')
    assert not (tmp_path / 'a').exists()
    config.train.init_from = 'hub:squeeznet'
    with pytest.raises(UserError, match='did you mean squeezenet'):
        loop.train(config, tmp_path / 'a')
    config.data.source = config.data.store = ''
    with pytest.raises(UserError, match='^no images: name their folder'):
        loop.train(config, tmp_path / 'a')


@pytest.mark.slow
def test_folded_normalizations_get_the_statistics_of_training_images(tiny, tmp_path, caplog):
    """The function stays the same; what training mode computes is close to it from the first step on."""
    run, _ = tiny
    config, net, folded = write_folded(run, tmp_path / 'folded')
    config.train.update({'batch': 8, 'init_from': str(tmp_path / 'folded')})
    store = open_store(run.store)
    with caplog.at_level('INFO', 'alexnet_jax'):
        mesh = meshes.make((2, 1), towers=1, batches={})
        setup = Setup.make(config, mesh, store, net)
        nothing = checkpoint.Checkpoints(tmp_path / 'checkpoints')
        found = setup.start(nothing, config.train.init_from)[0].variables
    assert f'gets the statistics of {TRAIN} training images' in caplog.text
    images = run.pictures['val'][:, 4:-4, 4:-4].astype(np.float32) - 120
    apply = jax.jit(lambda tree, *training: network.apply(net, tree, images, *training)[0])
    old, new = apply(folded), apply(found)
    np.testing.assert_allclose(new, old, atol=1e-3 * np.abs(old).max())
    train = network.Training(jax.random.key(0), jax.numpy.arange(len(images)))
    modes = [apply(tree, train) for tree in (folded, found)]
    near = [np.abs(x - old).mean() for x in modes]
    assert near[1] < 0.5 * near[0]
