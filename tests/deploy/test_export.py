"""Exported networks in their target runtimes: onnxruntime, LiteRT, JAX's export, PyTorch."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import export
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.input.images import central, square
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.training import steps
from alexnet_jax.weights import bundle, safetensors
from tests.deploy.test_parity import import_torchvision
from tests.helpers import ROOT
from tests.helpers.stores import write_store

pytestmark = pytest.mark.deploy
NAMES = [f'class {i}' for i in range(12)]
NARROW = {'model.width': 0.125}
SMALL = {**NARROW, 'data.size': 128, 'augment.crop': 112}
# preset, changed fields, nodes of the ONNX graph that takes floats
NETWORKS = {
    'paper': ('paper', NARROW, 28),
    'original': ('original', {**SMALL, 'model.width': 0.25}, 37),
    'no_talk': ('no_talk', {**SMALL, 'model.width': 0.25}, 47),
    'three towers': (
        'paper',
        {'model.towers': 3, 'model.hidden': (96, 96), 'model.kernels': (24, 48, 96, 96, 48)},
        30,
    ),
    'norms across towers': ('paper', {**SMALL, 'model.norm_window': 'all'}, None),
    'tanh': ('paper', {**SMALL, 'model.activation': 'tanh'}, 28),
    'without conv1': ('paper', {**SMALL, 'model.remove': 'conv1'}, None),
    'disjoint': ('paper', {**SMALL, 'model.pooling': 'disjoint'}, 28),
    'owt': ('owt', NARROW, 20),
    'caffe': ('caffe', {**SMALL, 'augment.crop': 115}, 22),
    'alexnet_bn': ('alexnet_bn', NARROW, 20),
    'cifar10': ('cifar10:18pct', {}, None),
    'cifar10:11pct': ('cifar10:11pct', {}, None),
    'mobilenet': ('mobilenet', {'model.width': 0.35, 'data.size': 72, 'augment.crop': 64}, 99),
    'mobilenet:v1': (
        'mobilenet:v1',
        {'model.width': 0.25, 'data.size': 72, 'augment.crop': 64},
        56,
    ),
    'squeezenet': ('squeezenet', {'data.size': 72, 'augment.crop': 64}, 56),
    'shufflenet': ('shufflenet:x0.5', {'data.size': 72, 'augment.crop': 64}, None),
}


def random(path, leaf):
    """Values as large as those of a trained network, and normalizations that are not the identity."""
    rng = np.random.default_rng(sum(map(ord, '/'.join(network.names_of(path)))))
    name = network.names_of(path)[-1]
    if name in ('scale', 'var'):
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    std = 0.3
    if name in ('kernel', 'depthwise'):
        std = (2 / np.prod(leaf.shape[-4:-1] if name == 'kernel' else leaf.shape[:2])) ** 0.5
    return rng.normal(0, std, leaf.shape).astype(np.float32)


@pytest.fixture(scope='module')
def bundles(tmp_path_factory):
    """Makes a bundle with random weights by the name of a network."""
    made = {}

    def make(name):
        if name not in made:
            preset, changes, _ = NETWORKS[name]
            with configfile.load(preset).unlocked() as config:
                config.update_from_flattened_dict({'data.source': 'made_up', **changes})
            size, crop = config.data.size, config.augment.crop
            net = build(classes=len(NAMES), **config.model)
            variables = jax.tree.map_with_path(random, network.shapes(net, crop))
            mean = np.random.default_rng(2).uniform(80, 160, (size, size, 3)).astype(np.float32)
            folder = tmp_path_factory.mktemp('bundle') / 'net'
            content = bundle.Bundle(config.to_dict(), variables, NAMES, mean, {})
            bundle.write(folder, content)
            made[name] = folder, net, content
        return made[name]

    return make


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export', *map(str, arguments)])
    export.main()


def ours(net, content, images):
    mean = central(content.mean, images.shape[1])
    apply = jax.jit(lambda x: network.apply(net, content.variables, steps.normalize(x, mean))[0])
    return np.asarray(apply(images))


def pixels(content, count=5):
    crop = content.config['augment']['crop']
    return np.random.default_rng(1).integers(0, 256, (count, crop, crop, 3), np.uint8)


def close(found, expected, tolerance=2e-5):
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('preprocess', ('graph', 'json'))
def test_onnx(name, preprocess, bundles, monkeypatch, tmp_path):
    onnx = pytest.importorskip('onnx', reason='needs onnx: make test-deploy')
    runtime = pytest.importorskip('onnxruntime', reason='needs onnxruntime: make test-deploy')
    folder, net, content = bundles(name)
    file = tmp_path / 'model.onnx'
    run(
        monkeypatch,
        folder,
        '--format=onnx',
        f'--output={file}',
        f'--preprocess={preprocess}',
        '--images=3',
    )
    images = pixels(content)
    about = json.loads((tmp_path / 'model.onnx.json').read_text())
    given = images
    if preprocess == 'json':
        mean = np.load(tmp_path / about['input']['mean'])
        given = (images - mean).transpose(0, 3, 1, 2)
    session = runtime.InferenceSession(file)
    assert [1 if n == 'batch' else n for n in about['input']['shape']] == [1, *given.shape[1:]]
    for count in (1, len(images)):  # any batch
        (found,) = session.run(['logits'], {'images': given[:count]})
        close(found, ours(net, content, images[:count]))
    nodes = NETWORKS[name][2]
    if nodes and preprocess == 'json':
        assert len(onnx.load(file).graph.node) == nodes


def test_towers_are_groups_and_normalizations_are_folded(bundles, monkeypatch, tmp_path):
    onnx = pytest.importorskip('onnx', reason='needs onnx: make test-deploy')
    groups = {'paper': [1, 2, 1, 2, 2], 'alexnet_bn': [1, 2, 1, 2, 2], 'caffe': [1, 2, 1, 2, 2]}
    for name, expected in {**groups, 'no_talk': [1, 2, 2, 2, 2]}.items():
        file = tmp_path / f'{name}.onnx'
        run(monkeypatch, bundles(name)[0], '--format=onnx', f'--output={file}', '--images=1')
        nodes = onnx.load(file).graph.node
        convs = [node for node in nodes if node.op_type == 'Conv']
        assert [a.i for node in convs for a in node.attribute if a.name == 'group'] == expected
        assert {'LRN'} & {node.op_type for node in nodes} or name == 'alexnet_bn'


@pytest.mark.parametrize('name', NETWORKS)
def test_stablehlo(name, bundles, monkeypatch, tmp_path):
    folder, net, content = bundles(name)
    file = tmp_path / 'model.stablehlo'
    run(monkeypatch, folder, '--format=stablehlo', f'--output={file}', '--images=3')
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert {*program.platforms} == {'cpu', 'cuda', 'rocm', 'tpu'}
    arrays, _ = safetensors.read(str(tmp_path / 'model.stablehlo.safetensors'))
    for count in (1, 5):
        images = pixels(content, count)
        close(np.asarray(program.call(arrays, images)), ours(net, content, images))


@pytest.mark.parametrize(
    'name',
    (
        'paper',
        'original',
        'owt',
        'caffe',
        'alexnet_bn',
        'cifar10',
        'mobilenet',
        'squeezenet',
        'shufflenet',
    ),
)
@pytest.mark.parametrize('kind', ('tflite', 'tflite-int8'))
def test_tflite(name, kind, bundles, monkeypatch, tmp_path):
    litert = pytest.importorskip('ai_edge_litert.interpreter', reason='needs ai-edge-litert')
    folder, net, content = bundles(name)
    file = tmp_path / 'model.tflite'
    run(monkeypatch, folder, f'--format={kind}', f'--output={file}', '--images=2')
    interpreter = litert.Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    images, (place,) = pixels(content, 3), interpreter.get_input_details()
    found = []
    for image in images:
        interpreter.set_tensor(place['index'], image[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]['index'])[0])
    close(np.stack(found), ours(net, content, images), 2e-5 if kind == 'tflite' else 0.15)
    names = [op['op_name'] for op in interpreter._get_ops_details()]
    assert 'MAXIMUM' not in names and ('MAX_POOL_2D' in names or name == 'mobilenet')
    assert not [op for op in names if op.startswith('STABLEHLO')]


def docs_example(start, end):
    """The example of docs/weights.md whose code begins and ends like this."""
    text = (ROOT / 'docs/weights.md').read_text()
    (code,) = re.findall(rf'```python\n({start}.*?){end}', text, re.S)
    return code


@pytest.mark.parametrize('size', [(500, 375), (90, 200), (20, 23)])
@pytest.mark.parametrize('name', ['cifar10', 'caffe'])  # 32 to 24 pixels, and 256 to 227
def test_tflite_example_of_the_docs(size, name, bundles, monkeypatch, tmp_path):
    pytest.importorskip('ai_edge_litert.interpreter', reason='needs ai-edge-litert')
    folder, net, content = bundles(name)
    run(
        monkeypatch,
        folder,
        '--format=tflite',
        f'--output={tmp_path / "model.tflite"}',
        '--images=2',
    )
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(tmp_path / 'a.png')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['example', 'a.png'])
    scope = {}
    exec(docs_example('import json\nimport sys', '```'), scope)
    side, crop = content.config['data']['size'], content.config['augment']['crop']
    squares = square((tmp_path / 'a.png').read_bytes(), side)[None]
    expected = np.asarray(central(squares, crop))[0]
    assert np.abs(scope['pixels'].astype(int) - expected).max() <= 2  # rounding
    close(scope['logits'], ours(net, content, scope['pixels'][None])[0], 2e-5)


def docs_class():
    scope = {}
    exec(docs_example('import json\n\nimport torch', '\n\n\nwith open'), scope)
    return scope['AlexNet']


@pytest.mark.parametrize(
    'name', ('paper', 'original', 'three towers', 'norms across towers', 'tanh', 'owt', 'caffe')
)
def test_torch_class_of_the_docs(name, bundles, monkeypatch, tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: make test-deploy')
    folder, net, content = bundles(name)
    file = tmp_path / 'model.pth'
    if name == 'owt':  # torchvision's at 224 pixels
        changed = {**content.config, 'augment': {**content.config['augment'], 'crop': 192}}
        variables = jax.tree.map_with_path(random, network.shapes(net, 192))
        content = content._replace(config=changed, variables=variables)
        folder = tmp_path / 'net'
        bundle.write(folder, content)
    run(monkeypatch, folder, '--format=torch', f'--output={file}', '--images=2')
    about, images = json.loads((tmp_path / 'model.pth.json').read_text()), pixels(content)
    model = docs_class()(torch.load(file), about['model']).eval()
    mean = np.load(tmp_path / about['input']['mean'])
    with torch.no_grad():
        found = model(torch.from_numpy((images - mean).transpose(0, 3, 1, 2).copy())).numpy()
    close(found, ours(net, content, images))


@pytest.mark.parametrize(
    ('name', 'theirs'),
    [
        ('owt', 'alexnet'),
        ('squeezenet', 'squeezenet1_0'),
        ('mobilenet', 'mobilenet_v2'),
        ('shufflenet', 'shufflenet_v2_x0_5'),
    ],
)
def test_torchvision_opens_it(name, theirs, bundles, monkeypatch, tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: make test-deploy')
    torchvision = import_torchvision()
    folder, net, content = bundles(name)
    if name == 'owt':  # which has no narrow version
        config = configfile.load('owt').to_dict()
        net = build(classes=len(NAMES), **config['model'])
        variables = jax.tree.map_with_path(random, network.shapes(net, 224))
        content = content._replace(
            config={**config, 'data': {**config['data'], 'source': 'made_up'}}, variables=variables
        )
        folder = tmp_path / 'net'
        bundle.write(folder, content)
    file, images = tmp_path / 'model.pth', pixels(content)
    run(monkeypatch, folder, '--format=torch', f'--output={file}', '--images=2')
    width = {'width_mult': net.width} if name == 'mobilenet' else {}
    model = getattr(torchvision.models, theirs)(weights=None, num_classes=len(NAMES), **width)
    model.load_state_dict(torch.load(file))
    about = json.loads((tmp_path / 'model.pth.json').read_text())
    mean = np.load(tmp_path / about['input']['mean'])
    with torch.no_grad():
        found = model.eval()(torch.from_numpy((images - mean).transpose(0, 3, 1, 2).copy())).numpy()
    close(found, ours(net, content, images))


@pytest.mark.parametrize(
    ('name', 'kind', 'tolerance', 'size'),
    [
        ('original', 'onnx-float16', 0.0015, 0.6),
        ('original', 'onnx-int8', 0.06, 0.35),
        ('original', 'onnx-int8-dynamic', 0.035, 0.5),
        ('mobilenet', 'onnx-float16', 0.03, 0.6),
        ('mobilenet', 'onnx-int8', 0.25, 0.5),
        ('mobilenet', 'onnx-int8-dynamic', 0.012, 1.0),
    ],
)
def test_fewer_bits(name, kind, tolerance, size, bundles, monkeypatch, tmp_path, capsys):
    runtime = pytest.importorskip('onnxruntime', reason='needs onnxruntime: make test-deploy')
    folder, net, content = bundles(name)
    store, side = tmp_path / 'store', content.config['data']['size']
    counts = {'train': 24, 'val': 24}
    pictures = write_store(store, format='u8', size=side, classes=len(NAMES), counts=counts)
    monkeypatch.setitem(export.FORMATS, kind, ('.onnx', tolerance))  # of random weights
    for form in ('onnx', kind):
        file = tmp_path / f'{form}.onnx'
        run(monkeypatch, folder, f'--format={form}', f'--output={file}', f'--store={store}')
    assert 'top-1 error on them' in capsys.readouterr().out
    images = np.asarray(central(pictures['val'], content.config['augment']['crop']))
    (found,) = runtime.InferenceSession(file).run(['logits'], {'images': images})
    expected = ours(net, content, images)
    difference = np.abs(found - expected).max() / np.ptp(expected)
    share = file.stat().st_size / (tmp_path / 'onnx.onnx').stat().st_size
    assert 0 < difference < tolerance and share < size, (difference, share)


def test_8_bits_need_training_images(bundles, monkeypatch, tmp_path):
    pytest.importorskip('onnxruntime', reason='needs onnxruntime: make test-deploy')
    with pytest.raises(UserError, match='--format=onnx-int8: needs the training images'):
        run(
            monkeypatch, bundles('original')[0], '--format=onnx-int8', f'--output={tmp_path}/a.onnx'
        )
    assert not [*tmp_path.iterdir()]
