"""`optim.py` against the papers' updates, written as NumPy loops in float64, and its rates."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import fingerprint
from alexnet_jax.training import loop, optim, steps
from configs import base, cnn_star, large_batch, original

MOMENTUM, DECAY, TRUST = 0.9, 5e-4, 0.02
# Only the network's statements about paths are used, not its shapes.
NET = build(classes=5, **{**base.get_config().model, 'width': 0.25})
SHAPES = {
    'conv1': {'kernel': (2, 3, 3, 2, 4), 'bias': (2, 4)},
    'conv2': {'kernel': (2, 3, 3, 4, 2), 'bias': (2, 2)},
    'fc8': {'kernel': (2, 6, 5), 'bias': (5,)},
}
LEAVES = [(layer, name) for layer, leaves in SHAPES.items() for name in leaves]


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {
        layer: {name: rng.normal(size=shape) for name, shape in leaves.items()}
        for layer, leaves in SHAPES.items()
    }


def all_rates(rate, **changes):
    return {'weights': rate, 'biases': rate, 'conv1': rate, **changes}


def run(gradients, rates, dtype=np.float64, name='sgd', **options):
    """Returns parameters and velocities before and after every update, from `random_tree(0)`."""

    @jax.jit
    def step(params, state, gradient, rates):
        changes, state = update.update(gradient, state, params, rates=rates)
        return jax.tree.map(jnp.add, params, changes), state

    with jax.enable_x64(dtype == np.float64):
        update = optim.make(NET, name=name, momentum=MOMENTUM, decay=DECAY, trust=TRUST, **options)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree(0))
        state = update.init(params)
        states = [(params, optim.velocity(state))]
        for gradient, rate in zip(gradients, rates, strict=True):
            gradient = jax.tree.map(lambda x: jnp.asarray(x, dtype), gradient)
            rate = {name: jnp.asarray(value, dtype) for name, value in rate.items()}
            params, state = step(params, state, gradient, rate)
            states.append((params, optim.velocity(state)))
        return jax.tree.map(np.asarray, states)


def reference(gradients, rates, name='sgd', decays=()):
    """v <- 0.9 v - 0.0005 ε w - ε g; w <- w + v (§5): each leaf's (w, v) after 0, 1, ... steps.

    LARS: ε is multiplied by 0.02 |w| / (|g| + 0.0005 |w|), separately for kernels and biases.
    """
    states = {}
    for layer, leaf in LEAVES:
        w = random_tree(0)[layer][leaf]
        v = np.zeros(w.shape)
        states[layer, leaf] = [(w, v)]
        for gradient, rate in zip(gradients, rates, strict=True):
            g = gradient[layer][leaf]
            epsilon = rate['conv1' if layer == 'conv1' else 'weights']
            decay = dict(decays).get(layer, 0.0005)
            if leaf == 'bias':  # docs/original.md §4: no decay; frozen with its kernels
                epsilon = rate['biases'] if epsilon else 0
                decay = 0
            if name == 'lars':
                size, slope = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(g**2))
                epsilon = epsilon * 0.02 * size / (slope + decay * size)
            if epsilon:  # at rate 0 the 2012 source code updates nothing
                v = 0.9 * v - decay * epsilon * w - epsilon * g
                w = w + v
            states[layer, leaf].append((w, v))
    return states


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def distance(tree, other):
    """Returns the greatest difference between corresponding numbers of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), tree, other)))


GRADIENTS = [random_tree(seed) for seed in range(1, 11)]


@pytest.mark.parametrize('name', ['sgd', 'lars'])
@pytest.mark.parametrize(
    'rates',
    [
        pytest.param([all_rates(0.01)] * 10, id='constant'),
        pytest.param([all_rates(0.01)] * 4 + [all_rates(0.001)] * 6, id='drop'),
        pytest.param(
            [all_rates(0.01, biases=0.02)] * 4 + [all_rates(0.001, biases=0.02)] * 6,
            id='drop of the weights only',
        ),
        pytest.param(
            [all_rates(0.01)] * 3
            + [all_rates(0.001, biases=0.02, conv1=1e-5)] * 3
            + [all_rates(0.001, biases=0.02, conv1=0.0)] * 2
            + [all_rates(0.001, biases=0.02)] * 2,
            id='conv1 slowed, frozen and released',
        ),
    ],
)
def test_is_the_update_of_the_paper(rates, name):
    states, expected = run(GRADIENTS, rates, name=name), reference(GRADIENTS, rates, name)
    for layer, leaf in LEAVES:
        for (params, velocity), (w, v) in zip(states, expected[layer, leaf], strict=True):
            assert params[layer][leaf].dtype == np.float64
            np.testing.assert_allclose(velocity[layer][leaf], v, rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(params[layer][leaf], w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('name', ['sgd', 'lars'])
def test_layers_with_a_decay_of_their_own(name):
    decays, rates = (('conv2', 0.0), ('fc8', 3.0)), [all_rates(0.01)] * 10
    states = run(GRADIENTS, rates, name=name, decays=decays)
    expected = reference(GRADIENTS, rates, name, decays)
    for layer, leaf in LEAVES:
        for (params, _), (w, _) in zip(states, expected[layer, leaf], strict=True):
            np.testing.assert_allclose(params[layer][leaf], w, rtol=1e-12, atol=1e-15)


def test_a_drop_leaves_the_velocity_as_it_is():
    """Without a gradient, a step is 0.9 times the previous one, whether or not the rate drops.

    If the rate multiplied the velocity instead, as in PyTorch's form, it would be 0.09 times after a drop.
    """
    steady = run(GRADIENTS[:5], [all_rates(0.01)] * 5)
    w = steady[5][0]
    nothing = {  # a gradient that the weight decay cancels
        layer: {name: -DECAY * w[layer][name] * (name == 'kernel') for name in leaves}
        for layer, leaves in SHAPES.items()
    }
    gradients = [*GRADIENTS[:5], nothing]
    kept = run(gradients, [all_rates(0.01)] * 6)
    dropped = run(gradients, [all_rates(0.01)] * 5 + [all_rates(0.001)])
    for layer, name in LEAVES:
        before, after = dropped[5][1][layer][name], dropped[6][1][layer][name]
        np.testing.assert_array_equal(before, kept[5][1][layer][name])
        np.testing.assert_allclose(after, 0.9 * before, rtol=1e-12)
        np.testing.assert_allclose(after, kept[6][1][layer][name], rtol=1e-12)
        moved = dropped[6][0][layer][name] - dropped[5][0][layer][name]
        np.testing.assert_allclose(moved, after, rtol=1e-9)


def test_kernels_decay_and_biases_do_not():
    nothing = jax.tree.map(np.zeros_like, GRADIENTS[0])
    (before, _), (after, _) = run([nothing], [all_rates(0.01)])
    for layer, name in LEAVES:
        w = before[layer][name]
        expected = w * (1 - 0.0005 * 0.01) if name == 'kernel' else w
        np.testing.assert_allclose(after[layer][name], expected, rtol=1e-14)


@pytest.mark.parametrize('name', ['sgd', 'lars'])
@pytest.mark.parametrize(
    ('zero', 'held'),
    [
        (all_rates(0.0), LEAVES),
        (all_rates(0.01, biases=0.0), [leaf for leaf in LEAVES if leaf[1] == 'bias']),
        (all_rates(0.01, conv1=0.0), [leaf for leaf in LEAVES if leaf[0] == 'conv1']),
        (
            all_rates(0.01, weights=0.0),
            [leaf for leaf in LEAVES if leaf[0] != 'conv1' and leaf[1] == 'kernel'],
        ),
    ],
    ids=['all', 'biases', 'conv1 and its biases', 'weights'],
)
def test_nothing_moves_at_rate_zero(zero, held, name):
    """Neither parameters nor velocities change a bit, although gradient and velocity are nonzero."""
    states = run(GRADIENTS[:4], [all_rates(0.01)] * 2 + [zero] * 2, dtype=np.float32, name=name)
    for layer, leaf in LEAVES:
        for kind in (0, 1):  # parameters, velocity
            before, after = states[2][kind][layer][leaf], states[4][kind][layer][leaf]
            if (layer, leaf) in held:
                assert_same_bits(before, after)
            else:
                assert np.all(before != after)


@pytest.mark.parametrize('name', ['sgd', 'lars'])
def test_frozen_layers_stay(name):
    states = run(
        GRADIENTS[:3], [all_rates(0.01)] * 3, dtype=np.float32, freeze=('conv2',), name=name
    )
    for layer, leaf in LEAVES:
        before, after = states[0][0][layer][leaf], states[3][0][layer][leaf]
        if layer == 'conv2':
            assert_same_bits(before, after)
            assert not states[3][1][layer][leaf].any()
        else:
            assert np.all(before != after)


@pytest.mark.parametrize('name', ['sgd', 'lars'])
def test_the_state_is_the_velocity(name):
    """Under the names used in checkpoints: with different names, no earlier run could be resumed."""
    params = random_tree(0)
    update = optim.make(NET, name=name, momentum=MOMENTUM, decay=DECAY, trust=TRUST)
    names = {f'2/trace/{layer}/{leaf}' for layer, leaf in LEAVES}
    assert set(fingerprint.named_leaves(update.init(params))) == names


def test_without_decay_lars_is_that_of_optax():
    theirs = optax.lars(0.1, trust_coefficient=TRUST, momentum=MOMENTUM)
    ours = optim.make(NET, name='lars', momentum=MOMENTUM, decay=0.0, trust=TRUST)

    @jax.jit
    def step(params, states, gradient, rates):
        expected, state = theirs.update(gradient, states[0], params)
        moved, own = ours.update(gradient, states[1], params, rates=rates)
        return optax.apply_updates(params, expected), (state, own), moved, expected

    with jax.enable_x64(True):
        params = random_tree(0)
        states = theirs.init(params), ours.init(params)
        for gradient in GRADIENTS[:3]:
            params, states, moved, expected = step(params, states, gradient, all_rates(0.1))
            assert distance(moved, expected) < 1e-14


def test_lars_keeps_the_gradient_where_a_norm_is_zero():
    kernel, bias = jnp.full((1, 2, 2), 3.0), jnp.zeros(2)
    params = {'fc8': {'kernel': kernel, 'bias': bias}}
    gradient = {'fc8': {'kernel': 0 * kernel, 'bias': jnp.array([1.0, -2.0])}}
    update = optim.make(NET, name='lars', momentum=MOMENTUM, decay=0.1, trust=TRUST)
    moved, _ = update.update(
        gradient, update.init(params), params, rates=all_rates(jnp.float32(0.5))
    )
    np.testing.assert_allclose(moved['fc8']['bias'], [-0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(moved['fc8']['kernel'], -0.5 * 0.1 * kernel, rtol=1e-6)


def run_on_mesh(update, mesh, gradients, rates):
    """Like `run`, inside shard_map as in the training step -> final parameters and velocities."""
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, {}, update.init(params))
    specs = steps.state_specs(NET, state, mesh)

    def step(state, gradient, rates):
        moved, opt_state = update.update(gradient, state.opt_state, state.params, rates=rates)
        params = optax.apply_updates(state.params, moved)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(specs, specs.params, P()), out_specs=specs, check_vma=True
        )
    )
    for gradient, rate in zip(gradients, rates, strict=True):
        state = mapped(state, gradient, rate)
    return jax.tree.map(np.asarray, (state.params, optim.velocity(state.opt_state)))


@pytest.mark.parametrize('shape', [(1, 1), (1, 2)], ids=str)
def test_lars_is_the_same_on_every_mesh(shape):
    """The norms cover both towers, wherever the towers are; the optimizer is made as in training."""
    config = base.get_config()
    config.optim.update({'name': 'lars', 'trust': TRUST})
    config.model.width = 0.25
    store = types.SimpleNamespace(
        classes=5,
        counts={'train': 128},
        mean=np.zeros((256, 256, 3), np.float32),
        eigenvectors=np.eye(3),
        sigma=np.ones(3),
    )
    gradients, rates = GRADIENTS[:2], [all_rates(0.1), all_rates(0.01, biases=0.02)]
    mesh = meshes.make(shape, towers=2, batches={})
    expected = run(gradients, rates, name='lars')[-1]
    with jax.enable_x64(True):
        update = loop.Setup.make(config, mesh, store, NET).optimizer
        assert distance(run_on_mesh(update, mesh, gradients, rates), expected) < 1e-12
        if shape[1] > 1:  # the result with norms of single towers
            update = optim.make(NET, name='lars', momentum=MOMENTUM, decay=DECAY, trust=TRUST)
            assert distance(run_on_mesh(update, mesh, gradients, rates), expected) > 1e-5


@pytest.mark.parametrize('options', [{'nesterov': True}, {'name': 'rmsprop'}], ids=str)
def test_updates_of_later_recipes(options):
    """RMSProp as TensorFlow's: m <- 0.8 m + 0.2 g², from 1; v <- 0.9 v + rate g / sqrt(m + 0.5)."""
    rates = [all_rates(0.1)] * 2 + [all_rates(0.01)] * 2
    options = {'rms_decay': 0.8, 'rms_epsilon': 0.5, **options}
    params, velocity = run(GRADIENTS[:4], rates, **options)[-1]
    for layer, leaf in LEAVES:
        w = random_tree(0)[layer][leaf]
        v, m = 0 * w, 1 + 0 * w
        for gradient, rate in zip(GRADIENTS[:4], rates, strict=True):
            g = gradient[layer][leaf] + (DECAY * w if leaf == 'kernel' else 0)
            if options.get('name') == 'rmsprop':
                m = 0.8 * m + 0.2 * g**2
                g = g / np.sqrt(m + 0.5)
            v = 0.9 * v + rate['weights'] * g
            w = w - (0.9 * v + rate['weights'] * g if options.get('nesterov') else v)
        np.testing.assert_allclose(-velocity[layer][leaf], v, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(params[layer][leaf], w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('shape', [(1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize('freeze', [(), ('conv2',)], ids=str)
def test_clipping_goes_by_the_norm_over_all_towers(shape, freeze):
    """A frozen layer's gradient does not count, and a small gradient is not clipped."""
    small = jax.tree.map(lambda g: g / 1000, GRADIENTS[1])
    gradients, rates, most = [GRADIENTS[0], small], [all_rates(0.1)] * 2, 2.0
    kept = [g for layer, leaf in LEAVES if layer not in freeze for g in [GRADIENTS[0][layer][leaf]]]
    factor = most / np.sqrt(sum(np.sum(g**2) for g in kept))
    expected = run([jax.tree.map(lambda g: factor * g, GRADIENTS[0]), small], rates, freeze=freeze)
    mesh = meshes.make(shape, towers=2, batches={})
    options = {'name': 'sgd', 'momentum': MOMENTUM, 'decay': DECAY, 'freeze': freeze, 'clip': most}
    with jax.enable_x64(True):
        update = optim.make(NET, axis='model' if shape[1] > 1 else None, **options)
        assert (
            factor < 0.5
            and distance(run_on_mesh(update, mesh, gradients, rates), expected[-1]) < 1e-12
        )


@pytest.mark.parametrize('roles', [(), ('bias',), ('kernel', 'bias')], ids=str)
def test_weight_decay_by_role(roles):
    none = [jax.tree.map(np.zeros_like, GRADIENTS[0])]
    (before, _), (after, _) = run(none, [all_rates(0.1)], decay_roles=roles)
    for layer, leaf in LEAVES:
        factor = 1 - 0.1 * DECAY * (leaf in roles)
        np.testing.assert_allclose(after[layer][leaf], factor * before[layer][leaf], rtol=1e-14)


# --- rates -------------------------------------------------------------------------------------


def make(examples=1000, batch=100, **changes):
    """Returns the rates of `configs/base.py` with changes; by default an epoch has ten steps."""
    fields = {**base.get_config().optim, **changes}
    return optim.make_rates(examples=examples, batch=batch, **fields)


@pytest.mark.parametrize(
    ('preset', 'variant', 'examples', 'phases', 'end'),
    [
        # Epoch; rates of weights, biases and conv1; color noise: docs/original.md §4.
        pytest.param(
            original,
            '',
            1_281_167,
            [
                (0, 1e-2, 0.02, 1e-2, 1),
                (25, 1e-3, 0.02, 1e-3, 1),
                (51, 1e-4, 0.02, 1e-4, 1),
                (67, 1e-4, 0.02, 1e-5, 0),
                (72, 1e-4, 0.02, 0, 0),
                (79, 1e-5, 0.02, 0, 0),
            ],
            91,
            id='2012',
        ),
        pytest.param(
            original,
            '2010',
            1_261_406,
            [
                (0, 1e-2, 0.02, 1e-2, 1),
                (23, 1e-3, 0.02, 1e-3, 1),
                (51, 1e-4, 0.02, 1e-4, 1),
                (68, 1e-4, 0.02, 1e-5, 0),
                (72, 1e-4, 0.02, 0, 0),
                (78, 1e-5, 0.002, 0, 0),
            ],
            93,
            id='2010',
        ),
        pytest.param(  # 146-2012-2011, from the 2012 layer-params file of that name
            cnn_star,
            'finetune',
            1_281_167,
            [
                (0, 1e-3, 0.02, 1e-4, 1),
                (5, 1e-3, 0.02, 1e-5, 1),
                (7, 1e-3, 0.02, 0, 1),
                (22, 1e-4, 0.02, 0, 1),
                (38, 1e-4, 0.02, 0, 0),
                (42, 1e-5, 0.02, 0, 0),
            ],
            54,
            id='CNN*',
        ),
    ],
)
def test_rates_of_the_source(preset, variant, examples, phases, end):
    rates = optim.make_rates(examples=examples, batch=128, **preset.get_config(variant).optim)

    def first_step(epoch):
        return -(-epoch * examples // 128)

    for (epoch, *expected), following in zip(phases, [*phases[1:], (end,)], strict=True):
        for step in (first_step(epoch), first_step(following[0]) - 1):
            actual = rates(step, {})
            values = [actual[name] for name in ('weights', 'biases', 'conv1', 'colour')]
            np.testing.assert_allclose(values, expected, rtol=1e-12, err_msg=f'step {step}')
            assert not actual['stop']
    assert rates(first_step(end), {})['stop']


def drops(errors, examples=1000, batch=100, **changes):
    """Returns the epochs at which the plateau rule drops the rate, and the epoch at which it stops.

    errors: top-1 error after epoch 1, 2, ..., in percent; revealed one by one, as in training.
    """
    rates = make(examples, batch, schedule='plateau', epochs=1000.0, **changes)
    history, dropped, before = {}, [], rates(0, {})['weights']
    for epoch, error in enumerate(errors, start=1):
        step = -(-epoch * examples // batch)
        waiting = rates(step - 1, history)
        assert (waiting['weights'], waiting['stop']) == (before, False)
        history[step] = error
        now = rates(step, history)
        if now['stop']:
            return dropped, epoch
        if now['weights'] != before:
            np.testing.assert_allclose(now['weights'], before / 10, rtol=1e-12)
            dropped.append(epoch)
        before = now['weights']
    return dropped, None


@pytest.mark.parametrize('examples', [1000, 1040, 1001, 999])  # at batch 100: also fractional steps
def test_plateau_drops_three_times_and_stops(examples):
    improving = [60.0, 50.0, 45.0, 44.0]
    flat = [44.0] * 20
    assert drops(improving + flat, examples, patience=3.0) == ([7, 10, 13], 16)
    assert drops(improving + flat, examples, patience=5.0) == ([9, 14, 19], 24)
    # An improvement after the first drop postpones the second.
    again = [44.0, 44.0, 44.0, 43.0, 42.0, *[42.0] * 20]
    assert drops(improving + again, examples, patience=3.0) == ([7, 12, 15], 18)
    assert drops(improving + flat, examples, patience=3.0, max_drops=1) == ([7], 10)


def test_plateau_counts_an_improvement_of_exactly_the_threshold():
    stay = [50.0] * 2
    assert drops([40.3, 40.2, *stay], patience=2.0) == ([4], None)  # 0.09999999999999432
    assert drops([40.3, 40.21, *stay], patience=2.0) == ([3], None)
    for tenths in range(1, 999):  # improves by 0.1, however it is rounded
        errors = [(tenths + 1) / 10, tenths / 10, tenths / 10]
        assert drops(errors, patience=2.0) == ([], None)


def test_plateau_adds_small_improvements_up():
    """0.05 per epoch is 0.1 in two epochs, so it has improved within three."""
    assert drops([50 - 0.05 * epoch for epoch in range(40)], patience=3.0) == ([], None)
    assert drops([50 - 0.03 * epoch for epoch in range(4)], patience=3.0) == ([4], None)


def test_plateau_compares_with_the_best():
    """An error that rises and falls back to its old value has not improved."""
    assert drops([44.0, 46.0, 45.0, 44.0, 44.0], patience=3.0) == ([4], None)
    assert drops([44.0, 46.0, 46.0, 46.0, 45.0, 44.0, 44.0], patience=3.0) == ([4, 7], None)


def test_rates_depend_on_nothing_later():
    rates = make(schedule='plateau', patience=1.0)
    history = {10: 50.0, 20: 50.0, 30: 50.0, 40: 50.0}
    for step, drop in ((10, 0), (19, 0), (20, 1), (29, 1), (30, 2)):
        np.testing.assert_allclose(rates(step, history)['weights'], 0.01 * 0.1**drop, rtol=1e-12)
    assert history == {10: 50.0, 20: 50.0, 30: 50.0, 40: 50.0}


def test_the_run_ends_after_its_epochs():
    for schedule in ('plateau', 'steps'):
        rates = make(schedule=schedule, epochs=2.5)
        assert not rates(24, {10: 9.0})['stop'] and rates(25, {10: 9.0})['stop']


def test_step_down_lowers_every_rate():
    rates = make(examples=1001, schedule='steps', drops=(1.0, 2.5), bias_factor=2.0)
    for step, drop in ((0, 0), (10, 0), (11, 1), (25, 1), (26, 2)):  # ceil(10.01), ceil(25.025)
        actual = rates(step, {})
        expected = {'weights': 0.01, 'biases': 0.02, 'conv1': 0.01}
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value * 0.1**drop, rtol=1e-12)
        assert actual['colour'] == 1


def test_warm_up_grows_linearly():
    rates = make(schedule='steps', warmup=2.0, bias_factor=2.0)
    for step in range(40):
        actual, part = rates(step, {}), min(step + 1, 20) / 20
        values = [actual[name] for name in ('weights', 'biases', 'conv1')]
        np.testing.assert_allclose(values, np.array([0.01, 0.02, 0.01]) * part, rtol=1e-12)


def test_poly_falls_to_zero_at_the_end():
    rates = make(
        schedule='poly', power=2.0, epochs=4.0, warmup=1.0, bias_factor=2.0, bias_final=0.5
    )
    for step in range(40):
        actual, part = rates(step, {}), (1 - step / 40) ** 2 * min(step + 1, 10) / 10
        values = [actual[name] for name in ('weights', 'biases', 'conv1')]
        np.testing.assert_allclose(values, np.array([0.01, 0.02, 0.01]) * part, rtol=1e-12)
        assert not actual['stop']
    assert rates(40, {})['weights'] == 0 and rates(40, {})['stop']
    assert make(schedule='poly', power=1.0, epochs=4.0)(10, {})['weights'] == 0.0075


def test_linear_cosine_and_exponential_schedules():
    """Ten steps per epoch; the cosine begins after the warm-up."""
    line, cosine = (make(schedule=name, epochs=4.0, warmup=1.0) for name in ('linear', 'cosine'))
    stairs = make(schedule='exponential', epochs=4.0, factor=0.94, drop_every=0.25)
    for step in range(41):
        ramp, part = min(step + 1, 10) / 10, max(0, step - 10) / 30
        expected = 0.01 * ramp * (1 - step / 40)
        assert line(step, {})['weights'] == pytest.approx(expected, rel=1e-12)
        expected = 0.01 * ramp * (1 + np.cos(np.pi * part)) / 2
        assert cosine(step, {})['weights'] == pytest.approx(expected, rel=1e-12, abs=1e-18)
        expected = 0.01 * 0.94 ** (step * 2 // 5)
        assert stairs(step, {})['weights'] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'decay_roles': ('kernels',)},
            "config.optim.decay_roles='kernels': choose one of kernel, depthwise, scale, bias",
        ),
        ({'rms_decay': 1.0}, 'config.optim.rms_decay=1.0: must be at least 0 and below 1'),
        ({'clip': -1.0}, 'config.optim.clip=-1.0: must be at least 0'),
        ({'drop_every': 0.0}, 'config.optim.drop_every=0.0: must be above 0'),
        (
            {'schedule': 'zigzag'},
            "config.optim.schedule='zigzag': choose one of steps, plateau, poly, linear, cosine, exponential",
        ),
        ({'name': 'adam'}, "config.optim.name='adam': choose one of sgd, lars, rmsprop"),
        ({'name': 'lars', 'trust': 0.0}, 'config.optim.trust=0.0: must be above 0'),
    ],
)
def test_values_that_do_not_exist(changes, message):
    with pytest.raises(UserError) as error:
        make(**changes)
    assert str(error.value) == message


def large(variant):
    config = large_batch.get_config(variant)
    return config, optim.make_rates(examples=1_281_167, batch=config.train.batch, **config.optim)


@pytest.mark.parametrize(('variant', 'batch'), [('512', 512), ('1k', 1024), ('4k', 4096)])
def test_linear_scaling(variant, batch):
    """Goyal et al. 2017: k times the batch, k times the rate, after 5 epochs of warm-up."""
    config, rates = large(variant)
    paper = base.get_config()
    warm = -(-5 * 1_281_167 // batch)
    assert config.train.batch == batch
    np.testing.assert_allclose(rates(warm, {})['weights'], 0.01 * batch / 128, rtol=1e-12)
    np.testing.assert_allclose(
        rates(warm // 2 - 1, {})['biases'], 0.005 * batch / 128, rtol=1 / warm
    )
    changed = {'batch': 128, 'rate': 0.01, 'warmup': 0.0}
    for part in ('optim', 'train'):
        for field, value in config[part].items():
            assert changed.get(field, value) == paper[part][field], field


@pytest.mark.parametrize(
    ('variant', 'batch', 'rate', 'warm', 'total'),
    [  # base_lr, rampup_interval and max_iter of the authors' solver files
        ('1k-lars', 1024, 2, 0, 125_000),
        ('4k-lars', 4096, 10, 1250, 31_300),
        ('8k-lars', 8192, 10, 600, 15_600),
        ('16k-lars', 16384, 16, 400, 7800),
        ('32k-lars', 32768, 32, 400, 4000),
    ],
)
def test_lars_has_the_rates_of_its_authors(variant, batch, rate, warm, total):
    config, rates = large(variant)
    assert config.train.batch == batch
    names = ('name', 'trust', 'momentum', 'decay', 'schedule', 'power')
    assert [config.optim[n] for n in names] == ['lars', 0.001, 0.9, 0.0005, 'poly', 2.0]
    here = optim.steps_per(config.optim.epochs, 1_281_167, batch)
    assert abs(here - total) < 0.03 * total and rates(here, {})['stop']
    start = optim.steps_per(config.optim.warmup, 1_281_167, batch)
    assert abs(start - warm) <= 0.03 * warm
    expected = rate * (1 - start / here) ** 2
    np.testing.assert_allclose(rates(start, {})['weights'], expected, rtol=1e-12)
    if start:
        np.testing.assert_allclose(rates(0, {})['weights'], rate / start, rtol=1e-12)
