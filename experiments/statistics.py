"""Statistics of the tables: paired differences, Holm's correction, and the error over pictures.

The tests of one table are one family, and the table states which. Their p values are corrected by Holm
over the family; a table uses a verdict word only where the corrected p value is below LEVEL. Everything else
gets a 95 % interval, which is not corrected. Intervals and p values over seeds are Student's t over pairs
of one seed. They hold the validation pictures fixed; `bootstrap` holds the networks fixed and resamples
the pictures.

Holm needs no independence of the tests: rows share the reference. Needs scipy (requirements-dev.txt).
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
EQUAL = 1e-9  # values that differ by less than this part of the largest differ by rounding
CONFIDENCE = 0.95
DRAWS = 10_000  # of a bootstrap


class Difference(NamedTuple):
    """A mean difference, its 95 % interval (low, high), and the two-sided p value of no difference.

    From a single value, and from values without spread, which say nothing of the error: the interval is
    infinite, and p is 1. `note` says the latter.
    """

    mean: float
    low: float
    high: float
    p: float
    note: str = ''


def paired(values: Sequence[float]) -> Difference:
    """The mean of paired differences, one a seed, by Student's t."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, -math.inf, math.inf, 1.0)
    if _equal(values):
        return Difference(mean, -math.inf, math.inf, 1.0, NO_SPREAD)
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return _student(mean, error, len(values) - 1)


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of `second` minus that of `first`, two independent samples, by Welch's t."""
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
    """(ratio, low, high): the geometric mean of paired ratios, with its 95 % interval.

    Student's t of the logarithms; infinite, and 0, from a single pair and from equal ratios.
    """
    logs = paired(np.log(np.asarray(numerators, float) / np.asarray(denominators, float)))
    return math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high)


def holm(p: dict[str, float]) -> dict[str, float]:
    """The p values of a family, corrected by Holm (1979): a test survives if its own is below LEVEL."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}


def verdict(mean: float, corrected: float, words: tuple[str, str] = ('worse', 'better')) -> str:
    """The word for a positive or a negative mean that survives Holm's correction; '' for others."""
    return words[mean < 0] if corrected < LEVEL else ''


def bootstrap(own: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval over pictures of the top-1 error of `own` minus that of `reference`, in points.

    own, reference: bool[seeds, pictures], which pictures were right, of the same seeds. The pictures
    are drawn DRAWS times with replacement, the same for both. A picture counts by the mean of its
    difference over the seeds, of which there are few values: so draws are of how often each occurs.
    """
    misses = np.asarray(reference, np.int64).sum(0) - np.asarray(own, np.int64).sum(0)
    values, counts = np.unique(misses, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(misses), counts / len(misses), size=DRAWS)
    means = 100 * (drawn @ values) / (len(misses) * len(own))
    edge = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [edge, 100 - edge])
    return float(low), float(high)


def pack(hits: np.ndarray) -> str:
    """bool[N] as text: np.packbits, in base64."""
    return base64.b64encode(np.packbits(np.asarray(hits, bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """What `pack` was given, bool[count]."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def over_pictures(own: list[dict], reference: list[dict]) -> str:
    """`bootstrap` of two lists of results, over the seeds that both have, as text.

    '—' where a result does not hold which pictures were right ('hits').
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
    """'+0.12 to +3.40'; sign='-' for numbers that are no differences."""
    return f'{low:{sign}.{digits}f} to {high:{sign}.{digits}f}'


def interval(difference: Difference, digits: int = 2) -> str:
    """'+2.40 (-2.16 to +6.96)', the mean and its 95 % interval; only the mean of a single pair.

    Of values without spread: '+2.40 (no spread)'.
    """
    mean = f'{difference.mean:+.{digits}f}'
    if math.isinf(difference.low):
        return f'{mean} ({difference.note})' if difference.note else mean
    return f'{mean} ({between(difference.low, difference.high, digits)})'


def family(tests: int, of: str, by: str = "Student's t over pairs of one seed") -> str:
    """What a table says about its family of tests."""
    return (
        f'Family of tests: {of}, {tests} test{"s" * (tests != 1)}. p: two-sided, by {by}, corrected by Holm '
        f'over the family; a verdict only where it is below {LEVEL:g}. In brackets: 95 % intervals, not '
        'corrected.'
    )


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± sample standard deviation, with so many decimals."""
    spread = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{spread}'


def _equal(values: np.ndarray) -> bool:
    """Whether some values differ by no more than rounding."""
    return bool(np.ptp(values) <= EQUAL * np.abs(values).max())


def _student(mean: float, error: float, freedom: float) -> Difference:
    t = scipy('stats').t
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, freedom)))


def scipy(module: str) -> ModuleType:
    """A module of scipy, which takes a second to import; UserError where it is not installed."""
    try:
        return importlib.import_module(f'scipy.{module}')
    except ImportError:
        raise UserError(
            'the tables of experiments need scipy, which is not installed: '
            'pip install -r requirements-dev.txt -c constraints.txt'
        ) from None
