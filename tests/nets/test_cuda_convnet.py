"""The CIFAR-10 networks: shapes, order of operations, and switch values that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import layers, network
from alexnet_jax.nets.build import build
from configs import cifar10, paper


def make_net(variant, **changes):
    config = cifar10.get_config(variant)
    with config.unlocked():
        config.model.update(changes)
    return build(classes=10, **config.model), config.augment.crop


def applied(variant, **changes):
    net, crop = make_net(variant, **changes)
    params = jax.jit(lambda: network.init(net, jax.random.key(0), crop))()['params']
    images = 50 * jax.random.normal(jax.random.key(1), (2, crop, crop, 3))
    logits, out = net.apply({'params': params}, images)
    return params, images, logits, {name: value[0] for name, value in out.items()}, net


@pytest.mark.slow
def test_shapes_end_in_ceil_mode():
    """32 -> 16 -> 8 -> 4 and 24 -> 12 -> 6; floor mode would give 15, 7, 3 (`docs/original.md` §8)."""
    *_, logits, out, net = applied('80sec')
    assert [out[name].shape[1:] for name in ('max1', 'avg2', 'avg3', 'fc4')] == [
        (16, 16, 32),
        (8, 8, 32),
        (4, 4, 64),
        (64,),
    ]
    assert logits.shape == (2, 10) and list(out) == net.names[:-1] and net.names[-1] == 'fc10'
    *_, out, net = applied('11pct')
    assert [
        out[name].shape[1:] for name in ('conv1', 'max1', 'norm1', 'max2', 'local3', 'local4')
    ] == [(24, 24, 64), (12, 12, 64), (12, 12, 64), (6, 6, 64), (6, 6, 64), (6, 6, 32)]


def test_the_18_percent_network_step_by_step():
    params, images, logits, out, _ = applied('18pct')
    x = images
    for i, pool in ((1, layers.max_pool), (2, layers.avg_pool), (3, layers.avg_pool)):
        kernel, bias = (params[f'conv{i}'][name][0] for name in ('kernel', 'bias'))
        x = layers.conv(x, kernel, bias, padding=((2, 2), (2, 2)))
        np.testing.assert_allclose(out[f'conv{i}'], x, rtol=1e-5, atol=1e-6)
        x = pool(x, window=3, stride=2) if i == 1 else pool(jnp.maximum(x, 0), window=3, stride=2)
        x = jnp.maximum(x, 0)
        if i < 3:
            x = layers.map_norm(x, alpha=5e-5 / 9, k=1.0, n=3, beta=0.75)
    expected = x.reshape(2, -1) @ params['fc10']['kernel'][0] + params['fc10']['bias'][None]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)


def test_the_11_percent_networks_differ_only_in_the_norms():
    *_, out, _ = applied('11pct')
    norm = layers.lrn(out['max1'], alpha=0.001 / 9, k=1.0, n=9, beta=0.75)
    np.testing.assert_allclose(out['norm1'], norm, rtol=1e-5, atol=1e-6)
    *_, plain, _ = applied('11pct_plain')
    assert [name for name in out if name not in plain] == ['norm1', 'norm2']


def test_tanh_is_everywhere():
    *_, out, _ = applied('fig1_tanh')
    for name in ('act1', 'act2', 'act3'):
        assert np.abs(out[name]).max() <= 1 and out[name].min() < 0


def test_a_net_with_the_fields_of_another():
    for config, net in ((cifar10, 'alexnet'), (paper, 'cuda_convnet')):
        fields = {**config.get_config().model, 'net': net}
        with pytest.raises(
            UserError, match='the fields of (AlexNet|CudaConvnet) .*missing: .*unknown: '
        ):
            build(classes=10, **fields)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'towers': 2}, 'towers=2: must be 1'),
        ({'layers': ()}, 'at least one layer'),
        ({'units': (32, 32)}, 'must have 3 values, one per layer, not 2'),
        ({'std': (0.1,)}, 'std: must have 4 values, one per layer, not 1'),
        ({'layers': ('conv', 'dense', 'conv')}, "layers='dense'"),
        (
            {'layers': ('conv', 'fc', 'conv'), 'after': ('act', 'act', 'act')},
            'can follow an fc layer',
        ),
        ({'layers': ('conv', 'conv', 'fc')}, "after='avg'"),
        ({'after': ('act pool', 'act', 'act')}, "after='pool'"),
        ({'norms': 'first'}, "norms='first'"),
        ({'norm_window': 'tower'}, "norm_window='tower'"),
        ({'norm_n': 4}, 'odd'),
        ({'activation': 'sine'}, "activation='sine'"),
        ({'dtype': 'int8'}, "dtype='int8'"),
        ({'net': 'lenet'}, "net='lenet': choose one of alexnet, alexnet_bn, cuda_convnet"),
    ],
)
def test_impossible_switches_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        make_net('19pct', **change)
    assert '\n' not in str(error.value)
