"""Metrics: named sums over images, computed on the device, and the values computed from them.

To add a metric, add its sum to `count`, its value to `values` and its name to `TEXT`; the log,
metrics.jsonl, checkpoints and the table of `evaluate` then include it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TEXT = {  # name of a value: (text in the log, column heading in the table of `evaluate`)
    'loss': ('loss {:.4f}', ''),
    'top1_error': ('top-1 error {:.2f}%', 'Top-1'),
    'top5_error': ('top-5 error {:.2f}%', 'Top-5'),
    'class_error': ('mean per-class error {:.2f}%', 'Per-class'),
}
# Of the errors shown beside the main ones: those of the moving average, or of the last parameters.
PREFIXES = ('ema_', 'last_')


def rank(scores, labels) -> jax.Array:
    """Counts the other classes that score at least as high as the true one: [B,K], i32[B] -> i32[B].

    Ties count against the network, and NaN is never in the top k, for any k.
    """
    true = jnp.take_along_axis(scores, labels[:, None], axis=1)
    ranks = jnp.sum(~(scores < true), axis=1) - 1
    return jnp.where(jnp.isnan(true[:, 0]), jnp.iinfo(ranks.dtype).max, ranks)


def guess(scores, labels) -> jax.Array:
    """Returns the predicted classes i32[B], which are right where `rank` is 0 and nowhere else."""
    true = jax.nn.one_hot(labels, scores.shape[1], dtype=bool)
    best = jnp.argmax(jnp.where(true, -jnp.inf, scores), axis=1)
    return jnp.where(rank(scores, labels) < 1, labels, best.astype(labels.dtype))


def count(scores, losses, labels, mask, *, by_class: bool = False) -> dict[str, jax.Array]:
    """Returns sums over the images whose mask f32[B] is 1.

    scores [B,K] (logits in training, averaged probabilities in evaluation), losses f32[B] (nats),
    labels i32[B] -> count, loss, top1 and top5 (hits), f32[]; by_class (in evaluation): also
    class_count and class_top1, f32[K].
    """
    ranks = rank(scores, labels)
    sums = {
        'count': jnp.sum(mask),
        'loss': jnp.sum(jnp.where(mask > 0, losses, 0.0)),
        'top1': jnp.sum((ranks < 1) * mask),
        'top5': jnp.sum((ranks < 5) * mask),
    }
    if by_class:
        member = jax.nn.one_hot(labels, scores.shape[1]) * mask[:, None]
        sums['class_count'] = jnp.sum(member, axis=0)
        sums['class_top1'] = jnp.sum(member * (ranks < 1)[:, None], axis=0)
    return sums


def values(sums: dict[str, Any]) -> dict[str, float]:
    """Returns the values in `TEXT` of sums over examples: mean loss in nats, errors in percent.

    'class_error', the mean of the per-class top-1 errors, requires sums by class. Raises ValueError
    for a count of 0.
    """
    total = float(sums['count'])
    if total <= 0:
        raise ValueError(f'cannot compute errors over {total:g} examples')
    # Count misses first, in 64 bits: 100 * (1 - hits / count) would round twice more.
    found = {
        'loss': float(sums['loss']) / total,
        'top1_error': 100 * (total - float(sums['top1'])) / total,
        'top5_error': 100 * (total - float(sums['top5'])) / total,
    }
    if 'class_count' in sums:
        found['class_error'] = float(np.nanmean(class_errors(sums)))
    return found


def class_errors(sums: dict[str, Any]) -> np.ndarray:
    """Returns each class's top-1 error in percent, f64[K]; NaN for classes without images."""
    total, hits = (np.asarray(sums[name], np.float64) for name in ('class_count', 'class_top1'))
    return 100 * np.divide(total - hits, total, out=np.full_like(total, np.nan), where=total > 0)


def shown(classes: int) -> list[str]:
    """Returns the names of the values to print: no top-5 error for at most five classes, where it is 0."""
    return [name for name in TEXT if name != 'top5_error' or classes > 5]


def line(values: dict[str, float], classes: int) -> str:
    """Formats values for one line of the log; in brackets, those of the network that `PREFIXES` names."""

    def those(prefix):
        known = {name: f'{prefix}{name}' for name in shown(classes)}
        return '  '.join(
            TEXT[name][0].format(values[key]) for name, key in known.items() if key in values
        )

    others = [f'({prefix[:-1]}: {text})' for prefix in PREFIXES if (text := those(prefix))]
    return '  '.join([those(''), *others])
