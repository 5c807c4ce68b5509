"""Tests the experiments on training, ablations and tables: their arithmetic, and tiny runs of each."""

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from scipy import stats

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from experiments import (
    ablations,
    built_in_controls,
    compression,
    does_it_train,
    efficient,
    fall2009,
    few_labels,
    lab,
    statistics,
    table1,
    table2,
    text_init,
)
from tests.helpers import ROOT
from tests.helpers.experiments import in_process, leave, leave_checkpoint, make
from tests.helpers.run_dirs import without_tensorflow
from tests.helpers.stores import write_store

SIZES = [
    '--config.data.size=72',
    '--config.augment.crop=64',
    '--config.run.eval_batch=8',
    '--config.optim.epochs=0.5',
    '--config.run.mesh=(1, 1)',
]


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    without_tensorflow(monkeypatch)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'tiny'
    write_store(path, format='u8', size=72, classes=10, counts={'train': 64, 'val': 20})
    return [f'--config.data.store={path}', *SIZES]


def builds(config, changes):
    """Returns whether a config with changes builds a network with integer widths that fits small crops."""
    config = configfile.load(config)
    config.update_from_flattened_dict({**changes, 'model.width': 0.0625})
    net = build(classes=10, **config.model)
    return bool(network.shapes(net, 64)['params'])


def losses(*values):
    """Returns train rows; values are in units of the loss of chance for ten classes."""
    return [{'step': 10 * i + 9, 'loss': value * math.log(10)} for i, value in enumerate(values)]


def trained(*values):
    return {'train': losses(*values), 'data': {'classes': 10}}


@pytest.mark.full
def test_does_it_train(tmp_path, store):
    ends = []

    def start(command, workdir, until):
        ends.append(until)
        return in_process(command, workdir, until)

    trial = make(tmp_path, store, start=start)
    does_it_train.run(trial)
    assert ends == [None, None]  # no run stops before the end of its schedule
    assert list(trial.results) == ['paper-0', 'original-0']
    result = trial.results['original-0']
    assert [row['step'] for row in result['train']] == [0, 1, 2, 3]
    assert [*result['extra']['measured']] == ['0', '2', '4']
    begin, _, end = result['extra']['measured'].values()
    assert [*begin['squares']] == ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc6', 'fc7', 'fc8']
    assert result['data']['classes'] == 10 and begin != end  # four steps at a rate of 0.01
    assert abs(begin['squares']['fc7'] - 1) < 0.5  # biases are 1
    assert (
        trial.results['paper-0']['extra']['measured']['0']['logits_std'] < begin['logits_std'] / 3
    )
    table = does_it_train.report(trial.results)
    assert '| original | 0.03 | 1 | 1e-4 / 5 | not within 4 steps |' in table
    assert '| paper bias | 0.01 | 0.1 | 1e-4 | not run |' in table
    assert 'original: the loss left ln(classes) in 0 of 1 seed within 4 steps.' in table


def test_every_initialization_builds():
    for *_, config, changes in does_it_train.RUNS.values():
        assert builds(f'configs/{config}', changes)
    assert {*does_it_train.STYLES} == {*does_it_train.RUNS}


def test_when_the_loss_leaves_chance():
    assert does_it_train.left(trained(1.0, 0.94, 0.96, 0.94, 0.5)) == 40  # not the first dip
    assert does_it_train.left(trained(0.9)) == 10
    assert does_it_train.left(trained(0.9, 0.951)) is None
    assert does_it_train.left(trained(0.9, math.nan)) is None
    assert does_it_train.left(trained()) is None


def test_what_is_said_about_training():
    results = {}
    for seed, values in enumerate([(1, 1, 0.9), (1, 0.9, 0.8), None]):
        measured = {'squares': {'fc8': 1.0}, 'logits_std': 0.5}
        extra = {'measured': {'0': measured, '3': measured}}
        results[f'original-{seed}'] = {
            'name': 'original',
            'seed': seed,
            'diverged': values is None,
            **trained(*values or ()),
            'eval': [{'top1_error': 60.0 + seed}],
            'extra': extra if values else None,
        }
    table = does_it_train.report(results)
    assert '| 30, 20, diverged | 30, 30 | 2.07, 1.84 | 60.5 ± 0.7 | 0.5, 0.5 |' in table
    assert 'original: the loss left ln(classes) in 2 of 3 seeds, between steps 20 and 30.' in table
    assert 'Chance: ln(10) = 2.303.' in table


def test_the_figure_of_does_it_train(drawn, tmp_path):
    """Losses of every seed and chance; initial values by layer and those over training for seed 0."""
    results = {}
    for seed, end in enumerate((1.0, 3.0)):
        measured = {
            '0': {'squares': {'conv1': 1.0, 'fc8': 2.0}, 'logits_std': 0.5},
            '3': {'squares': {'conv1': 4.0, 'fc8': end}, 'logits_std': end},
        }
        results[f'paper-{seed}'] = {
            'name': 'paper',
            'seed': seed,
            **trained(1, 0.9),
            'extra': {'measured': measured},
        }
    does_it_train.plot(results, tmp_path / 'none.png')
    curves, spreads, start, *panels = drawn[0].axes
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['paper']
    assert [panel.get_title() for panel in panels] == ['paper']
    assert [[*line.get_xdata()] for line in curves.lines] == [[10, 20], [10, 20], [0, 1]]
    assert [*curves.lines[2].get_ydata()] == [math.log(10)] * 2
    assert [[*line.get_ydata()] for line in spreads.lines] == [[0.5, 1.0]]
    assert [[*line.get_ydata()] for line in start.lines] == [[1.0, 2.0]]
    assert [[*line.get_ydata()] for line in panels[0].lines] == [[1.0, 2.0], [4.0, 1.0]]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ['step 0', 'step 3']
    assert panels[0].get_ylim() == start.get_ylim()
    assert len({str(style) for _, style in does_it_train.STYLES.values()}) == len(
        does_it_train.RUNS
    )


def test_every_ablation_builds():
    for row in ablations.ROWS.values():
        assert builds(row.config, row.changes)


def ablated(**rows):
    """Returns results with these ten-crop top-1 errors; top-5 is half, one crop 1 point more."""
    results = {}
    for name, values in rows.items():
        for seed, error in enumerate(values):
            extra = {
                view: {'top1_error': error + more, 'top5_error': error / 2}
                for view, more in (('ten', 0), ('center', 1))
            }
            name = name.replace('_', ' ')
            results[f'{name}-{seed}'] = {
                'name': name,
                'seed': seed,
                'diverged': False,
                'extra': extra,
                'data': {'counts': {'val': 1000}, 'classes': 10},
            }
            course(results[f'{name}-{seed}'], [error + 10], [error + 1])
    return results


def course(result, training, validation):
    """Gives a result rows with these top-1 errors; an evaluation comes every ten steps."""
    ends = (f / len(training) for f in range(1, len(training) + 1))
    result['train'] = [
        {'step': 0, 'epoch': 20 * end, 'loss': error / 100, 'top1_error': error, 'weights': 0.01}
        for end, error in zip(ends, training, strict=True)
    ]
    result['eval'] = [
        {'step': 10 * step, 'top1_error': error} for step, error in enumerate(validation, start=1)
    ]


def test_differences_are_paired_by_seed():
    results = ablated(reference=[40, 44, 42], no_norms=[43, 46, 46], tanh=[39, 43])
    assert ablations.differences(results, 'no norms', 'top1_error') == [3, 2, 4]
    assert ablations.differences(results, 'no norms', 'top5_error') == [1.5, 1, 2]
    assert ablations.differences(results, 'tanh', 'top1_error') == [-1, -1]
    assert ablations.differences(results, 'one crop', 'top1_error') == [1, 1, 1]
    results['reference-1'].update(extra=None, diverged=True)
    assert ablations.differences(results, 'no norms', 'top1_error') == [3, 4]


def test_what_differences_show():
    norms, first, dropout, tanh = (
        ablations.ROWS[name] for name in ('no norms', 'first norm only', 'no dropout', 'tanh')
    )
    assert ablations.agrees('worse', norms) == 'yes' == ablations.agrees('worse', dropout)
    assert ablations.agrees('better', norms) == 'no' == ablations.agrees('worse', first)
    assert ablations.agrees('', norms) == '?' and ablations.agrees('worse', tanh) == '–'


def test_the_family_of_the_ablations():
    """It has every row with several pairs, including one crop, by the top-1 error with ten crops."""
    results = ablated(
        reference=[40, 44, 42], no_norms=[43, 47, 45.1], no_dropout=[42, 47, 46], tanh=[80]
    )
    found = ablations.tested(results)
    assert [*found] == ['no norms', 'no dropout', 'one crop']
    p = {
        name: stats.ttest_1samp(ablations.differences(results, name, 'top1_error'), 0).pvalue
        for name in ('no norms', 'no dropout')
    }
    # one crop has no spread and comes last
    assert found['no norms'][1] == pytest.approx(3 * p['no norms'])
    assert found['no dropout'][1] == pytest.approx(2 * p['no dropout'])


def test_the_table_of_ablations():
    results = ablated(reference=[40, 44, 42], no_norms=[43, 46, 46], no_dropout=[41, 44, 41])
    results['no norms-3'] = {
        'name': 'no norms',
        'seed': 3,
        'diverged': True,
        'extra': None,
        'train': [],
    }
    results |= ablated(tanh=[95, 94])
    results['tanh-1']['train'] = losses(1.1, 1.05)
    table = ablations.report(results)
    assert (
        '20 epochs, ten crops, 3 seeds: top-1 error 42.0 ± 2.0%, top-5 error 21.0 ± 1.0%' in table
    )
    assert (
        # 0.0351 by a table of Student's t, times 3, is less than tanh's 0.0303 times 4
        '| no norms | 3, 1 diverged | +3.00 (+0.52 to +5.48) | 0.12 |  | +1.4 / +1.2 | +1.37 / +1.15 | ? '
        '| +1.50 (+0.26 to +2.74) | +3.00 (+0.52 to +5.48) | — |'
    ) in table
    assert '| no dropout | 3 | +0.00 (-2.48 to +2.48) | 1 |  | worse |  | ? |' in table
    assert (
        '| one crop | 3 | +1.00 (no spread) | 1 |  | +1.5 / +1.3 | +1.55 / +1.30 | ? |'
    ) in table
    assert '| tanh | 2, 1 still at chance | +52.50' in table
    (absent,) = (line for line in table.splitlines() if line.startswith('Not run: '))
    assert 'tanh at its best, first norm only' in absent and '| without conv2' not in table
    assert 'on the same 1,000 images' in table and 'over images is 1.6 points' in table
    assert 'ten crops, every row with several pairs, 4 tests.' in table
    assert 'has not been run' in ablations.report({})
    single = ablated(reference=[40], no_norms=[43])
    assert 'ten crops, 1 seed: ' in (table := ablations.report(single)) and 'Family' not in table


def test_what_the_ablations_say_about_training():
    """By hand: the last tenth is two of twenty rows; 3 pairs differ by 1, 2 and 3, so t is 2 sqrt(3)."""
    results = ablated(reference=[40, 44, 42], no_weight_decay=[1, 1, 1], no_dropout=[1, 1])
    for seed in range(3):
        decayed, free = results[f'reference-{seed}'], results[f'no weight decay-{seed}']
        course(decayed, [90.0] * 18 + [49, 51], [60.1, 53, 52.3, 51.3, 52])
        course(free, [10.0] * 18 + [50 + seed, 52 + seed], [54, 53 + seed])
    for seed, error in enumerate((53.0, 52.3)):
        course(results[f'no dropout-{seed}'], [40], [error, 52.0])
    table = ablations.report(results)
    assert (
        '| reference | 3 | 50.0 ± 0.0 | 0.500 ± 0.000 | 52.0 ± 0.0 | 2.0 ± 0.0 | 18.5, 18.5, 18.5 '
        '| 30, 30, 30 |'
    ) in table
    assert '| no dropout | 2 | – | – | +0.00 (no spread) | – | – | 10, 10 |' in table
    assert 'Gap without it, by seed: 12.0, 12.0 points. The gap with it is not' in table
    decay = '| no weight decay | 3 | +2.00 (-0.48 to +4.48) | +0.020 (-0.005 to +0.045) '
    assert (
        decay + '| +2.00 (-0.48 to +4.48) | +0.00 (no spread) | 0.3, 0.3, 0.3 | 10, 10, 10 |'
        in table
    )
    words = 'Training error without it minus with it, points: +2.00 (-0.48 to +4.48), 3 pairs, p = 0.15; the'
    assert f"{words} paper's sign, but not significant." in table
    assert 'divided by those without: 3.00 (no spread), 2 pairs, p = 1; the paper' in table
    assert 'Evaluations are 10 steps apart' in table and 'the values in this list, 2 tests' in table
    assert 'pooling (§3.4)' not in table
    course(results['no dropout-1'], [40], [54, 52.9, 52])
    # The logarithms of 3 and 1.5 differ by twice the standard error.
    half = 12.7062 * math.log(3 / 1.5) / 2
    low, high = (math.exp(math.log(3 * 1.5) / 2 + sign * half) for sign in (-1, 1))
    assert f'without: 2.12 ({low:.2f} to {high:.2f}), 2 pairs' in ablations.report(results)
    assert 'Training and validation' not in ablations.report(ablated(reference=[40], tanh=[41]))


def test_overlapping_pooling_and_the_gap():
    results = ablated(reference=[40, 44], pooling_without_overlap=[1, 1])
    for seed in range(2):
        course(results[f'reference-{seed}'], [50], [52])
        course(results[f'pooling without overlap-{seed}'], [48.0], [54.0 + 0.01 * seed])
    assert (
        'Gap without it minus gap with it, points: +4.00 (+3.94 to +4.07), 2 pairs, p = 0.00079; as '
        'the paper says.'
    ) in ablations.report(results)
    assert '(§4.1)' not in ablations.report(results)
    results = ablated(reference=[40, 44], no_crops_and_flips=[1, 1])
    for seed in range(2):
        course(results[f'reference-{seed}'], [50], [52])
        course(results[f'no crops and flips-{seed}'], [45.0], [50.0 + 0.01 * seed])
    table = ablations.report(results)
    assert 'are then easier): +3.00 (+2.94 to +3.07), 2 pairs, p = 0.001' in table
    assert ablations.as_claimed(-1.0, 0.01) == 'the opposite of what the paper says'
    assert ablations.as_claimed(-1.0, 0.2) == 'the opposite sign, but not significant'
    assert ablations.as_claimed(0.0, 1.0) == 'no difference'


def test_how_much_faster_relu_learns():
    """By hand: rows at epochs 5, 10, 15 and 20; 70% lies in the middle of two of them."""
    results = ablated(reference=[40, 44, 42], tanh_at_its_best=[50, 50, 50])
    for seed, part in enumerate((20, 25, 20)):
        course(results[f'reference-{seed}'], [90, 75, 65, 60], [52])
        course(results[f'tanh at its best-{seed}'], [95, 80, 80 - part, 50], [60])
    table = ablations.report(results)
    assert '| 12.5, 12.0, 12.5 | 10, 10, 10 |' in table
    assert 'divided by those with ReLU: 0.99 (0.93 to 1.05), 3 pairs, p = 0.42; ' in table
    assert 'the opposite sign, but not significant.' in table
    tanh = results['tanh at its best-2']['train']
    for row in tanh[2:]:
        row['weights'] = 0.001  # reached only after the rate has dropped
    assert ablations.reached(tanh) == math.inf and ablations.reached([]) == math.inf
    table = ablations.report(results)
    assert '| 12.5, 12.0, – |' in table and 'ReLU: 0.98 (0.76 to 1.27), 2 pairs' in table
    for row in tanh[2:]:
        row['weights'] = 0.01
    for seed in range(3):  # twice as slow, almost without spread
        course(results[f'reference-{seed}'], [90, 50, 50, 50], [52])
        course(results[f'tanh at its best-{seed}'], [95, 85, 75, 65 + 0.001 * seed], [60])
    assert 'as the paper says.' in ablations.report(results)
    for seed in range(3):  # 1.4 times as slow
        course(results[f'tanh at its best-{seed}'], [95, 72, 60 + 0.001 * seed, 50], [60])
    assert "the paper's sign, but less than 2 times." in ablations.report(results)


def test_the_error_over_pictures_in_the_table():
    results = ablated(reference=[40, 44], no_norms=[43, 46])
    right = {'reference': [1] * 600 + [0] * 400, 'no norms': [1] * 500 + [0] * 500}
    for result in results.values():
        result['hits'] = statistics.pack(np.array(right[result['name']], bool))
    (row,) = (line for line in ablations.report(results).splitlines() if '| no norms' in line)
    # A tenth of 1,000 images changed: 10 points, ± 1.96 times 0.95
    assert re.search(r'\| \+8\.\d+ to \+1[12]\.\d+ \|$', row)


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures that are drawn."""
    figures = []
    monkeypatch.setattr(
        'matplotlib.figure.Figure.savefig', lambda figure, *_, **__: figures.append(figure)
    )
    return figures


def test_one_pair_has_no_bar_in_the_figure(drawn, tmp_path):
    ablations.plot(ablated(reference=[40, 44], no_norms=[43], tanh=[50, 53]), tmp_path / 'none.png')
    one, several = 'measured, one pair', 'measured, 95% interval over seeds'
    (legend,), axes = drawn[0].legends, drawn[0].axes[0]
    assert {one, several} <= {text.get_text() for text in legend.get_texts()}
    bars = {container.get_label(): container.has_xerr for container in axes.containers}
    assert bars == {one: False, several: True, 'measured, no spread': False}  # one crop


def test_the_paper_in_the_figure(drawn, tmp_path):
    """Numbers are markers, inexact ones are text, and rows without a number say 'worse'."""
    results = ablated(
        reference=[40, 44], no_norms=[43, 46], no_colour_noise=[41, 44], no_dropout=[42, 46]
    )
    results['no norms-0']['train'] = losses(1, 1)
    ablations.plot(results, tmp_path / 'none.png')
    first, fifth = drawn[0].axes
    names = ['no norms (at chance)', 'no colour noise', 'no dropout', 'one crop']
    assert [tick.get_text() for tick in first.get_yticklabels()] == names
    assert [text.get_text() for text in first.texts] == ['', '> 1', 'worse', '']
    assert [text.get_text() for text in fifth.texts] == ['', '', 'worse', '']
    (paper,) = (line for line in first.lines if line.get_label() == 'the paper')
    assert [*zip(paper.get_xdata(), paper.get_ydata(), strict=True)] == [
        (1.4, 0),
        (1.0, 1),
        (1.5, 3),
    ]


def test_table_1():
    def result(first, fifth):
        return {'top1_error': first, 'top5_error': fifth}

    runs = [
        {'center': result(50.0, 30.0), 'ten': result(45.0, 25.0)},
        {'center': result(48.0, 27.0), 'ten': result(48.0, 27.0)},
        None,
    ]
    table = table1.report(
        {i: {'extra': extra, 'data': {'source': 'x'}} for i, extra in enumerate(runs)}
    )
    assert '| CNN, one crop | 39.0%, 18.3% | 49.0 ± 1.4%, 28.5 ± 2.1% |' in table
    assert '| CNN, ten crops | 37.5%, 17.0% | 46.5 ± 2.1%, 26.0 ± 1.4% |' in table
    assert '| sparse coding | 47.1%, 28.2% |  |' in table
    assert '2 seeds, plus 1 that diverged' in table


def test_fall_2009():
    results = {0: {'extra': {'ten': {'top1_error': 70, 'top5_error': 45}}, 'data': {'source': 'x'}}}
    table = fall2009.report(results)
    assert '| CNN, six convolutional layers | 67.4%, 40.9% | 70.0%, 45.0% |' in table
    assert '| best published | 78.1%, 60.9% |  |' in table


@pytest.mark.full
def test_which_networks_go_together(tmp_path, monkeypatch):
    """The ensemble takes every run that did not diverge; a later call also takes those added since."""
    compared = []

    def compare(paths, views):
        compared.append([path.name for path in paths])
        return {
            (str(path), 'ten'): {'count': 100, 'loss': 1, 'top1': 60, 'top5': 80} for path in paths
        }

    def start(command, workdir, until):
        leave(command, workdir, until)
        leave_checkpoint(workdir)
        return workdir.name in ('cnn-4', 'star-0')

    def run(seeds):
        compared.clear()
        trial = lab.Lab(
            'trial',
            'small',
            seeds=seeds,
            runs=tmp_path,
            results=tmp_path,
            start=start,
            given=[f'--config.data.source={table2.draw(tmp_path / "shapes")}'],
            allow_dirty=True,
        )
        table2.run(trial)
        return trial.results, [names for names in compared if len(names) > 1]

    monkeypatch.setattr(table2.evaluation, 'compare', compare)
    monkeypatch.setattr(table2.evaluation, 'hits', lambda workdir: np.ones(1, bool))
    cnns = ['cnn-0', 'cnn-1', 'cnn-2', 'cnn-3']
    assert run(5)[1] == [cnns, ['star-1', *cnns]]
    assert run(5)[1] == []
    results, again = run(6)
    assert again == [[*cnns, 'cnn-5'], ['star-1', *cnns, 'cnn-5']]
    table = table2.report(results)
    assert '| SIFT + FVs | –, – | 26.2% | not measured |  |' in table
    assert '| 1 CNN | 40.7%, 18.2% | – | 40.0 ± 0.0%, 20.0 ± 0.0% | 5 |' in table
    assert '| 4 CNNs |  |  | 40.0%, 20.0% | 1 |' in table
    assert '| 5 CNNs | 38.1%, 16.4% | 16.4% | 40.0%, 20.0% | 1 |' in table
    assert '2 runs diverged.' in table


def test_what_table_2_needs(tmp_path):
    def table(scale, *given):
        return lab.Lab(
            'trial',
            scale,
            seeds=1,
            given=given,
            runs=tmp_path,
            results=tmp_path,
            start=lambda *args: True,
        )

    with pytest.raises(UserError, match='give a folder of images'):
        table2.run(table('small'))
    with pytest.raises(UserError, match='val_fraction would only apply to the larger set'):
        table2.run(table('small', '--config.data.source=a', '--config.data.val_fraction=0.2'))
    with pytest.raises(UserError, match='must be a folder'):
        table2.first_half('cifar10', tmp_path / 'half')
    half = table2.first_half(table2.draw(tmp_path / 'a'), tmp_path / 'half')
    assert table2.first_half(str(tmp_path / 'a'), tmp_path / 'half') == half  # it already exists
    with pytest.raises(UserError, match=f'half: holds links to images outside {tmp_path}/b'):
        table2.first_half(table2.draw(tmp_path / 'b'), tmp_path / 'half')


@pytest.mark.slow
def test_analyses_run_in_a_separate_process():
    assert lab.apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match='not a run directory'):
        lab.apart(ablations.errors, 'nowhere')


@pytest.fixture
def smoke(tmp_path, store):
    """smoke(name, arguments, ...) runs an experiment as users do -> its results and output."""
    (tmp_path / 'path').mkdir()  # all stores are raw, so importing TensorFlow would only waste time
    (tmp_path / 'path/sitecustomize.py').write_text("import sys; sys.modules['tensorflow'] = None")
    environment = os.environ | {'PYTHONPATH': str(tmp_path / 'path')}

    def run(name, *given, only=()):
        command = [
            sys.executable,
            '-m',
            f'experiments.{name}',
            '--scale=smoke',
            '--seeds=1',
            f'--results={tmp_path}/kept',
            *(f'--only={name}' for name in only),
            '--',
            *given,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return lab.read(tmp_path / f'kept/{name}-smoke.json'), done.stdout

    return run


@pytest.mark.full
def test_a_smoke_run_of_the_ablations(smoke, store, tmp_path):
    results, out = smoke(
        'ablations', *store, only=['reference', 'one gpu-0']
    )  # all would take a minute
    assert list(results) == ['reference-0', 'one gpu-0']
    command = results['one gpu-0']['command']
    assert '--config.optim.conv1=((0.00589, 1e-05), (0.00633, 0.0))' in command
    for result in results.values():
        assert [*result['extra']] == ['center', 'ten'] and len(result['train']) == 4
        right = statistics.unpack(result['hits'], 20)
        assert 100 * (1 - right.mean()) == pytest.approx(result['extra']['center']['top1_error'])
        assert (
            0 < result['extra']['ten']['top5_error'] < result['extra']['ten']['top1_error'] <= 100
        )
    assert '| one gpu | 1' in out and '| one crop | 1 | ' in out
    assert '\nNot run: tanh, tanh at its best, ' in out
    assert f'figure: {tmp_path}/kept/ablations-smoke.png' in out


@pytest.mark.full
@pytest.mark.parametrize(
    ('name', 'paper'),
    [('table1', 'ten crops | 37.5%, 17.0%'), ('fall2009', 'convolutional layers | 67.4%, 40.9%')],
)
def test_a_smoke_run_of_one_network(smoke, store, name, paper):
    results, out = smoke(name, *store)
    assert list(results) == ['CNN-0'] and len(results['CNN-0']['train']) == 4
    assert f'{paper} | {results["CNN-0"]["extra"]["ten"]["top1_error"]:.1f}%' in out


@pytest.mark.full
def test_a_smoke_run_of_table_2(tmp_path):
    """Runs in this process, unlike the others: it needs three runs on two datasets."""
    trial = make(tmp_path, SIZES)
    table2.run(trial)
    results, folder = trial.results, trial.folder
    assert list(results) == ['cnn-0', 'pretrained-0', 'star-0']
    counts = [result['data'] for result in results.values()]
    half = {'source': 'half-of-shapes', 'counts': {'train': 20, 'val': 10}, 'classes': 5}
    assert counts[0] == counts[2] == half
    assert counts[1] == {'source': 'shapes', 'counts': {'train': 40, 'val': 20}, 'classes': 10}
    init = f'--config.train.init_from={folder}/pretrained-0'
    assert init in results['star-0']['command'] and init not in results['cnn-0']['command']
    assert [*results['star-0']['extra']] == ['1 CNN*', '2 CNNs*']
    pairs = [
        (p.parent.name, p.resolve().parent.name)
        for p in (folder / 'half-of-shapes').glob('val/*/*')
    ]
    assert {*pairs} == {
        (f'{i:05d}', name) for i, name in enumerate(['arrow', 'crescent', 'cross', 'disc', 'heart'])
    }
    table = table2.report(results)
    names = ['SIFT + FVs', '1 CNN', '5 CNNs', '1 CNN*', '2 CNNs*', '7 CNNs*']
    assert [line.split('|')[1].strip() for line in table.splitlines() if line.startswith('| ')][
        1:
    ] == names


@pytest.mark.full
def test_a_smoke_run_of_the_cifar_pair(smoke, tmp_path):
    write_store(
        tmp_path / 'cifar', format='u8', size=32, classes=10, counts={'train': 64, 'val': 20}
    )
    results, out = smoke(
        'cifar_lrn',
        f'--config.data.store={tmp_path}/cifar',
        '--config.data.size=32',
        '--config.train.batch=8',
        '--config.run.eval_batch=4',
    )
    assert list(results) == ['11pct_plain-0', '11pct-0']
    assert 'ten views: ' in out and 'points, 1 seed.' in out


def test_the_intervals_of_steps_and_the_p_of_the_controls():
    """Checks README's 2.4 (1.3 to 3.5), p = 0.024, and the steps relative to `paper`, by seed."""
    quick, plain = 'the quickstart', 'without crops and flips'
    frozen = {'its conv layers frozen': [89.8, 81.8, 83.2]}
    p = built_in_controls.corrected(
        {
            'center': {quick: [2.6, 1.7, 2.1], plain: [4.5, 4.2, 4.9], **frozen},
            'ten': {quick: [1.2, 0.6, 0.9], plain: [1.5, 2.0, 1.8], **frozen},
        }
    )
    assert f'{p[plain, "center"]:.2g}' == '0.024' and p[plain, 'ten'] > 0.05
    assert len(p) == 4

    def run(name, seed, step):
        rows = [{'step': s, 'loss': 3.0 if s < step else 1.0} for s in range(9, 250, 10)]
        return {
            'name': name,
            'seed': seed,
            'diverged': False,
            'data': {'classes': 20},
            'train': rows,
        }

    steps = {'paper': (139, 149, 159), 'paper std': (79, 79, 999)}
    results = {
        f'{name}-{seed}': run(name, seed, step)
        for name, of_seeds in steps.items()
        for seed, step in enumerate(of_seeds)
    }
    assert does_it_train.later(results, 'paper std') == [-60, -70]
    assert does_it_train.later(results, 'paper') == []


def test_the_table_of_compression():
    """The original has 60 errors in 1,000 images; compressed, 20 of these are right and 10 others wrong."""
    original, small = np.ones((2, 1000), bool)
    original[:60] = small[20:70] = False
    layers = [{'layer': name, 'weights': 9, 'kept': 10.0, 'pq': 4.0} for name in ('fc6', 'all')]
    facts = {'kept': 10.0, 'dense': 7e6, 'compressed': 2e5, 'times': 35.0, 'layers': layers}
    found = {'facts': {**facts, 'before': {'top1_error': 6.0}}, 'measured': {'top1_error': 5.0}}
    results = {
        f'a net-{seed}': {
            'name': 'a net',
            'seed': seed,
            'diverged': False,
            'data': {'counts': {'val': 1000}},
            'hits': statistics.pack(original),
            'extra': {**found, 'hits': statistics.pack(small)},
        }
        for seed in range(2)
    }
    table = compression.report(results)
    assert '| a net | 1 | 10.0 | 7,000 | 200 | 35.0 | 6.00 | 5.00 |' in table
    over = '95% interval over the 1,000 images (bootstrap): -2.'
    assert f'a net: -1.00 (no spread) over 2 seeds; {over}' in table
    assert 'images flipped between correct and incorrect, by seed: 30, 30\n' in table
    assert 'fc6' in table and '2.39' in table  # the paper's


def test_recipes_of_the_efficient_networks():
    """Rates follow the batch, epochs the length; no recipe names a wrong field."""
    assert efficient.own('configs/squeezenet.py:1.1', 20.0)['optim.rate'] == 0.04 * 128 / 512
    modern = efficient.own('configs/modern.py', 20.0)
    config = configfile.load('configs/modern.py')
    assert modern['optim.warmup'] / 20 == pytest.approx(config.optim.warmup / config.optim.epochs)
    assert efficient.own('configs/mobilenet.py', 20.0)['optim.schedule'] == 'cosine'
    assert 'optim.schedule' not in efficient.own('configs/mobilenet.py', 300.0)
    # The average forgets over the same part of the training: 1 / (1 - ema) of all steps.
    ema = efficient.averaged('configs/modern.py', 20.0, 10_000)['train.ema']
    there = (1 - config.train.ema) * config.optim.epochs * 1_281_167 / config.train.batch
    assert (1 - ema) * 20 * 10_000 / 128 == pytest.approx(there, rel=0.05)
    for net in efficient.NETS.values():
        for changes in (efficient.own(net.preset, 20.0), efficient.theirs(20.0)):
            config = configfile.load(net.preset)
            config.update_from_flattened_dict(changes)
            assert (config.train.batch, config.optim.epochs) == (128, 20.0)


def bars(figure):
    """Half the length of each error bar of a figure's first axes."""
    found = [each.lines[2][0].get_segments() for each in figure.axes[0].containers]
    return [(high - low) / 2 for segments in found for (_, low), (_, high) in segments]


def test_the_table_and_figure_of_efficient(drawn, tmp_path):
    def row(name, seed, error):
        times = {'train_ratio': 2.0, 'predict_ratio': 0.5, 'train': [0.004, 0.002]}
        extra = {view: {'top1_error': error} for view in ('center', 'ten')}
        extra |= {'size': {'parameters': 250_000, 'macs': 7_000_000}}
        extra |= {'times': times | {'predict': [0.001, 0.002]}}
        return {'name': name, 'seed': seed, 'diverged': False, 'extra': extra}

    errors = {'original': (60, 62, 61), 'modern': (50, 53, 51), 'mobilenet v1 as original': (70,)}
    errors['modern without mixup'] = (48,)
    results = {
        f'{name}-{seed}': row(name, seed, error)
        for name, values in errors.items()
        for seed, error in enumerate(values)
    }
    table = efficient.report(results)
    assert '| own | 3 | 250,000 | 1.0 | 7,000,000 | 51.3 ± 1.5 | 51.3 ± 1.5 | -9.67 (-11.1' in table
    assert "| MobileNet v1 | `original`'s | 1 | 250,000" in table and '2.00 (4 ms)' in table
    assert '| 70.0 | 70.0 | +10.00 |  |  |' in table
    assert '| mixup | 48.0 | -2.0 |' in table
    efficient.plot(results, tmp_path / 'figure.png')
    assert bars(drawn[0]) == pytest.approx([1, (7 / 3) ** 0.5])  # sample standard deviations


def test_few_labels(tmp_path):
    """Draws have the given number of images per class, differ by seed, and are subsets of larger ones."""
    for split, count in (('train', 20), ('val', 2)):
        for kind in 'ab':
            folder = tmp_path / 'all' / split / kind / 'images'
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f'{kind}{i}.jpg').write_bytes(b'')
            (folder.parent / 'boxes.txt').write_text('')

    def draw(count, seed):
        folder = tmp_path / f'{count}-{seed}'
        for _ in range(2):  # again, as when a run resumes
            few_labels.draw(str(tmp_path / 'all'), folder, count, seed)
        assert len([*folder.glob('val/*/images/*')]) == 4
        return {path.name for path in folder.glob('train/*/*')}

    assert len(draw(5, 0)) == 10 and draw(5, 0) < draw(10, 0) and draw(5, 0) != draw(5, 1)
    with pytest.raises(UserError, match='20 images, fewer than 21'):
        few_labels.draw(str(tmp_path / 'all'), tmp_path / 'more', 21, 0)
    with pytest.raises(UserError, match='not a folder with train/ and val/'):
        few_labels.draw(str(tmp_path), tmp_path / 'other', 1, 0)


def test_the_scales_of_few_labels():
    """The same runs, on crops of 96 or 224 pixels, and AlexNet at quarter or full width."""
    found, shapes = {}, functools.cache(network.shapes)
    for scale in ('small', 'full'):
        runs = found[scale] = {}
        few_labels.run(
            types.SimpleNamespace(
                scale=scale,
                seeds=2,
                listing=True,
                value_given=lambda field: None,
                run=lambda name, seed, preset, changes, runs=runs, **_: runs.update(
                    {f'{name}-{seed}': (preset, changes)}
                ),
            )
        )
    assert len(found['small']) == len(found['full']) == 2 * 3 * 5
    for scale, crop, width in (('small', 96, 0.25), ('full', 224, 1.0)):
        for name, (preset, changes) in found[scale].items():
            with configfile.load(preset).unlocked() as config:
                config.update_from_flattened_dict(changes)
            assert config.augment.crop == crop < config.data.size
            net = build(classes=20, **config.model)
            assert 'alexnet' not in name or net.width == width
            shapes(net, crop)


def test_the_table_and_figure_of_few_labels(drawn, tmp_path):
    results = {
        f'squeezenet {start} 10-{seed}': {
            'name': f'squeezenet {start} 10',
            'seed': seed,
            'extra': {'center': {'top1_error': error + seed}},
        }
        for start, error in (('fine-tuned', 40), ('from scratch', 85))
        for seed in range(2)
    }
    table = few_labels.report(results)
    assert '| SqueezeNet v1.0, fine-tuned | 40.5 ± 0.7 |  |  |' in table
    assert '| SqueezeNet v1.0, 10 per class | 2 | -45.00' in table
    assert 'in percent; 2 seeds unless noted.' in table
    few_labels.plot(results, tmp_path / 'figure.png')
    assert bars(drawn[0]) == pytest.approx([0.5**0.5, 0.5**0.5])
    del results['squeezenet fine-tuned 10-1']
    assert '| SqueezeNet v1.0, fine-tuned | 40.0 (1 seed) |  |  |' in few_labels.report(results)
    few_labels.plot(results, tmp_path / 'figure.png')  # a point without a bar


def test_when_a_run_of_text_init_ends():
    """It ends once the loss has stayed below 0.95 ln(10) for 100 steps; rows come every ten steps."""
    ends = {}

    class Lab:
        scale, seeds, listing = 'small', 2, True

        def value_given(self, field):
            return None

        def run(self, name, seed, config, changes, *, last, until):
            ends[f'{name}-{seed}'] = (config, until)

    text_init.run(Lab())
    assert (
        len(ends) == 16
    )  # 2 networks of 3 sizes with 2 seeds; of 200 classes, and full width, with 1
    assert 'text 200-1' not in ends and 'source 20 full width-0' in ends
    assert [ends[f'{init} 20-1'][0] for init in text_init.INITS] == [*text_init.INITS.values()]
    until = functools.partial(ends['text 50-0'][1], classes=10)
    assert until(losses(1, 0.9, 1, *[0.9] * 11)) == 40  # not the dip at 20
    assert not until(losses(1, 0.9, 1, *[0.9] * 10))
    assert not until(losses(*[0.9] * 10, 1.0, *[0.9] * 10)) and not until([])
    assert until(losses(*[0.9] * 11, 1.0)) == 10  # what follows does not matter
    rows = [
        {'step': 10 * i + 9, 'loss': 3.0} for i in range(20)
    ]  # below 0.95 ln(50), above 0.95 ln(20)
    assert ends['text 50-0'][1](rows) and not ends['text 20-0'][1](rows)


def test_the_classes_of_text_init(tmp_path):
    """Every tenth class, in order, in both splits; another set does not get the same links."""
    for name, letter in (('all', 'c'), ('other', 'd')):
        for split, count in (('train', 3), ('val', 1)):
            for kind in range(20):
                folder = tmp_path / name / split / f'{letter}{kind:02}' / 'images'
                folder.mkdir(parents=True)
                for i in range(count):
                    (folder / f'{i}.jpg').write_bytes(b'')
    source, links = str(tmp_path / 'all'), tmp_path / 'links'
    for _ in range(2):  # again, as when a run resumes
        assert text_init.subset(source, links, 2) == 6
    assert sorted(p.relative_to(links).as_posix() for p in links.glob('*/*')) == [
        f'{split}/{kind}' for split in ('train', 'val') for kind in ('c00', 'c10')
    ]
    assert len([*links.glob('*/*/images/*.jpg')]) == 8
    assert text_init.subset(source, tmp_path / 'three', 3) == 9
    assert sorted(p.name for p in tmp_path.glob('three/val/*')) == ['c00', 'c06', 'c12']
    with pytest.raises(UserError, match='20 classes, fewer than 21'):
        text_init.subset(source, tmp_path / 'more', 21)
    with pytest.raises(UserError, match='links to classes other'):
        text_init.subset(str(tmp_path / 'other'), links, 2)
    shutil.rmtree(tmp_path / 'all/val/c00')
    with pytest.raises(UserError, match='all/val/c00: missing'):
        text_init.subset(source, tmp_path / 'missing', 2)


def left_at(name, seed, step, last=6100):
    """A result of text_init that leaves chance at a step, or never."""
    rows = [{'step': s - 1, 'loss': 9.0 if s < step else 0.1} for s in range(10, last + 1, 10)]
    return {
        'name': name,
        'seed': seed,
        'diverged': False,
        'data': {'classes': 20},
        'train': rows[: step // 10 + 10] if step < math.inf else rows,
    }


def test_the_table_and_figure_of_text_init(drawn, tmp_path):
    """By hand: the text's steps are 100, 200 and 400 at 20, 40 and 80 classes, 5,000 at 1,000."""
    steps = {
        'text 20': (100, 100),
        'source 20': (50, 40),
        'text 40': (200,),
        'source 40': (math.inf,),
        'text 80': (400,),
        'source 80': (80,),
        'text 20 full width': (900,),
        'source 20 full width': (300,),
    }
    results = {
        f'{name}-{seed}': left_at(name, seed, step)
        for name, values in steps.items()
        for seed, step in enumerate(values)
    }
    results['source 20-2'] = {'name': 'source 20', 'seed': 2, 'diverged': True, 'train': []}
    table = text_init.report(results)
    rows = [
        '| 20 | 100, 100 | 50, 40, diverged | 2.0, 2.5 |',
        '| 40 | 200 | > 6,000 | – |',
        '| 80 | 400 | 80 | 5.0 |',
        '| 20, full width | 900 | 300 | 3.0 |',
    ]
    assert '\n'.join(rows) in table
    assert (
        'as classes^1.00 (1.00 to 1.00; ' in table
        and '4 runs, without full width). **Extra' in table
    )
    assert (
        'at 1,000 classes, 12.5 times the largest number in the fit, this law gives about 5,000 steps (5,0'
        in table
    )
    assert '0.5 epochs of ImageNet' in table and 'too low' not in table
    text_init.plot(results, tmp_path / 'figure.png')
    (axes,) = drawn[0].axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]): line for line in axes.lines}
    assert points[40, 6000].get_marker() == '^' and points[20, 900].get_markerfacecolor() == 'none'
    assert [text.get_text() for text in axes.texts] == ['> 6,000']
    assert [*axes.lines[-1].get_xdata()] == [80, 1000]
    assert [*axes.lines[-1].get_ydata()] == pytest.approx([400, 5000])
    results['text 160-0'] = left_at('text 160', 0, math.inf)
    table = text_init.report(results)
    assert '| 160 | > 6,000 | not run |  |' in table
    assert 'classes^1.00' in table and 'are not in the fit, so it is too low: 1.' in table
    results['text 1000-0'] = left_at('text 1000', 0, 5000)
    assert '. At 1,000 classes this law gives' in text_init.report(results)
    few = {key: result for key, result in results.items() if key.startswith('text 20')}
    assert 'Too few runs' in text_init.report(few)
    text_init.plot(few, tmp_path / 'figure.png')  # no line


@pytest.mark.full
def test_a_smoke_run_of_text_init(smoke):
    results, out = smoke('text_init', *SIZES[:3], only=['text 5', 'source 5'])
    assert [*results] == ['text 5-0', 'source 5-0']
    for result in results.values():
        counts = {'train': 20, 'val': 10}
        assert result['data'] == {'source': '5-of-shapes', 'counts': counts, 'classes': 5}
        assert [row['step'] for row in result['train']] == [0, 1, 2, 3]
    assert '| 5 | > 1 | > 1 | – |' in out
