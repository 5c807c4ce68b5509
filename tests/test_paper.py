"""docs/paper.md names only what exists and what was measured; tests of sentences that have no other test."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import alexnet, blocks, layers, network
from alexnet_jax.nets.build import build
from alexnet_jax.training import metrics
from tests.helpers import ROOT
from tests.test_docs import FOLDERS, anchors, every_field, missing_links

PAGE = ROOT / 'docs/paper.md'
# Not the digits of conv1, #145, CIFAR-10 or 19pct
NUMBER = re.compile(  # or a duration
    r'(?<![\w.#-])(?:\d+m\d\ds|[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?)(?!\w)'
)
LINK = re.compile(r'\[([^\]]+)\](?![(:])')


def rows(text):
    """The cells of every numbered row."""
    return [line.strip('| ').split(' | ') for line in re.findall(r'^\| \d+ \|.*', text, re.M)]


def defined(text):
    """The targets of `[label]: target`."""
    return dict(re.findall(r'^\[([^\]]+)\]: (\S+)', text, re.M))


@functools.cache
def names(file):
    """Everything that a module defines at its top level or in a class, as in 'Class::method'."""

    def found(body, prefix=''):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from found(node.body, f'{prefix}{node.name}::')
            for target in getattr(node, 'targets', ()):
                yield from (prefix + name.id for name in ast.walk(target) if hasattr(name, 'id'))

    return {*found(ast.parse(file.read_text()).body)}


def missing_names(text):
    """`path::name` and `configs/preset.py:variant` that do not exist."""
    wrong = []
    for path, name in re.findall(r'`([\w/.]+\.py)::([\w:]+)`', text):
        files = [file for folder in FOLDERS if (file := ROOT / folder / path).exists()]
        if not files or name not in names(files[0]):
            wrong.append(f'{path}::{name}')
    for preset in re.findall(r'`(configs/\w+\.py:\w+)`', text):
        try:
            configfile.load(preset)
        except UserError:
            wrong.append(preset)
    fields = re.findall(r'`config\.(\w+\.\w+)', text)
    return wrong + [field for field in fields if f'config.{field}' not in every_field()]


@functools.cache
def paragraphs(target):
    """The numbers in each paragraph, and in each row of a table, of a section: 'FILE.md#anchor'."""
    path, _, anchor = target.partition('#')
    section, level = [], 0
    for line in (PAGE.parent / path).read_text().replace('−', '-').splitlines():
        if head := re.match('(#+) ', line):
            if level and len(head[1]) <= level:
                break
            if anchors(line) == {anchor}:
                level = len(head[1])
        if level:
            section.append(f'{line}\n\n' if line.startswith('|') else f'{line}\n')
    return [{*NUMBER.findall(part)} for part in re.split(r'\n\s*\n', ''.join(section))]


def wrong_numbers(text):
    """Numbers of 'measured here' that are not together in a paragraph of the section linked after them."""
    wrong, targets = [], defined(text)
    for number, *_, measured, _ in rows(text):
        for piece in measured.replace('−', '-').split('<br>'):
            *parts, rest = LINK.split(re.sub(r'\[[^\]]*\]\([^)]*\)', '', piece))
            for said, label in zip(parts[::2], parts[1::2], strict=True):
                numbers = {*NUMBER.findall(said)}
                if not any(numbers <= found for found in paragraphs(targets[label])):
                    wrong.append(f'row {number}: {said.strip()} [{label}]')
            if NUMBER.search(rest):
                wrong.append(f'row {number}: {rest.strip()}')
    return wrong


def test_the_page():
    text = PAGE.read_text()
    assert [row[0] for row in rows(text)] == [str(i + 1) for i in range(len(rows(text)))]
    assert {len(row) for row in rows(text)} == {5}
    assert {*LINK.findall(text)} == {*defined(text)}
    assert missing_links(PAGE, ''.join(f'[a]({target})' for target in defined(text).values())) == []
    assert missing_names(text) == []
    assert wrong_numbers(text) == []


def test_what_the_log_says_about_the_claims():
    """Numbers in the text of a link are together in a paragraph of the section that it names."""
    log = (ROOT / 'experiments/LOG.md').read_text().replace('−', '-')
    targets, wrong = defined(log), []
    found = re.findall(r'\[([^][]+)\]\[([^][]+)\]', log)
    for said, label in found:
        target = targets[label]
        target = f'../experiments/{"LOG.md" * target.startswith("#")}{target}'
        numbers = {*NUMBER.findall(said)}
        kept = (part | {n.lstrip('+-') for n in part} for part in paragraphs(target))
        if not any(numbers <= part for part in kept):  # a sign may be left out, but not be wrong
            wrong.append((said, label))
    assert len(found) > 20 and {label for _, label in found} == {*targets} and wrong == []


LINKS = '\n[b]: measurements.md#agreement-with-other-implementations\n'


@pytest.mark.parametrize(
    ('check', 'text', 'count'),
    [
        (missing_names, '`nets/layers.py::lrn`, `tests/test_docs.py::test_sections`', 0),
        (missing_names, '`tests/nets/test_layers.py::TestNorms::test_layer`', 0),
        (missing_names, '`training/steps.py::VIEWS`, `config.model.dropout=1`', 0),
        (missing_names, '`nets/layers.py::norm`, `tests/test_doc.py::test_sections`', 2),
        (missing_names, '`tests/nets/test_layers.py::TestNorms::test_lrn_of_ones`', 1),
        (missing_names, '`configs/paper.py:tanh`, `configs/paper.py:relu`', 1),
        (missing_names, '`config.model.alpha`', 1),
        (wrong_numbers, '| 1 | x | y | losses of #145 agree to 1e-9 [b] | z |', 0),
        (wrong_numbers, '| 1 | x | y | losses agree to 1e-8 [b] | z |', 1),
        (wrong_numbers, '| 1 | x | y | 1e-9 | z |', 1),
    ],
)
def test_the_checks_detect_mistakes(check, text, count):
    assert len(check(text + LINKS)) == count


def test_numbers_belong_to_one_row(monkeypatch):
    monkeypatch.setattr('tests.test_paper.paragraphs', lambda target: [{'+1.5', '3'}, {'-2', '4'}])
    for said, count in (('+1.5 with 3', 0), ('−2', 0), ('+1.5 with 4', 1), ('2', 1), ('1.5', 1)):
        assert len(wrong_numbers(f'| 1 | x | y | {said} [b] | z |{LINKS}')) == count


# --- sentences that no other test covers


def test_the_numbers_of_the_text():
    """§2 to §5, in `paper.py:text`; and no regularization of any kind in Figure 1's networks."""
    text = configfile.load('configs/paper.py:text').to_dict()
    for part, fields in {
        'data': {'size': 256},
        'augment': {'crop': 224, 'random': True, 'chunk': 1},
        'colour': {'std': 0.1},
        'model': {
            'towers': 2,
            'kernels': (96, 256, 384, 384, 256),
            'hidden': (4096, 4096),
            'conv1_padding': (0, 3),
            'after': ('act norm pool', 'act norm pool', 'act', 'act', 'act pool'),
            'exchange': ('conv3', 'fc6', 'fc7'),
            'activation': 'relu',
            'norm_k': 2.0,
            'norm_n': 5,
            'norm_alpha': 1e-4,
            'norm_alpha_per': 'element',
            'norm_beta': 0.75,
            'pooling': 'overlapping',
            'dropout': 'original',
            'dropout_at': 'outputs',
            'std': (0.01,) * 8,
            'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        },
        'optim': {
            'momentum': 0.9,
            'decay': 0.0005,
            'rate': 0.01,
            'bias_factor': 1.0,
            'conv1': (),
            'schedule': 'plateau',
            'factor': 0.1,
            'max_drops': 3,
        },
        'train': {'batch': 128},
    }.items():
        assert {name: text[part][name] for name in fields} == fields
    assert alexnet.POOLING[text['model']['pooling']] == (3, 2)
    assert alexnet.SIZES[:5] == (11, 5, 3, 3, 3)
    for variant in ('fig1', 'fig1_tanh'):
        config = configfile.load(f'configs/cifar10.py:{variant}')
        assert (config.optim.decay, config.optim.decays, config.augment.random) == (0.0, (), False)
        assert (config.colour.std, config.model.norms) == (0.0, 'none')


def test_top_5_is_five():
    """§2: of ten images whose true classes rank first to tenth, one is right, and five are in the top 5."""
    scores = jnp.tile(-jnp.arange(10.0), (10, 1))
    sums = metrics.count(scores, jnp.zeros(10), jnp.arange(10), jnp.ones(10))
    assert metrics.values(sums) == {'loss': 0.0, 'top1_error': 90.0, 'top5_error': 50.0}


def test_a_relu_learns_from_positive_inputs_alone():
    """§3.3: the gradient of a unit is that of its positive inputs; without any, it is 0."""

    def unit(weight, inputs):
        return jnp.sum(blocks.ACTIVATIONS['relu'](weight * inputs))

    gradient = jax.grad(unit)
    assert gradient(2.0, jnp.array([-3.0, 1.0, -1.0])) == 1.0
    assert gradient(2.0, jnp.array([-3.0, -1.0])) == 0.0


def test_dropped_units_learn_nothing():
    """§4.2: of one image, only the units that its masks keep get a gradient, in fc6 and fc7."""
    config = configfile.load('configs/paper.py')
    config.model.width = 0.0625
    net = build(classes=10, **config.model)
    params = jax.jit(lambda: network.init(net, jax.random.key(0), 64))()['params']
    images = 60 * np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    train = network.Training(jax.random.key(1), rows=jnp.arange(1))

    def loss(biases):
        changed = {layer: {**params[layer], 'bias': bias} for layer, bias in biases.items()}
        logits, out = net.apply({'params': {**params, **changed}}, images, train)
        return logits[0, 0], out

    biases = {layer: params[layer]['bias'] for layer in ('fc6', 'fc7')}
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(biases)
    for i, layer in enumerate(biases):
        active, key = np.concatenate(out[layer]) > 0, jax.random.fold_in(train.key, i)
        units = active.shape[1]
        kept = np.concatenate([layers.dropout_mask(key, train.rows, t, units) for t in range(2)])
        np.testing.assert_array_equal(gradients[layer] != 0, active & kept)
        assert active.mean() > 0.9 and 0.3 < kept.mean() < 0.7
