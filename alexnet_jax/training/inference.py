"""Loads a trained network from its run directory, as a function from images to probabilities."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import prepare
from alexnet_jax.input import store as stores
from alexnet_jax.input.images import square
from alexnet_jax.input.store import Store
from alexnet_jax.nets.build import build
from alexnet_jax.nets.network import Network
from alexnet_jax.rundir import checkpoint, directory
from alexnet_jax.training import steps

Predict = Callable[[jax.Array], jax.Array]  # u8[B,S,S,3] -> probabilities f32[B,K]


class Run(NamedTuple):
    """A trained network, loaded from its run directory."""

    path: paths.Path
    config: dict
    facts: directory.Facts
    net: Network
    step: int = 0
    variables: dict | None = None  # {'params', 'batch_stats'}; None until restored


def describe_run(path: str | os.PathLike, build: Callable = build) -> Run:
    """Returns a run without its variables, which needs no mesh.

    build: makes the network from the fields of `config.model`, for networks defined elsewhere.
    Raises UserError if `path` is not a run directory.
    """
    path = paths.path(path)
    config, facts = directory.read_config(path), directory.read_facts(path)
    return Run(path, config, facts, build(classes=len(facts.names), **config['model']))


def restore_run(run: Run, mesh: Mesh, step: str | int = 'latest') -> Run:
    """Returns the same run with its variables on a mesh. step: 'best', 'latest' or a number.

    They are the moving averages if `config.train.ema_used`. Raises UserError for missing or damaged
    checkpoints.
    """
    target = steps.abstract_variables(run.net, mesh, run.config['augment']['crop'])
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints')
    wanted = {'best': checkpoints.best_step(), 'latest': None}.get(step, step)
    if step == 'best' and wanted is None:
        raise UserError(f'{run.path}: no evaluated checkpoint here, so no best one; use latest')
    average = run.config['train']['ema_used']
    found, restored, _ = checkpoints.restore_part({'ema': target} if average else target, wanted)
    return run._replace(step=found, variables=restored['ema'] if average else restored)


def open_run(
    path: str | os.PathLike, mesh: Mesh, step: str | int = 'latest', build: Callable = build
) -> Run:
    """Returns a run with its variables on a mesh: `describe_run`, then `restore_run`."""
    return restore_run(describe_run(path, build), mesh, step)


def open_store(runs: Sequence[Run], store: str = '') -> Store:
    """Opens the store of some runs: `store`, or else the one that the first run was trained on.

    Raises UserError if its classes or the size of its images differ from those of a run.
    """
    first = runs[0]
    if any(r.facts.names != first.facts.names for r in runs):
        raise UserError('these runs were trained on different classes: evaluate them separately')
    if store and '://' not in store and not os.path.isfile(os.path.join(store, 'store.json')):
        raise UserError(f'--store={store}: there is no store; give the folder that prepare wrote')
    if recorded := None if store else directory.recorded_store(first.path):
        opened = stores.open_store(recorded)
    else:
        data_config = {**first.config['data'], 'store': store or first.config['data']['store']}
        alone = jax.process_count() == 1
        opened = prepare.ensure(**data_config, alone=alone, resuming=True, flags='--')
    if opened.names != first.facts.names:
        raise UserError(
            f'{opened.path} does not have the classes that {first.path} was trained on; '
            'give a store that does, --store=DIR'
        )
    for r in runs:
        if r.facts.mean.shape[0] != opened.size:
            raise UserError(
                f'{r.path}: trained on {r.facts.mean.shape[0]}-pixel pictures, but '
                f'{opened.path} has {opened.size}-pixel ones'
            )
    if not store:  # other images of the same classes are allowed only on request
        directory.check_store(first.path, opened)
    return opened


def predictor(trained: Run, mesh: Mesh, views: str) -> Predict:
    """Returns predict(images u8[B,S,S,3]) -> probabilities f32[B,K], averaged over the views."""
    crop = trained.config['augment']['crop']
    predict = steps.make_predict(trained.net, mesh, mean=trained.facts.mean, views=views, crop=crop)
    return lambda images: predict(trained.variables, images)


class Classifier:
    """What `alexnet_jax.load` returns: images -> probabilities, with `names`, one per class.

    `run` is the opened run, `size` the side in pixels of the square cropped from an image.
    """

    def __init__(self, run_dir: str | os.PathLike, views: str, step: str | int, build: Callable):
        self._mesh = meshes.make((1, 1), towers=1, batches={})
        self.run = open_run(run_dir, self._mesh, step, build)
        self.names = self.run.facts.names
        self.step = self.run.step
        self.size = self.run.facts.mean.shape[0]
        self._predict = predictor(self.run, self._mesh, views)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Classifies images u8[H,W,3] of any sizes (or u8[B,H,W,3]) -> probabilities f32[B,K].

        Raises UserError for anything else.
        """
        shapes = [(getattr(x, 'dtype', None), getattr(x, 'shape', ())) for x in images]
        if not shapes or any(d != np.uint8 or len(s) != 3 or s[2] != 3 for d, s in shapes):
            raise UserError('give a list of pictures, each a NumPy array u8[H,W,3]')
        squares = [square(image, self.size) for image in images]
        return np.asarray(self._predict(np.stack(squares)))


def load(
    run_dir: str | os.PathLike,
    views: str = 'ten',
    step: str | int = 'latest',
    build: Callable = build,
) -> Classifier:
    """Loads a trained network as a function from uint8 images to probabilities, with class names.

    views: 'ten' crops or only the 'centre' one; step: 'best', 'latest' or a number; build: see
    `describe_run`. Raises UserError if `run_dir` is not a run directory, and for missing or damaged
    checkpoints.
    """
    choose('views', views, steps.VIEWS)
    return Classifier(run_dir, views, step, build)
