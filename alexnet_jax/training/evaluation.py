"""Evaluation as in the paper: center crop, ten crops (§4.1), and ensembles, with exact counts."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import printable
from alexnet_jax.devices import distributed
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.devices.backend import choices
from alexnet_jax.input.batches import eval_batches
from alexnet_jax.input.store import Store
from alexnet_jax.nets.build import build
from alexnet_jax.training import metrics, steps
from alexnet_jax.training.inference import (
    Predict,
    describe_run,
    open_store,
    predictor,
    restore_run,
)


def evaluate(
    predicts: Sequence[Predict],
    mesh: Mesh,
    store: Store,
    *,
    split: str,
    batch: int,
    threads: int,
    confusion: bool = False,
) -> dict:
    """Returns the sums of `metrics.count`, also by class, over a split, each image counted once.

    predicts: one function per member of the ensemble; their probabilities are averaged.
    confusion: adds 'confusion' i64[K,K], how many images of class i were classified as class j.
    """
    score, labels = steps.make_score(mesh), store.labels(split)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def guess(probabilities, labels, mask):
        return metrics.guess(probabilities, labels)

    def both(*of_batch):
        return score(*of_batch), guess(*of_batch) if confusion else ()

    parts = _of_batches(both, predicts, mesh, store, split=split, batch=batch, threads=threads)
    sums = jax.tree.map(
        lambda *x: np.sum(x, axis=0, dtype=np.float64), *(counted for counted, _ in parts)
    )
    if sums['count'] != len(labels):
        raise AssertionError(f'counted {sums["count"]:g} images, not {len(labels)}')
    if confusion:
        taken = np.concatenate([guessed for _, guessed in parts])[: len(labels)]
        pairs = np.int64(store.classes) * labels + taken
        counts = np.bincount(pairs, minlength=store.classes**2)
        sums['confusion'] = counts.reshape(store.classes, store.classes)
    return sums


def _of_batches(
    function: Callable,
    predicts: Sequence[Predict],
    mesh: Mesh,
    store: Store,
    *,
    split: str,
    batch: int,
    threads: int,
) -> list:
    """Returns function(averaged probabilities, labels, mask) of each batch of a split, on the host."""
    rows = meshes.rows(mesh, batch)
    # One program at a time if they cannot overlap; otherwise, read the next batch in the meantime.
    finish = (lambda x: x) if choices(mesh).overlap else jax.block_until_ready
    parts = []
    for local in eval_batches(store, split, batch=batch, rows=rows, threads=threads):
        arrays = meshes.global_batch(mesh, batch, local)
        members = [finish(p(arrays['image'])) for p in predicts]
        probabilities = finish(sum(members) / len(members))
        parts.append(finish(function(probabilities, arrays['label'], arrays['mask'])))
        if len(parts) > 1:  # never more than two batches in flight
            jax.block_until_ready(parts[-2])
    return jax.device_get(parts)


@meshes.settings()
def compare(
    run_dirs: Sequence[str | os.PathLike],
    *,
    views: Sequence[str] = ('center', 'ten'),
    split: str = 'val',
    step: str | int = 'latest',
    store: str = '',
    batch: int = 100,
    threads: int = 0,
    confusion: bool = False,
    build: Callable = build,
) -> dict[tuple[str, str], dict]:
    """Returns sums by (name, view) for each run, and for several runs also their ensemble ('N CNNs').

    store: the folder of the prepared images, if not that of the first run; confusion: see `evaluate`;
    run_dirs and build: see `inference.describe_run`. Raises UserError for networks that do not exist, for
    damaged checkpoints, for runs on different classes, and for a split that the store does not have.
    """
    runs = [describe_run(path, build) for path in run_dirs]
    towers = {run.net.towers for run in runs}
    shape = (0, 0) if len(towers) == 1 else (0, 1)
    mesh = meshes.make(shape, towers=min(towers), batches={'--batch': batch})
    opened = open_store(runs, store)
    opened.check_split(split)
    runs = [restore_run(run, mesh, step) for run in runs]
    # A training run may have saved a checkpoint in the meantime.
    distributed.agree({f'the step of {r.path}': r.step for r in runs})
    results = {}
    for view in views:
        predicts = [predictor(r, mesh, view) for r in runs]
        members = [(r.title, [p]) for r, p in zip(runs, predicts, strict=True)]
        if len(runs) > 1:
            members.append((f'{len(runs)} CNNs', predicts))
        for name, ensemble in members:
            results[name, view] = evaluate(
                ensemble,
                mesh,
                opened,
                split=split,
                batch=batch,
                threads=threads,
                confusion=confusion,
            )
    return results


@meshes.settings()
def hits(run_dir: str | os.PathLike, *, store: str = '', batch: int = 100) -> np.ndarray:
    """Returns whether a run's prediction is right for each validation image, center crop, bool[N].

    Arguments and errors: see `compare`.
    """
    trained = describe_run(run_dir)
    mesh = meshes.make((0, 0), towers=trained.net.towers, batches={'--batch': batch})
    opened = open_store([trained], store)
    trained = restore_run(trained, mesh)
    predict = predictor(trained, mesh, 'center')
    right = jax.jit(
        lambda p, labels, mask: metrics.rank(p, labels) < 1,
        out_shardings=NamedSharding(mesh, P()),
    )
    parts = _of_batches(right, [predict], mesh, opened, split='val', batch=batch, threads=0)
    return np.concatenate(parts)[: opened.counts['val']]


def table(results: dict[tuple[str, str], dict]) -> str:
    """Formats what `compare` returns like the paper's tables 1 and 2."""
    results = {(printable(name), view): sums for (name, view), sums in results.items()}
    width = max(len('Model'), *(len(name) for name, _ in results))
    classes = max(len(sums['class_count']) for sums in results.values())
    columns = {name: head for name in metrics.shown(classes) if (head := metrics.TEXT[name][1])}
    heads = '  '.join(f'{head:>{max(7, len(head))}}' for head in columns.values())
    lines = ['Errors:', f'{"Model":{width}}  Crops  {heads}    Images']
    for (name, view), sums in results.items():
        found = metrics.values(sums)
        crops = {'center': 1, 'ten': 10}[view]
        errors = '  '.join(
            f'{found[column]:{max(7, len(head)) - 1}.2f}%' for column, head in columns.items()
        )
        lines.append(f'{name:{width}}  {crops:5}  {errors}  {sums["count"]:8,.0f}')
    return '\n'.join(lines)


def class_table(results: dict[tuple[str, str], dict], names: Sequence[str]) -> str:
    """Formats each class's top-1 error in percent, one column per result, and its image count."""
    sums = list(results.values())
    errors = [metrics.class_errors(one) for one in sums]
    width = max(len('Class'), *map(len, names))
    heads = '  '.join(f'{i:>7}' for i in range(1, len(sums) + 1))
    lines = [f'({i}) {printable(name)}, {view}' for i, (name, view) in enumerate(results, start=1)]
    lines += ['Top-1 errors:', f'{"Class":{width}}  {heads}    Images']
    for k, name in enumerate(names):
        row = '  '.join(
            f'{"–":>7}' if np.isnan(error[k]) else f'{error[k]:6.1f}%' for error in errors
        )
        lines.append(f'{name:{width}}  {row}  {sums[0]["class_count"][k]:8,.0f}')
    return '\n'.join(lines)
