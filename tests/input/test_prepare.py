"""Preparing a store: geometry, decoding, statistics, resuming after a kill, errors."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare, sources, store, store_writer
from alexnet_jax.input.images import FILTER, decode, square, statistics
from alexnet_jax.input.sources import shapes, tfds
from tests.helpers import ROOT, fixtures

COMMAND = [sys.executable, '-m', 'alexnet_jax.prepare']


@pytest.fixture
def tree(tmp_path):
    fixtures.write_tree(tmp_path / 'tree' / 'train', {'ape': 7, 'bee': 6})
    fixtures.write_tree(tmp_path / 'tree' / 'val', {'ape': 2, 'bee': 3}, seed=1000)
    return str(tmp_path / 'tree')


def files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


# Images


@pytest.mark.parametrize(
    'width, height',
    [(75, 50), (50, 75), (101, 67), (33, 90), (40, 40), (32, 45), (20, 27), (500, 375)],
)
def test_square_is_the_center_of_the_resized_picture(width, height):
    image = fixtures.picture(0, width, height)
    short = min(width, height)
    new = int(width * 32 / short + 0.5), int(height * 32 / short + 0.5)
    assert min(new) == 32
    method = Image.Resampling.BILINEAR if short > 32 else Image.Resampling.BICUBIC
    left, top = (new[0] - 32) // 2, (new[1] - 32) // 2
    expected = np.asarray(image.resize(new, method))[top : top + 32, left : left + 32]
    got = square(np.asarray(image), 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    # Rounding: a resize can do its two passes, rows and columns, in the other order.
    assert np.abs(got.astype(int) - expected).max() <= 2


def test_down_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(square(stripes, 64)[:, 2:-2] - 127.5).max() < 3


def as_16_bit(image):
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    'format, convert, tolerance',
    [
        ('JPEG', lambda image: image, 30),
        ('JPEG', lambda image: image.convert('CMYK'), 12),
        ('JPEG', lambda image: image.convert('L'), 12),
        ('PNG', lambda image: image, 0),
        ('PNG', lambda image: image.convert('RGBA'), 0),
        ('PNG', lambda image: image.convert('LA'), 0),
        ('PNG', lambda image: image.convert('P', palette=Image.Palette.ADAPTIVE), 60),
        ('PNG', lambda image: image.convert('1'), 255),
        ('PNG', as_16_bit, 0),
        ('TIFF', as_16_bit, 0),
        ('BMP', lambda image: image, 0),
    ],
)
def test_decodes_by_content(format, convert, tolerance):
    image = fixtures.picture(3)
    stored = convert(image)
    gray = stored.mode in ('L', 'LA', '1') or stored.mode.startswith('I')
    expected = np.asarray(image.convert('L').convert('RGB') if gray else image).astype(int)
    decoded = decode(fixtures.encode(stored, format))
    assert decoded.mode == 'RGB'
    assert np.abs(np.asarray(decoded) - expected).max() <= tolerance


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_decodes_arrays(channels):
    array = np.random.default_rng(0).integers(0, 256, (9, 8, channels), np.uint8)
    assert (np.asarray(decode(array)) == array[:, :, :3]).all()


# The store


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_store_holds_the_source(tree, tmp_path, format):
    path = tmp_path / 'new' / 'store'
    made = prepare.prepare(tree, store=str(path), format=format, size=24)
    assert (made.size, made.classes, made.names) == (24, 2, ['ape', 'bee'])
    assert made.counts == {'train': 13, 'val': 5}
    store.verify(made)
    source = sources.open_source(tree)
    for split in ('train', 'val'):
        examples = list(source.read(split, 0))
        assert list(made.labels(split)) == [example.label for example in examples]
        squares = [square(example.data, 24) for example in examples]
        if format == 'u8':
            assert (made.pixels(split) == squares).all()
        else:
            for record, pixels in zip(
                made.records(split, range(len(squares))), squares, strict=True
            ):
                image = Image.open(io.BytesIO(record))
                assert (image.format, image.size) == ('JPEG', (24, 24))
                assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 8
    assert json.loads((path / 'store.json').read_text())['filter'] == FILTER
    kinds = {
        f'{split}.{kind}'
        for split in ('train', 'val')
        for kind in (format, 'crc.npy', 'labels.npy')
    }
    kinds |= {'train.offsets.npy', 'val.offsets.npy'} if format == 'jpg' else set()
    assert set(os.listdir(path)) == kinds | {'store.json', 'names.txt', 'stats.npz'}


def test_statistics_are_those_of_the_training_pixels(tree, tmp_path):
    made = prepare.prepare(tree, store=str(tmp_path / 'store'), format='u8', size=24)
    x = np.asarray(made.pixels('train'), np.float64)
    np.testing.assert_allclose(made.mean, x.mean(0), rtol=1e-6)
    covariance = np.cov(x.reshape(-1, 3).T, bias=True)
    vectors, sigma = made.eigenvectors.astype(np.float64), made.sigma
    np.testing.assert_allclose(vectors @ np.diag(sigma**2.0) @ vectors.T, covariance, rtol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-6)
    assert (np.diff(sigma) <= 0).all() and (vectors.sum(0) >= 0).all()


def test_statistics_stay_exact_for_a_million_pictures():
    count, side = 1_281_167, 256
    image = np.full((side, side, 3), 255 * count, np.int64)
    products = np.full((3, 3), 255**2 * count * side**2, np.int64)
    facts = statistics(image, products, count)
    assert (facts['mean'] == 255).all() and facts['sigma'].max() < 1e-2


# Resuming after a kill


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the library may catch it."""


@pytest.mark.parametrize('format', ['jpg', 'u8'])
@pytest.mark.parametrize('flush', [0.0, 3600.0])
def test_interrupted_equals_uninterrupted(tree, tmp_path, monkeypatch, format, flush):
    options = {'format': format, 'size': 24}
    prepare.prepare(tree, store=str(tmp_path / 'whole'), **options)
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', flush)
    monkeypatch.setattr(store_writer, 'cores', lambda: 1)
    real, starts, budget = sources.open_source, [], 0

    def killing(*args, **kwargs):
        source = real(*args, **kwargs)

        def read(split, start):
            starts.append((split, start))
            for number, example in enumerate(source.read(split, start)):
                if number == budget:
                    raise Killed
                yield example

        return dataclasses.replace(source, read=read)

    monkeypatch.setattr(sources, 'open_source', killing)
    path = tmp_path / 'broken'
    for budget in (2, 5, 6, 100):  # noqa: B007  read by `killing`
        try:
            prepare.prepare(tree, store=str(path), **options)
        except Killed:
            for name in ('train.index', f'train.{format}', 'progress.npz.tmp'):
                with open(path / name, 'ab') as file:  # written after the last flush
                    file.write(b'torn')
    assert files(path) == files(tmp_path / 'whole')
    if flush == 0:
        assert max(start for split, start in starts if split == 'train') > 0  # it did resume


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path):
    tree = str(fixtures.write_tree(tmp_path / 'tree', {'ape': 100, 'bee': 100}))
    program = (
        'import sys; from alexnet_jax.input import prepare, store_writer;'
        'store_writer.FLUSH_SECONDS = 0; prepare.prepare(*sys.argv[1:2], store=sys.argv[2], size=200)'
    )
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    prepare.prepare(tree, store=str(whole), size=200)
    kills = 0
    for delay in (0.0, 0.01, 0.1, 0.3):
        process = subprocess.Popen(
            [sys.executable, '-c', program, tree, str(broken)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        before = _stamp(broken)
        while process.poll() is None and _stamp(broken) == before:
            time.sleep(0.001)
        time.sleep(delay)
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert kills
    subprocess.run([sys.executable, '-c', program, tree, str(broken)], check=True, timeout=120)
    assert files(broken) == files(whole)


def _stamp(path):
    try:
        return os.stat(path / 'progress.npz').st_mtime_ns
    except FileNotFoundError:
        return None


def test_complete_store_is_opened_without_its_source(tree, tmp_path, monkeypatch):
    path = tmp_path / 'store'
    prepare.prepare(tree, store=str(path), size=24)
    for name in ('train.index', store_writer.LOCK):
        (path / name).write_bytes(b'left by a kill at the very end')
    monkeypatch.setattr(sources, 'open_source', None)
    made = prepare.ensure(source=tree, store=str(path), size=24)
    assert made.counts['train'] == 13
    assert not (path / 'train.index').exists() and not (path / store_writer.LOCK).exists()


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Changes to a new working directory with images in flowers and in sub/flowers."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    for tree in ('flowers', 'sub/flowers'):
        fixtures.write_tree(tmp_path / 'here' / tree, {'ape': 6, 'bee': 5})


@pytest.mark.parametrize('source', ['flowers', 'sub/flowers', './flowers', '~/flowers'])
def test_the_default_store_of_a_folder_that_is_gone(flowers, monkeypatch, source):
    monkeypatch.setenv('HOME', os.getcwd())
    made = prepare.prepare(source, size=24)
    assert made.source == os.path.abspath(source.replace('~', '.'))
    assert os.listdir('data') == ['flowers-24-jpg']
    shutil.rmtree('flowers')
    shutil.rmtree('sub')
    assert prepare.ensure(source=source, size=24).counts == {'train': 10, 'val': 1}


@pytest.mark.parametrize('source', ['elsewhere/flowers', '/elsewhere/flowers', 'flowers', 'mnist'])
def test_a_store_that_is_named_opens_wherever_its_pictures_are(
    flowers, tmp_path, monkeypatch, capsys, source
):
    path = tmp_path / 'store'
    prepare.prepare('sub/flowers', store=str(path), size=24)
    before = files(path)
    (tmp_path / 'other').mkdir()
    monkeypatch.chdir(tmp_path / 'other')
    monkeypatch.setattr(sources, 'open_source', None)
    capsys.readouterr()
    assert prepare.ensure(source=source, store=str(path), size=24).counts == {'train': 10, 'val': 1}
    origin = f'source {tmp_path}/here/sub/flowers'
    assert f'{path}: using this complete store as is ({origin}, not' in capsys.readouterr().out
    for other in ({'size': 20}, {'size': 24, 'format': 'u8'}):
        with pytest.raises(
            UserError, match='a different store .* give another --config.data.store, or'
        ):
            prepare.ensure(source=source, store=str(path), **other)
    assert files(path) == before


def test_a_store_that_is_not_named_must_be_of_the_source(flowers):
    path = 'data/flowers-24-jpg'
    made = prepare.prepare('sub/flowers', size=24)
    with pytest.raises(UserError, match='is a different store .val_fraction 0.1, not 0.2.'):
        prepare.ensure(source='sub/flowers', size=24, val_fraction=0.2)
    assert prepare.ensure(source='flowers', store=path, size=24).source == made.source
    shutil.rmtree('flowers')  # gone: there is no store to make
    with pytest.raises(
        UserError,
        match='is a different store .source .*/here/sub/flowers, not /.*/here/'
        f'flowers.: give another --config.data.store .--config.data.store={path} uses this one as is.',
    ):
        prepare.ensure(source='./flowers', size=24)


def test_sources_of_one_name_have_a_store_each(flowers, monkeypatch):
    digest = hashlib.sha1(os.path.abspath('flowers').encode()).hexdigest()[:8]
    first = prepare.prepare('sub/flowers', size=24)
    second = prepare.prepare('flowers', size=24)
    assert {*os.listdir('data')} == {'flowers-24-jpg', f'flowers-{digest}-24-jpg'}
    assert (str(first.path), str(second.path)) == (
        'data/flowers-24-jpg',
        f'data/flowers-{digest}-24-jpg',
    )
    shutil.rmtree(first.path)  # the second one keeps its place, with or without its images
    assert prepare.ensure(source='./flowers', size=24).path == second.path
    shutil.rmtree('flowers')
    assert prepare.ensure(source='flowers', size=24).path == second.path
    assert prepare.prepare('sub/flowers', size=24).path == first.path


def test_two_sources_of_one_name_at_once(flowers, monkeypatch):
    """The second waits for the store of the first, and then makes its own."""
    waits = threading.Event()

    def waiting(text):
        if 'waiting' in text:
            waits.set()

    class Waiting(Stopping):
        def __call__(self, *args, **kwargs):
            self.go = waits
            return super().__call__(*args, **kwargs)

    stopping = Waiting()
    monkeypatch.setattr(sources, 'open_source', stopping)
    monkeypatch.setattr(store_writer, 'say', waiting)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare.prepare, 'flowers', size=24)
        assert stopping.reached.wait(60)
        second = pool.submit(prepare.prepare, 'sub/flowers', size=24)
        assert first.result().source != second.result().source
    assert len(os.listdir('data')) == 2


# A changed source


def add():
    for name in ('more', 'and', 'again'):
        shutil.copy('flowers/bee/001.jpg', f'flowers/ape/{name}.jpg')


def take():
    os.remove('flowers/bee/001.jpg')


def exchange():
    with open('flowers/bee/001.jpg', 'ab') as file:
        file.write(b'more')


@pytest.mark.parametrize(
    'change, found',
    [
        (add, '3 more images than'),
        (take, '1 fewer image than'),
        (exchange, 'different images from'),
    ],
)
def test_a_changed_source_is_noticed(flowers, monkeypatch, change, found):
    made = prepare.prepare('flowers', size=24)
    folder, path = os.path.abspath('flowers'), 'data/flowers-24-jpg'
    prepare.prepare('flowers', size=24)
    change()
    for start, flag in (
        (prepare.prepare, '--store'),
        (lambda source, size: prepare.ensure(source=source, size=size), '--config.data.store'),
    ):
        with pytest.raises(UserError) as error:
            start('flowers', size=24)
        assert str(error.value) == (
            f'{folder} has {found} the store {path}: remove {path} and run the same command again, '
            f'or pass {flag}={path} to use the store as is'
        )
    # A run resumes with its store, and a store named explicitly is used as is.
    assert prepare.ensure(source='flowers', size=24, resuming=True).counts == made.counts
    assert prepare.ensure(source='flowers', size=24, store=path).counts == made.counts
    assert prepare.prepare('flowers', size=24, store=path).counts == made.counts
    with monkeypatch.context() as patch:  # counting many takes too long at startup
        patch.setattr(prepare, 'LARGE', 11)
        assert prepare.ensure(source='flowers', size=24).counts == made.counts
    shutil.rmtree(path)
    assert sum(prepare.prepare('flowers', size=24).counts.values()) == len(
        [name for _, _, names in os.walk('flowers') for name in names]
    )


def test_a_source_that_cannot_be_compared(flowers, capsys):
    path = 'data/flowers-24-jpg'
    made = prepare.prepare('flowers', size=24)
    shutil.rmtree('flowers/ape')
    assert prepare.prepare('flowers', size=24).counts == made.counts
    assert f'{path}: cannot be compared with its source (' in capsys.readouterr().out
    info = json.loads(open(f'{path}/store.json').read())
    for name in ('files', 'crc', 'checksum'):  # as earlier versions wrote it
        del info[name]
    with open(f'{path}/store.json', 'w') as file:
        json.dump(info, file)
    assert prepare.prepare('flowers', size=24).counts == made.counts
    assert 'compared' not in capsys.readouterr().out


# Checksums


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_verify_finds_a_flipped_bit_anywhere(flowers, format):
    os.rename('flowers/ape', 'flowers/äpfel')
    made = prepare.prepare('flowers', size=16, format=format)
    rng = np.random.default_rng(0)
    names = sorted(os.listdir(made.path))
    assert len(names) == 3 + 2 * (4 if format == 'jpg' else 3)
    for name in names:
        content = (made.path / name).read_bytes()
        for bit in rng.integers(0, 8 * len(content), 20).tolist():
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            (made.path / name).write_bytes(damaged)
            with pytest.raises(UserError, match=re.escape(name)) as error:
                store.verify(store.open_store(made.path))
            assert '\n' not in str(error.value)
            assert str(error.value).endswith(f'remove {made.path} and run prepare again')
        (made.path / name).write_bytes(content)
    store.verify(store.open_store(made.path))


def test_every_bit_of_the_description_counts(flowers):
    os.rename('flowers', 'blüten')
    file = prepare.prepare('blüten', size=8).path / 'store.json'
    content = file.read_bytes()
    opened = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ValueError):
            store.decode(bytes(damaged))
            opened += 1  # the fields are the same, but not the bytes: \u00FC for \u00fc
            file.write_bytes(damaged)
            with pytest.raises(UserError, match='store.json is damaged'):
                store.verify(store.open_store(file.parent))
    assert opened == 2


def test_names_are_utf_8_whatever_the_locale(flowers):
    names = ['bee', 'äpfel', '花']
    os.rename('flowers/ape', 'flowers/äpfel')
    shutil.copytree('flowers/bee', 'flowers/花')
    program = (
        'from alexnet_jax.input import prepare\n'
        'made = prepare.prepare("flowers", size=8)\n'
        'assert made.names == prepare.prepare("flowers", size=8).names == ["bee", "\\xe4pfel", '
        '"\\u82b1"], made.names\n'
    )
    plain = {'PYTHONPATH': str(ROOT), 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0'}
    command = [sys.executable, '-X', 'utf8=0', '-c', program]
    done = subprocess.run(command, env={**os.environ, **plain}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open('data/flowers-8-jpg/names.txt', 'rb') as file:
        assert file.read().decode() == ''.join(f'{name}\n' for name in names)


def test_an_interrupted_store_that_is_named_goes_on_with_its_source_only(
    flowers, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(store_writer, 'finish', lambda *args, **kwargs: exit())
        with pytest.raises(SystemExit):
            prepare.prepare('flowers', store='store', size=24)
    with pytest.raises(UserError, match='is a different store .source '):
        prepare.prepare('sub/flowers', store='store', size=24)
    assert 'complete store' not in capsys.readouterr().out
    assert prepare.prepare('flowers', store='store', size=24).counts == {'train': 10, 'val': 1}


@pytest.mark.slow
def test_the_store_of_a_tfds_name_with_a_config(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from alexnet_jax.input.sources import shapes_builder

    class TwoConfigs(shapes_builder.AlexnetShapes):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('large', 'small')]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, 'SPLITS', {'train': (0, 20), 'validation': (1, 10)})
    made = prepare.ensure(source='two_configs/small', dir='sets', size=24)
    assert (made.source, made.counts) == ('two_configs/small', {'train': 20, 'val': 10})
    assert os.listdir('data') == ['two_configs-small-24-jpg']
    assert os.path.isdir('sets/two_configs/small')


def test_the_way_out_of_a_damaged_store(tree, tmp_path):
    path = tmp_path / 'store'
    prepare.prepare(tree, store=str(path), size=24)
    before = files(path)
    (path / 'val.jpg').write_bytes(b'')
    for _ in range(2):
        with pytest.raises(UserError, match=f': remove {path} and run prepare again$'):
            prepare.prepare(tree, store=str(path), size=24)
    shutil.rmtree(path)
    prepare.prepare(tree, store=str(path), size=24)
    assert files(path) == before


# Two processes at once


def heard(capsys, text):
    """Waits until `text` is printed."""
    said = ''
    for _ in range(6000):
        said += capsys.readouterr().out
        if text in said:
            return
        time.sleep(0.01)
    raise AssertionError(said)


class Stopping:
    """`sources.open_source`, but the first call waits for `go`, and may then fail."""

    def __init__(self, fails=False, later=lambda: None):
        self.real, self.fails, self.later = sources.open_source, fails, later
        self.count, self.reached, self.go = 0, threading.Event(), threading.Event()

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count > 1:
            self.later()
            return self.real(*args, **kwargs)
        self.reached.set()
        assert self.go.wait(60)
        if self.fails:
            raise UserError('the first one fails')
        return self.real(*args, **kwargs)


def two_at_once(stopping, tree, path, monkeypatch, capsys):
    monkeypatch.setattr(sources, 'open_source', stopping)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare.prepare, tree, store=str(path), size=24)
        try:
            assert stopping.reached.wait(60)
            second = pool.submit(prepare.ensure, source=tree, store=str(path), size=24)
            heard(capsys, f'{path}: waiting for another process that is preparing it\n')
        finally:
            stopping.go.set()
    return first, second


def test_a_second_start_waits_and_opens_what_the_first_made(tree, tmp_path, monkeypatch, capsys):
    prepare.prepare(tree, store=str(tmp_path / 'alone'), size=24)
    path, stopping = tmp_path / 'data' / 'store', Stopping()
    first, second = two_at_once(stopping, tree, path, monkeypatch, capsys)
    assert first.result().counts == second.result().counts == {'train': 13, 'val': 5}
    assert stopping.count == 1
    assert files(path) == files(tmp_path / 'alone')


def test_a_waiting_start_takes_over_from_one_that_fails(tree, tmp_path, monkeypatch, capsys):
    path = tmp_path / 'data' / 'store'

    def is_held():  # the lock of the first was removed with it
        with open(path / store_writer.LOCK, 'ab') as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    stopping = Stopping(fails=True, later=is_held)
    first, second = two_at_once(stopping, tree, path, monkeypatch, capsys)
    assert str(first.exception()) == 'the first one fails'
    store.verify(second.result())
    assert store_writer.LOCK not in os.listdir(path)


def test_a_killed_process_holds_nothing(tree, tmp_path, capsys):
    path = tmp_path / 'store'
    program = (
        'import sys, time; from alexnet_jax.input import store_writer\n'
        'with store_writer.locked(sys.argv[1]): print("held", flush=True); time.sleep(600)'
    )
    holder = subprocess.Popen([sys.executable, '-c', program, str(path)], stdout=subprocess.PIPE)
    with holder, concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            assert holder.stdout.readline() == b'held\n'
            made = pool.submit(prepare.prepare, tree, store=str(path), size=24)
            heard(capsys, f'{path}: waiting for another process')
        finally:
            holder.kill()
        store.verify(made.result(60))
    assert store_writer.LOCK not in os.listdir(path)


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_holder_removes_the_folder_while_another_starts(tree, tmp_path, monkeypatch, when):
    real, path = os.makedirs, tmp_path / 'data' / 'store'
    races = [when]

    def makedirs(*args, **kwargs):
        if races == ['before']:
            races.clear()
            raise FileExistsError(17, 'File exists')  # removed between mkdir and isdir
        real(*args, **kwargs)  # calls this function for the parent folders
        if races and path.exists():
            races.clear()
            path.rmdir()
            path.parent.rmdir()

    monkeypatch.setattr(store_writer.os, 'makedirs', makedirs)
    with store_writer.locked(str(path)):
        assert os.listdir(path) == [store_writer.LOCK]
    assert sorted(os.listdir(tmp_path)) == ['tree']  # it removed what it made


def test_folders_made_by_a_failed_attempt_are_removed_too(tmp_path, monkeypatch):
    is_open = iter([False, True])
    monkeypatch.setattr(store_writer, '_is_open', lambda *args: next(is_open))
    with store_writer.locked(str(tmp_path / 'data' / 'store')):
        assert os.listdir(tmp_path / 'data') == ['store']
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_does_not_loop_forever(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(FileExistsError):
        with store_writer.locked(str(tmp_path / 'link')):
            pass
    with pytest.raises(UserError, match='link is a link to .*nowhere, which does not exist'):
        prepare.prepare('mnist', store=str(tmp_path / 'link'))


def test_the_lock_of_the_next_process_is_not_removed(tmp_path):
    with store_writer.locked(str(tmp_path)):
        store_writer.empty(str(tmp_path))
        assert os.listdir(tmp_path) == [store_writer.LOCK]


def test_a_file_system_without_locks(tree, tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(store_writer.fcntl, 'flock', flock)
    made = prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    store.verify(made)
    assert sum(made.counts.values()) == 18


# Errors


@pytest.mark.parametrize('split', ['train', 'val'])
def test_truncated_picture_is_named_and_nothing_is_left(tree, tmp_path, split):
    bad = os.path.join(tree, split, 'bee', '002.jpg')
    data = open(bad, 'rb').read()
    open(bad, 'wb').write(data[: len(data) // 2])
    result = subprocess.run(
        [*COMMAND, f'--source={tree}', '--size=24', f'--store={tmp_path}/a/b/c'],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    bad = f'{split}/bee/002.jpg'
    assert f'tree: 1 of 18 images cannot be decoded: {bad} (' in result.stderr
    assert result.stderr.count('\n') == 1
    assert sorted(os.listdir(tmp_path)) == ['tree']


def test_a_long_pass_is_kept_until_the_picture_is_repaired(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    prepare.prepare(tree, store=str(tmp_path / 'whole'), size=24)
    bad = os.path.join(tree, 'val', 'bee', '001.jpg')
    data = open(bad, 'rb').read()
    open(bad, 'wb').write(b'')
    with pytest.raises(UserError, match='cannot be decoded: val/bee/001.jpg'):
        prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    with pytest.raises(UserError, match='incomplete'):
        store.open_store(tmp_path / 'store')
    open(bad, 'wb').write(data)
    prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    assert files(tmp_path / 'store') == files(tmp_path / 'whole')


@pytest.mark.parametrize('label', [-1, 2])
def test_label_outside_the_class_count(tmp_path, monkeypatch, label):
    pixels = np.zeros((9, 9, 3), np.uint8)
    source = sources.Source(
        'made',
        ['a', 'b'],
        {'train': 2, 'val': 1},
        lambda split, start: iter(
            [
                sources.Example('the first', pixels, 0),
                sources.Example('the second', pixels, label),
            ]
        ),
    )
    monkeypatch.setattr(sources, 'open_source', lambda *args, **kwargs: source)
    with pytest.raises(UserError, match=f'the second: label {label} is outside the 2 classes'):
        prepare.prepare('made', store=str(tmp_path / 'data' / 'store'), size=8)
    assert not list(tmp_path.iterdir())


def test_a_short_pass_that_fails_leaves_the_folders_as_they_were(tree, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'tree' / 'val' / 'bee' / '000.jpg').write_bytes(b'')
    for path in ('empty', 'new/store'):
        with pytest.raises(UserError, match='cannot be decoded'):
            prepare.prepare(tree, store=str(tmp_path / path), size=24)
    assert sorted(os.listdir(tmp_path)) == ['empty', 'tree']
    assert os.listdir(tmp_path / 'empty') == []


def test_source_that_gives_too_few(tree, tmp_path, monkeypatch):
    real = sources.open_source

    def counting_more(*args, **kwargs):
        source = real(*args, **kwargs)
        return sources.Source('made', source.class_names, {'train': 13, 'val': 6}, source.read)

    monkeypatch.setattr(sources, 'open_source', counting_more)
    with pytest.raises(UserError, match='made: val gave 5 images, not 6'):
        prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)


def test_says_how_much_disk_and_refuses_too_little(tree, tmp_path, monkeypatch, capsys):
    prepare.prepare(tree, store=str(tmp_path / 'store'), format='u8', size=24)
    assert 'needs about 0.00 GB for 18 images' in capsys.readouterr().out
    needed = 18 * (24 * 24 * 3)
    usage = collections.namedtuple('usage', 'free')
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: usage(needed))
    with pytest.raises(UserError, match='not enough disk space, needs about'):
        prepare.prepare(tree, store=str(tmp_path / 'other' / 'store'), format='u8', size=24)
    assert sorted(os.listdir(tmp_path)) == ['store', 'tree']


def test_full_disk_is_one_line(tree, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(store_writer, '_record', full)
    with pytest.raises(UserError, match='cannot be written: No space left on device'):
        prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    assert sorted(os.listdir(tmp_path)) == ['tree']


def test_other_stores_and_other_things_are_not_overwritten(tree, tmp_path):
    path = str(tmp_path / 'store')
    prepare.prepare(tree, store=path, size=24)
    before = files(tmp_path / 'store')
    with pytest.raises(UserError, match='is a different store .size 24, not 20.'):
        prepare.prepare(tree, store=path, size=20)
    with pytest.raises(UserError, match='is a different store .format jpg, not u8.'):
        prepare.ensure(source=tree, store=path, size=24, format='u8')
    assert files(tmp_path / 'store') == before
    with pytest.raises(UserError, match='holds other files'):
        prepare.prepare(tree, store=tree, size=24)
    with pytest.raises(UserError, match='not a store, or a damaged one'):
        (tmp_path / 'store' / 'store.json').write_text('{"format": ')
        prepare.prepare(tree, store=path, size=24)


def test_a_store_that_is_a_file(tree, tmp_path):
    (tmp_path / 'file').write_bytes(b'mine')
    with pytest.raises(UserError, match='file: cannot be read as a store: Not a directory: give'):
        prepare.prepare(tree, store=str(tmp_path / 'file'), size=24)
    assert (tmp_path / 'file').read_bytes() == b'mine'


def test_a_store_just_begun_by_another_process_is_recognized(tmp_path, monkeypatch):
    # It wrote them after we looked for store.json and before we listed the folder.
    monkeypatch.setattr(prepare.os, 'listdir', lambda path: ['lock.tmp', 'store.json', 'train.jpg'])
    assert prepare._description(str(tmp_path)) is None


def test_user_files_are_not_treated_as_temporary(tree, tmp_path):
    for path in (tmp_path / 'mine', tmp_path / 'store'):
        path.mkdir()
    (tmp_path / 'mine' / 'a.tmp').write_bytes(b'mine')
    with pytest.raises(UserError, match='mine: holds other files: give another --store'):
        prepare.prepare(tree, store=str(tmp_path / 'mine'), size=24)
    assert files(tmp_path / 'mine') == {'a.tmp': b'mine'}
    (tmp_path / 'store' / 'stats.npz.tmp').write_bytes(b'left by a kill')
    prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    for name in ('a.tmp', 'a.index'):
        (tmp_path / 'store' / name).write_bytes(b'mine')
    before = files(tmp_path / 'store')
    assert 'stats.npz.tmp' not in before
    prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    assert files(tmp_path / 'store') == before
    store_writer.empty(str(tmp_path / 'store'))
    assert files(tmp_path / 'store') == {'a.tmp': b'mine', 'a.index': b'mine'}


def test_all_names_that_are_written_are_known(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    monkeypatch.setattr(store_writer, 'clean', lambda path: None)
    for format in store.FORMATS:
        prepare.prepare(tree, store=str(tmp_path / format), size=24, format=format)
        assert (
            {store_writer.PROGRESS, 'val.index'}
            < {*os.listdir(tmp_path / format)}
            <= {*store_writer.FILES}
        )
        store_writer.empty(str(tmp_path / format))
        assert os.listdir(tmp_path / format) == []


@pytest.mark.parametrize('fraction', [float('nan'), float('inf'), -float('inf'), 0.0, 1.0, -0.1])
def test_an_invalid_val_fraction(tree, tmp_path, fraction):
    for function in (prepare.prepare, prepare.ensure):
        with pytest.raises(UserError, match=f'^val_fraction {fraction}: must be between'):
            function(source=tree, store=str(tmp_path / 'store'), size=24, val_fraction=fraction)
    assert os.listdir(tmp_path) == ['tree']


def test_the_command_rejects_an_invalid_val_fraction(tree, tmp_path):
    result = subprocess.run(
        [*COMMAND, f'--source={tree}', '--val_fraction=nan'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr.count('\n')) == (2, 1)
    assert result.stderr.startswith('error: val_fraction nan: ')
    assert os.listdir(tmp_path) == ['tree']


def test_an_interrupted_store_of_other_counts_is_not_continued(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, 'finish', lambda *args, **kwargs: exit())
    with pytest.raises(SystemExit):
        prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    before = files(tmp_path / 'store')
    assert 'store.json' in before and store_writer.LOCK not in before
    os.remove(os.path.join(tree, 'train', 'ape', '000.jpg'))
    with pytest.raises(UserError, match='counts .*13.*, not .*12.*, or remove .*/store and'):
        prepare.prepare(tree, store=str(tmp_path / 'store'), size=24)
    assert files(tmp_path / 'store') == before


def test_ensure_prepares_small_sets_only(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare.ensure(source=tree, size=24).counts == {'train': 13, 'val': 5}
    assert os.path.exists('data/tree-24-jpg/store.json')
    monkeypatch.setattr(prepare, 'LARGE', 18)
    with pytest.raises(
        UserError, match=f'python -m alexnet_jax.prepare --source={tree} .*--size=20'
    ):
        prepare.ensure(source=tree, size=20, dir='', store='')
    assert os.listdir('data') == ['tree-24-jpg']


def test_ensure_never_builds_imagenet(tmp_path):
    with pytest.raises(UserError, match='138 GB'):
        prepare.ensure(source='imagenet2012', dir=str(tmp_path), store=str(tmp_path / 'store'))
    fixtures.write_imagenet_tars(tmp_path)
    with pytest.raises(
        UserError, match='run python -m alexnet_jax.prepare --source=imagenet2012 --dir='
    ):
        prepare.ensure(source='imagenet2012', dir=str(tmp_path), store=str(tmp_path / 'store'))


@pytest.mark.slow
def test_ensure_refuses_a_large_set_before_tfds_builds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, '_build', None)
    with pytest.raises(UserError, match='python -m alexnet_jax.prepare --source=places365_small'):
        prepare.ensure(source='places365_small', dir=str(tmp_path), store=str(tmp_path / 'store'))
    assert not list(tmp_path.iterdir())


def test_verify_finds_a_flipped_bit(tree, tmp_path):
    path = tmp_path / 'store'
    command = [*COMMAND, f'--source={tree}', '--size=24', f'--store={path}', '--verify']
    prepare.prepare(tree, store=str(path), size=24)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, '')
    data = bytearray((path / 'val.jpg').read_bytes())
    data[-1] ^= 1
    (path / 'val.jpg').write_bytes(data)
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert 'damaged' in result.stderr and 'val.jpg 4' in result.stderr


@pytest.mark.slow
def test_imagenet_from_tars_to_store(tmp_path):
    made = fixtures.write_imagenet_tars(tmp_path / 'tars')
    built = prepare.prepare(
        'imagenet2012', dir=str(tmp_path / 'tars'), store=str(tmp_path / 'store'), size=64
    )
    assert built.counts == {'train': len(made['train']), 'val': len(made['val'])}
    assert built.classes == 3
    assert sorted(built.names[label] for label in built.labels('train')) == sorted(
        made['train'].values()
    )
    store.verify(built)


def relabel():
    lines = ['flowers/ape/001.jpg,a', 'flowers/ape/002.jpg,a', 'flowers/bee/001.jpg,b']
    with open('list.csv', 'w') as file:
        file.write(
            '\n'.join([*lines, 'flowers/bee/002.jpg,' + ('a' if os.path.exists('data') else 'b')])
        )


def test_labels_that_change_are_noticed(flowers):
    relabel()
    path = str(prepare.prepare('list.csv', size=24, val_fraction=0.25).path)
    assert prepare.prepare('list.csv', size=24, val_fraction=0.25)
    relabel()
    with pytest.raises(
        UserError, match='list.csv has different labels or class names from the store'
    ):
        prepare.prepare('list.csv', size=24, val_fraction=0.25)
    assert prepare.prepare('list.csv', size=24, val_fraction=0.25, store=path)


def test_an_earlier_store_keeps_its_held_out_images(flowers, capsys):
    relabel()
    path = prepare.prepare('list.csv', size=24, val_fraction=0.25).path
    description = json.loads((path / 'store.json').read_text())
    assert description.pop('held_out') == 'by class'
    description['content'] ^= 1
    store_writer.write_description(path, description)
    assert prepare.prepare('list.csv', size=24, val_fraction=0.25)
    assert (
        f'{path}: keeps the validation images that an earlier version chose'
        in capsys.readouterr().out
    )
    listed = pathlib.Path('list.csv').read_text()
    pathlib.Path('list.csv').write_text(listed.replace(',a', ',ape'))
    del description['content']  # still earlier
    store_writer.write_description(path, description)
    with pytest.raises(UserError, match='different class names from'):
        prepare.prepare('list.csv', size=24, val_fraction=0.25)
    pathlib.Path('list.csv').write_text(listed)
    os.remove('flowers/ape/001.jpg')
    with pytest.raises(UserError, match='has 1 fewer image than'):
        prepare.prepare('list.csv', size=24, val_fraction=0.25)


def rename_an_image():
    os.rename('flowers/ape/001.jpg', 'flowers/ape/zz.jpg')


def rename_a_class():
    os.rename('flowers/ape', 'flowers/zebra')


def begin_with_an_earlier_version():
    description = json.loads(pathlib.Path('data/flowers-24-jpg/store.json').read_text())
    del description['held_out'], description['content']
    description['counts'] = {'train': 9, 'val': 2}
    store_writer.write_description('data/flowers-24-jpg', description)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (rename_an_image, 'images, labels or names of .* have changed since this pass began'),
        (rename_a_class, 'images, labels or names of .* have changed since this pass began'),
        (begin_with_an_earlier_version, 'an earlier version began this pass and chose other'),
    ],
)
def test_a_pass_does_not_resume_with_other_images(flowers, monkeypatch, change, message):
    def killed(*args, **kwargs):
        source = real(*args, **kwargs)
        return dataclasses.replace(source, read=lambda *a: kill_after(4, source.read(*a)))

    def kill_after(count, examples):
        yield from itertools.islice(examples, count)
        raise KeyboardInterrupt

    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    monkeypatch.setattr(store_writer, 'cores', lambda: 1)
    real = sources.open_source
    with monkeypatch.context() as patch:
        patch.setattr(sources, 'open_source', killed)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare('flowers', size=24)
    assert os.path.exists('data/flowers-24-jpg/progress.npz')
    change()
    with pytest.raises(UserError, match=message):
        prepare.prepare('flowers', size=24)


def test_dir_belongs_to_names_only(flowers):
    made = prepare.prepare(os.path.abspath('flowers'), dir='here', size=24)
    assert prepare.prepare(os.path.abspath('flowers'), dir='there', size=24).path == made.path
