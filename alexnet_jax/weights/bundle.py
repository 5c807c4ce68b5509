"""A bundle: a folder with a trained network and all that is needed to use it, but not to resume training.

    config.json         the config, as of a run; `bundle` has the card's facts and SHA-256s of other files
    model.safetensors   the variables by path ('params/conv1/kernel'), and `mean`
    names.txt           the class names, by label
    README.md           the model card

A compressed network has model.compressed (`compressed`) in place of model.safetensors. A mean image whose
pixels are all the same is stored as one, f32[1,1,3].
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import UserError, one_line, reason
from alexnet_jax.rundir import directory, fingerprint
from alexnet_jax.weights import compressed, safetensors, variables

CONFIG, WEIGHTS, NAMES, CARD = (
    'config.json',
    'model.safetensors',
    'names.txt',
    'README.md',
)
COMPRESSED = 'model.compressed'
FORMAT = 1
OURS = {'format': 'alexnet_jax'}  # metadata of our .safetensors
LARGEST = 4096  # pixels, side of images
TEXTS = ('title', 'source', 'url', 'sha256', 'license', 'data', 'made')  # facts of the card
METRICS = {'top1_error': 'top-1 error', 'top5_error': 'top-5 error'}  # in percent


class Bundle(NamedTuple):
    """A network with its weights.

    card has any of: title, source (what it was converted from), url, sha256 (of that file), license, data
    (what it was trained on), published and measured (dicts: `METRICS` in percent, and 'on': the images and
    views), made (the command), folded (whether batch normalization is folded in, `weights.folded`).
    """

    config: dict  # as in a run's config.json
    variables: dict  # {'params', 'batch_stats'} of NumPy arrays of floats
    names: list[str]  # class names, by label
    mean: np.ndarray  # f32[S,S,3], RGB, 0 to 255; S = config['data']['size']
    card: dict[str, Any]


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a folder holds a bundle."""
    folder = paths.path(path)
    weights = any((folder / name).is_file() for name in (WEIGHTS, COMPRESSED))
    return weights and (folder / CONFIG).is_file()


def check_new(folder: str | os.PathLike) -> None:
    """Raises UserError unless a folder is empty or does not exist, and can be written."""
    path = paths.path(folder)
    try:
        new = not path.exists() or path.is_dir() and not any(path.iterdir())
        if new and not paths.is_remote(path):
            with tempfile.TemporaryDirectory(dir=paths.existing(path.absolute().parent)):
                pass
    except paths.failures(path) as error:
        raise _unwritable(folder, error) from error
    if not new:
        raise UserError(f'{folder}: exists and is not an empty folder; give another')


def write(folder: str | os.PathLike, bundle: Bundle, *, compress: bool = False) -> None:
    """Writes a bundle to a new or empty folder: all of it or, if it cannot be written, nothing.

    Arrays keep their types, such as float16; compress: uses the lossless format of `compressed`.
    Raises UserError if the folder has files or cannot be written.
    """
    path = paths.path(folder)
    files = encoded(bundle, compress=compress)
    check_new(folder)
    try:
        if paths.is_remote(path):
            for name in reversed(files):  # the config last, without which it is not a bundle
                paths.replace(path / name, files[name])
            return
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f'.{path.name}-', dir=path.absolute().parent)
        try:
            for name, content in files.items():
                paths.replace(os.path.join(temporary, name), content)
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except paths.failures(path) as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: str | os.PathLike, error: Exception) -> UserError:
    return UserError(
        f'{paths.full(error)}{folder}: cannot be written ({reason(error)}); give another folder'
    )


def encoded(bundle: Bundle, *, compress: bool = False) -> dict[str, bytes]:
    """The files of a bundle, by name."""
    names = class_names.checked(bundle.names, 'the bundle')
    mean = np.asarray(bundle.mean, np.float32)
    size = bundle.config['data']['size']
    if mean.shape != (size, size, 3):
        raise ValueError(f'the mean image is {mean.shape}, and config.data.size is {size}')
    constant = (mean == mean[:1, :1]).all()
    arrays = {name: np.asarray(x) for name, x in fingerprint.named_leaves(bundle.variables).items()}
    arrays['mean'] = mean[:1, :1] if constant else mean
    if compress:
        weights = {COMPRESSED: compressed.encoded(arrays)}
    else:
        weights = {WEIGHTS: safetensors.encoded(arrays, OURS)}
    files = {**weights, NAMES: ''.join(f'{name}\n' for name in names).encode()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    about = {'format': FORMAT, 'sha256': sums, 'card': bundle.card}
    config = {**bundle.config, 'bundle': about}
    content = (json.dumps(config, indent=2) + '\n').encode()
    return {CONFIG: content, **files, CARD: card(bundle).encode()}


def read_config(folder: str | os.PathLike) -> tuple[dict, dict]:
    """Reads (config, card) of a bundle without its weights; UserError if they are damaged."""
    config, about = _config(folder)
    return config, about['card']


def checksums(folder: str | os.PathLike) -> dict[str, str]:
    """The SHA-256s of files that config.json records, by name; UserError if it is damaged."""
    return _config(folder)[1]['sha256']


def files(folder: str | os.PathLike) -> tuple[str, ...]:
    """The names of a bundle's files, the config first; UserError if that is damaged."""
    weights = COMPRESSED if COMPRESSED in checksums(folder) else WEIGHTS
    return CONFIG, weights, NAMES, CARD


def read(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle. Raises UserError if it is damaged or from a later version."""
    config, about = _config(folder)
    path, size = paths.path(folder), config['data']['size']
    weights = COMPRESSED if COMPRESSED in about['sha256'] else WEIGHTS
    contents = {name: variables.content(str(path / name)) for name in (weights, NAMES)}
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != about['sha256'].get(name):
            raise _damaged(folder, f'{name} does not have the SHA-256 in {CONFIG}')
    if weights == COMPRESSED:
        arrays = compressed.decoded(contents[weights], str(path / weights))
    else:
        arrays, _ = safetensors.decoded(contents[weights], str(path / weights))
    mean = arrays.pop('mean', None)
    floats = all(x.dtype.kind in 'fV' for x in arrays.values())  # V: bfloat16
    if mean is None or mean.shape not in ((1, 1, 3), (size, size, 3)) or not floats:
        raise _damaged(folder, f'{weights} has no mean image, or arrays that are not floats')
    mean = np.ascontiguousarray(np.broadcast_to(mean.astype(np.float32), (size, size, 3)))
    if not np.isfinite(mean).all():
        raise _damaged(folder, 'the mean image is not finite')
    try:
        names = contents[NAMES].decode().removesuffix('\n').split('\n')
        tree = variables.nest({tuple(name.split('/')): x for name, x in arrays.items()})
    except (UnicodeDecodeError, TypeError, AttributeError) as error:
        raise _damaged(folder, reason(error)) from error
    return Bundle(config, tree, class_names.checked(names, str(path / NAMES)), mean, about['card'])


def _config(folder: str | os.PathLike) -> tuple[dict, dict]:
    """(the config, what `bundle` has in it)"""
    file = paths.path(folder) / CONFIG
    try:
        config = directory.completed(json.loads(file.read_bytes()))
        about, size, crop = config.pop('bundle'), config['data']['size'], config['augment']['crop']
        valid = [
            type(about['format']) is int,
            isinstance(about['sha256'], dict),
            isinstance(about['card'], dict) and _is_card(about['card']),
            type(crop) is int and 0 < crop <= size <= LARGEST,
        ]
        if not all(valid):
            raise ValueError('a field has the wrong type')
    except (paths.failures(file), ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f'{CONFIG}: {reason(error)}') from error
    except RecursionError:
        raise _damaged(folder, f'{CONFIG} is nested too deeply') from None
    if about['format'] != FORMAT:
        raise UserError(
            f'{folder}: has bundle format {about["format"]}; update alexnet_jax, which reads {FORMAT}'
        )
    return config, about


def _is_card(card: dict) -> bool:
    """Whether the facts have the types that `card` and `errors` print."""
    found = [card.get(name) or {} for name in ('published', 'measured', 'compression')]
    if not all(isinstance(x, dict) for x in found):
        return False
    *tables, compression = found
    percent = [table.get(key, 0) for table in tables for key in METRICS]
    texts = [table.get('on') for table in tables] + [card.get(name) for name in TEXTS]
    sizes = [compression.get('times'), compression.get('kept')] if compression else []
    return (
        all(isinstance(x, int | float) and 0 <= x <= 100 for x in percent)
        and all(isinstance(x, int | float) and 0 <= x <= 1e6 for x in sizes)
        and all(isinstance(x, str | None) for x in texts)
    )


@contextlib.contextmanager
def usable(folder: str | os.PathLike) -> Iterator[None]:
    """Raises UserError that names the bundle if its config does not make a network."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{folder}: {error}') from error
    except Exception as error:  # of any kind: a damaged config can hold any value
        raise _damaged(folder, f'{CONFIG}: {one_line(error)[:200]}') from error


def _damaged(folder: str | os.PathLike, why: str) -> UserError:
    return UserError(
        f'{folder}: a damaged bundle ({why}): get a fresh copy; python -m alexnet_jax.hub download NAME '
        'repairs a registered network'
    )


def card(bundle: Bundle) -> str:
    """The model card: Markdown, with the header that the Hugging Face hub reads."""
    facts = bundle.card
    title, data = facts.get('title', bundle.config['model']['net']), facts.get('data', 'unknown')
    license = facts.get('license', 'unknown')
    header = {
        'license': license.lower() if ' ' not in license else 'other',
        'library_name': 'alexnet_jax',
        'pipeline_tag': 'image-classification',
        'tags': ['image-classification', 'jax', bundle.config['model']['net']],
        'metrics': ['accuracy'],
    }
    found = facts.get('measured') or {}
    metrics = [
        {'type': 'accuracy', 'name': f'top-{k} accuracy', 'value': round(1 - found[key] / 100, 5)}
        for k, key in ((1, 'top1_error'), (5, 'top5_error'))
        if key in found
    ]
    if metrics:
        result = {
            'task': {'type': 'image-classification'},
            'dataset': {'name': data, 'type': data},
            'metrics': metrics,
        }
        header['model-index'] = [{'name': title, 'results': [result]}]
    # A JSON value is a YAML value, too.
    lines = ['---', *(f'{key}: {json.dumps(value)}' for key, value in header.items()), '---', '']
    lines += [f'# {title}', '']
    rows = [
        ('Network', f'`{bundle.config["model"]["net"]}`, {_count(bundle):,} parameters'),
        ('Input', _input(bundle)),
        ('Classes', f'{len(bundle.names):,}'),
        ('Trained on', data),
        ('Source', facts.get('source')),
        ('URL', facts.get('url')),
        ('SHA-256 of that file', facts.get('sha256')),
        ('Published', errors(facts.get('published'))),
        ('Measured', errors(facts.get('measured'))),
        ('Compressed', compression(facts.get('compression'))),
        ('Made by', f'`{facts["made"]}`' if facts.get('made') else None),
        ('Batch normalization', 'folded into the layers' if facts.get('folded') else None),
        ('License', license),
    ]
    lines += ['| | |', '|---|---|', *(f'| {name} | {text} |' for name, text in rows if text)]
    lines += ['', '```python', 'import alexnet_jax', '']
    lines += ["classify = alexnet_jax.load('PATH TO THIS FOLDER')"]
    lines += ["print(classify.words[classify('picture.jpg').argmax()])", '```', '']
    return '\n'.join(lines)


def compression(facts: dict | None) -> str:
    """'28.9 times smaller; 11.4% of the weights are left', or '' if a network is not compressed."""
    if not facts:
        return ''
    return f'{facts["times"]:.1f} times smaller; {facts["kept"]:.1f}% of the weights are left'


def errors(found: dict | None) -> str:
    """'top-1 error 43.48%, top-5 error 20.93% (ImageNet, center crop)', or '' if nothing is known."""
    if not found:
        return ''
    text = ', '.join(f'{METRICS[key]} {found[key]:.2f}%' for key in METRICS if key in found)
    return f'{text} ({found["on"]})' if found.get('on') else text


def _count(bundle: Bundle) -> int:
    return sum(x.size for x in fingerprint.named_leaves(bundle.variables['params']).values())


def _input(bundle: Bundle) -> str:
    size, crop = bundle.config['data']['size'], bundle.config['augment']['crop']
    red, green, blue = bundle.mean.mean((0, 1), np.float64).tolist()
    return (
        f'RGB, 0 to 255, minus the mean ({red:.1f}, {green:.1f}, {blue:.1f} on average); crops of '
        f'{crop} x {crop} pixels from the central square resized to {size} x {size}'
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
