"""Everything that a config determines before the first training step."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import batches
from alexnet_jax.input.images import central
from alexnet_jax.input.store import Store
from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network
from alexnet_jax.rundir import checkpoint, directory, fingerprint
from alexnet_jax.training import diagnosis, evaluation, inference, metrics, optim, steps
from alexnet_jax.weights import bundle as bundles
from alexnet_jax.weights import folded, hub, variables
from alexnet_jax.weights.bundle import Bundle

log = logging.getLogger(__name__)
CALIBRATION = 1024  # training images for folded statistics


def make_optimizer(config, net: Network, mesh: jax.sharding.Mesh):
    """Returns a config's optimizer for a network's parameters on a mesh."""
    return optim.make(
        net,
        **{name: config.optim[name] for name in optim.UPDATE},
        freeze=config.train.freeze,
        axis='model' if mesh.shape['model'] > 1 else None,
    )


def _same(optimizer):
    return optimizer


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the loop needs; `make` builds it from a config, a mesh, a store and a network."""

    config: object
    mesh: jax.sharding.Mesh
    store: Store
    net: Network
    optimizer: object
    rates: Callable
    total: int  # steps, at most
    train_step: Callable
    train_steps: Callable | None  # several steps at once, if `run.dispatch` is above 1
    predict: Callable
    all_finite: Callable
    find_broken: Callable
    saturated: Callable | None  # if the network's units have a bound
    modes: Callable
    statistics: Callable

    @classmethod
    def make(cls, config, mesh, store: Store, net: Network, wrap: Callable = _same) -> 'Setup':
        """wrap: turns the config's optimizer into the one used."""
        optimizer = wrap(make_optimizer(config, net, mesh))
        examples, crop = store.counts['train'], config.augment.crop
        _check_intervals(config, examples)
        inputs_of = {
            'mean': central(store.mean, crop),
            'eigenvectors': store.eigenvectors,
            'sigma': store.sigma,
            **config.colour,
        }
        of_loss = {
            'seed': config.seed,
            'freeze': config.train.freeze,
            'smoothing': config.train.smoothing,
            **inputs_of,
        }
        make_step = functools.partial(
            steps.make_train_step,
            net,
            optimizer,
            mesh,
            ema=config.train.ema,
            **of_loss,
        )
        return cls(
            config=config,
            mesh=mesh,
            store=store,
            net=net,
            optimizer=optimizer,
            rates=optim.make_rates(examples=examples, batch=config.train.batch, **config.optim),
            total=optim.steps_per(config.optim.epochs, examples, config.train.batch),
            train_step=make_step(),
            train_steps=make_step(several=True) if config.run.dispatch > 1 else None,
            predict=steps.make_predict(net, mesh, mean=store.mean, views='center', crop=crop),
            all_finite=steps.make_all_finite(mesh),
            find_broken=diagnosis.make_find_broken(net, **of_loss),
            saturated=diagnosis.make_saturated(net, **inputs_of) if net.bound else None,
            modes=steps.make_modes(net, **of_loss),
            statistics=steps.make_statistics(
                net, seed=config.seed, freeze=config.train.freeze, **inputs_of
            ),
        )

    def start(self, checkpoints, init_from: str):
        """Returns (state, history, running sums) at the last checkpoint, or at the beginning."""
        crop = self.config.augment.crop
        of_state = {'crop': crop, 'ema': self.config.train.ema > 0}
        target = steps.abstract_state(self.net, self.optimizer, self.mesh, **of_state)
        if checkpoints.steps():
            _, state, meta = checkpoints.restore(target)
            history = {int(step): error for step, error in meta['history'].items()}
            return state, history, meta['running']
        state = steps.init_state(
            self.net, self.optimizer, self.mesh, seed=self.config.seed, **of_state
        )
        if init_from:
            variables = _variables_from(init_from, self, target, state)
            state = state.replace(**variables)
            if state.ema:
                state = state.replace(ema=jax.tree.map(jnp.copy, variables))
        return state, {}, {}

    def batches(self, start: int, stop: int | None = None):
        """Returns this process's rows of the batches from step `start` on, to the end or `stop`."""
        return batches.train_batches(
            self.store,
            seed=self.config.seed,
            batch=self.config.train.batch,
            start=start,
            stop=self.total if stop is None else stop,
            rows=meshes.rows(self.mesh, self.config.train.batch),
            threads=self.config.run.threads,
            **self.config.augment,
        )

    def recompute(
        self, state: steps.TrainState, watch: Callable[[int, int], None] = lambda done, of: None
    ) -> steps.TrainState:
        """Returns a state with statistics over `config.train.recompute` more training images, in batches.

        At most one epoch is read. watch(done, of) is called before every batch, with numbers of images.
        """
        batch = self.config.train.batch
        images = min(self.config.train.recompute, self.store.counts['train'])
        count = -(-images // batch)
        start = int(state.step)
        rates = {**self.rates(start, {}), 'colour': 0.0}

        def batches():
            for i, local in enumerate(self.batches(start, start + count)):
                watch(i * batch, count * batch)
                local = {name: x for name, x in local.items() if name != 'mix'}
                yield start + i, meshes.global_batch(self.mesh, batch, local), rates

        def stats(variables):
            found = steps.recompute_statistics(
                self.statistics, variables, batches(), self.config.train.freeze
            )
            place = jax.tree.map(lambda x: x.sharding, variables['batch_stats'])
            return jax.device_put(found, place)

        new = state.replace(batch_stats=stats(state.variables))
        if state.ema:
            new = new.replace(ema={**state.ema, 'batch_stats': stats(state.ema)})
        return new

    def compare_modes(self, state: steps.TrainState, history: dict[int, float]) -> dict[str, float]:
        """Returns the loss of the latest training batch with its own and with the running statistics.

        {} without batch normalization, or before the first step.
        """
        step = int(state.step) - 1
        if step < 0 or not state.batch_stats:
            return {}
        rates = optim.scalars(self.rates(step, history))
        [local] = self.batches(step, step + 1)
        batch = meshes.global_batch(self.mesh, self.config.train.batch, local)
        losses = jax.device_get(self.modes(state.variables, step, batch, rates))
        return dict(zip(('loss_batch_stats', 'loss_running_stats'), losses.tolist(), strict=True))

    def evaluate(self, state: steps.TrainState) -> dict[str, float]:
        """Returns the metrics of the validation split with the center crop.

        With a moving average, also the other network's, as 'ema_...' or 'last_...'; `config.train.ema_used`
        decides which is which.
        """

        def of(variables):
            sums = evaluation.evaluate(
                [lambda images: self.predict(variables, images)],
                self.mesh,
                self.store,
                split='val',
                batch=self.config.run.eval_batch,
                threads=self.config.run.threads,
            )
            return metrics.values(sums)

        if not state.ema:
            return of(state.variables)
        last, ema = of(state.variables), of(state.ema)
        used, name, other = (
            (ema, 'last', last) if self.config.train.ema_used else (last, 'ema', ema)
        )
        return used | {f'{name}_{key}': value for key, value in other.items()}

    def dispatched(self, step: int) -> int:
        """Returns the number of steps in a dispatch: `run.dispatch`, or 1 if an evaluation falls inside.

        It depends only on the step's number and `config.run`, so a resumed run makes the same groups.
        """
        count = self.config.run.dispatch
        whole = step % count == 0 and step + count <= self.total
        between = map(self.evaluation_due, range(step + 1, step + count))
        return count if whole and not any(between) else 1

    def over(self, step: int, history: dict[int, float]) -> bool:
        """Returns whether the schedule ends at this step."""
        return step == self.total or self.rates(step, history)['stop']

    def evaluation_due(self, step: int, every: float = 0.0) -> bool:
        """Returns whether `config.run.eval_every`, or `every`, calls for an evaluation before this step."""
        examples, batch = self.store.counts['train'], self.config.train.batch
        every = every or self.config.run.eval_every
        number = math.floor(step * batch / (every * examples) + 1e-9)
        return number > 0 and step == optim.steps_per(number * every, examples, batch)


def _check_intervals(config, examples: int) -> None:
    """Raises UserError for intervals shorter than both a step and an epoch."""
    step = config.train.batch / examples
    if config.run.eval_every < min(step, 1):
        raise UserError(
            f'config.run.eval_every={config.run.eval_every}: shorter than a step, which is '
            f'{step:.2g} epochs of {examples:,} images; give at least that or 1.0'
        )
    if optim.steps_per(config.optim.epochs, examples, config.train.batch) < 1:
        raise UserError(f'config.optim.epochs={config.optim.epochs}: shorter than a step')


class Start(NamedTuple):
    """The network that `config.train.init_from` names."""

    path: paths.Path
    model: dict  # its config.model
    names: list[str]  # its classes
    shapes: dict[str, tuple[int, ...]]  # by name, such as 'params/conv1/kernel'
    bundle: Bundle | None = None
    average: bool = False  # whether the run uses its moving average

    @classmethod
    def open(cls, init_from: str) -> 'Start':
        """Raises UserError if there is no such network, and for damaged weights."""
        path = paths.path(hub.locate(init_from))
        if bundles.is_bundle(path):
            stored = bundles.read(path)
            leaves = fingerprint.named_leaves(stored.variables)
            found = {n: x.shape for n, x in leaves.items()}
            return cls(path, stored.config['model'], stored.names, found, stored)
        config = directory.read_config(path)
        leaves = checkpoint.Checkpoints(path / 'checkpoints').shapes()
        shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        names, average = directory.read_facts(path).names, config['train']['ema_used']
        return cls(path, config['model'], names, shapes, average=average)

    def restore(self, kept: dict) -> tuple[str, dict[str, jax.Array]]:
        """Returns (a description, arrays): those named in `kept`, with its shardings."""
        if self.bundle:
            title = self.bundle.card.get('title')
            found = inference.placed(self.path, self.bundle.variables, kept)
            return f'{self.path} ({title})' if title else str(self.path), found
        checkpoints = checkpoint.Checkpoints(self.path / 'checkpoints')
        step, found, _ = checkpoints.restore_part({'ema': kept} if self.average else kept)
        return f'{self.path}, step {step}', found['ema'] if self.average else found


def _variables_from(init_from: str, setup: Setup, target, state) -> dict:
    """Returns another network's params and batch_stats; the last layer is new if the classes differ.

    If the classes only differ in order, the last layer is reordered to match the store. Folded batch
    normalization gets the statistics of training images.
    """
    start, net, names = Start.open(init_from), setup.net, setup.store.names
    theirs = start.names
    order = None
    if theirs != names and sorted(theirs) == sorted(names) and len({*names}) == len(names):
        order = np.array([theirs.index(name) for name in names])
    wanted = fingerprint.named_leaves(target.variables)
    fresh = fingerprint.named_leaves(state.variables)
    head = {n for n in wanted if network.in_head(net, tuple(n.split('/')[1:]))}
    same = (theirs == names or order is not None) and all(
        start.shapes.get(n) == wanted[n].shape for n in head
    )
    kept = {n: leaf for n, leaf in wanted.items() if same or n not in head}
    title, found = start.restore(kept)
    new = '' if order is None else ', with its classes in a different order'
    if not same:
        new = ', with a new last layer, since the classes differ'
    log.info('starting from %s%s', title, new)
    for line in directory.compared(start.model, setup.config.model, 'config.model').values():
        log.info('%s', line)
    if same and order is not None:
        for name in head:
            sharding = found[name].sharding  # classes are the last axis of every leaf
            found[name] = jax.jit(lambda x: x[..., order], out_shardings=sharding)(found[name])
    if start.bundle and start.bundle.card.get('folded'):
        arrays = {
            tuple(name.split('/')): np.asarray(found[name])
            if name in found
            else np.zeros(x.shape, x.dtype)
            for name, x in fingerprint.named_leaves(
                network.shapes(net, setup.config.augment.crop)
            ).items()
        }
        new = unfolded(setup.config, setup.store, net, variables.nest(arrays))
        found |= inference.placed(
            'init_from', new, {n: leaf for n, leaf in wanted.items() if n in found}
        )
    leaves = [found.get(name, fresh[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(state.variables), leaves)


def unfolded(config, store: Store, net: Network, tree: dict) -> dict:
    """Returns `folded.unfolded` of variables, by training images: the same in all processes."""
    crop, examples = config.augment.crop, store.counts['train']
    batch = min(64, examples)
    count = min(CALIBRATION, examples) // batch
    log.info(
        'its batch normalization gets the statistics of %s training images', f'{count * batch:,}'
    )
    mean = central(store.mean, crop)
    images = batches.train_batches(
        store,
        seed=config.seed,
        batch=batch,
        stop=count,
        threads=config.run.threads,
        **config.augment,
    )
    return folded.unfolded(net, tree, (steps.normalize(one['image'], mean) for one in images))
