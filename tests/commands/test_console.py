"""The console command `alexnet-jax`."""

import re
import sys

import pytest

from alexnet_jax import __main__ as console
from alexnet_jax import main
from alexnet_jax.common.errors import UserError
from tests.helpers import ROOT


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['/bin/alexnet-jax', *arguments])
    console.main()


@pytest.mark.parametrize('arguments', [(), ('--help',), ('-h',)])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    call(monkeypatch, *arguments)
    out = capsys.readouterr().out
    assert [name for name in console.COMMANDS if name not in out] == []


def test_the_version(monkeypatch, capsys):
    call(monkeypatch, '--version')
    declared = re.search(r'^version = "(.*)"$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    assert capsys.readouterr().out == f'alexnet_jax {declared}\n'


@pytest.mark.parametrize('name', console.COMMANDS[1:])
def test_every_command_has_its_help(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, name, '--help')
    assert end.value.code == 0 and f'usage: alexnet-jax {name} ' in capsys.readouterr().out


@pytest.mark.parametrize('arguments', [('train', '--seed=1'), ('--seed=1',)])
def test_flags_alone_train(monkeypatch, arguments):
    started = []
    monkeypatch.setattr(main, 'main', lambda: started.append(sys.argv[1:]))
    call(monkeypatch, *arguments)
    assert started == [['--seed=1']]


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('evaluat', 'evaluat: no such command; the commands are train, prepare, evaluate'),
        ('quickstart', 'to train a preset: alexnet-jax --config=quickstart'),
    ],
)
def test_no_such_command(monkeypatch, name, words):
    with pytest.raises(UserError, match=words):
        call(monkeypatch, name)


def test_summary(monkeypatch, capsys):
    """The config's fields can be set, as in training."""
    call(monkeypatch, 'summary', '--config=mobilenet', '--config.model.width=0.5', '--classes=10')
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total == ['total', f'{1_968_680 - 990 * 1281:,}', f'{97_131_840 - 990 * 1280:,}']
    with pytest.raises(UserError, match='did you mean config.model.width'):
        call(monkeypatch, 'summary', '--config=mobilenet', '--config.model.widht=1')
