"""Loads a trained network, from a run directory or a bundle, as functions from images to probabilities."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import InputError, UserError, choose
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import buckets, prepare
from alexnet_jax.input import images as pictures
from alexnet_jax.input import store as stores
from alexnet_jax.input.batches import Batch
from alexnet_jax.input.sources import is_path
from alexnet_jax.input.store import Store
from alexnet_jax.nets.build import build
from alexnet_jax.nets.network import Network
from alexnet_jax.rundir import checkpoint, directory, fingerprint
from alexnet_jax.training import steps
from alexnet_jax.weights import bundle as bundles
from alexnet_jax.weights import hub
from alexnet_jax.weights.bundle import Bundle

Predict = Callable[[jax.Array], jax.Array]  # u8[B,S,S,3] -> probabilities f32[B,K]
BATCH = 64  # images that a Classifier computes at once
ACCEPTED = (
    'give a path, a PIL image, or an array of shape [H,W], [H,W,1], [H,W,3] or [H,W,4], either '
    'uint8 or floats from 0 to 1; or several of them as a list, a tuple or an array [B,H,W,C]'
)


class Run(NamedTuple):
    """A trained network, loaded from its run directory or bundle."""

    name: str  # by which it was opened: its path, or a name of the hub
    path: paths.Path
    config: dict
    facts: directory.Facts
    net: Network
    step: int = 0  # 0 for a bundle
    variables: dict | None = None  # {'params', 'batch_stats'}; None until restored
    bundle: Bundle | None = None  # its origin, if any; without the variables once restored

    @property
    def title(self) -> str:
        """The name to show in output."""
        return self.name if self.bundle else f'{self.path} (step {self.step:,})'


def describe_run(path: str | os.PathLike, build: Callable = build) -> Run:
    """Returns a run without its variables, which needs no mesh.

    path: a run directory, a bundle, or a name of one, which is downloaded if need be (`hub.locate`).
    build: makes the network from the fields of `config.model`, for networks defined elsewhere. Raises
    UserError if there is no such network.
    """
    name, path = os.fspath(path), paths.path(hub.locate(path))
    if bundles.is_bundle(path):
        stored = bundles.read(path)
        exif = stored.config['data']['exif'] != 'off'
        config, facts = stored.config, directory.Facts(stored.names, stored.mean, exif)
    else:
        config, facts, stored = directory.read_config(path), directory.read_facts(path), None
    with bundles.usable(path) if stored else contextlib.nullcontext():
        net = build(classes=len(facts.names), **config['model'])
    return Run(name, path, config, facts, net, bundle=stored)


def restore_run(run: Run, mesh: Mesh, step: str | int = 'latest') -> Run:
    """Returns the same run with its variables on a mesh. step: 'best', 'latest' or a number.

    They are the moving averages if `config.train.ema_used`. Raises UserError for missing or damaged
    checkpoints, and for a numbered step of a bundle.
    """
    with bundles.usable(run.path) if run.bundle else contextlib.nullcontext():
        target = steps.abstract_variables(run.net, mesh, run.config['augment']['crop'])
    if run.bundle:
        if isinstance(step, int):
            raise UserError(f'{run.path}: a bundle has no steps; leave out --step={step}')
        variables = placed(run.path, run.bundle.variables, target)
        return run._replace(variables=variables, bundle=run.bundle._replace(variables={}))
    checkpoints = checkpoint.Checkpoints(run.path / 'checkpoints')
    wanted = None if step == 'latest' else step
    if step == 'best':
        wanted = checkpoints.best_step()
        if wanted is None:
            raise UserError(f'{run.path}: no evaluated checkpoint here, so no best one; use latest')
    average = run.config['train']['ema_used']
    found, restored, _ = checkpoints.restore_part({'ema': target} if average else target, wanted)
    return run._replace(step=found, variables=restored['ema'] if average else restored)


def placed(path: str | os.PathLike, variables: dict, target: dict) -> dict:
    """Returns those arrays of a bundle that are in `target`, with its structure, dtypes and shardings.

    variables: nested; target: jax.ShapeDtypeStructs, nested or by name, such as 'params/conv1/kernel'.
    Raises UserError if one is missing or has a different shape.
    """
    there, wanted = fingerprint.named_leaves(variables), fingerprint.named_leaves(target)
    for name, leaf in wanted.items():
        shape = [*there[name].shape] if name in there else 'missing'
        if shape != [*leaf.shape]:
            raise UserError(
                f'{path}: its weights do not fit its config.model: {name} is {shape}, not {[*leaf.shape]}'
            )
    arrays = [
        jax.make_array_from_callback(
            leaf.shape, leaf.sharding, there[name].astype(leaf.dtype).__getitem__
        )
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), arrays)


def as_bundle(run: Run, **card) -> Bundle:
    """Returns a restored run as a bundle, without the paths of this machine; card: facts to add."""
    data, train = run.config['data'], run.config['train']
    source, start = data['source'], train['init_from']
    # It may be relative to another folder, but a TFDS name has at most one '/'.
    is_folder = is_path(source) or (source.count('/') > 1 and not source.startswith('hf://'))
    config = {
        **run.config,
        'data': {
            **data,
            'source': _last(source) if is_folder else source,
            'dir': '',
            'store': '',
            'exif': 'on' if run.facts.exif else 'off',
        },
        'train': {**train, 'init_from': _last(start) if hub.is_folder(start) else start},
    }
    facts = {'title': run.path.name, 'data': config['data']['source']}
    facts = run.bundle.card if run.bundle else facts
    variables = jax.device_get(run.variables)
    return Bundle(config, variables, run.facts.names, run.facts.mean, facts | card)


def _last(path: str) -> str:
    """The last part of a path, '' for ''."""
    return path and os.path.basename(os.path.normpath(path))


def open_run(
    path: str | os.PathLike, mesh: Mesh, step: str | int = 'latest', build: Callable = build
) -> Run:
    """Returns a run with its variables on a mesh: `describe_run`, then `restore_run`."""
    return restore_run(describe_run(path, build), mesh, step)


def open_store(runs: Sequence[Run], store: str = '') -> Store:
    """Opens the store of some runs: `store`, or else the one that the first run was trained on.

    Prepares nothing. Raises UserError if there is no store, or if its classes or the size of its images
    differ from those of a run.
    """
    first = runs[0]
    if any(r.facts.names != first.facts.names for r in runs):
        raise UserError('these runs were trained on different classes: evaluate them separately')
    if store and '://' not in store and not os.path.isfile(os.path.join(store, 'store.json')):
        raise UserError(
            f'--store={store}: there is no store; give the folder that prepare wrote (python -m '
            'alexnet_jax.prepare --source=IMAGES --store=FOLDER)'
        )
    if store:
        opened = stores.open_store(buckets.local_copy(store) if '://' in store else store)
    elif recorded := directory.recorded_store(first.path):
        opened = stores.open_store(recorded)
    else:
        opened = prepare.existing(**first.config['data'])
    if opened.names != first.facts.names:
        pairs = itertools.zip_longest(opened.names, first.facts.names)
        there, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(
            f'{opened.path} does not have the classes that {first.path} was trained on '
            f'({len(opened.names):,} and {len(first.facts.names):,}; the first that differs: {there} and '
            f'{wanted}); give a store that does, --store=DIR'
        )
    for r in runs:
        if r.facts.mean.shape[0] != opened.size:
            raise UserError(
                f'{r.path}: trained on {r.facts.mean.shape[0]}-pixel images, but '
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


def make_features(
    trained: Run, mesh: Mesh, layer: str | None = None
) -> Callable[[Batch], np.ndarray]:
    """Makes features({'image': u8[B,S,S,3], 'mask': f32[B]}) -> f32[b,...], of images with mask 1.

    layer: see `steps.make_features`, which also has the shapes. Raises UserError for a wrong layer; the
    returned function raises it for features that are not finite.
    """
    crop = trained.config['augment']['crop']
    extract = steps.make_features(
        trained.net, mesh, mean=trained.facts.mean, crop=crop, layer=layer
    )

    def features(batch):
        there = batch['mask'] > 0
        images = meshes.global_batch(mesh, len(there), {'image': batch['image']})['image']
        values = np.asarray(extract(trained.variables, images))[there]
        if not np.isfinite(values).all():
            raise UserError(f'{trained.title}: activations are not finite; give another --step')
        return values

    return features


def padded(images: np.ndarray, batch: int) -> Iterator[Batch]:
    """Yields images u8[N,S,S,3] in batches of equal size, padded, for `make_features`."""
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part)
        yield {
            'image': np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))),
            'mask': np.pad(np.ones(len(part), np.float32), (0, missing)),
        }


class Classifier:
    """What `alexnet_jax.load` returns: images -> probabilities, with `names`, one per class.

    An image is a path, a PIL image, or an array [H,W], [H,W,1], [H,W,3] or [H,W,4]:
    uint8, or floats from 0 to 1, which are rounded to multiples of 1/255. They can have any size, and are
    read like training images: rotated by their EXIF orientation if those were, without alpha channel
    (dropped, not composited), the central square resized. Several images are a list, a tuple, or an array
    [B,H,W,C]. The result of one has no leading axis; that of several, or of a list of one, does. Anything
    else raises InputError, which is a ValueError.

    `run` is the opened run, `size` the side in pixels of the square cropped from an image, `words` the names
    to show: words in place of ImageNet's WordNet IDs.
    """

    @meshes.settings()
    def __init__(self, run_dir: str | os.PathLike, views: str, step: str | int, build: Callable):
        self._mesh = meshes.make((1, 1), towers=1, batches={})
        self.run = open_run(run_dir, self._mesh, step, build)
        self.names = self.run.facts.names
        self.words = class_names.shown(self.names)
        self.step = self.run.step
        self.size = self.run.facts.mean.shape[0]
        self._predict = predictor(self.run, self._mesh, views)
        self._features = {}  # compiled, by layer

    @meshes.settings()
    def __call__(self, images) -> np.ndarray:
        """Classifies one image -> probabilities f32[K], or several -> f32[B,K]."""
        return self._map(lambda batch: np.asarray(self._predict(batch['image'])), images)

    @meshes.settings()
    def features(self, images, layer: str | None = None) -> np.ndarray:
        """Returns the activations of a layer for the center crop: f32[H,W,C] or f32[F], [B,...] of several.

        layer: one of `run.net.names`, by default the last before the logits (fc7 in the paper's
        network); channels of all towers are in order. Raises UserError for other names.
        """
        if layer not in self._features:
            self._features[layer] = make_features(self.run, self._mesh, layer)
        return self._map(self._features[layer], images)

    def _map(self, function: Callable[[Batch], np.ndarray], images) -> np.ndarray:
        alone = not isinstance(images, list | tuple) and getattr(images, 'ndim', 0) != 4
        images = [images] if alone else images
        if not len(images):
            raise InputError(f'no images: {ACCEPTED}')
        found = []
        for start in range(0, len(images), BATCH):
            part = [self._square(image) for image in images[start : start + BATCH]]
            (batch,) = padded(np.stack(part), BATCH if start else len(part))
            found.append(function(batch)[: len(part)])
        return found[0][0] if alone else np.concatenate(found)

    def _square(self, image) -> np.ndarray:
        """The square u8[S,S,3] of one image."""
        exif = self.run.facts.exif
        if isinstance(image, str | os.PathLike):
            return pictures.read(os.fspath(image), self.size, exif=exif)
        if not isinstance(image, Image.Image):
            image = _levels(image)
        try:
            return pictures.square(image, self.size, exif=exif)
        except pictures.Undecodable as error:
            raise InputError(f'this PIL image cannot be used ({error}): {ACCEPTED}') from error


def _levels(image) -> np.ndarray:
    """An image's array as u8[H,W] or u8[H,W,C]; InputError for anything else."""
    shape, dtype = getattr(image, 'shape', None), getattr(image, 'dtype', None)
    if shape is None or dtype is None:
        raise InputError(f'{type(image).__name__} is not an image: {ACCEPTED}')
    array = np.asarray(image)
    if not array.size or array.ndim not in (2, 3) or array.ndim == 3 and shape[2] not in (1, 3, 4):
        raise InputError(f'an array of shape {tuple(shape)} is not an image: {ACCEPTED}')
    if array.dtype == np.uint8:
        return array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f'an array of {array.dtype} is not an image: {ACCEPTED}')
    array = array.astype(np.float32)
    low, high = array.min(), array.max()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise InputError(
            f'an array of floats from {low:.3g} to {high:.3g} is not an image: {ACCEPTED}'
        )
    return np.rint(255 * array.clip(0, 1)).astype(np.uint8)


def load(
    run_dir: str | os.PathLike,
    views: str = 'ten',
    step: str | int = 'latest',
    build: Callable = build,
) -> Classifier:
    """Loads a trained network as a function from images to probabilities, with class names.

    run_dir and build: see `describe_run`; views: 'ten' crops or only the 'center' one; step: 'best',
    'latest' or a number. Raises UserError if there is no such network, and for missing or damaged weights.
    """
    choose('views', views, steps.VIEWS)
    return Classifier(run_dir, views, step, build)
