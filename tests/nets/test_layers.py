"""`layers.py` against plain NumPy references in float64, and the references against other formulas."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from alexnet_jax.devices import backend
from alexnet_jax.nets import layers
from alexnet_jax.nets.network import Training
from tests.helpers import references

# kernel size, stride, padding, (height, width), input and output channels
CONVS = {
    'first layer, 3 zeros right and below': (11, 4, ((0, 3), (0, 3)), (16, 20), 3, 4),
    'second layer': (5, 1, ((2, 2), (2, 2)), (7, 7), 4, 3),
    'third layer': (3, 1, ((1, 1), (1, 1)), (6, 6), 4, 5),
    'pixels left over': (3, 2, ((0, 0), (0, 0)), (8, 6), 2, 3),
    'four different paddings': (3, 2, ((2, 1), (0, 3)), (7, 6), 2, 3),
}
# alpha (of each square), k, n, beta; docs/original.md §2
LRNS = {
    'paper, literally': (1e-4, 2.0, 5, 0.75),
    'source': (1e-4 / 5, 2.0, 5, 0.75),
    'caffe': (1e-4 / 5, 1.0, 5, 0.75),
    'strong, another power': (0.1, 1.5, 3, 0.6),
}
MAP_NORMS = {
    'source, layer 2': (1e-3 / 25, 1.0, 5, 0.75),
    'source, CIFAR-10': (5e-5 / 9, 1.0, 3, 0.75),
    'strong, another power': (0.1, 1.5, 3, 0.6),
}
FORMS = pytest.mark.parametrize(
    'form', [backend.CPU, backend.GPU, backend.TPU], ids=['cpu', 'gpu', 'tpu']
)
NORMS = [
    pytest.param(layer, window, *constants, id=f'{layer.__name__}: {name}')
    for layer, window, table in (
        (layers.lrn, references.channel_window, LRNS),
        (layers.map_norm, references.map_window, MAP_NORMS),
    )
    for name, constants in table.items()
]
# input size, window, stride, output size: overlapping (ImageNet, CIFAR-10) and run #147's
POOLS = [
    (55, 3, 2, 27),
    (27, 3, 2, 13),
    (13, 3, 2, 6),
    (32, 3, 2, 16),
    (16, 3, 2, 8),
    (8, 3, 2, 4),
    (24, 3, 2, 12),
    (12, 3, 2, 6),
    (55, 2, 2, 28),
    (26, 2, 2, 13),
    (11, 2, 2, 6),
    (10, 2, 3, 4),
]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(actual, expected):
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def value_and_gradients(layer, g, *inputs):
    """The layer's output for float64 inputs, and the gradients of sum(g * output) for each."""
    with jax.enable_x64(True):
        pull = jax.jit(lambda g, *inputs: (lambda y, back: (y, back(g)))(*jax.vjp(layer, *inputs)))
        y, gradients = pull(jnp.asarray(g), *map(jnp.asarray, inputs))
        return np.asarray(y), [np.asarray(gradient) for gradient in gradients]


def numerical_gradient(f, x, g, step=1e-5):
    """Central differences of sum(g * f(x)) for each element of x."""
    gradient = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        change = np.zeros(x.shape)
        change[at] = step
        gradient[at] = np.sum(g * (f(x + change) - f(x - change))) / (2 * step)
    return gradient


@pytest.mark.parametrize('case', CONVS.values(), ids=CONVS)
class TestConv:
    def arrays(self, case):
        k, stride, padding, size, inputs, outputs = case
        x, kernel = normal(0, 2, *size, inputs), normal(1, k, k, inputs, outputs)
        bias = normal(2, outputs)
        g = normal(3, *references.conv(x, kernel, bias, stride, padding).shape)
        return x, kernel, bias, g, {'stride': stride, 'padding': padding}

    def test_layer(self, case):
        x, kernel, bias, g, how = self.arrays(case)
        y, gradients = value_and_gradients(lambda *a: layers.conv(*a, **how), g, x, kernel, bias)
        close(y, references.conv(x, kernel, bias, **how))
        expected = references.conv_grad(x, kernel, g, **how)
        for i in range(3):
            close(gradients[i], expected[i])

    def test_reference_value(self, case):
        x, kernel, bias, _, how = self.arrays(case)
        padded = np.pad(x, ((0, 0), *how['padding'], (0, 0)))
        for b, o in np.ndindex(x.shape[0], kernel.shape[3]):
            everywhere = scipy.signal.correlate(padded[b], kernel[..., o], 'valid', 'direct')
            expected = everywhere[:: how['stride'], :: how['stride'], 0] + bias[o]
            close(references.conv(x, kernel, bias, **how)[b, ..., o], expected)

    def test_reference_gradient(self, case):
        x, kernel, bias, g, how = self.arrays(case)
        x, g = x[:1], g[:1]
        dx, dkernel, dbias = references.conv_grad(x, kernel, g, **how)
        # The loss is linear in each input, so one random direction per input is enough.
        for change, gradient, moved in (
            (normal(4, *x.shape), dx, lambda c: (x + c, kernel, bias)),
            (normal(5, *kernel.shape), dkernel, lambda c: (x, kernel + c, bias)),
            (normal(6, *bias.shape), dbias, lambda c: (x, kernel, bias + c)),
        ):
            up, down = (references.conv(*moved(sign * change), **how) for sign in (1, -1))
            difference = np.sum(g * (up - down)) / 2
            np.testing.assert_allclose(np.sum(gradient * change), difference, rtol=1e-9)


def test_conv1_reads_three_zeros_beyond_the_right_and_lower_edges():
    """224 pixels give 55 x 55, and the last window covers 8 of 11 rows (docs/original.md §1)."""
    ones, kernel = np.ones((1, 224, 224, 1), np.float32), np.ones((11, 11, 1, 1), np.float32)
    y = layers.conv(ones, kernel, np.zeros(1, np.float32), stride=4, padding=((0, 3), (0, 3)))
    assert y.shape == (1, 55, 55, 1)
    y = np.asarray(y)[0, :, :, 0]
    assert y[0, 0] == y[53, 53] == 121 and y[54, 0] == y[0, 54] == 88 and y[54, 54] == 64


@pytest.mark.parametrize('layer', ['conv', 'local', 'dense'])
def test_bias_gradients_of_bfloat16_are_summed_in_float32(layer):
    """In bfloat16 a sum of 20,000 ones would stop at 256, where the next number is 258."""
    x, kernel, bias = {
        'conv': ((20, 32, 32, 1), (1, 1, 1, 2), (2,)),
        'local': ((20_480, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2)),
        'dense': ((20_480, 1), (1, 2), (2,)),
    }[layer]
    x, kernel = (jnp.ones(shape, jnp.bfloat16) for shape in (x, kernel))
    y, gradient = jax.vjp(
        functools.partial(getattr(layers, layer), x, kernel), jnp.zeros(bias, np.float32)
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(gradient)(jnp.ones_like(y))[0], np.full(bias, 20_480))


@pytest.mark.parametrize('power', [0.75, 0.6])
def test_norms_of_bfloat16_are_rounded_once(power):
    x = jnp.asarray(10 * normal(0, 2, 5, 5, 8), jnp.bfloat16)
    constants = {'alpha': 1e-3, 'k': 2.0, 'n': 5, 'beta': power}
    (y, back), (exact, backward) = (
        jax.vjp(functools.partial(layers.lrn, **constants), x.astype(dtype))
        for dtype in ('bfloat16', 'float32')
    )
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
    gradient, expected = back(y)[0], backward(y.astype(jnp.float32))[0]
    np.testing.assert_array_equal(gradient, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize('form', [backend.GPU, backend.TPU], ids=['gpu', 'tpu'])
def test_norms_of_bfloat16_on_accelerators(form):
    """They are as close to float64 as the form on CPUs, within 15%."""
    x, g = 60 * normal(0, 9, 9, 9, 96), normal(1, 9, 9, 9, 96)
    x, g = (jnp.asarray(array, jnp.bfloat16) for array in (x, g))
    constants = {'alpha': 1e-4, 'k': 2.0, 'n': 5, 'beta': 0.75}
    window = references.channel_window
    exact = references.normalize(np.float64(x), window, **constants)
    gradient = references.normalize_grad(np.float64(x), np.float64(g), window, **constants)

    def errors(form):
        with backend.using(form):
            y, back = jax.vjp(functools.partial(layers.lrn, **constants), x)
            (dx,) = back(g)
        pairs = (y, exact), (dx, gradient)
        return [np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in pairs]

    for own, plain in zip(errors(form), errors(backend.CPU), strict=True):
        assert own < 1.15 * plain < 0.003, (own, plain)


def test_dense():
    x, kernel, bias, g = normal(0, 3, 7), normal(1, 7, 4), normal(2, 4), normal(3, 3, 4)
    y, gradients = value_and_gradients(layers.dense, g, x, kernel, bias)
    close(y, references.dense(x, kernel, bias))
    for actual, expected in zip(gradients, references.dense_grad(x, kernel, g), strict=True):
        close(actual, expected)
    close(value_and_gradients(layers.dense, g, x, kernel)[0], references.dense(x, kernel, 0 * bias))


def test_dense_reference():
    x, kernel, bias, g = normal(0, 3, 7), normal(1, 7, 4), normal(2, 4), normal(3, 3, 4)
    close(references.dense(x, kernel, bias), np.einsum('bi,io->bo', x, kernel) + bias[None])
    for gradient, f, at in zip(
        references.dense_grad(x, kernel, g),
        (
            lambda a: references.dense(a, kernel, bias),
            lambda a: references.dense(x, a, bias),
            lambda a: references.dense(x, kernel, a),
        ),
        (x, kernel, bias),
        strict=True,
    ):
        np.testing.assert_allclose(gradient, numerical_gradient(f, at, g), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(('layer', 'window', 'alpha', 'k', 'n', 'beta'), NORMS)
class TestNorms:
    # Values up to a hundred, as after conv1, so that the small alphas matter as much as k.
    @FORMS
    def test_layer(self, layer, window, alpha, k, n, beta, form):
        x, g = 60 * normal(0, 2, 6, 7, 8), normal(1, 2, 6, 7, 8)
        with backend.using(form):
            y, (dx,) = value_and_gradients(
                lambda x: layer(x, alpha=alpha, k=k, n=n, beta=beta), g, x
            )
        close(y, references.normalize(x, window, alpha, k, n, beta))
        close(dx, references.normalize_grad(x, g, window, alpha, k, n, beta))

    def test_reference_value(self, layer, window, alpha, k, n, beta):
        x = 60 * normal(0, 2, 6, 7, 8)
        axes = (3,) if window is references.channel_window else (1, 2)
        sums = np.square(x)
        for axis in axes:
            sums = scipy.ndimage.convolve1d(sums, np.ones(n), axis=axis, mode='constant')
        expected = x / (k + alpha * sums) ** beta
        close(references.normalize(x, window, alpha, k, n, beta), expected)

    def test_reference_gradient(self, layer, window, alpha, k, n, beta):
        x, g = 60 * normal(0, 1, 4, 3, 4), normal(1, 1, 4, 3, 4)
        numerical = numerical_gradient(
            lambda x: references.normalize(x, window, alpha, k, n, beta), x, g, step=1e-3
        )
        gradient = references.normalize_grad(x, g, window, alpha, k, n, beta)
        np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-8)


def test_lrn_of_ones():
    """docs/original.md §11: 5 squares at an interior channel of a tower, 3 at its first and last."""
    with jax.enable_x64(True):
        y = layers.lrn(jnp.ones((1, 1, 1, 48)), alpha=1e-4 / 5, k=2.0, n=5, beta=0.75)
        y = np.asarray(y)[0, 0, 0]
    close(y[2:-2], np.full(44, 1 / (2 + 5 * 2e-5) ** 0.75))
    close(y[[1, -2]], np.full(2, 1 / (2 + 4 * 2e-5) ** 0.75))
    close(y[[0, -1]], np.full(2, 1 / (2 + 3 * 2e-5) ** 0.75))


def test_map_norm_of_ones():
    """docs/original.md §2.3: 25 squares of the same map inside, 15 at an edge, 9 in a corner."""
    with jax.enable_x64(True):
        y = layers.map_norm(jnp.ones((1, 6, 6, 3)), alpha=1e-3 / 25, k=1.0, n=5, beta=0.75)
        y = np.asarray(y)[0]
    for at, count in (((2, 3), 25), ((0, 3), 15), ((3, 5), 15), ((0, 5), 9)):
        close(y[at], np.full(3, 1 / (1 + count * 4e-5) ** 0.75))


@pytest.mark.parametrize(('size', 'window', 'stride', 'out'), POOLS)
class TestMaxPool:
    # All values are negative: zero padding would win every partial window.
    @FORMS
    def test_layer(self, size, window, stride, out, form):
        x, g = normal(0, 1, size, size - 1, 2) - 10, normal(1, 1, out, out, 2)
        x = np.concatenate([x, x[:, :, :1] - 0.5], axis=2)
        with backend.using(form):
            y, (dx,) = value_and_gradients(
                lambda x: layers.max_pool(x, window=window, stride=stride), g, x
            )
        assert y.shape == (1, out, out, 2)
        close(y, references.max_pool(x, window, stride))
        close(dx, references.max_pool_grad(x, g, window, stride))

    def test_reference(self, size, window, stride, out):
        x, g = normal(0, 1, size, size, 2) - 10, normal(1, 1, out, out, 2)
        everywhere = scipy.ndimage.maximum_filter(
            x,
            (1, window, window, 1),
            mode='constant',
            cval=-np.inf,
            origin=(0, -(window // 2), -(window // 2), 0),
        )
        expected = everywhere[:, ::stride, ::stride][:, :out, :out]
        close(references.max_pool(x, window, stride), expected)
        # Max pooling is locally linear: the gradient times a small change gives the output's change.
        change = 1e-9 * normal(2, *x.shape)
        up, down = (references.max_pool(x + sign * change, window, stride) for sign in (1, -1))
        np.testing.assert_allclose(
            np.sum(references.max_pool_grad(x, g, window, stride) * change),
            np.sum(g * (up - down)) / 2,
            rtol=1e-4,
        )


@pytest.mark.parametrize(('size', 'window', 'stride', 'out'), POOLS)
def test_avg_pool(size, window, stride, out):
    x, g = normal(0, 2, size, size - 1, 3), normal(1, 2, out, out, 3)
    x = np.concatenate([x, x[:, :, :1]], axis=2)
    y, (dx,) = value_and_gradients(lambda x: layers.avg_pool(x, window=window, stride=stride), g, x)
    close(y, references.avg_pool(x, window, stride))
    close(dx, references.avg_pool_grad(x, g, window, stride))


def test_local():
    x, kernel, bias = normal(0, 2, 4, 5, 3), normal(1, 4, 5, 27, 2), normal(2, 4, 5, 2)
    g = normal(3, 2, 4, 5, 2)
    y, gradients = value_and_gradients(layers.local, g, x, kernel, bias)
    close(y, references.local(x, kernel, bias))
    for i, (value, gradient) in enumerate(zip((x, kernel, bias), gradients, strict=True)):
        # It is linear in each input: a change in the sum is the change in the input times the gradient.
        change = normal(4 + i, *value.shape)
        moved = [x, kernel, bias]
        moved[i] = value + change
        up = np.sum(g * (references.local(*moved) - references.local(x, kernel, bias)))
        close(np.sum(gradient * change), up)


@FORMS
@pytest.mark.parametrize(('size', 'window', 'stride', 'out'), POOLS[1::3])
def test_max_pool_of_ties_loses_no_gradient(size, window, stride, out, form):
    """After a ReLU most maxima are tied zeros: an output's gradient goes to one of its maxima."""
    x = np.random.default_rng(0).integers(0, 2, size=(2, size, size, 2)).astype(np.float64)
    x[1] = 0
    g = 1 + np.random.default_rng(1).random(size=(2, out, out, 2))
    with backend.using(form):
        y, (dx,) = value_and_gradients(
            lambda x: layers.max_pool(x, window=window, stride=stride), g, x
        )
    close(dx.sum(axis=(1, 2)), g.sum(axis=(1, 2)))
    close(np.sum(dx * x), np.sum(g * y))  # in a window with a one, no zero got anything
    close(dx, references.max_pool_grad(x, g, window, stride))


@functools.partial(jax.jit, static_argnames='units')
def jitted_mask(key, rows, tower, units):
    return layers.dropout_mask(key, rows, tower, units)


class TestDropoutMask:
    def mask(self, rows, tower=0, units=4096, seed=0):
        return np.asarray(jitted_mask(jax.random.key(seed), jnp.asarray(rows), tower, units))

    def test_belongs_to_the_row_not_to_the_batch(self):
        whole = self.mask(np.arange(16))
        parts = [self.mask(np.arange(4)), self.mask(np.arange(4, 16))]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        np.testing.assert_array_equal(whole[[9, 2]], self.mask([9, 2]))

    def test_is_the_same_without_jit(self):
        mask = layers.dropout_mask(jax.random.key(0), jnp.arange(2), 1, 100)
        np.testing.assert_array_equal(mask, self.mask(np.arange(2), tower=1, units=100))

    def test_rows_towers_and_keys_are_independent(self):
        rows = [0, 1, 2]
        masks = [*self.mask(rows), *self.mask(rows, tower=1), *self.mask(rows, seed=1)]
        for i in range(len(masks)):
            for j in range(i):  # 4096 fair coins agree 2048 times, with a standard deviation of 32
                assert abs(np.sum(masks[i] == masks[j]) - 2048) < 5 * 32

    def test_every_unit_stays_half_the_time(self):
        mask = self.mask(np.arange(1024))
        assert abs(mask.mean() - 0.5) < 5 * 0.5 / mask.size**0.5
        np.testing.assert_allclose(mask.mean(axis=0), 0.5, atol=6 * 0.5 / 1024**0.5)
        np.testing.assert_allclose(mask.mean(axis=1), 0.5, atol=6 * 0.5 / 4096**0.5)

    def test_units_are_independent(self):
        signs = np.where(self.mask(np.arange(1024)), 1.0, -1.0)
        for distance in (1, 2, 16, 31, 32, 33, 1024):
            products = signs[:, distance:] * signs[:, :-distance]
            assert abs(products.mean()) < 5 / products.size**0.5

    @pytest.mark.parametrize('units', [1, 31, 33])
    def test_any_number_of_units(self, units):
        mask = self.mask([3, 5], units=units)
        assert mask.shape == (2, units) and mask.dtype == bool


def test_exchange_keeps_the_tower_order():
    a, b = normal(0, 2, 3, 3, 4).astype(np.float32), normal(1, 2, 3, 3, 4).astype(np.float32)
    both = np.concatenate([a, b], axis=-1)
    np.testing.assert_array_equal(layers.exchange((jnp.asarray(a), jnp.asarray(b))), both)
    mesh = jax.make_mesh((1, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    on_mesh = jax.shard_map(
        lambda towers: layers.exchange((towers[0],), 'model')[None],
        mesh=mesh,
        in_specs=P('model'),
        out_specs=P('model'),
    )
    np.testing.assert_array_equal(jax.jit(on_mesh)(np.stack([a, b])), np.stack([both, both]))


# --- batch normalization, against flax.linen.BatchNorm

TRAINING = Training(jax.random.key(0), jnp.arange(8))


def flax_norm(x, variables, training):
    """(normalized, new statistics, gradients of a weighted sum by input, scale and bias)."""
    norm = nn.BatchNorm(use_running_average=not training, momentum=0.9, dtype=x.dtype)

    def loss(x, params):
        y, new = norm.apply({**variables, 'params': params}, x, mutable=['batch_stats'])
        return jnp.sum(jnp.sin(y)), (y, new.get('batch_stats', variables['batch_stats']))

    gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(x, variables['params'])
    return y, stats, gradients


def norm_variables(channels, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low: jnp.asarray(rng.uniform(low, low + 1, channels), jnp.float32)  # noqa: E731
    return {
        'params': {'scale': draw(0.5), 'bias': draw(-0.5)},
        'batch_stats': {'mean': draw(-0.5), 'var': draw(0.5)},
    }


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(8, 5, 4, 3), (8, 6)], ids=str)
@pytest.mark.parametrize('data', [None, 2, 4])
def test_batch_norm_is_that_of_flax(shape, training, data):
    """On several devices, the batch statistics and their gradients are the same as on one."""
    x, variables = 3 * normal(0, *shape).astype(np.float32) + 1, norm_variables(shape[-1])
    norm = layers.BatchNorm(data_axis='data' if data else None)
    train = TRAINING if training else None

    def loss(x, params):
        variables_ = {**variables, 'params': params}
        y, new = norm.apply(variables_, x, train, mutable=['batch_stats'])
        return jnp.sum(jnp.sin(y)), (y, new['batch_stats'])

    def everything(x, params):
        gradients, (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return y, stats, gradients

    if data:
        mesh = jax.make_mesh(
            (data,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:data]
        )
        outs = (P('data'), P(), (P('data'), P()))
        everything = jax.shard_map(everything, mesh=mesh, in_specs=(P('data'), P()), out_specs=outs)
    found = jax.jit(everything)(x, variables['params'])
    expected = flax_norm(jnp.asarray(x), variables, training)
    check = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(check, found, expected)


def test_batch_norm_of_towers_is_each_towers_own():
    """Scales, biases and statistics are stacked in tower order."""
    towers = tuple(3 * normal(seed, 8, 5, 4, 3).astype(np.float32) + seed for seed in (1, 2))
    each = [norm_variables(3, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    norm = layers.BatchNorm()
    ys, new = norm.apply(stacked, towers, TRAINING, mutable=['batch_stats'])
    for t, (x, variables) in enumerate(zip(towers, each, strict=True)):
        y, stats, _ = flax_norm(jnp.asarray(x), variables, True)
        np.testing.assert_allclose(ys[t], y, rtol=2e-4, atol=2e-5)
        for name in stats:
            np.testing.assert_allclose(new['batch_stats'][name][t], stats[name], rtol=1e-5)


@pytest.mark.parametrize('frozen', [('norm',), ('block',), ('block/norm',), ('block/no', 'norm')])
def test_a_frozen_batch_norm_is_as_at_test_time(frozen):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train=None):
            return layers.BatchNorm(name='norm')(x, train)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=None):
            return Block(name='block')(x, train)

    x, own = normal(0, 8, 6).astype(np.float32), norm_variables(6)
    variables = {kind: {'block': {'norm': leaves}} for kind, leaves in own.items()}
    train = TRAINING._replace(frozen=frozen)
    y, new = Net().apply(variables, x, train, mutable=['batch_stats'])
    is_frozen = any(name in ('block', 'block/norm') for name in frozen)
    assert np.array_equal(y, Net().apply(variables, x)) == is_frozen
    same = jax.tree.map(np.array_equal, new['batch_stats'], variables['batch_stats'])
    assert {*jax.tree.leaves(same)} == {is_frozen}


def test_batch_norm_of_bfloat16_has_float32_statistics():
    x, variables = normal(0, 64, 6).astype(jnp.bfloat16) + jnp.bfloat16(50), norm_variables(6)
    norm = layers.BatchNorm()
    y, new = norm.apply(variables, x, TRAINING, mutable=['batch_stats'])
    assert y.dtype == jnp.bfloat16
    mean = 0.9 * variables['batch_stats']['mean'] + 0.1 * np.float64(x).mean(0)
    assert new['batch_stats']['mean'].dtype == jnp.float32
    np.testing.assert_allclose(new['batch_stats']['mean'], mean, rtol=1e-5)
