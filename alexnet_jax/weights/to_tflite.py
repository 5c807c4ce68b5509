"""Writes a network as a TensorFlow Lite (LiteRT) model for one image, and runs one."""

import logging
import os
import warnings
from collections.abc import Callable

import jax
import numpy as np

from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.weights import graph


def check_installed() -> None:
    """Raises UserError if TensorFlow is missing."""
    _tensorflow()


def model(function: Callable, crop: int, dtype, *, eight_bits: bool) -> bytes:
    """Returns the .tflite file of function(images [1,crop,crop,3]) -> f32[1,K].

    eight_bits: round weights to 8 bits; activations are rounded at run time ("dynamic range"). The
    function must have been traced for other programs, see `backend.portable`.
    """
    tf = _tensorflow()
    from jax.experimental import jax2tf

    image = tf.TensorSpec((1, crop, crop, 3), np.dtype(dtype).name, 'images')
    function = graph.folded(function, jax.ShapeDtypeStruct(image.shape.as_list(), dtype))
    converted = jax2tf.convert(function, native_serialization_platforms=('cpu',))
    traced = tf.function(converted, autograph=False, input_signature=[image])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()])
    if eight_bits:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        return converter.convert()
    except Exception as error:  # ConverterError, which is not public
        raise UserError(
            f"TensorFlow's converter cannot write this network: {one_line(error)}"
        ) from error


def runner(content: bytes, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A model on the CPU, as a function from images, one by one, to logits f32[B,K]."""
    tf = _tensorflow()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it has moved to the package ai-edge-litert
        interpreter = tf.lite.Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    (start,), (end,) = interpreter.get_input_details(), interpreter.get_output_details()

    def one(image):
        interpreter.set_tensor(start['index'], image[None])
        interpreter.invoke()
        return interpreter.get_tensor(end['index'])[0].copy()

    return lambda images: np.stack([*map(one, images)])


def _tensorflow():
    """TensorFlow, quiet and without accelerators."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f'--format=tflite: needs TensorFlow, which cannot be imported ({one_line(error)}): '
            'pip install tensorflow'
        ) from error
    for logger in (tf.get_logger(), logging.getLogger('absl')):
        logger.setLevel(logging.ERROR)
    for kind in ('GPU', 'TPU'):
        tf.config.set_visible_devices([], kind)
    return tf
