"""Evaluation as in the paper: centre crop, ten crops (§4.1), and ensembles, with exact counts.

    python -m alexnet_jax.evaluate RUN [RUN ...]

prints a table of the top-1 and top-5 errors of every run, and of all of them together.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet_jax import steps
from alexnet_jax.common import paths
from alexnet_jax.common.errors import ArgumentParser, UserError, choose, log_to_stdout, run
from alexnet_jax.devices import allocator, distributed
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.devices.backend import choices
from alexnet_jax.input import prepare
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.input.images import square
from alexnet_jax.input.store import Store
from alexnet_jax.nets import alexnet
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import checkpoint, directory, metrics

Predict = Callable[[jax.Array], jax.Array]  # u8[B,S,S,3] -> probabilities f32[B,K]


def evaluate(
    predicts: Sequence[Predict], mesh: Mesh, store: Store, *, split: str, batch: int, threads: int
) -> dict[str, float]:
    """Sums over a split, every picture once: {'count', 'loss', 'top1', 'top5'}, hits and nats.

    predicts: one function for each member of the ensemble; their probabilities are averaged.
    """
    score = steps.make_score(mesh)
    rows = meshes.rows(mesh, batch)
    # One program at a time where they cannot overlap; elsewhere the next batch is read meanwhile.
    finish = (lambda x: x) if choices(mesh).overlap else jax.block_until_ready
    parts = []
    for local in eval_batches(store, split, batch=batch, rows=rows, threads=threads):
        arrays = meshes.global_batch(mesh, batch, local)
        members = [finish(p(arrays['image'])) for p in predicts]
        probabilities = finish(sum(members) / len(members))
        parts.append(finish(score(probabilities, arrays['label'], arrays['mask'])))
        if len(parts) > 1:  # never more than two batches in flight
            jax.block_until_ready(parts[-2])
    parts = jax.device_get(parts)
    sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
    if sums['count'] != store.counts[split]:
        raise AssertionError(f'{sums["count"]:g} pictures counted, {store.counts[split]} are there')
    return sums


class Run(NamedTuple):
    """A trained network, read back from its run directory."""

    path: paths.Path
    config: dict
    net: alexnet.AlexNet
    step: int
    params: dict
    facts: directory.Facts


def open_run(path: str | os.PathLike, mesh: Mesh, step: str | int = 'latest') -> Run:
    """Reads a run's parameters onto a mesh. step: 'best', 'latest' or a number.

    Raises UserError for what is not a run directory and for missing or damaged checkpoints.
    """
    path = paths.path(path)
    config, facts = directory.read_config(path), directory.read_facts(path)
    net = build(classes=len(facts.names), **config['model'])
    shapes = jax.eval_shape(lambda: alexnet.init(net, 0, config['augment']['crop']))
    shardings = meshes.shardings(mesh, alexnet.param_specs(shapes, mesh.shape['model']))
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    checkpoints = checkpoint.Checkpoints(path / 'checkpoints')
    wanted = {'best': checkpoints.best_step(), 'latest': None}.get(step, step)
    if step == 'best' and wanted is None:
        raise UserError(f'{path}: no evaluated checkpoint here to be the best; use latest')
    found, params, _ = checkpoints.restore_params(target, wanted)
    return Run(path, config, net, found, params, facts)


def open_store(runs: Sequence[Run], store: str = '') -> Store:
    """The prepared pictures of some runs; store: where they are, if not where the first run had them.

    Raises UserError if these are others than a run was trained on, of other classes or sizes.
    """
    first = runs[0]
    if any(r.facts.names != first.facts.names for r in runs):
        raise UserError('these runs were trained on different classes: no common table')
    data_config = {**first.config['data'], 'store': store or first.config['data']['store']}
    opened = prepare.ensure(**data_config, alone=jax.process_count() == 1)
    if opened.names != first.facts.names:
        raise UserError(
            f'{opened.path} has other classes than {first.path} was trained on; '
            'give the store of its classes, --store=DIR'
        )
    for r in runs:
        if r.facts.mean.shape[0] != opened.size:
            raise UserError(
                f'{r.path}: trained on {r.facts.mean.shape[0]}-pixel pictures, and '
                f'{opened.path} has {opened.size}'
            )
    if not store:  # others, of the same classes, only where they are asked for
        directory.check_store(first.path, opened)
    return opened


def predictor(trained: Run, mesh: Mesh, views: str) -> Predict:
    """predict(images u8[B,S,S,3]) -> probabilities f32[B,K], averaged over the views."""
    crop = trained.config['augment']['crop']
    predict = steps.make_predict(trained.net, mesh, mean=trained.facts.mean, views=views, crop=crop)
    return lambda images: predict(trained.params, images)


class Classifier:
    """What `alexnet_jax.load` returns: pictures -> probabilities, with `names`, one per class.

    `run` is the opened run, `size` the side of the square that is cut from a picture, in pixels.
    """

    def __init__(self, run_dir: str | os.PathLike, views: str, step: str | int):
        self._mesh = meshes.make((1, 1), towers=1, batches={})
        self.run = open_run(run_dir, self._mesh, step)
        self.names = self.run.facts.names
        self.step = self.run.step
        self.size = self.run.facts.mean.shape[0]
        self._predict = predictor(self.run, self._mesh, views)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures u8[H,W,3] of any sizes (or u8[B,H,W,3]) -> probabilities f32[B,K]."""
        squares = [square(image, self.size) for image in images]
        return np.asarray(self._predict(np.stack(squares)))


def load(run_dir: str | os.PathLike, views: str = 'ten', step: str | int = 'latest') -> Classifier:
    """A trained network as a function from uint8 pictures to probabilities, with class names.

    views: 'ten' crops or only the 'centre' one; step: 'best', 'latest' or a number. Raises
    UserError for what is not a run directory and for missing or damaged checkpoints.
    """
    choose('views', views, steps.VIEWS)
    return Classifier(run_dir, views, step)


def compare(
    run_dirs: Sequence[str | os.PathLike],
    *,
    views: Sequence[str] = ('centre', 'ten'),
    split: str = 'val',
    step: str | int = 'latest',
    store: str = '',
    batch: int = 100,
    threads: int = 0,
) -> dict[tuple[str, str], dict[str, float]]:
    """Sums by (name, view) for each run, and for all together where there are several ('N CNNs').

    store: where the prepared pictures are, if not where the first run had them. Raises UserError
    for what is not a run directory, for damaged checkpoints, and for runs on different classes.
    """
    configs = [directory.read_config(path) for path in run_dirs]
    towers = {config['model']['towers'] for config in configs}
    shape = (0, 0) if len(towers) == 1 else (0, 1)
    mesh = meshes.make(shape, towers=min(towers), batches={'--batch': batch})
    runs = [open_run(path, mesh, step) for path in run_dirs]
    # a training may save meanwhile
    distributed.agree({f'the step of {r.path}': r.step for r in runs})
    opened = open_store(runs, store)
    results = {}
    for view in views:
        predicts = [predictor(r, mesh, view) for r in runs]
        members = [
            (f'{r.path} (step {r.step:,})', [p]) for r, p in zip(runs, predicts, strict=True)
        ]
        if len(runs) > 1:
            members.append((f'{len(runs)} CNNs', predicts))
        for name, ensemble in members:
            results[name, view] = evaluate(
                ensemble, mesh, opened, split=split, batch=batch, threads=threads
            )
    return results


def table(results: dict[tuple[str, str], dict[str, float]]) -> str:
    """What `compare` returns, like the paper's tables 1 and 2."""
    width = max(len('Model'), *(len(name) for name, _ in results))
    lines = [f'{"Model":{width}}  Crops   Top-1    Top-5  Pictures']
    for (name, view), sums in results.items():
        e = metrics.errors(sums)
        crops = {'centre': 1, 'ten': 10}[view]
        lines.append(
            f'{name:{width}}  {crops:5}  {e["top1_error"]:5.2f} %  {e["top5_error"]:5.2f} %  '
            f'{sums["count"]:8,.0f}'
        )
    return '\n'.join(lines)


def main() -> None:
    parser = ArgumentParser(
        prog='python -m alexnet_jax.evaluate',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run directories')
    parser.add_argument('--split', default='val', choices=('val', 'train'))
    parser.add_argument('--views', default='both', choices=('both', *steps.VIEWS))
    parser.add_argument('--step', default='latest', help="'best', 'latest' or a number")
    parser.add_argument('--store', default='', help='the prepared pictures, if not where they were')
    parser.add_argument('--batch', type=int, default=100, help='images a step')
    parser.add_argument('--threads', type=int, default=0, help='for reading; 0: one per core')
    parser.add_argument('--cpu_devices', type=int, default=0, help='make N virtual CPU devices')
    parser.add_argument(
        '--coordinator', default='', help='several processes: HOST:PORT of number 0'
    )
    parser.add_argument('--num_processes', type=int, default=0, help='how many there are')
    parser.add_argument('--process_id', type=int, default=-1, help='the number of this one, from 0')
    parser.add_argument('--distributed', action='store_true', help='all three from SLURM, TPU pods')
    parser.add_argument('--connect_timeout', type=int, default=120, help='seconds to wait for all')
    args = parser.parse_args()
    log_to_stdout()
    if args.threads < 0 or args.cpu_devices < 0:
        raise UserError('--threads and --cpu_devices must not be below 0')
    allocator.keep_memory()
    meshes.configure(args.cpu_devices)
    distributed.start(
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.distributed,
        timeout=args.connect_timeout,
    )
    with distributed.together():
        distributed.agree(
            {name: value for name, value in vars(args).items() if name != 'process_id'}
        )
        results = compare(
            args.runs,
            views=tuple(steps.VIEWS) if args.views == 'both' else (args.views,),
            split=args.split,
            step=int(args.step) if args.step.isdigit() else args.step,
            store=args.store,
            batch=args.batch,
            threads=args.threads,
        )
        if distributed.is_first():
            print(table(results))


if __name__ == '__main__':
    run(main)
