"""The network contract is general: it holds for two networks with batch normalization defined here.

One has nested layers and no towers, the other has towers. Passed as `build`, they train, evaluate and
resume, and are fine-tuned, frozen and averaged, on every mesh.
"""

import functools
import json
import logging
import os
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.batches import train_batches
from alexnet_jax.input.images import central
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import blocks, layers, network
from alexnet_jax.rundir import metrics
from alexnet_jax.training import evaluation, inference, loop, optim, steps
from configs import quickstart
from tests.helpers.commands import assert_same, outcome
from tests.helpers.stores import write_store

SIZE, CROP, CLASSES, BATCH, STEPS = 24, 20, 3, 8, 6


class Block(nn.Module):
    """Convolution, batch normalization, ReLU, pooling."""

    features: int
    data_axis: str | None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), use_bias=False, name='conv')(x)
        x = layers.BatchNorm(self.data_axis, name='norm')(x, train)
        return layers.max_pool(nn.relu(x), window=3, stride=2)


class Nested(network.Network):
    classes: int
    channels: int
    data_axis: str | None = None
    towers = 1
    names = ('stem', 'body', 'head')

    @nn.nowrap
    def local(self, shards, data_axis):
        return self.clone(data_axis=data_axis)

    @nn.compact
    def __call__(self, images, train=None):
        out = {}
        x = images / 64
        for name, features in (('stem', self.channels), ('body', 2 * self.channels)):
            x = out[name] = Block(features, self.data_axis, name=name)(x, train)
        return nn.Dense(self.classes, name='head')(x.mean((1, 2))), out


class Towers(network.Network):
    classes: int
    channels: int
    towers: int
    data_axis: str | None = None
    model_axis: str | None = None
    local_towers: int | None = None
    names = ('conv1', 'norm1', 'conv2', 'norm2', 'fc3')

    @nn.nowrap
    def local(self, shards, data_axis):
        axis = 'model' if shards > 1 else None
        count = self.towers // shards
        return self.clone(data_axis=data_axis, model_axis=axis, local_towers=count)

    @nn.nowrap
    def partition(self, path):
        return P() if path == ('fc3', 'bias') else P('model')

    @nn.nowrap
    def first_kernels(self, params):
        return params['conv1']['kernel']

    @nn.compact
    def __call__(self, images, train=None):
        init = {
            'kernel_init': lambda fan_in: blocks.gaussian(fan_in**-0.5),
            'bias_init': lambda fan_in: nn.initializers.zeros,
            'dtype': jnp.float32,
        }
        conv = functools.partial(
            blocks.Conv, self.channels, 3, padding=((1, 1), (1, 1)), groups=1, **init
        )
        norm = functools.partial(layers.BatchNorm, self.data_axis)
        out = {}
        xs = (images / 64,) * (self.local_towers or self.towers)
        xs = out['conv1'] = conv(stride=2, name='conv1')(xs)
        xs = out['norm1'] = tuple(map(nn.relu, norm(name='norm1')(xs, train)))
        xs = (layers.exchange(xs, self.model_axis),) * len(xs)
        xs = out['conv2'] = conv(stride=2, name='conv2')(xs)
        xs = out['norm2'] = tuple(map(nn.relu, norm(name='norm2')(xs, train)))
        xs = tuple(x.mean((1, 2)) for x in xs)
        return blocks.Logits(self.classes, axis=self.model_axis, name='fc3', **init)(xs), out


FIELDS = {'nested': {'channels': 4}, 'towers': {'channels': 4, 'towers': 2}}
MESHES = [
    *(('nested', shape) for shape in ((1, 1), (2, 1))),
    *(('towers', shape) for shape in ((1, 1), (2, 2))),
    *(
        pytest.param(net, shape, marks=pytest.mark.slow)
        for net, shapes in {'nested': [(4, 1)], 'towers': [(2, 1), (4, 1), (1, 2)]}.items()
        for shape in shapes
    ),
]
FIRST = {'nested': 'stem', 'towers': 'norm1'}  # a layer with statistics
HEAD = {'nested': 'head', 'towers': 'fc3'}


def build(*, net, classes, **fields):
    return network.make({'nested': Nested, 'towers': Towers}[net], classes=classes, **fields)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('contract')
    for name, classes in (('three', 3), ('four', 4)):
        counts = {'train': 20, 'val': 11}
        write_store(folder / name, format='u8', size=SIZE, classes=classes, counts=counts)
    names = (folder / 'three' / 'names.txt').read_text().splitlines()
    for name, other in (('mixed', [names[2], *names[:2]]), ('renamed', [*names[:2], 'another'])):
        shutil.copytree(folder / 'three', folder / name)
        (folder / name / 'names.txt').write_text(''.join(f'{one}\n' for one in other))
    return folder


def train(folder, name, net, shape=(1, 1), *, store='three', **changes):
    """Trains six steps, two and a half per epoch -> the run directory."""
    loop.train(make_config(folder, net, shape, store=store, **changes), folder / name, build)
    return folder / name


def make_config(folder, net, shape=(1, 1), *, store='three', **changes):
    config = quickstart.get_config()
    config.model = ConfigDict({'net': net, **FIELDS[net]})
    config.update_from_flattened_dict(
        {
            'data.source': 'made_up',
            'data.store': str(folder / store),
            'data.size': SIZE,
            'augment.crop': CROP,
            'optim.rate': 0.1,
            'optim.epochs': STEPS * BATCH / 20,
            'optim.drops': (),
            'train.batch': BATCH,
            'run.mesh': shape,
            'run.eval_every': 1.0,
            'run.eval_batch': BATCH,
            'run.log_every': 1,
            **changes,
        }
    )
    return config


@pytest.fixture(scope='module')
def runs(folder):
    """Returns runs(net, shape) -> a complete run of a network on a mesh, made on first use."""
    return functools.cache(lambda net, shape: train(folder, f'{net}-{shape}', net, shape))


def variables(run):
    """Returns the parameters and statistics at the end of a run, by name."""
    _, arrays, _, _ = outcome(run)
    record = json.loads((run / f'checkpoints/{STEPS}/meta/metadata').read_text())
    kept = {n: np.frombuffer(x, np.float32) for n, x in arrays.items() if n.startswith(('p', 'b'))}
    assert set(arrays) == set(record['leaves'])  # every array has its fingerprint
    return {n: x.reshape(record['leaves'][n]['shape']) for n, x in kept.items()}


@pytest.mark.parametrize(('net', 'shape'), MESHES, ids=str)
def test_a_mesh_changes_only_rounding(runs, net, shape):
    """Statistics are those of the global batch, separately for each tower."""
    one, other = variables(runs(net, (1, 1))), variables(runs(net, shape))
    assert sum(name.startswith('batch_stats') for name in one) == 4  # mean and var of two layers
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    stats = {n: x for n, x in one.items() if n.startswith('batch_stats')}
    assert all((x != n.endswith('var')).all() for n, x in stats.items())  # they moved
    rows = [metrics.read(runs(net, s))[-1] for s in ((1, 1), shape)]
    assert [row['kind'] for row in rows] == ['eval'] * 2
    assert rows[0]['top1_error'] == rows[1]['top1_error']
    assert rows[0]['loss'] == pytest.approx(rows[1]['loss'], rel=1e-4)


@pytest.mark.parametrize(('net', 'shape'), MESHES, ids=str)
def test_a_run_that_is_resumed_ends_with_the_same_bits(runs, folder, net, shape):
    name = f'{net}-{shape}-resumed'
    with pytest.raises(loop.Stopped):
        train(folder, name, net, shape, **{'run.stop_after': '4'})
    assert_same(outcome(train(folder, name, net, shape)), outcome(runs(net, shape)))


RECIPE = {
    'augment.mixup': 0.4,
    'augment.mixup_off': 1.5,
    'train.ema': 0.9,
    'train.ema_used': True,
    'train.smoothing': 0.1,
    'optim.name': 'rmsprop',
    'optim.rate': 0.01,
    'optim.clip': 1.0,
    'optim.nesterov': True,
    'optim.schedule': 'cosine',
    'train.recompute': 16,
}


@pytest.mark.parametrize(('net', 'shape'), [('nested', (2, 1)), ('towers', (2, 2))], ids=str)
def test_a_modern_recipe_is_the_same_on_every_mesh_and_resumed(folder, net, shape):
    one = train(folder, f'{net}-recipe', net, **RECIPE)
    other = train(folder, f'{net}-{shape}-recipe', net, shape, **RECIPE)
    name = f'{net}-{shape}-recipe-resumed'
    with pytest.raises(loop.Stopped):
        train(folder, name, net, shape, **RECIPE, **{'run.stop_after': '4'})
    assert_same(outcome(train(folder, name, net, shape, **RECIPE)), outcome(other))
    for run in (one, other):
        last = metrics.read(run)[-1]
        images, labels = (
            open_store(folder / 'three').pixels('val'),
            open_store(folder / 'three').labels('val'),
        )
        found = inference.load(run, 'center', build=build)(images)  # the average
        wrong = 100 * (found.argmax(1) != labels).mean()
        assert last['top1_error'] == pytest.approx(wrong) and last['last_loss'] != last['loss']
    rows = [metrics.read(run) for run in (one, other)]
    for row, same in zip(*rows, strict=True):
        assert row['loss'] == pytest.approx(same['loss'], rel=1e-3)


@pytest.mark.parametrize(('net', 'shape'), [('nested', (1, 1)), ('towers', (2, 2))], ids=str)
def test_recomputed_statistics_are_those_of_the_images(folder, caplog, net, shape):
    """Checks the first layer's, which are easy to compute; the log compares the two modes first."""
    changes = {'optim.schedule': 'steps', 'augment.random': False, 'colour.std': 0.0}
    with caplog.at_level(logging.INFO, 'alexnet_jax'):
        run = train(folder, f'{net}-recomputed', net, shape, **changes, **{'train.recompute': 13})
    assert 'recomputing the statistics, 0 of 16 images' in caplog.text
    found = variables(run)
    config, store = make_config(folder, net), open_store(folder / 'three')
    given = {'seed': 0, 'batch': BATCH, 'crop': CROP, 'chunk': 1, 'random': False}
    images = np.concatenate(
        [b['image'] for b in train_batches(store, start=STEPS, stop=STEPS + 2, **given)]
    )
    made = build(classes=CLASSES, **{**config.model})
    x = steps.normalize(images, central(store.mean, CROP))
    params = jax.tree.map(jnp.asarray, nested_params(found))
    if net == 'nested':
        kernel = params['stem']['conv']['kernel']
        y = nn.Conv(4, (3, 3), use_bias=False).apply({'params': {'kernel': kernel}}, x / 64)
        pairs = {'batch_stats/stem/norm': y}
    else:
        out = network.apply(
            made, {'params': params, 'batch_stats': nested_params(found, 'batch_stats')}, x
        )[1]
        pairs = {'batch_stats/norm1': jnp.stack(out['conv1'])}
    for name, y in pairs.items():
        axes = range(y.ndim - 1) if net == 'nested' else range(1, y.ndim - 1)
        np.testing.assert_allclose(found[f'{name}/mean'], y.mean(axes), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f'{name}/var'], y.var(axes), rtol=1e-4, atol=1e-5)
    modes = [line for line in caplog.messages if line.startswith('the latest batch')]
    rows = [row for row in metrics.read(run) if row['kind'] == 'eval']
    assert len(modes) == len(rows) == 3
    text = f'loss {rows[-1]["loss_batch_stats"]:.4f} with its own'
    assert (
        text in modes[-1] and f'{rows[-1]["loss_running_stats"]:.4f} with the running' in modes[-1]
    )
    longer = {'optim.epochs': 2 * STEPS * BATCH / 20, 'train.recompute': 13}
    with pytest.raises(UserError, match='whose statistics are recomputed at its end'):
        train(folder, f'{net}-recomputed', net, shape, **changes, **longer)


def test_recomputing_reads_at_most_an_epoch_and_can_be_stopped(folder, caplog):
    """Asks for as many images as ImageNet has, on a small folder, as a preset would."""
    changes = {'optim.schedule': 'steps', 'train.recompute': 1_281_167}
    caplog.set_level(logging.INFO, 'alexnet_jax')
    whole = train(folder, 'nested-whole', 'nested', **changes)
    assert 'recomputing the statistics, 16 of 24 images' in caplog.text

    class Kill(logging.Handler):
        def emit(self, record):
            if 'recomputing' in record.getMessage():
                os.kill(os.getpid(), signal.SIGTERM)

    logger, kill = logging.getLogger('alexnet_jax'), Kill()
    logger.addHandler(kill)
    try:
        with pytest.raises(loop.Stopped, match='SIGTERM.*, saved'):
            train(folder, 'nested-killed', 'nested', **changes)
    finally:
        logger.removeHandler(kill)
    assert_same(outcome(train(folder, 'nested-killed', 'nested', **changes)), outcome(whole))


@pytest.mark.parametrize('net', FIELDS)
def test_recomputing_leaves_frozen_layers_alone(folder, net):
    changes = {
        'train.freeze': (FIRST[net],),
        'train.init_from': str(folder / f'{net}-recomputed-2'),
    }
    before = variables(train(folder, f'{net}-recomputed-2', net, **{'optim.schedule': 'steps'}))
    after = variables(
        train(
            folder,
            f'{net}-frozen',
            net,
            **{'optim.schedule': 'steps', 'train.recompute': 13},
            **changes,
        )
    )
    frozen = f'batch_stats/{FIRST[net]}/'
    for name in (name for name in before if name.startswith('batch_stats')):
        assert (after[name] == before[name]).all() == name.startswith(frozen)


def test_a_run_that_ends_where_it_stopped_is_refused_if_its_statistics_are_missing(folder):
    with pytest.raises(loop.Stopped):
        train(
            folder,
            'cut',
            'nested',
            **{'optim.schedule': 'steps', 'run.stop_after': '4', 'train.recompute': 13},
        )
    shorter = {'optim.schedule': 'steps', 'optim.epochs': 4 * BATCH / 20, 'train.recompute': 13}
    with pytest.raises(UserError, match='whose statistics are recomputed at its end'):
        train(folder, 'cut', 'nested', **shorter)


def test_fine_tuning_starts_from_the_average_that_a_run_uses(folder):
    average = {'train.ema': 0.9, 'train.ema_used': True}
    old = train(folder, 'averaged', 'nested', **average)
    frozen = {
        'train.init_from': str(old),
        'optim.rate': 0.0,
        'train.freeze': ('stem', 'body', 'head'),
    }
    new = inference.load(train(folder, 'from-average', 'nested', **frozen), 'center', build=build)
    images = open_store(folder / 'three').pixels('val')
    found = inference.load(old, 'center', build=build)(images)
    np.testing.assert_array_equal(new(images), found)


def nested_params(named, tree='params'):
    """Named leaves of `variables` -> the nested dictionary of one tree."""
    nested = {}
    for name, value in named.items():
        first, *inner, last = name.split('/')
        if first == tree:
            functools.reduce(lambda d, key: d.setdefault(key, {}), inner, nested)[last] = value
    return nested


@pytest.mark.parametrize(('net', 'shape'), MESHES, ids=str)
def test_fine_tuning_takes_everything_but_the_head(runs, folder, net, shape):
    old = variables(runs(net, (1, 1)))
    # Nothing is learned, so the run ends with the parameters it starts with.
    frozen = {'train.init_from': str(runs(net, (1, 1))), 'optim.rate': 0.0}
    frozen['train.freeze'] = tuple({n.split('/')[1] for n in old} - {HEAD[net]})
    new = variables(train(folder, f'{net}-{shape}-tuned', net, shape, store='four', **frozen))
    assert set(new) == set(old)
    for name, value in old.items():
        if name.split('/')[1] == HEAD[net]:
            assert new[name].shape[-1] == 4
        else:
            np.testing.assert_array_equal(new[name], value, err_msg=name)


@pytest.mark.parametrize(('net', 'shape'), [('nested', (1, 1)), ('towers', (1, 2))], ids=str)
def test_reordered_classes_keep_their_part_of_the_head(runs, folder, caplog, net, shape):
    old = variables(runs(net, (1, 1)))
    frozen = {'train.init_from': str(runs(net, (1, 1))), 'optim.rate': 0.0}
    frozen['train.freeze'] = tuple({n.split('/')[1] for n in old})
    with caplog.at_level(logging.INFO, 'alexnet_jax'):
        new = variables(train(folder, f'{net}-mixed', net, shape, store='mixed', **frozen))
    assert 'with its classes in a different order' in caplog.text
    for name, value in old.items():
        if name.split('/')[1] == HEAD[net]:
            value = value[..., [2, 0, 1]]
        np.testing.assert_array_equal(new[name], value, err_msg=name)


@pytest.mark.parametrize('net', FIELDS)
def test_the_same_number_of_different_classes_gets_a_new_head(runs, folder, caplog, net):
    old = variables(runs(net, (1, 1)))
    frozen = {'train.init_from': str(runs(net, (1, 1))), 'optim.rate': 0.0}
    with caplog.at_level(logging.INFO, 'alexnet_jax'):
        new = variables(train(folder, f'{net}-renamed', net, store='renamed', **frozen))
    assert 'with a new last layer, since the classes differ' in caplog.text
    kernels = [name for name in old if name.split('/')[1] == HEAD[net] and name.endswith('kernel')]
    assert kernels and not any(np.array_equal(new[name], old[name]) for name in kernels)


@pytest.mark.parametrize('net', FIELDS)
def test_the_same_classes_keep_the_head(runs, folder, net):
    old = variables(runs(net, (1, 1)))
    layers_ = tuple({n.split('/')[1] for n in old})
    changes = {
        'train.init_from': str(runs(net, (1, 1))),
        'optim.rate': 0.0,
        'train.freeze': layers_,
    }
    new = variables(train(folder, f'{net}-same', net, **changes))
    for name, value in old.items():
        np.testing.assert_array_equal(new[name], value, err_msg=name)


@pytest.mark.parametrize(('net', 'shape'), MESHES, ids=str)
def test_a_frozen_layer_keeps_its_statistics_and_uses_them(runs, folder, net, shape):
    start = str(runs(net, (1, 1)))
    changes = {'train.init_from': start, 'train.freeze': (FIRST[net],)}
    run = train(folder, f'{net}-{shape}-frozen', net, shape, **changes)
    old, new = variables(runs(net, (1, 1))), variables(run)
    for name, value in old.items():
        same = np.array_equal(new[name], value)
        assert same == (name.split('/')[1] == FIRST[net]), name


@pytest.mark.parametrize('net', FIELDS)
def test_an_ensemble_averages_probabilities(runs, folder, net):
    other = train(folder, f'{net}-other', net, seed=1)
    members = [runs(net, (1, 1)), other]
    sums = evaluation.compare(members, views=('ten',), batch=BATCH, build=build)
    store = open_store(folder / 'three')
    images, labels = store.pixels('val'), store.labels('val')
    each = [inference.load(run, build=build)(images) for run in members]
    each.append(np.mean(each, axis=0))
    for found, probabilities in zip(sums.values(), each, strict=True):
        assert found['top1'] == (probabilities.argmax(1) == labels).sum()
        losses = -np.log(probabilities[np.arange(11), labels])
        assert found['loss'] == pytest.approx(losses.sum(), rel=1e-4)
    assert [one['count'] for one in sums.values()] == [11] * 3


def test_rates_for_a_missing_first_layer(folder):
    with pytest.raises(UserError, match='config.optim.conv1=.*no first convolution'):
        train(folder, 'none', 'nested', **{'optim.conv1': ((1.0, 0.0),)})
    assert not (folder / 'none').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'names': ('stem', 'head')}, 'Broken.names lacks the layers body'),
        ({'local': network.Network.local}, 'Broken.local ignores data_axis'),
    ],
    ids=['names', 'local'],
)
def test_networks_that_do_not_keep_the_contract(folder, change, message):
    broken = type('Broken', (Nested,), change)
    config = make_config(folder, 'nested')
    with pytest.raises(UserError, match=message):
        loop.train(config, folder / 'none', lambda *, net, **fields: network.make(broken, **fields))
    assert not (folder / 'none').exists()


def test_the_diagnosis_computes_the_step_with_its_frozen_layers():
    """The running variance of a frozen layer overflows; that of the batch would not."""
    made = build(net='nested', classes=CLASSES, **FIELDS['nested'])
    settings = {
        'mean': np.zeros((CROP, CROP, 3), np.float32),
        'eigenvectors': np.eye(3, dtype=np.float32),
        'sigma': np.ones(3, np.float32),
        'std': 0.1,
        'rescale': False,
    }
    variables = network.init(made, jax.random.key(0), CROP)
    variables['batch_stats']['body']['norm']['mean'] -= 3e38
    variables['params']['body']['norm']['scale'] *= 10
    batch = {
        'image': np.random.default_rng(0).integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8),
        'z': np.zeros((BATCH, 3), np.float32),
        'label': np.zeros(BATCH, np.int32),
    }
    rates = {'colour': np.float32(1)}
    for freeze, words in (((), 'everything is finite'), (('body',), 'the activations of body')):
        found = loop.diagnosis.make_find_broken(made, seed=0, freeze=freeze, **settings)
        assert found(variables, np.int32(0), batch, rates).startswith(words)


@pytest.mark.parametrize('net', FIELDS)
def test_a_step_whose_loss_is_not_finite_moves_no_statistics(net):
    made = build(net=net, classes=CLASSES, **FIELDS[net])
    mesh = meshes.make((1, 1), towers=made.towers, batches={})
    optimizer = optim.make(made, name='sgd', momentum=0.9, decay=5e-4, trust=0.0)
    settings = {
        'mean': np.zeros((CROP, CROP, 3), np.float32),
        'eigenvectors': np.eye(3, dtype=np.float32),
        'sigma': np.ones(3, np.float32),
        'std': 0.1,
        'rescale': False,
    }
    one, three = (
        steps.make_train_step(made, optimizer, mesh, seed=0, several=several, **settings)
        for several in (False, True)
    )
    rng = np.random.default_rng(0)
    good = {
        'image': rng.integers(0, 256, (BATCH, CROP, CROP, 3), dtype=np.uint8),
        'z': np.zeros((BATCH, 3), np.float32),
        'label': (np.arange(BATCH) % CLASSES).astype(np.int32),
    }
    bad = {**good, 'z': np.full((BATCH, 3), np.nan, np.float32)}
    rates = {name: np.float32(0.1) for name in ('weights', 'biases', 'conv1', 'colour')}
    start = steps.init_state(made, optimizer, mesh, seed=0, crop=CROP)
    after, _ = one(start, good, rates)
    still, _ = one(after, bad, rates)
    jax.tree.map(np.testing.assert_array_equal, still.variables, after.variables)
    batches = jax.tree.map(lambda *x: np.stack(x), good, bad, good)
    ended, _ = three(start, batches, {n: np.repeat(r, 3) for n, r in rates.items()})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ended.variables, after.variables)
