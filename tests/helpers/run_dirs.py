"""A run directory without training: `from tests.helpers.run_dirs import call, write_run`."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import batches
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import alexnet, network
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import checkpoint, directory
from alexnet_jax.weights import bundle, variables
from configs import quickstart
from tests.helpers.stores import write_store

SIZE, CROP, CLASSES, TRAIN, VAL, TEST, STEP = 72, 64, 6, 30, 12, 5, 3


class TinyRun(NamedTuple):
    """What `write_run` wrote: the folders, the images by split, the network and its parameters."""

    path: Path
    store: Path
    pictures: dict[str, np.ndarray]
    net: alexnet.AlexNet
    params: dict
    mean: np.ndarray


def write_run(folder: Path) -> TinyRun:
    """The quickstart's network at a sixteenth of the width, with random parameters."""
    pictures = write_store(
        folder / 'store',
        format='u8',
        size=SIZE,
        classes=CLASSES,
        counts={'train': TRAIN, 'val': VAL, 'test': TEST},
    )
    store = open_store(folder / 'store')
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            'data.source': 'made_up',
            'data.store': str(folder / 'store'),
            'data.size': SIZE,
            'augment.crop': CROP,
            'model.width': 0.0625,
        }
    )
    net = build(classes=CLASSES, **config.model)
    params = random_params(net, CROP, seed=0)
    directory.write(config, folder / 'run', store)
    save_params(folder / 'run', STEP, params)
    return TinyRun(folder / 'run', folder / 'store', pictures, net, params, store.mean)


def write_folded(run: TinyRun, folder: Path, **facts):
    """A bundle of a MobileNet v1 with folded batch normalization -> (its config, network, variables)."""
    config = configfile.load('mobilenet:v1')
    config.data.update({'store': str(run.store), 'source': 'made_up', 'size': SIZE, 'format': 'u8'})
    config.augment.update({'crop': CROP, 'area': ()})
    config.model.width = 0.25
    net = build(classes=CLASSES, **config.model)
    folded, rng = {}, np.random.default_rng(0)
    for (kind, *path), shape in variables.leaves(net).items():
        if path[-1] == 'scale':
            bias = rng.normal(1, 0.1, shape).astype(np.float32)
            folded |= variables.without_norm(tuple(path[:-2]), bias, net.norm_epsilon)
        elif path[-2] != 'norm':
            std = np.prod(shape[:-1]) ** -0.5 if path[-1] == 'kernel' else 0.3
            folded[kind, *path] = rng.normal(0, std, shape).astype(np.float32)
    folded, plain = variables.nest(folded), json.loads(json.dumps(config.to_dict()))
    mean, names = np.full((SIZE, SIZE, 3), 120, np.float32), open_store(run.store).names
    card = {'title': 'A network', 'sha256': '0' * 64, 'folded': True, **facts}
    bundle.write(folder, bundle.Bundle(plain, folded, names, mean, card))
    return config, net, folded


def random_params(net, crop: int, seed: int) -> dict:
    """Normally distributed parameters, scaled to keep activations near 1."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        fan_in = math.prod(shape.shape[1:-1])
        return jax.numpy.asarray(rng.normal(0, fan_in**-0.5, shape.shape), shape.dtype)

    return jax.tree.map(draw, network.shapes(net, crop)['params'])


def save_params(run: Path, step: int, params: dict) -> None:
    """Saves a checkpoint that has only parameters."""
    checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
    checkpoints.save(step, {'params': params}, {'history': {}, 'running': {}})
    checkpoints.close()


def without_tensorflow(monkeypatch) -> None:
    """Reads images without TensorFlow, whose import would dominate a short test."""
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(batches, 'importlib', nothing)


def refuses(monkeypatch, tmp_path, module, run, arguments, message) -> None:
    """Asserts that a command, with the run in place of RUN, fails with one line and writes nothing."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        call(monkeypatch, module, *(run if a == 'RUN' else a for a in arguments))
    assert '\n' not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def call(monkeypatch, module, *arguments) -> None:
    """Calls a command's main() in this process, whose setup stays."""
    without_tensorflow(monkeypatch)
    monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    module.main()
