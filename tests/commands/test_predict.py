"""The command prints what the loaded network computes, in the right order."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import predict
from alexnet_jax.common.errors import UserError
from alexnet_jax.training import inference
from tests.helpers.run_dirs import CLASSES, call, refuses, write_run

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
    expected = ['   40.0 %  b', '   30.0 %  f', '   20.0 %  e  <', '    5.0 %  a', '    5.0 %  d']
    lines = predict.describe(prediction, NAMES).splitlines()
    assert lines == ['x/y.png (correct: e)', *expected]
    lines = predict.describe(prediction._replace(label=None), NAMES).splitlines()
    assert lines == ['x/y.png', *(line.removesuffix('  <') for line in expected)]


def test_figure(prediction):
    """Bars from the top, as long as the probabilities; only the correct one is hatched and coloured."""
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
        assert words == ['b', '40 %', 'f', '30 %', '$_{e$', '20 %', 'a', '5 %', 'd', '5 %']


def parse(said):
    """The output of a command -> {title: [(percent, name and mark)]}."""
    found, title = {}, None
    for line in said.splitlines():
        if line.startswith('  '):
            percent, _, name = line.partition(' %  ')
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
    """And a name is printed without its escape codes."""
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
    call(monkeypatch, predict, run.path, '--val=4', '--views=centre')
    found = parse(capsys.readouterr().out)
    records = [int(title.split()[2]) for title in found]
    assert len({*records}) == 4 and not [*tmp_path.iterdir()]
    classify = load(run.path, 'centre', 'latest')
    pictures = run.pictures['val'][records]
    probabilities = np.concatenate([classify(pictures[:2]), classify(pictures[2:])])
    for (title, lines), record, p in zip(found.items(), records, probabilities, strict=True):
        assert title == f'validation picture {record} (correct: class {record % CLASSES})'
        np.testing.assert_allclose([x for x, _ in lines], 100 * np.sort(p)[:0:-1], atol=0.051)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere', 'text.jpg'], 'nowhere: not a run directory'),
        (['RUN'], 'give either picture files or --val=N'),
        (['RUN', 'text.jpg', '--val=1'], 'give either picture files or --val=N'),
        (['RUN', '--val=0'], '--val=0: the validation split of .* has 12 pictures'),
        (['RUN', '--val=13'], '--val=13: the validation split of .* has 12 pictures'),
        (['RUN', '--val=1', '--step=7'], 'no checkpoint of step 7'),
        (['RUN', 'nowhere.jpg'], 'nowhere.jpg: cannot be read: No such file'),
        (['RUN', '.'], '.: cannot be read: Is a directory'),
        (
            ['RUN', 'text.jpg'],
            'text.jpg: cannot be decoded .not an image that Pillow can read.; repair',
        ),
        (['RUN', '--val=1', '--output=nowhere/p.png'], 'nowhere is not a writable folder'),
        (['RUN', '--val=1', '--views=two'], 'invalid choice'),
        # checked first
        (['nowhere', 'text.jpg', '--output='], '--output=: pictures are written as PNG'),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'text.jpg').write_text('no picture')
    refuses(monkeypatch, tmp_path, predict, run.path, arguments, message)


@pytest.mark.parametrize(
    'pictures',
    [
        [],
        ['picture.jpg'],
        np.zeros((64, 64, 3), np.uint8),  # not in a list
        [np.zeros((64, 64), np.uint8)],
        [np.zeros((64, 64, 3), np.float32)],
        [np.zeros((64, 64, 4), np.uint8)],
    ],
    ids=['none', 'a path', 'no list', 'grey', 'float', 'four channels'],
)
def test_what_a_network_is_not_given(run, pictures):
    with pytest.raises(UserError, match='give a list of pictures'):
        load(run.path)(pictures)
