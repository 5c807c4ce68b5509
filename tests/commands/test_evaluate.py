"""The confusion matrix counts every image once, and agrees with the errors."""

import csv
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import evaluate
from alexnet_jax.training import evaluation, inference, metrics
from tests.helpers.run_dirs import CLASSES, TEST, call, refuses, write_run

NAMES = [f'class {k}' for k in range(CLASSES)]


def test_a_class_without_images_has_no_error():
    sums = {'class_count': np.array([2.0, 0.0]), 'class_top1': np.array([1.0, 0.0])}
    *_, head, bee, cat = evaluation.class_table({('net', 'ten'): sums}, ['bee', 'cat']).splitlines()
    assert len(head) == len(bee) == len(cat)
    assert bee.split()[1:] == ['50.0%', '2'] and cat.split()[1:] == ['–', '0']


@pytest.mark.parametrize('classes', [5, 6])
def test_the_top_5_error_of_at_most_five_classes_is_left_out(classes):
    each = np.full(classes, 2.0)
    sums = {'count': 2.0 * classes, 'loss': 1.0, 'top1': classes, 'top5': classes}
    table = evaluation.table({('net', 'ten'): sums | {'class_count': each, 'class_top1': each / 2}})
    assert ('Top-5' in table) == (classes > 5) and table.count('50.00%') == 2 + (classes > 5)
    _, head, row = table.splitlines()
    assert len(head) == len(row)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


def rows(file):
    return [*csv.reader(file.read_text().splitlines())]


def expected(run, split, views='ten'):
    labels = np.arange(len(run.pictures[split])) % CLASSES
    guesses = inference.load(run.path, views)(run.pictures[split]).argmax(1)
    matrix = np.zeros((CLASSES, CLASSES), int)
    np.add.at(matrix, (labels, guesses), 1)
    return matrix


@pytest.mark.parametrize(('split', 'prefix'), [('train', 'train_'), ('val', ''), ('test', 'test_')])
def test_confusion(run, tmp_path, monkeypatch, capsys, split, prefix):
    """On eight devices, in batches of 8; by default, written to the run directory."""
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, evaluate, run.path, '--confusion', f'--split={split}', '--batch=8')
    said = capsys.readouterr().out.splitlines()
    matrix = expected(run, split)
    head, *found = rows(run.path / f'{prefix}confusion.csv')
    assert head == ['true \\ predicted', *NAMES] and [row[0] for row in found] == NAMES
    np.testing.assert_array_equal([[int(x) for x in row[1:]] for row in found], matrix)
    assert matrix.sum() == len(run.pictures[split]) and (matrix != np.diag(np.diag(matrix))).any()
    head, *found = rows(run.path / f'{prefix}per_class.csv')
    assert head[:2] == ['class', 'images'] and head[3].endswith(', ten')
    for k, (name, count, _, error) in enumerate(found):
        assert (name, int(count)) == (NAMES[k], matrix[k].sum())
        assert (
            error == f'{100 - 100 * matrix[k, k] / matrix[k].sum():.4g}'
            if int(count)
            else '' == error
        )
    files = [
        f'wrote {run.path}/{prefix}{n}' for n in ('per_class.csv', 'confusion.csv', 'confusion.png')
    ]
    assert said[-3:] == files
    first = next(i for i, line in enumerate(said) if line.startswith('most often confused by')) + 1
    off = matrix - np.diag(np.diag(matrix))
    shown = [int(line.split(': ')[1].split(' ')[0]) for line in said[first:-3]]
    assert shown == sorted(off[off > 0].tolist(), reverse=True)[:5]
    with Image.open(run.path / f'{prefix}confusion.png') as picture:
        assert picture.size[0] > 6 * 40
    assert not [*tmp_path.iterdir()]


def test_another_folder_and_an_ensemble(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.path, tmp_path / 'twin')
    (tmp_path / 'out').mkdir()
    options = ['--confusion', '--output=out', '--views=center', '--batch=8']
    call(monkeypatch, evaluate, run.path, 'twin', *options)
    said = capsys.readouterr().out
    assert said.endswith('wrote out/confusion.png\n')
    assert 'most often confused by 2 CNNs, center:' in said
    found = [[int(x) for x in row[1:]] for row in rows(tmp_path / 'out/confusion.csv')[1:]]
    np.testing.assert_array_equal(found, expected(run, 'val', 'center'))
    assert len(rows(tmp_path / 'out/per_class.csv')[0]) == 2 + 3


def test_the_test_split_is_evaluated(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, evaluate, run.path, '--split=test', '--views=center', '--batch=8')
    said = capsys.readouterr().out.splitlines()
    matrix = expected(run, 'test', 'center')
    wrong = 100 * (TEST - np.trace(matrix)) / TEST
    assert f'{wrong:.2f}%' in said[2] and said[2].split()[-1] == str(TEST)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['RUN', '--output=.'], '--output is the folder for --confusion: give both'),
        (['RUN', 'RUN', '--confusion'], '--confusion of several runs needs .*--output=DIR'),
        (
            ['RUN', '--confusion', '--output=gone'],
            '--output=gone/confusion.csv: gone is not a writ',
        ),
        (['gone', '--confusion'], 'gone: not a run directory'),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    refuses(monkeypatch, tmp_path, evaluate, run.path, arguments, message)


def test_a_store_without_a_test_split(tmp_path, monkeypatch):
    from tests.helpers import run_dirs

    monkeypatch.setattr(run_dirs, 'TEST', 0)
    real = run_dirs.write_store

    def without(*args, counts, **options):
        return real(*args, counts={s: n for s, n in counts.items() if n}, **options)

    monkeypatch.setattr(run_dirs, 'write_store', without)
    made = write_run(tmp_path / 'made')
    (tmp_path / 'here').mkdir()
    message = (
        "made/store has no split 'test', only train, val; a store has one if its source has labeled"
    )
    arguments = ['RUN', '--split=test', '--batch=8']
    refuses(monkeypatch, tmp_path / 'here', evaluate, made.path, arguments, message)


def test_a_guess_is_right_where_the_rank_is_0():
    """Also with ties and NaN, which are errors."""
    scores = np.random.default_rng(0).integers(0, 3, (200, 4)).astype(np.float32)
    scores[:20, 2] = np.nan
    scores[20:25] = np.nan
    labels = np.arange(200, dtype=np.int32) % 4
    guesses = np.asarray(metrics.guess(jnp.asarray(scores), labels))
    right = np.asarray(metrics.rank(jnp.asarray(scores), labels)) < 1
    np.testing.assert_array_equal(guesses == labels, right)
    clear = ~np.isnan(scores).any(1) & ~right
    chosen = np.take_along_axis(scores, guesses[:, None], 1)[:, 0]
    np.testing.assert_array_equal(chosen[clear], scores[clear].max(1))
    assert guesses.dtype == np.int32 and right.any() and not right.all()


@pytest.mark.parametrize('classes', [2, 10, 40, 300])
def test_the_figure(classes):
    """Cells of whole pixels in the color of their share; names and numbers where there is room."""
    matrix = np.random.default_rng(0).integers(0, 9, (classes, classes)) + np.eye(
        classes, dtype=int
    )
    matrix[1] = 0  # a class without images
    names = [*(f'name {k}' for k in range(classes - 1)), '$_{e$' + 'W' * 40]
    drawn = evaluate.figure(matrix, names)
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    (image,) = axes.images
    share = image.get_array()
    np.testing.assert_allclose(share.sum(1), [0.0 if k == 1 else 100.0 for k in range(classes)])
    side = axes.get_window_extent().width
    assert side / classes == pytest.approx(round(side / classes)) and side >= classes > 1
    shown = [text.get_text() for text in axes.get_yticklabels()]
    if classes <= evaluate.NAMED:
        assert shown[0] == 'name 0' and shown[-1] == '$_{e$' + 'W' * 20 + '…'
    assert len(axes.texts) == (np.count_nonzero(matrix) if classes <= evaluate.NUMBERED else 0)
    names = [*axes.get_xticklabels(), *axes.get_yticklabels()] if classes <= evaluate.NAMED else []
    for text in [*names, axes.xaxis.label, axes.yaxis.label]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
