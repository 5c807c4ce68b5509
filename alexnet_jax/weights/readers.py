"""Reads another framework's weight file, in any supported format, as a bundle."""

import hashlib
import json
import os

import jax
import numpy as np

from alexnet_jax.common import class_names, configfile, paths
from alexnet_jax.common.errors import UserError, one_line, reason
from alexnet_jax.nets import network
from alexnet_jax.weights import (
    bundle,
    caffe,
    deep_compression,
    keras,
    onnx,
    pth,
    safetensors,
    tflite,
    torch,
    variables,
)
from alexnet_jax.weights.bundle import Bundle
from alexnet_jax.weights.variables import Damaged, Imported, Options

BY_SUFFIX = ('.caffemodel', '.onnx', '.net')  # formats that begin like any other file
FORMATS = '.pth, .safetensors, .caffemodel, .onnx, .h5, .tflite, .net'
TITLES = {
    'owt': 'AlexNet ("One weird trick")',
    'caffe': 'AlexNet',
    'caffenet': 'CaffeNet',
    'squeezenet': 'SqueezeNet 1.0',
    'squeezenet:1.1': 'SqueezeNet 1.1',
    'mobilenet:v1': 'MobileNet v1',
    'mobilenet': 'MobileNet v2',
    'shufflenet': 'ShuffleNet v2 x1.0',
    'shufflenet:x0.5': 'ShuffleNet v2 x0.5',
}
CROPS = range(32, 1025)  # pixels
# What arrays of unexpected shapes can raise.
DAMAGE = (ValueError, IndexError, OverflowError, MemoryError, RecursionError)
VERSION = 1  # of the conversion; cached bundles of a different version are rebuilt


def read(
    file: str,
    options: Options = Options(),  # noqa: B008
    *,
    mean: np.ndarray | None = None,
    size: int = 0,
    names: list[str] | None = None,
    made: str = '',
) -> Bundle:
    """Reads a weight file; its content says which format and network it is (`BY_SUFFIX`: which network).

    mean: f32[3] or f32[S,S,3], RGB, 0 to 255, of the images trained on; otherwise the format's own. size: of
    the square images that crops are taken from; otherwise 8/7 of the crop, 256 for 224 and 227. names: of
    the classes, otherwise ImageNet's if there are 1,000. made: the command, for the model card. Raises
    UserError if the file is damaged or its network unknown, if arrays are missing, extra or misshapen
    (it lists them), and if the weights are not finite.
    """
    data = variables.content(file)
    if options.crop and options.crop not in CROPS:
        raise UserError(f'crop={options.crop}: must be from {CROPS[0]} to {CROPS[-1]} pixels')
    try:
        imported = _imported(file, data, options)
    except (Damaged, *DAMAGE) as error:
        raise UserError(
            f'{file}: cannot be converted ({_text(error)}); get a fresh copy, or see docs/weights.md'
        ) from None
    except UserError as error:
        raise error if str(error).startswith(file) else UserError(f'{file}: {error}') from None
    classes, crop = imported.classes, imported.weights.crop
    found = _checked(file, imported.weights.variables)
    mean = np.float32(imported.weights.mean) if mean is None else mean
    usual = 256 if crop in (224, 225, 227) else round(crop * 8 / 7)
    side = mean.shape[0] if mean.ndim == 3 else size or usual
    if size not in (0, side):
        raise UserError(f'size={size}: the mean image has {side} pixels; leave size out')
    if not crop <= side <= bundle.LARGEST:
        raise UserError(f'size={side}: must be from {crop} (the crop) to {bundle.LARGEST}')
    names = names or (class_names.imagenet() if classes == 1000 else None)
    if names is None or len(names) != classes:
        there = 'needs names for its' if names is None else f'{len(names):,} names for'
        raise UserError(f'{file}: {there} {classes:,} classes: give one per line, --names=FILE')
    config = configfile.load(imported.preset)
    config.data.size, config.augment.crop = side, crop
    config.model.update(imported.model)
    title, name = TITLES[imported.preset], os.path.basename(file)
    width = imported.model.get('width', 1.0)
    card = {
        'title': title if width == 1.0 else f'{title}, width {width}',
        'source': f'{name} ({imported.program})',
        'sha256': hashlib.sha256(data).hexdigest(),
        'made': made,
        'converter': VERSION,
        'folded': imported.folded,
    }
    return Bundle(
        json.loads(json.dumps(config.to_dict())),
        found,
        names,
        np.ascontiguousarray(np.broadcast_to(mean, (side, side, 3)), np.float32),
        card,
    )


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, Damaged) else one_line(error)[:100]


def _imported(file: str, data: bytes, options: Options) -> Imported:
    suffix = os.path.splitext(file)[1].lower()
    if data.startswith((pth.ZIP, pth.LEGACY)) or suffix in ('.pth', '.pt'):
        return torch.read(pth.state_dict(data), options)
    if suffix == '.safetensors' or suffix not in BY_SUFFIX and data[8:9] == b'{':
        arrays, facts = safetensors.decoded(data, file)
        if facts == bundle.OURS:
            raise UserError(
                f"{file}: holds this program's own weights, which need no conversion: use the run or the "
                'bundle that they come from'
            )
        return torch.read(arrays, options)
    if data.startswith(keras.MAGIC) or suffix == '.h5':
        return keras.read(data, options)
    if suffix == '.caffemodel':
        return caffe.read(data, options)
    if suffix == '.onnx':
        return onnx.read(data, options)
    if data[4:8] != tflite.MAGIC and suffix not in ('.tflite', '.net'):
        raise UserError(f'{file}: not a known weight format; the formats are {FORMATS}')
    if options.std or options.crop:
        raise UserError(f'{file}: has its own crop and scale; leave --std and --crop out')
    form = deep_compression if suffix == '.net' else tflite
    return form.read(data, options)


def _checked(file: str, found: dict) -> dict:
    """Weights as float32, if they are finite floats."""

    def checked(path, x):
        with np.errstate(over='ignore'):
            x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            name = '/'.join(network.names_of(path)[1:])
            raise UserError(f'{file}: {name} has weights that are not finite; get a fresh copy')
        return x

    return jax.tree.map_with_path(checked, found)


def mean_of(text: str) -> np.ndarray:
    """The mean that an argument gives: 'R,G,B' -> f32[3], or a Caffe mean image's file -> f32[S,S,3], RGB.

    Raises UserError for numbers outside 0 to 255, and for a damaged file.
    """
    if ',' in text and not paths.path(text).exists():
        found = np.float32(numbers('--mean', text, 0, 255))
        if 0 < found.max() <= 1:
            raise UserError(
                f'--mean={text}: must be on the scale of 0 to 255; multiply a mean on the scale of '
                '0 to 1 by 255'
            )
        return found
    try:
        return caffe.mean_image(variables.content(text))
    except (Damaged, *DAMAGE) as error:
        raise UserError(
            f'--mean={text}: not a mean image of Caffe ({_text(error)}); give a .binaryproto or '
            '.npy file, or R,G,B'
        ) from None


def numbers(flag: str, text: str, low: float, high: float) -> tuple[float, float, float]:
    """Three numbers, one per channel, from `low` to `high`."""
    try:
        found = tuple(map(float, text.split(',')))
    except ValueError:
        found = ()
    if len(found) != 3 or not all(low <= x <= high for x in found):
        raise UserError(f'{flag}={text}: must be R,G,B, three numbers from {low:g} to {high:g}')
    return found


def names_of(file: str) -> list[str]:
    """The class names of a text file, one per line."""
    try:
        text = paths.path(file).read_bytes().decode('utf-8').removesuffix('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--names={file}: cannot be read: {reason(error)}') from error
    return class_names.checked([line.rstrip('\r') for line in text.split('\n')], file)
