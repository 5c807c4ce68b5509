"""Tests the statistics of the tables against independent computations."""

import math
import sys

import numpy as np
import pytest
from scipy import stats

from alexnet_jax.common.errors import UserError
from experiments import statistics


@pytest.mark.parametrize('seeds', [2, 3, 10])
def test_paired_differences_against_scipy(seeds):
    rng = np.random.default_rng(seeds)
    own, reference = rng.normal(1, 1, seeds), rng.normal(0, 1, seeds)
    found = statistics.paired(own - reference)
    theirs = stats.ttest_rel(own, reference)
    low, high = theirs.confidence_interval(0.95)
    assert found[:4] == pytest.approx((np.mean(own - reference), low, high, theirs.pvalue))


def test_paired_differences_without_spread_or_pairs():
    assert statistics.paired([3.0]) == (3.0, -math.inf, math.inf, 1.0, '')
    for value, seeds in ((1.0, 2), (0.0, 2), (0.2, 3)):  # the variance of three 0.2 is 1e-33
        found = statistics.paired([value] * seeds)
        assert found == (pytest.approx(value), -math.inf, math.inf, 1.0, 'no spread')
        assert statistics.interval(found) == f'{value:+.2f} (no spread)'
    rounded = statistics.paired([52.3 - 52.1, 40.4 - 40.2, 17.5 - 17.3])
    assert rounded.note and rounded.p == 1.0
    little = statistics.paired([1.0, 1.0001])
    assert not little.note and 0 < little.p < 0.05 and little.low < 1 < little.high


def test_welch_against_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, 12), rng.normal(0.5, 3, 7)
    found = statistics.welch(first, second)
    theirs = stats.ttest_ind(second, first, equal_var=False)
    low, high = theirs.confidence_interval(0.95)
    assert found[:4] == pytest.approx((second.mean() - first.mean(), low, high, theirs.pvalue))
    no_spread = (1.0, -math.inf, math.inf, 1.0, 'no spread')
    assert statistics.welch([1.0, 1.0], [2.0, 2.0]) == no_spread
    assert statistics.welch([1.0], [2.0, 3.0]) == (1.5, -math.inf, math.inf, 1.0, '')


def test_the_ratio_of_pairs():
    many, few = np.array([49.1, 46.1, 48.9]), np.array([7.1, 7.3, 7.1])
    theirs = stats.ttest_rel(np.log(many), np.log(few)).confidence_interval(0.95)
    expected = (stats.gmean(many / few), *np.exp(theirs))
    assert statistics.ratio(many, few) == pytest.approx(expected)
    assert statistics.ratio([6.0], [2.0]) == (pytest.approx(3.0), 0.0, math.inf)
    assert statistics.ratio([6.0, 3.0], [2.0, 1.0]) == (pytest.approx(3.0), 0.0, math.inf)


def test_holm_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which is below its predecessor.
    p = {'a': 0.01, 'b': 0.04, 'c': 0.03, 'd': 0.005}
    expected = {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': 0.02}
    assert statistics.holm(p) == pytest.approx(expected)
    assert [*statistics.holm(p)] == [*p]
    assert statistics.holm({'a': 0.6, 'b': 0.7}) == {'a': 1.0, 'b': 1.0}
    assert statistics.holm({}) == {}


def test_holm_rejects_as_its_steps_do():
    """Matches Holm's step-down procedure; one family in twenty has a rejection by chance."""
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(4000, 6))
    wrong = 0
    for values in families:
        rejected = set()
        for rank, i in enumerate(np.argsort(values)):
            if values[i] * (6 - rank) >= 0.05:
                break
            rejected.add(int(i))
        found = statistics.holm(dict(enumerate(values.tolist())))
        assert {i for i, p in found.items() if p < statistics.LEVEL} == rejected
        wrong += bool(rejected)
    assert wrong / len(families) == pytest.approx(0.05, abs=0.01)


def test_verdicts():
    assert statistics.verdict(1.0, 0.049) == 'worse' and statistics.verdict(-1.0, 0.0) == 'better'
    assert statistics.verdict(1.0, 0.05) == ''
    assert statistics.verdict(-1.0, 0.01, ('up', 'down')) == 'down'


def correlated(seeds, pictures):
    """Returns hits of two networks over some seeds; largely the same images are hard for both."""
    rng = np.random.default_rng(1)
    hard = rng.normal(size=pictures)
    own, reference = (rng.normal(more, 0.3, (seeds, pictures)) > hard for more in (0.0, 0.2))
    return own, reference


@pytest.mark.parametrize(('seeds', 'pictures'), [(1, 300), (3, 200)])
def test_the_bootstrap_against_brute_force(seeds, pictures):
    own, reference = correlated(seeds, pictures)
    rng = np.random.default_rng(2)
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(pictures, size=pictures)
        errors = [100 * (1 - hits[:, chosen].mean()) for hits in (own, reference)]
        drawn.append(errors[0] - errors[1])
    expected = np.percentile(drawn, [2.5, 97.5])
    found = statistics.bootstrap(own, reference)
    np.testing.assert_allclose(found, expected, atol=0.06 * np.ptp(expected))
    # Without paired images the interval is wider.
    unpaired = statistics.bootstrap(own, reference[:, ::-1])
    assert np.ptp(unpaired) > 1.1 * np.ptp(found)


def test_the_bootstrap_of_large_splits_and_of_nothing():
    """The interval is as wide as expected for 50,000 images, and exactly 0 if no image changed."""
    own, reference = correlated(2, 50_000)
    each = 100 * (reference.mean(0) - own.mean(0))
    error = each.std() / 50_000**0.5
    expected = each.mean() + np.array([-1.96, 1.96]) * error
    np.testing.assert_allclose(statistics.bootstrap(own, reference), expected, atol=0.15 * error)
    assert statistics.bootstrap(own, own) == (0.0, 0.0)


@pytest.mark.parametrize('count', [1, 8, 13])
def test_hits_as_text(count):
    hits = np.random.default_rng(count).random(count) < 0.5
    text = statistics.pack(hits)
    assert isinstance(text, str)
    np.testing.assert_array_equal(statistics.unpack(text, count), hits)
    assert statistics.unpack(text, count).dtype == bool


def test_over_pictures_takes_the_seeds_that_both_have():
    own, reference = correlated(4, 100)

    def rows(hits, *, without=(), diverged=()):
        return [
            {
                'seed': seed,
                'diverged': seed in diverged,
                'hits': statistics.pack(one),
                'data': {'counts': {'val': 100}},
            }
            for seed, one in enumerate(hits)
            if seed not in without
        ]

    low, high = statistics.bootstrap(own[[0, 2]], reference[[0, 2]])
    found = statistics.over_pictures(rows(own, without=[3]), rows(reference, diverged=[1]))
    assert found == f'{low:+.2f} to {high:+.2f}'
    old = [{**row, 'hits': None} for row in rows(own)]
    assert statistics.over_pictures(old, rows(reference)) == '—'
    assert statistics.over_pictures(rows(own), [{'seed': 0, 'diverged': False}]) == '—'
    assert statistics.over_pictures([], rows(reference)) == '—'


def test_numbers_as_text():
    assert (
        statistics.interval(statistics.Difference(1.5, -0.25, 3.25, 0.1))
        == '+1.50 (-0.25 to +3.25)'
    )
    assert statistics.interval(statistics.paired([1.5])) == '+1.50'
    assert statistics.between(5.84, 7.66, 1, '-') == '5.8 to 7.7'
    assert (
        statistics.mean_std([1.0, 2.0, 3.0]) == '2.0 ± 1.0' and statistics.mean_std([1.0]) == '1.0'
    )
    words = statistics.family(1, 'the error')
    assert words.startswith('Family of tests: the error, 1 test. ') and 'Holm' in words


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    with pytest.raises(UserError, match='need scipy.*: pip install -r requirements-dev.txt'):
        statistics.paired([1.0, 2.0])


def test_a_power_law():
    """By hand: the logarithms of y, in units of ln 2, are 0, 2, 1 at 0, 1, 2: slope 1/2, error 3^.5 / 2."""
    (k, low, high), (at, least, most) = statistics.power_law([1, 2, 4], [1, 4, 2], 2)
    t = 12.7062  # one degree of freedom
    assert (k, at) == pytest.approx((0.5, 2.0))
    assert (low, high) == pytest.approx((0.5 - t * 0.75**0.5, 0.5 + t * 0.75**0.5), rel=1e-4)
    # At the mean the error is (1.5 / 3)^.5
    assert (math.log2(least), math.log2(most)) == pytest.approx(
        (1 - t * 0.5**0.5, 1 + t * 0.5**0.5), rel=1e-4
    )
