"""Checks at the start of training, before any data is read or anything is written."""

import math
from collections.abc import Callable

import jax

from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import UserError, choose
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.devices import preemption
from alexnet_jax.input import threads
from alexnet_jax.nets import network
from alexnet_jax.nets.network import Network
from alexnet_jax.rundir import checkpoint, directory, fingerprint
from alexnet_jax.training import optim
from alexnet_jax.training.setup import Setup, Start

SCHEDULE = {f'config.optim.{field}' for field in optim.SCHEDULE}


def check(config, workdir: paths.Path, build: Callable) -> tuple[jax.sharding.Mesh, Network]:
    """Returns a config's mesh, and its network with a single class.

    build: makes the network from the fields of `config.model`. Raises UserError for invalid values,
    and for devices or directories that do not fit.
    """
    for name, value in configfile.fields(config).items():
        configfile.check_value(name, value, value)
    net = build(classes=1, **config.model)
    _fields(config)
    shapes = _network(config, net)
    mesh = _mesh(config, net)
    _memory(config, mesh, shapes)
    directory.check(config, workdir, free=SCHEDULE)
    if not (config.data.source or config.data.store):
        raise UserError(
            'no images: name their folder or dataset, as in --config.data.source=FOLDER'
        )
    _start(config, workdir, net, shapes)
    return mesh, net


def _fields(config) -> None:
    """Raises UserError for values that are invalid with any network."""
    optim.make_rates(examples=1, batch=1, **config.optim)
    for field in ('eval_every', 'checkpoint_every', 'log_every', 'keep', 'dispatch'):
        if config.run[field] <= 0:
            raise UserError(f'config.run.{field}={config.run[field]}: must be above 0')
    for field in ('log_every', 'checkpoint_every'):
        if config.run[field] % config.run.dispatch:
            raise UserError(
                f'config.run.{field}={config.run[field]}: must be a multiple of '
                f'config.run.dispatch={config.run.dispatch}, the number of steps run at once'
            )
    if offset := jax.config.jax_random_seed_offset:
        raise UserError(
            f'JAX_RANDOM_SEED_OFFSET={offset}: would change all draws; unset it and set config.seed'
        )
    preemption.parse(config.run.stop_after)
    choose('config.run.saves', config.run.saves, ('background', 'wait'))
    choose('config.run.failed_save', config.run.failed_save, ('stop', 'warn'))
    if config.run.failed_save == 'warn' and jax.process_count() > 1:
        raise UserError('config.run.failed_save=warn needs a single process: choose stop')
    threads.check('config.run.threads', config.run.threads)
    for field in ('mesh', 'profile'):
        if len(config.run[field]) != 2:
            raise UserError(f'config.run.{field}={config.run[field]}: must be two numbers')
    if config.run.profile[0] > config.run.profile[1]:
        raise UserError(
            f'config.run.profile={config.run.profile}: the first must not be above the second'
        )
    if config.seed >= 2**32:  # JAX's keys would repeat those of smaller seeds
        raise UserError(f'config.seed={config.seed}: must be below 2^32')
    if config.augment.chunk < 1:
        raise UserError(f'config.augment.chunk={config.augment.chunk}: must be at least 1')
    if area := config.augment.area:
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise UserError(
                f'config.augment.area={area}: must be the smallest and largest share of the area, as in '
                '(0.08, 1.0), or ()'
            )
        if config.data.format != 'whole':
            raise UserError(
                'config.augment.area needs a store of whole images: set config.data.format=whole'
            )
    for field in ('jitter', 'mixup', 'mixup_off'):
        if not config.augment[field] >= 0:
            raise UserError(f'config.augment.{field}={config.augment[field]}: must be at least 0')
    if config.augment.jitter > 1:
        raise UserError(f'config.augment.jitter={config.augment.jitter}: must be at most 1')
    for field in ('ema', 'smoothing'):
        if not 0 <= config.train[field] < 1:
            raise UserError(
                f'config.train.{field}={config.train[field]}: must be at least 0 and below 1'
            )
    if config.train.recompute < 0:
        raise UserError(f'config.train.recompute={config.train.recompute}: must be at least 0')
    if config.train.ema_used and not config.train.ema:
        raise UserError('config.train.ema_used=True: there is no average; set config.train.ema')
    if not 0 < config.augment.crop <= config.data.size:
        raise UserError(
            f'config.augment.crop={config.augment.crop} does not fit images of '
            f'config.data.size={config.data.size} pixels'
        )


def _network(config, net: Network) -> dict:
    """Returns the shapes of a network's variables; UserError for fields that do not fit the network."""
    shapes = network.shapes(net, config.augment.crop)
    if config.train.recompute and not shapes['batch_stats']:
        raise UserError(
            f'config.train.recompute={config.train.recompute}: this network has no batch normalization'
        )
    if config.train.recompute and config.optim.schedule == 'plateau':
        raise UserError('config.train.recompute needs a schedule with a fixed end: not plateau')
    unnamed = ', '.join({*shapes['params']} - {*net.names})
    if unnamed:
        raise UserError(f'{type(net).__name__}.names lacks the layers {unnamed}: add them')
    if shapes['batch_stats'] and net.local(1, 'data') is net:
        raise UserError(
            f'{type(net).__name__}.local ignores data_axis: pass it to the layers with running '
            'statistics, or each device would keep its own'
        )
    if config.optim.conv1 and not net.first:
        raise UserError(
            f'config.optim.conv1={config.optim.conv1}: this network has no first convolution with '
            'its own rates; leave it empty'
        )
    params = [tuple(name.split('/')) for name in fingerprint.named_leaves(shapes['params'])]
    named = {'train.freeze': config.train.freeze, 'optim.decays': dict(config.optim.decays)}
    for field, names in named.items():
        for name in names:
            there = isinstance(name, str) and any(network.inside(p, (name,)) for p in params)
            if not there:
                layers = ', '.join(shapes['params'])
                raise UserError(f'config.{field}: no layer {name!r}: choose from {layers}')
    return shapes


def _mesh(config, net: Network) -> jax.sharding.Mesh:
    """Returns the mesh; UserError for batches that cannot be divided over it."""
    mesh = meshes.make(
        config.run.mesh,
        towers=net.towers,
        batches={
            'config.train.batch': config.train.batch,
            'config.run.eval_batch': config.run.eval_batch,
        },
    )
    if config.augment.mixup and config.train.batch % (2 * mesh.shape['data']):
        raise UserError(
            f'config.augment.mixup mixes pairs of images: config.train.batch={config.train.batch} must '
            f'be a multiple of {2 * mesh.shape["data"]}, two per device along data'
        )
    return mesh


def _memory(config, mesh: jax.sharding.Mesh, shapes: dict) -> None:
    """Raises UserError if the parameters, their velocity and one batch cannot fit in memory."""
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    batch = max(config.train.batch, config.run.eval_batch) * config.data.size**2
    needed = 2 * 4 * parameters * mesh.shape['data'] + 3 * batch
    there = meshes.memory(mesh)
    if needed > there:
        raise UserError(
            f'{parameters:,} parameters and batches of {batch // config.data.size**2:,} images need at '
            f'least {needed / 1e9:,.1f} GB, and there are {there / 1e9:,.1f} GB; reduce config.model.width '
            'or the layers, or config.train.batch and config.run.eval_batch'
        )


def _start(config, workdir: paths.Path, net: Network, shapes: dict) -> None:
    """Raises UserError if the starting checkpoint is missing, unreadable or from a different network."""
    own = checkpoint.Checkpoints(workdir / 'checkpoints')
    if own.steps():
        own.shapes()
    elif config.train.init_from:
        start = Start.open(config.train.init_from)
        for name, leaf in fingerprint.named_leaves(shapes).items():
            kind, _, layer = name.partition('/')
            if network.in_head(net, tuple(layer.split('/'))):
                continue
            other = start.shapes.get(name)
            if other != leaf.shape:
                called = layer if kind == 'params' else name
                found = 'missing' if other is None else list(other)
                why = f'its {called} is {found}, expected {list(leaf.shape)}'
                if start.model['net'] != config.model.net:
                    why = f'{start.model["net"]} there, config.model.net={config.model.net} here'
                raise UserError(
                    f'config.train.init_from={config.train.init_from}: a run of another network: {why}'
                )


def schedule(
    setup: Setup, workdir: paths.Path, step: int, history: dict[int, float]
) -> tuple[list[str], dict[int, float]]:
    """Checks that a run at `step` could have had the config's schedule from the start.

    Returns the changed fields, as in `directory.differences`, and the history without an evaluation
    that ran only because an earlier schedule ended at `step`. Raises UserError if the rates of a
    completed step would differ.
    """
    config, examples = setup.config, setup.store.counts['train']
    different = directory.differences(config, workdir)
    changed = [text for name, text in different.items() if name in SCHEDULE]
    if not changed:
        return [], history
    there = directory.read_config(workdir)
    before = optim.make_rates(examples=examples, batch=config.train.batch, **there['optim'])
    ends = before(step, history)['stop'] or setup.over(step, history)
    if config.train.recompute and ends:
        raise directory.another(workdir, changed, ', whose statistics are recomputed at its end')
    due = setup.evaluation_due
    if before(step, history)['stop'] and not due(step) and not setup.over(step, history):
        every = there['run']['eval_every']
        if not due(step, every):
            history = {s: error for s, error in history.items() if s != step}
    if config.optim.schedule == 'plateau' and {*history} != {*filter(due, range(step + 1))}:
        why = (
            ', and the evaluations so far, which decide under the plateau rule, were at other steps'
        )
        raise directory.another(workdir, changed, why)
    for s in range(step):
        old, new = before(s, history), setup.rates(s, history)
        if new['stop']:
            raise directory.another(workdir, changed, f', would have ended at step {s:,}')
        for name in old:
            if old[name] != new[name]:
                values = f'{name} {old[name]:.6g} there, {new[name]:.6g} here'
                raise directory.another(
                    workdir,
                    changed,
                    f'; completed steps must keep their rates, which differ from step {s:,} on ({values})',
                )
    return changed, history
