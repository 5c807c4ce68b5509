"""Compression of a trained network: pruning with retraining, shared weights, Huffman coding.

Han, Mao, Dally 2015, "Deep Compression" (arXiv:1510.00149); `weights.compressed` writes the result. Only
kernels (`Network.role`) are compressed; everything else stays float32, except for the mean image, which is
rounded to whole levels.
"""

import dataclasses
import json
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.store import Store
from alexnet_jax.nets.network import Network, names_of
from alexnet_jax.rundir import fingerprint
from alexnet_jax.training import inference, metrics, optim, steps
from alexnet_jax.training.inference import Run
from alexnet_jax.training.setup import Setup, unfolded
from alexnet_jax.weights import compressed
from alexnet_jax.weights import variables as trees

log = logging.getLogger(__name__)
KINDS = ('conv', 'fc')
MOST_ITERATIONS = 1000
PAPER = {  # Table 4: % kept, bits, bits after Huffman coding, of an index, % of the size: P+Q, P+Q+H
    'conv1': (84, 8, 6.3, 1.2, 32.6, 20.53),
    'conv2': (38, 8, 5.5, 2.3, 14.5, 9.43),
    'conv3': (35, 8, 5.1, 2.6, 13.1, 8.44),
    'conv4': (37, 8, 5.2, 2.5, 14.1, 9.11),
    'conv5': (37, 8, 5.6, 2.5, 14.0, 9.43),
    'fc6': (9, 5, 3.9, 3.2, 3.0, 2.39),
    'fc7': (9, 5, 3.6, 3.7, 3.0, 2.46),
    'fc8': (25, 5, 4.0, 3.2, 7.3, 5.85),
    'all': (11, 5.4, 4.0, 3.2, 3.7, 2.88),
}


class Settings(NamedTuple):
    """By kind of layer: prune, the threshold in standard deviations of the kernel; bits, per weight."""

    prune: dict[str, float]
    bits: dict[str, int]
    rounds: int  # of pruning
    epochs: float  # of retraining in each
    tune: float  # epochs of fine-tuning the shared values
    rate: float  # for retraining, as a fraction of config.optim.rate
    tune_rate: float  # the same, for fine-tuning


DEFAULTS = Settings(
    prune={'conv': 0.9, 'fc': 1.7},
    bits={'conv': 8, 'fc': 5},
    rounds=3,
    epochs=4.0,
    tune=2.0,
    rate=0.1,
    tune_rate=0.001,
)


def compress(run: Run, store: Store, mesh: jax.sharding.Mesh, settings: Settings) -> dict:
    """Returns {'params', 'batch_stats'}, in NumPy, with few distinct values in each kernel.

    run: restored; mesh: with model=1. Retrains with the run's config and mean at a constant rate; the result
    depends on nothing but its arguments. Folded batch normalization first gets the statistics of training
    images. Raises UserError if training diverges.
    """
    net, variables = run.net, jax.device_get(run.variables)
    store = dataclasses.replace(store, mean=run.facts.mean)
    if run.bundle and run.bundle.card.get('folded'):
        config = _config(run.config, settings.epochs, settings.rate)
        variables = unfolded(config, store, net, variables)
    dense, step = kernels(net, variables['params']), 0

    def setup(epochs, rate, wrap):
        return epochs and Setup.make(_config(run.config, epochs, rate), mesh, store, net, wrap)

    retraining = setup(settings.epochs, settings.rate, lambda inner: keep_zeros(net, inner))
    for i in range(settings.rounds):
        part = (i + 1) / settings.rounds
        factors = {name: part * settings.prune[kind(x)] for name, x in dense.items()}
        variables = replaced(variables, pruned(dense, kernels(net, variables['params']), factors))
        left = share_kept(net, variables['params'])
        log.info('round %s of %s: %.1f%% of the weights are left', i + 1, settings.rounds, left)
        variables, step = _train(retraining, variables, step)
    groups, values = {}, {}
    for name, x in kernels(net, variables['params']).items():
        groups[name], values[name] = shared(x, 2 ** settings.bits[kind(x)])
    log.info('shared weights')
    tuning = setup(settings.tune, settings.tune_rate, lambda inner: share(inner, groups))
    variables, _ = _train(tuning, replaced(variables, values), step)
    tuned = kernels(net, variables['params'])
    return replaced(variables, {name: merged(tuned[name], group) for name, group in groups.items()})


def kind(kernel: np.ndarray) -> str:
    """'fc' for [I,O] and [T,I,O], 'conv' for kernels of convolutions and locally connected layers."""
    return 'fc' if kernel.ndim <= 3 else 'conv'


def kernels(net: Network, params: dict) -> dict[str, np.ndarray]:
    """The kernels in `params`, by name, such as 'conv1/kernel'."""
    leaves = fingerprint.named_leaves(params)
    return {name: x for name, x in leaves.items() if net.role(tuple(name.split('/'))) == 'kernel'}


def replaced(variables: dict, values: dict[str, np.ndarray]) -> dict:
    """The variables with other kernels, by name."""
    leaves = fingerprint.named_leaves(variables)
    leaves |= {f'params/{name}': x for name, x in values.items()}
    return trees.nest({tuple(name.split('/')): x for name, x in leaves.items()})


def share_kept(net: Network, params: dict) -> float:
    """Percent of the kernels' weights that are not 0."""
    found = kernels(net, params).values()
    return 100 * sum(int(np.count_nonzero(x)) for x in found) / sum(x.size for x in found)


def pruned(dense: dict, now: dict, factors: dict[str, float]) -> dict[str, np.ndarray]:
    """The kernels `now` with 0 for weights below `factors` standard deviations of those in `dense`."""
    return {
        name: np.where(np.abs(x) < factors[name] * dense[name].std(), np.float32(0), x)
        for name, x in now.items()
    }


def shared(kernel: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the group of each weight, i16, from 1; 0: pruned; the kernel with the mean of each group)."""
    kept = kernel != 0
    centers = k_means(kernel[kept], count)
    nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, kernel)
    groups = np.where(kept, nearest + 1, 0).astype(np.int16)
    return groups, np.concatenate([np.zeros(1, np.float32), centers.astype(np.float32)])[groups]


def k_means(values: np.ndarray, count: int) -> np.ndarray:
    """The centers of at most `count` groups of values f32[N], ascending: f64[K].

    Starts with centers at equal distances, which keep the large weights (§3.2); empty groups are dropped.
    """
    x = np.sort(values.astype(np.float64))
    if not len(x):
        return x
    sums = np.concatenate([[0.0], np.cumsum(x)])
    centers, before = np.linspace(x[0], x[-1], count), None
    for _ in range(MOST_ITERATIONS):
        edges = np.searchsorted(x, (centers[1:] + centers[:-1]) / 2)
        edges = np.concatenate([[0], edges, [len(x)]])
        if before is not None and (edges == before).all():
            break
        sizes = np.diff(edges)
        centers = np.where(sizes, np.diff(sums[edges]) / np.maximum(sizes, 1), centers)
        before = edges
    return centers[sizes > 0]


def merged(kernel: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The kernel with the first value of each group, from which the others can differ by rounding."""
    flat = groups.reshape(-1)
    numbers, first = np.unique(flat, return_index=True)
    table = np.zeros(numbers.max(initial=0) + 1, np.float32)
    table[numbers] = kernel.reshape(-1)[first]
    table[0] = 0
    return table[groups]


def _config(config: dict, epochs: float, rate: float) -> ConfigDict:
    """The run's config with a constant rate, for a number of epochs."""
    changed = ConfigDict(json.loads(json.dumps(config)))
    changes = {
        'optim.rate': config['optim']['rate'] * rate,
        'optim.bias_final': 0.0,
        'optim.schedule': 'steps',
        'optim.drops': (),
        'optim.conv1': (),
        'optim.warmup': 0.0,
        'optim.epochs': epochs,
        'train.ema': 0.0,
        'train.ema_used': False,
        'run.dispatch': 1,
    }
    changed.update_from_flattened_dict(changes)
    return changed


def _train(setup: Setup | None, variables: dict, start: int) -> tuple[dict, int]:
    """Trains for the setup's epochs from step `start` on -> (variables on the host, the step after it)."""
    if not setup:
        return variables, start
    config, mesh = setup.config, setup.mesh
    target = steps.abstract_state(setup.net, setup.optimizer, mesh, config.augment.crop)
    state = steps.TrainState(
        step=jnp.int32(start),
        params=jax.tree.map(jnp.array, variables['params']),
        batch_stats=jax.tree.map(jnp.array, variables['batch_stats']),
        opt_state=setup.optimizer.init(variables['params']),
    )
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, target))
    loss, count = 0.0, 0.0
    for i, local in enumerate(setup.batches(start, start + setup.total)):
        batch = meshes.global_batch(mesh, config.train.batch, local)
        rates = optim.scalars(setup.rates(i, {}))
        state, sums = setup.train_step(state, batch, rates)
        loss, count = loss + float(sums['loss']), count + float(sums['count'])
        if not math.isfinite(loss):
            raise UserError(
                f'the loss is not finite after {i + 1} steps at a rate of {rates["weights"]:.2g}: give '
                'a lower --rate or --tune_rate'
            )
    if config.train.recompute:
        state = setup.recompute(state)
    log.info(
        '  %s steps of training: loss %.4f, validation: %s',
        f'{setup.total:,}',
        loss / count,
        metrics.line(setup.evaluate(state), setup.store.classes),
    )
    return jax.device_get(state.variables), start + setup.total


def keep_zeros(net: Network, inner):
    """Returns an optimizer that keeps kernel weights that are 0, such as pruned ones, at 0."""

    def held(tree, params):
        def hold(path, x, w):
            return jnp.where(w == 0, 0, x) if net.role(names_of(path)) == 'kernel' else x

        return jax.tree.map_with_path(hold, tree, params)

    def update(gradients, state, params, **rates):
        updates, state = inner.update(held(gradients, params), state, params, **rates)
        return held(updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def share(inner, groups: dict[str, np.ndarray]):
    """Returns an optimizer that moves all weights of a group alike, by the sum of their gradients.

    groups: the index of each weight's group, by the parameter's name; 0: pruned. As in Han et al. 2015,
    "Deep Compression" (§3.3). For networks that the mesh does not divide.
    """

    counts = {name: int(group.max(initial=0)) + 1 for name, group in groups.items()}

    def update(gradients, state, params, **rates):
        inner_state, groups = state

        def summed(path, g):
            name = '/'.join(names_of(path))
            if name not in groups:
                return g
            sums = jnp.zeros(counts[name], g.dtype).at[groups[name]].add(g)
            return sums.at[0].set(0)[groups[name]]

        gradients = jax.tree.map_with_path(summed, gradients)
        updates, inner_state = inner.update(gradients, inner_state, params, **rates)
        return updates, (inner_state, groups)

    return optax.GradientTransformationExtraArgs(
        lambda params: (inner.init(params), jax.tree.map(jnp.asarray, groups)), update
    )


def with_variables(run: Run, variables: dict, mesh: jax.sharding.Mesh, mean: np.ndarray) -> Run:
    """A run with other variables and another mean image, f32[S,S,3]."""
    target = steps.abstract_variables(run.net, mesh, run.config['augment']['crop'])
    placed = inference.placed(run.path, variables, target)
    return run._replace(variables=placed, facts=run.facts._replace(mean=mean))


def layers(net: Network, variables: dict) -> list[dict]:
    """Describes each layer in the compressed form, and at the end all of them ('all').

    Keys: layer, weights (of the kernels), kept (%), bits (of a weight's code), huffman (the same after
    Huffman coding), index (bits of the gaps per weight), index_huffman, size (bytes of float32), pq and pqh:
    the size compressed in %, with fixed codes and with Huffman codes. A layer without a shared kernel has
    None for what it lacks.
    """
    arrays = fingerprint.named_leaves(variables)
    coded = compressed.described(compressed.encoded(arrays), '')
    fixed = compressed.described(compressed.encoded(arrays, huffman=False), '')
    by_layer, own = {}, {f'params/{name}' for name in kernels(net, variables['params'])}
    for pair in zip(coded, fixed, strict=True):
        by_layer.setdefault('/'.join(pair[0].name.split('/')[1:-1]), []).append(pair)
    rows = [_row(name, pairs, own) for name, pairs in by_layer.items()]
    return [*rows, _row('all', [*zip(coded, fixed, strict=True)], own)]


def _row(name: str, pairs: list, own: set[str]) -> dict:
    size = 4 * sum(coded.count for coded, _ in pairs)
    row = {'layer': name, 'size': size}
    row |= {'pq': 100 * sum(f.size for _, f in pairs) / size}
    row |= {'pqh': 100 * sum(c.size for c, _ in pairs) / size}
    chosen = [(c, f) for c, f in pairs if c.name in own and c.kind == f.kind == 'shared']
    kept = sum(c.kept for c, _ in chosen)
    every = [c for c, _ in pairs if c.name in own]
    row |= {'weights': sum(c.count for c in every), 'kept': None, 'bits': None}
    if not kept:
        return row
    unshared = sum(c.count for c in every) - sum(c.count for c, _ in chosen)
    return row | {
        'kept': 100 * (kept + unshared) / row['weights'],
        'bits': sum(f.bits for _, f in chosen) / kept,
        'huffman': sum(c.bits for c, _ in chosen) / kept,
        'index': sum(f.gap_bits for _, f in chosen) / kept,
        'index_huffman': sum(c.gap_bits for c, _ in chosen) / kept,
    }


def table(rows: list[dict]) -> str:
    """Formats what `layers` returns, beside the paper's Table 4 for layers with the same names."""
    columns = ('kept', 'bits', 'huffman', 'index_huffman', 'pq', 'pqh')
    theirs = any(row['layer'] in PAPER for row in rows[:-1])
    heads = ('kept %', 'bits', 'Huffman', 'index', 'P+Q %', 'P+Q+H %')
    width = max(len(row['layer']) for row in rows)

    def cells(values):
        return ' '.join(f'{"":8}' if v is None else f'{v:8.4g}' for v in values)

    head = ' '.join(f'{h:>8}' for h in heads)
    lines = [f'{"":{width}} {"weights":>11} {head}' + (f'  | paper: {head}' if theirs else '')]
    for row in rows:
        line = f'{row["layer"]:{width}} {row["weights"]:11,} {cells([row.get(c) for c in columns])}'
        if theirs and row['layer'] in PAPER:
            line += f'  |        {cells(PAPER[row["layer"]])}'
        lines.append(line.rstrip())
    return '\n'.join(lines)
