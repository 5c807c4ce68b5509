"""The file has the activations that the network computes, layer by layer, for files and splits."""

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import features
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import cpu
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import inference, steps
from tests.helpers.run_dirs import CLASSES, STEP, TEST, call, refuses, write_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def expected(run):
    """The activations of the test split by layer, channels of both towers in order, without `steps`."""
    images = (run.pictures['test'] - run.mean[None])[:, 4:68, 4:68]
    logits, out = jax.jit(lambda x: run.net.apply({'params': run.params}, x))(images)
    return {**{k: np.concatenate(v, axis=-1) for k, v in out.items()}, 'fc8': np.asarray(logits)}


@pytest.mark.parametrize('layer', ['fc7', 'conv2', 'fc8', None])
def test_a_split(run, expected, tmp_path, monkeypatch, capsys, layer):
    """Each tower on its own device, in batches of 4; by default, written to the run directory."""
    monkeypatch.chdir(tmp_path)
    options = ['--split=test', '--batch=4'] + (
        [f'--layer={layer}'] if layer else ['--output=f.npz']
    )
    call(monkeypatch, features, run.path, *options)
    layer = layer or 'fc7'
    output = run.path / f'features-{layer}.npz' if '--output=f.npz' not in options else 'f.npz'
    shape = list(expected[layer].shape)
    assert capsys.readouterr().out.splitlines() == [
        f'{run.path} (step {STEP}): {layer}, f32{shape}',
        f'wrote {output}',
    ]
    with np.load(output) as file:
        found = dict(file)
    assert found['features'].dtype == np.float32
    np.testing.assert_allclose(found['features'], expected[layer], rtol=1e-4, atol=1e-4)
    assert found['labels'].tolist() == [k % CLASSES for k in range(TEST)]
    assert found['records'].tolist() == [*range(TEST)]
    assert found['names'].tolist() == [f'class {k}' for k in range(CLASSES)]
    assert (str(found['layer']), int(found['step'])) == (layer, STEP)


def test_files(run, expected, tmp_path, monkeypatch, capsys):
    """Folders are searched; what cannot be read is reported and left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in/class 4').mkdir(parents=True)
    for record, name in enumerate(('in/class 4/a.png', 'in/x.png', 'b.png')):
        Image.fromarray(run.pictures['test'][record]).save(tmp_path / name)
    (tmp_path / 'in/bad.jpg').write_text('no picture')
    with pytest.raises(UserError, match='1 of 4 images could not be read; they are listed above'):
        call(monkeypatch, features, run.path, 'in', 'b.png', '--batch=2', '--output=f.npz')
    said = capsys.readouterr()
    assert said.out.endswith('wrote f.npz\n') and said.err.startswith(
        'error: in/bad.jpg: cannot be '
    )
    with np.load('f.npz') as file:
        assert file['paths'].tolist() == ['in/class 4/a.png', 'in/x.png', 'b.png']
        assert file['labels'].tolist() == [4, -1, -1]
        np.testing.assert_allclose(file['features'], expected['fc7'][:3], rtol=1e-4, atol=1e-4)


def test_the_library_gives_the_same(run, expected):
    classify = inference.load(run.path)
    for layer in ('fc7', 'pool5', None):
        found = classify.features(list(run.pictures['test']), layer=layer)
        np.testing.assert_allclose(found, expected[layer or 'fc7'], rtol=1e-4, atol=1e-4)
    assert classify.features(run.pictures['test'][0]).shape == expected['fc7'][0].shape
    with pytest.raises(UserError, match="layer='fc9': choose one of conv1, norm1, "):
        classify.features(run.pictures['test'][0], layer='fc9')


def test_the_layers_of_a_network(run):
    for net in (run.net, run.net.clone(remove='conv4')):
        assert [*steps.activations(net, 64), 'fc8'] == list(net.names)


def test_too_many_activations(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, 'memory', lambda: 1000)
    refuses(
        monkeypatch,
        tmp_path,
        features,
        run.path,
        ['RUN', '--split=test', '--batch=4', '--output=f.npz'],
        r'5 x \(256,\) activations are 0.0 GB, more than the memory',
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere', '--split=val'], 'nowhere: not a run directory'),
        (['RUN'], 'give either images, folders or --list=FILE, or --split=val'),
        (['RUN', 'text.jpg', '--split=val'], 'give either images'),
        (['RUN', '--split=all'], 'invalid choice'),
        (['RUN', '--split=val', '--layer=fc9'], "--layer='fc9': choose one of conv1, .*, fc7, fc8"),
        (['RUN', '--split=val', '--output=f.png'], 'features are written as NPZ; end the name in'),
        (['RUN', '--split=val', '--threads=-1'], '--threads=-1'),
        (['RUN', '--split=val', '--batch=0'], '--batch=0'),
        (['RUN', 'text.jpg'], 'text.jpg: cannot be decoded'),
        (['RUN', 'text.jpg', 'gone.jpg'], '2 of 2 images could not be read'),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'text.jpg').write_text('no picture')
    refuses(monkeypatch, tmp_path, features, run.path, arguments, message)


def test_each_tower_on_its_own_device(run, expected):
    mesh = meshes.make((2, 2), towers=2, batches={'--batch': 4})
    trained = inference.open_run(run.path, mesh)
    for layer in ('conv3', 'fc6', 'fc8'):
        batches = inference.padded(run.pictures['test'], 4)
        found = np.concatenate([*map(inference.make_features(trained, mesh, layer), batches)])
        np.testing.assert_allclose(found, expected[layer], rtol=1e-4, atol=1e-4)
