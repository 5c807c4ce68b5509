"""Tests what experiments share: finished runs are stored, others resume; and Figure 1 on a few images."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from alexnet_jax.common.errors import Stopped, UserError
from experiments import fig1_relu_tanh, lab
from tests.helpers import ROOT
from tests.helpers.experiments import leave, make
from tests.helpers.stores import write_store


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=32, classes=10, counts={'train': 64, 'val': 20})
    return [
        f'--config.data.store={path}',
        '--config.train.batch=8',
        '--config.run.eval_batch=8',
        '--config.run.mesh=(1, 1)',
    ]


@pytest.mark.full
def test_figure_1(tmp_path, store):
    trial = make(tmp_path, store)
    fig1_relu_tanh.run(trial)
    names = sorted({result['name'] for result in trial.results.values()})
    assert names == [
        'ReLU',
        'ReLU sweep 0.001',
        'ReLU sweep 0.002',
        'tanh',
        'tanh sweep 0.001',
        'tanh sweep 0.002',
    ]
    result = trial.results['tanh-0']
    assert [row['epoch'] for row in result['train']] == [0.5, 1.0, 1.5, 2.0]
    (start,) = result['starts']
    assert 'CPU' in str(start['devices']).upper() and 'core' in start['processor']
    assert result['data'] == {
        'source': 'made_up',
        'counts': {'train': 64, 'val': 20},
        'classes': 10,
    }
    table = fig1_relu_tanh.report(trial.results)
    assert '| tanh | 0.00' in table and 'not reached' in table
    again = make(tmp_path, store, start=None)  # nothing left to start
    fig1_relu_tanh.run(again)
    assert again.results == json.loads(json.dumps(trial.results))


def rows(*errors):
    return [{'epoch': i + 1.0, 'top1_error': error} for i, error in enumerate(errors)]


def test_where_25_percent_is_reached():
    assert fig1_relu_tanh.reached(rows(60, 30, 20)) == 2.5
    assert fig1_relu_tanh.reached(rows(25)) == 1.0
    assert fig1_relu_tanh.reached(rows(60, 25.1)) is None
    assert fig1_relu_tanh.reached([]) is None


def test_the_ratio_and_the_best_rate():
    results = {}
    for net, epochs in (('ReLU', 4), ('tanh', 12)):
        for rate, error in ((0.001, 40), (0.002, 30), (0.004, 35)):
            name = f'{net} sweep {rate}'
            results[name] = {
                'name': name,
                'seed': 0,
                'diverged': rate == 0.002,
                'train': rows(error),
            }
        for seed in range(2):
            errors = [50] * (epochs + seed - 1) + [20]
            results[f'{net}-{seed}'] = {
                'name': net,
                'seed': seed,
                'diverged': False,
                'train': rows(*errors),
            }
    assert fig1_relu_tanh.best_rate(results, 'ReLU') == 0.004  # the best rate diverged
    table = fig1_relu_tanh.report(results)
    assert 'The paper does not name its network. Our choice' in table
    # From 50 to 20% the target is reached after 5/6 of an epoch: 3.8, 4.8; 11.8, 12.8. A row is an epoch.
    for over in ('the last epoch', 'the last block'):
        assert (
            f'| ReLU | 0.004 (at the edge of the sweep) | {over} | 3.8, 4.8 | 4.3 ± 0.7 | 20.0, 20.0 |'
        ) in table
        # The geometric mean of 11.8 / 3.8 and 12.8 / 4.8, ± 12.7 times half the spread of their logarithms.
        assert (
            f'By the error over {over}, tanh needs 2.9 times as many epochs as ReLU (95%' in table
        )
    assert '0.002: diverged' in table
    single = {key: result for key, result in results.items() if key not in ('ReLU-1', 'tanh-1')}
    # 11.8 / 3.8
    assert 'needs 3.1 times as many epochs as ReLU (one seed; the' in fig1_relu_tanh.report(single)


def fifths(*errors):
    return [{'epoch': 0.19968 * (i + 1), 'top1_error': error} for i, error in enumerate(errors)]


def test_the_training_error_over_an_epoch():
    """The start of an epoch has the lowest error: one block says less than the whole epoch."""
    rows = fifths(40, 40, 40, 40, 40, 24, 30, 30, 30, 30, 19, 25, 25)
    over = fig1_relu_tanh.over_an_epoch(rows)
    assert [row['top1_error'] for row in over] == [
        40,
        36.8,
        34.8,
        32.8,
        30.8,
        28.8,
        27.8,
        26.8,
        25.8,
    ]
    assert [row['epoch'] for row in over] == [row['epoch'] for row in rows[4:]]
    assert fig1_relu_tanh.reached(rows) < 1.2 and fig1_relu_tanh.reached(over) is None
    assert fig1_relu_tanh.last_epoch({'diverged': False, 'train': rows}) == 25.8
    assert fig1_relu_tanh.last_epoch({'diverged': False, 'train': rows[:4]}) == float('inf')
    assert fig1_relu_tanh.over_an_epoch([]) == []


def test_when_figure_1_stops_a_run():
    ends, swept = {}, []

    class Lab:
        scale, seeds, results = 'full', 1, {}

        def run(self, name, seed, config, changes, *, until=None):
            swept.append(changes['optim.rate'])
            ends[name] = until
            error = abs(changes['optim.rate'] - 0.004)
            self.results[name] = {'name': name, 'seed': 0, 'diverged': False, 'train': rows(error)}

    fig1_relu_tanh.run(Lab())
    assert ends.pop('ReLU')(fifths(*[24] * 5)) and not ends.pop('tanh')(fifths(*[26] * 5, 22))
    assert {*ends.values()} == {None}  # those of the sweep run to the end
    assert swept == [*fig1_relu_tanh.RATES, 0.004] * 2


def test_the_figure_of_figure_1(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        'matplotlib.figure.Figure.savefig', lambda figure, *_, **__: drawn.append(figure)
    )
    results = {
        f'{net}-{seed}': {
            'name': net,
            'seed': seed,
            'diverged': False,
            'train': rows(50, 40 - seed),
        }
        for net in ('ReLU', 'tanh', 'tanh sweep 0.001')
        for seed in (0, 1)
    }
    fig1_relu_tanh.plot(results, tmp_path / 'none.png')
    (axes,) = drawn[0].axes
    *curves, target = axes.lines
    assert [[*line.get_ydata()] for line in curves] == [[50, 40], [50, 39]] * 2
    assert [*target.get_ydata()] == [25, 25]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['ReLU', 'tanh']
    swept = {key: result for key, result in results.items() if 'sweep' in key}
    assert lab.draw(fig1_relu_tanh, swept, tmp_path / 'none.png') is None and len(drawn) == 1


@pytest.mark.slow
def test_a_result_is_kept_and_belongs_to_its_command(tmp_path):
    made = []

    def start(command, workdir, until):
        made.append(command)
        leave(command, workdir, until)
        (workdir / 'metrics.jsonl').write_text('{"kind": "train", "step": 1}\n{"kind": "eval", "st')
        return True

    def empty(command, workdir, until):
        leave(command, workdir, until)
        (workdir / 'metrics.jsonl').write_text('')

    trial = make(tmp_path, start=start)
    changes = {'optim.rate': 1.0}
    result = trial.run('a', 0, 'configs/paper.py', changes)
    # the torn row is dropped
    assert (result['train'], result['eval']) == ([{'kind': 'train', 'step': 1}], [])
    assert result['diverged'] and result['data']['source'] == 'b'
    assert make(tmp_path, start=start).run('a', 0, 'configs/paper.py', changes) == result
    assert len(made) == 1
    with pytest.raises(UserError, match='b-0: the run ended within its first interval'):
        make(tmp_path, start=empty).run('b', 0, 'configs/paper.py')
    with pytest.raises(UserError, match='a-0 was run as .*rate=1.0.*, not as .*rate=2.0'):
        make(tmp_path, start=start).run('a', 0, 'configs/paper.py', {'optim.rate': 2.0})
    # how a machine runs it does not matter
    elsewhere = make(tmp_path, ['--config.run.threads=2'], start=start)
    assert elsewhere.run('a', 0, 'configs/paper.py', changes) == result and len(made) == 1
    moved = lab.Lab(
        'trial',
        'smoke',
        seeds=1,
        runs=tmp_path / 'other',
        results=tmp_path / 'results',
        start=start,
    )
    assert moved.run('a', 0, 'configs/paper.py', changes) == result and len(made) == 1
    (tmp_path / 'results' / 'trial-smoke.json').write_text('{')
    with pytest.raises(UserError, match='trial-smoke.json: not JSON'):
        make(tmp_path)


@pytest.mark.full
def test_a_run_is_stopped_when_it_may_be_and_a_failed_one_is_named(tmp_path, store):
    trial = make(tmp_path, store, start=None)
    changes = {'run.log_every': 2, 'optim.epochs': 100000.0, 'run.eval_every': 100000.0}
    result = trial.run(
        'stops', 0, 'configs/cifar10.py:fig1', changes, until=lambda rows: len(rows) > 3
    )
    assert 3 < len(result['train']) < 10000 and not result['diverged']
    del trial.results['stops-0']  # old rows exist: it must write new ones before it stops
    again = trial.run(
        'stops', 0, 'configs/cifar10.py:fig1', changes, until=lambda rows: len(rows) > 3
    )
    assert len(again['train']) > len(result['train'])
    result = trial.run('diverges', 0, 'configs/cifar10.py:fig1', {**changes, 'optim.rate': 1e9})
    assert result['diverged']
    with pytest.raises(UserError, match=r'fails-0: the run exited with 2 \(error: .*norm_n'):
        trial.run('fails', 0, 'configs/cifar10.py:fig1', {'model.norm_n': 2})
    assert list(trial.results) == ['stops-0', 'diverges-0']


def test_an_error_does_not_leave_the_run_training(tmp_path, monkeypatch):
    started, rows, popen = [], iter([[]]), subprocess.Popen

    def start(_, **options):
        started.append(popen([sys.executable, '-c', 'import time; time.sleep(60)'], **options))
        return started[0]

    monkeypatch.setattr(lab.subprocess, 'Popen', start)
    monkeypatch.setattr(lab, '_rows', lambda *_: next(rows))
    with pytest.raises(StopIteration):
        lab.in_new_process([], tmp_path / 'run', None)
    assert started[0].poll() == -signal.SIGTERM


def test_a_stop_whose_exception_was_lost_still_stops(tmp_path, store, monkeypatch):
    monkeypatch.setattr(lab, 'STOPPING', threading.Event())
    lab.STOPPING.set()
    trial = make(tmp_path, store, start=None)
    with pytest.raises(Stopped, match='stopped before one-0; repeat'):
        trial.run('one', 0, 'configs/cifar10.py:fig1', {})


def test_what_results_were_measured_on():
    first = {
        'devices': ['cpu:0'],
        'versions': {'jax': '1'},
        'commit': 'c',
        'processor': 'Z80 (1 core)',
    }
    second = {**first, 'commit': 'b', 'processor': 'Z80 (2 cores)'}
    result = {
        'data': {'source': 'a', 'counts': {'train': 1000, 'val': 10}},
        'starts': [first, second],
    }
    assert lab.measured_on({'a': result}) == (
        '1 run on a (1,000 training and 10 validation images); devices: cpu:0; processors: Z80 (1 core), '
        'Z80 (2 cores); jax 1; commit b, c.'
    )
    result |= {'uncommitted': True, 'fingerprint': {'code': 'abc'}}
    assert lab.measured_on({'a': result}).endswith(
        'commit b, c; 1 run with uncommitted code; training code abc.'
    )


def test_every_start_that_differs_is_kept(tmp_path):
    starts = make(tmp_path, start=leave).run('a', 0, 'configs/paper.py')['starts']
    assert [(start['commit'], start['processor']) for start in starts] == [
        ('c', 'not noted'),
        ('d', 'not noted'),
    ]


def test_seeds_come_in_their_order():
    results = {
        f'{name}-{seed}': {'name': name, 'seed': seed} for name in 'ab' for seed in (2, 0, 1)
    }
    assert lab.named(results, 'a') == [results['a-0'], results['a-1'], results['a-2']]


def test_a_run_that_never_learned():
    def run(loss, diverged=False):
        return {
            'diverged': diverged,
            'data': {'classes': 20},
            'train': [{'loss': 3.3}, {'loss': loss}],
        }

    assert lab.at_chance(run(3.0)) and lab.at_chance(run(2.85))  # ln(20) is 2.996
    assert not lab.at_chance(run(2.84)) and not lab.at_chance(run(3.0, diverged=True))


@pytest.mark.slow
def test_what_looks_at_a_run_may_be_killed_or_stopped():
    with pytest.raises(UserError, match='killed, perhaps because memory ran out'):
        lab.apart(signal.raise_signal, signal.SIGKILL)
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(Stopped, match='repeat the command to resume'):
        lab.apart(time.sleep, 600)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_commands_that_share_an_experiment_keep_each_others_results(tmp_path):
    def run(trial):
        for seed in range(2):
            for name in ('a', 'b'):
                trial.run(name, seed, 'configs/paper.py')

    labs = [make(tmp_path, start=leave, seeds=2) for _ in range(2)]
    for trial, only in zip(labs, ('a-1', 'b'), strict=True):
        trial.choose(run, [only])
        run(trial)
    kept = json.loads((tmp_path / 'results' / 'trial-smoke.json').read_text())
    assert [*kept] == ['a-1', 'b-0', 'b-1']
    with pytest.raises(
        UserError, match=r'trial-smoke.json: a-1 was run with nothing after --, and a-0 will be'
    ):
        make(tmp_path, ['--config.data.source=other'], start=leave).run('a', 0, 'configs/paper.py')
    with pytest.raises(UserError, match='--only=c'):
        make(tmp_path, start=leave, seeds=2).choose(run, ['c', 'a'])
    # it was rejected before anything was run
    assert len([*(tmp_path / 'runs' / 'trial-smoke').glob('*/config.json')]) == 3


@pytest.mark.slow
def test_rows_of_another_command_are_found_even_if_only_excludes_them(tmp_path):
    started = []

    def start(command, workdir, until):
        started.append(workdir.name)
        return leave(command, workdir, until)

    def edited(changes, only):
        def run(trial):
            for name in ('a', 'b'):
                trial.run(name, 0, 'configs/paper.py', changes)

        trial = make(tmp_path, start=start)
        trial.choose(run, only)
        run(trial)

    edited({'optim.epochs': 30.0}, ['a'])
    for changes in ({'optim.epochs': 31.0}, {'optim.epochs': 30.0, 'run.log_every': 7}):
        with pytest.raises(UserError, match='a-0 was run as .*, not as '):
            edited(changes, ['b'])
    assert started == ['a-0']
    edited({'optim.epochs': 30.0, 'run.threads': 2}, ['b'])
    assert started == ['a-0', 'b-0']


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(arguments, ...) runs an experiment with one run per seed, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.setattr(lab, 'RESULTS', tmp_path / 'committed')
    monkeypatch.setattr(lab, 'FIGURES', tmp_path / 'committed')
    monkeypatch.setattr(lab, 'in_new_process', leave)
    monkeypatch.setattr(lab.provenance, 'uncommitted', lambda: False)
    monkeypatch.setattr('signal.signal', lambda *args: None)
    module = SimpleNamespace(
        __file__='trial.py',
        __doc__='What it is.',
        report=lambda results: f'table of {[*results]}',
        run=lambda lab: [lab.run('a', seed, 'configs/paper.py') for seed in range(lab.seeds)],
        plot=lambda results, file: file.write_text('figure'),
    )

    def run(*arguments):
        monkeypatch.setattr('sys.argv', ['trial', *arguments])
        lab._main(module)

    return run


@pytest.mark.slow
def test_a_command_and_another_folder_for_results(command, tmp_path, capsys):
    with pytest.raises(UserError, match='trial, full: no results yet'):
        command('--scale=full', '--report')
    command('--seeds=1', '--', '--config.data.source=a')
    assert {*(tmp_path / 'committed').iterdir()} >= {
        tmp_path / 'committed/trial-small.json',
        tmp_path / 'committed/trial-small.png',
    }
    out = capsys.readouterr().out
    assert "table of ['a-0']\nfigure: " in out and out.splitlines()[0].endswith(
        '--workdir=runs/trial-small/a-0 --config.seed=0 --config.data.source=a'
    )
    other = ['--seeds=2', '--', '--config.data.source=b']
    with pytest.raises(UserError, match='a-0 was run as .*--results=DIR'):
        command(*other)
    command('--results=mine', *other)
    assert "table of ['a-0', 'a-1']\nfigure: mine/trial-small.png" in capsys.readouterr().out
    made = (tmp_path / 'mine/runs/trial-small').glob('*/config.json')
    assert {path.parent.name for path in made} == {'a-0', 'a-1'}
    assert len([*(tmp_path / 'runs/trial-small').glob('*/config.json')]) == 1


@pytest.mark.parametrize('text', ['--config.seed=5', '--workdir=x', '--config', '-workdir'])
def test_arguments_that_each_run_sets_itself_are_rejected(command, tmp_path, text):
    with pytest.raises(UserError, match=f'{text}: set by each run itself'):
        command('--', '--config.data.source=a', text, 'x')
    assert [path.name for path in tmp_path.iterdir()] == ['configs']


@pytest.mark.slow
def test_rows_of_another_command_are_found_before_anything_is_run(tmp_path, monkeypatch):
    started = []

    def start(command, workdir, until):
        started.append(workdir.name)
        return leave(command, workdir, until)

    def run(names, epochs):
        def ask(trial):
            for name in names:
                trial.run(name, 0, 'configs/paper.py', {'optim.epochs': epochs})

        module = SimpleNamespace(
            __file__='trial.py',
            __doc__='What it is.',
            INDEPENDENT=True,
            report=lambda results: '',
            run=ask,
            plot=None,
        )
        lab._main(module)

    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.setattr(lab, 'in_new_process', start)
    monkeypatch.setattr('signal.signal', lambda *args: None)
    monkeypatch.setattr('sys.argv', ['trial', '--scale=smoke', '--seeds=1', '--results=mine'])
    run(['a'], 30.0)
    with pytest.raises(UserError, match='a-0 was run as'):
        run(['new', 'a'], 31.0)
    assert started == ['a-0']
    run(['new', 'a'], 30.0)
    assert started == ['a-0', 'new-0']


def test_each_run_says_how_many_are_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(lab.time, 'monotonic', lambda: now[0])

    def start(command, workdir, until):
        leave(command, workdir, until)
        now[0] += 600
        return True

    def run(trial):
        for net in ('x', 'y'):
            trial.run(f'{net} sweep', 0, 'configs/paper.py')
            assert trial.results[f'{net} sweep-0']['diverged']  # a result that decides what follows
            trial.run(net, 0, 'configs/paper.py')
        trial.extend('x-0', 'both', dict)

    trial = make(tmp_path, start=start)
    monkeypatch.setattr(trial, 'extend', lambda *args: None)
    trial.plan(run)
    run(trial)
    said = [line.partition(': python')[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        'run 1 of 4: x sweep-0',
        'run 2 of 4, about 30 minutes left: x-0',
        'run 3 of 4, about 20 minutes left: y sweep-0',
        'run 4 of 4, about 10 minutes left: y-0',
    ]


def trained(images_per_second):
    row = {'kind': 'train', 'step': 1, 'epoch': 0.5, 'images_per_second': images_per_second}
    start = {'processor': 'Z80'}
    data = {'counts': {'train': 7200}}
    return {
        'name': 'a',
        'seed': 0,
        'diverged': False,
        'train': [row],
        'data': data,
        'starts': [start],
    }


def test_stored_runs_say_how_long_the_others_take(tmp_path, monkeypatch, capsys):
    (tmp_path / 'results').mkdir()
    lab.write(tmp_path / 'results/trial-smoke.json', {'a-0': trained(3), 'a-1': trained(1)})
    trial = make(tmp_path, start=leave)
    trial.plan(lambda lab: [lab.run('a', seed, 'configs/paper.py') for seed in range(4)])
    assert trial._position('a-2') == 'run 3 of 4, about 80 minutes left: a-2'
    trial = make(tmp_path, start=leave)
    trial._only = {'a-3'}
    trial.plan(lambda lab: [lab.run('a', seed, 'configs/paper.py') for seed in range(4)])
    assert trial._position('a-3') == 'run 1 of 1, about 40 minutes left: a-3'
    assert lab.training_time(trained(3)) == 1200
    assert lab.training_time({'train': [{'step': 1}]}) == 0  # of an earlier version


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0, 'about 1 second'),
        (80, 'about 80 seconds'),
        (100, 'about 2 minutes'),
        (5000, 'about 83 minutes'),
        (57000, 'about 16 hours'),
    ],
)
def test_about(seconds, text):
    assert lab.about(seconds) == text


def test_help_gives_defaults_and_durations(command, tmp_path, capsys):
    lab.write(lab.RESULTS / 'trial-full.json', {'a-0': trained(3), 'a-1': trained(1)})
    lab.write(lab.RESULTS / 'earlier/trial-small.json', {'a-0': trained(3)})
    with pytest.raises(SystemExit):
        command('--help')
    out = ' '.join(capsys.readouterr().out.split())
    assert (
        'smoke: not measured small: 1 run measured, about 20 minutes; processors: Z80 full: 2'
        in out
    )
    assert 'full: 2 runs measured, about 40 minutes each (median), about 80 minutes in all' in out
    for text in (
        'experiment (default: small)',
        'seeds (default: 3)',
        'and runs)',
    ):
        assert text in out


def test_a_wrong_only_lists_the_names(tmp_path):
    def run(trial):
        for seed in range(2):
            for name in ('a b', 'c'):
                trial.run(name, seed, 'configs/paper.py')

    with pytest.raises(UserError) as error:
        make(tmp_path, start=leave, seeds=2).choose(run, ['d'])
    assert str(error.value) == (
        '--only=d: no such run at --scale=smoke --seeds=2; choose from a b, c, or name a single seed, as '
        "in --only='a b-0'"
    )
    # also where the stored runs were made with different arguments
    make(tmp_path, ['--config.data.source=other'], start=leave, seeds=2).run(
        'c', 0, 'configs/paper.py'
    )
    with pytest.raises(UserError, match='--only=d: no such run'):
        make(tmp_path, start=leave, seeds=2).choose(run, ['d'])


def test_the_remaining_time_of_a_run(tmp_path):
    leave(['--config=configs/cifar10.py', '--workdir=w'], tmp_path / 'runs/w', None)
    (tmp_path / 'runs/w/store.json').write_text('{"counts": {"train": 100}}')
    row = {'epoch': 20.0, 'images_per_second': 10.0}
    assert lab._left(tmp_path / 'runs/w', row) == 1200  # of 140 epochs
