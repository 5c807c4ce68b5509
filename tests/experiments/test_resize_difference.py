"""Tests the comparison with OpenCV, and that our squares are close to those of cuda-convnet2."""

import sys

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.images import square
from experiments import resize_difference
from tests.helpers.fixtures import write_tree


@pytest.mark.parametrize(('height', 'width'), [(300, 400), (400, 310), (40, 50)])
def test_our_squares_are_close_to_opencv(height, width):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    y, x = (
        np.linspace(0, 8, height).round().astype(int),
        np.linspace(0, 8, width).round().astype(int),
    )
    image = coarse[y][:, x]
    ours = square(image, 64).astype(int)
    theirs = resize_difference.opencv_square(image, 64)
    assert theirs.shape == (64, 64, 3)
    assert np.abs(ours - theirs).mean() < 3
    assert np.abs(ours - np.roll(theirs, 4, axis=1)).mean() > 6  # a shift would show


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['resize_difference', str(tmp_path), '--size=32'])
    with pytest.raises(UserError, match='no images'):
        resize_difference.main()
    write_tree(tmp_path, {'train/a': 2, 'train/b': 1})
    resize_difference.main()
    assert '3 images' in capsys.readouterr().out
