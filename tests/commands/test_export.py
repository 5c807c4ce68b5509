"""Tests python -m alexnet_jax.export, with formats that need no other framework."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from alexnet_jax import export
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError, install
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import bundle, safetensors
from tests.helpers.stores import write_store

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
    assert 'largest logit difference on 4 random images' in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    arrays, _ = safetensors.read(f'{file}.safetensors')
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert 'HIGHEST' in program.mlir_module() and 'DEFAULT' not in program.mlir_module()
    found = program.call(arrays, images)
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
    (tmp_path / 'copy').mkdir()
    run(monkeypatch, made[0], '--format=bundle', f'--output={tmp_path}/copy', '--images=2')
    old, new = bundle.read(made[0]), bundle.read(tmp_path / 'copy')
    jax.tree.map(np.testing.assert_array_equal, old.variables, new.variables)
    with pytest.raises(UserError, match='copy: exists and is not an empty folder'):
        run(monkeypatch, made[0], '--format=bundle', f'--output={tmp_path}/copy', '--images=2')


def test_the_defaults_leave_a_bundle_as_it_was(made, monkeypatch, tmp_path):
    folder = tmp_path / 'net'
    shutil.copytree(made[0], folder)
    for kind in ('safetensors', 'torch', 'bundle'):
        run(monkeypatch, folder, f'--format={kind}', '--images=2')
    for file in made[0].iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    new = {file.name for file in folder.iterdir()} - {file.name for file in made[0].iterdir()}
    expected = {'weights.safetensors', 'weights.safetensors.json', 'model.pth', 'model.pth.json'}
    assert new == expected | {'bundle'}


def test_a_wrong_export_is_not_written(made, monkeypatch, tmp_path):
    decoded = safetensors.decoded

    def broken(data, file):
        arrays, metadata = decoded(data, file)
        if file == '.safetensors':
            arrays = {name: x + (name == 'params/fc8/bias') for name, x in arrays.items()}
        return arrays, metadata

    monkeypatch.setattr(safetensors, 'decoded', broken)
    with pytest.raises(UserError, match='more than 0.0001 of the range, so nothing was written'):
        run(monkeypatch, made[0], '--format=safetensors', f'--output={tmp_path}/a.safetensors')
    assert not [*tmp_path.iterdir()]


def made_up(difference, exact=None):
    """EXPORTS whose logits are off by a fraction of their range, and by another before quantization."""

    def make(source, args):
        def off(by):
            def computed(images):
                logits = export._logits(source, images)
                return logits + by * np.ptp(logits)

            return computed

        return export.Export(b'', off(difference), exact=None if exact is None else off(exact))

    return {'onnx': make}


@pytest.mark.parametrize(
    ('kind', 'difference', 'exact', 'message'),
    [
        ('onnx-int8', 0.15, 0.0, ''),
        ('onnx-int8', 0.25, 0.0, 'more than 0.2 of the range'),
        ('onnx-int8-dynamic', 0.06, 0.0, 'more than 0.05 of the range'),
        ('onnx-int8', 0.0, 2e-4, 'more than 0.0001 of the range'),
        ('onnx', 2e-4, None, 'more than 0.0001 of the range'),
    ],
)
def test_tolerances(kind, difference, exact, message, made, monkeypatch, tmp_path):
    monkeypatch.setattr(export, 'EXPORTS', made_up(difference, exact))
    monkeypatch.setattr(export.to_onnx, 'check_installed', lambda: None)
    call = (monkeypatch, made[0], f'--format={kind}', f'--output={tmp_path}/a.onnx', '--images=16')
    if message:
        with pytest.raises(UserError, match=f'{message}, so nothing was written'):
            run(*call)
    else:
        run(*call)
    assert (tmp_path / 'a.onnx').exists() == (not message)


def test_the_range_and_the_classes_of_validation_images():
    """An offset of all logits does not count; 95% of real images must keep their class."""
    rng = np.random.default_rng(0)
    ours = rng.uniform(size=(100, 4)).astype(np.float32) + 1000
    labels = np.zeros(100, int)
    with pytest.raises(UserError, match='more than 0.1 of the range'):
        export._compare('onnx', ours, ours + 0.2, labels, 0.1)
    close = np.zeros((100, 2)) + [0.5, 0.50001] + rng.uniform(size=(100, 1))
    with pytest.raises(UserError, match='same class for 90.0%; less than 95%'):
        export._compare(
            'onnx',
            close,
            np.where(np.arange(100)[:, None] < 10, close[:, ::-1], close),
            labels,
            0.1,
        )
    assert len(export._compare('onnx', close, close, labels, 0.1)) == 2
    assert len(export._compare('onnx', close[:1], close[:1], None, 0.1)) == 1


def test_a_store_without_validation_images(tmp_path, monkeypatch, made):
    store = tmp_path / 'store'
    write_store(store, format='u8', size=72, counts={'train': 3})
    (store / 'names.txt').write_text(''.join(f'{name}\n' for name in NAMES))
    output = f'--output={tmp_path}/a.pth'
    with pytest.raises(UserError, match="has no split 'val'"):
        run(monkeypatch, made[0], '--format=torch', output, f'--store={store}')


def test_names_are_refused_before_a_download(monkeypatch):
    monkeypatch.setattr(export.figures.hub, 'locate', lambda name: 1 / 0)
    for name in ('torchvision/alexnet', 'hub:squeezenet', 'hf://me/net', 'https://host/x'):
        with pytest.raises(UserError, match='has no folder for results; give --output'):
            run(monkeypatch, name, '--format=torch')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--format=onyx'], "--format='onyx': choose one of onnx"),
        (
            ['--format=torch', '--output=a.pt'],
            '--output=a.pt: the name must end in .pth for --format=torch',
        ),
        (['--format=torch', '--preprocess=graph'], 'has no program, only weights'),
        (['--format=torch', '--images=0'], '--images=0: must be at least 1'),
        (['--format=torch', '--output=/nowhere/a.pth'], '--output=/nowhere/a.pth'),
        (['--format=torch', '--store=/nowhere'], '--store=/nowhere: there is no store'),
        (['--format=torch', '--step=3'], 'a bundle has no steps'),
        (['--format=safetensors', '--output=FOLDER/model.safetensors'], 'is a run or a bundle'),
        (['--format=bundle', '--output=FOLDER'], 'exists and is not an empty folder'),
    ],
)
def test_mistakes(arguments, words, made, monkeypatch):
    before = sorted(made[0].iterdir())
    arguments = [x.replace('FOLDER', str(made[0])) for x in arguments]
    with pytest.raises(UserError) as error:
        run(monkeypatch, made[0], *arguments)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert sorted(made[0].iterdir()) == before


def test_without_the_packages_for_onnx(made, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=re.escape(install('onnx'))):
        run(monkeypatch, made[0], '--format=onnx')
