"""The command prints what the loaded network computes, in the right order."""

import csv
import functools
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import figures, predict
from alexnet_jax.common import errors
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices.cpu import cores
from alexnet_jax.input.store import open_store
from alexnet_jax.training import inference
from tests.helpers.run_dirs import CLASSES, TEST, call, refuses, write_run

NAMES = list('abcdefg')
load = functools.cache(inference.load)  # commands and tests share one compiled program


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


@pytest.fixture
def prediction():
    probabilities = np.array([0.05, 0.4, 0.0, 0.05, 0.2, 0.3, 0.0], np.float32)
    return predict.Prediction('x/y.png', 4, np.zeros((8, 8, 3), np.uint8), probabilities)


def test_describe(prediction):
    """Most probable first, ties in label order; the correct class is marked."""
    expected = ['   40.0%  b', '   30.0%  f', '   20.0%  e  <', '    5.0%  a', '    5.0%  d']
    lines = predict.describe(prediction, NAMES).splitlines()
    assert lines == ['x/y.png (correct: e)', *expected]
    lines = predict.describe(prediction._replace(label=None), NAMES).splitlines()
    assert lines == ['x/y.png', *(line.removesuffix('  <') for line in expected)]
    assert predict.describe(prediction, NAMES, 2).splitlines() == [
        'x/y.png (correct: e)',
        *expected[:2],
    ]
    assert predict.describe(prediction, NAMES, 1) == 'x/y.png (correct: e):   40.0%  b'


def test_figure(prediction):
    """Bars from the top, as long as the probabilities; only the correct one is hatched and colored."""
    names = [*NAMES[:4], '$_{e$', *NAMES[5:]]  # matplotlib could mistake it for a formula
    unknown = prediction._replace(label=None, title='folder/$_{y$.png')
    drawn = predict.figure([prediction, unknown], names)
    drawn.draw_without_rendering()
    above = drawn.axes[:2]
    assert [axes.images[0].get_array().shape for axes in above] == [(8, 8, 3)] * 2
    for axes, correct, title in zip(drawn.axes[2:], (2, None), ('$_{e$', '$_{y$.png'), strict=True):
        assert axes.get_title() == title
        bars = sorted(axes.patches, key=lambda bar: -axes.transData.transform((0, bar.get_y()))[1])
        assert [bar.get_width() for bar in bars] == pytest.approx([0.4, 0.3, 0.2, 0.05, 0.05])
        hatched = [i for i, bar in enumerate(bars) if bar.get_hatch()]
        assert hatched == ([] if correct is None else [correct])
        assert len({bar.get_facecolor() for bar in bars}) == 1 + len(hatched)
        words = [t.get_text() for t in sorted(axes.texts, key=lambda t: t.get_position()[::-1])]
        assert words == ['b', '40%', 'f', '30%', '$_{e$', '20%', 'a', '5%', 'd', '5%']


def parse(said):
    """The output of a command -> {title: [(percent, name and mark)]}."""
    found, title = {}, None
    for line in said.splitlines():
        if line.startswith('  '):
            percent, _, name = line.partition('%  ')
            found[title].append((float(percent), name))
        elif not line.startswith('wrote '):
            title = line
            found[title] = []
    return found


def test_files(run, tmp_path, monkeypatch, capsys):
    """Files are read by content; the name of the folder gives the class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    (tmp_path / 'class 2').mkdir()
    rng = np.random.default_rng(0)
    paths = ['class 2/a.jpg', 'b.txt']
    pictures = [rng.integers(0, 256, (90, 120, 3), np.uint8), np.zeros((50, 40, 3), np.uint8)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path, 'PNG')
    call(monkeypatch, predict, run.path, *paths, '--output=p.png')
    said = capsys.readouterr().out
    assert said.endswith('wrote p.png\n')
    with Image.open('p.png') as drawn:
        assert drawn.size == (624, 504)
    probabilities = load(run.path, 'ten', 'latest')(pictures)
    found = parse(said)
    assert [*found] == ['class 2/a.jpg (correct: class 2)', 'b.txt']
    for lines, p, label in zip(found.values(), probabilities, (2, None), strict=True):
        top = sorted(range(CLASSES), key=lambda k: -p[k])[:5]
        assert [name for _, name in lines] == [f'class {k}' + '  <' * (k == label) for k in top]
        np.testing.assert_allclose([percent for percent, _ in lines], 100 * p[top], atol=0.051)
        assert np.ptp(p) > 0.01


@pytest.mark.parametrize('turned', [True, False, None])
def test_a_phone_photo_is_turned_as_the_run_was_trained(run, tmp_path, monkeypatch, capsys, turned):
    """Also, a name is printed without its escape codes."""
    shutil.copytree(run.path, tmp_path / 'run')
    told = json.loads((tmp_path / 'run' / 'store.json').read_text())
    told |= {} if turned is None else {'exif': turned}
    (tmp_path / 'run' / 'store.json').write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    upright = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
    stored, exif = np.rot90(upright), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(stored)).save('\x1b[2J.png', exif=exif)
    call(monkeypatch, predict, 'run', '\x1b[2J.png', '--output=p.png')
    found = parse(capsys.readouterr().out)
    (p,) = load(run.path, 'ten', 'latest')([upright if turned else np.ascontiguousarray(stored)])
    assert [*found] == [r'\x1b[2J.png']
    np.testing.assert_allclose(
        [percent for percent, _ in found[r'\x1b[2J.png']], 100 * np.sort(p)[:0:-1], atol=0.051
    )


def test_validation_pictures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    monkeypatch.setattr(predict, 'BATCH', 2)  # to need two batches
    call(monkeypatch, predict, run.path, '--val=4', '--views=center')
    found = parse(capsys.readouterr().out)
    records = [int(title.split()[2]) for title in found]
    assert len({*records}) == 4 and not [*tmp_path.iterdir()]
    classify = load(run.path, 'center', 'latest')
    pictures = run.pictures['val'][records]
    probabilities = np.concatenate([classify(pictures[:2]), classify(pictures[2:])])
    for (title, lines), record, p in zip(found.items(), records, probabilities, strict=True):
        assert title == f'validation image {record} (correct: class {record % CLASSES})'
        np.testing.assert_allclose([x for x, _ in lines], 100 * np.sort(p)[:0:-1], atol=0.051)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere', 'text.jpg'], 'nowhere: not a run directory'),
        (['RUN'], 'give either image files or --val=N'),
        (['RUN', 'text.jpg', '--val=1'], 'give either image files or --val=N'),
        (['RUN', '--val=0'], '--val=0: the validation split of .* has 12 images'),
        (['RUN', '--val=13'], '--val=13: the validation split of .* has 12 images'),
        (['RUN', '--val=1', '--step=7'], 'no checkpoint of step 7'),
        (['RUN', 'nowhere.jpg'], 'nowhere.jpg: cannot be read: No such file'),
        (['RUN', '.'], './text.jpg: cannot be decoded'),
        (['RUN', 'empty'], 'empty: no images in this folder'),
        (['RUN', '--list=nowhere'], '--list=nowhere: cannot be read: No such file'),
        (['RUN', '--list=empty'], '--list=empty: cannot be read: Is a directory'),
        (['RUN', '--list=blank'], '--list=blank: is empty'),
        (['RUN', '--test=1', '--val=1'], 'give either image files or --val=N'),
        (['RUN', '--test=6'], '--test=6: the test split of .* has 5 images'),
        (['RUN', 'text.jpg', '--csv=-', '--json=-'], 'cannot share standard output'),
        (['RUN', 'text.jpg', '--csv=nowhere/t.csv'], '--csv=nowhere/t.csv: nowhere is not a wri'),
        (['RUN', 'text.jpg', '--json=empty'], '--json=empty: this is a folder'),
        (
            ['RUN', 'text.jpg'],
            'text.jpg: cannot be decoded .not an image that Pillow can read.; repair',
        ),
        (['RUN', '--val=1', '--output=nowhere/p.png'], 'nowhere is not a writable folder'),
        (['RUN', '--val=1', '--views=two'], 'invalid choice'),
        (['RUN', '--val=1', '--top=0'], '--top=0: must be at least 1'),
        # checked first
        (['nowhere', 'text.jpg', '--output='], '--output=: images are written as PNG'),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'text.jpg').write_text('no picture')
    (tmp_path / 'blank').write_text('\n\n')
    (tmp_path / 'empty').mkdir()
    if '.' in arguments:
        (tmp_path / 'blank').unlink()
    refuses(monkeypatch, tmp_path, predict, run.path, arguments, message)


def photos(folder, run, *names):
    """Writes training images 1, 2, ... as PNGs of these names."""
    for record, name in enumerate(names, start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(run.pictures['train'][record]).save(folder / name, 'PNG')


def test_folders_and_lists(run, tmp_path, monkeypatch, capsys):
    """Recursively, in order; files that are not images are skipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    photos(tmp_path, run, 'in/a/x.png', 'in/b.jpg', 'other.png')
    (tmp_path / 'in/notes.txt').write_text('not an image')
    (tmp_path / 'list').write_bytes(b'\xef\xbb\xbfother.png\r\n\nin/a\n')
    for arguments, expected in (
        (['in', 'other.png'], ['in/a/x.png', 'in/b.jpg', 'other.png']),
        (['.'], ['./in/a/x.png', './in/b.jpg', './other.png']),
        (['in/b.jpg', '--list=list'], ['in/b.jpg', 'other.png', 'in/a/x.png']),
    ):
        if arguments == ['.']:
            (tmp_path / 'list').rename(tmp_path / 'list.txt')
        call(monkeypatch, predict, run.path, '--views=center', *arguments)
        assert [*parse(capsys.readouterr().out)] == expected
        if arguments == ['.']:
            (tmp_path / 'list.txt').rename(tmp_path / 'list')
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'in/b.jpg\n')))
    call(monkeypatch, predict, run.path, '--views=center', '--list=-')
    assert [*parse(capsys.readouterr().out)] == ['in/b.jpg']


def test_tables(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    monkeypatch.setattr(predict, 'BATCH', 2)
    names = ['class 2/a "b", c.png', os.fsdecode(b'\xff.png'), 'c.png']
    photos(tmp_path, run, *names)
    options = ['--views=center', '--csv=t.csv', '--json=t.json']
    call(monkeypatch, predict, run.path, *names, *options)
    assert capsys.readouterr().out == 'wrote t.csv\nwrote t.json\n'
    p = load(run.path, 'center', 'latest')(run.pictures['train'][1:4])
    with open('t.csv', encoding='utf-8', errors='surrogateescape', newline='') as file:
        head, *rows = csv.reader(file)
    assert head == [
        'path',
        'correct',
        *(f'{w}{i}' for i in range(1, 6) for w in ('class', 'probability')),
    ]
    told = json.loads((tmp_path / 't.json').read_text())
    assert len(rows) == len(told) == 3
    for name, row, one, each, correct in zip(
        names, rows, told, p, ('class 2', '', ''), strict=True
    ):
        top = np.argsort(-each, kind='stable')[:5]
        assert row[:2] == [name, correct] and row[2::2] == [f'class {k}' for k in top]
        np.testing.assert_allclose([float(x) for x in row[3::2]], each[top], rtol=1e-4)
        assert (one['path'], one['correct']) == (name, correct or None)
        assert [x['class'] for x in one['top']] == row[2::2]
        assert [x['probability'] for x in one['top']] == [float(x) for x in row[3::2]]
    options = ['--views=center', '--json=-', '--csv=again.csv', '--top=2']
    call(monkeypatch, predict, run.path, 'c.png', *options)
    (one,) = json.loads(capsys.readouterr().out)
    assert one['top'] == told[2]['top'][:2]
    assert (tmp_path / 'again.csv').read_text().count(',') == 2 * 5


@pytest.mark.parametrize('bad', [['text.jpg', 'gone.png'], ['text.jpg']])
def test_one_bad_file_does_not_stop_the_others(run, tmp_path, monkeypatch, capsys, bad):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    monkeypatch.setattr(predict, 'BATCH', 2)
    (tmp_path / 'text.jpg').write_text('no picture')
    photos(tmp_path, run, '1.png', '2.png', '3.png')
    images = [bad[0], '1.png', '2.png', *bad[1:], '3.png']
    with pytest.raises(UserError) as error:
        call(
            monkeypatch,
            predict,
            run.path,
            *images,
            '--views=center',
            '--csv=t.csv',
            '--output=p.png',
        )
    count = len(bad)
    assert str(error.value) == (
        f'{count} of {3 + count} images could not be read; they are listed above'
    )
    assert errors.end(error.value)[1] == 2
    said = capsys.readouterr()
    assert said.out == 'wrote t.csv\nwrote p.png\n'
    lines = ['error: text.jpg: cannot be decoded', 'error: gone.png: cannot be read: No such file']
    for line, expected in zip(said.err.splitlines(), lines[:count], strict=True):
        assert line.startswith(expected)
    rows = [*csv.reader((tmp_path / 't.csv').read_text().splitlines())][1:]
    assert [row[0] for row in rows] == ['1.png', '2.png', '3.png']
    (tmp_path / 't.csv').write_text('an earlier result')
    with pytest.raises(UserError, match='2 of 2 images could not be read'):
        call(
            monkeypatch, predict, run.path, 'text.jpg', 'gone.png', '--views=center', '--csv=t.csv'
        )
    assert (tmp_path / 't.csv').read_text() == 'an earlier result'


def test_many_files_are_never_in_memory_at_once(run, tmp_path, monkeypatch, capsys):
    """Reading keeps only a little ahead of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    monkeypatch.setattr(predict, 'BATCH', 4)
    photos(tmp_path, run, 'a.png')
    begun, done, ahead = [], [], []
    real = figures.Pictures.batches

    def batches(self, size):
        read = self._read
        self._read = lambda i: (begun.append(i), read(i))[1]
        for numbers, squares in real(self, size):
            ahead.append(len(begun) - len(done))
            yield numbers, squares
            done.extend(numbers)

    monkeypatch.setattr(figures.Pictures, 'batches', batches)
    call(monkeypatch, predict, run.path, *['a.png'] * 200, '--views=center', '--csv=-')
    assert len(capsys.readouterr().out.splitlines()) == 201
    assert len(done) == 200 and max(ahead) <= 2 * 4 + 2 * cores() + 1


def test_the_test_split(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, 'load', load)
    call(monkeypatch, predict, run.path, f'--test={TEST}', '--views=center')
    found = parse(capsys.readouterr().out)
    p = load(run.path, 'center', 'latest')(run.pictures['test'])
    for record in range(TEST):
        lines = found[f'test image {record} (correct: class {record % CLASSES})']
        np.testing.assert_allclose(
            [x for x, _ in lines], 100 * np.sort(p[record])[:0:-1], atol=0.051
        )
    store = open_store(run.store)
    with open(store.splits['test'].file, 'r+b') as file:
        before = file.read(4)
        file.seek(0)
        file.write(bytes(x ^ 1 for x in before))
    try:
        with pytest.raises(UserError, match='1 of 5 images could not be read'):
            call(monkeypatch, predict, run.path, f'--test={TEST}', '--views=center', '--csv=-')
    finally:
        with open(store.splits['test'].file, 'r+b') as file:
            file.write(before)
    said = capsys.readouterr()
    assert "record 0 of split 'test'" in said.err and len(said.out.splitlines()) == TEST
