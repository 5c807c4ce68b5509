"""SqueezeNet, MobileNet, ShuffleNet v2 and AlexNet with batch normalization: costs, forms, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import blocks, layers, network
from alexnet_jax.nets.build import build
from alexnet_jax.training import optim, steps


def squeezenet(pixels, version):
    """Multiply-adds by hand: kernel size² x inputs x outputs x positions, layer by layer."""
    fires = [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]
    size, maps, pooled = {'1.0': (7, 96, (4, 8)), '1.1': (3, 64, (3, 5))}[version]
    side = (pixels - size) // 2 + 1
    total = size**2 * 3 * maps * side**2
    side = side // 2  # pooling 3 x 3 with stride 2, rounded up: of an odd size n, (n - 1) / 2
    for i, (squeeze, expand) in enumerate(fires, start=2):
        total += side**2 * (maps * squeeze + squeeze * expand * (1 + 9))
        maps = 2 * expand
        side = side // 2 if i in pooled else side
    return total + side**2 * maps * 1000


@pytest.mark.parametrize(
    ('preset', 'pixels', 'macs'),
    [
        ('paper', 224, 724_406_816),
        ('alexnet_bn', 224, 724_406_816),
        ('squeezenet', 227, squeezenet(227, '1.0')),
        ('squeezenet:1.1', 227, squeezenet(227, '1.1')),
        ('mobilenet', 224, 300_774_272),
        ('mobilenet:v1', 224, 568_740_352),
        ('shufflenet', 224, 144_907_992),
        ('shufflenet:x0.5', 224, 40_476_448),
        # by hand: 24² x 5² x 3 x 64, 12² x 5² x 64 x 64, 6² x 3² x (64 + 32) x 32, 6² x 32 x 1000
        ('cifar10:13pct', 24, 2_764_800 + 14_745_600 + 663_552 + 331_776 + 1_152_000),
    ],
)
def test_multiply_adds(preset, pixels, macs):
    net = build(classes=1000, **configfile.load(preset).model)
    found = network.summary(net, pixels)
    assert sum(layer.macs for layer in found) == macs
    params = jax.tree.leaves(network.shapes(net, pixels)['params'])
    assert sum(layer.parameters for layer in found) == sum(x.size for x in params)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('padding', [(1, 1), (0, 1)], ids=str)
def test_depthwise_convolutions_as_shifted_products(stride, padding):
    """Values and gradients equal XLA's grouped convolution, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = (
            jnp.asarray(rng.normal(size=(2, 8, 9, 5))),
            jnp.asarray(rng.normal(size=(3, 3, 5))),
        )
        place = {'stride': stride, 'padding': (padding, padding)}

        def grouped(x, kernel):
            return lax.conv_general_dilated(
                x,
                kernel[:, :, None],
                (stride, stride),
                (padding, padding),
                dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
                feature_group_count=5,
            )

        weight = rng.normal(size=grouped(x, kernel).shape)
        found, expected = (
            jax.value_and_grad(lambda x, k, f=f: jnp.sum(f(x, k) * weight), (0, 1))(x, kernel)
            for f in (lambda x, k: layers.depthwise(x, k, **place), grouped)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


@pytest.mark.parametrize('side', [7, 8])
def test_tensorflows_padding(side):
    found = blocks.same(3, 2, 'tensorflow', jnp.zeros((1, side, side, 1)))
    assert [*found] == [*lax.padtype_to_pads((side, side), (3, 3), (2, 2), 'SAME')]


@pytest.mark.parametrize('rate', [0.0, 0.001, 0.2, 0.5])
def test_dropout(rate):
    """It keeps the mean, and a row's mask is its own; at test time nothing is dropped."""
    x, key = jnp.ones((4, 10_000)), jax.random.key(0)
    train = network.Training(key, jnp.arange(4))
    y = layers.dropout(x, rate, train)
    assert {*np.unique(y).tolist()} <= {0.0, float(np.float32(1) / np.float32(1 - rate))}
    assert abs(np.mean(y == 0) - rate) < 0.01
    np.testing.assert_array_equal(layers.dropout(x, rate, None), x)
    half = layers.dropout(x[2:], rate, train._replace(rows=jnp.arange(2, 4)))
    np.testing.assert_array_equal(half, y[2:])
    if rate > 0.1:
        for other in ({'layer': 1}, {'tower': 1}):
            assert not np.array_equal(layers.dropout(x, rate, train, **other), y)


SMALL = {
    'squeezenet': {'width': 0.25},
    'mobilenet': {'width': 0.25},
    'mobilenet:v1': {'width': 0.25},
    'shufflenet': {'size': 'x0.5'},
    'alexnet_bn': {'width': 0.0625},
}
CROP = 64


def small(preset):
    model = {**configfile.load(preset).model, **SMALL[preset], 'dtype': 'float64'}
    return build(classes=5, **model)


@pytest.mark.parametrize(
    ('preset', 'shape'),
    [
        pytest.param('alexnet_bn', (2, 2), marks=pytest.mark.slow),
        *(
            pytest.param(preset, shape, marks=pytest.mark.full)
            for preset in SMALL
            for shape in ((2, 1), (4, 1), *([(1, 2)] if preset == 'alexnet_bn' else []))
        ),
    ],
    ids=str,
)
def test_every_mesh_computes_the_same(preset, shape):
    """Parameters and statistics after two steps, in float64, with dropout."""
    with jax.enable_x64(True):
        states = {}
        for name in ((1, 1), shape):
            net = small(preset)
            mesh = meshes.make(name, towers=net.towers, batches={})
            axis = 'model' if name[1] > 1 else None
            optimizer = optim.make(net, momentum=0.9, decay=1e-4, axis=axis)
            state = steps.init_state(net, optimizer, mesh, seed=0, crop=CROP)
            state = jax.tree.map(
                lambda x: (
                    x.astype(np.promote_types(x.dtype, np.float64)) if x.dtype == np.float32 else x
                ),
                state,
            )
            step = steps.make_train_step(
                net,
                optimizer,
                mesh,
                seed=0,
                mean=np.full((CROP, CROP, 3), 120.0),
                eigenvectors=np.eye(3),
                sigma=np.ones(3),
                std=0.0,
                rescale=False,
            )
            rng = np.random.default_rng(0)
            for _ in range(5):
                batch = {
                    'image': rng.integers(0, 256, (8, CROP, CROP, 3), dtype=np.uint8),
                    'z': np.zeros((8, 3)),
                    'label': rng.integers(0, 5, 8).astype(np.int32),
                }
                rates = {n: np.float64(0.01) for n in ('weights', 'biases', 'conv1', 'colour')}
                state, _ = step(state, meshes.global_batch(mesh, 8, batch), rates)
            states[name] = jax.device_get(state.variables)
        one, other = states.values()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, other
        )


@pytest.mark.parametrize(
    ('preset', 'changes', 'message'),
    [
        ('squeezenet', {'version': '1.2'}, "version='1.2': choose one of 1.0, 1.1"),
        ('squeezenet', {'width': 0.01}, 'width=0.01: leaves a fire module without kernels'),
        ('mobilenet', {'padding': 'keras'}, "padding='keras': choose one of tensorflow, torch"),
        ('mobilenet', {'version': 3}, 'version=3: choose one of 1, 2'),
        ('mobilenet', {'norm_momentum': 1.0}, 'norm_momentum=1.0: must be at least 0 and below 1'),
        ('mobilenet:v1', {'width': 0.03}, 'width=0.03: leaves no kernels; give at least 1/32'),
        ('mobilenet', {'dropout': 1.0}, 'dropout=1.0: must be at least 0 and below 1'),
        ('shufflenet', {'size': 'x2.0'}, "size='x2.0': choose one of x0.5, x1.0"),
        ('shufflenet', {'input_std': 0.0}, 'input_std=0.0: must be above 0'),
        ('alexnet_bn', {'width': 0.3}, 'cannot be divided over towers=2'),
    ],
)
def test_impossible_fields_are_one_line(preset, changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(classes=5, **{**configfile.load(preset).model, **changes})
    assert '\n' not in str(error.value)
