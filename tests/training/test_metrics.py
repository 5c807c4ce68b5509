"""Metrics: what is counted, and the values computed from sums."""

import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.training import metrics

CLASSES = 10
NEVER = np.iinfo(np.int32).max  # a rank that no top-k reaches


def test_rank_counts_ties_and_nan_against_the_network():
    scores = jnp.array(
        [[3.0, 1, 2], [1, 1, 1], [1, 3, 2], [jnp.nan] * 3, [jnp.nan, 2, 1], [2, jnp.nan, 1]]
    )
    labels = jnp.zeros(6, jnp.int32)
    np.testing.assert_array_equal(metrics.rank(scores, labels), [0, 2, 2, NEVER, NEVER, 1])


@pytest.mark.parametrize('value', [0.0, 1.5, np.nan])
def test_equal_or_nan_scores_are_all_wrong(value):
    scores = jnp.full((4, CLASSES), value)
    sums = metrics.count(scores, jnp.zeros(4), jnp.arange(4), jnp.ones(4))
    assert (sums['count'], sums['top1'], sums['top5']) == (4, 0, 0)


def test_masked_rows_count_nothing():
    scores = jnp.eye(4, CLASSES)
    losses = jnp.array([1.0, 2, jnp.nan, 4])
    sums = metrics.count(scores, losses, jnp.arange(4), jnp.array([1.0, 1, 0, 0]))
    assert {k: float(v) for k, v in sums.items()} == {'count': 2, 'loss': 3, 'top1': 2, 'top5': 2}


def test_errors_of_sums():
    sums = {'count': 50000, 'loss': jnp.float32(100000), 'top1': np.int64(29501), 'top5': 40900}
    assert metrics.values(sums) == {'loss': 2.0, 'top1_error': 40.998, 'top5_error': 18.2}
    nothing_right = {'count': 3, 'loss': float('nan'), 'top1': 0, 'top5': 0}
    assert metrics.values(nothing_right)['top1_error'] == 100.0
    with pytest.raises(ValueError, match='0 examples'):
        metrics.values({'count': 0, 'loss': 0, 'top1': 0, 'top5': 0})


def test_the_mean_of_the_classes_own_errors():
    """Class 0: one of two right; class 1: none of one; class 2: no images, only a masked row."""
    scores = jnp.array([[3.0, 1, 0], [0, 1, 0], [3, 1, 0], [0, 1, 9]])
    labels, mask = jnp.array([0, 0, 1, 2]), jnp.array([1.0, 1, 1, 0])
    sums = metrics.count(scores, jnp.zeros(4), labels, mask, by_class=True)
    np.testing.assert_array_equal(sums['class_count'], [2, 1, 0])
    np.testing.assert_array_equal(sums['class_top1'], [1, 0, 0])
    np.testing.assert_array_equal(metrics.class_errors(sums), [50, 100, np.nan])
    assert metrics.values(sums)['class_error'] == 75
    assert metrics.line(metrics.values(sums), 3).endswith('mean per-class error 75.00%')
