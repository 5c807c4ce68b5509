"""Every preset and every ablation has the number of parameters in this table, layer by layer."""

import importlib
import pathlib

import jax
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input import prepare
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.rundir import fingerprint
from alexnet_jax.training import optim, steps
from alexnet_jax.training.setup import make_optimizer
from configs import base
from tests.helpers import fixtures

CONFIGS = pathlib.Path(base.__file__).parent
# conv1, conv2, ..., fc8: the paper's are those of `docs/original.md` §1.
PAPER = (34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000)
NOT_2012 = (23_296, 307_392, 663_936, 884_992, 590_080, 37_752_832, 16_781_312, 4_097_000)

CIFAR = (2_432, 25_632, 51_264, 10_250)  # 3 convolutions and the last layer, 10 classes


def changed(**layers):
    names = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8')
    return tuple(n for n in (layers.get(k, v) for k, v in zip(names, PAPER, strict=True)) if n)


# (preset, overrides of config.model): (parameters of each layer, total)
TABLE = {
    ('paper', ()): (PAPER, 60_965_224),
    ('original', ()): (PAPER, 60_965_224),
    ('folder', ()): (PAPER, 60_965_224),
    ('caffe', ()): (PAPER, 60_965_224),
    ('caffenet', ()): (PAPER, 60_965_224),
    ('large_batch', ()): (PAPER, 60_965_224),
    ('one_gpu', ()): (
        changed(conv1=17_472, conv2=153_728, conv3=221_376, conv4=331_968, conv5=442_624),
        59_798_312,
    ),
    ('cnn_star', ()): ((*PAPER[:5], 590_080, *PAPER[5:]), 61_555_304),
    ('cnn_star:fall2009', ()): ((*PAPER[:5], 590_080, *PAPER[5:-1], 41_723_848), 99_182_152),
    ('owt', ()): (NOT_2012, 61_100_840),
    ('no_talk', ()): (
        changed(conv2=384_320, conv3=553_344, fc6=37_756_928, fc7=16_781_312),
        60_714_408,
    ),
    ('caffe', (('groups', 1),)): (
        changed(conv2=614_656, conv4=1_327_488, conv5=884_992),
        62_378_344,
    ),
    ('paper', (('activation', 'tanh'),)): (PAPER, 60_965_224),
    ('paper', (('norms', 'first'),)): (PAPER, 60_965_224),
    ('paper', (('norms', 'none'),)): (PAPER, 60_965_224),
    ('paper', (('norm_alpha_per', 'window'),)): (PAPER, 60_965_224),
    ('paper', (('norm_window', 'all'),)): (PAPER, 60_965_224),
    ('paper', (('pooling', 'disjoint'),)): (PAPER, 60_965_224),
    ('paper', (('dropout', 'none'),)): (PAPER, 60_965_224),
    ('paper', (('dropout', 'inverted'),)): (PAPER, 60_965_224),
    ('paper', (('dropout_at', 'inputs'),)): (PAPER, 60_965_224),
    ('paper', (('dtype', 'bfloat16'),)): (PAPER, 60_965_224),
    ('paper', (('init', 'torch'),)): (PAPER, 60_965_224),
    ('paper', (('remove', 'conv1'),)): (changed(conv1=0, conv2=19_456), 60_642_280),
    ('paper', (('remove', 'conv2'),)): (changed(conv2=0, conv3=332_160), 60_104_808),
    ('paper', (('remove', 'conv3'),)): (changed(conv3=0, conv4=885_120), 60_301_288),
    ('paper', (('remove', 'conv4'),)): (changed(conv4=0), 60_301_288),
    ('paper', (('remove', 'conv5'),)): (changed(conv5=0, fc6=56_627_200), 79_396_968),
    # If the layer before them is removed, groups read what that layer read, as towers do.
    ('caffe', (('remove', 'conv1'),)): (changed(conv1=0, conv2=19_456), 60_642_280),
    ('caffe', (('remove', 'conv3'),)): (changed(conv3=0, conv4=885_120), 60_301_288),
    ('cifar10:80sec', ()): ((2_432, 25_632, 51_264, 65_600, 650), 145_578),
    ('cifar10:19pct', ()): (CIFAR, 89_578),
    ('cifar10:18pct', ()): (CIFAR, 89_578),
    ('cifar10:fig1', ()): (CIFAR, 89_578),
    ('cifar10:fig1_tanh', ()): (CIFAR, 89_578),
    ('cifar10:13pct', ()): ((4_864, 102_464, 664_704, 332_928, 11_530), 1_116_490),
    ('cifar10:11pct', ()): ((4_864, 102_464, 1_329_408, 664_704, 11_530), 2_112_970),
    ('cifar10:11pct_plain', ()): ((4_864, 102_464, 1_329_408, 664_704, 11_530), 2_112_970),
    ('modern', ()): (PAPER, 60_965_224),
    # 11 x 11 x 3 x 96, ... as in the paper, without biases but fc8's; two values per map or unit
    ('alexnet_bn', ()): (
        (34_848, 192, 307_200, 512, 884_736, 768, 663_552, 768, 442_368, 512)
        + (37_748_736, 8_192, 16_777_216, 8_192, 4_097_000),
        60_974_792,
    ),
    # by layer, these are tested against other implementations
    ('squeezenet', ()): (..., 1_248_424),
    ('squeezenet:1.1', ()): (..., 1_235_496),
    ('mobilenet', ()): (..., 3_504_872),
    ('mobilenet:v1', ()): (..., 4_231_976),
    ('mobilenet:v1', (('width', 0.5),)): (..., 1_331_592),
    ('shufflenet', ()): (..., 2_278_604),
    ('shufflenet:x0.5', ()): (..., 1_366_792),
    ('paper', (('width', 0.5),)): (
        (17_472, 76_928, 221_376, 166_080, 110_720, 9_439_232, 4_196_352, 2_049_000),
        16_277_160,
    ),
}


def presets():
    return sorted(
        path.stem for path in CONFIGS.glob('*.py') if path.stem not in ('base', '__init__')
    )


def load_module(preset):
    return importlib.import_module(f'configs.{preset}')


def load(preset, *variant):
    return load_module(preset).get_config(*variant)


def fields(config):
    return {(part, name) for part in config if part != 'seed' for name in config[part]}


def shapes(config, classes=None):
    classes = classes or (10 if config.model.net == 'cuda_convnet' else 1000)
    net = build(classes=classes, **config.model)
    return net, network.shapes(net, config.augment.crop)['params']


@pytest.mark.parametrize(('preset', 'overrides'), TABLE, ids=str)
def test_parameter_counts(preset, overrides):
    config = load(*preset.split(':'))
    config.model.update(dict(overrides))
    net, params = shapes(config, 10_184 if preset == 'cnn_star:fall2009' else None)
    layers = [name for name in net.names if name in params]
    counts = tuple(sum(x.size for x in jax.tree.leaves(params[name])) for name in layers)
    expected, total = TABLE[preset, overrides]
    assert expected in (..., counts) and sum(counts) == total


def test_the_small_network_for_folders():
    config = load('folder', 'small')
    _, params = shapes(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_818_120
    assert config.augment.crop / config.data.size == 224 / 256


def test_half_of_fall_2009_is_held_out(tmp_path):
    for wnid in ('n00000001', 'n00000002', 'n00000003'):
        (tmp_path / 'fall2009' / wnid).mkdir(parents=True)
        for i in range(6):
            fixtures.picture(i).save(tmp_path / 'fall2009' / wnid / f'{i}.png')
    config = load('cnn_star', 'fall2009')
    config.data.update({'source': f'{tmp_path}/fall2009', 'store': f'{tmp_path}/store', 'size': 8})
    store = prepare.ensure(**config.data)
    assert store.counts == {'train': 9, 'val': 9} and store.classes == 3


@pytest.mark.parametrize('preset', [preset for preset, overrides in TABLE if not overrides])
def test_names_in_checkpoints(preset):
    """Names are part of the format: with different names, no earlier run could be resumed."""
    config = load(*preset.split(':'))
    net, _ = shapes(config)
    params, norms = leaves(config.model)
    params |= {f'{norm}/{leaf}' for norm in norms for leaf in ('scale', 'bias')}
    stats = {f'{norm}/{leaf}' for norm in norms for leaf in ('mean', 'var')}
    mesh = meshes.make((1, 1), towers=net.towers, batches={})
    optimizer = make_optimizer(config, net, mesh)
    ema = config.train.ema > 0
    state = steps.abstract_state(net, optimizer, mesh, config.augment.crop, ema)
    trees = {'params': params, 'opt_state/2/trace': params, 'batch_stats': stats}
    if ema:
        trees |= {'ema/params': params, 'ema/batch_stats': stats}
    expected = {f'{tree}/{name}' for tree, names in trees.items() for name in names}
    assert {*fingerprint.named_leaves(state)} == {'step'} | expected


def leaves(model) -> tuple[set, set]:
    """The names of a network's kernels and biases, and of its batch normalizations."""
    both, kernels, norms = [], [], []
    if model.net == 'alexnet':
        convs = len(model.kernels)
        both = [*(f'conv{i}' for i in range(1, convs + 1)), 'fc6', 'fc7', 'fc8']
    elif model.net == 'cuda_convnet':
        both = [*(f'{kind}{i}' for i, kind in enumerate(model.layers, start=1)), 'fc10']
    elif model.net == 'alexnet_bn':
        both = ['fc8']
        kernels = [*(f'conv{i}/kernel' for i in range(1, 6)), 'fc6/kernel', 'fc7/kernel']
        norms = [f'norm{i}' for i in range(1, 8)]
    elif model.net == 'squeezenet':
        parts = ('squeeze', 'expand1x1', 'expand3x3')
        both = ['conv1', 'conv10', *(f'fire{i}/{part}' for i in range(2, 10) for part in parts)]
    else:
        both = ['fc']
        convs = {'conv1': 'kernel'}
        if model.net == 'mobilenet':
            for i in range(1, {1: 14, 2: 18}[model.version]):
                convs |= {f'block{i}/depthwise': 'depthwise', f'block{i}/project': 'kernel'}
                convs |= {f'block{i}/expand': 'kernel'} if model.version == 2 and i > 1 else {}
            convs |= {'conv_last': 'kernel'} if model.version == 2 else {}
        else:
            for unit in (
                f'stage{s}_{i}' for s, n in ((2, 4), (3, 8), (4, 4)) for i in range(1, n + 1)
            ):
                convs |= {f'{unit}/depthwise': 'depthwise'}
                convs |= {f'{unit}/{part}': 'kernel' for part in ('expand', 'project')}
                if unit.endswith('_1'):
                    convs |= {
                        f'{unit}/left_depthwise': 'depthwise',
                        f'{unit}/left_project': 'kernel',
                    }
            convs |= {'conv5': 'kernel'}
        kernels = [f'{name}/{kind}' for name, kind in convs.items()]
        norms = [f'{name}/norm' for name in convs]
    return {*kernels, *(f'{name}/{leaf}' for name in both for leaf in ('kernel', 'bias'))}, {*norms}


def test_every_preset_is_in_the_table():
    cifar = {f'cifar10:{variant}' for variant in load_module('cifar10').VARIANTS}
    variants = {'cnn_star:fall2009', 'squeezenet:1.1', 'mobilenet:v1', 'shufflenet:x0.5'} | cifar
    assert {preset for preset, _ in TABLE} == {*presets()} - {'quickstart', 'cifar10'} | variants


def test_every_switch_of_the_model_is_in_the_table():
    """Every value that a switch can take, except for those that only scale numbers."""
    tried = {name: {value} for name, value in base.get_config().model.items()}
    for preset, overrides in TABLE:
        for name, value in overrides if preset in ('paper', 'caffe') else ():
            tried[name].add(value)
    assert tried['remove'] == {'none', 'conv1', 'conv2', 'conv3', 'conv4', 'conv5'}
    assert tried['norms'] == {'all', 'first', 'none'}
    for name in ('activation', 'norm_alpha_per', 'norm_window', 'pooling', 'dropout_at', 'init'):
        assert len(tried[name]) == 2, name


@pytest.mark.parametrize(
    ('preset', 'variant'),
    [(p, '') for p in presets()]
    + [(p, v) for p in presets() for v in getattr(load_module(p), 'VARIANTS', ())],
)
def test_every_preset_and_variant_can_be_used(preset, variant):
    config = load(preset, variant) if variant else load(preset)
    shapes(config)
    rates = optim.make_rates(examples=1000, batch=config.train.batch, **config.optim)
    assert rates(0, {})['weights'] > 0
    if config.model.net == 'alexnet':
        assert fields(config) == fields(base.get_config())
    assert f'configs/{preset}.py' in load_module(preset).__doc__


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="no variant 'relu'"):
        load('paper', 'relu')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'activation': 'sine'}, "activation='sine': choose one of relu, tanh"),
        ({'remove': 'conv6'}, 'remove'),
        ({'norms': 'some'}, 'norms'),
        ({'dropout': 'yes'}, 'dropout'),
        ({'dtype': 'int8'}, 'dtype'),
        ({'norm_n': 4}, 'odd'),
        ({'conv1_padding': (1, 2, 3)}, 'conv1_padding=.*two numbers'),
        ({'initial': 'torch'}, 'unknown: initial'),
        ({'towers': 3}, '256 kernels .* cannot be divided over towers=3'),
        ({'width': 0.3}, '96 kernels .* width=0.3 cannot be divided'),
        ({'after': ('act',)}, 'must have 5 values, one per layer, not 1'),
        ({'std': (0.01,)}, 'must have 8 values, one per layer, not 1'),
        ({'exchange': ('conv9',)}, 'exchange'),
        ({'after': ('act pool2', 'act', 'act', 'act', 'act')}, 'after'),
        ({'kernels': (96, 256)}, '5 or 6'),
    ],
)
def test_impossible_switches_are_one_line(change, message):
    config = base.get_config()
    with config.unlocked():
        config.model.update(change)
    with pytest.raises(UserError, match=message) as error:
        shapes(config)
    assert '\n' not in str(error.value)


def test_an_unknown_field_is_one_line():
    with pytest.raises(UserError, match='unknown: color'):
        build(classes=10, **base.get_config().model, color=1)


def test_tanh_has_values_of_its_own():
    """The literal variant differs from the text in nothing but the activation."""
    text, literal = load('paper', 'text'), load('paper', 'tanh_literal')
    text.model.activation = 'tanh'
    assert literal.to_dict() == text.to_dict()
    for preset in ('paper', 'original'):
        config = load(preset, 'tanh')
        assert config.model.activation == 'tanh' and set(config.model.bias) == {0.0}
        assert config.optim.rate > load(preset).optim.rate
