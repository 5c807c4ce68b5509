"""Stores of whole images, random resized crops, and color jitter."""

import io

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.input import batches, images, prepare, sampler
from alexnet_jax.input import store as stores

SIZE = 40


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Ten smooth images of several shapes, with two classes."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 2)):
        for i in range(count):
            path = folder / split / 'ab'[i % 2] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            small.resize((60 + 20 * i, 200 - 20 * i), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope='module')
def store(folder):
    return prepare.prepare(str(folder), store=f'{folder}-whole', format='whole', size=SIZE)


def test_a_store_of_whole_images(folder, store):
    """Its central squares match those of the usual store, up to JPEG artifacts and half a pixel."""
    usual = prepare.prepare(str(folder), store=f'{folder}-u8', format='u8', size=SIZE)
    pictures = store.pictures('train')
    for record, expected in enumerate(usual.pixels('train')):
        image = pictures.whole(record)
        assert min(image.size) == SIZE < max(image.size) or image.size == (SIZE, SIZE)
        assert pictures[record].shape == (SIZE, SIZE, 3)
        assert np.abs(pictures[record] - expected.astype(float)).mean() < 4
    assert np.abs(store.mean - usual.mean).mean() < 2
    stores.verify(store)
    (batch,) = batches.eval_batches(store, 'val', batch=2, rows=range(2), threads=1)
    np.testing.assert_array_equal(batch['image'][0], store.pictures('val')[0])


def test_an_image_that_is_too_long_for_a_jpeg():
    """Its square is fine."""
    long = np.zeros((4, 1100, 3), np.uint8)
    assert images.square(long, 256).shape == (256, 256, 3)
    assert images.whole(long, 238).shape == (238, 65450, 3)
    with pytest.raises(
        images.Undecodable, match='1100 x 4 pixels: too long to be kept whole at 256'
    ):
        images.whole(long, 256)


def test_boxes():
    """Areas and aspect ratios are in their ranges and evenly spread; what does not fit is replaced."""
    uniform = sampler.resized(0, 5, 4000)
    boxes = np.array([sampler.box(u, 100, 80, (0.08, 1.0)) for u in uniform])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert (left >= 0).all() and (top >= 0).all() and (right <= 100).all() and (bottom <= 80).all()
    parts, ratios = w * h / 8000, np.log(w / h)
    assert 0.07 < parts.min() < 0.1 and parts.max() > 0.9
    assert np.abs(ratios).max() < np.log(4 / 3) + 0.07
    small = parts < 0.4  # those always fit, so they are uniform
    assert abs(np.mean(parts[small]) - 0.24) < 0.01 and abs(np.mean(ratios[small])) < 0.02
    assert abs(np.mean(left[small] / (100 - w[small])) - 0.5) < 0.02
    assert sampler.box(np.ones((10, 4)) - 1e-9, 300, 20, (1.0, 1.0)) == (140, 0, 160, 20)
    np.testing.assert_array_equal(sampler.resized(0, 1000, 3), uniform[995:998])


@pytest.mark.parametrize('rows', [range(4), [3, 1]], ids=str)
def test_random_resized_crops(store, rows):
    """Any step and rows give the same pixels, those of Pillow's resized box."""
    crop, area = 32, (0.3, 1.0)
    given = {'seed': 1, 'batch': 4, 'crop': crop, 'chunk': 1, 'random': True, 'area': area}
    first = list(batches.train_batches(store, start=0, stop=5, rows=range(4), threads=2, **given))
    (later,) = batches.train_batches(store, start=4, stop=5, rows=rows, threads=1, **given)
    for name, values in later.items():
        np.testing.assert_array_equal(values, first[4][name][list(rows)], err_msg=name)
    records = sampler.records(1, 16 + np.arange(4), 8)
    draws, uniform = sampler.draws(1, 16, 4, room=SIZE - crop), sampler.resized(1, 16, 4)
    for i, record in enumerate(records):
        (data,) = store.records('train', [record])
        image = Image.open(io.BytesIO(data))
        box = sampler.box(uniform[i], *image.size, area)
        expected = np.asarray(image.crop(box).resize((crop, crop), Image.Resampling.BILINEAR))
        expected = expected[:, ::-1] if draws.flip[i] else expected
        np.testing.assert_array_equal(first[4]['image'][i], expected)


def test_without_an_area_crops_are_of_the_central_square(store):
    given = {'seed': 1, 'batch': 4, 'crop': SIZE, 'chunk': 1, 'random': False, 'threads': 1}
    (batch,) = batches.train_batches(store, start=0, stop=1, rows=range(4), **given)
    for image, record in zip(batch['image'], sampler.records(1, np.arange(4), 8), strict=True):
        np.testing.assert_array_equal(image, store.pictures('train')[record])


def test_jitter_depends_on_the_position_alone(store):
    factors = sampler.jitters(0, 10, 2000, 0.4)
    assert factors.shape == (2000, 3) and abs(factors.mean() - 1) < 0.02
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    np.testing.assert_array_equal(sampler.jitters(0, 500, 2, 0.4), factors[490:492])
    given = {'seed': 0, 'batch': 4, 'crop': 32, 'chunk': 1, 'random': True, 'jitter': 0.4}
    (batch,) = batches.train_batches(store, start=3, stop=4, rows=[2, 0], threads=1, **given)
    np.testing.assert_array_equal(batch['jitter'], sampler.jitters(0, 12, 4, 0.4)[[2, 0]])
