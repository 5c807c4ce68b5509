"""Exports a trained network to other frameworks.

    python -m alexnet_jax.export RUN --format=onnx
    python -m alexnet_jax.export RUN --format=tflite-int8 --output=phone/alexnet.tflite

RUN is a run directory, a bundle or a name (`python -m alexnet_jax.hub list`). The formats:

    onnx, onnx-float16             ONNX, opset 17, any batch
    onnx-int8                      8-bit weights and activations, whose ranges come from training images
    onnx-int8-dynamic              8-bit weights in the hidden layers, activations rounded at run time
    tflite, tflite-int8            TensorFlow Lite (LiteRT), one image; float, or 8-bit weights
    stablehlo                      a program for `jax.export`, any batch; its parameters in .safetensors
    torch                          PyTorch's state dict: torchvision's, or for the class in docs/weights.md
    safetensors, bundle            the parameters by our names; a folder that `load` takes

Programs take the pixels of the crop, u8[B,crop,crop,3], and give logits; with --preprocess=json they take
f32 minus the mean, in ONNX [B,3,crop,crop]. A JSON file beside the export says how to prepare images,
and lists the classes. Before writing anything, the command compares the logits of the exported network with
ours on some images (from the run's store, or random) and prints the largest difference. If it is too large,
nothing is written.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, choose, say
from alexnet_jax.devices import backend
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import central
from alexnet_jax.nets import network
from alexnet_jax.rundir import fingerprint
from alexnet_jax.training import inference, steps
from alexnet_jax.weights import (
    bundle,
    graph,
    safetensors,
    to_onnx,
    to_stablehlo,
    to_tflite,
    to_torch,
    variables,
)

# Format: suffix, largest logit difference, relative to the range of all logits.
FORMATS = {
    'onnx': ('.onnx', 1e-4),
    'onnx-float16': ('.onnx', 0.02),
    'onnx-int8': ('.onnx', 0.2),
    'onnx-int8-dynamic': ('.onnx', 0.05),
    'tflite': ('.tflite', 1e-4),
    'tflite-int8': ('.tflite', 0.05),
    'stablehlo': ('.stablehlo', 1e-4),
    'torch': ('.pth', 1e-4),
    'safetensors': ('.safetensors', 1e-4),
    'bundle': ('', 1e-4),
}
OPTIONAL = {'onnx': to_onnx, 'tflite': to_tflite}  # formats that need more packages
WEIGHTS = ('torch', 'safetensors', 'bundle')  # formats without a program
SAME = 95  # percent of validation images that get the same class
CALIBRATION, BATCH = 128, 16  # training images that set the 8-bit ranges; per batch


class Source(NamedTuple):
    """The network to export, in float32, and its kind of input."""

    run: inference.Run
    net: network.Network
    arrays: dict[str, np.ndarray]  # variables by name, such as 'params/conv1/kernel'
    crop: int
    mean: np.ndarray  # f32[crop,crop,3], or f32[1,1,3] if it is the same for all pixels
    pixels: bool  # whether the export gets pixels, or floats minus the mean

    @property
    def dtype(self):
        return np.uint8 if self.pixels else np.float32

    def forward(self, arrays, images):
        """images [B,crop,crop,3] -> logits f32[B,K]."""
        tree = variables.nest({tuple(name.split('/')): x for name, x in arrays.items()})
        images = steps.normalize(images, self.mean) if self.pixels else images
        return network.apply(self.net, tree, images)[0]

    def fed(self, images: np.ndarray) -> np.ndarray:
        """Pixels u8[B,crop,crop,3] in the form that the export takes."""
        return images if self.pixels else images.astype(np.float32) - self.mean


class Export(NamedTuple):
    """What to write, and how the export computes logits of pixels u8[B,crop,crop,3]."""

    content: bytes
    run: Callable[[np.ndarray], np.ndarray]
    beside: dict[str, bytes] = {}  # files whose names have more suffixes
    exact: Callable[[np.ndarray], np.ndarray] | None = None  # `run` before quantization


def main() -> None:
    parser = figures.parser(
        'export', __doc__, output='file (for bundle, folder) to write (default: in RUN)'
    )
    parser.add_argument('--format', required=True, help=', '.join(FORMATS))
    parser.add_argument(
        '--preprocess',
        choices=('graph', 'json'),
        help='subtract the mean in the exported program, or leave it to the user (default: graph)',
    )
    parser.add_argument('--images', type=int, default=100, help='images to compare')
    parser.add_argument('--store', default='', help='path of the store, if it has moved')
    args = figures.start(parser)
    choose('--format', args.format, FORMATS)
    if args.images < 1:
        raise UserError(f'--images={args.images}: must be at least 1')
    if args.format in WEIGHTS and args.preprocess == 'graph':
        raise UserError(
            f'--preprocess=graph: --format={args.format} has no program, only weights; leave it out'
        )
    plain = args.format.split('-')[0]
    if plain in OPTIONAL:
        OPTIONAL[plain].check_installed()
    output = _output(args)
    source = _source(args)
    images, labels = _images(source, args)
    ours = _logits(source, images)
    made = EXPORTS[plain](source, args)
    for computed, name in ((made.exact, plain), (made.run, args.format)):
        if computed:
            _, most = FORMATS[name]
            parts = [computed(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
            lines = _compare(args.format, ours, np.concatenate(parts), labels, most)
    for line in lines:
        say(line)
    if args.format == 'bundle':
        bundle.write(output, inference.as_bundle(source.run))
        say(f'wrote {output}')
        return
    beside = {**_about(source, args.format, os.path.basename(output)), **made.beside}
    for suffix, content in beside.items():
        figures.write(output + suffix, content)
    figures.write(output, made.content)


def _output(args) -> str:
    """The file to write; UserError if it cannot be written."""
    suffix, _ = FORMATS[args.format]
    if args.output is None:
        figures.check_folder(args.run, None)
        stem = 'weights' if args.format == 'safetensors' else 'model'
        stem += ''.join(args.format.partition('-')[1:])
        args.output = os.path.join(args.run, stem + suffix if suffix else args.format)
    elif os.path.splitext(args.output)[1] != suffix and suffix:
        raise UserError(
            f'--output={args.output}: the name must end in {suffix} for --format={args.format}'
        )
    if not suffix:
        bundle.check_new(args.output)
        return args.output
    figures.check_file('--output', args.output)
    path = paths.path(args.output)
    if path.name == bundle.WEIGHTS and (path.parent / bundle.CONFIG).is_file():
        raise UserError(
            f'--output={args.output}: {path.parent} is a run or a bundle, where this is the name of '
            'the weights; choose another'
        )
    return args.output


def _source(args) -> Source:
    run = inference.describe_run(args.run)
    mesh = meshes.make((1, 1), towers=1, batches={})
    run = inference.restore_run(run, mesh, args.step)
    net = run.net.clone(dtype='float32') if hasattr(run.net, 'dtype') else run.net
    named = fingerprint.named_leaves(jax.device_get(run.variables))
    arrays = {name: np.asarray(x, np.float32) for name, x in named.items()}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise UserError(f'{args.run}: {name} is not finite; give another --step')
    crop = run.config['augment']['crop']
    mean = np.asarray(central(run.facts.mean, crop))
    mean = mean[:1, :1] if (mean == mean[:1, :1]).all() else mean
    pixels = args.preprocess != 'json' and args.format not in WEIGHTS
    return Source(run, net, arrays, crop, mean, pixels)


def _store(source: Source, args):
    """The run's store, or None if it has none and --store is not given."""
    try:
        return inference.open_store([source.run], args.store)
    except UserError:
        if args.store:
            raise
        return None


def _crops(source: Source, store, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Center crops u8[N,crop,crop,3] of images of a split, and their labels."""
    store.check_split(split)
    labels = store.labels(split)
    records = np.sort(figures.sample(labels, count, seed=0))
    squares = figures.squares(store, split, records)
    return np.asarray(central(squares, source.crop)), labels[records]


def _images(source: Source, args) -> tuple[np.ndarray, np.ndarray | None]:
    """Images u8[N,crop,crop,3] to compare with, and their labels; None for random images."""
    store = _store(source, args)
    if store:
        return _crops(source, store, 'val', args.images)
    rng, crop, images = np.random.default_rng(0), source.crop, []
    for i in range(args.images):  # patterns of all scales: to a network, all noise looks alike
        grid = rng.integers(0, 256, (min(2 ** (i % 8), crop),) * 2 + (3,), np.uint8)
        times = -(-crop // len(grid))
        images.append(grid.repeat(times, 0).repeat(times, 1)[:crop, :crop])
    return np.stack(images), None


def _logits(source: Source, images: np.ndarray, arrays: dict | None = None) -> np.ndarray:
    """Our logits f32[N,K] of pixels u8[N,crop,crop,3]."""
    source, compiled = source._replace(pixels=True), jax.jit(source._replace(pixels=True).forward)
    with jax.default_matmul_precision('highest'):
        parts = [
            compiled(arrays or source.arrays, images[i : i + BATCH])
            for i in range(0, len(images), BATCH)
        ]
    return np.concatenate([*map(np.asarray, parts)])


def _compare(
    name: str, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None, tolerance: float
) -> list[str]:
    """Lines that say how far an export is from our network; UserError if too far."""
    scale = max(np.ptp(ours), 1e-30)  # not the largest, which can be an offset of all logits
    difference = np.abs(ours - theirs).max()
    same = 100 * np.mean(ours.argmax(1) == theirs.argmax(1))
    images = f'{len(ours):,} {"random" if labels is None else "validation"} images'
    text = (
        f'largest logit difference on {images}: {difference:.2g}, of a range of {scale:.3g} '
        f'({difference / scale:.1e}); same class for {same:.1f}%'
    )
    wrong = ''
    if not difference <= tolerance * scale:  # also true for NaN
        wrong = f'more than {tolerance:g} of the range'
    elif labels is not None and same < SAME:
        wrong = f'less than {SAME}%'
    if wrong:
        raise UserError(f'--format={name}: {text}; {wrong}, so nothing was written')
    if labels is not None:
        errors = [100 * np.mean(x.argmax(1) != labels) for x in (ours, theirs)]
        return [text, f'top-1 error on them: {errors[0]:.2f}% -> {errors[1]:.2f}%']
    return [text]


def _about(source: Source, name: str, file: str) -> dict[str, bytes]:
    """How to use an export called `file`: the files beside it, by suffix."""
    config, pixels = source.run.config, source.pixels
    channels_first = name == 'torch' or name.startswith('onnx') and not pixels
    image = [3, source.crop, source.crop] if channels_first else [source.crop, source.crop, 3]
    batch = 1 if name.startswith('tflite') else 'batch'
    files, mean = {}, 'subtracted by the program'
    if not pixels and len(source.mean) == 1:
        mean = source.mean[0, 0].tolist()
    elif not pixels:
        mean, buffer = f'{file}.mean.npy', io.BytesIO()
        np.save(buffer, source.mean)
        files['.mean.npy'] = buffer.getvalue()
    about = {
        'file': file,
        'format': name,
        'input': {
            'name': 'images',
            'shape': [batch, *image],
            'dtype': 'uint8' if pixels else 'float32',
            'channels': 'RGB',
            'range': [0, 255],
            'mean': mean,
        },
        'prepare': {
            'resize_shorter_side': config['data']['size'],
            'interpolation': 'bilinear, antialiased; bicubic if the image is smaller',
            'crop': f'the central {source.crop} x {source.crop} pixels',
            'exif': bool(source.run.facts.exif),
        },
        'output': {'name': 'logits', 'shape': [batch, len(source.run.facts.names)]},
        'classes': list(source.run.facts.names),
    }
    if name in WEIGHTS:
        about['model'] = config['model']
    return files | {'.json': (json.dumps(about, indent=2) + '\n').encode()}


# Each returns an Export.


def _onnx(source: Source, args) -> Export:
    with backend.portable(sums=True):
        found = graph.read(
            lambda images: source.forward(source.arrays, images),
            source.crop,
            source.dtype,
            maps=not source.pixels,
        )
    shape = (source.crop, source.crop, 3)
    fed = source.fed
    if not source.pixels:
        shape, fed = (3, *shape[:2]), lambda x: source.fed(x).transpose(0, 3, 1, 2).copy()
    facts = {'classes': json.dumps(list(source.run.facts.names))}
    content = to_onnx.model(found, shape=shape, dtype=source.dtype, facts=facts)
    kind, exact = args.format.removeprefix('onnx'), None

    def runner(content):
        session = to_onnx.session(content)
        return lambda images: session(fed(images))

    if kind == '-float16':
        content = to_onnx.half(content)
    elif kind:
        exact = runner(content)
        content = to_onnx.eight_bits(
            content, None if 'dynamic' in kind else _ranges(source, args, fed)
        )
    return Export(content, runner(content), exact=exact)


def _ranges(source: Source, args, fed: Callable) -> list[np.ndarray]:
    """Batches of training images, from which the ranges of the activations are taken."""
    store = _store(source, args)
    if store is None:
        raise UserError(
            f'--format={args.format}: needs the training images of {args.run}; give their --store, or '
            'export another format'
        )
    images, _ = _crops(source, store, 'train', CALIBRATION)
    return [fed(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]


def _tflite(source: Source, args) -> Export:
    def made(eight_bits):
        with backend.portable():
            content = to_tflite.model(
                lambda images: source.forward(source.arrays, images),
                source.crop,
                source.dtype,
                eight_bits=eight_bits,
            )
        run = to_tflite.runner(content)
        return content, lambda images: run(source.fed(images))

    if args.format == 'tflite':
        return Export(*made(False))
    return Export(*made(True), exact=made(False)[1])


def _stablehlo(source: Source, args) -> Export:
    # The precision used in the comparison.
    with backend.portable(), jax.default_matmul_precision('highest'):
        content = to_stablehlo.program(source.forward, source.arrays, source.crop, source.dtype)
    weights = safetensors.encoded(source.arrays, bundle.OURS)
    read, _ = safetensors.decoded(weights, '.safetensors')
    run = to_stablehlo.runner(content, read)
    beside = {'.safetensors': weights}
    return Export(content, lambda images: run(source.fed(images)), beside)


def _torch(source: Source, args) -> Export:
    arrays = {tuple(name.split('/')): x for name, x in source.arrays.items()}
    content = to_torch.encoded(to_torch.state_dict(source.net, arrays, source.crop))
    read = to_torch.variables_of(source.net, to_torch.decoded(content), source.crop)
    named = fingerprint.named_leaves(read)
    return Export(content, lambda images: _logits(source, images, named))


def _safetensors(source: Source, args) -> Export:
    content = safetensors.encoded(source.arrays, bundle.OURS)
    read, _ = safetensors.decoded(content, '.safetensors')
    return Export(content, lambda images: _logits(source, images, read))


def _as_bundle(source: Source, args) -> Export:
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(folder, inference.as_bundle(source.run))
        read = fingerprint.named_leaves(bundle.read(folder).variables)
    return Export(b'', lambda images: _logits(source, images, read))


EXPORTS = {
    'onnx': _onnx,
    'tflite': _tflite,
    'stablehlo': _stablehlo,
    'torch': _torch,
    'safetensors': _safetensors,
    'bundle': _as_bundle,
}


if __name__ == '__main__':
    command.run(main)
