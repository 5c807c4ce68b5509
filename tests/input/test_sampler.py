"""The sampler: every record once an epoch, uniform crops, even flips, normal color noise."""

import math

import numpy as np
import pytest

from alexnet_jax.input import sampler
from alexnet_jax.input.batches import train_batches
from alexnet_jax.input.store import open_store
from tests.helpers.stores import write_store

DRAWS = 100_000


def is_uniform(counts: np.ndarray) -> bool:
    """A chi-square test at about four standard deviations."""
    counts = counts.ravel()
    expected = counts.sum() / counts.size
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.fixture(scope='module')
def many() -> sampler.Draws:
    return sampler.draws(3, 12_345, DRAWS, room=32)


def test_every_record_once_an_epoch():
    n = 37
    order = sampler.records(5, np.arange(4 * n), n).reshape(4, n)
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    assert (sampler.records(6, np.arange(n), n) != order[0]).any()


def test_records_are_the_defined_permutation():
    n, positions = 101, np.array([100, 101, 0, 555, 101 * 10**12 + 7])
    expected = [np.random.default_rng([9, p // n]).permutation(n)[p % n] for p in positions]
    np.testing.assert_array_equal(sampler.records(9, positions, n), expected)


@pytest.mark.parametrize('chunk', [1, 32])
@pytest.mark.parametrize('first', [0, 1_280_000_000 + 5, 2**40 + 3])
def test_draws_depend_on_the_position_alone(first, chunk):
    whole = sampler.draws(1, first, 100, room=32, chunk=chunk)
    for k in (0, 1, 27, 99):
        one = sampler.draws(1, first + k, 1, room=32, chunk=chunk)
        for a, b in zip(whole, one, strict=True):
            np.testing.assert_array_equal(a[k : k + 1], b)


def test_dtypes_and_shapes():
    y, x, flip, z = sampler.draws(1, 0, 5, room=32)
    assert [v.dtype for v in (y, x, flip, z)] == [np.int32, np.int32, np.bool_, np.float32]
    assert [v.shape for v in (y, x, flip, z)] == [(5,), (5,), (5,), (5, 3)]


def test_seeds_give_other_draws():
    a, b = (sampler.draws(seed, 0, 1000, room=32) for seed in (1, 2))
    assert (a.y == b.y).mean() < 0.1 and not (a.z == b.z).any()


def test_offsets_are_uniform_over_0_to_32(many):
    for offset in (many.y, many.x):
        counts = np.bincount(offset)
        assert counts.size == 33 and is_uniform(counts)
    assert is_uniform(np.histogram2d(many.y, many.x, bins=33)[0])  # and independent


def test_flips_are_even_and_independent_of_the_offsets(many):
    sigma = 0.5 / math.sqrt(DRAWS)
    assert abs(many.flip.mean() - 0.5) < 4 * sigma
    for offset in (many.y, many.x):
        assert is_uniform(np.bincount(many.flip * 33 + offset))
    assert is_uniform(np.bincount(many.flip[1:] * 2 + many.flip[:-1]))


def test_a_room_of_zero_leaves_one_offset():
    y, x, flip, _ = sampler.draws(1, 0, 100, room=0)
    assert not y.any() and not x.any() and flip.any()


def test_color_noise_has_the_spread_of_the_source(many):
    # ImageNet's principal axes and standard deviations, and the factor 0.1: docs/original.md §5.
    sigma = np.array([121.780, 37.094, 19.721])
    axes = np.array(
        [[-0.5635, -0.5762, -0.5920], [-0.7126, -0.0235, 0.7012], [0.4180, -0.8170, 0.3973]]
    ).T
    noise = 0.1 * (sigma * many.z) @ axes.T  # [n,3] levels of R, G, B
    np.testing.assert_allclose((noise @ axes).std(0), [12.2, 3.7, 2.0], rtol=0.02)
    # 1% is 4.5 standard deviations of a standard deviation estimated from this many draws.
    np.testing.assert_allclose(many.z.std(0), 1, atol=0.01)


def test_z_is_normal_and_independent(many):
    # Cells of equal probability under the normal distribution.
    cells = (0.5 * (1 + np.vectorize(math.erf)(many.z / math.sqrt(2))) * 100).astype(int)
    for k in range(3):
        assert is_uniform(np.bincount(cells[:, k], minlength=100))
        others = (cells[:, k] // 10) * 10 + cells[:, (k + 1) % 3] // 10
        assert is_uniform(np.bincount(others, minlength=100))
        sign = cells[:, k] // 50  # independent of the crop, too
        assert is_uniform(np.bincount(sign * 33 + many.y))
        assert is_uniform(np.bincount(sign * 2 + many.flip))


def test_an_image_has_other_color_noise_in_every_epoch(tmp_path):
    """Repeating the run repeats the noise."""
    write_store(tmp_path, format='u8', size=8, counts={'train': 12, 'val': 1}, classes=12)
    kwargs = dict(seed=3, batch=12, stop=3, crop=8, chunk=32, random=True, reader='threads')

    def noise():  # [epoch,image,3]; an image's label is its index, and a batch is an epoch
        steps = train_batches(open_store(tmp_path), **kwargs)
        return np.stack([step['z'][np.argsort(step['label'])] for step in steps])

    first = noise()
    assert first.shape == (3, 12, 3) and np.unique(first).size == first.size
    np.testing.assert_array_equal(noise(), first)


def test_a_chunk_shares_one_offset_and_one_flip():
    first = 32 * 1000 + 20  # starts inside a chunk
    draws = sampler.draws(1, first, 32 * 500, room=32, chunk=32)
    group = (first + np.arange(32 * 500)) // 32
    crops = np.stack([draws.y, draws.x, draws.flip], axis=1)
    distinct = [np.unique(crops[group == g], axis=0) for g in np.unique(group)]
    assert all(len(d) == 1 for d in distinct)
    # Neighboring chunks draw anew: two draws of 2178 rarely agree.
    first_crops = np.concatenate(distinct)
    assert (first_crops[1:] == first_crops[:-1]).all(1).mean() < 0.01
    assert np.unique(draws.z, axis=0).shape == (32 * 500, 3)  # every image has its own color noise


def test_shares_of_mixup_are_those_of_beta():
    shares = sampler.shares(3, 1000, 4000, 0.2)
    assert (
        shares.dtype == np.float32 and (shares[500:510] == sampler.shares(3, 1500, 10, 0.2)).all()
    )
    moments = [shares.mean(), shares.var()]  # of Beta(a, a): 1/2 and 1 / (4 (2 a + 1))
    np.testing.assert_allclose(moments, [0.5, 1 / 5.6], atol=0.02)
    assert not np.array_equal(shares, sampler.shares(4, 1000, 4000, 0.2))
