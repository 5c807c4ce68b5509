"""How commands end: one line for what the user can fix, a traceback for a bug."""

import errno
import io
import os
import pathlib
import sys
from types import SimpleNamespace

import pytest

from alexnet_jax import command
from alexnet_jax.common import errors, paths
from experiments import lab


@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR])
def test_a_path_without_access_is_one_line(number):
    line, code = errors.end(OSError(number, os.strerror(number), pathlib.Path('folder/file')))
    assert (
        line
        == f'error: folder/file: {os.strerror(number)}; give another path or make this one accessible'
    )
    assert code == errors.MISTAKE
    line, code = errors.end(OSError(number, os.strerror(number)))  # of a process, say
    assert code == errors.BUG


@pytest.mark.parametrize(
    ('text', 'safe'),
    [
        ('a/Übung 鳥.jpg', 'a/Übung 鳥.jpg'),
        ('a\nb\tc', r'a\nb\tc'),
        ('\x1b[31mred\x07\x9b', r'\x1b[31mred\x07\x9b'),
        (os.fsdecode(b'caf\xe9'), r'caf\xe9'),
        ('a\u2028b\u202egpj', r'a\u2028b\u202egpj'),
        ('\ud800', r'\ud800'),
    ],
)
def test_nothing_but_text_is_sent_to_a_terminal(text, safe):
    assert errors.printable(text) == safe
    assert errors.end(errors.UserError(text)) == (f'error: {safe}', errors.MISTAKE)
    said, code = errors.end(ValueError(text))
    assert code == errors.BUG and text.split('\n')[0] in said or safe in said
    assert all(line.isprintable() for line in said.split('\n'))


@pytest.mark.parametrize('encoding', ['ascii', 'latin1', 'utf-8'])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding))
    command.run(lambda: print('Möwe 🐦 \udcff'))
    shown = raw.getvalue().decode(encoding)
    assert shown.replace('\\xf6', 'ö').replace('\\U0001f426', '🐦') == 'Möwe 🐦 \\udcff\n'


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    def fill(file):
        file.write(b'new')
        raise OSError(errno.ENOSPC, 'No space left on device')

    paths.replace(tmp_path / 'file', b'old')
    with pytest.raises(OSError, match='No space left'):
        paths.replace(tmp_path / 'file', fill)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'old']


def test_a_full_disk_is_one_line():
    line, code = errors.end(OSError(errno.ENOSPC, 'No space left on device'))
    assert (line, code) == (
        'error: cannot write: No space left on device; free some space and try again',
        2,
    )


@pytest.mark.parametrize('folder', ['file/results', 'results'])
def test_results_of_an_experiment_in_a_folder_that_cannot_be_written(
    tmp_path, monkeypatch, capsys, folder
):
    def write(file, content):
        raise PermissionError(errno.EACCES, 'Permission denied', str(file))

    def run(trial):
        lab.add(trial._file, 'a-0', {})

    monkeypatch.setattr(lab.paths, 'replace', write)
    monkeypatch.setattr(lab.signal, 'signal', lambda number, handler: None)
    monkeypatch.setattr(sys, 'argv', ['trial', f'--results={tmp_path / folder}'])
    (tmp_path / 'file').touch()
    module = SimpleNamespace(__file__='trial.py', __doc__='', run=run)
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: lab._main(module))
    said = capsys.readouterr().err
    assert ended.value.code == errors.MISTAKE and said.count('\n') == 1
    assert said.startswith(f'error: {tmp_path / folder}/trial-small.json: ')


def test_how_to_install_an_extra(monkeypatch):
    monkeypatch.setattr(errors.importlib.metadata, 'version', lambda name: '1.0')
    assert errors.install('onnx') == "pip install 'alexnet_jax[onnx]'"

    def missing(name):
        raise errors.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(errors.importlib.metadata, 'version', missing)
    assert errors.install('onnx') == "pip install '.[onnx]'"
