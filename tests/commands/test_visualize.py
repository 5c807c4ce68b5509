"""The image of conv1's kernels, weight by weight."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import visualize
from alexnet_jax.common.errors import UserError
from alexnet_jax.training.progress import kernel_picture
from tests.helpers.run_dirs import STEP, call, refuses, write_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


def test_two_towers_by_hand():
    """18 kernels per tower: rows of 16 and 2, a white line around each, a gap between the towers."""
    kernels = np.zeros((2, 4, 4, 3, 18), np.float32)
    kernels[0, 0, 1, :, 0] = -1, 0, 0.6  # the smallest weight of both towers is black
    kernels[0, ..., 17] = 0.2
    kernels[1, 3, 3, :, 17] = 1, -0.5, 0  # and the largest is white
    picture = kernel_picture(kernels)
    tower = 2 * (4 + 1) + 1
    assert picture.shape == (2 * tower + 2, 16 * 5 + 1, 3)
    assert picture[1, 2].tolist() == [0, 128, 204]
    assert (picture[6:10, 6:10] == 153).all()
    below = picture[tower + 2 :]
    assert below[9, 9].tolist() == [255, 64, 128]
    assert (below[1:5, 1:5] == 128).all()
    assert (picture[tower - 1 : tower + 3] == 255).all()  # a line, the gap of 2, a line
    assert (picture[::5][:2] == 255).all() and (picture[:, ::5] == 255).all()
    assert (picture[6:10, 11:] == 255).all()  # where the second row has no kernels


def test_one_tower_enlarged():
    kernels = np.random.default_rng(0).normal(size=(1, 5, 5, 3, 32)).astype(np.float32)
    small, large = kernel_picture(kernels), kernel_picture(kernels, scale=3)
    assert small.shape == (2 * 6 + 1, 16 * 6 + 1, 3)
    np.testing.assert_array_equal(large, small.repeat(3, 0).repeat(3, 1))


def test_per_kernel():
    """Only with this option does a kernel with a different mean and contrast look the same."""
    one = np.random.default_rng(0).normal(size=(5, 5, 3))
    kernels = np.stack([one, 0.1 * one + 7], axis=-1)[None].astype(np.float32)
    for per_kernel in (True, False):
        picture = kernel_picture(kernels, per_kernel=per_kernel).astype(int)
        difference = np.abs(picture[1:6, 1:6] - picture[1:6, 7:12]).max()
        assert difference <= 1 if per_kernel else difference > 100
    picture = kernel_picture(kernels, per_kernel=True)[1:6, 1:6]
    np.testing.assert_allclose(
        picture, 255 * (one - one.min()) / (one.max() - one.min()), atol=0.51
    )


def test_the_command(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / 'kernels.png'
    call(monkeypatch, visualize, run.path, f'--output={output}', '--scale=2')
    said = capsys.readouterr().out.splitlines()
    assert f'(step {STEP}): 6 kernels of 11 x 11, towers: 2' in said[0]
    assert said[1:] == [f'wrote {output}']
    picture = np.asarray(Image.open(output))
    assert picture.shape == (2 * (2 * 12 + 2) + 11, 3 * 24 + 2, 3)
    kernels = np.asarray(run.params['conv1']['kernel'])
    gray = 255 * (kernels - kernels.min()) / (kernels.max() - kernels.min())
    for tower, top in ((0, 2), (1, 2 + 26 + 11)):
        for i in range(3):
            drawn = picture[top : top + 22 : 2, 2 + 24 * i : 2 + 24 * i + 22 : 2]
            np.testing.assert_allclose(drawn, gray[tower, ..., i], atol=0.51)
    call(monkeypatch, visualize, run.path, f'--output={output}', '--scale=2', '--per_kernel')
    assert (np.asarray(Image.open(output)) != picture).any()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere: not a run directory'),
        (['RUN', '--step=7'], r'no checkpoint of step 7; available: \[3\]'),
        (['RUN', '--step=last'], 'no checkpoint of step last'),
        (['RUN', '--step=best'], 'no evaluated checkpoint .*; use latest'),
        (
            ['RUN', '--output=nowhere/k.png'],
            '--output=nowhere/k.png: nowhere is not a writable folder',
        ),
        (['RUN', '--output=k.jpg'], '--output=k.jpg: images are written as PNG'),
        (['RUN', '--output=folder.png'], '--output=folder.png: this is a folder'),
        (['nowhere', '--output='], '--output=: images are written as PNG'),  # checked first
        (['RUN', '--scale=0'], '--scale=0: must be 1 to 100'),
        (['RUN', '--cpu_devices=-1'], '--cpu_devices'),
        (['RUN', '--unknown'], 'unrecognized arguments'),
        ([], 'RUN'),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'folder.png').mkdir()
    refuses(monkeypatch, tmp_path, visualize, run.path, arguments, message)


def test_a_network_without_conv1(run):
    trained = SimpleNamespace(path='run', net=run.net, variables={'params': {'conv2': {}}})
    with pytest.raises(UserError, match='has no kernels to draw'):
        visualize.first_kernels(trained)
