"""What the notebook names exists, and it is stored without outputs. `make notebook` runs it."""

import ast
import importlib
import json
import re
import types

import pytest

from alexnet_jax.common import configfile
from alexnet_jax.nets.build import build
from alexnet_jax.weights import hub
from tests.helpers import ROOT

FILE = ROOT / 'notebooks/alexnet.ipynb'
LONGEST = 24  # lines of a cell
MAGIC = re.compile(r'^( *)[%!].*', re.M)  # what only IPython understands


def cells(kind):
    book = json.loads(FILE.read_text(encoding='utf-8'))
    return [cell for cell in book['cells'] if cell['cell_type'] == kind]


def code():
    return '\n\n'.join(MAGIC.sub(r'\1pass', ''.join(cell['source'])) for cell in cells('code'))


def missing_names(text):
    """Imports, and attributes of imported modules and classes, that do not exist."""
    tree, known, wrong = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                top = importlib.import_module(alias.name.partition('.')[0])
                known[alias.asname or top.__name__] = module if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                try:
                    found = importlib.import_module(f'{node.module}.{alias.name}')
                except ModuleNotFoundError:
                    found = getattr(importlib.import_module(node.module), alias.name, None)
                if found is None:
                    wrong.append(f'{node.module}.{alias.name}')
                known[alias.asname or alias.name] = found
    for first, *rest in chains(tree):
        here = known.get(first)
        for name in rest:
            if not isinstance(here, types.ModuleType | type):
                break
            if not hasattr(here, name):
                wrong.append('.'.join([first, *rest]))
            here = getattr(here, name, None)
    return wrong


def wrong_settings(text):
    """Presets, fields of configs and networks that do not exist, and values that do not fit."""
    tree, wrong, configs = ast.parse(text), [], {}
    names = [*hub.names(), *(f'hub:{name}' for name in hub.names())]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            match = re.fullmatch(r"configfile\.load\('(.*)'\)", ast.unparse(node.value))
            if match:
                configs[ast.unparse(node.targets[0])] = configfile.load(match[1])
        elif isinstance(node, ast.Call):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if ast.unparse(node.func) == 'alexnet_jax.load':
                wrong += [name for name in constants if name not in names]
            elif ast.unparse(node.func) == 'train':
                wrong += wrong_fields({}, constants[1])
        elif isinstance(node, ast.Constant) and str(node.value).startswith('hub:'):
            wrong += [] if node.value in names else [node.value]
        elif isinstance(node, ast.Dict):
            pairs = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if k}
            if all('.' in name for name in pairs):
                wrong += wrong_fields({k: ast.literal_eval(v) for k, v in pairs.items()})
    for first, *rest in chains(tree):
        if first in configs and '.'.join(['config', *rest]) not in fields(configs[first]):
            wrong.append('.'.join([first, *rest]))
    return wrong


def chains(tree):
    """The attributes of names: ['plt', 'show'] for plt.show."""
    attributes = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [text.split('.') for text in attributes if re.fullmatch(r'[\w.]+', text)]


def fields(config):
    """The names of all fields of a config, and of its groups and their methods."""
    names = {*configfile.fields(config)}
    return names | {f'config.{name}' for name in (*config, 'update_from_flattened_dict')}


def wrong_fields(changes, preset='quickstart'):
    try:
        config = configfile.load(preset)
        config.update_from_flattened_dict(changes)
        build(classes=10, **config.model)
    except Exception as error:
        return [f'{changes}: {error}']
    return []


def test_stored_without_outputs():
    book = json.loads(FILE.read_text(encoding='utf-8'))
    assert book['nbformat'] == 4 and book['metadata']['kernelspec']['name'] == 'python3'
    assert len({cell['id'] for cell in book['cells']}) == len(book['cells'])
    assert {cell['cell_type'] for cell in book['cells']} == {'code', 'markdown'}
    for cell in cells('code'):
        assert cell['outputs'] == [] and cell['execution_count'] is None
        assert len(cell['source']) <= LONGEST


def test_names_exist():
    assert missing_names(code()) == []


def test_settings_exist():
    assert wrong_settings(code()) == []
    text = ''.join(line for cell in cells('markdown') for line in cell['source'])
    suggested = re.findall(r'`(\{.*?\})`', text)
    assert suggested
    assert [wrong for one in suggested for wrong in wrong_fields(ast.literal_eval(one))] == []


@pytest.mark.parametrize(
    ('check', 'text', 'wrong'),
    [
        (missing_names, 'from alexnet_jax.training import loops', 1),
        (missing_names, 'from alexnet_jax.training import loop\nloop.trian()', 1),
        (missing_names, 'import matplotlib.pyplot as plt\nplt.plot(1)\nplt.plott(1)', 1),
        (wrong_settings, "a = configfile.load('paper')\na.augment.crop\na.augment.size", 1),
        (wrong_settings, "alexnet_jax.load('squeezenet')\nalexnet_jax.load('squeezenot')", 1),
        (wrong_settings, "train('a', 'cifar10:fig2', {})", 1),
        (wrong_settings, "{'train.init_from': 'hub:nothing'}", 1),
        (wrong_settings, "{**few, 'optim.rates': 0.1}", 1),
        (wrong_settings, "{'optim.rate': 'fast'}", 1),
        (wrong_settings, "{'model.activation': 'sine'}", 1),
    ],
)
def test_the_checks_detect_mistakes(check, text, wrong):
    assert len(check(text)) == wrong
