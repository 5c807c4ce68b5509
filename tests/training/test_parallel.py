"""Training is the same on every mesh: masks, noise and gradients do not depend on the devices.

The comparison is in float64. In float32, the order of a sum can change the last bit, and now and then
that bit decides whether a hidden unit is on for an image. A single unit of fc7 then changes the gradients
of all layers below by a percent, which says nothing about the meshes. (On photographs that differ more
than windows of a single one do, float32 agrees equally well, as long as no unit switches.)
"""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from jax import lax
from PIL import Image

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import alexnet, layers
from alexnet_jax.nets.build import build
from alexnet_jax.training import optim, steps
from configs import caffe, original

MESHES = [(1, 1), (1, 2), (2, 1), (2, 2)]
BATCH, CLASSES = 16, 1000


def photographs(size):
    """Returns sixteen windows of a real photograph (matplotlib's sample), u8[16,size,size,3]."""
    folder = pathlib.Path(matplotlib.get_data_path()) / 'sample_data'
    with Image.open(folder / 'grace_hopper.jpg') as image:
        pixels = np.asarray(image.convert('RGB'))
    rng = np.random.default_rng(0)
    corners = rng.integers(0, np.array(pixels.shape[:2]) - size + 1, (BATCH, 2))
    return np.stack([pixels[y : y + size, x : x + size] for y, x in corners])


def train(*args, **kwargs):
    """Trains five steps on a mesh, in float64 -> losses, parameter changes, velocities."""
    with jax.enable_x64(True):
        return train_in_float64(*args, **kwargs)


def train_in_float64(shape, config, wrap=lambda optimizer: optimizer, count=5, several=False):
    config = config.copy_and_resolve_references()
    config.model.dtype = 'float64'
    crop = config.augment.crop
    mesh = meshes.make(shape, towers=config.model.towers, batches={'batch': BATCH})
    net = build(classes=CLASSES, **config.model)
    optimizer = wrap(optim.make(net, name='sgd', momentum=0.9, decay=5e-4, trust=0.0))
    images = photographs(crop)
    step = steps.make_train_step(
        net,
        optimizer,
        mesh,
        seed=0,
        several=several,
        mean=images.astype(np.float32).mean(axis=0),
        eigenvectors=np.eye(3, dtype=np.float32),
        sigma=np.array([121.8, 37.1, 19.7], np.float32),
        **config.colour,
    )
    state = steps.init_state(net, optimizer, mesh, seed=0, crop=crop)
    start = jax.tree.map(np.asarray, state.params)
    assert all(x.dtype == 'float64' for x in jax.tree.leaves(start))
    rates = {'weights': 0.01, 'biases': 0.02, 'conv1': 0.01, 'colour': 1.0}
    rates = {name: np.float32(value) for name, value in rates.items()}
    batches = []
    for i in range(count):
        rng = np.random.default_rng(i)
        batches.append(
            {
                'image': images,
                'z': rng.normal(size=(BATCH, 3)).astype(np.float32),
                'label': rng.integers(0, CLASSES, BATCH).astype(np.int32),
            }
        )
    if several:
        rates = {name: np.repeat(rate, count) for name, rate in rates.items()}
        state, sums = step(state, meshes.global_batches(mesh, BATCH, batches), rates)
        losses = [float(loss) / BATCH for loss in sums['loss']]
    else:
        losses = []
        for batch in batches:
            state, sums = step(state, meshes.global_batch(mesh, BATCH, batch), rates)
            losses.append(float(sums['loss']) / BATCH)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, start)
    return losses, moved, jax.tree.map(np.asarray, optim.velocity(state.opt_state))


def differences(one, other):
    """Returns the greatest difference in loss, and in relative L2 distance of changes and velocities."""
    losses = np.abs(np.subtract(one[0], other[0])).max()
    distances = [
        np.linalg.norm(a - b) / np.linalg.norm(a)
        for tree_a, tree_b in zip(one[1:], other[1:], strict=True)
        for a, b in zip(jax.tree.leaves(tree_a), jax.tree.leaves(tree_b), strict=True)
    ]
    return losses, max(distances)


def agree(one, other):
    losses, distance = differences(one, other)
    return losses < 1e-9 and distance < 1e-7


@pytest.fixture(scope='module')
def narrow():
    config = original.get_config()
    config.augment.crop = 64
    config.model.width = 0.25
    return config


@pytest.fixture(scope='module')
def narrow_alone(narrow):
    return train((1, 1), narrow)


@pytest.mark.parametrize(
    'shape', [(1, 2), (2, 1), pytest.param((4, 2), marks=pytest.mark.slow)], ids=str
)
def test_narrow_net_trains_the_same_on_every_mesh(narrow, narrow_alone, shape):
    losses, distance = differences(narrow_alone, train(shape, narrow))
    assert losses < 1e-9 and distance < 1e-7, (losses, distance)


@pytest.mark.full
def test_several_steps_as_one_program_are_the_same_on_four_devices(narrow, narrow_alone):
    losses, distance = differences(narrow_alone, train((2, 2), narrow, several=True))
    assert losses < 1e-9 and distance < 1e-7, (losses, distance)


def conv_by_product(x, kernel, bias, *, stride=1, padding=((0, 0), (0, 0))):
    """`layers.conv` as a matrix product: XLA's float64 convolutions take minutes."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    if stride > 1:
        x, kernel = layers._blocks(x, kernel, stride, ((0, 0), (0, 0)))
    k = kernel.shape[0]
    height, width = (n - k + 1 for n in x.shape[1:3])
    windows = [x[:, i : i + height, j : j + width] for i in range(k) for j in range(k)]
    y = jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    return y + bias.reshape(1, 1, 1, -1)


@pytest.mark.full
def test_full_width_original_trains_the_same_on_every_mesh(monkeypatch):
    """Five steps of 16 images in float64, with dropout and noise."""
    monkeypatch.setattr(layers, 'conv', conv_by_product)
    one = train((1, 1), original.get_config())
    assert len(set(one[0])) == 5
    for shape in MESHES[1:]:
        losses, distance = differences(one, train(shape, original.get_config()))
        assert losses < 1e-9 and distance < 1e-7, (shape, losses, distance)


@pytest.mark.parametrize(
    'change',
    [
        pytest.param({'norm_window': 'all'}, marks=pytest.mark.slow),
        *(
            pytest.param(change, marks=pytest.mark.full)
            for change in ({'exchange': ()}, {'remove': 'conv3'}, {'dropout_at': 'inputs'})
        ),
    ],
    ids=str,
)
def test_switches_that_touch_the_towers(narrow, change):
    config = narrow.copy_and_resolve_references()
    config.model.update(change)
    assert agree(train((1, 1), config, count=2), train((2, 2), config, count=2))


def scale_gradient_of_tower_1(optimizer):
    def update(grads, state, params, **rates):
        scale = jnp.where(lax.axis_index('model') == 1, 1.01, 1.0)
        kernels = {
            layer: leaves | {'kernel': leaves['kernel'] * scale} for layer, leaves in grads.items()
        }
        return optimizer.update(kernels, state, params, **rates)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


@pytest.mark.slow
def test_the_comparison_sees_a_scaled_gradient(narrow, narrow_alone):
    broken = train((1, 2), narrow, wrap=scale_gradient_of_tower_1)
    assert not agree(narrow_alone, broken)


@pytest.mark.slow
def test_the_comparison_sees_one_changed_mask(narrow, narrow_alone, monkeypatch):
    real = layers.dropout_mask
    monkeypatch.setattr(
        layers,
        'dropout_mask',
        lambda key, rows, tower, units: real(key, jnp.where(rows == 3, 99, rows), tower, units),
    )
    assert not agree(narrow_alone, train((1, 2), narrow))


@pytest.mark.slow
def test_the_comparison_sees_a_lost_term_of_the_sum_over_towers(narrow, narrow_alone, monkeypatch):
    real = lax.psum
    monkeypatch.setattr(
        alexnet.lax,
        'psum',
        lambda x, axis: (
            real(jnp.where(lax.axis_index(axis) == 0, x, 0 * x), axis)
            if axis == 'model'
            else real(x, axis)
        ),
    )
    assert not agree(narrow_alone, train((1, 2), narrow))


@pytest.mark.parametrize('axis', ['model', 'data'])
def test_a_dropped_psum_is_refused(narrow, monkeypatch, axis):
    real = lax.psum
    monkeypatch.setattr(lax, 'psum', lambda x, a: x if a == axis else real(x, a))
    with pytest.raises(ValueError, match='varying'):
        train((2, 2), narrow, count=1)


def test_rows_and_batches_do_not_depend_on_the_mesh():
    rows = np.arange(8, dtype=np.int32)
    for shape in MESHES + [(8, 1), (4, 2)]:
        mesh = meshes.make(shape, towers=2, batches={'batch': 8})
        np.testing.assert_array_equal(meshes.rows(mesh, 8), rows)
        batch = meshes.global_batch(mesh, 8, {'label': rows})['label']
        np.testing.assert_array_equal(batch, rows)
        assert batch.sharding.spec == jax.sharding.PartitionSpec('data')


def test_the_chosen_mesh_gives_each_tower_a_device():
    assert dict(meshes.make((0, 0), towers=2, batches={}).shape) == {'data': 4, 'model': 2}
    assert dict(meshes.make((0, 0), towers=1, batches={}).shape) == {'data': 8, 'model': 1}
    assert dict(meshes.make((2, 0), towers=2, batches={}).shape) == {'data': 2, 'model': 2}
    assert dict(meshes.make((8, 0), towers=2, batches={}).shape) == {'data': 8, 'model': 1}
    assert dict(meshes.make((0, 1), towers=2, batches={}).shape) == {'data': 8, 'model': 1}


@pytest.mark.parametrize(
    ('shape', 'towers', 'batch', 'message'),
    [
        ((1, 2), 1, 8, 'model=2, but this network has 1 tower: choose model=1'),
        ((1, 3), 2, 8, 'model=3, but this network has 2 towers'),
        ((5, 2), 2, 10, 'needs 10 devices, but there are 8'),
        ((3, 1), 2, 8, 'batch=8 cannot be divided over 3 devices'),
    ],
)
def test_impossible_meshes(shape, towers, batch, message):
    with pytest.raises(UserError, match=message):
        meshes.make(shape, towers=towers, batches={'batch': batch})


@pytest.mark.parametrize(
    ('backend', 'set_', 'kept'),
    [('gpu', None, True), ('cpu', None, False), ('gpu', 'elsewhere', False)],
)
def test_where_compiled_programs_are_kept(monkeypatch, tmp_path, backend, set_, kept):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update('jax_compilation_cache_dir', set_)
        meshes.keep_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert found == (str(tmp_path / 'alexnet_jax/programs') if kept else set_)


@pytest.mark.full
def test_a_net_without_towers_trains_on_several_devices():
    config = caffe.get_config()
    config.augment.crop = 67
    config.model.update({'width': 0.25, 'kernels': (96, 256, 384, 384, 256)})
    assert agree(train((1, 1), config, count=2), train((4, 1), config, count=2))


@pytest.mark.slow
def test_three_towers_train_the_same_on_three_devices(narrow):
    config = narrow.copy_and_resolve_references()
    kernels, hidden = (96, 252, 384, 384, 252), (4092, 4092)
    config.model.update({'towers': 3, 'kernels': kernels, 'hidden': hidden})
    assert agree(train((1, 1), config, count=2), train((2, 3), config, count=2))
