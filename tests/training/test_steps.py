"""The training and prediction steps on one device: the network's inputs, and what is counted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.devices import backend
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.training import optim, steps
from configs import base

SIZE, CROP, CLASSES = 72, 64, 10


@pytest.fixture(scope='module')
def mesh():
    return meshes.make((1, 1), towers=2, batches={})


@pytest.fixture(scope='module')
def net():
    config = base.get_config()
    config.model.width = 0.25
    return build(classes=CLASSES, **config.model)


def test_ten_crops_are_the_corners_the_center_and_their_mirror_images():
    """`docs/original.md` §11, in the order of the 2012 source code."""
    windows = [(int(y * 32), int(x * 32)) for y, x, _ in steps.VIEWS['ten']]
    assert windows == 2 * [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    assert [flip for *_, flip in steps.VIEWS['ten']] == [False] * 5 + [True] * 5
    assert [(int(y * 32), int(x * 32), f) for y, x, f in steps.VIEWS['center']] == [(16, 16, False)]


@pytest.mark.parametrize('views', ['center', 'ten'])
def test_predict_averages_the_probabilities_of_the_views(net, mesh, views):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    mean = rng.uniform(0, 255, (SIZE, SIZE, 3)).astype(np.float32)
    variables = network.init(net, jax.random.key(0), CROP)
    predict = steps.make_predict(net, mesh, mean=mean, views=views, crop=CROP)
    room = SIZE - CROP
    window = mean[room // 2 : room // 2 + CROP, room // 2 : room // 2 + CROP]  # for every view
    expected, apply = [], jax.jit(net.apply)
    for y, x, flip in steps.VIEWS[views]:
        y, x = int(y * room), int(x * room)
        crops = images[:, y : y + CROP, x : x + CROP]
        crops = crops[:, :, ::-1] if flip else crops
        logits = np.float64(apply(variables, np.float32(crops) - window)[0])
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected.append(powers / powers.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(predict(variables, images), np.mean(expected, axis=0), atol=1e-6)


def make_step(net, mesh, **changes):
    rng = np.random.default_rng(1)
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    settings = {
        'seed': 0,
        'mean': rng.uniform(0, 255, (CROP, CROP, 3)).astype(np.float32),
        'eigenvectors': axes.astype(np.float32),
        'sigma': np.array([120.0, 37, 20], np.float32),
        'std': 0.1,
        'rescale': True,
    }
    settings.update(changes)
    optimizer = optim.make(net, name='sgd', momentum=0.9, decay=5e-4, trust=0.0)
    state = steps.init_state(net, optimizer, mesh, seed=0, crop=CROP)
    return steps.make_train_step(net, optimizer, mesh, **settings), state, settings


def make_batch(count=4):
    rng = np.random.default_rng(2)
    return {
        'image': rng.integers(0, 256, (count, CROP, CROP, 3), dtype=np.uint8),
        'z': rng.normal(size=(count, 3)).astype(np.float32),
        'label': rng.integers(0, CLASSES, count).astype(np.int32),
    }


RATES = {
    name: np.float32(value)
    for name, value in {'weights': 0.01, 'biases': 0.02, 'conv1': 0.01, 'colour': 1}.items()
}


@pytest.mark.parametrize(
    'form',
    [pytest.param(backend.CPU, marks=pytest.mark.full), backend.GPU],
    ids=['cpu', 'accelerator'],
)
def test_several_steps_in_one_program_equal_single_steps(net, mesh, monkeypatch, form):
    """On CPUs the loop is unrolled, because their convolutions are slow inside a loop."""
    monkeypatch.setattr(backend, 'CPU', form)
    step, state, settings = make_step(net, mesh)
    several, alone, _ = make_step(net, mesh, several=True)
    batches = [{**make_batch(), 'label': np.int32([i, 1, 2, 0])} for i in range(3)]
    rates = [{**RATES, 'weights': np.float32(rate)} for rate in (0.01, 0.002, 0.05)]
    sums = []
    for batch, one in zip(batches, rates, strict=True):
        state, done = step(state, batch, one)
        sums.append(done)

    def stack(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    compiled = several.lower(alone, stack(batches), stack(rates)).compile()
    assert ('jit(chain)/while/body' in compiled.as_text()) == form.loop
    alone, together = compiled(alone, stack(batches), stack(rates))
    assert alone.step == 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), alone, state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), together, stack(sums))


@pytest.mark.slow
def test_no_step_of_several_comes_after_one_that_is_not_finite(net, mesh):
    step, state, _ = make_step(net, mesh)
    several, start, _ = make_step(net, mesh, several=True)
    one = make_batch()
    batches = {name: np.stack([x] * 4) for name, x in one.items()}
    batches['z'][1] = np.nan
    state, _ = step(state, one, RATES)
    end, sums = several(start, batches, {name: np.repeat(rate, 4) for name, rate in RATES.items()})
    assert list(np.isfinite(sums['loss'])) == [True, False, True, True]
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), end.params, state.params
    )


@pytest.mark.parametrize('color', [1.0, 0.0])
@pytest.mark.parametrize('rescale', [True, False])
def test_loss_is_that_of_the_normalized_noisy_pictures(net, mesh, color, rescale):
    """Noise 0.1 * sum of z_k sigma_k v_k after the mean; / 1.1 only with noise (`docs/original.md` §5)."""
    step, state, settings = make_step(net, mesh, rescale=rescale)
    batch = make_batch()
    z_sigma = batch['z'] * settings['sigma']
    noise = 0.1 * sum(np.outer(z_sigma[:, k], settings['eigenvectors'][:, k]) for k in range(3))
    x = np.float32(batch['image']) - settings['mean'] + color * noise[:, None, None, :]
    x = x / 1.1 if rescale and color else x
    key = jax.random.fold_in(jax.random.key(0), 0)
    logits, _ = jax.jit(net.apply)(
        state.variables, np.float32(x), network.Training(key, jnp.arange(4))
    )
    logits = np.float64(logits)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), batch['label']]
    _, sums = step(state, batch, {**RATES, 'colour': np.float32(color)})
    np.testing.assert_allclose(sums['loss'], losses.sum(), rtol=1e-5)
    assert sums['count'] == 4


@pytest.mark.slow
def test_gradient_is_the_mean_over_the_batch(net, mesh):
    """A first step, without past momentum, moves by rate * (mean gradient + decay * kernel)."""
    step, state, settings = make_step(net, mesh, std=0.0, rescale=False)
    batch, before = make_batch(), jax.tree.map(np.asarray, state.params)
    x = jnp.float32(batch['image']) - settings['mean'][None]
    key = jax.random.fold_in(jax.random.key(0), 0)

    def loss(params):
        logits, _ = net.apply({'params': params}, x, network.Training(key, jnp.arange(4)))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), batch['label']])

    grads = jax.jit(jax.grad(loss))(before)
    after, _ = step(state, batch, RATES)
    assert after.step == 1
    for layer, leaves in grads.items():
        for name, g in leaves.items():
            rate, decay = (0.01, 5e-4) if name == 'kernel' else (0.02, 0)
            expected = -rate * (g + decay * before[layer][name])
            moved = optim.velocity(after.opt_state)[layer][name]
            scale = float(jnp.abs(expected).max()) + 1e-12
            np.testing.assert_allclose(moved / scale, expected / scale, atol=2e-4)
            np.testing.assert_array_equal(after.params[layer][name], before[layer][name] + moved)


def test_each_step_draws_other_masks(net, mesh):
    step, state, _ = make_step(net, mesh)
    batch, still = make_batch(), {name: np.float32(0) for name in RATES}
    state, first = step(state, batch, still)
    state, second = step(state, batch, still)
    assert first['loss'] != second['loss']


def test_a_loss_that_is_not_finite_updates_nothing(net, mesh):
    step, state, _ = make_step(net, mesh)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    batch = make_batch()
    batch['z'][2, 0] = np.inf
    state, sums = step(state, batch, RATES)
    assert not np.isfinite(sums['loss']) and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)


def test_the_step_is_compiled_once(net, mesh):
    step, state, _ = make_step(net, mesh)
    for rate in (0.01, 0.001, 0.0):
        state, _ = step(state, make_batch(), {**RATES, 'weights': np.float32(rate)})
    assert step._cache_size() == 1


def test_all_finite(mesh):
    all_finite = steps.make_all_finite(mesh)
    assert all_finite([jnp.ones(3), jnp.zeros((2, 2))])
    assert not all_finite([jnp.ones(3), jnp.array([1.0, jnp.inf])])
    assert not all_finite([jnp.array([jnp.nan])])


def test_targets_are_mixed_and_smoothed_and_images_mixed():
    batch = {**make_batch(), 'mix': np.float32([0.9, 0.2, 1.0, 0.5])}
    one_hot, other = np.eye(CLASSES)[batch['label']], [1, 0, 3, 2]
    share = batch['mix'][:, None]
    mixed = share * one_hot + (1 - share) * one_hot[other]
    found = steps.truth(batch, CLASSES, 0.1)
    np.testing.assert_allclose(found, 0.9 * mixed + 0.1 / CLASSES, atol=1e-7)
    settings = {'eigenvectors': np.eye(3), 'sigma': np.ones(3), 'std': 0.0, 'rescale': False}
    inputs = steps.make_inputs(mean=np.zeros((CROP, CROP, 3), np.float32), **settings)
    images = batch['image'].astype(np.float32)
    share = share[:, None, None]
    expected = share * images + (1 - share) * images[other]
    np.testing.assert_allclose(inputs(batch, RATES), expected, rtol=1e-5, atol=1e-4)
    plain = {name: value for name, value in batch.items() if name != 'mix'}
    np.testing.assert_array_equal(inputs(plain, RATES), images)
    np.testing.assert_array_equal(steps.truth(plain, CLASSES, 0.0), one_hot)


def test_jitter():
    """Brightness, contrast against the mean of the gray image, saturation against each pixel's gray."""
    batch = {
        **make_batch(),
        'jitter': np.float32([[1.3, 0.7, 1.4], [1, 1, 1], [0.6, 1, 1], [1, 1, 0]]),
    }
    settings = {'eigenvectors': np.eye(3), 'sigma': np.ones(3), 'std': 0.0, 'rescale': False}
    inputs = steps.make_inputs(mean=np.zeros((CROP, CROP, 3), np.float32), **settings)
    found = inputs(batch, RATES)
    gray = np.array([0.299, 0.587, 0.114])
    for image, (bright, contrast, saturation), result in zip(
        batch['image'].astype(float), batch['jitter'].astype(float), found, strict=True
    ):
        x = np.clip(image * bright, 0, 255)
        x = np.clip((1 - contrast) * (x @ gray).mean() + contrast * x, 0, 255)
        x = np.clip((1 - saturation) * (x @ gray)[..., None] + saturation * x, 0, 255)
        np.testing.assert_allclose(result, x, atol=1e-3)


def test_the_moving_average(net, mesh):
    """It stays unchanged, like the parameters, in a step whose loss is not finite."""
    step, _, settings = make_step(net, mesh, ema=0.15)
    optimizer = optim.make(net, name='sgd', momentum=0.9, decay=5e-4)
    state = steps.init_state(net, optimizer, mesh, seed=0, crop=CROP, ema=True)
    average = jax.device_get(state.params)
    bad = {**make_batch(), 'z': np.full((4, 3), np.nan, np.float32)}
    for i, keep in enumerate((1 / 10, 0.15, None, 0.15)):  # (1 + step) / (10 + step), at most 0.15
        state, _ = step(state, bad if keep is None else make_batch(), RATES)
        if keep is not None:
            new = jax.device_get(state.params)
            average = jax.tree.map(lambda a, x, keep=keep: keep * a + (1 - keep) * x, average, new)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7, err_msg=str(i))
        jax.tree.map(close, jax.device_get(state.ema['params']), average)
