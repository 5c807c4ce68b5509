"""The MobileNets of .tflite files beside TensorFlow Lite's interpreter."""

import jax
import numpy as np
import pytest

from alexnet_jax.nets import network
from tests.weights.test_files import TFLITE, net_of, photograph, read, real

pytestmark = pytest.mark.deploy


@pytest.mark.parametrize('name', TFLITE)
def test_interpreter(name):
    """Probabilities of a shifted photograph, up to the interpreter's rounding of activations to 8 bits."""
    litert = pytest.importorskip('ai_edge_litert.interpreter', reason='needs ai-edge-litert')
    weights, net = read(name, real(name)), net_of(name)
    photo = np.concatenate([np.roll(photograph(weights), 9 * i, 2) for i in range(8)])
    logits = jax.jit(lambda x: network.apply(net, weights.variables, x)[0])(photo)
    found = np.asarray(jax.nn.softmax(logits))
    interpreter = litert.Interpreter(str(real(name)), num_threads=1)
    interpreter.allocate_tensors()
    pixels, scores = interpreter.get_input_details(), interpreter.get_output_details()
    for image, probabilities in zip(photo, found, strict=True):
        stored = np.round(image + np.float32(weights.mean[0])).astype(np.uint8)
        interpreter.set_tensor(pixels[0]['index'], stored[None])
        interpreter.invoke()
        expected = interpreter.get_tensor(scores[0]['index'])[0, 1:] / 255
        assert np.abs(probabilities - expected).max() < 0.15
        assert np.argmax(expected) in np.argsort(-probabilities)[:3]
