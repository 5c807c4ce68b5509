"""The diagnosis finds values that are not finite, saturated units, and a loss that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.training import diagnosis
from configs import base

CROP, CLASSES, BATCH = 64, 10, 4
RATES = {'weights': 0.01, 'biases': 0.01, 'conv1': 0.01, 'colour': 1.0}


@pytest.fixture(scope='module')
def made():
    config = base.get_config()
    config.model.width = 0.25
    net = build(classes=CLASSES, **config.model)
    find_broken = diagnosis.make_find_broken(
        net,
        seed=0,
        mean=np.zeros((CROP, CROP, 3), np.float32),
        eigenvectors=np.eye(3, dtype=np.float32),
        sigma=np.ones(3, np.float32),
        **config.colour,
    )
    return find_broken, network.init(net, jax.random.key(0), CROP)


def scaled(params, **factors):
    """Returns the parameters with the kernels of some layers multiplied by factors."""
    return {
        layer: {**leaves, 'kernel': leaves['kernel'] * factors.get(layer, 1.0)}
        for layer, leaves in params.items()
    }


@pytest.mark.parametrize(
    ('factors', 'expected'),
    [
        ({}, 'everything is finite'),
        ({'conv1': 1e38}, 'the activations of conv1 broke first'),
        ({'conv3': 1e38}, 'the activations of conv3 broke first'),
        ({'fc8': np.inf}, 'the gradient of fc8 broke first, in the previous step'),
        (
            {'conv2': np.nan, 'conv4': np.nan},
            'the gradient of conv4 broke first, in the previous step',
        ),
        # fc6 outputs only its biases, so fc7 and the loss are finite; the gradients are not.
        ({'conv5': 1e4, 'fc6': 0.0, 'fc7': 1e38}, 'the gradient of fc6 broke first'),
    ],
    ids=str,
)
def test_where_it_broke(made, factors, expected):
    find_broken, variables = made
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8),
        'z': rng.normal(size=(BATCH, 3)).astype(np.float32),
        'label': np.arange(BATCH, dtype=np.int32),
    }
    rates = {name: np.float32(rate) for name, rate in RATES.items()}
    variables = {**variables, 'params': scaled(variables['params'], **factors)}
    found = find_broken(variables, np.int32(0), batch, rates)
    assert found.startswith(expected)


def test_parameters_alone(made):
    find_broken, variables = made
    broken = jax.tree.map(jnp.copy, variables)
    params = broken['params']
    params['conv5']['bias'] = params['conv5']['bias'].at[0, 0].set(jnp.inf)
    assert find_broken(broken).startswith('the gradient of conv5 broke first')


@pytest.mark.parametrize(('std', 'bias', 'warned'), [(0.001, 0.0, ''), (0.01, 3.0, 'act1 fc6')])
def test_saturated_tanh_units(std, bias, warned):
    config = base.get_config()
    config.model.update({'width': 0.0625, 'activation': 'tanh', 'std': (std, *(0.001,) * 7)})
    config.model.bias = (0.0,) * 5 + (bias, 0.0, 0.0)
    net = build(classes=CLASSES, **config.model)
    variables = network.init(net, jax.random.key(0), CROP)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8)
    batch = {'image': images, 'z': np.zeros((BATCH, 3), np.float32)}
    color = {'std': 0.0, 'rescale': False}
    axes = {'eigenvectors': np.eye(3, dtype=np.float32), 'sigma': np.ones(3, np.float32)}
    mean = np.full((CROP, CROP, 3), 127, np.float32)
    shares = diagnosis.make_saturated(net, mean=mean, **axes, **color)(variables, batch, RATES)
    out = network.apply(net, variables, images.astype(np.float32) - 127)[1]
    assert shares['act1'] == pytest.approx(np.mean(np.abs(np.stack(out['act1'])) > 0.99), abs=1e-6)
    assert shares['conv1'] == 0  # before the activation
    text = diagnosis.saturation(jax.device_get(shares))
    assert bool(text) == bool(warned)
    assert [name for name in warned.split() if name not in text] == []


def test_a_loss_at_pure_chance_is_noticed_once():
    stuck = diagnosis.Stuck(200, 1000)
    near, far = np.log(1000) * 1.001, np.log(1000) * 0.99
    assert [stuck(loss, 50) for loss in (near, near, far, near, near, near)] == [False] * 6
    assert [stuck(near, 50) for _ in range(3)] == [True, False, False]
    assert 'ln(1000) = 6.9078' in stuck.advice
    never = diagnosis.Stuck(0, 1000)
    assert not any(never(near, 50) for _ in range(100))
