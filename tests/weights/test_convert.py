"""Weights of other frameworks, in files as they write them; malicious and damaged files are refused."""

import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax import convert
from alexnet_jax.common import class_names
from alexnet_jax.common.errors import UserError, install
from alexnet_jax.nets import network
from alexnet_jax.weights import bundle, caffe, hub, pth, readers, tflite, torch, variables
from alexnet_jax.weights.variables import Options
from tests.helpers import run_dirs
from tests.helpers import weight_files as files
from tests.weights.test_files import SQUEEZENET, real

CLASSES = 3
NAMES = ['ant', 'bee', 'cat']
SMALL = 'squeezenet:1.1'


def torch_arrays(preset, classes=CLASSES):
    net = variables.preset(preset, classes, {})
    return files.random_arrays(files.their_shapes(net, torch.names(net), 224))


def caffe_arrays(preset, classes=CLASSES):
    def name(path):
        parts = {'squeeze': 'squeeze1x1'}
        return '/'.join(parts.get(x, x) for x in path[1:-1]), int(path[-1] == 'bias')

    net = variables.preset(preset, classes, {})
    return files.random_arrays(files.their_shapes(net, name, 227))


def read(tmp_path, name, content, options=Options(), **others):  # noqa: B008
    file = tmp_path / name
    file.write_bytes(content)
    return readers.read(str(file), options, **{'names': NAMES, **others})


def refused(tmp_path, name, content, *words, **others):
    """The one-line error of a file."""
    with pytest.raises(UserError) as error:
        read(tmp_path, name, content, **others)
    text = str(error.value)
    assert text.isprintable() and name in text, text
    for word in words:
        assert word in text, text
    return text


# PyTorch


@pytest.mark.parametrize('preset', torch.PRESETS)
def test_the_networks_of_torchvision_are_found(preset):
    net = variables.preset(preset, CLASSES, {})
    shapes = files.their_shapes(net, torch.names(net), 224)
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    found = torch.read(zeros, Options())
    assert (found.preset, found.classes, found.weights.crop) == (preset, CLASSES, 224)
    expected = jax.tree.map(np.shape, network.shapes(net, 224))
    assert jax.tree.map(np.shape, found.weights.variables) == {'batch_stats': {}, **expected}


FORMS = ('zip', 'legacy', 'checkpoint', 'legacy checkpoint', 'parallel', 'half', 'safetensors')


@pytest.mark.parametrize('form', FORMS)
def test_forms_of_state_dicts(tmp_path, form):
    arrays = torch_arrays(SMALL)
    if form == 'half':
        arrays = {name: x.astype(np.float16) for name, x in arrays.items()}
    name, content = 'net.pth', files.pth_of(arrays, 'legacy' in form, 'checkpoint' in form)
    if form == 'safetensors':
        from alexnet_jax.weights import safetensors

        name, content = 'net.safetensors', safetensors.encoded(arrays, {})
        read(tmp_path, 'net.bin', content)  # recognized without its suffix
    if form == 'parallel':
        renamed = {
            f'module.{key}'.replace('features.', 'features.module.'): x for key, x in arrays.items()
        }
        content = files.pth_of(renamed)
    found = read(tmp_path, name, content)
    params = found.variables['params']
    np.testing.assert_array_equal(
        params['fire2']['expand3x3']['kernel'],
        arrays['features.3.expand3x3.weight'].transpose(2, 3, 1, 0),
    )
    std, net = np.array(torch.STD), found.config['model']
    first = arrays['features.0.weight'].transpose(2, 3, 1, 0) * (net['input_std'] / std)[:, None]
    np.testing.assert_allclose(params['conv1']['kernel'], first, rtol=1e-6)
    assert params['conv1']['kernel'].dtype == np.float32
    assert params['conv10']['kernel'].dtype == np.float32
    np.testing.assert_allclose(found.mean[5, 7], torch.MEAN, rtol=1e-6)
    assert found.names == NAMES and found.mean.shape == (256, 256, 3)
    assert found.config['augment']['crop'] == 224 and net['version'] == '1.1'


def test_names_with_module_in_them():
    zeros = np.zeros(2, np.float32)
    found = pth.state_dict(files.pth_of({'module.submodule.x': zeros, 'modules.y': zeros}))
    assert [*found] == ['submodule.x', 'modules.y']
    with pytest.raises(variables.Damaged, match='differ only in `module`'):
        pth.state_dict(files.pth_of({'module.x': zeros, 'x': zeros}))


def test_views_of_a_storage():
    """Offsets and strides, as of a transposed part of a tensor."""
    stored = np.arange(24, dtype=np.float32)
    data = {'data/0': stored.tobytes()}
    part = files.tensor('0', np.float32, (3, 2), (2, 6), offset=7, count=24)
    found = pth.state_dict(files.zipped({'data.pkl': files.described({'a': part}), **data}))
    np.testing.assert_array_equal(
        found['a'],
        stored.reshape(4, 3, 2)[1:3]
        .reshape(-1)[1:]
        .reshape(-1)[np.array([[0, 6], [2, 8], [4, 10]])],
    )


def test_torchvisions_alexnet():
    """fc6 reads maps in a different order; other AlexNets, and crops with different pooling, are refused."""
    net = variables.preset('owt', CLASSES, {})
    shapes = files.their_shapes(net, torch.names(net), 224)
    state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    state['classifier.1.weight'][9, 200 * 36 + 4 * 6 + 1] = 1  # map 200, row 4, column 1
    params = torch.from_state_dict(net, state)['params']
    assert params['fc6']['kernel'][0, (4 * 6 + 1) * 256 + 200, 9] == 1
    for crop in (223, 226, 227):
        with pytest.raises(UserError, match='224 or 225 pixels'):
            torch.from_state_dict(net, state, crop=crop)
    for changes in ({'dropout': 'original'}, {'norms': 'all'}, {'conv1_padding': (0, 3)}):
        other = variables.preset('owt', CLASSES, changes)
        with pytest.raises(UserError, match=f'preset owt in {[*changes][0]}'):
            torch.from_state_dict(other, state)


def test_names_are_matched_in_full(tmp_path):
    arrays = torch_arrays(SMALL)
    arrays['features.99.bias'] = arrays.pop('features.3.squeeze.bias')
    arrays['features.0.bias'] = arrays['features.0.bias'][:5]
    refused(
        tmp_path,
        'net.pth',
        files.pth_of(arrays),
        'missing: features.3.squeeze.bias;',
        'extra: features.99.bias;',
        'shapes: features.0.bias is [5] but should be [64]',
    )
    refused(tmp_path, 'net.pth', files.pth_of({'a': np.zeros(3, np.float32)}), 'it lacks ')


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


TOWER = b')' + b'2\x86' * 60  # nested pairs, 60 levels deep


def malicious(tmp_path):
    """{name: (content, words of the error)}, each with a part that must not be trusted."""
    state = torch_arrays(SMALL)
    whole, first = files.pth_of(state), files.tensor('0', np.float32, (2, 3))

    def one(pickled, **members):
        return files.zipped({'data.pkl': pickled, 'data/0': bytes(24), **members})

    def entry(value):
        return one(files.described({'features.0.weight': value}))

    def shaped(*arguments, **others):
        return entry(files.tensor('0', np.float32, *arguments, **others))

    run = pickle.dumps(Malicious(tmp_path / 'run'), 2)
    nested = b'\x80\x02' + b'(' * 50_000 + b't' * 50_000 + b'.'
    yield from {
        'runs a function': (one(run), 'asks for posix.mkdir'),
        'runs a function, legacy': (run, 'asks for posix.mkdir'),
        'a builtin': (one(b'\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.'), 'builtins.eval'),
        'an attribute': (one(b'\x80\x04\x8c\x05torch\x8c\x08_C.x.y.z\x93.'), 'torch._C.x.y.z'),
        'a network': (one(b'\x80\x02ctorchvision.models.alexnet\nAlexNet\n)\x81.'), 'state_dict()'),
        'the registry': (one(b'\x80\x02\x82\x01.'), 'pickle is damaged'),
        'a memo of gigabytes': (one(b'\x80\x02K\x01r\xff\xff\xff\x7f.'), 'contains no state dict'),
        'depth': (one(nested), ''),
        'a path': (files.zipped({'../../evil': b'x', 'data.pkl': b''}), 'its archive has a file'),
        'an absolute path': (files.zipped({'/evil': b'x'}, root=''), ''),
        'a bomb': (
            files.zipped({'data.pkl': bytes(10**7)}, zipfile.ZIP_DEFLATED),
            'archive is compressed',
        ),
        'a long pickle': (one(bytes(pth.LONGEST + 1)), 'its pickle has more than 16,777,216 bytes'),
        'not an archive': (pth.ZIP + bytes(100), ''),
        'big-endian': (one(files.described({}), byteorder=b'big'), 'little-endian'),
        'truncated': (whole[: len(whole) // 2], ''),
        'a flipped byte': (flipped(whole, whole.index(b'data/0') + 500), 'Bad CRC-32'),
        'outside the storage': (shaped((2, 3), (3, 1), offset=1, count=6), 'lies outside'),
        'strides outside': (shaped((2, 3), (4, 1), count=6), 'lies outside'),
        'negative strides': (shaped((2, 3), (-3, 1), count=6), 'impossible shape'),
        'an enormous shape': (shaped((2**39, 2**39), (0, 0), count=6), 'impossible shape'),
        'an enormous empty shape': (shaped((0, 2**39, 2**39), (0, 0, 0)), 'impossible shape'),
        'a dict in itself': (one(b'\x80\x02}q\0X\x01\0\0\0xh\0s.'), 'x is not a tensor'),
        **{
            f'a key that takes forever to hash: {kind}': (one(start + TOWER + end), 'keys that are')
            for kind, start, end in (
                ('item', b'\x80\x02}', b'K\x01s.'),
                ('items', b'\x80\x02}(', b'K\x01u.'),
                ('pairs', b'\x80\x02ccollections\nOrderedDict\n](', b'K\x01\x86e\x85R.'),
            )
        },
        'a set': (one(b'\x80\x02\x8f(' + TOWER + b'\x90.'), 'pickle is damaged'),
        'a storage that takes forever to name': (
            one(b'\x80\x02(' + files._op('storage') * 2 + TOWER + b'K\0K\0tQ.'),
            'described wrongly',
        ),
        'another count': (shaped((2, 3), count=7), 'does not have 7 numbers'),
        'an enormous count': (shaped((2, 3), count=2**60), 'does not have'),
        'a name for a terminal': (
            one(files.described({files.EVIL: files._op('x')})),
            f'{files.SHOWN} is not a tensor',
        ),
        'a function for a terminal': (
            one(b'\x80\x02ca\x1b[31m\nb\x1b\n.'),
            r'a\x1b[31m.b\x1b, which',
        ),
        'a member for a terminal': (
            files.zipped({'data.pkl': b'', f'../{files.EVIL}': b''}),
            files.SHOWN,
        ),
        'a storage for a terminal': (
            one(
                files.described({'a': files.tensor(files.EVIL, np.float32, (2, 3))}),
                **{f'data/{files.EVIL}': bytes(8)},
            ),
            f'storage {files.SHOWN} does not have 6',
        ),
        'an extra name for a terminal': (
            files.pth_of({**state, files.EVIL: state['features.0.bias']}),
            f'extra: {files.SHOWN}',
        ),
        'a missing storage': (entry(files.tensor('7', np.float32, (2, 3))), ''),
        'text': (entry(files._op('x')), 'is not a tensor'),
        'a tensor without a storage': (
            entry(files.call('torch._utils', '_rebuild_tensor_v2', 'x', 0, (2,), (1,))),
            'no storage',
        ),
        'a list': (one(b'\x80\x02].'), 'contains no state dict'),
        'numbers as keys': (one(b'\x80\x02}K\x01' + first + b's.'), 'is not a tensor'),
        'legacy, truncated': (files.pth_of(state, legacy=True)[:-100], 'ends after'),
        'legacy, an enormous storage': (
            files.pth_of({'a': np.zeros(3, np.float32)}, legacy=True)[:-20]
            + struct.pack('<q', 2**62),
            'ends after',
        ),
        'an error without a text': (one(b'\x80\x02i\n\n.'), 'is damaged: KeyError: 105'),
        **{
            name: (content, 'does not begin like a torch.save file')
            for name, content in (('empty', b''), ('JPEG', b'\xff\xd8\xff'), ('text', b'<html>'))
        },
    }.items()


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def test_malicious_state_dicts(tmp_path):
    for name, (content, words) in malicious(tmp_path):
        text = refused(tmp_path, 'net.pth', content, words)
        assert len(text) < 500, name
    assert [x.name for x in tmp_path.iterdir()] == ['net.pth']  # no function was run


# Caffe


@pytest.fixture(scope='module')
def alexnet():
    """CaffeNet's arrays of zeros, each with one nonzero entry."""
    net = variables.preset('caffe', CLASSES, {})
    shapes = files.their_shapes(net, lambda path: (path[1], int(path[-1] == 'bias')), 227)
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    arrays['fc6', 0][9, 200 * 36 + 4 * 6 + 1] = 1  # map 200, row 4, column 1
    arrays['conv1', 0][7, 0, 3, 4] = 1  # blue
    arrays['conv2', 0][200, 5, 1, 2] = 1
    return arrays


@pytest.mark.parametrize('old', [False, True], ids=['layer', 'layers'])
def test_caffes_networks(tmp_path, alexnet, old):
    order = ('Pooling', 'LRN') if old else ('LRN', 'Pooling')
    lrn = files.field(1, 3) + files.field(2, 2e-4) + files.field(3, 0.5) + files.field(5, 1.5)
    found = read(tmp_path, 'net.caffemodel', files.caffemodel(alexnet, order, old=old, lrn=lrn))
    params, model = found.variables['params'], found.config['model']
    assert params['fc6']['kernel'][0, (4 * 6 + 1) * 256 + 200, 9] == 1
    assert params['conv1']['kernel'][0, 3, 4, 2, 7] == 1
    assert params['conv2']['kernel'][0, 1, 2, 5, 200] == 1
    assert sum(np.count_nonzero(x) for x in jax.tree.leaves(params)) == 3
    assert model['after'][0] == ('act pool norm' if old else 'act norm pool')
    assert [model[f'norm_{name}'] for name in ('n', 'alpha', 'beta', 'k')] == [3, 2e-4, 0.5, 1.5]
    assert model['norm_alpha_per'] == 'window' and model['dropout'] == 'inverted'
    np.testing.assert_allclose(found.mean[0, 0], caffe.MEAN)


def test_which_alexnet(tmp_path):
    """By the order of operations, else by the network's name, else by --net."""
    for order, name, net, expected in (
        (['LRN', 'Pooling'], 'CaffeNet', '', 'caffe'),
        (['Pooling', 'LRN'], 'AlexNet', '', 'caffenet'),
        ([], 'CaffeNet', '', 'caffenet'),
        ([], 'AlexNet', '', 'caffe'),
        ([], 'mine', 'caffenet', 'caffenet'),
    ):
        assert caffe._alexnet_form(caffe.Graph(name, {}, order, [], {}), net) == expected
    arrays = {
        (name, i): np.zeros((3,) * (2 - i), np.float32) for name in ('conv1', 'fc8') for i in (0, 1)
    }

    def wrong(words, net='', crop=0, **form):
        options, content = Options(net, None, crop), files.caffemodel(arrays, **form)
        refused(tmp_path, 'a.caffemodel', content, *words, options=options)

    wrong(
        ('its network cannot be determined', 'with --net: caffe, caffenet,'), order=(), name='mine'
    )
    wrong(('--net=owt: not a network of this format',), 'owt')
    wrong(('need 227',), crop=224)
    wrong(('normalizes within channels',), lrn=files.field(4, 1))
    wrong(("not Caffe's caffenet", 'missing: ', 'shapes: conv1.0 is [3, 3]'), 'caffenet')


@pytest.mark.parametrize(
    ('layer', 'fields', 'words'),
    [
        ('conv1', {6: 2}, 'conv1 has stride 2, but should have 4'),
        ('conv1', {6: 1}, 'conv1 has stride 1, but should have 4'),
        ('conv2', {3: 0}, 'conv2 has pad 0, but should have 2'),
        ('conv3', {9: 1, 10: 2, 3: 1}, 'conv3 has pad 1, 2, but should have 1'),
        ('conv4', {5: 1}, 'conv4 has group 1, but should have 2'),
        ('conv5', {18: 2}, 'conv5 has dilation 2, but should have 1'),
        ('pooling1', {3: 1}, 'pooling1 has stride 1, but should have 2'),
        ('pooling2', {2: 2}, 'pooling2 has kernel 2, but should have 3'),
        ('pooling2', {4: 1}, 'pooling2 has pad 1, but should have 0'),
    ],
)
def test_variants_of_caffes_alexnet(tmp_path, alexnet, layer, fields, words):
    """Their shapes are the same. A file has 244 MB, so only some are also written in Caffe's old format."""
    for old in (False, True) if layer in ('conv2', 'pooling1') else (False,):
        content = files.caffemodel(alexnet, old=old, changes={layer: fields})
        refused(tmp_path, 'net.caffemodel', content, words)


def test_variants_of_caffes_squeezenet(tmp_path):
    arrays = caffe_arrays(SMALL)
    read(tmp_path, 'net.caffemodel', files.caffemodel(arrays))
    for layer, fields, words in (
        ('conv1', {6: 4}, 'conv1 has stride 4, but should have 2'),
        ('fire2/expand3x3', {3: 0}, 'fire2/expand3x3 has pad 0, but should have 1'),
        ('fire3/squeeze1x1', {6: 2}, 'fire3/squeeze1x1 has stride 2'),
    ):
        content = files.caffemodel(arrays, changes={layer: fields})
        refused(tmp_path, 'net.caffemodel', content, words)


@pytest.mark.parametrize('padded', [False, True])
def test_caffes_squeezenet(tmp_path, padded):
    arrays = caffe_arrays('squeezenet')
    found = read(tmp_path, 'net.caffemodel', files.caffemodel(arrays, padded=padded))
    assert found.config['model']['version'] == '1.0'
    kernel = arrays['conv10', 0].transpose(2, 3, 1, 0) * ((13 / 15) ** 2 if padded else 1)
    params = found.variables['params']
    np.testing.assert_allclose(params['conv10']['kernel'], kernel, rtol=1e-6)
    first = arrays['conv1', 0][:, ::-1].transpose(2, 3, 1, 0) * found.config['model']['input_std']
    np.testing.assert_allclose(params['conv1']['kernel'], first, rtol=1e-6)


def test_mean_images(tmp_path):
    image = np.random.default_rng(0).uniform(0, 255, (3, 8, 8)).astype(np.float32)
    expected = image[::-1].transpose(1, 2, 0)
    (tmp_path / 'mean.binaryproto').write_bytes(files.blob(image, old=True))
    np.save(tmp_path / 'mean.npy', image)
    for name in ('mean.binaryproto', 'mean.npy'):
        np.testing.assert_array_equal(readers.mean_of(str(tmp_path / name)), expected)
    np.testing.assert_array_equal(readers.mean_of('1,2,3.5'), np.float32([1, 2, 3.5]))
    with pytest.raises(UserError, match='--mean=.485,.456,.406: must be on the scale of 0 to 255'):
        readers.mean_of('.485,.456,.406')
    objects = np.array([Malicious(tmp_path / 'run')], object)
    np.save(tmp_path / 'objects.npy', objects, allow_pickle=True)
    np.save(tmp_path / 'flat.npy', image[0])
    (tmp_path / 'cut.binaryproto').write_bytes(files.blob(image, old=True)[:-9])
    for wrong in ('objects.npy', 'flat.npy', 'cut.binaryproto', 'missing.npy'):
        with pytest.raises(UserError, match='not a mean image|cannot be read'):
            readers.mean_of(str(tmp_path / wrong))
    assert not (tmp_path / 'run').exists()
    for wrong in ('1,2', '1,2,x', '1,2,256', 'nan,1,2'):
        with pytest.raises(UserError, match='--mean=|must be R,G,B'):
            readers.mean_of(wrong)


# ONNX


def test_onnx(tmp_path, alexnet):
    arrays = {f'{layer}_{"wb"[i]}_0': x for (layer, i), x in alexnet.items()}
    found = read(tmp_path, 'net.onnx', files.onnx_of(arrays))
    params = found.variables['params']
    assert params['fc6']['kernel'][0, (4 * 6 + 1) * 256 + 200, 9] == 1
    assert params['conv1']['kernel'][0, 3, 4, 2, 7] == 1
    assert found.config['model']['after'][0] == 'act norm pool'
    assert found.config['augment']['crop'] == 227
    pool = {'kernel_shape': (3, 3), 'strides': (2, 2)}
    conv2 = {'group': 2, 'pads': (2,) * 4}
    read(
        tmp_path,
        'net.onnx',
        files.onnx_of(
            arrays,
            nodes=[
                ('Conv', 'conv2_w_0', 'r4', conv2),
                ('MaxPool', '', 'r14', {**pool, 'pads': (0, 0, 1, 1)}),
            ],
        ),
    )
    for node, words in (
        (('Conv', 'conv1_w_0', 'r0', {'strides': (4, 2)}), 'conv1 has stride 2, 4, but should'),
        (('Conv', 'conv2_w_0', 'r4', {**conv2, 'pads': (2, 2, 2, 1)}), 'conv2 has pad 1, 2'),
        (('Conv', 'conv2_w_0', 'r4', {**conv2, 'group': 1}), 'conv2 has group 1'),
        (('MaxPool', '', 'r3', {**pool, 'strides': (1, 1)}), 'r3 has stride 1, but should have 2'),
        (('MaxPool', '', 'r3', {**pool, 'pads': (1,) * 4}), 'r3 has pad 1, but should have 0'),
    ):
        refused(tmp_path, 'net.onnx', files.onnx_of(arrays, nodes=[node]), words)
    arrays = {name.replace('fc7_w_0', 'fc7_w_0_quantized'): x[:9] for name, x in arrays.items()}
    refused(
        tmp_path,
        'net.onnx',
        files.onnx_of(arrays, ('MaxPool', 'LRN')),
        "not the ONNX model zoo's caffenet",
        'missing: fc7.0',
        'extra: fc7_w.0',
    )


# Both are Protocol Buffers.


def test_malicious_protobufs(tmp_path):
    def layer(*blobs, name='conv1'):
        named = files.field(1, name) + files.field(2, 'Convolution')
        return files.field(100, named + b''.join(files.field(7, x) for x in blobs))

    fire = files.field(100, files.field(1, 'fire2/x') + files.field(7, files.blob(np.zeros(1))))
    floats = files.field(5, bytes(24))
    shape = files.field(7, files.field(1, files.varint(2) + files.varint(3)))
    enormous = files.field(7, files.field(1, files.varint(2**63) * 2))
    long = files.field(7, files.field(1, b'\x01' * 200_000))
    for content, words in (
        (b'', 'no layers with weights'),
        (files.varint(100 << 3 | 2) + files.varint(2**40) + b'x', 'bytes past the end'),
        (b'\xff' * 15 + b'\x01', 'a number of more than 10 bytes'),
        (b'\x08\x80', 'ends within a number'),
        (b'\x0b', 'a field of type 3'),
        (files.field(100, 7), 'field 100 has the wrong type'),
        (layer(files.field(5, 7) + shape), 'field 5 has the wrong type'),
        (layer(files.field(5, bytes(23)) + shape), 'ends within a number'),
        (layer(files.field(5, bytes(20)) + shape), 'has 5 numbers for [2, 3]'),
        (layer(floats + enormous), 'impossible shape'),
        (layer(shape), 'has 0 numbers'),
        (layer(floats + shape) * 2, 'has two layers conv1'),
        (layer(floats + shape, name=files.EVIL) * 2, f'has two layers {files.SHOWN}'),
        (layer(floats, name=files.EVIL), f'{files.SHOWN} has 6 numbers'),
        (files.field(100, files.field(1, 1) * 200_000), 'more than 100,000 fields'),
        (layer(floats + long), 'field 1 has the wrong type'),
        (layer(files.field(7, files.field(1, b'\0' + files.varint(2**63)))), 'impossible shape'),
        (
            layer(files.field(5, bytes(4)) + files.field(7, files.field(1, b'\1' * 70))),
            'impossible',
        ),
        (layer(files.field(5, bytes(4)) + files.field(7, b'')) + fire, 'no biases for conv10'),
    ):
        assert len(refused(tmp_path, 'net.caffemodel', content, words)) < 500
    outside = files.field(1, 2) + files.field(2, 1) + files.field(8, 'conv1_w_0')
    outside = files.field(7, files.field(5, outside + files.field(14, 1)))
    refused(tmp_path, 'net.onnx', outside, 'is stored in another file')
    refused(tmp_path, 'net.onnx', b'', '0 graphs')
    evil = files.field(5, files.field(2, 1) + files.field(8, f'{files.EVIL}_w_0'))
    refused(tmp_path, 'net.onnx', files.field(7, evil), f'{files.SHOWN}_w_0 has 0 numbers')
    evil = files.field(
        5, files.field(2, 1) + files.field(8, f'{files.EVIL}_w_0') + files.field(9, bytes(4))
    )
    refused(tmp_path, 'net.onnx', files.field(7, evil * 2), f'two initializers {files.SHOWN}_w_0')
    many = files.field(1, b'\1' * 70) + files.field(2, 1) + files.field(9, bytes(4))
    refused(tmp_path, 'net.onnx', files.field(7, files.field(5, many)), 'impossible shape')


# FlatBuffers


def tflite_net(classes=CLASSES):
    return variables.preset('mobilenet:v1', classes, {'width': 0.25})


def test_tflite(tmp_path):
    tables, stored = files.tflite_tables(tflite_net(), 32)
    found = read(tmp_path, 'net.tflite', files.flatbuffer(tables), names=['background', *NAMES])
    params, model = found.variables['params'], found.config['model']
    assert (model['version'], model['width'], found.config['augment']['crop']) == (1, 0.25, 32)
    assert found.card['folded'] and (found.mean == 128).all()
    (kernel,) = (x for path, x in stored.items() if path[1] == 'fc')
    np.testing.assert_array_equal(
        params['fc']['kernel'], (kernel[:, 0, 0].T - np.float32(100)) / 64
    )
    path = next(path for path in stored if path[-1] == 'depthwise')
    np.testing.assert_array_equal(
        params[path[1]][path[2]]['depthwise'], (stored[path][0] - np.float32(100)) / 64
    )


def malicious_flatbuffers():
    """[(tables or content, words of the error)]"""

    def changed(change):
        tables = files.tflite_tables(tflite_net(), 32)[0]
        graph = tables[2][0]
        change(tables, graph, graph[0], graph[3])
        return tables

    def op(field, value, number=0):
        return changed(lambda tables, graph, tensors, ops: ops[number].update({field: value}))

    def tensor(field, value, number=2):  # the bias of conv1
        return changed(lambda tables, graph, tensors, ops: tensors[number].update({field: value}))

    def shared(part, field, count=2000):
        """Tables that share a vector of four megabytes."""
        vector = np.zeros(10**6, np.int32)
        return changed(
            lambda tables, graph, *_: graph.update({part: [{field: vector} for _ in range(count)]})
        )

    whole = files.flatbuffer(files.tflite_tables(tflite_net(), 32)[0])
    enormous, outside, here = struct.pack('<I', 2**32 - 1), ('I', 2**31), 'is outside the file'
    vast = np.zeros(10**6, np.int32)
    return [
        (tflite.MAGIC, 'lacks the letters'),
        (whole[: len(whole) // 2], ''),
        (struct.pack('<I', 2**32 - 1) + whole[4:], here),
        (whole[:8] + struct.pack('<i', -(2**31)) + whole[12:], here),
        (whole[:8] + struct.pack('<i', 2**31 - 1) + whole[12:], here),
        ({1: outside}, here),
        ({2: outside}, here),
        ({1: enormous}, 'ends before the 4,294,967,295 numbers'),
        ({1: struct.pack('<2I', 1, 2**32 - 1)}, here),
        ({1: [{}] * 10_001}, 'a vector of 10,001 numbers'),
        ({1: [], 2: []}, '0 graphs'),
        ({1: [], 2: [{}]}, 'index 0 of 0'),
        (shared(3, 1), 'a vector of 1,000,000 numbers'),
        (shared(3, 2), 'a vector of 1,000,000 numbers'),
        (shared(0, 0), 'a vector of 1,000,000 numbers'),
        (changed(lambda t, graph, *_: graph.update({1: vast})), 'a vector of 1,000,000 numbers'),
        (changed(lambda t, graph, *_: graph.update({1: np.int32([-1])})), 'index -1 of'),
        (changed(lambda t, graph, *_: graph.update({1: np.int32([999])})), 'index 999 of'),
        (tensor(4, {2: np.zeros(10**6, np.float32)}), 'a scale of 0.0'),
        (tensor(4, {2: np.float32([np.nan])}), 'a scale of nan'),
        (tensor(4, {2: np.float32([1]), 3: np.int64([2**62])}), 'with one zero point'),
        (tensor(0, np.int32([-(2**31)] * 4)), 'but should be'),
        (tensor(0, np.int32([2**31 - 1] * 4)), 'but should be'),
        (tensor(1, ('b', 127)), 'a tensor should be int32'),
        (tensor(2, ('I', 2**32 - 1)), 'index 4294967295 of'),
        (tensor(2, ('I', 0)), '0 bytes for a tensor'),
        (op(0, ('I', 2**32 - 1)), 'index 4294967295 of 3'),
        (op(1, np.int32([0, 2**31 - 1, 2])), 'index 2147483647 of'),
        (op(1, np.int32([0, 1, -1])), 'index -1 of'),
        (op(1, np.int32([0])), 'index 1 of 1'),
        (op(1, outside), here),
        (op(2, np.int32([])), 'index 0 of 0'),
        (op(2, np.int32([2**31 - 1])), 'index 2147483647 of'),
        (op(4, outside), here),
        (op(1, np.int32([0, -5, 0]), number=1), 'index -5 of'),  # a depthwise convolution
    ]


def test_malicious_flatbuffers(tmp_path):
    for content, words in malicious_flatbuffers():
        content = content if isinstance(content, bytes) else files.flatbuffer(content)
        tracemalloc.start()
        start = time.monotonic()
        text = refused(tmp_path, 'net.tflite', content, words)
        taken, (_, most) = time.monotonic() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(text) < 300 and taken < 10 and most < 4 * len(content) + 2**25, text


@pytest.mark.parametrize(
    'error', [ValueError, IndexError, OverflowError, MemoryError, RecursionError]
)
def test_errors_that_no_reader_foresaw(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error('dim\n7')

    monkeypatch.setattr(caffe, 'read', fails)
    monkeypatch.setattr(caffe, 'mean_image', fails)
    refused(tmp_path, 'net.caffemodel', b'', f'{error.__name__}: dim 7')
    with pytest.raises(UserError, match='not a mean image .* dim 7'):
        readers.mean_of(str(tmp_path / 'net.caffemodel'))


@pytest.mark.parametrize('name', ['net.caffemodel', 'net.pth', 'net.safetensors'])
def test_damaged_files(tmp_path, name):
    """Cut anywhere, and with flipped bytes: read or refused, never another exception."""
    from alexnet_jax.weights import safetensors

    content = {
        'net.caffemodel': lambda: files.caffemodel(caffe_arrays(SMALL)),
        'net.pth': lambda: files.pth_of(torch_arrays(SMALL)),
        'net.safetensors': lambda: safetensors.encoded(torch_arrays(SMALL), {}),
    }[name]()
    for end in [0, 1, 9, 60, *np.linspace(100, len(content) - 1, 10).astype(int)]:
        refused(tmp_path, name, content[:end])
    rng, count = np.random.default_rng(0), 0
    for i in range(40):
        damaged = content
        high = 400 if i % 2 else 8000
        for at in rng.integers(0, high, rng.integers(1, 4)):
            damaged = flipped(damaged, at)
        try:
            read(tmp_path, name, damaged)
        except UserError as error:
            assert '\n' not in str(error)
            count += 1
    assert count > 5


# Keras


def keras_file(file, version, width, layout, seed=0):
    """Random arrays in a MobileNet's file -> {our path: array}."""
    h5py = pytest.importorskip('h5py', reason='needs h5py')
    from alexnet_jax.weights import keras

    changes = {'width': width}
    net = variables.preset({1: 'mobilenet:v1', 2: 'mobilenet'}[version], CLASSES, changes)
    shapes, rng, arrays, counts = variables.leaves(net), np.random.default_rng(seed), {}, {}
    with h5py.File(file, 'w') as opened:
        root = opened.create_group('model_weights') if layout == 'model' else opened
        layers = []
        for number, paths in enumerate(keras._ours(net)):
            for path in paths:
                arrays[path] = rng.uniform(0.5, 1, shapes[path]).astype(np.float32)
            stored = [arrays[path] for path in paths]
            kind = 'batch_normalization' if len(paths) == 4 else 'conv2d'
            if paths[0][-1] == 'depthwise':
                kind, stored = 'depthwise_conv2d', [stored[0][..., None]]
            elif paths[0][1] == 'fc':
                kind = 'conv2d' if version == 1 else 'dense'
                stored[0] = stored[0][None, None] if version == 1 else stored[0]
            if layout == 'modern':
                count = counts[kind] = counts.get(kind, -1) + 1
                group = root.create_group(f'layers/{kind}_{count}' if count else f'layers/{kind}')
                for i, x in enumerate(stored):
                    group.create_dataset(f'vars/{i}', data=x)
                root.require_group(f'layers/activation_{count}/vars')
            else:
                layers += [f'layer{number}', f'nothing{number}']
                group = root.create_group(layers[-2])
                root.create_group(layers[-1]).attrs['weight_names'] = np.zeros(0, 'S1')
                names = [f'inner/{i}:0' for i in range(len(stored))]
                group.attrs['weight_names'] = np.array(names, 'S')
                for name, x in zip(names, stored, strict=True):
                    group.create_dataset(name, data=x)
        if layers:
            root.attrs['layer_names'] = np.array(layers, 'S')
    return arrays


@pytest.mark.parametrize(
    ('version', 'width', 'layout'),
    [(1, 0.25, 'weights'), (1, 0.5, 'modern'), (2, 0.35, 'model'), (2, 0.5, 'modern')],
)
def test_keras(tmp_path, version, width, layout):
    arrays = keras_file(tmp_path / 'net.h5', version, width, layout)
    found = readers.read(str(tmp_path / 'net.h5'), names=NAMES)
    model = found.config['model']
    assert (model['version'], model['width'], model['padding']) == (version, width, 'tensorflow')
    assert model['norm_epsilon'] == 1e-3 and found.mean[0, 0, 0] == 127.5
    first = ('params', 'conv1', 'kernel')
    arrays[first] = arrays[first] * np.float32(model['input_std'] / 127.5)
    leaves = {network.names_of(path): x for path, x in jax.tree.leaves_with_path(found.variables)}
    assert leaves.keys() == arrays.keys()
    for path, x in leaves.items():
        np.testing.assert_allclose(x, arrays[path], rtol=1e-6)


def test_keras_files_that_are_refused(tmp_path, monkeypatch):
    h5py = pytest.importorskip('h5py', reason='needs h5py')
    file = tmp_path / 'net.h5'
    keras_file(file, 1, 0.25, 'weights')
    content, secret = file.read_bytes(), tmp_path / 'secret'
    secret.write_bytes(content)

    def changed(change, *words):
        file.write_bytes(content)
        with h5py.File(file, 'r+') as opened:
            change(opened)
        refused(tmp_path, 'net.h5', file.read_bytes(), *words)

    def replaced(opened, **arguments):
        del opened['layer0/inner/0:0']
        opened['layer0/inner'].create_dataset('0:0', (3, 3, 3, 8), np.float32, **arguments)

    def linked(opened):
        del opened['layer0/inner']
        opened['layer0/inner'] = h5py.ExternalLink(str(secret), '/layer0/inner')

    changed(lambda f: replaced(f, external=[(str(secret), 0, 864)]), 'not an array of this file')
    changed(linked, 'of its own')
    changed(lambda f: f['layer3'].attrs.create('weight_names', np.array(['x'], 'S')), 'of its own')
    evil = np.array([files.EVIL], 'S')
    changed(lambda f: f['layer3'].attrs.create('weight_names', evil), f'has no {files.SHOWN} of')
    changed(lambda f: f.attrs.create('layer_names', np.array(['layer0'], 'S')), 'has 1 layers')
    changed(lambda f: f.attrs.__delitem__('layer_names'), 'cannot be converted')

    def large(opened):
        del opened['layer2/inner/0:0']
        opened['layer2/inner'].create_dataset('0:0', (10**6, 10**6), np.float32, chunks=(100, 100))

    changed(large, 'layer2/0 is [1000000, 1000000] but should be [3, 3, 8, 1]')

    def vast(opened):
        """A last layer of terabytes, for which the file stores no data."""
        for name, shape in (('kernel', (1, 1, 256, 10**12)), ('bias', (10**12,))):
            path = f'layer54/inner/{int(name == "bias")}:0'
            del opened[path]
            opened.create_dataset(path, shape, np.float32, chunks=shape[:-1] + (100,))

    changed(vast, 'larger than 2 GiB')
    for end in (8, 100, 2000, len(content) // 2):
        refused(tmp_path, 'net.h5', content[:end])
    monkeypatch.setitem(sys.modules, 'h5py', None)
    refused(tmp_path, 'net.h5', content, install('keras'))


def test_our_own_weights_need_no_conversion(tmp_path):
    content = (hub.OWN / 'quickstart' / bundle.WEIGHTS).read_bytes()
    refused(tmp_path, 'net.safetensors', content, 'use the run or the bundle')


# The command


def call(monkeypatch, *arguments):
    run_dirs.call(monkeypatch, convert, *arguments)


def test_the_command(tmp_path, monkeypatch, capsys):
    arrays = torch_arrays(SMALL)
    (tmp_path / 'net.pth').write_bytes(files.pth_of(arrays))
    (tmp_path / 'names.txt').write_text('ant\nbee\nçat\n')
    names = f'--names={tmp_path}/names.txt'
    call(monkeypatch, tmp_path / 'net.pth', tmp_path / 'out', names, '--size=240')
    out = capsys.readouterr().out
    assert 'mean 123.68, 116.28, 103.53' in out
    assert 'SqueezeNet 1.1, net.pth (torchvision): 724,035 parameters' in out and '3 classes' in out
    found = bundle.read(tmp_path / 'out')
    assert found.names == ['ant', 'bee', 'çat'] and found.mean.shape == (240, 240, 3)
    made = 'python -m alexnet_jax.convert net.pth out --names=names.txt --size=240'
    assert found.card['made'] == made
    classify = alexnet_jax.load(tmp_path / 'out', views='center')
    image = np.random.default_rng(0).integers(0, 256, (240, 240, 3)).astype(np.uint8)
    x = image[None, 8:-8, 8:-8] - np.float32(torch.MEAN)
    logits = network.apply(variables.preset(SMALL, CLASSES, {}), found.variables, x)[0]
    np.testing.assert_allclose(classify(image), jax.nn.softmax(logits)[0], atol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), '3 classes: give one per line, --names=FILE'),
        (('--names=names.txt',), '2 names for 3 classes'),
        (('--names=missing.txt',), '--names=missing.txt: cannot be read'),
        (('--names=names.txt', '--net=caffe'), '--net=caffe: not a network of this format'),
        (('--std=1,2',), '--std=1,2: must be R,G,B'),
        (('--std=0,1,1',), '--std=0,1,1: must be R,G,B'),
        (('--mean=a.npy',), 'a.npy: cannot be read'),
        (('--crop=9',), 'crop=9: must be from 32 to 1024'),
        (('--size=100',), 'size=100: must be from 224'),
    ],
)
def test_arguments_that_are_refused(tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'net.pth').write_bytes(files.pth_of(torch_arrays(SMALL)))
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    run_dirs.refuses(monkeypatch, tmp_path, convert, '', ('net.pth', 'out', *arguments), message)


def test_the_folder_is_checked_first(tmp_path, monkeypatch):
    """Even before the weight file, which takes long to read and may not exist."""
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    arguments = ('missing.pth', 'full')
    run_dirs.refuses(
        monkeypatch, tmp_path, convert, '', arguments, 'full: exists and is not an empty'
    )


def test_files_that_are_refused(tmp_path):
    refused(tmp_path, 'net.xyz', b'abc', 'not a known weight format', '.caffemodel')
    arrays = torch_arrays(SMALL)
    arrays['features.0.bias'][3] = np.nan
    refused(tmp_path, 'net.pth', files.pth_of(arrays), 'conv1/bias has weights that are not finite')
    with pytest.raises(UserError, match='missing.pth: cannot be read'):
        readers.read(str(tmp_path / 'missing.pth'))
    with pytest.raises(UserError, match='cannot be read'):
        readers.read(str(tmp_path))


@pytest.mark.parametrize(
    ('name', 'crop', 'size', 'width'),
    [
        ('mobilenet_v1_0.25_128_quant.tflite', 128, 146, 0.25),
        ('mobilenet_v1_0.5_160_quant.tflite', 160, 183, 0.5),
        ('mobilenet_v2_1.0_224_quant.tflite', 224, 256, 1.0),
        (SQUEEZENET, 227, 256, 1.0),
    ],
)
def test_real_files(name, crop, size, width):
    found = readers.read(str(real(name)))
    assert found.names == class_names.imagenet() and found.names[834] == 'n04350905'
    assert (found.config['augment']['crop'], found.config['data']['size']) == (crop, size)
    assert found.config['model']['width'] == width and found.mean.shape == (size, size, 3)
    assert found.card['folded'] == (name != SQUEEZENET)
    with pytest.raises(UserError, match='leave --std and --crop out'):
        readers.read(str(real(name)), Options('', None, 64))
