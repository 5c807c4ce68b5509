"""CIFAR-10 with and without norms, figures 3 and 4, and the report: arithmetic, and smoke runs."""

import pytest

from alexnet_jax import data
from experiments import cifar_lrn
from tests.small_lab import make
from tests.tiny_store import write_store


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Pictures are read without TensorFlow, whose import would take most of the time."""
    monkeypatch.setattr(data.importlib.util, 'find_spec', lambda name: None)


def tiny(folder, size, *options):
    write_store(folder, format='u8', size=size, classes=10, counts={'train': 64, 'val': 20})
    return [f'--config.data.store={folder}', f'--config.data.size={size}', '--config.train.batch=8',
            '--config.run.eval_batch=4', '--config.run.mesh=(1, 1)', *options]  # fmt: skip


def result(name, seed=0, *, diverged=False, **extra):
    """A hand-made result, as `lab.Lab` keeps them."""
    return {
        'name': name, 'seed': seed, 'diverged': diverged, 'extra': None if diverged else extra,
        'train': [{'step': 9, 'epoch': 52.0, 'top1_error': 20.0}],
        'eval': [{'step': 5, 'top1_error': 30.0}, {'step': 10, 'top1_error': 25.0}],
        'command': ['--config=c'], 'given': ['--config.data.source=/pictures of cats'],
        'commit': 'abc1234', 'versions': {'jax': '0.10.2'}, 'devices': ['GPU_0'],
        'data': {'source': 'cifar', 'counts': {'train': 50000, 'val': 10000}},
    }  # fmt: skip


def by_key(*results):
    return {f'{r["name"]}-{r["seed"]}': r for r in results}


def test_cifar_lrn(tmp_path, monkeypatch):
    part, changes = cifar_lrn.SCALES['smoke'][1:]
    monkeypatch.setitem(cifar_lrn.SCALES, 'smoke', (('11pct_plain',), part, changes))
    trial = make(tmp_path, tiny(tmp_path / 'store', 32))
    cifar_lrn.run(trial)
    (made,) = trial.results.values()
    assert [row['epoch'] for row in made['train']] == [0.125, 0.25, 0.375, 0.5, 0.625]
    assert made['extra'].keys() == {'centre', 'ten'}
    assert made['extra']['centre'] == made['eval'][-1]['top1_error']  # the run's own last evaluation
    table = cifar_lrn.report(trial.results)
    assert f'| 11pct_plain | 0.625 of 520 |  | {made["extra"]["centre"]:.1f} | ' in table
    assert '| 13pct | | 13 | not run | | 0 |' in table and 'norms alone bring: not run' in table
    cifar_lrn.plot(trial.results, tmp_path / 'figure.png')
    assert (tmp_path / 'figure.png').stat().st_size > 1000


def test_all_schedules_are_shortened_alike(tmp_path):
    commands = {}

    class Lab:
        scale, seeds = 'small', 1

        def run(self, name, seed, config, changes, *, after):
            commands[config] = changes

    cifar_lrn.run(Lab())
    assert len(commands) == 6
    eleven = commands['configs/cifar10.py:11pct']
    assert (eleven['optim.epochs'], eleven['optim.drops']) == (52.0, (50.0, 51.0))
    assert eleven['run.eval_every'] == 2.6
    short = commands['configs/cifar10.py:80sec']
    assert (short['optim.epochs'], short['optim.drops']) == (1.0, (0.8,))


def test_what_norms_bring_is_paired_by_seed():
    """The networks differ by 1 to 3 points within a seed, and by much more between seeds."""
    results = by_key(
        *(result('11pct', s, centre=e, ten=e - 1) for s, e in enumerate((10.0, 20.0, 30.0, 40.0))),
        *(result('11pct_plain', s, centre=e, ten=t)
          for s, e, t in ((2, 32.0, 27.0), (1, 21.0, 21.0), (0, 13.0, 9.0))),
        result('11pct_plain', 3, diverged=True), result('18pct', 0, centre=17.25),
    )  # fmt: skip
    assert cifar_lrn.gains(results, 'centre') == [3.0, 1.0, 2.0]  # seed 3 has no partner
    table = cifar_lrn.report(results)
    assert 'centre crop: +2.00 ± 0.58 points (3 seeds).' in table
    assert 'ten views: +0.00 ± 1.15 points (3 seeds: not resolved).' in table  # 0, 2 and -2
    assert '| 11pct | 52 of 520 | 11 | 25.0 ± 12.9 | 24.0 ± 12.9 | 4 |' in table
    assert '| 11pct_plain | 52 of 520 |  | 22.0 ± 9.5 | 19.0 ± 9.2 | 4, 1 diverged |' in table
    assert '| 18pct | 52 of 140 | 18 | 17.2 |  | 1 |' in table


@pytest.mark.parametrize(
    ('differences', 'words'),
    [
        ([1.0, 3.0], '+2.00 ± 1.00 points (2 seeds)'),  # exactly two standard errors
        ([0.9, 3.1], '+2.00 ± 1.10 points (2 seeds: not resolved)'),
        ([-1.0, -3.0], '-2.00 ± 1.00 points (2 seeds)'),
        ([1.5], '+1.50 points (one seed: not resolved)'),
    ],
)
def test_verdict(differences, words):
    assert cifar_lrn.verdict(differences) == words
