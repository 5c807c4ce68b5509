"""Tests that the drawn views are those of training and testing, pixel for pixel."""

import sys

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import sampler
from alexnet_jax.input.store import open_store
from experiments import show_views
from tests.helpers.stores import write_store

SIZE, CROP, COUNT = 40, 35, 12


@pytest.fixture
def store(tmp_path):
    pictures = write_store(tmp_path / 'store', size=SIZE, counts={'train': COUNT, 'val': 3})
    return open_store(tmp_path / 'store'), pictures['train']


@pytest.mark.parametrize('std', [0.0, 0.1])
def test_training_views(store, std):
    store, pictures = store
    views = show_views.training_views(store, 5, crop=CROP, epochs=4, seed=2, chunk=1, std=std)
    assert len(views) == 4 and len({label for label, _ in views}) == 4
    positions = np.flatnonzero(sampler.records(2, np.arange(4 * COUNT), COUNT) == 5)
    draws = sampler.draws(2, 0, 4 * COUNT, room=SIZE - CROP)
    for (label, view), p in zip(views, positions, strict=True):
        y, x = draws.y[p], draws.x[p]
        expected = pictures[5][y : y + CROP, x : x + CROP].astype(np.float64)
        if draws.flip[p]:
            expected = expected[:, ::-1]
        for k in range(3):
            expected = expected + std * draws.z[p, k] * store.sigma[k] * store.eigenvectors[:, k]
        assert np.abs(view - np.clip(expected, 0, 255)).max() <= 0.501
        assert label.startswith(f'({y}, {x})') and ('mirrored' in label) == draws.flip[p]


def test_ten_crops(store):
    store, pictures = store
    views = show_views.ten_crops(store, 7, crop=CROP)
    corners = [(0, 0), (0, 5), (2, 2), (5, 0), (5, 5)]
    crops = [pictures[7][y : y + CROP, x : x + CROP] for y, x in corners]
    assert [label for label, _ in views][::4] == [
        'top left',
        'bottom right',
        'bottom left, mirrored',
    ]
    for (_, view), expected in zip(views, crops + [c[:, ::-1] for c in crops], strict=True):
        np.testing.assert_array_equal(view, expected)


@pytest.mark.slow
def test_the_command(store, tmp_path, monkeypatch, capsys):
    from PIL import Image

    out = tmp_path / 'views.png'
    command = ['show_views', f'--store={tmp_path / "store"}', f'--out={out}']
    monkeypatch.setattr(sys, 'argv', command)
    show_views.main()
    assert capsys.readouterr().out == f'wrote {out}\n'
    with Image.open(out) as picture:
        assert picture.size == (1400, 1000)
    monkeypatch.setattr(sys, 'argv', [*command, '--index=12'])
    with pytest.raises(UserError, match=r'--index=12: .* has training images 0\.\.11'):
        show_views.main()
