"""Converted weights give the results of the frameworks that they come from, on the same pixels."""

import os
import shutil

import jax
import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.images import central
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import readers, variables
from alexnet_jax.weights.variables import Options
from tests.deploy.test_parity import import_torchvision, random_norms
from tests.helpers import weight_files as files
from tests.weights.test_files import real

pytestmark = pytest.mark.deploy
CLASSES = 20
NAMES = [f'class {i}' for i in range(CLASSES)]
TOLERANCE = {'torchvision': 1e-6, 'caffe': 1e-4, 'onnx': 1e-5, 'keras': 1e-5}


def pictures(size=256, count=2):
    """Returns smooth images u8[B,S,S,3] whose channels differ."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (count, 8, 8, 3)) * [1.0, 0.8, 0.6]
    fine = rng.normal(0, 20, (count, size, size, 3))
    wide = np.kron(coarse, np.ones((1, -(-size // 8), -(-size // 8), 1)))[:, :size, :size]
    return np.clip(wide + fine, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A temporary folder whose large files do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def convert(folder, content, name, options=Options(), **others):  # noqa: B008
    """The file with this content as a bundle."""
    if content is not None:
        (folder / name).write_bytes(content)
    return readers.read(str(folder / name), options, names=NAMES, **others)


def logits(found, images, **changes):
    """Returns our logits of center crops, in float64: [B,K]."""
    config = found.config
    crop = config['augment']['crop']
    with jax.enable_x64(True):
        model = {**config['model'], 'dtype': 'float64', **changes}
        net = build(classes=len(found.names), **model)
        mean = np.float64(central(found.mean, crop))
        x = center(images, crop) - mean
        run = jax.jit(lambda tree, x: network.apply(net, tree, x)[0])
        return np.asarray(run(jax.tree.map(np.float64, found.variables), x))


def center(images, crop):
    start = (images.shape[1] - crop) // 2
    return images[:, start : start + crop, start : start + crop].astype(np.float64)


def difference(found, expected):
    """Returns the largest difference, as a fraction of the range of the expected logits."""
    between = np.abs(expected[0] - expected[1]).max()
    assert between > 0.004 * np.ptp(expected) > 0 and found.shape == expected.shape  # not blind
    return np.abs(found - expected).max() / np.ptp(expected)


TORCHVISION = {
    'alexnet': 'zip',
    'squeezenet1_0': 'legacy',
    'squeezenet1_1': 'safetensors',
    'mobilenet_v2': 'zip',
    'shufflenet_v2_x0_5': 'checkpoint',
    'shufflenet_v2_x1_0': 'legacy',
}


@pytest.mark.parametrize('name', TORCHVISION)
def test_torchvision(name, folder):
    torch = pytest.importorskip('torch', reason='needs torch: make test-deploy')
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES).eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and name[:5] in ('mobil', 'shuff'):
                torch.nn.init.kaiming_normal_(module.weight)  # else images hardly matter
            if isinstance(module, torch.nn.BatchNorm2d):
                for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
                    value = getattr(module, leaf)
                    value.copy_(torch.from_numpy(random_norms(rng, leaf, value)))
    form, file = TORCHVISION[name], folder / f'{name}.pth'
    if form == 'safetensors':
        save = pytest.importorskip('safetensors.torch').save_file
        file = file.with_suffix('.safetensors')
        save(model.state_dict(), file)
    elif form == 'checkpoint':
        state = {f'module.{key}': x for key, x in model.state_dict().items()}
        torch.save({'epoch': 3, 'state_dict': state, 'optimizer': {'rate': 0.1}}, file)
    else:
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=form == 'zip')
    found = convert(folder, None, file.name)
    images = pictures()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = ((center(images, 224) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(x.copy())).numpy()
    assert difference(logits(found, images), expected) < TOLERANCE['torchvision']


@pytest.mark.parametrize('crop', [224, 225])
def test_the_crops_of_torchvisions_alexnet(crop, folder):
    """Our network computes the same at both sizes, although it pools to the borders; others are refused."""
    torch = pytest.importorskip('torch', reason='needs torch: make test-deploy')
    torch.manual_seed(0)
    model = import_torchvision().models.alexnet(weights=None, num_classes=CLASSES).eval().double()
    torch.save(model.state_dict(), folder / 'net.pth')
    found = convert(folder, None, 'net.pth', options=Options('', (1.0,) * 3, crop))
    x = center(pictures(), crop) - found.mean[0, 0]
    with torch.no_grad():
        expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert difference(logits(found, pictures()), expected) < TOLERANCE['torchvision']
    with pytest.raises(UserError, match='equals this one at 224 or 225 pixels'):
        convert(folder, None, 'net.pth', options=Options('', None, crop + 2))


def caffe_arrays(preset, classes=CLASSES):
    net = variables.preset(preset, classes, {})

    shapes = files.their_shapes(net, files.caffe_name, 227)
    order = sorted(shapes, key=lambda key: (key[0].startswith('fc'), key[0]))
    return files.random_arrays({key: shapes[key] for key in order})


PROTOTXT = {
    'caffe': 'bvlc_alexnet.prototxt',
    'caffenet': 'bvlc_reference_caffenet.prototxt',
    'squeezenet': 'squeezenet_v1.0.prototxt',
}


def opencv(folder, preset, images, mean, classes=CLASSES):
    """The logits of OpenCV's importer of Caffe's files, from BVLC's or Han's prototxt; mean: B, G, R."""
    cv2 = pytest.importorskip('cv2')
    if not hasattr(cv2.dnn, 'readNetFromCaffe'):
        pytest.skip('needs OpenCV 4, which reads Caffe: make test-deploy')
    text = real(PROTOTXT[preset]).read_text().replace('num_output: 1000', f'num_output: {classes}')
    (folder / 'net.prototxt').write_text(text)
    net = cv2.dnn.readNetFromCaffe(str(folder / 'net.prototxt'), str(folder / 'net.caffemodel'))
    last = 'pool_final' if preset == 'squeezenet' else 'fc8'
    found = []
    for image in center(images, 227):
        pixels = (image[..., ::-1] - mean).astype(np.float32).transpose(2, 0, 1)[None]
        net.setInput(np.ascontiguousarray(pixels))
        found.append(net.forward(last).reshape(-1))
    return np.stack(found)


@pytest.mark.parametrize('old', [False, True], ids=['layer', 'layers'])
@pytest.mark.parametrize('preset', PROTOTXT)
def test_caffe(preset, old, folder):
    """The file determines the network, its mean image and its colors."""
    arrays = caffe_arrays(preset)
    order = ('Pooling', 'LRN') if preset == 'caffenet' else ('LRN', 'Pooling')
    padded = preset == 'squeezenet'
    content = files.caffemodel(arrays, order, name='', old=old, padded=padded)
    mean = real('ilsvrc_2012_mean.npy')
    found = convert(folder, content, 'net.caffemodel', mean=readers.mean_of(str(mean)))
    mean = np.load(mean).transpose(1, 2, 0)[14:241, 14:241]
    expected = opencv(folder, preset, pictures(), mean)
    ours = logits(found, pictures())
    if padded:  # the border of conv10, of 15 x 15 values
        ours = ours + 56 / 225 * np.maximum(arrays['conv_final', 1], 0)
    assert difference(ours, expected) < TOLERANCE['caffe']


def wrong_fc6(found):
    """Rows in the order (c, h, w)."""
    kernel = found.variables['params']['fc6']['kernel']
    kernel = kernel.reshape(6, 6, 256, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    found.variables['params']['fc6']['kernel'] = kernel


def wrong_colors(found):
    kernel = found.variables['params']['conv1']['kernel']
    found.variables['params']['conv1']['kernel'] = kernel[..., ::-1, :].copy()


MISTAKES = {
    "fc6's order": wrong_fc6,
    'BGR': wrong_colors,
    'x0.5': {'dropout': 'original'},
    'k': {'norm_k': 2.0},
    'alpha': {'norm_alpha_per': 'element'},
    'pool and norm swapped': {
        'after': ('act pool norm', 'act pool norm', 'act', 'act', 'act pool')
    },
}


@pytest.fixture(scope='module')
def alexnet(tmp_path_factory):
    """(the converted network, OpenCV's logits)"""
    folder, arrays = tmp_path_factory.mktemp('caffe'), caffe_arrays('caffe')
    found = convert(folder, files.caffemodel(arrays), 'net.caffemodel')
    expected = opencv(folder, 'caffe', pictures(), found.mean[0, 0, ::-1])
    shutil.rmtree(folder)
    assert difference(logits(found, pictures()), expected) < TOLERANCE['caffe']
    return found, expected


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes(mistake, alexnet):
    """The tolerance is far below the error that each common mistake causes."""
    found, expected = alexnet
    wrong, changes = MISTAKES[mistake], {}
    found = found._replace(variables=jax.tree.map(np.copy, found.variables))
    if callable(wrong):
        wrong(found)
    else:
        changes = wrong
    error = difference(logits(found, pictures(), **changes), expected)
    print(f'{mistake}: {error:.1e} of the range')
    assert error > 5 * TOLERANCE['caffe']


def test_onnx(folder):
    """The zoo's own graph with random weights, fed with 227 pixels."""
    onnx = pytest.importorskip('onnx', reason='needs onnx: make test-deploy')
    runtime = pytest.importorskip('onnxruntime', reason='needs onnxruntime: make test-deploy')
    light = os.path.join(os.path.dirname(onnx.__file__), 'backend/test/data/light')
    model = onnx.load(os.path.join(light, 'light_bvlc_alexnet.onnx'))
    graph, kept = model.graph, {'OC2_DUMMY_1', 'data_0'}
    shapes = {
        x.name.removesuffix('__SHAPE'): onnx.numpy_helper.to_array(x) for x in graph.initializer
    }
    shapes = {name: tuple(x.tolist()) for name, x in shapes.items() if name not in kept}
    shapes = {
        name: (CLASSES, *shape[1:]) if name.startswith('fc8') else shape
        for name, shape in shapes.items()
    }
    arrays = files.random_arrays(shapes)
    nodes = [node for node in graph.node if node.op_type != 'ConstantOfShape']
    rest = [x for x in graph.initializer if x.name in kept]
    inputs = [x for x in graph.input if x.name in kept]
    for part, content in (('node', nodes), ('initializer', rest), ('input', inputs)):
        graph.ClearField(part)
        getattr(graph, part).extend(content)
    for name, x in arrays.items():
        graph.initializer.append(onnx.numpy_helper.from_array(x, name))
        graph.input.append(onnx.helper.make_tensor_value_info(name, 1, x.shape))
    content = model.SerializeToString()
    found = convert(folder, content, 'net.onnx')
    for x, side in zip(inputs[0].type.tensor_type.shape.dim, (1, 3, 227, 227), strict=True):
        x.dim_value = side
    graph.ClearField('input')
    graph.input.extend([inputs[0]])
    graph.ClearField('output')
    graph.output.append(onnx.helper.make_tensor_value_info('r24', 1, (1, CLASSES)))
    graph.ClearField('value_info')
    model.ir_version = max(model.ir_version, 4)
    session = runtime.InferenceSession(model.SerializeToString())
    x = (center(pictures(), 227) - found.mean[0, 0])[..., ::-1].transpose(0, 3, 1, 2)
    expected = [session.run(['r24'], {'data_0': np.float32(image)[None]})[0][0] for image in x]
    assert difference(logits(found, pictures()), np.stack(expected)) < TOLERANCE['onnx']


@pytest.mark.parametrize(
    ('name', 'alpha', 'form'),
    [
        ('MobileNet', 0.5, 'model'),
        ('MobileNet', 1.0, 'weights'),
        ('MobileNetV2', 0.35, 'old weights'),
        ('MobileNetV2', 1.0, 'weights'),
        ('MobileNetV2', 1.4, 'model'),
    ],
)
def test_keras(name, alpha, form, folder):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    keras = pytest.importorskip('keras', reason='needs Keras: make test-deploy')
    h5py = pytest.importorskip('h5py', reason='needs h5py: make test-deploy')
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(1)
    make = getattr(keras.applications, name)
    model = make((224, 224, 3), alpha, weights=None, classes=CLASSES, classifier_activation=None)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for v in layer.weights:
                v.assign(random_norms(rng, v.name, v.numpy()))
        elif layer.weights:  # He initialization, or images would hardly matter
            kernel = layer.weights[0]
            fan_in = 9 if 'Depthwise' in type(layer).__name__ else np.prod(kernel.shape[:-1])
            kernel.assign(rng.normal(0, (2 / fan_in) ** 0.5, kernel.shape))
    file = folder / ('net.weights.h5' if form == 'weights' else 'net.h5')
    if form == 'weights':
        model.save_weights(file)
    else:
        model.save(file)
    if form == 'old weights':  # what keras.applications downloads
        with h5py.File(file) as whole, h5py.File(folder / 'old.h5', 'w') as old:
            for key in whole['model_weights']:
                whole.copy(f'model_weights/{key}', old)
            old.attrs.update(whole['model_weights'].attrs)
        file = folder / 'old.h5'
    found = convert(folder, None, file.name)
    assert found.config['model']['width'] == alpha
    expected = model(np.float32(center(pictures(), 224) / 127.5 - 1), training=False).numpy()
    assert difference(logits(found, pictures()), expected) < TOLERANCE['keras']
