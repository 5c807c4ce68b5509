"""Tests python -m alexnet_jax.export, with formats that need no other program."""

import json
import sys

import jax
import numpy as np
import pytest

from alexnet_jax import export
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import bundle, safetensors

NAMES = ['cat', 'dog', 'newt']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A bundle of a small network of two towers."""
    with configfile.load('quickstart').unlocked() as config:
        fields = {
            'data.source': 'made_up',
            'data.size': 72,
            'augment.crop': 64,
            'model.width': 0.125,
        }
        config.update_from_flattened_dict(fields)
    net = build(classes=len(NAMES), **config.model)
    variables = jax.device_get(network.init(net, jax.random.key(0), 64))
    mean = np.full((72, 72, 3), [120.0, 110.0, 100.0], np.float32)
    folder = tmp_path_factory.mktemp('made') / 'net'
    bundle.write(folder, bundle.Bundle(config.to_dict(), variables, NAMES, mean, {}))
    return folder, net, variables


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export', *map(str, arguments)])
    export.main()


def test_stablehlo_runs_from_its_files(made, monkeypatch, tmp_path, capsys):
    folder, net, variables = made
    file = tmp_path / 'a.stablehlo'
    run(monkeypatch, folder, '--format=stablehlo', f'--output={file}', '--images=4')
    assert 'largest difference of a logit on 4 random images' in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    arrays, _ = safetensors.read(f'{file}.safetensors')
    found = jax.export.deserialize(bytearray(file.read_bytes())).call(arrays, images)
    mean = np.array([120.0, 110.0, 100.0], np.float32)
    expected, *_ = network.apply(net, variables, images - mean.reshape(1, 1, 1, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    about = json.loads((tmp_path / 'a.stablehlo.json').read_text())
    assert about['classes'] == NAMES and about['input']['dtype'] == 'uint8'
    assert about['prepare']['resize_shorter_side'] == 72


@pytest.mark.parametrize(('kind', 'suffix'), [('safetensors', '.safetensors'), ('torch', '.pth')])
def test_weights_alone(kind, suffix, made, monkeypatch, tmp_path):
    file = tmp_path / f'a{suffix}'
    run(monkeypatch, made[0], f'--format={kind}', f'--output={file}', '--images=2')
    about = json.loads((tmp_path / f'a{suffix}.json').read_text())
    assert about['input']['mean'] == [120.0, 110.0, 100.0]
    assert about['model']['towers'] == 2
    assert {*tmp_path.iterdir()} == {file, tmp_path / f'a{suffix}.json'}


def test_a_bundle_of_a_bundle(made, monkeypatch, tmp_path):
    run(monkeypatch, made[0], '--format=bundle', f'--output={tmp_path}/copy', '--images=2')
    old, new = bundle.read(made[0]), bundle.read(tmp_path / 'copy')
    jax.tree.map(np.testing.assert_array_equal, old.variables, new.variables)


def test_a_wrong_export_is_not_written(made, monkeypatch, tmp_path):
    decoded = safetensors.decoded

    def broken(data, file):
        arrays, metadata = decoded(data, file)
        if file == '.safetensors':
            arrays = {name: x + (name == 'params/fc8/bias') for name, x in arrays.items()}
        return arrays, metadata

    monkeypatch.setattr(safetensors, 'decoded', broken)
    with pytest.raises(
        UserError, match='more than 0.0001 of the largest logit, so nothing was written'
    ):
        run(monkeypatch, made[0], '--format=safetensors', f'--output={tmp_path}/a.safetensors')
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--format=onyx'], "--format='onyx': choose one of onnx"),
        (['--format=torch', '--output=a.pt'], '--output=a.pt: --format=torch is written as .pth'),
        (['--format=torch', '--preprocess=graph'], 'has no program, only weights'),
        (['--format=torch', '--images=0'], '--images=0: must be at least 1'),
        (['--format=torch', '--output=/nowhere/a.pth'], '--output=/nowhere/a.pth'),
        (['--format=torch', '--store=/nowhere'], '--store=/nowhere: there is no store'),
        (['--format=torch', '--step=3'], 'a bundle has no steps'),
    ],
)
def test_mistakes(arguments, words, made, monkeypatch):
    before = sorted(made[0].iterdir())
    with pytest.raises(UserError) as error:
        run(monkeypatch, made[0], *arguments)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert sorted(made[0].iterdir()) == before


def test_without_the_packages_for_onnx(made, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r"pip install 'alexnet_jax\[onnx\]'"):
        run(monkeypatch, made[0], '--format=onnx')
