"""Pruning, k-means and shared weights against plain references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import compression, inference
from tests.helpers.run_dirs import without_tensorflow, write_run

SETTINGS = compression.Settings(
    prune={'conv': 0.5, 'fc': 1.5},
    bits={'conv': 5, 'fc': 2},
    rounds=2,
    epochs=7.0,
    tune=7.0,
    rate=0.1,
    tune_rate=1e-4,
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


def lloyd(values, centers):
    """k-means, value by value."""
    while True:
        groups = [int(np.argmin([abs(v - c) for c in centers])) for v in values]
        means = [
            np.mean([v for v, g in zip(values, groups, strict=True) if g == k])
            if k in groups
            else c
            for k, c in enumerate(centers)
        ]
        if np.allclose(means, centers, rtol=0, atol=1e-12):
            return np.array([c for k, c in enumerate(centers) if k in groups])
        centers = means


@pytest.mark.parametrize('count', [1, 2, 5, 32])
def test_k_means(count):
    values = np.random.default_rng(count).normal(size=150).astype(np.float32)
    values[0] = 9  # leaves groups empty
    found = compression.k_means(values, count)
    expected = lloyd(values.astype(float), np.linspace(values.min(), values.max(), count))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_k_means_of_few_values():
    assert compression.k_means(np.zeros(0, np.float32), 4).shape == (0,)
    assert compression.k_means(np.full(5, 0.3, np.float32), 4).tolist() == [np.float32(0.3)]


def test_shared():
    kernel = np.float32([[0, 1.0, 1.2, -3], [0.1, 0, 1.1, -3.2]])
    groups, values = compression.shared(kernel, 4)
    assert groups.tolist() == [[0, 3, 3, 1], [2, 0, 3, 1]]
    np.testing.assert_allclose(values, [[0, 1.1, 1.1, -3.1], [0.1, 0, 1.1, -3.1]], rtol=1e-6)
    assert (
        compression.merged(values + np.float32([[1e-7], [0]]), groups)[1, 2] == values[0, 1] + 1e-7
    )
    empty = np.zeros((2, 3), np.float32)
    groups, values = compression.shared(empty, 4)
    assert not groups.any() and not values.any()
    assert not compression.merged(empty, groups).any()


def test_pruned():
    """The threshold is relative to the trained kernel; what an earlier round removed stays removed."""
    dense = {'a': np.float32([3, -1, 1, -3])}
    now = {'a': np.float32([0, -1.2, 1.2, 4])}
    assert dense['a'].std() == pytest.approx(5**0.5)
    assert compression.pruned(dense, now, {'a': 0.53})['a'].tolist() == [0, *now['a'][1:]]
    assert compression.pruned(dense, now, {'a': 0.54})['a'].tolist() == [0, 0, 0, 4]


class Roles:
    @staticmethod
    def role(path):
        return path[-1]


def decayed():
    """Momentum and decay, both of which could move a weight of 0."""
    return optax.with_extra_args_support(
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
    )


def test_zeros_stay():
    params = {'a': {'kernel': jnp.float32([0, 1, 0, 2]), 'bias': jnp.zeros(2)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    update = compression.keep_zeros(Roles, decayed())
    plain, state, other = decayed(), update.init(params), decayed().init(params)
    expected = params
    for _ in range(3):
        changes, state = update.update(gradients, state, params)
        params = optax.apply_updates(params, changes)
        changes, other = plain.update(gradients, other, expected)
        expected = optax.apply_updates(expected, changes)
    assert params['a']['kernel'][::2].tolist() == [0, 0]
    np.testing.assert_array_equal(params['a']['kernel'][1::2], expected['a']['kernel'][1::2])
    np.testing.assert_array_equal(params['a']['bias'], expected['a']['bias'])  # 0 at first, too


def test_shared_weights_move_by_the_gradients_of_their_values():
    """As if the values were the parameters."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, (5, 6)).astype(np.int16)
    values = jnp.float32([0, -1, 0.5, 2])
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 6))

    def loss(params):
        return jnp.sum((x @ params['a']['kernel'] + params['a']['bias'][None] - y) ** 2)

    def of_values(values, bias):
        table = values.at[0].set(0)
        return loss({'a': {'kernel': table[groups], 'bias': bias}})

    update = compression.share(
        optax.with_extra_args_support(optax.sgd(0.001, momentum=0.9)), {'a/kernel': groups}
    )
    params = {'a': {'kernel': values[groups], 'bias': jnp.zeros(6)}}
    state, bias, velocity = update.init(params), jnp.zeros(6), [0.0, 0.0]
    for _ in range(3):
        changes, state = update.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, changes)
        found = jax.grad(of_values, argnums=(0, 1))(values, bias)
        velocity = [0.9 * v + g for v, g in zip(velocity, found, strict=True)]
        values, bias = values - 0.001 * velocity[0], bias - 0.001 * velocity[1]
    np.testing.assert_allclose(params['a']['kernel'], values[groups], rtol=1e-5)
    np.testing.assert_allclose(params['a']['bias'], bias, rtol=1e-5)
    assert not np.asarray(params['a']['kernel'])[groups == 0].any()


def compressed(run, monkeypatch, settings=SETTINGS):
    without_tensorflow(monkeypatch)
    mesh = meshes.make((1, 1), towers=1, batches={})
    opened = inference.open_run(run.path, mesh)
    return compression.compress(opened, inference.open_store([opened]), mesh, settings)


def test_a_network(run, monkeypatch):
    """Pruned weights stay pruned through retraining; a second call gives the same result."""
    trained, train = [], compression._train

    def spy(setup, variables, start):
        found = train(setup, variables, start)
        trained.append([compression.kernels(run.net, x['params']) for x in (variables, found[0])])
        return found

    monkeypatch.setattr(compression, '_train', spy)
    found = compressed(run, monkeypatch)
    assert len(trained) == SETTINGS.rounds + 1
    for before, after in trained:
        assert len(before) == 8
        for name in before:
            np.testing.assert_array_equal(before[name] == 0, after[name] == 0)
            assert 0.1 < np.mean(before[name] == 0) < 0.95
            assert (before[name] != after[name]).any()
    kernels = compression.kernels(run.net, found['params'])
    for name, x in kernels.items():
        np.testing.assert_array_equal(x == 0, trained[-1][0][name] == 0)
        assert len(np.unique(x[x != 0])) <= 2 ** SETTINGS.bits[compression.kind(x)]
    again = compressed(run, monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_training_that_diverges(run, monkeypatch):
    with pytest.raises(UserError, match='not finite after .* lower --rate'):
        compressed(run, monkeypatch, SETTINGS._replace(rate=1e6, epochs=50.0))
