"""Tests the comparison of test mode with the average of dropout networks (§4.2)."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from experiments import dropout_average


@pytest.fixture(scope='module')
def tiny():
    """A network with eight hidden units in each layer, and two images."""
    config = configfile.load('configs/paper.py')
    config.model.update({'width': 0.0625, 'hidden': (128, 128)})
    net = build(classes=5, **config.model)
    variables = jax.jit(lambda: network.init(net, jax.random.key(0), 64))()
    x = 60 * np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=variables['params']['fc8']['kernel'].shape)
    variables['params']['fc8']['kernel'] = jnp.asarray(noise, jnp.float32)
    return net, variables, x


def test_halving_is_exact_in_the_last_layer(tiny):
    """The mean logits over all 256 masks of fc7 are those of test mode."""
    net, variables, x = tiny
    logits, out, _ = network.apply(net, variables, x)
    units = np.concatenate(out['fc7'], 1)
    kernel, bias = (np.asarray(variables['params']['fc8'][name]) for name in ('kernel', 'bias'))
    masks = np.array([*itertools.product((0.0, 1.0), repeat=8)], np.float32)
    assert units.shape == (2, 8) and units.min() > 0
    of_masks = (masks[:, None] * units) @ kernel.reshape(8, 5) + bias
    np.testing.assert_allclose(of_masks.mean(0), logits, rtol=1e-5, atol=1e-5)


def test_compare(tiny):
    """All units of fc6 and fc7 are active under all masks, so halving is exact, up to the random masks."""
    net, variables, x = tiny
    found = jax.jit(lambda v: dropout_average.compare(net, v, x, 2000))(variables)
    (gap, same), (other, _) = found['halved'], found['not halved']
    assert gap.shape == same.shape == (2,) and same.all()
    assert (gap >= 0).all() and gap.max() < 0.01 and other.min() > 10 * gap.max()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['quickstart', '--masks=0'], '--masks=0: must be at least 1'),
        (['cifar10-80sec'], 'cifar10-80sec: has no dropout'),
    ],
)
def test_what_cannot_be_compared(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, 'argv', ['dropout_average', *arguments])
    with pytest.raises(UserError, match=words):
        dropout_average.main()
