"""Tests CIFAR-10 with and without norms, figures 3 and 4, and the report: arithmetic and smoke runs."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from etils.epath import gpath
from PIL import Image

from alexnet_jax import figures, predict, retrieve, visualize
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.store import open_store
from alexnet_jax.training import inference
from alexnet_jax.training.progress import kernel_picture
from experiments import (
    cifar_lrn,
    fig3_filters,
    fig4_retrieval,
    lab,
    provenance,
    report,
    statistics,
)
from experiments.lab import Lab
from tests.helpers.buckets import Bucket, FileSystem
from tests.helpers.experiments import in_process, make
from tests.helpers.run_dirs import without_tensorflow
from tests.helpers.stores import write_store


@pytest.fixture(autouse=True, scope='module')
def no_tensorflow():
    with pytest.MonkeyPatch.context() as patch:
        without_tensorflow(patch)
        yield


def tiny(folder, size, *options):
    write_store(folder, format='u8', size=size, classes=10, counts={'train': 64, 'val': 20})
    return [
        f'--config.data.store={folder}',
        f'--config.data.size={size}',
        '--config.train.batch=8',
        '--config.run.eval_batch=4',
        '--config.run.mesh=(1, 1)',
        *options,
    ]


def result(name, seed=0, *, diverged=False, **extra):
    """Makes a result by hand, as `lab.Lab` stores it."""
    return {
        'name': name,
        'seed': seed,
        'diverged': diverged,
        'extra': None if diverged else extra,
        'train': [{'step': 9, 'epoch': 52.0, 'top1_error': 20.0}],
        'eval': [{'step': 5, 'top1_error': 30.0}, {'step': 10, 'top1_error': 25.0}],
        'command': ['--config=c'],
        'given': ['--config.data.source=/pictures of cats'],
        'starts': [
            {
                'commit': 'abc1234',
                'versions': {'jax': '0.10.2'},
                'devices': ['GPU_0'],
                'processor': 'Z80 (1 core)',
            }
        ],
        'data': {'source': 'cifar', 'counts': {'train': 50000, 'val': 10000}, 'classes': 10},
    }


def by_key(*results):
    return {f'{r["name"]}-{r["seed"]}': r for r in results}


@pytest.fixture
def figure_of(tmp_path, monkeypatch):
    """figure_of(experiment, results) returns its figure."""
    drawn = []
    monkeypatch.setattr(
        'matplotlib.figure.Figure.savefig', lambda figure, *_, **__: drawn.append(figure)
    )

    def figure(module, results):
        module.plot(results, tmp_path / 'none.png')
        return drawn[-1]

    return figure


@pytest.mark.full
def test_cifar_lrn(tmp_path, monkeypatch):
    most, changes = cifar_lrn.SCALES['smoke'][1:]
    monkeypatch.setitem(cifar_lrn.SCALES, 'smoke', (('11pct_plain',), most, changes))
    trial = make(tmp_path, tiny(tmp_path / 'store', 32))
    cifar_lrn.run(trial)
    (made,) = trial.results.values()
    assert [row['epoch'] for row in made['train']] == [0.125, 0.25, 0.375, 0.5, 0.625]
    assert made['extra'].keys() == {'center', 'ten'}
    # the run's own last evaluation
    assert made['extra']['center'] == made['eval'][-1]['top1_error']
    # One bit per image, compared with a single program over the whole split
    right = statistics.unpack(made['hits'], 20)
    classify = inference.load(trial.workdir('11pct_plain', 0), views='center')
    store = inference.open_store([classify.run])
    scores = classify(figures.squares(store, 'val', np.arange(20)))
    np.testing.assert_array_equal(right, scores.argmax(1) == store.labels('val'))
    assert 100 * (1 - right.mean()) == pytest.approx(made['extra']['center'])
    table = cifar_lrn.report(trial.results)
    assert f'| 11pct_plain | 0.625 of 520 |  | {made["extra"]["center"]:.2f} | ' in table
    assert '| 13pct | | 13 | not run | | 0 |' in table and 'Effect of norms alone: not run' in table


def test_all_schedules_are_shortened_alike(tmp_path):
    commands = {}

    class Lab:
        scale, seeds = 'small', 1

        def run(self, name, seed, config, changes, *, after):
            commands[config] = changes

    cifar_lrn.run(Lab())
    assert len(commands) == 6
    eleven = commands['configs/cifar10.py:11pct']
    assert (eleven['optim.epochs'], eleven['optim.drops']) == (12.0, (11.538462, 11.769231))
    assert eleven['run.eval_every'] == 1.0
    short = commands['configs/cifar10.py:80sec']
    assert (short['optim.epochs'], short['optim.drops']) == (10.0, (8.0,))  # its full schedule
    Lab.scale = 'full'
    cifar_lrn.run(Lab())
    eleven = commands['configs/cifar10.py:11pct']
    assert (eleven['optim.epochs'], eleven['optim.drops']) == (520.0, (500.0, 510.0))
    assert eleven['run.eval_every'] == 26.0


def test_every_network_has_dashes_of_its_own():
    assert {*cifar_lrn.LOOKS} == {*cifar_lrn.CLAIMED}
    assert len({dashes for _, dashes, _ in cifar_lrn.LOOKS.values()}) == len(cifar_lrn.LOOKS)


def test_what_norms_bring_is_paired_by_seed():
    """The networks differ by 1 to 3 points within a seed, and by much more between seeds."""
    results = by_key(
        *(result('11pct', s, center=e, ten=e - 1) for s, e in enumerate((10.0, 20.0, 30.0, 40.0))),
        *(
            result('11pct_plain', s, center=e, ten=t)
            for s, e, t in ((2, 32.0, 27.0), (1, 21.0, 21.0), (0, 13.0, 9.0))
        ),
        result('11pct_plain', 3, diverged=True),
        result('18pct', 0, center=17.25),
    )
    assert cifar_lrn.gains(results, 'center') == [3.0, 1.0, 2.0]  # seed 3 has no partner
    table = cifar_lrn.report(results)
    # Three seeds: 4.303 standard errors. Two tests: twice 0.074, and 1
    assert 'center crop: +2.00 (-0.48 to +4.48) points, 3 seeds, p = 0.15.' in table
    assert 'ten views: +0.00 (-4.97 to +4.97) points, 3 seeds, p = 1.' in table  # 0, 2 and -2
    assert 'over images (bootstrap, center crop, 95%): —.' in table
    assert 'the effect of norms, one test per kind of view, 2 tests.' in table
    assert '| 11pct | 52 of 520 | 11 | 25.00 ± 12.91 | 24.00 ± 12.91 | 4 |' in table
    assert '| 11pct_plain | 52 of 520 |  | 22.00 ± 9.54 | 19.00 ± 9.17 | 4, 1 diverged |' in table
    assert '| 18pct | 52 of 140 | 18 | 17.25 |  | 1 |' in table


def test_the_figure_of_cifar_lrn(figure_of):
    """It has a line per seed, a label per network, and a bar at the published error."""
    (axes,) = figure_of(
        cifar_lrn,
        by_key(
            *(result(net, s, center=20.0) for net in ('18pct', '11pct_plain') for s in (0, 1)),
            result('11pct', diverged=True),
        ),
    ).axes
    curves = [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() < 2
    ]
    (bar,) = (line for line in axes.lines if line not in curves)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ['18% network', '11% network without norms'] and len(curves) == 4
    assert [*curves[0].get_ydata()] == [30.0, 25.0] and [*curves[0].get_xdata()] == [26.0, 52.0]
    assert [*bar.get_ydata()] == [18, 18] and bar.get_color() == curves[0].get_color()


@pytest.mark.parametrize(
    ('differences', 'words'),
    [
        ([1.9, 2.0, 2.1], '+2.00 (+1.75 to +2.25) points, 3 seeds, p = 0.0017: better with norms'),
        ([-1.9, -2.0, -2.1], '-2.00 (-2.25 to -1.75) points, 3 seeds, p = 0.0017: worse'),
        ([1.8, 2.0, 2.8], '+2.20 (+0.89 to +3.51) points, 3 seeds, p = 0.037: better with norms'),
        ([1.7, 2.0, 2.9], '+2.20 (+0.65 to +3.75) points, 3 seeds, p = 0.052'),
        ([1.5], '+1.50 points, 1 seed'),
    ],
)
def test_what_norms_bring_as_a_family(differences, words):
    """A second test that shows nothing doubles the p of the first."""
    found = cifar_lrn.verdicts({'center': differences, 'ten': [-1.0, 0.0, 1.0]})
    assert found['center'] == words


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Makes results of figures 3 and 4 from one run; every validation image is a training image, too."""
    folder = tmp_path_factory.mktemp('figures')
    given = tiny(folder / 'store', 72, '--config.augment.crop=64', '--config.optim.epochs=0.5')
    labels = {'train': np.arange(64) % 10, 'val': np.arange(40, 60) % 10}
    pictures = {'train': open_store(folder / 'store').pixels('train').copy()}
    pictures['val'] = pictures['train'][40:60]
    write_store(
        folder / 'store', format='u8', size=72, classes=10, pictures=pictures, labels=labels
    )
    both = {'given': given, 'seeds': 1, 'runs': folder / 'runs', 'results': folder / 'results'}
    third = Lab('fig3_filters', 'smoke', start=in_process, **both)
    fig3_filters.run(third)

    def nothing_is_left(command, workdir, until):
        assert command == third.results['original-0']['command']
        assert (workdir / 'checkpoints').is_dir()
        return False

    fourth = Lab('fig4_retrieval', 'smoke', start=nothing_is_left, runs_of='fig3_filters', **both)
    fig4_retrieval.run(fourth)
    return SimpleNamespace(third=third, fourth=fourth)


@pytest.mark.full
def test_figure_3(drawn, tmp_path):
    run = drawn.third.workdir('original', 0)
    extra = drawn.third.results['original-0']['extra']
    kernels = visualize.first_kernels(
        inference.open_run(run, meshes.make((1, 1), towers=1, batches={}))
    )
    assert kernels.shape == (2, 11, 11, 3, 3) and extra['end'] == fig3_filters.measures(kernels)
    assert extra['start'] != extra['end'] and np.shape(extra['start']['color']) == (2, 3)
    np.testing.assert_array_equal(fig3_filters.unpacked(extra['picture']), kernel_picture(kernels))
    table = fig3_filters.report(drawn.third.results)
    assert f'| original, seed 0 | 1 | 3 | {np.mean(extra["end"]["color"][1]):.2f} | ' in table
    (axes,) = fig3_filters.figure(drawn.third.results).axes
    np.testing.assert_array_equal(axes.images[0].get_array(), kernel_picture(kernels))
    assert axes.get_title('left') == ''  # a single run
    fig3_filters.plot(drawn.third.results, tmp_path / 'figure.png')
    drawn = np.asarray(Image.open(tmp_path / 'figure.png').convert('RGB'))
    assert colors(kernel_picture(kernels)) <= colors(drawn)


def colors(picture):
    return {*map(tuple, picture.reshape(-1, 3).tolist())}


def test_figure_3_of_several_runs(tmp_path):
    """Runs and towers have their names, with more space between runs than between towers."""
    rng = np.random.default_rng(0)

    def of(towers, count):
        kernels = rng.normal(size=(towers, 11, 11, 3, count)).astype(np.float32)
        picture = fig3_filters.packed(kernel_picture(kernels), 'PNG')
        return {'picture': picture, 'end': fig3_filters.measures(kernels)}

    results = by_key(
        result('a', 0, **of(2, 12)),
        result('a', 1, diverged=True),
        result('a', 2, **of(2, 12)),
        result('$_{x$', 0, **of(1, 20)),
    )
    drawn = fig3_filters.figure(results)
    drawn.draw_without_rendering()
    assert [axes.get_title('left') for axes in drawn.axes] == [
        'a, seed 0',
        'a, seed 2',
        '$_{x$, seed 0',
    ]
    first, second, single = drawn.axes
    # Kernels are in rows 1 to 11 and, below two lines and a gap of 5, in rows 19 to 29.
    for axes, towers in (
        (first, {6: 'tower 0', 24: 'tower 1'}),
        (second, {6: 'tower 0', 24: 'tower 1'}),
        (single, {12: 'tower 0'}),
    ):
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert dict(zip(axes.get_yticks(), labels, strict=True)) == towers
    upper, lower = (axes.get_window_extent() for axes in (first, second))
    between_towers = 7 / 31 * upper.height
    assert upper.y0 - lower.y1 > 2 * between_towers
    title = second._left_title.get_window_extent()
    assert lower.y1 < title.y0 and title.y1 < upper.y0
    fig3_filters.plot(by_key(result('a', 1, diverged=True)), tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()


@pytest.mark.full
def test_figure_4(drawn, tmp_path, monkeypatch):
    """The nearest image is the same image: same class, same name, at distance 0."""
    extra = drawn.fourth.results['original-0']['extra']
    assert extra['same'][0] == 100.0 and len(extra['same']) == 6 and extra['same'][5] < 50
    assert extra['chance'] == pytest.approx(10.0)
    assert extra['same_by_pixels'][0] == 100.0 and extra['same_by_pixels'][5] < 50
    compared = extra['pixel_distances']
    assert (
        compared['retrieved'][0] == compared['closer'][0] == 0.0 and compared['smallest'][0] < 1e-6
    )
    for own, smallest, closer in [*zip(*compared.values(), strict=True)][1:]:
        assert 0 < smallest <= own < 1.5 and 0 < closer <= 100 * 63 / 64
    assert len(extra['queries']) == 5
    for query in extra['queries']:
        assert query['names'][0] == query['name'] and query['distances'][0] < 1e-4
        assert query['pictures'][0] == query['picture'] not in query['pictures'][1:]
        assert query['distances'] == sorted(query['distances']) and query['distances'][1] > 1e-4
    made = extra['predictions']
    assert (len(made['labels']), len(made['pictures'])) == (8, 8)
    assert all(0.5 < sum(row) < 1.001 for row in made['probabilities'])
    assert [made['names'][label] for label in made['labels']] == [
        f'class {k}' for k in figures.sample(np.arange(40, 60) % 10, 8, seed=0) % 10
    ]
    table = fig4_retrieval.report(drawn.fourth.results)
    own, by_pixels = (np.mean(extra[kind]) for kind in ('same', 'same_by_pixels'))
    assert (
        f'| {own:.1f} | 100.0 | {by_pixels:.1f} | 10.00 | {np.mean(compared["retrieved"]):.2f} ('
        in table
    )
    assert 'Pixel distance: ' in table and '(runs: 1;' in table
    older = copy.deepcopy(drawn.fourth.results)
    del older['original-0']['extra']['pixel_distances']
    table = fig4_retrieval.report(older)
    assert '| 10.00 | – | – |' in table and 'Pixel distance: ' not in table

    # The figure: eight images with their bars; below, images and classes of five queries.
    results = copy.deepcopy(drawn.fourth.results)
    asked = results['original-0']['extra']['queries']
    asked[0]['name'] = 'n01440764'
    above, plain = [], predict.figure
    monkeypatch.setattr(predict, 'figure', lambda *args: above.append(plain(*args)) or above[-1])
    fig4_retrieval.plot(results, tmp_path / 'figure.png')
    pictures, bars = (np.array(above[0].axes).reshape(2, 2, 4)[:, i].ravel() for i in (0, 1))
    assert [axes.get_title() for axes in bars] == [made['names'][label] for label in made['labels']]
    for axes, picture in zip(pictures, made['pictures'], strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), fig3_filters.unpacked(picture))
    names = [[query['name'], *query['names']] for query in asked]
    assert names[0][0] == 'n01440764'
    names[0][0] = 'tench'
    tiles = np.array(
        [
            [fig3_filters.unpacked(one) for one in (query['picture'], *query['pictures'])]
            for query in asked
        ]
    )
    below = retrieve.draw(tiles[:, 0], tiles[:, 1:], names)
    drawn = np.asarray(Image.open(tmp_path / 'figure.png'))
    np.testing.assert_array_equal(drawn[-20 - len(below) : -20, : below.shape[1]], below)
    assert len(drawn) == 860 + 20 + len(below)  # the upper part has that height


@pytest.mark.full
def test_a_run_that_is_there_already(drawn, monkeypatch, capsys):
    """Its table and figure are made, but no results are stored."""
    monkeypatch.setattr(lab, 'apart', lambda look, run: look(run))
    monkeypatch.setattr(lab, 'Lab', None)
    monkeypatch.setattr('signal.signal', lambda *args: None)
    run = drawn.third.workdir('original', 0)
    monkeypatch.setattr('sys.argv', ['fig3_filters', f'--run={run}'])
    lab._main(fig3_filters)
    out = capsys.readouterr().out
    assert out.replace(str(run), 'original').startswith(fig3_filters.report(drawn.third.results))
    assert out.endswith(f'figure: {run}/fig3_filters.png\n') and (run / 'fig3_filters.png').exists()
    monkeypatch.setattr('sys.argv', ['fig3_filters', f'--run={run.parent}/nowhere'])
    with pytest.raises(UserError, match='nowhere: not a run directory'):
        lab._main(fig3_filters)


@pytest.mark.full
@pytest.mark.parametrize('module', [fig3_filters, fig4_retrieval])
def test_a_run_in_a_bucket(drawn, monkeypatch, capsys, module):
    """It is read from there, and its figure is written there."""
    name = module.__name__.rpartition('.')[2]
    made = {fig3_filters: drawn.third, fig4_retrieval: drawn.fourth}[module].results['original-0']
    bucket, address = Bucket(), 'gs://bucket/run'
    monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', FileSystem(bucket))
    for file in ('config.json', 'metrics.jsonl'):
        bucket.put(f'bucket/run/{file}', (drawn.third.workdir('original', 0) / file).read_bytes())

    def apart(look, path):
        path = pickle.loads(pickle.dumps(path))  # as when sent to another process
        assert look == module.look and str(path / 'names.txt') == f'{address}/names.txt'
        return made['extra']

    monkeypatch.setattr(lab, 'apart', apart)
    monkeypatch.setattr('signal.signal', lambda *args: None)
    monkeypatch.setattr('sys.argv', [name, f'--run={address}'])
    lab._main(module)
    table = module.report({address: {**made, 'name': address}})
    assert capsys.readouterr().out == f'{table}\nfigure: {address}/{name}.png\n'
    with Image.open(io.BytesIO(bucket.objects[f'bucket/run/{name}.png'][0])) as drawn:
        assert drawn.format == 'PNG' and min(drawn.size) > 100


def gratings():
    """Makes kernels f32[1,11,11,3,6]: three gray gratings, a colored one, a gray spot and a checkerboard."""
    y, x = np.mgrid[-5:6, -5:6]
    waves = [
        np.sin(1.7 * (np.cos(a) * x + np.sin(a) * y)) for a in np.pi / 180 * np.array([0, 90, 30])
    ]
    spot = np.exp(-(x**2 + y**2) / 4)
    gray = [np.stack([wave] * 3, -1) for wave in (*waves, spot, np.cos(1.7 * x) + np.cos(1.7 * y))]
    colored = np.stack([waves[2], -waves[2], 0 * waves[2]], -1)
    return np.stack([*gray[:3], colored, *gray[3:]], -1)[None]


def test_color_and_orientation_of_kernels():
    (colors,), (directions,) = (
        f(gratings()) for f in (fig3_filters.color, fig3_filters.orientation)
    )
    np.testing.assert_allclose(colors, [0, 0, 0, 1, 0, 0], atol=1e-12)
    assert (directions[:4] > 0.9).all() and directions[2] == pytest.approx(directions[3])
    np.testing.assert_allclose(directions[4:], 0, atol=1e-6)
    noise = np.random.default_rng(0).normal(size=(1, 11, 11, 3, 500))
    assert fig3_filters.color(noise).mean() == pytest.approx(2 / 3, abs=0.01)
    assert fig3_filters.orientation(noise).mean() < 0.15
    black = np.zeros((1, 11, 11, 3, 1))
    assert fig3_filters.color(black) == fig3_filters.orientation(black) == 0


def test_the_difference_between_towers():
    def of(*towers, start=0.6):
        towers = [[*tower] * 2 for tower in towers]
        energy = [[1.0, 3.0] * 2] * len(towers)
        before = [[start, start + 0.1] * 2] * len(towers)
        end = {'color': [*towers], 'orientation': before, 'energy': energy}
        return {'start': {'color': before, 'orientation': before}, 'end': end}

    table = fig3_filters.report(
        by_key(
            result('a', 0, **of([0.0, 0.2], [0.8, 0.8])),
            result('a', 1, **of([0.9, 1.0], [0.1, 0.0])),
            result('a', 2, **of([0.1, 0.3], [0.2, 0.3])),
            result('one tower', 0, **of([0.5, 0.5])),
            result('a', 3, diverged=True),
            result('a', 4, **of([0.0, 0.2], [0.6, 0.6])),
            result('a', 5, **of([0.0, 0.0], [0.25, 0.75])),  # p is 0.04, with two tests left
        )
    )
    assert '| a, seed 0 | 0 | 4 | 0.10 | 0.15 | 0.65 |' in table
    # its standard error is 0.2 / 12 ** 0.5, with three degrees of freedom
    assert 'a, seed 0, tower 1 minus tower 0: color +0.70 (+0.52 to +0.88), p = 0.0048, ' in table
    assert 'a, seed 5, tower 1 minus tower 0: color +0.50 (+0.04 to +0.96), p = 0.081, ' in table
    assert 'color-specific in 3 of 5 runs, by the corrected p (tower 0 in 1, tower 1 in 2)' in table
    assert 'tower 1 minus tower 0, for each run, 5 tests.' in table
    assert '| a, seed 3 | diverged |' in table and 'one tower, seed 0, tower 1' not in table
    assert 'All kernels of a run share one scale' in table
    assert 'Figure' not in fig3_filters.report(by_key(result('a', 3, diverged=True)))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """page() returns the report of what is in `results`, its sections by title."""
    monkeypatch.setattr(report, 'PAGE', tmp_path / 'RESULTS.md')
    monkeypatch.setattr(lab, 'RESULTS', tmp_path / 'results')
    monkeypatch.setattr(lab, 'FIGURES', tmp_path / 'figures')
    monkeypatch.setattr('sys.argv', ['report'])
    (tmp_path / 'figures').mkdir()

    def make():
        report.main()
        intro, *sections = (tmp_path / 'RESULTS.md').read_text().split('\n## ')
        datasets, *sections = sections
        assert datasets.startswith('Datasets')
        return {section.partition('\n')[0]: section for section in sections}

    return make


def test_a_report_of_nothing(page, capsys):
    sections = page()
    assert len(sections) == len(report.EXPERIMENTS) == 14  # and no section of earlier results
    assert capsys.readouterr().out.startswith('wrote ')
    for section in sections.values():
        assert section.count('**Not run.**') == 2 and 'Measured' not in section
    assert (
        'python -m experiments.cifar_lrn --scale=small -- --config.data.source=FOLDER\n'
        in (sections[cifar_lrn.TITLE])
    )
    full, small = sections[fig3_filters.TITLE].split('### Small')
    assert 'python -m experiments.fig3_filters --scale=full\n' in full
    assert (
        'python -m experiments.fig3_filters --scale=small -- --config.data.source=FOLDER\n' in small
    )


def test_a_report_of_some_results(page, tmp_path):
    """Results at one scale, with two seeds and a figure; smoke runs are not shown."""
    results = pair()
    lab.write(tmp_path / 'results/cifar_lrn-small.json', results)
    lab.write(tmp_path / 'results/cifar_lrn-smoke.json', results)
    lab.write(tmp_path / 'results/fig3_filters-smoke.json', results)
    figure = tmp_path / 'figures/cifar_lrn-small.png'
    figure.touch()  # of other results: it is redrawn
    again = page()
    cifar_lrn.plot(results, tmp_path / 'same.png')
    assert figure.read_bytes() == (tmp_path / 'same.png').read_bytes()
    section = again.pop(cifar_lrn.TITLE)
    assert all(other.count('**Not run.**') == 2 for other in again.values())
    full, small = section.split('### Small scale')
    assert '**Not run.**' in full and 'smoke' not in section
    assert (
        'python -m experiments.cifar_lrn --scale=small --seeds=2 --only=11pct --only=11pct_plain -- '
        "'--config.data.source=/pictures of cats'\n"
    ) in small
    assert f'{cifar_lrn.NOTES["small"]}\n\n{cifar_lrn.report(results)}' in small
    assert '(figures/cifar_lrn-small.png)' in small
    assert 'Measured: 4 runs on cifar (50,000 training and 10,000 validation images)' in small
    assert (
        'GPU_0; processors: Z80 (1 core); jax 0.10.2; commit abc1234; training code c0de.' in small
    )
    assert page()[cifar_lrn.TITLE] == section


def pair():
    """Makes results of two seeds of the 11% network with and without norms."""
    fingerprint = {'code': 'c0de', 'files': {}, 'config': {}, 'start': '', 'data': '0'}
    made = by_key(
        *(
            result(net, s, center=e + s, ten=e)
            for s in (0, 1)
            for net, e in (('11pct', 11.0), ('11pct_plain', 13.0))
        )
    )
    return {key: {**row, 'fingerprint': fingerprint} for key, row in made.items()}


def test_earlier_results_stand_apart(page, tmp_path):
    """They have a table at the end and none among the others, whose rows must belong together."""
    rows = pair()
    old = {
        key: {name: row[name] for name in row if name != 'fingerprint'} for key, row in rows.items()
    }
    lab.write(tmp_path / 'results/earlier/cifar_lrn-small.json', old)
    sections = page()
    apart = sections.pop(provenance.EARLIER)
    assert [*sections][-1] == report.load('fig4_retrieval').TITLE
    assert cifar_lrn.report(old) in apart and 'commit abc1234.' in apart
    assert '(figures/earlier/cifar_lrn-small.png)' in apart
    new = sections[cifar_lrn.TITLE]
    assert '**Not run** with this version of the code' in new and '| 11pct |' not in new
    lab.write(tmp_path / 'results/cifar_lrn-small.json', old)
    with pytest.raises(UserError, match='has rows without a fingerprint'):
        report.main()
    changed = {**rows['11pct-1'], 'fingerprint': {**rows['11pct-1']['fingerprint'], 'code': 'beef'}}
    lab.write(tmp_path / 'results/cifar_lrn-small.json', {**rows, '11pct-1': changed})
    with pytest.raises(UserError, match='one table: their training code differs'):
        report.main()


def test_commands_of_several_arguments():
    other = {**result('a', 4), 'given': []}
    module = SimpleNamespace(__name__='experiments.x')
    assert report.commands(module, 'full', by_key(result('a', 1), other)) == [
        'python -m experiments.x --scale=full --seeds=5',
        "python -m experiments.x --scale=full --seeds=2 -- '--config.data.source=/pictures of cats'",
    ]


def test_commands_name_the_runs_that_are_there():
    """Runs are named if all seeds exist, with the seed if some do; if all runs exist, none is named."""

    def run(lab):
        for seed in range(lab.seeds):
            lab.run('a b', seed, 'configs/paper.py')
            lab.run('c', seed, 'configs/paper.py')

    module = SimpleNamespace(__name__='experiments.x', run=run, INDEPENDENT=True)
    all_of_a = [result('a b', 0), result('a b', 1)]

    def options(*results):
        (line,) = report.commands(module, 'full', by_key(*results))
        return line.partition(' -- ')[0].removeprefix('python -m experiments.x --scale=full ')

    assert options(*all_of_a) == "--seeds=2 '--only=a b'"
    assert options(*all_of_a, result('c', 1)) == "--seeds=2 '--only=a b' --only=c-1"
    assert options(*all_of_a, result('c', 1), result('c', 0)) == '--seeds=2'
