"""Where config files are found, and what they can import."""

import sys
import tomllib

import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from tests.helpers import ROOT

INHERITS = (
    'from configs import {module}\n\n\n'
    'def get_config():\n    config = {module}.get_config()\n    config.seed += 7\n    return config\n'
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, first on sys.path, as under `python -m`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def imported():
    """The modules of every `configs` that is imported."""
    return {name: module for name, module in sys.modules.items() if name.startswith('configs')}


@pytest.mark.parametrize('name', ['tanh', ''])
def test_a_preset_has_two_names_in_any_folder(elsewhere, name):
    short, long = (
        configfile.load(f'{preset}{name and ":"}{name}') for preset in ('paper', 'configs/paper.py')
    )
    assert short.to_dict() == long.to_dict()
    assert short.model.activation == (name or 'relu')


def test_a_config_of_ones_own_inherits_from_the_presets_and_from_its_neighbors(elsewhere):
    folder = elsewhere / 'my configs'
    folder.mkdir()
    (folder / 'one.py').write_text(INHERITS.format(module='caffe'))
    (folder / 'two.py').write_text(INHERITS.format(module='one'))
    config = configfile.load('my configs/two.py')
    assert (config.seed, config.model.towers) == (14, 1)


def test_a_strangers_configs_changes_nothing(elsewhere, monkeypatch):
    (elsewhere / 'mine').mkdir()
    (elsewhere / 'mine' / 'own.py').write_text(INHERITS.format(module='original'))
    (elsewhere / 'configs').mkdir()
    for name in ('__init__', 'base', 'original'):
        (elsewhere / 'configs' / f'{name}.py').write_text('raise SystemExit("a stranger")\n')
    monkeypatch.setitem(sys.modules, 'configs.base', object())
    before = imported()
    assert configfile.load('quickstart').data.source == 'alexnet_shapes'
    assert configfile.load('mine/own.py').seed == 7
    assert imported() == before


def test_a_file_comes_before_a_preset(elsewhere):
    (elsewhere / 'configs').mkdir()
    (elsewhere / 'configs' / 'paper.py').write_text(INHERITS.format(module='base'))
    assert configfile.load('configs/paper.py').seed == 7
    assert configfile.load('paper').seed == 0


@pytest.mark.parametrize('name', ['papre', 'configs/papre.py', 'paper.py', 'other/paper.py'])
def test_no_such_config(elsewhere, name):
    with pytest.raises(
        UserError, match=r'did you mean paper\?.* the presets are alexnet_bn, .* paper'
    ):
        configfile.load(name)


def test_modules_are_forgotten_after_a_config_that_fails(elsewhere):
    (elsewhere / 'wrong.py').write_text('from configs import caffe\n1 / 0\n')
    before = imported()
    with pytest.raises(UserError, match='wrong.py: line 2: ZeroDivisionError'):
        configfile.load('wrong.py')
    assert imported() == before


def test_the_wheel_has_every_package_and_the_presets():
    options = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    folders = {
        '.'.join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / 'alexnet_jax').rglob('__init__.py')
    }
    assert {*options['packages']} == folders | {'alexnet_jax.configs'}
    assert options['package-dir'] == {'alexnet_jax.configs': 'configs'}
    assert not (ROOT / 'configs' / '__init__.py').exists()
    assert 'weights/bundles/*/*' in options['package-data']['alexnet_jax']


def test_modules_beside_a_config(elsewhere):
    """They can have the names of presets, but cannot replace what the presets import."""
    (elsewhere / 'a_helper_beside.py').write_text('RATE = 0.25\n')
    (elsewhere / 'base.py').write_text('')
    (elsewhere / 'paper.py').write_text(
        'import a_helper_beside\nfrom configs import paper\n\n\ndef get_config():\n'
        '    config = paper.get_config()\n    config.optim.rate = a_helper_beside.RATE\n'
        '    return config\n'
    )
    path = sys.path.copy()
    assert configfile.load('paper.py').optim.rate == 0.25
    assert sys.path == path


@pytest.mark.parametrize('name', ['a:b.py', 'paper'])
def test_names_of_files_that_look_like_something_else(elsewhere, name):
    (elsewhere / name).write_text(INHERITS.format(module='caffe'))
    assert configfile.load(name).seed == (0 if name == 'paper' else 7)


def test_a_frozen_config(elsewhere):
    (elsewhere / 'mine.py').write_text(
        'from ml_collections import FrozenConfigDict\n\nfrom configs import quickstart\n\n\n'
        'def get_config():\n    return FrozenConfigDict(quickstart.get_config())\n'
    )
    assert configfile.load('mine.py').to_dict() == configfile.load('quickstart').to_dict()


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('config.run.foo = 1', 'line 6: .*foo'),
        ('config.optim.rtae = 0.1', 'line 6: .*rtae'),
        ('raise SystemExit(3)', 'line 6: SystemExit: 3'),
        ('raise ValueError("abc " * 999)', r'line 6: ValueError: (abc ){74}abc  \.\.\.$'),
        ('raise type("Own", (BaseException,), {})("a\\nb")', 'line 6: Own: a b'),
        ('return type(config)()', 'lacks fields .*.config.augment.area and [0-9]+ more.;'),
        ('return {}', 'must define get_config'),
        ('config.unlock(); del config.optim', 'lacks .*config.optim.bias_drops and 2[0-9]+ more'),
        ('config.unlock(); del config.optim.rate', 'lacks fields .*.config.optim.rate.;'),
        ('config.unlock(); config.run.more = 1', 'config.run.more: no such field'),
        (
            'config.unlock(); config.train.batch = None',
            'config.train.batch=None: must be of type int',
        ),
    ],
)
def test_what_a_config_file_cannot_do(elsewhere, line, words):
    (elsewhere / 'mine.py').write_text(
        f'from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n'
        f'    {line}\n    return config\n'
    )
    with pytest.raises(UserError, match=words) as error:
        configfile.load('mine.py')
    assert '\n' not in str(error.value)
