"""The whole network: shapes, towers, switches, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.nets import layers, network
from alexnet_jax.nets.build import build
from configs import base, caffe, cnn_star, original, owt


def make_net(config=None, classes=10, **changes):
    config = config or base.get_config()
    config.model.update(changes)
    return build(classes=classes, **config.model)


def images(batch=2, crop=64, seed=0):
    return 60 * np.random.default_rng(seed).normal(size=(batch, crop, crop, 3)).astype(np.float32)


def shapes(net, crop, train=False):
    def forward():
        params = network.init(net, jax.random.key(0), crop)['params']
        extra = (network.Training(jax.random.key(0), jnp.arange(2)),) if train else ()
        return net.apply({'params': params}, jnp.zeros((2, crop, crop, 3)), *extra)

    logits, out = jax.eval_shape(forward)
    return {'logits': logits.shape, **{k: [x.shape[1:] for x in v] for k, v in out.items()}}


def test_activation_shapes_of_the_paper():
    found = shapes(make_net(classes=1000), 224)
    sizes = {'conv1': 55, 'pool1': 27, 'conv2': 27, 'pool2': 13, 'conv3': 13, 'conv4': 13}
    sizes |= {'conv5': 13, 'pool5': 6}
    kernels = {'1': 48, '2': 128, '3': 192, '4': 192, '5': 128}
    for name, size in sizes.items():
        assert found[name] == [(size, size, kernels[name[-1]])] * 2, name
    assert found['fc6'] == found['fc7'] == [(2048,)] * 2
    assert found['logits'] == (2, 1000)
    convs = [f'conv{i}' for i in range(1, 6)]
    units = sum(np.prod(shape) for name in (*convs, 'fc6', 'fc7') for shape in found[name])
    assert units + 1000 == 659_272  # the paper's 650,000


def test_disjoint_pooling_has_the_geometry_of_run_147():
    found = shapes(make_net(pooling='disjoint'), 224)
    names = ('conv1', 'pool1', 'conv2', 'pool2', 'conv3', 'conv4', 'conv5', 'pool5')
    assert [found[n][0][0] for n in names] == [55, 28, 26, 13, 13, 13, 11, 6]


@pytest.mark.parametrize('crop', [64, 112, 192, 224])
def test_disjoint_pooling_ends_at_the_size_of_overlapping_pooling(crop):
    ends = [
        shapes(make_net(pooling=pooling), crop)['pool5'] for pooling in ('overlapping', 'disjoint')
    ]
    assert ends[0] == ends[1]


def test_other_presets_have_their_shapes():
    assert shapes(make_net(cnn_star.get_config()), 224)['conv6'] == [(6, 6, 128)] * 2
    found = shapes(make_net(caffe.get_config()), 227)
    assert (found['conv1'], found['pool5']) == ([(55, 55, 96)], [(6, 6, 256)])
    found = shapes(make_net(owt.get_config()), 224)
    assert (found['conv1'], found['pool5']) == ([(55, 55, 64)], [(6, 6, 256)])


@pytest.mark.slow
def test_original_normalizes_before_the_relu_and_twice_in_layer_2():
    net = make_net(original.get_config(), width=0.25)
    params = network.init(net, jax.random.key(0), 64)['params']
    _, out = net.apply({'params': params}, images())
    assert list(out)[:8] == [
        'conv1',
        'norm1',
        'pool1',
        'act1',
        'conv2',
        'act2',
        'norm2',
        'map_norm2',
    ]
    x = out['conv1'][0]
    assert (x < 0).any() and (out['norm1'][0] < 0).any()
    expected = layers.lrn(x, alpha=1e-4 / 5, k=2.0, n=5, beta=0.75)
    np.testing.assert_array_equal(out['norm1'][0], expected)
    assert float(out['act1'][0].min()) == 0


@pytest.mark.parametrize('norms', ['all', 'first', 'none'])
def test_norms(norms):
    _, out = make_net(norms=norms, width=0.25).init_with_output(jax.random.key(0), images())[0]
    found = [name for name in out if 'norm' in name]
    assert found == {'all': ['norm1', 'norm2'], 'first': ['norm1'], 'none': []}[norms]


def test_norms_over_maps_are_norms_too():
    """`original` has one in layer 2."""
    for norms, found in (
        ('all', ['norm1', 'norm2', 'map_norm2']),
        ('first', ['norm1']),
        ('none', []),
    ):
        names = make_net(original.get_config(), norms=norms).names
        assert [name for name in names if 'norm' in name] == found


def test_norm_window_across_towers_is_the_norm_of_all_channels():
    net = make_net(norm_window='all', norm_alpha=0.01, width=0.25)
    (_, out), _ = net.init_with_output(jax.random.key(0), images())
    whole = jnp.concatenate(out['act1'], axis=-1)
    expected = layers.lrn(whole, alpha=0.01, k=2.0, n=5, beta=0.75)
    np.testing.assert_array_equal(jnp.concatenate(out['norm1'], axis=-1), expected)
    apart = jnp.concatenate(
        [layers.lrn(x, alpha=0.01, k=2.0, n=5, beta=0.75) for x in out['act1']], axis=-1
    )
    assert not np.array_equal(apart, expected)


@pytest.mark.parametrize('name', ['conv1', 'conv2', 'conv3', 'conv4', 'conv5'])
def test_a_removed_layer_passes_its_input_on(name):
    net = make_net(remove=name, width=0.25)
    (_, out), variables = net.init_with_output(jax.random.key(0), images(crop=224))
    assert [*out, 'fc8'] == net.names and name not in out and name not in variables['params']
    assert out['pool5'][0].shape[1:3] == (6, 6)
    assert f'norm{name[-1]}' not in out and f'act{name[-1]}' not in out
    if name == 'conv3':  # conv4 reads both towers
        assert variables['params']['conv4']['kernel'].shape == (2, 3, 3, 64, 48)


def test_the_towers_exchange_only_where_they_should():
    """Checks which layers of tower 1 a change in tower 0's conv1 reaches."""

    def reached(net):
        params = network.init(net, jax.random.key(0), 64)['params']
        _, before = net.apply({'params': params}, images())
        kernel = params['conv1']['kernel'].at[0].add(0.01)
        params = {**params, 'conv1': {**params['conv1'], 'kernel': kernel}}
        _, after = net.apply({'params': params}, images())
        return {n for n in before if not np.array_equal(before[n][1], after[n][1])}

    own = {'conv1', 'act1', 'norm1', 'pool1', 'conv2', 'act2', 'norm2', 'pool2'}
    found = reached(make_net(width=0.25))
    assert not found & own
    assert found >= {'conv3', 'conv4', 'conv5', 'fc6', 'fc7'}
    assert reached(make_net(width=0.25, exchange=())) == set()
    assert reached(make_net(width=0.25, exchange=('fc7',))) == {'fc7'}


def test_fc6_reads_height_width_and_channels_over_both_towers_in_this_order():
    net = make_net(width=0.25)
    (_, out), variables = net.init_with_output(jax.random.key(0), images())
    params = variables['params']['fc6']
    x = np.concatenate(out['pool5'], axis=-1).reshape(2, -1)
    expected = np.maximum(x @ params['kernel'][1] + params['bias'][1][None], 0)
    np.testing.assert_allclose(out['fc6'][1], expected, rtol=1e-5, atol=1e-6)


def test_dropout_forms():
    """The inputs of fc8: halved at test time, masked by 0 and 1 in training; or the inverted form."""

    def logits(net, variables, train=None):
        return net.apply(variables, x, train)[0]

    x, train = images(), network.Training(jax.random.key(0), jnp.arange(2))
    net = make_net(width=0.25)
    variables = net.init(jax.random.key(1), x)
    _, out = net.apply(variables, x)
    kernel, bias = (np.asarray(variables['params']['fc8'][k]) for k in ('kernel', 'bias'))

    def read_by_fc8(masks):
        parts = [np.asarray(h * m) @ k for h, m, k in zip(out['fc7'], masks, kernel, strict=True)]
        return sum(parts) + bias

    np.testing.assert_allclose(
        logits(net, variables), read_by_fc8((0.5, 0.5)), rtol=1e-4, atol=1e-5
    )
    inverted = make_net(width=0.25, dropout='inverted')
    none = make_net(width=0.25, dropout='none')
    np.testing.assert_array_equal(logits(inverted, variables), logits(none, variables))
    np.testing.assert_array_equal(logits(none, variables), logits(none, variables, train))
    a, b = logits(net, variables, train), logits(inverted, variables, train)
    assert not np.allclose(a, b)
    _, trained = net.apply(variables, x, train)
    key = jax.random.fold_in(train.key, 1)
    masks = [layers.dropout_mask(key, train.rows, t, h.shape[1]) for t, h in enumerate(out['fc7'])]
    expected = sum(
        np.where(m, h, 0) @ k for h, m, k in zip(trained['fc7'], masks, kernel, strict=True)
    )
    np.testing.assert_allclose(a, expected + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_initial_values():
    params = network.init(make_net(original.get_config(), classes=1000), jax.random.key(0), 224)[
        'params'
    ]
    for layer, std in zip(sorted(params), original.get_config().model.std, strict=True):
        kernel = np.asarray(params[layer]['kernel'])
        assert abs(kernel.std() / std - 1) < 0.02, layer
        assert abs(kernel).max() > 3.5 * std, 'not truncated'
        assert abs(kernel.mean()) < 0.02 * std
    biases = [float(np.unique(params[layer]['bias'])[0]) for layer in sorted(params)]
    assert biases == [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.slow
def test_a_narrow_net_starts_with_larger_kernels():
    params = network.init(make_net(width=0.25), jax.random.key(0), 224)['params']
    stds = [float(params[layer]['kernel'].std()) for layer in sorted(params)]
    np.testing.assert_allclose(stds, [0.01] + [0.02] * 7, rtol=0.06)


@pytest.mark.slow
def test_torch_initialization_is_uniform_within_the_fan_in():
    params = network.init(make_net(owt.get_config(), width=0.25), jax.random.key(0), 224)['params']
    for layer, fan_in in (('conv1', 363), ('conv3', 9 * 48), ('fc7', 1024)):
        for leaf in params[layer].values():
            assert 0.9 * fan_in**-0.5 < abs(leaf).max() <= fan_in**-0.5


def test_bfloat16_is_only_the_arithmetic():
    net = make_net(width=0.25, dtype='bfloat16')
    (logits, out), variables = net.init_with_output(jax.random.key(0), images())
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    assert (logits.dtype, out['fc7'][0].dtype) == (jnp.float32, jnp.bfloat16)
    plain, _ = make_net(width=0.25).apply(variables, images())
    np.testing.assert_allclose(logits, plain, atol=0.05)
    assert (logits != logits.astype(jnp.bfloat16)).any()  # not rounded, which would make ties
