"""Tests what rows of one table must share, and what an experiment refuses to run."""

import copy
import functools
import importlib
import json
import shutil

import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import Stopped, UserError
from alexnet_jax.input import store as stores
from experiments import lab, provenance
from tests.helpers.experiments import leave, leave_checkpoint, make
from tests.helpers.stores import write_store


@pytest.fixture
def package(tmp_path):
    """Copies the library's sources."""
    return shutil.copytree(
        provenance.PACKAGE, tmp_path / 'package', ignore=shutil.ignore_patterns('__pycache__')
    )


def rewrite(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_training_code(package):
    """Ignores comments, docstrings, formatting, and files that cannot change a result."""
    before = provenance.code(package)
    assert before == provenance.code(package) == provenance.code()
    layers = package / 'nets/layers.py'
    text = layers.read_text()
    layers.write_text('# a comment\n' + text.replace('\n\n\n', '\n\n\n\n# another\n\n\n'))
    rewrite(package / 'training/evaluation.py', '"""', '"""Other words. ')
    rewrite(package / 'training/evaluation.py', "('center', 'ten')", '("center", "ten")')
    for name in ('main.py', 'devices/preemption.py', 'input/sources/folder.py'):
        rewrite(package / name, 'import', 'import os\nimport')
    assert provenance.code(package) == before
    layers.write_text(text + 'x = 1\n')
    assert provenance.code(package) != before
    layers.write_text(text)
    (package / 'nets/new.py').write_text('')
    assert provenance.code(package) != before


def test_the_presets_of_a_row(tmp_path):
    """Imported presets count, without comments, so rows of different presets share some."""
    shutil.copytree(provenance.ROOT / 'configs', tmp_path / 'configs')
    preset = tmp_path / 'configs/one_gpu.py'

    def now(argument=f'{preset}:variant'):
        return provenance.presets(argument, tmp_path)

    first = now()
    names = ('base', 'paper', 'original', 'one_gpu')
    assert {*first} == {f'configs/{name}.py' for name in names}
    rewrite(preset, 'def get', '# a comment\ndef get')
    assert now() == first
    rewrite(tmp_path / 'configs/base.py', "'std': 0.1,", "'std': 0.2,")
    assert {name for name, value in now().items() if value != first[name]} == {'configs/base.py'}
    own = tmp_path / 'mine.py'
    own.write_text('import configs.paper\n')
    assert {*now(str(own))} == {'mine.py', 'configs/paper.py', 'configs/base.py'}


@pytest.mark.slow
def test_presets_that_were_edited_between_two_rows(tmp_path, monkeypatch):
    trial = make(tmp_path, start=leave)
    trial.run('reference', 0, 'configs/original.py')
    presets = provenance.presets
    monkeypatch.setattr(
        provenance, 'presets', lambda argument: presets(argument) | {'configs/base.py': 'other'}
    )
    with pytest.raises(UserError, match='configs/base.py differed between them'):
        trial.run('one gpu', 0, 'configs/one_gpu.py')
    assert not trial.workdir('one gpu', 0).exists()  # refused before the run


def test_configs_are_compared_before_anything_is_run(tmp_path):
    trial = make(tmp_path, start=leave, seeds=2)
    trial.run('a', 0, 'configs/original.py', {'optim.rate': 0.5})
    with pytest.raises(UserError, match='their configs differ in config.optim.rate'):
        trial.run('a', 1, 'configs/original.py', {'optim.rate': 0.4})
    assert not trial.workdir('a', 1).exists()


MODULE = '''
import math
SIZE = 3
ROWS = {'a': 1}
def helper():
    return SIZE
def look(workdir):
    """Words."""
    return {'a': helper(), 'b': math.pi}
def report():
    SIZE = ROWS
'''


def test_what_looks_at_a_run(tmp_path, monkeypatch):
    """The function and what it refers to count, but not the rest of its module."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / 'looks_at_it.py'
    file.write_text(MODULE)
    look = importlib.import_module('looks_at_it').look
    first = provenance.look(look)
    assert [*first] == ['looks_at_it.look'] and provenance.look(functools.partial(look, 1)) == first
    for old, new, counts in (
        ('Words', 'Others', False),
        ("'a': 1", "'a': 2", False),
        ('SIZE = ROWS', 'SIZE = 7', False),
        ('SIZE = 3', 'SIZE = 4', True),
        ('return SIZE', 'return SIZE + 1', True),
        ('import math', 'import cmath as math', True),
    ):
        file.write_text(MODULE.replace(old, new))
        assert (provenance.look(look) != first) is counts, old
    assert provenance.look(None) == provenance.look(dict) == {}
    assert provenance.look(lambda: 0)


@pytest.mark.parametrize('array', ['mean', 'eigenvectors', 'sigma'])
def test_the_statistics_of_the_pictures_count(tmp_path, array):
    write_store(tmp_path)
    first = stores.open_store(tmp_path)
    stats = dict(np.load(tmp_path / 'stats.npz'))
    np.savez(tmp_path / 'stats.npz', **{**stats, array: stats[array] * 1.001})
    second = stores.open_store(tmp_path)
    assert first.identity() == second.identity()
    assert provenance.pictures(first) != provenance.pictures(second)


def test_the_checkpoint_that_a_run_starts_from(tmp_path):
    def start(folder):
        return provenance.start({'train': {'init_from': folder and str(tmp_path / folder)}})

    assert start('') == ''
    with pytest.raises(UserError, match='there is no checkpoint here'):
        start('a')
    leave_checkpoint(tmp_path / 'a', 1, 5)
    leave_checkpoint(tmp_path / 'b', 7, 5)
    first = start('a')
    assert first and first == start('b')
    later = leave_checkpoint(tmp_path / 'a', 2, 6)
    assert start('a') not in ('', first)
    later.write_text(later.read_text().replace('6', '7', 1))  # damaged: skipped
    assert start('a') == first


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
    specification.values.append(provenance.ast.Constant(''))  # as Python 3.12.1 parses it
    assert provenance.normal(added) == provenance.normal(plain)
    other = provenance.ast.parse("f'{x:{y}} '")
    assert provenance.normal(other) != provenance.normal(plain)


def row(name='a', config=None, command=(), code='c', data='0', files=None, start=''):
    deciding = {'config.optim.rate': 0.01, 'config.optim.decay': 0.1, **(config or {})}
    return {
        'name': name,
        'command': ['--config=configs/paper.py', *command],
        'fingerprint': {
            'code': code,
            'files': files or {'configs/base.py': '5'},
            'config': deciding,
            'start': start,
            'data': data,
        },
    }


@pytest.mark.parametrize(
    ('second', 'words'),
    [
        (row(), ''),
        (row(code='d'), r'their training code differs \(c and d\)'),
        (row(data='1'), r'their images differ \(identity 0 and 1\)'),
        (
            row('b', {'config.optim.rate': 0.02}),
            r'their configs differ in config.optim.rate \(0.01 and 0.02\)',
        ),
        # what the row is about
        (row('b', {'config.optim.rate': 0.02}, ['--config.optim.rate=0.02']), ''),
        # but seeds must not differ
        (
            row('a', {'config.optim.rate': 0.02}, ['--config.optim.rate=0.02']),
            'differ in config.optim.rate',
        ),
        (row('a', {'config.train.init_from': 'x'}), ''),
        (row('b', {'config.optim.rate': 0.02}, ['--config=configs/one_gpu.py']), ''),
        (row('b', command=['--config.data.source=half'], data='1'), ''),
        ({'name': 'a', 'command': []}, 'one has no fingerprint'),
        (
            row('b', command=['--config=x'], files={'configs/base.py': '6', 'x': '7'}),
            r'configs/base.py differed between them \(5 and 6\)',
        ),
        (row('b', command=['--config=x'], files={'configs/base.py': '5', 'x': '7'}), ''),
        (row('b', {'config.train.init_from': 'x'}, ['--config.train.init_from=x'], start='3'), ''),
        (
            {
                **row(),
                'fingerprint': {k: v for k, v in row()['fingerprint'].items() if k != 'start'},
            },
            'one has a fingerprint from an earlier version',
        ),
    ],
)
def test_which_rows_go_together(second, words):
    if not words:
        return provenance.check({'a-0': row(), 'x': second})
    with pytest.raises(UserError, match=words) as error:
        provenance.check({'a-0': row(), 'x': second})
    said = str(error.value)
    assert said.startswith('a-0 and x do not belong in one table: ') and '\n' not in said


def test_rows_that_start_from_one_checkpoint():
    def fine_tuned(name, path, start):
        field = 'config.train.init_from'
        return row(name, {field: path}, [f'--{field}={path}'], start=start)

    one = fine_tuned('a', 'x', '3')
    for name in ('a', 'b'):
        provenance.check({'a-0': one, 'x': fine_tuned(name, 'x', '3')})
        provenance.check({'a-0': one, 'x': fine_tuned(name, 'y', '4')})
        with pytest.raises(UserError, match=r'x was a different checkpoint for each \(3 and 4\)'):
            provenance.check({'a-0': one, 'x': fine_tuned(name, 'x', '4')})


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
        assert plain != deciding(config, run__log_every=7)
        assert plain != deciding(config, model__dropout='none')
        assert plain != deciding(config, data__val_fraction=0.2)


def test_the_fingerprint_of_a_row(tmp_path):
    made = make(tmp_path, start=leave).run('a', 0, 'configs/original.py', {'optim.rate': 0.5})
    mine, store = made['fingerprint'], stores.open_store(tmp_path / 'runs/pictures')
    assert mine['code'] == provenance.code()
    assert mine['config']['config.optim.rate'] == 0.5
    assert mine['data'] == provenance.pictures(store)
    assert [*mine['files']] == [f'configs/{n}.py' for n in ('base', 'original', 'paper')]
    kept = json.loads((tmp_path / 'results/trial-smoke.json').read_text())
    assert kept == {'a-0': made}
    provenance.check({**kept, 'a-1': copy.deepcopy(made)})


@pytest.mark.slow
def test_rows_of_other_code_or_pictures_are_refused(tmp_path, monkeypatch):
    started = []

    def start(command, workdir, until):
        started.append(workdir.name)
        return leave(command, workdir, until)

    trial = make(tmp_path, start=start)
    first = trial.run('a', 0, 'configs/original.py')
    with monkeypatch.context() as patch:
        patch.setattr(provenance, 'code', lambda: 'new')
        assert trial.run('a', 0, 'configs/original.py') == first  # stored
        old = first['fingerprint']['code']
        with pytest.raises(
            UserError, match=rf'a-0 was made with different training code \({old}\) than'
        ):
            trial.run('b', 0, 'configs/original.py')
        trial.results['a-0']['extra'] = {}
        with pytest.raises(UserError, match='different training code'):
            trial.extend('a-0', 'more', dict)
    assert started == ['a-0']
    shutil.rmtree(tmp_path / 'runs/pictures')
    size = {'format': 'jpg', 'size': 256, 'counts': {'train': 1, 'val': 1}}
    write_store(tmp_path / 'runs/pictures', **size, seed=1)
    with pytest.raises(UserError, match='a-0 and b-0 .*: their images differ'):
        trial.run('b', 0, 'configs/original.py')
    assert [*json.loads((tmp_path / 'results/trial-smoke.json').read_text())] == ['a-0']


def test_a_run_goes_on_with_the_code_that_began_it(tmp_path, monkeypatch):
    trial = make(tmp_path, start=leave)
    workdir = trial.workdir('a', 0)
    provenance.note(workdir, 'older')
    provenance.note(workdir, 'old')  # the previous start made no run directory
    workdir.mkdir()
    provenance.note(workdir, 'old')
    with pytest.raises(
        UserError, match=r'a-0: the run began with different training code .*\(old, now '
    ):
        trial.run('a', 0, 'configs/original.py')
    trial.workdir('b', 0).mkdir(parents=True)
    with pytest.raises(
        UserError, match=r'b-0: the run began with different training code .*\(not recorded, now '
    ):
        trial.run('b', 0, 'configs/original.py')


def test_a_run_goes_on_from_the_checkpoint_that_it_started_from(tmp_path):
    pretrained = tmp_path / 'pretrained'
    leave_checkpoint(pretrained, 1, 5)

    def run():
        changes = {'train.init_from': str(pretrained)}
        return make(tmp_path, start=stops).run('a', 0, 'configs/original.py', changes)

    def stops(command, workdir, until):
        workdir.mkdir(parents=True, exist_ok=True)
        raise Stopped('stopped')

    for _ in range(2):
        with pytest.raises(Stopped):
            run()
    leave_checkpoint(pretrained, 2, 6)
    with pytest.raises(UserError, match='a-0: the run began with different .* from checkpoint'):
        run()


@pytest.mark.slow
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
    assert made['uncommitted'] and '1 run with uncommitted code' in lab.measured_on({'a-0': made})
    assert run('smoke')['uncommitted']
    monkeypatch.setattr(provenance.directory, 'commit', lambda: 'abc')
    made = run('full')
    assert not made['uncommitted'] and 'uncommitted' not in lab.measured_on({'a-0': made})


@pytest.mark.slow
@pytest.mark.parametrize('commit', ['c-dirty', 'unknown'])
def test_any_uncommitted_start_makes_a_row_uncommitted(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(provenance.directory, 'commit', lambda: 'abc')

    def start(command, workdir, until):
        leave(command, workdir, until)
        file = workdir / 'run.json'
        starts = json.loads(file.read_text())
        if workdir.name == 'b-0':
            starts[0]['commit'] = commit
        file.write_text(json.dumps(starts))

    trial = make(tmp_path, start=start)
    for name, uncommitted in (('a', False), ('b', True)):
        assert trial.run(name, 0, 'configs/original.py')['uncommitted'] is uncommitted


def looking(workdir):
    return {'found': 1}


@pytest.fixture
def no_pictures(monkeypatch):
    """Analyses skip the validation images, which `leave` does not create."""
    monkeypatch.setattr(lab, '_look', lambda after, workdir: (after(workdir), None))


@pytest.mark.parametrize(
    ('part', 'words'),
    [
        (
            'code',
            'the training code, a preset or the initial checkpoint changed during the run; remove',
        ),
        (
            'presets',
            'the training code, a preset or the initial checkpoint changed during the run; remove',
        ),
        (
            'look',
            r'test_provenance.looking changed during the run; repeat the command',
        ),
    ],
)
@pytest.mark.parametrize('when', ['trained', 'looked at'])
def test_a_run_is_rejected_if_something_changes_during_it(
    tmp_path, monkeypatch, no_pictures, when, part, words
):
    known = getattr(provenance, part)

    def change(*args):
        value = known(*args)
        return 'new' if part == 'code' else dict.fromkeys(value, 'new')

    def start(command, workdir, until):
        leave(command, workdir, until)
        if when == 'trained':
            monkeypatch.setattr(provenance, part, change)

    def look(after, workdir):
        assert when == 'looked at'  # after earlier changes there is no analysis
        monkeypatch.setattr(provenance, part, change)
        return after(workdir), None

    monkeypatch.setattr(lab, '_look', look)
    trial = make(tmp_path, start=start)
    with pytest.raises(UserError, match=f'a-0: .*{words}') as error:
        trial.run('a', 0, 'configs/original.py', after=looking)
    assert '\n' not in str(error.value) and not trial.results


@pytest.mark.slow
def test_additions_to_a_row_must_meet_the_same_rules(tmp_path, monkeypatch, no_pictures):
    """An analysis of several runs needs committed code and the functions of the other rows."""
    monkeypatch.setattr(provenance.directory, 'commit', lambda: 'abc')
    folders = {'runs': tmp_path / 'runs', 'results': tmp_path / 'results'}
    trial = lab.Lab('trial', 'small', seeds=1, start=leave, **folders)
    trial.run('a', 0, 'configs/original.py', after=looking)
    with monkeypatch.context() as patch:
        patch.setattr(provenance.directory, 'commit', lambda: 'abc-dirty')
        with pytest.raises(UserError, match='a-0: the code is not committed'):
            trial.extend('a-0', 'more', looking, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(provenance, 'look', lambda function: {f'{__name__}.looking': 'new'})
        with pytest.raises(UserError, match='looking differed between them'):
            trial.extend('a-0', 'more', looking, tmp_path)
    with monkeypatch.context() as patch:

        def changing():
            patch.setattr(provenance, 'code', lambda: 'new')

        with pytest.raises(UserError, match='a-0: the code changed during the analysis'):
            trial.extend('a-0', 'more', changing)
    assert 'more' not in trial.results['a-0']['extra']

    def other():
        return 2

    trial.extend('a-0', 'more', other)
    made = json.loads((tmp_path / 'results/trial-small.json').read_text())['a-0']
    assert made['extra'] == {'found': 1, 'more': 2} and not made['uncommitted']
    functions = {name.rpartition('.')[2] for name in made['fingerprint']['files']}
    assert {'looking', 'other'} <= functions
    trial = lab.Lab('trial', 'small', seeds=1, start=leave, allow_dirty=True, **folders)
    monkeypatch.setattr(provenance.directory, 'commit', lambda: 'abc-dirty')
    trial.extend('a-0', 'third', other)
    assert trial.results['a-0']['uncommitted']
