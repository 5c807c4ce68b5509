"""Writes a network as a TensorFlow Lite (LiteRT) model for one image, and runs one."""

import warnings
from collections.abc import Callable

import jax
import numpy as np

from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.common.quiet import quiet
from alexnet_jax.input.sources import import_tensorflow
from alexnet_jax.weights import graph


def check_installed() -> None:
    """Raises UserError if TensorFlow is missing."""
    import_tensorflow()


def model(function: Callable, crop: int, dtype, *, eight_bits: bool) -> bytes:
    """Returns the .tflite file of function(images [1,crop,crop,3]) -> f32[1,K].

    eight_bits: round weights to 8 bits; activations are rounded at run time ("dynamic range"). The
    function must have been traced for other frameworks, see `backend.portable`.
    """
    tf = import_tensorflow()
    from jax.experimental import jax2tf

    image = tf.TensorSpec((1, crop, crop, 3), np.dtype(dtype).name, 'images')
    function = graph.folded(function, jax.ShapeDtypeStruct(image.shape.as_list(), dtype))
    converted = jax2tf.convert(function, native_serialization_platforms=('cpu',))
    traced = tf.function(converted, autograph=False, input_signature=[image])
    try:
        with quiet():
            concrete = traced.get_concrete_function()
            converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
            if eight_bits:
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            return converter.convert()
    except Exception as error:  # ConverterError, which is not public
        raise UserError(
            f"TensorFlow's converter cannot write this network: {one_line(error)}"
        ) from error


def runner(content: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """A model on the CPU, as a function from images, one by one, to logits f32[B,K]."""
    tf = import_tensorflow()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it has moved to the package ai-edge-litert
        interpreter = tf.lite.Interpreter(model_content=content)
        interpreter.allocate_tensors()
    (start,), (end,) = interpreter.get_input_details(), interpreter.get_output_details()

    def one(image):
        interpreter.set_tensor(start['index'], image[None])
        interpreter.invoke()
        return interpreter.get_tensor(end['index'])[0].copy()

    return lambda images: np.stack([*map(one, images)])
