"""The MobileNets of .tflite files compared with TensorFlow Lite's interpreter."""

import jax
import numpy as np
import pytest

from alexnet_jax.nets import network
from tests.weights.test_files import TFLITE, net_of, photograph, read, real

pytestmark = pytest.mark.deploy


def interpreter(name, images):
    """The probabilities [N,1000] of u8 images by TensorFlow Lite, in steps of 1/255."""
    litert = pytest.importorskip('ai_edge_litert.interpreter', reason='needs ai-edge-litert')
    theirs = litert.Interpreter(str(real(name)), num_threads=1)
    theirs.allocate_tensors()
    (pixels,), (scores,) = theirs.get_input_details(), theirs.get_output_details()
    found = []
    for image in images:
        theirs.set_tensor(pixels['index'], image[None])
        theirs.invoke()
        found.append(theirs.get_tensor(scores['index'])[0, 1:])
    return np.stack(found) / 255


@pytest.mark.parametrize('name', TFLITE)
def test_interpreter(name):
    """Probabilities of a shifted photograph, up to the interpreter's rounding of activations to 8 bits."""
    pytest.importorskip('ai_edge_litert.interpreter', reason='needs ai-edge-litert')
    weights, net = read(name, real(name)), net_of(name)
    photo = np.concatenate([np.roll(photograph(weights), 9 * i, 2) for i in range(8)])
    logits = jax.jit(lambda x: network.apply(net, weights.variables, x)[0])(photo)
    found = np.asarray(jax.nn.softmax(logits))
    stored = np.round(photo + np.float32(weights.mean[0])).astype(np.uint8)
    for probabilities, expected in zip(found, interpreter(name, stored), strict=True):
        assert np.abs(probabilities - expected).max() < 0.15
        assert np.argmax(expected) in np.argsort(-probabilities)[:3]
