"""Real weights on 1,000 ImageNet photographs, compared with OpenCV and TensorFlow Lite on the same squares.

    ALEXNET_JAX_PHOTOGRAPHS=FOLDER make test-deploy ARGS="-k photographs -s"

FOLDER has one photograph per class, in subfolders whose names begin with WordNet IDs, such as those of
github.com/EliSchwartz/imagenet-sample-images. Prints the lines of a table in docs/weights.md.
"""

import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax.nets import network
from alexnet_jax.weights import deep_compression
from tests.deploy.test_convert import opencv
from tests.deploy.test_tflite import interpreter
from tests.helpers import weight_files as files
from tests.weights.test_files import NETS, SQUEEZENET, net_of, read, real

pytestmark = pytest.mark.deploy
FOLDER = 'ALEXNET_JAX_PHOTOGRAPHS'
BATCH = 20


@pytest.fixture(scope='module')
def squares():
    """Central squares, u8[1000,256,256,3], by class."""
    if not (folder := os.environ.get(FOLDER)):
        pytest.skip(f'needs a folder of photographs, {FOLDER}=FOLDER')
    found = []
    for path in sorted(pathlib.Path(folder).glob('n[0-9]*/*')):
        image = Image.open(path).convert('RGB')
        scale = 256 / min(image.size)
        image = image.resize([max(256, round(n * scale)) for n in image.size], Image.BILINEAR)
        left, top = ((n - 256) // 2 for n in image.size)
        found.append(np.asarray(image.crop((left, top, left + 256, top + 256))))
    assert len(found) == 1000, f'{folder}: {len(found)} photographs, not one of each class'
    return np.stack(found)


def crops(squares, crop):
    """The central 224 or 227 pixels; smaller sizes are resized from 224."""
    side = max(crop, 224)
    offset = (256 - side) // 2
    central = squares[:, offset : offset + side, offset : offset + side]
    if crop >= 224:
        return central
    return np.stack([Image.fromarray(x).resize((crop, crop), Image.BILINEAR) for x in central])


def caffemodel():
    """The decoded SqueezeNet as a .caffemodel file."""
    net = net_of(SQUEEZENET)
    decoded = deep_compression._arrays(net, real(SQUEEZENET).read_bytes())
    first = ('params', 'conv1', 'kernel')  # for BGR, 0 to 255
    decoded[first] = decoded[first][:, :, ::-1] / np.float32(net.input_std)
    arrays = {
        files.caffe_name(path): x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
        for path, x in decoded.items()
    }
    return files.caffemodel(arrays, name='', padded=True)


def accuracy(scores, top):
    best = np.argsort(-scores, axis=1, kind='stable')[:, :top]
    return 100 * (best == np.arange(len(scores))[:, None]).any(1).mean()


@pytest.mark.parametrize('name', NETS)
def test_photographs(name, squares, tmp_path):
    """The same top class as OpenCV on 97%; TensorFlow Lite, with 8-bit activations, within 3 points."""
    weights, net = read(name, real(name)), net_of(name)
    images = crops(squares, weights.crop)
    if name == SQUEEZENET:
        (tmp_path / 'net.caffemodel').write_bytes(caffemodel())
        expected = opencv(tmp_path, 'squeezenet', images, deep_compression.MEAN[::-1], classes=1000)
    else:
        expected = interpreter(name, images)
    run = jax.jit(lambda x: network.apply(net, weights.variables, x)[0])
    mean = np.float32(weights.mean).reshape(1, 1, 1, 3)
    parts = [run(images[i : i + BATCH] - mean) for i in range(0, len(images), BATCH)]
    found = np.concatenate(parts)
    same = 100 * (found.argmax(1) == expected.argmax(1)).mean()
    ours, theirs = ([accuracy(x, top) for top in (1, 5)] for x in (found, expected))
    print(
        f'| `{name}` | {ours[0]:.1f} / {ours[1]:.1f} | {theirs[0]:.1f} / {theirs[1]:.1f} | {same:.1f} |'
    )
    assert np.abs(np.subtract(ours, theirs)).max() < 3
    if name == SQUEEZENET:
        assert same >= 97 and abs(ours[0] - 61.9) < 1 and abs(ours[1] - 83.0) < 1
