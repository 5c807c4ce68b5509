"""The run directory: the run of one config, with everything needed to resume or use it.

    config.json     the config of the last start; what can differ between starts: `check`
    run.json        one entry per start: time, command, commit, versions, devices, processor
    store.json      description of the store
    names.txt       its class names
    stats.npz       its mean image and color PCA
    metrics.jsonl   metrics, also in tensorboard/ (`metrics.py`)
    checkpoints/    (`checkpoint.py`)

It can be in a bucket (`common/paths.py`), where it is not locked.
"""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Collection
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.devices import cpu
from alexnet_jax.input.store import TRAINING, Store

LATER = {  # fields that older runs lack, and the values that they imply
    'data': {'exif': 'auto'},
    'augment': {'area': [], 'jitter': 0.0, 'mixup': 0.0, 'mixup_off': 0.0},
    'train': {'ema': 0.0, 'ema_used': False, 'smoothing': 0.0, 'recompute': 0},
    'optim': {
        'name': 'sgd',
        'trust': 0.001,
        'power': 2.0,
        'decays': [],
        'decay_roles': ['kernel', 'depthwise'],
        'nesterov': False,
        'clip': 0.0,
        'rms_decay': 0.9,
        'rms_epsilon': 1.0,
        'drop_every': 1.0,
    },
    'model': {'net': 'alexnet'},
}

DATA = {
    'source': str,
    'dir': str,
    'store': str,
    'format': str,
    'size': int,
}  # types in `config.data`


class Facts(NamedTuple):
    """What is needed to use a network, besides its parameters."""

    names: list[str]  # class names, by label
    mean: np.ndarray  # f32[S,S,3]
    exif: bool = False  # images are rotated by their EXIF orientation


def read_config(path: str | os.PathLike) -> dict:
    """Reads the config of a run directory; UserError if `path` is not one."""
    file = paths.path(path) / 'config.json'
    try:
        return completed(json.loads(file.read_text(encoding='utf-8')))
    except (paths.failures(file), ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: not a run directory ({file} cannot be read: {reason(error)}); give one that '
            'alexnet_jax.main created, such as runs/paper, or a name that alexnet_jax.hub lists'
        ) from error


def completed(config: dict) -> dict:
    """A stored config, with the fields added since; ValueError, ... if it is not a config."""
    for name, kind in DATA.items():
        if type(config['data'].get(name, kind())) is not kind:
            raise ValueError(f'data.{name} is {config["data"][name]!r}')
    return config | {part: fields | config[part] for part, fields in LATER.items()}


def read_facts(path: str | os.PathLike) -> Facts:
    """Reads the class names, the mean image and store.json; UserError if they are missing."""
    path = paths.path(path)
    try:
        names = (path / 'names.txt').read_text(encoding='utf-8').splitlines()
        with np.load(io.BytesIO((path / 'stats.npz').read_bytes())) as stats:
            mean = stats['mean']
        if mean.ndim != 3 or mean.dtype.kind != 'f' or not np.isfinite(mean).all():
            raise ValueError('the mean in stats.npz is not an image of finite numbers')
        return Facts(names, mean, bool(_read_store(path).get('exif', False)))
    except (
        paths.failures(path),
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f'{path}: incomplete run directory: {error}') from error


def _plain(config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def _free(field: str, config) -> bool:
    """Whether a field can change between two starts of a run."""
    # Under the plateau rule, evaluations determine the learning rates.
    decides = field == 'config.run.eval_every' and config.optim.schedule == 'plateau'
    return field.startswith('config.run.') and not decides


def differences(config, workdir: paths.Path) -> dict[str, str]:
    """What differs between a config and that of the run in `workdir`, in words, by the field's full name."""
    if not (workdir / 'config.json').exists():
        return {}
    return compared(read_config(workdir), config)


def compared(stored: dict, config, name: str = 'config') -> dict[str, str]:
    """As `differences`, for a stored config, or the part of one that is called `name`."""
    there, here = (configfile.fields(c, name) for c in (stored, _plain(config)))
    return {
        name: f'{name}: {there.get(name)!r} there, {here.get(name)!r} here'
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    }


def check(config, workdir: paths.Path, *, free: Collection[str] = ()) -> None:
    """Raises UserError if `workdir` is not writable or holds a run of another config.

    Only fields of `config.run`, and the fields `free`, can differ from those of that run.
    """
    if paths.is_remote(workdir):
        paths.try_bucket(workdir)
    else:
        paths.check_links(f'--workdir={workdir}', workdir)
        there = paths.existing(workdir)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise UserError(
                f'--workdir={workdir}: {there} is not a writable folder ({reason(error)}); give another'
            ) from error
    different = differences(config, workdir)
    fields = [
        text for name, text in different.items() if name not in free and not _free(name, config)
    ]
    if fields:
        raise another(workdir, fields)


def another(workdir: paths.Path, fields: Collection[str], why: str = '') -> UserError:
    """The error for a work directory whose run has another config; fields: texts of `differences`."""
    return UserError(
        f'{workdir} holds a run with a different config ({"; ".join(fields)}){why}; '
        'give another --workdir or remove this one'
    )


def write(config, workdir: paths.Path, store: Store) -> None:
    """Writes everything except metrics and checkpoints; later starts append to `run.json`."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / 'run.json'
    try:
        starts = json.loads(file.read_text(encoding='utf-8')) if file.exists() else []
    except ValueError as error:
        raise UserError(f'{file}: not JSON ({error}); repair or remove it') from error
    # stats.npz comes last of the three: `check_store` takes it as a sign that all are there.
    paths.replace(workdir / 'store.json', (store.path / 'store.json').read_bytes())
    paths.replace(workdir / 'names.txt', ''.join(f'{name}\n' for name in store.names).encode())
    paths.replace(workdir / 'stats.npz', (store.path / 'stats.npz').read_bytes())
    paths.replace(workdir / 'config.json', _json(_plain(config)))
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
    start = {
        'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        'command': sys.argv,
        'commit': commit(),
        'versions': {name: version(name) for name in packages},
        'devices': [f'{device} ({device.device_kind})' for device in jax.devices()],
        'processor': processor(),
        'store': os.path.abspath(store.path),
    }
    paths.replace(file, _json([*starts, start]))


def recorded_store(workdir: paths.Path) -> str | None:
    """Where the last start had its store, an absolute path; None if it is not known or gone."""
    try:
        store = json.loads((workdir / 'run.json').read_text(encoding='utf-8'))[-1]['store']
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return store if os.path.isfile(os.path.join(store, 'store.json')) else None


def processor() -> str:
    """The model of the CPU, and how many of its cores this process may use."""
    count = cpu.cores()
    return f'{cpu.processor()} ({count} core{"s" * (count != 1)})'


def commit() -> str:
    """The commit of this program, plus '-dirty' if its code has changed since; 'unknown' outside a checkout.

    Its code is the library, the presets, and the Python files of the experiments, including new ones.
    """

    def git(*arguments):
        folder = paths.Path(
            __file__
        ).parent  # of an installed package, perhaps in another repository
        return subprocess.run(
            ['git', *arguments], cwd=folder, capture_output=True, encoding='utf-8', check=False
        )

    try:
        if git('ls-files', '--error-unmatch', __file__).returncode:
            return 'unknown'
        described = git('describe', '--always').stdout.strip()
        # Only code, since results of experiments change while they are measured.
        code = (':/alexnet_jax', ':/configs', ':/experiments/*.py')
        changed = git('status', '--porcelain', '--', *code).stdout != ''
    except OSError:  # no git here
        return 'unknown'
    return f'{described}-dirty' if described and changed else described or 'unknown'


@contextlib.contextmanager
def locked(workdir: paths.Path):
    """Creates the directory and locks it against other starts; UserError if one is running.

    The kernel releases the lock when the process exits, however it exits. File systems without
    locks and buckets offer no protection: never start a run there twice.
    """
    if paths.is_remote(workdir):
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        directory = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f'--workdir={workdir}: {reason(error)}') from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(directory)
        raise UserError(
            f'{workdir}: another process is training here; wait or give another --workdir'
        ) from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(directory)


def _json(value) -> bytes:
    return (json.dumps(value, indent=2) + '\n').encode()


def check_store(workdir: paths.Path, store: Store) -> None:
    """Raises UserError if the run in `workdir` started with different images from those of `store`."""
    if not (workdir / 'stats.npz').exists():
        return
    facts, counts = read_facts(workdir), _read_store(workdir).get('counts')
    same = facts.names == store.names and np.array_equal(facts.mean, store.mean)
    if not same or counts and any(counts.get(s) != store.counts[s] for s in TRAINING):
        raise UserError(
            f'{workdir} was trained on different images from those now in {store.path}; '
            'restore them or give another --workdir'
        )


def _read_store(workdir: paths.Path) -> dict:
    """The store's description when the run started; {} in a run directory without store.json."""
    try:
        description = json.loads((workdir / 'store.json').read_text(encoding='utf-8'))
        return {'counts': description['counts'], **description}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{workdir}: store.json cannot be read: {error}') from error
