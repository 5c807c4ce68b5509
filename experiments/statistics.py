"""Statistics for the tables: paired differences, Holm's correction, and uncertainty over images.

The tests of one table form a family, which the table names. Their p values are corrected with Holm's method;
a table gives a verdict only if the corrected p value is below LEVEL. The 95% intervals are not corrected.
Intervals and p values over seeds use Student's t on pairs with the same seed. They hold the validation
images fixed; `bootstrap` holds the networks fixed and resamples the images.

Holm's method does not assume independent tests; ours share the reference. Needs scipy (requirements-dev.txt).
"""

import base64
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError

LEVEL = 0.05
NO_SPREAD = 'no spread'
EQUAL = 1e-9  # relative spread below which values differ only by rounding
CONFIDENCE = 0.95
DRAWS = 10_000  # bootstrap samples


class Difference(NamedTuple):
    """A mean difference, its 95% interval (low, high), and the two-sided p value of no difference.

    A single value, or values without spread, say nothing about the error: the interval is infinite and p is
    1. In the second case `note` says so.
    """

    mean: float
    low: float
    high: float
    p: float
    note: str = ''


def by_seed(own: dict[int, float], reference: dict[int, float]) -> list[float]:
    """Returns the differences own - reference of the seeds that both have, in the order of the seeds."""
    return [own[seed] - reference[seed] for seed in sorted(own) if seed in reference]


def paired(values: Sequence[float]) -> Difference:
    """Returns the mean of paired differences, one per seed, with Student's t."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, -math.inf, math.inf, 1.0)
    if _equal(values):
        return Difference(mean, -math.inf, math.inf, 1.0, NO_SPREAD)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return _student(mean, error, len(values) - 1)


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Returns the mean of `second` minus that of `first`, two independent samples, with Welch's t."""
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    mean = float(second.mean() - first.mean())
    if min(len(first), len(second)) < 2:
        return Difference(mean, -math.inf, math.inf, 1.0)
    if _equal(first) and _equal(second):
        return Difference(mean, -math.inf, math.inf, 1.0, NO_SPREAD)
    parts = [x.var(ddof=1) / len(x) for x in (first, second)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (first, second), strict=True)
    )
    return _student(mean, float(sum(parts)) ** 0.5, freedom)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Returns (ratio, low, high): the geometric mean of paired ratios, with its 95% interval.

    The interval is Student's t on the logarithms; (0, infinity) for a single pair and for equal ratios.
    """
    logs = paired(np.log(np.asarray(numerators, float) / np.asarray(denominators, float)))
    return math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high)


def power_law(
    x: Sequence[float], y: Sequence[float], at: float
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Fits y = c x^k, least squares of the logarithms -> k and the law's y at x = `at`.

    Each is (value, low, high), with the 95% interval of Student's t on the residuals, which holds only if
    the law does. Needs three points and two distinct x.
    """
    logs = np.log(np.asarray(x, float) / at), np.log(np.asarray(y, float))
    values, covariance = np.polyfit(*logs, 1, cov=True)
    t = scipy('stats').t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)
    halves = t * np.sqrt(np.diag(covariance))
    k, value = np.stack([values, values - halves, values + halves], axis=1)
    return tuple(map(float, k)), tuple(map(float, np.exp(value)))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Returns the p values of a family, corrected by Holm (1979); tests below LEVEL survive."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def verdict(mean: float, corrected: float, words: tuple[str, str] = ('worse', 'better')) -> str:
    """Returns the word for a positive or negative mean that survives Holm's correction, else ''."""
    return words[mean < 0] if corrected < LEVEL else ''


def bootstrap(own: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95% interval over images of `own` minus `reference`, top-1 error in points.

    own, reference: bool[seeds, images], which images were classified correctly, for the same seeds. The
    images are drawn DRAWS times with replacement, the same ones for both. Each image contributes its
    difference summed over the seeds. That sum takes few distinct values, so each draw only counts how often
    each value occurs.
    """
    misses = np.asarray(reference, np.int64).sum(0) - np.asarray(own, np.int64).sum(0)
    values, counts = np.unique(misses, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(misses), counts / len(misses), size=DRAWS)
    means = 100 * (drawn @ values) / (len(misses) * len(own))
    edge = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [edge, 100 - edge])
    return float(low), float(high)


def pack(hits: np.ndarray) -> str:
    """Encodes bool[N] as text: np.packbits, in base64."""
    return base64.b64encode(np.packbits(np.asarray(hits, bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """Inverts `pack` -> bool[count]."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def over_pictures(own: list[dict], reference: list[dict]) -> str:
    """Formats the `bootstrap` interval of two lists of results, over the seeds that both have.

    '—' if a result lacks 'hits', which images were classified correctly.
    """
    both = [
        {result['seed']: result for result in results if not result['diverged']}
        for results in (own, reference)
    ]
    seeds = sorted({*both[0]} & {*both[1]})
    pairs = [[of_seed[seed] for seed in seeds] for of_seed in both]
    if not seeds or not all(result.get('hits') for results in pairs for result in results):
        return '—'
    hits = [
        np.stack([unpack(r['hits'], r['data']['counts']['val']) for r in results])
        for results in pairs
    ]
    return between(*bootstrap(*hits), 2)


def between(low: float, high: float, digits: int, sign: str = '+') -> str:
    """Formats '+0.12 to +3.40'; sign='-' for numbers that are not differences."""
    return f'{low:{sign}.{digits}f} to {high:{sign}.{digits}f}'


def interval(difference: Difference, digits: int = 2) -> str:
    """Formats '+2.40 (-2.16 to +6.96)', a mean and its 95% interval.

    Only the mean for a single pair; '+2.40 (no spread)' for values without spread.
    """
    mean = f'{difference.mean:+.{digits}f}'
    if math.isinf(difference.low):
        return f'{mean} ({difference.note})' if difference.note else mean
    return f'{mean} ({between(difference.low, difference.high, digits)})'


def family(tests: int, of: str, by: str = "Student's t on pairs with the same seed") -> str:
    """Describes a table's family of tests."""
    return (
        f"Family of tests: {of}, {tests} test{'s' * (tests != 1)}. p: two-sided, {by}, corrected with Holm's "
        f'method over the family; verdicts require p < {LEVEL:g}. In parentheses: 95% intervals, not '
        'corrected.'
    )


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """Formats mean ± sample standard deviation, with `digits` decimals."""
    deviation = f' ± {spread(values):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{deviation}'


def spread(values: Sequence[float]) -> float:
    """Returns the sample standard deviation; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _equal(values: np.ndarray) -> bool:
    """Returns whether values differ only by rounding."""
    return bool(np.ptp(values) <= EQUAL * np.abs(values).max())


def _student(mean: float, error: float, freedom: float) -> Difference:
    t = scipy('stats').t
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, freedom)))


def scipy(module: str) -> ModuleType:
    """Imports a module of scipy, which takes a second; UserError if scipy is not installed."""
    try:
        return importlib.import_module(f'scipy.{module}')
    except ImportError:
        raise UserError(
            'the experiment tables need scipy, which is not installed: '
            'pip install -r requirements-dev.txt -c constraints.txt'
        ) from None
