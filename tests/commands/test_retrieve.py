"""Neighbors by the last hidden layer, compared with plain NumPy over all features at once."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import figures, retrieve
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import network
from alexnet_jax.training import inference, steps
from tests.helpers.run_dirs import CLASSES, CROP, TRAIN, VAL, call, refuses, write_run


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def fc7(run):
    """The activations of both splits, f32[N,F], on one device, without the library's steps."""
    forward = jax.jit(lambda x: run.net.apply({'params': run.params}, x)[1]['fc7'])
    return {
        split: np.concatenate(forward((pictures - run.mean[None])[:, 4:68, 4:68]), axis=1)
        for split, pictures in run.pictures.items()
    }


def brute_force(queries, rows, k):
    """-> (the k nearest rows of each query, their distances)."""
    difference = queries[:, None].astype(np.float64) - rows[None]
    distances = np.sqrt((difference**2).sum(-1))
    order = distances.argsort(axis=1, kind='stable')[:, :k]
    return order, np.take_along_axis(distances, order, 1)


def test_nearest_in_batches():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (50, 4)).astype(np.float32)  # many distances are exactly equal
    queries = rng.integers(0, 3, (20, 4)).astype(np.float32)
    batches = [rows[:3], rows[3:30], rows[30:]]
    found, distances = retrieve.nearest(queries, iter(batches), 7)
    expected, expected_distances = brute_force(queries, rows, 7)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-12)


def test_the_command(run, fc7, tmp_path, monkeypatch, capsys):
    """On eight devices, each tower on its own: labels, fractions and pixels match NumPy."""
    output = tmp_path / 'n.png'
    options = ['--queries=4', '--neighbors=3', '--batch=8', '--score', '--seed=1']
    call(monkeypatch, retrieve, run.path, *options, f'--output={output}')
    lines = capsys.readouterr().out.splitlines()
    found, distances = brute_force(fc7['val'], fc7['train'], 3)
    assert fc7['train'].shape == (TRAIN, 256) and np.ptp(distances) > 0
    queries = [int(re.match(r'validation image (\d+) ', line)[1]) for line in lines[:4]]
    assert queries == figures.sample(np.arange(VAL) % CLASSES, 4, seed=1).tolist()
    same = 0
    picture = np.asarray(Image.open(output))
    assert picture.shape == (4 * 172 + 4, 4 * 148 + 4 + 16, 3)  # images are enlarged to 144
    captions = {}
    for i, (line, query) in enumerate(zip(lines, queries, strict=False)):
        nearest = zip(found[query], distances[query], strict=True)
        pairs = [f'class {r % CLASSES} {d:.4g}' for r, d in nearest]
        assert line == f'validation image {query} (class {query % CLASSES}): {", ".join(pairs)}'
        same += sum(r % CLASSES == query % CLASSES for r in found[query])
        y = 4 + 172 * i
        for j, record in enumerate([query, *found[query]]):
            x = 4 + 148 * j + 16 * (j > 0)
            original = run.pictures['train' if j else 'val'][record]
            drawn = picture[y : y + 144, x : x + 144]
            np.testing.assert_array_equal(drawn, original.repeat(2, 0).repeat(2, 1))
            caption = picture[y + 144 : y + 168, x : x + 144].tobytes()
            assert captions.setdefault(record % CLASSES, caption) == caption
    assert len({*captions.values()}) == len(captions) > 2  # each class has its own
    words = 'neighbors share the class of their query'
    assert lines[4] == f'{same} of 12 {words}: {100 * same / 12:.1f}%'
    same = (found % CLASSES == np.arange(VAL)[:, None] % CLASSES).sum()
    assert lines[5] == (f'the whole validation split: {same} of 36 {words}: {100 * same / 36:.1f}%')
    assert lines[6:] == [f'wrote {output}']


def test_pictures_from_files(run, tmp_path, monkeypatch, capsys):
    """A training image finds itself; its class is known only from a folder named after a class."""
    monkeypatch.chdir(tmp_path)
    for name, record in (('class 1/a.bin', 13), ('other/b.bin', 8)):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(run.pictures['train'][record]).save(tmp_path / name, 'PNG')
    call(
        monkeypatch,
        retrieve,
        run.path,
        'class 1/a.bin',
        'other/b.bin',
        '--neighbors=1',
        '--batch=8',
    )
    first, second, share, _ = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r'(.*): (class \d) (.*)', line).groups() for line in (first, second)]
    assert found[0][:2] == ('class 1/a.bin (class 1)', 'class 1')
    assert found[1][:2] == ('other/b.bin', 'class 2')
    assert max(float(distance) for *_, distance in found) < 1e-4
    assert share == '1 of 1 neighbors share the class of their query: 100.0%'
    pictures, names = run.pictures['train'][[13, 8]], [['class 1'] * 2, ['b.bin', 'class 2']]
    drawn = retrieve.draw(pictures, pictures[:, None], names)
    drawn_there = np.asarray(Image.open(run.path / 'neighbors.png'))
    (run.path / 'neighbors.png').unlink()
    np.testing.assert_array_equal(drawn_there, drawn)


def test_names_stay_below_their_pictures():
    """Wide names are cut, line breaks become spaces, and an empty name leaves no ink."""

    def below(*names):
        black = np.zeros((1, 3, 32, 32, 3), np.uint8)
        return retrieve.draw(black[0, :1], black, [names])[4 + 128 : -4]

    strip = below('W' * 40, '', 'two\nlines', 'three')
    ink = (strip < 255).any((0, 2))
    assert [ink[x : x + 128].any() for x in (4, 152, 284, 416)] == [True, False, True, True]
    assert (
        not (strip[[0, -1]] < 255).any()
        and not ink[[*range(4), *range(132, 152), *range(412, 416)]].any()
    )
    # nearly as wide as the image
    assert (np.flatnonzero(ink[4:132])[[0, -1]] // 10).tolist() == [0, 12]
    np.testing.assert_array_equal(strip, below('W' * 50, '', 'two lines', 'three'))
    assert (strip != below('W' * 5, '', 'two lines', 'three')).any()


class Maps(network.Network):
    """A network whose last activation is a map of two towers."""

    towers, names = 2, ['late', 'a', 'Dense_0']

    @nn.compact
    def __call__(self, images, train=None):
        x = nn.Dense(2)(images)
        return x.sum((1, 2)), {'late': (x,), 'a': (x[:, ::2], 2 * x[:, 1::2])}


def test_features_of_a_network_without_hidden_layers():
    net, mesh = Maps(), meshes.make((1, 1), towers=1, batches={})
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    mean = rng.uniform(0, 255, (8, 8, 3)).astype(np.float32)
    variables = network.init(net, jax.random.key(0), 6)
    found = steps.make_features(net, mesh, mean=mean, crop=6)(variables, images)
    _, out = net.apply(variables, (images - mean[None])[:, 1:7, 1:7])
    expected = np.concatenate(out['a'], axis=-1)
    assert found.shape == (3, 3, 6, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_features_that_are_not_finite(run, monkeypatch):
    monkeypatch.setattr(
        steps, 'make_features', lambda *_, **__: lambda variables, x: x[:, 0, 0] / 0.0
    )
    trained = type(
        'Run',
        (),
        {
            'title': 'run (step 3)',
            'net': None,
            'variables': None,
            'facts': run,
            'config': {'augment': {'crop': CROP}},
        },
    )
    batches = inference.padded(run.pictures['val'][:3], 2)
    mesh = meshes.make((1, 1), towers=1, batches={})
    with pytest.raises(UserError, match=r'run \(step 3\): activations are not finite'):
        retrieve.make_features(trained, mesh)(next(batches))


def test_padded():
    images = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    batches = [*inference.padded(images, 3)]
    assert [b['mask'].tolist() for b in batches] == [[1, 1, 1], [1, 1, 0]]
    np.testing.assert_array_equal(np.concatenate([b['image'] for b in batches])[:5], images)


def test_choose():
    """One of each class before a second of any; another seed chooses different ones."""
    labels = np.array([0] * 20 + [1] * 2 + [2] * 5)
    for seed in range(5):
        records = figures.sample(labels, 8, seed)
        assert len({*records.tolist()}) == 8
        assert sorted(labels[records[:3]]) == sorted(labels[records[3:6]]) == [0, 1, 2]
        assert sorted(labels[records[6:]]) == [0, 2]
        np.testing.assert_array_equal(records[:4], figures.sample(labels, 4, seed))
    assert figures.sample(labels, 8, 0).tolist() != figures.sample(labels, 8, 1).tolist()


def test_the_folder_of_a_class():
    """A file's folder, else the one above it, but neither the file nor folders further up."""
    names = ['cat', 'dog', 'images']
    found = {
        path: figures.label_of(path, names)
        for path in (
            '/cat/dog/a.jpg',
            '/cat/1/a.jpg',
            '/dog/images/a.jpg',
            '/cat/1/2/a.jpg',
            '/1/2/cat',
            '/dog',
        )
    }
    assert [*found.values()] == [1, 0, 2, None, None, None]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere: not a run directory'),
        (['RUN', '--step=7'], 'no checkpoint of step 7'),
        (['RUN', '--neighbors=31'], '--neighbors=31: the training split of .* has 30 images'),
        (['RUN', '--neighbors=0'], '--neighbors=0'),
        (['RUN', '--neighbors=21'], '21 images are too many for one figure; give at most 20'),
        (['RUN', '--queries=13'], '--queries=13: the validation split of .* has 12 images'),
        (['RUN', '--queries=0'], '--queries=0'),
        (['RUN', '--queries=2', 'a.jpg'], '--queries picks validation images'),
        (['RUN', '--batch=0'], '--batch=0: must be at least 1'),
        (['RUN', '--threads=-1'], '--threads=-1'),
        (['RUN', '--seed=-1'], '--seed'),
        (['RUN', 'nowhere.jpg'], 'nowhere.jpg: cannot be read: No such file'),
        (
            ['RUN', 'text.jpg'],
            'text.jpg: cannot be decoded .not an image that Pillow can read.; repair',
        ),
        (['RUN', *['text.jpg'] * 21], '21 images are too many'),
        (['RUN', '--output=nowhere/n.png'], 'nowhere is not a writable folder'),
        (['nowhere', '--output='], '--output=: images are written as PNG'),  # checked first
    ],
)
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / 'text.jpg').write_text('no picture')
    monkeypatch.setattr(figures, 'DRAWN', 20)
    refuses(monkeypatch, tmp_path, retrieve, run.path, arguments, message)
