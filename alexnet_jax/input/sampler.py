"""Maps each training position to its record, crop, flip and color draw (`docs/design.md` §4).

With batches of B, row i of step s is position p = s * B + i, a 64-bit number. Everything here is a
pure function of (seed, position): there is no state, so every position costs the same, and nothing
depends on how many devices or processes share the work.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

# One stream of random words for each kind of draw.
CROP, COLOR, MIXUP, RESIZED, JITTER = 1, 2, 3, 4, 5
TRIES = 10  # of a random resized crop


class Draws(NamedTuple):
    """Augmentation of n positions: crop offsets, flips, and standard normals for the color noise."""

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
    u = _uniform(_words(seed, COLOR, first, count))
    radius = np.sqrt(-2 * np.log1p(-u[:, :2]))
    angle = 2 * np.pi * u[:, 2:]
    z = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)
    return Draws(y, x, (crop[:, 2] >> np.uint64(63)).astype(bool), z.astype(np.float32))


def shares(seed: int, first: int, count: int, alpha: float) -> np.ndarray:
    """Returns mixup's shares of positions first .. first + count - 1, f32[count] of Beta(alpha, alpha)."""
    from scipy.special import betaincinv

    uniform = _uniform(_words(seed, MIXUP, first, count)[:, 0])
    return betaincinv(alpha, alpha, uniform).astype(np.float32)


def resized(seed: int, first: int, count: int) -> np.ndarray:
    """Returns what `box` needs for positions first .. first + count - 1: f64[count,TRIES,4] in [0, 1)."""
    words = _words(seed, RESIZED, TRIES * first, TRIES * count)
    return _uniform(words.reshape(count, TRIES, 4))


def box(
    uniform: np.ndarray, width: int, height: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Returns the box (left, top, right, bottom) of a random resized crop.

    As in torchvision, but if no try u f64[TRIES,4] fits, the central square. The box's fraction of the
    image's area is uniform over `area`, and the logarithm of its aspect ratio is uniform from log(3/4) to
    log(4/3).
    """
    for u in uniform:
        part = width * height * (area[0] + (area[1] - area[0]) * u[0])
        ratio = (3 / 4) * (16 / 9) ** u[1]
        w, h = round((part * ratio) ** 0.5), round((part / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u[2] * (width - w + 1)), int(u[3] * (height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def jitters(seed: int, first: int, count: int, strength: float) -> np.ndarray:
    """Returns factors of brightness, contrast and saturation, uniform over 1 ± strength: f32[count,3]."""
    uniform = _uniform(_words(seed, JITTER, first, count)[:, :3])
    return (1 + strength * (2 * uniform - 1)).astype(np.float32)


@lru_cache(maxsize=4)  # a batch may span two epochs; 10 MB each for ImageNet
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _words(seed: int, salt: int, first: int, count: int) -> np.ndarray:
    """Returns random words u64[count,4] for counters first .. first + count - 1."""
    generator = np.random.Philox(key=np.array([seed, salt], np.uint64), counter=first)
    return generator.random_raw(4 * count).reshape(count, 4)


def _uniform(words: np.ndarray) -> np.ndarray:
    """Returns f64 numbers in [0, 1) from random words u64."""
    return (words >> np.uint64(11)) * 2.0**-53
