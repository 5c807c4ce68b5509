"""Maps each training position to its record, crop, flip and colour draw (`docs/design.md` §4).

With batches of B, row i of step s is position p = s * B + i, a 64-bit number. Everything here is a
pure function of (seed, position): there is no state, so every position costs the same, and nothing
depends on how many devices or processes share the work.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

# One stream of random words for each kind of draw.
CROP, COLOUR, MIXUP = 1, 2, 3


class Draws(NamedTuple):
    """Augmentation of n positions: crop offsets, flips, and standard normals for the colour noise."""

    y: np.ndarray  # i32[n]
    x: np.ndarray  # i32[n]
    flip: np.ndarray  # bool[n]
    z: np.ndarray  # f32[n,3]


def records(seed: int, positions: np.ndarray, num_examples: int) -> np.ndarray:
    """Returns each position's record, i64[n] -> i64[n]; an epoch is a permutation of all records."""
    epochs, places = np.divmod(np.asarray(positions, np.int64), num_examples)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = _permutation(seed, int(epoch), num_examples)[places[here]]
    return result


def draws(seed: int, first: int, count: int, *, room: int, chunk: int = 1) -> Draws:
    """Returns the augmentation of positions first .. first + count - 1.

    Offsets are uniform over 0..room inclusive (room is 32 for crops of 224 from 256), and flips have
    probability 1/2. `chunk` consecutive positions share one offset and one flip: 32 in the 2012
    source code, 1 in the paper (`docs/original.md` §5). `z` is independent for every position.
    """
    groups = np.arange(first, first + count) // chunk
    crop = _words(seed, CROP, int(groups[0]), int(groups[-1] - groups[0]) + 1)[groups - groups[0]]
    # The remainder of a 64-bit word is uniform to 1 part in 10^17.
    y, x = (crop[:, :2] % np.uint64(room + 1)).astype(np.int32).T
    # Box-Muller: four uniforms give four normals; three of them are used.
    u = (_words(seed, COLOUR, first, count) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    radius = np.sqrt(-2 * np.log1p(-u[:, :2]))
    angle = 2 * np.pi * u[:, 2:]
    z = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
    return Draws(y, x, (crop[:, 2] >> np.uint64(63)).astype(bool), z.astype(np.float32))


def shares(seed: int, first: int, count: int, alpha: float) -> np.ndarray:
    """Returns mixup's shares of positions first .. first + count - 1, f32[count] of Beta(alpha, alpha)."""
    from scipy.special import betaincinv

    uniform = (_words(seed, MIXUP, first, count)[:, 0] >> np.uint64(11)) * 2.0**-53
    return betaincinv(alpha, alpha, uniform).astype(np.float32)


@lru_cache(maxsize=4)  # a batch may span two epochs; 10 MB each for ImageNet
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _words(seed: int, salt: int, first: int, count: int) -> np.ndarray:
    """Returns random words u64[count,4] for counters first .. first + count - 1."""
    generator = np.random.Philox(key=np.array([seed, salt], np.uint64), counter=first)
    return generator.random_raw(4 * count).reshape(count, 4)
