"""What rows of one table must share, and what an experiment refuses to run."""

import copy
import json
import shutil

import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import store as stores
from experiments import lab, provenance
from tests.helpers.experiments import leave, make
from tests.helpers.stores import write_store


@pytest.fixture
def package(tmp_path):
    """A copy of the library's sources."""
    return shutil.copytree(
        provenance.PACKAGE, tmp_path / 'package', ignore=shutil.ignore_patterns('__pycache__')
    )


def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_training_code(package):
    """Comments, docstrings and formatting do not count, nor do files that cannot change a result."""
    before = provenance.code(package)
    assert before == provenance.code(package) == provenance.code()
    layers = package / 'nets/layers.py'
    text = layers.read_text()
    layers.write_text('# a comment\n' + text.replace('\n\n\n', '\n\n\n\n# another\n\n\n'))
    rewrite(package / 'training/evaluation.py', 'every picture once', 'each picture once')
    rewrite(package / 'training/evaluation.py', "('centre', 'ten')", '("centre", "ten")')
    for name in ('main.py', 'devices/preemption.py', 'input/sources/folder.py'):
        rewrite(package / name, 'import', 'import os\nimport')
    assert provenance.code(package) == before
    layers.write_text(text + 'x = 1\n')
    assert provenance.code(package) != before
    layers.write_text(text)
    (package / 'nets/new.py').write_text('')
    assert provenance.code(package) != before


@pytest.mark.parametrize('name', [*provenance.CANNOT])
def test_what_cannot_change_a_result_is_there(name):
    assert [*provenance.PACKAGE.glob(name)]


def test_constants_and_names_count():
    trees = [
        provenance.normal(provenance.ast.parse(text))
        for text in ('f(1)', 'f(1.0)', 'f(True)', 'f("1")', 'f(None)', 'f()', 'g(1)', 'f(x=1)')
    ]
    assert len({json.dumps(tree) for tree in trees}) == len(trees)
    assert provenance.normal(provenance.ast.parse('def f(): "a"')) == provenance.normal(
        provenance.ast.parse('def f(): "b"')
    )


def test_empty_parts_of_formatted_strings_do_not_count():
    plain, added = (provenance.ast.parse("f'{x:{y}}'") for _ in range(2))
    specification = added.body[0].value.values[0].format_spec
    specification.values.append(provenance.ast.Constant(''))  # as Python 3.12.1 reads it
    assert provenance.normal(added) == provenance.normal(plain)
    other = provenance.ast.parse("f'{x:{y}} '")
    assert provenance.normal(other) != provenance.normal(plain)


def row(name='a', config=None, command=(), code='c', data='0'):
    deciding = {'config.optim.rate': 0.01, 'config.optim.decay': 0.1, **(config or {})}
    return {
        'name': name,
        'command': ['--config=configs/paper.py', *command],
        'fingerprint': {'code': code, 'config': deciding, 'data': data},
    }


@pytest.mark.parametrize(
    ('second', 'words'),
    [
        (row(), ''),
        (row(code='d'), r'their training code differs \(c and d\)'),
        (row(data='1'), r'their pictures differ \(identity 0 and 1\)'),
        (
            row('b', {'config.optim.rate': 0.02}),
            r'their configs differ in config.optim.rate \(0.01 and 0.02\)',
        ),
        # what the row is about
        (row('b', {'config.optim.rate': 0.02}, ['--config.optim.rate=0.02']), ''),
        # but not from one seed to the next
        (
            row('a', {'config.optim.rate': 0.02}, ['--config.optim.rate=0.02']),
            'differ in config.optim.rate',
        ),
        (row('a', {'config.train.init_from': 'x'}), ''),
        (row('b', {'config.optim.rate': 0.02}, ['--config=configs/one_gpu.py']), ''),
        (row('b', command=['--config.data.source=half'], data='1'), ''),
        ({'name': 'a', 'command': []}, 'one has no fingerprint'),
    ],
)
def test_which_rows_go_together(second, words):
    if not words:
        return provenance.check({'a-0': row(), 'x': second})
    with pytest.raises(UserError, match=words) as error:
        provenance.check({'a-0': row(), 'x': second})
    said = str(error.value)
    assert said.startswith('a-0 and x do not belong into one table: ') and '\n' not in said


def test_earlier_results_go_together():
    provenance.check({key: {'name': key, 'command': []} for key in 'ab'})
    assert provenance.earlier({'a': {'name': 'a'}, 'b': row()})
    assert not provenance.earlier({'b': row()})


def test_the_fields_that_decide():
    def deciding(config, **changes):
        config = configfile.load(f'configs/{config}.py')
        config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
        return provenance.deciding(config.to_dict())

    for config, decides in (('paper', True), ('original', False)):  # by plateaus, and not
        plain = deciding(config)
        assert plain == deciding(
            config, seed=5, run__threads=7, data__store='x', data__source='y', data__dir='z'
        )
        assert (plain != deciding(config, run__eval_every=7.0)) is decides
        assert plain != deciding(config, model__dropout='none')
        assert plain != deciding(config, data__val_fraction=0.2)


def test_the_fingerprint_of_a_row(tmp_path):
    made = make(tmp_path, start=leave).run('a', 0, 'configs/original.py', {'optim.rate': 0.5})
    fingerprint, store = made['fingerprint'], stores.open_store(tmp_path / 'runs/pictures')
    assert fingerprint['code'] == provenance.code()
    assert fingerprint['config']['config.optim.rate'] == 0.5
    assert int(fingerprint['data'], 16) == store.identity()
    kept = json.loads((tmp_path / 'results/trial-smoke.json').read_text())
    assert kept == {'a-0': made}
    provenance.check({**kept, 'a-1': copy.deepcopy(made)})


def test_rows_of_other_code_or_pictures_are_refused(tmp_path, monkeypatch):
    started = []

    def start(command, workdir, until):
        started.append(workdir.name)
        return leave(command, workdir, until)

    trial = make(tmp_path, start=start)
    first = trial.run('a', 0, 'configs/original.py')
    with monkeypatch.context() as patch:
        patch.setattr(provenance, 'code', lambda: 'new')
        assert trial.run('a', 0, 'configs/original.py') == first  # it is there
        old = first['fingerprint']['code']
        with pytest.raises(UserError, match=rf'a-0 was made by other training code \({old}\) than'):
            trial.run('b', 0, 'configs/original.py')
        trial.results['a-0']['extra'] = {}
        with pytest.raises(UserError, match='other training code'):
            trial.extend('a-0', 'more', dict)
    assert started == ['a-0']
    shutil.rmtree(tmp_path / 'runs/pictures')
    size = {'format': 'jpg', 'size': 256, 'counts': {'train': 1, 'val': 1}}
    write_store(tmp_path / 'runs/pictures', **size, seed=1)
    with pytest.raises(UserError, match='a-0 and b-0 .*: their pictures differ'):
        trial.run('b', 0, 'configs/original.py')
    assert [*json.loads((tmp_path / 'results/trial-smoke.json').read_text())] == ['a-0']


def test_a_run_goes_on_with_the_code_that_began_it(tmp_path, monkeypatch):
    trial = make(tmp_path, start=leave)
    workdir = trial.workdir('a', 0)
    provenance.note(workdir, 'older')
    provenance.note(workdir, 'old')  # the start before made no run directory
    workdir.mkdir()
    provenance.note(workdir, 'old')
    with pytest.raises(UserError, match=r'a-0: was begun by other training code \(old, now '):
        trial.run('a', 0, 'configs/original.py')
    trial.workdir('b', 0).mkdir(parents=True)
    with pytest.raises(UserError, match=r'b-0: was begun by other training code \(not noted, now '):
        trial.run('b', 0, 'configs/original.py')


@pytest.mark.parametrize('commit', ['abc-dirty', 'unknown'])
def test_uncommitted_code_is_refused(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(provenance.directory, 'commit', lambda: commit)

    def run(scale, **options):
        folders = {'runs': tmp_path / scale, 'results': tmp_path / scale}
        trial = lab.Lab('trial', scale, seeds=1, start=leave, **folders, **options)
        return trial.run('a', 0, 'configs/original.py')

    with pytest.raises(UserError, match='a-0: the code is not committed.*--allow_dirty'):
        run('small')
    assert not (tmp_path / 'small').exists()
    made = run('small', allow_dirty=True)
    assert made['uncommitted'] and '1 run of uncommitted code' in lab.measured_on({'a-0': made})
    assert run('smoke')['uncommitted']
    monkeypatch.setattr(provenance.directory, 'commit', lambda: 'abc')
    made = run('full')
    assert not made['uncommitted'] and 'uncommitted' not in lab.measured_on({'a-0': made})
