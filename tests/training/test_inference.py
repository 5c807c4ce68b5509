"""What `alexnet_jax.load` takes: every kind of image gives what its file would."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import alexnet_jax
from alexnet_jax.common.errors import UserError
from alexnet_jax.training import inference
from tests.helpers.run_dirs import CLASSES, write_run


@pytest.fixture(scope='module')
def classify(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp('tiny'))
    (run.path / 'store.json').write_text(
        (run.path / 'store.json').read_text().replace('{', '{"exif": true,', 1)
    )
    return alexnet_jax.load(run.path, views='center')


@pytest.fixture(scope='module')
def picture():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


def rgba(picture):
    alpha = np.arange(picture.shape[1], dtype=np.uint8)
    return np.dstack([picture, np.broadcast_to(alpha, picture.shape[:2])])


def test_every_form_of_one_picture(classify, picture, tmp_path):
    """A path, PIL, u8, floats, RGBA without its alpha: the same bits."""
    path = tmp_path / 'a.png'
    Image.fromarray(picture).save(path)
    expected = classify([picture])[0]
    assert expected.shape == (CLASSES,) and expected.dtype == np.float32
    forms = [
        path,
        str(path),
        Image.open(path),
        Image.fromarray(picture),
        Image.fromarray(rgba(picture)),
        picture,
        rgba(picture),
        picture / 255,
        (picture / 255).astype(np.float32),
        jnp.asarray(picture),
    ]
    for form in forms:
        np.testing.assert_array_equal(classify(form), expected)
    for several in (forms, tuple(forms)):
        found = classify(several)
        np.testing.assert_allclose(found, [expected] * len(forms), rtol=1e-5, atol=1e-6)
    both = classify(np.stack([picture, picture[::-1]]))
    assert both.shape == (2, CLASSES)
    np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-6)


def test_gray(classify, picture):
    gray = picture[..., 0]
    expected = classify(np.repeat(gray[..., None], 3, axis=2))
    for form in (gray, gray[..., None], gray / 255, Image.fromarray(gray)):
        np.testing.assert_array_equal(classify(form), expected)


def test_floats_are_rounded_to_levels(classify, picture):
    near = (picture + np.random.default_rng(1).uniform(-0.49, 0.49, picture.shape)) / 255
    np.testing.assert_array_equal(classify(near.clip(0, 1)), classify(picture))
    assert classify(jnp.asarray(picture / 255, jnp.bfloat16)).shape == (CLASSES,)


@pytest.mark.parametrize('mode', ['1', 'P', 'CMYK', 'LA', 'RGBA', 'I;16', 'YCbCr'])
def test_a_picture_of_pil_is_decoded_like_its_file(classify, picture, mode):
    if mode == 'I;16':
        made = Image.fromarray(picture[..., 0].astype(np.uint16) << 8)
    else:
        made = Image.fromarray(picture).convert(mode)
    format = {'CMYK': 'TIFF', 'YCbCr': 'TIFF'}.get(mode, 'PNG')
    file = io.BytesIO()
    made.save(file, format)
    file.seek(0)
    np.testing.assert_array_equal(classify(made), classify(Image.open(file)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(classify, picture, tmp_path, orientation):
    """A path and a PIL image are both rotated; the PIL image itself is not modified."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / 'a.png', exif=exif)
    opened = Image.open(tmp_path / 'a.png')
    from PIL import ImageOps

    expected = classify(np.asarray(ImageOps.exif_transpose(opened)))
    opened = Image.open(tmp_path / 'a.png')
    for form in (tmp_path / 'a.png', opened):
        np.testing.assert_array_equal(classify(form), expected)
    assert opened.size == (120, 90) and opened.getexif()[0x0112] == orientation


def test_more_pictures_than_a_batch(classify, picture, monkeypatch):
    monkeypatch.setattr(inference, 'BATCH', 4)
    pictures = [np.roll(picture, 9 * i, axis=1) for i in range(10)]
    found = classify(pictures)
    monkeypatch.undo()
    np.testing.assert_allclose(found, classify(pictures), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    'images, message',
    [
        ([], 'no images'),
        (np.zeros((0, 4, 4, 3), np.uint8), 'no images'),
        ('gone.jpg', 'gone.jpg: cannot be read: No such file'),
        (None, 'NoneType is not an image'),
        (b'bytes', 'bytes is not an image'),
        ((x for x in 'ab'), 'generator is not an image'),
        ([[0, 1], [1, 0]], 'list is not an image'),
        (np.zeros((3, 64, 64), np.uint8), r'an array of shape \(3, 64, 64\) is not an image'),
        (np.zeros((64, 64, 2), np.uint8), r'an array of shape \(64, 64, 2\) is not an image'),
        (np.zeros((0, 64, 3), np.uint8), r'an array of shape \(0, 64, 3\)'),
        (np.zeros((2, 2, 64, 64, 3), np.uint8), r'an array of shape \(2, 2, 64, 64, 3\)'),
        (np.zeros((64, 64, 3), np.int64), 'an array of int64 is not an image'),
        (np.zeros((64, 64), bool), 'an array of bool is not an image'),
        (np.full((64, 64, 3), 200.0), 'floats from 200 to 200'),
        (np.full((64, 64, 3), -0.5), 'floats from -0.5 to -0.5'),
        (np.full((64, 64, 3), np.nan), 'floats from nan to nan'),
        (Image.new('F', (9, 9)), 'PIL image cannot be used .floating-point pixels'),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)
@pytest.mark.parametrize('method', ['__call__', 'features'])
def test_anything_else_is_one_value_error(classify, images, message, method):
    with pytest.raises(ValueError, match=message) as error:
        getattr(classify, method)(images)
    assert isinstance(error.value, UserError) and '\n' not in str(error.value)
    if 'cannot be read' not in message:
        accepted = (
            'give a path, a PIL image, or an array of shape [H,W], [H,W,1], [H,W,3] or [H,W,4]'
        )
        assert accepted in str(error.value)
