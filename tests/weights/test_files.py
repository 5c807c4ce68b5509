"""Readers of published weights: real files where they are at hand, and damaged ones."""

import functools

import jax
import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.weights import deep_compression, folded, readers, tflite, variables
from alexnet_jax.weights.variables import Options
from tests.helpers import ROOT

FOLDER = ROOT.parent / 'shared' / 'weights'
SQUEEZENET = 'compressed_SqueezeNet.net'
TFLITE = {
    'mobilenet_v1_0.25_128_quant.tflite': ('mobilenet:v1', {'width': 0.25}),
    'mobilenet_v1_0.5_160_quant.tflite': ('mobilenet:v1', {'width': 0.5}),
    'mobilenet_v2_1.0_224_quant.tflite': ('mobilenet', {'padding': 'tensorflow'}),
}
SMALLEST = next(iter(TFLITE))
NETS = {SQUEEZENET: ('squeezenet', {}), **TFLITE}
SUIT = {457, 834}  # bow tie, suit: ILSVRC's class indices, of sorted WordNet IDs
UNIFORM = 652


def real(name):
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f'needs {name} in ../shared/weights')
    return path


@functools.cache
def net_of(name, classes=1000):
    preset, changes = NETS[name]
    return build(classes=classes, **{**configfile.load(preset).model, **changes})


def read(name, path):
    form = deep_compression if name == SQUEEZENET else tflite
    return form.read(path.read_bytes(), Options()).weights


def photograph(weights):
    """The portrait that comes with Matplotlib: f32[1,crop,crop,3], mean subtracted."""
    image = Image.open(cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)).convert('RGB')
    side = min(image.size)
    left, top = ((n - side) // 2 for n in image.size)
    image = image.resize((weights.crop,) * 2, Image.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image, np.float32)[None] - np.float32(weights.mean).reshape(1, 1, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize('name', NETS)
def test_real_weights(name):
    """They fill the network, and recognize a woman in uniform, with a tie, among a thousand classes."""
    weights = read(name, real(name))
    net = net_of(name)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), network.shapes(net, weights.crop))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), weights.variables)
    assert found == {'batch_stats': {}, **expected}
    run = jax.jit(lambda variables, x: network.apply(net, variables, x)[0])
    logits = run(weights.variables, photograph(weights))[0]
    best = np.argsort(-logits)[:5].tolist()
    assert {*best} & {UNIFORM, *SUIT}, best


def test_a_network_with_the_background_class():
    """It has one more logit; the others are the same."""
    model = tflite._model(real(SMALLEST).read_bytes())
    all_of, without = (
        tflite._weights(net_of(SMALLEST, classes), model).variables['params']['fc']
        for classes in (1001, 1000)
    )
    np.testing.assert_array_equal(all_of['kernel'][:, 1:], without['kernel'])
    np.testing.assert_array_equal(all_of['bias'][1:], without['bias'])


@pytest.mark.parametrize('epsilon', [1e-5, 1e-3])
def test_without_norm_is_exact(epsilon):
    """The normalization returns x + bias bit for bit, in float32."""
    from alexnet_jax.nets.layers import BatchNorm

    rng = np.random.default_rng(0)
    x, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 5), (5,)))
    found = variables.without_norm((), bias, epsilon)
    tree = variables.nest({(kind, name): value for (kind, _, name), value in found.items()})
    np.testing.assert_array_equal(BatchNorm(epsilon=epsilon).apply(tree, x), x + bias[None])


@pytest.mark.slow
def test_unfolded():
    """The same function at test time, but with statistics: training mode is no longer far from it."""
    weights = read(SMALLEST, real(SMALLEST))
    net = net_of(SMALLEST)
    rng = np.random.default_rng(0)
    photo = photograph(weights)[0]
    shifts = [np.roll(photo, tuple(rng.integers(0, 128, 2)), (0, 1)) for _ in range(16)]
    batches = [np.stack(shifts[i : i + 8]) for i in (0, 8)]
    new = folded.unfolded(net, weights.variables, batches)
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, weights.variables)
    images = np.stack(shifts)

    @jax.jit
    def both(variables):
        train = network.Training(jax.random.key(0), np.arange(16))
        clone = net.clone(dropout=0.0)
        tested, trained = (network.apply(clone, variables, images, t)[0] for t in (None, train))
        return tested, trained

    (before, far), (after, near) = both(weights.variables), both(new)
    size = np.abs(before).max()
    assert np.abs(after - before).max() < 1e-4 * size  # the same function
    assert np.abs(near - after).max() < 1e-3 * size < 0.1 * np.abs(far - before).max()
    stats = new['batch_stats']['conv1']['norm']
    assert np.ptp(stats['mean']) > 0.1 and np.ptp(stats['var']) > 0.1


def outcome(name, path):
    """'' if a file is read, else the message, which must be one line."""
    path = path.rename(path.with_suffix(real(name).suffix))
    try:
        readers.read(str(path))
    except UserError as error:
        assert '\n' not in str(error) and str(path) in str(error)
        return str(error)
    return ''


@pytest.mark.parametrize('name', [SQUEEZENET, SMALLEST])
def test_truncated_files(name, tmp_path):
    content, path = real(name).read_bytes(), tmp_path / 'cut'
    for end in [0, 3, 8, *np.linspace(20, 0.95 * len(content), 12).astype(int)]:
        path.write_bytes(content[:end])
        assert outcome(name, path), f'{end} bytes are read as if they were all'


@pytest.mark.parametrize('name', [SQUEEZENET, SMALLEST])
def test_damaged_files(name, tmp_path):
    """Flipped bytes, most of them in the tables: read or refused, never another exception."""
    content, path, refused = real(name).read_bytes(), tmp_path / 'flipped', 0
    rng = np.random.default_rng(0)
    table_start = 0 if name == SQUEEZENET else tables(content)
    for i in range(60):
        damaged = bytearray(content)
        low, high = [(0, 110), (table_start, len(content)), (0, len(content))][i % 3]
        for at in rng.integers(low, high, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        refused += bool(outcome(name, path))
    assert refused > 8


def tables(content):
    """Where the tables of a .tflite file begin: after the weights, for TensorFlow's."""
    return max(0, len(content) - 40_000)


def test_a_file_without_a_network(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'\x1c\0\0\0TFL3' + b'\0' * 100)
    assert 'cannot be converted' in outcome(SMALLEST, path)
    with pytest.raises(UserError, match='cannot be read'):
        readers.read(str(tmp_path / 'missing.tflite'))
