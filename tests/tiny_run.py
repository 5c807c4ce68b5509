"""A run directory without a training: `from tests.tiny_run import call, write_run`."""

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np

from alexnet_jax import checkpoint, data, model, rundir, switches
from alexnet_jax.store import open_store
from configs import quickstart
from tests.tiny_store import write_store

SIZE, CROP, CLASSES, TRAIN, VAL, STEP = 72, 64, 6, 30, 12, 3


class TinyRun(NamedTuple):
    """What was written: the folder, the pictures by split, the network and its parameters."""

    path: Path
    store: Path
    pictures: dict[str, np.ndarray]
    net: model.AlexNet
    params: dict
    mean: np.ndarray


def write_run(folder: Path) -> TinyRun:
    """The quickstart's network at a sixteenth of the width, with parameters from a generator."""
    pictures = write_store(
        folder / 'store', format='u8', size=SIZE, classes=CLASSES, counts={'train': TRAIN, 'val': VAL}
    )
    store = open_store(folder / 'store')
    config = quickstart.get_config()
    config.update_from_flattened_dict({
        'data.source': 'made_up', 'data.store': str(folder / 'store'), 'data.size': SIZE,
        'augment.crop': CROP, 'model.width': 0.0625,
    })  # fmt: skip
    net = switches.build(classes=CLASSES, **config.model)
    rng = np.random.default_rng(0)

    def draw(shape):
        fan_in = math.prod(shape.shape[1:-1])
        return jax.numpy.asarray(rng.normal(0, fan_in**-0.5, shape.shape), shape.dtype)

    params = jax.tree.map(draw, jax.eval_shape(lambda: model.init(net, 0, CROP)))
    rundir.write(config, folder / 'run', store)
    checkpoints = checkpoint.Checkpoints(folder / 'run/checkpoints')
    checkpoints.save(STEP, {'params': params}, {'history': {}, 'running': {}})
    checkpoints.close()
    return TinyRun(folder / 'run', folder / 'store', pictures, net, params, store.mean)


def call(monkeypatch, module, *arguments) -> None:
    """A command's main(), in this process, which it would otherwise start again and set up.

    It reads without TensorFlow, whose import would take most of the time.
    """
    no_tensorflow = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(data, 'importlib', no_tensorflow)
    monkeypatch.setenv('GLIBC_TUNABLES', '')
    monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    module.main()
