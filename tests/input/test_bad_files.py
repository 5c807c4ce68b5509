"""Files that cannot be decoded, EXIF orientation of a store, names: what messy folders hold."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.input import prepare, sources, store, store_writer
from alexnet_jax.input.images import square
from tests.helpers import ROOT, fixtures
from tests.input.test_images import with_exif
from tests.input.test_prepare import COMMAND, Killed, files

PAIRS = [('train', 'ape', 2), ('train', 'bee', 0), ('val', 'bee', 1)]  # to be damaged


@pytest.fixture
def tree(tmp_path):
    fixtures.write_tree(tmp_path / 'tree' / 'train', {'ape': 7, 'bee': 6})
    fixtures.write_tree(tmp_path / 'tree' / 'val', {'ape': 2, 'bee': 3}, seed=1000)
    return tmp_path / 'tree'


def damage(tree, pairs=PAIRS) -> dict[str, bytes]:
    """Empties some files -> {path: what was in it}."""
    paths = [tree / split / name / f'{number:03}.jpg' for split, name, number in pairs]
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(b'')
    return before


def run(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


# What cannot be decoded


def test_all_bad_images_are_listed_at_the_end(tree, tmp_path):
    damage(tree)
    done = run(f'--source={tree}', '--size=24', f'--store={tmp_path}/store')
    assert done.returncode == 2
    assert done.stderr == (
        f'error: {tree}: 3 of 18 images cannot be decoded: train/ape/002.jpg (an empty file), '
        'train/bee/000.jpg (an empty file), val/bee/001.jpg (an empty file); repair or remove them '
        'and run the same command again, or leave them out with --skip_bad\n'
    )
    assert os.listdir(tmp_path) == ['tree']


def test_many_bad_images_are_listed_in_a_file(tmp_path):
    tree = fixtures.write_tree(tmp_path / 'tree', {'ape': 20, 'bee': 20})
    before = damage(tmp_path, [('tree', 'ape', i) for i in range(15)])
    before |= damage(tmp_path, [('tree', 'bee', i) for i in range(10)])
    path = tmp_path / 'store'
    with pytest.raises(UserError, match='25 of 40 images .*an empty file.{500,}') as raised:
        prepare.prepare(str(tree), store=f'{path}/', size=24)
    assert str(raised.value).count('an empty file') == 20
    assert f', ...; the list is in {path}.bad.txt; repair' in str(raised.value)
    lines = (tmp_path / 'store.bad.txt').read_text().splitlines()
    names = [str(name.relative_to(tree)) for name in before]
    assert sorted(lines) == sorted(f'{name}\tan empty file' for name in names)
    assert sorted(os.listdir(tmp_path)) == ['store.bad.txt', 'tree']
    for name, data in before.items():
        name.write_bytes(data)
    prepare.prepare(str(tree), store=f'{path}/', size=24)
    assert sorted(os.listdir(tmp_path)) == ['store', 'tree']


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_a_repaired_pass_ends_with_the_same_bytes(tree, tmp_path, monkeypatch, format):
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    options = {'format': format, 'size': 24}
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), **options)
    before, path = damage(tree), tmp_path / 'store'
    for name, data in before.items():
        with pytest.raises(UserError, match='cannot be decoded'):
            prepare.prepare(str(tree), store=str(path), **options)
        name.write_bytes(data)
    progress = store_writer.read_progress(str(path), 24)
    assert progress['written'][:, 0].tolist() == progress['read'].tolist() == [13, 3, 0]
    prepare.prepare(str(tree), store=str(path), **options)
    assert files(path) == files(tmp_path / 'whole')


@pytest.mark.parametrize('format', ['jpg', 'u8'])
def test_skip_bad_equals_a_source_without_them(tree, tmp_path, format, capsys):
    damage(tree)
    path, options = tmp_path / 'store', {'format': format, 'size': 24}
    made = prepare.prepare(str(tree), store=str(path), skip_bad=True, **options)
    assert (
        f'{path}: images left out because they cannot be decoded: 3; see skip'
        in capsys.readouterr().out
    )
    assert made.counts == {'train': 11, 'val': 4}
    store.verify(made)
    told = json.loads((path / 'store.json').read_text())
    assert told['skipped'] == {'train': 2, 'val': 1} and told['counts'] == made.counts
    reason = 'an empty file'
    assert (path / 'skipped.txt').read_text() == (
        f'train/ape/002.jpg\t{reason}\ntrain/bee/000.jpg\t{reason}\nval/bee/001.jpg\t{reason}\n'
    )
    for split, name, number in PAIRS:
        (tree / split / name / f'{number:03}.jpg').unlink()
    prepare.prepare(str(tree), store=str(tmp_path / 'without'), **options)
    with_bad, without = files(path), files(tmp_path / 'without')
    del with_bad['skipped.txt'], with_bad['store.json'], without['store.json']
    assert with_bad == without
    assert prepare.prepare(str(tree), store=str(path), **options).counts == made.counts
    assert prepare.ensure(source=str(tree), store=str(path), **options).counts == made.counts


class Killing:
    """`sources.open_source` whose source is killed after a given number of examples of a split."""

    def __init__(self, budgets):
        self.real, self.budgets, self.starts = sources.open_source, iter(budgets), []

    def __call__(self, *args, **kwargs):
        source, budget = self.real(*args, **kwargs), next(self.budgets)

        def read(split, start):
            self.starts.append((split, start))
            for number, example in enumerate(source.read(split, start)):
                if number == budget:
                    raise Killed
                yield example

        return dataclasses.replace(source, read=read)


def try_until_made(tree, path, skips):
    """Prepares again and again, with and without --skip_bad, until it is not killed."""
    for skip_bad in skips:
        try:
            prepare.prepare(str(tree), store=str(path), size=24, skip_bad=skip_bad)
        except Killed:
            with open(path / 'train.index', 'ab') as file:  # written after the last flush
                file.write(b'torn')


@pytest.mark.parametrize('flush', [0.0, 3600.0])
@pytest.mark.parametrize(
    'skips', [[True] * 4, [False, True, True, True], [True, False, True, True]]
)
def test_an_interrupted_pass_with_skip_bad_equals_a_whole_one(
    tree, tmp_path, monkeypatch, flush, skips, capsys
):
    damage(tree)
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), size=24, skip_bad=True)
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', flush)
    monkeypatch.setattr(store_writer, 'cores', lambda: 1)
    killing = Killing([9, 5, 6, 100])
    monkeypatch.setattr(sources, 'open_source', killing)
    try_until_made(tree, tmp_path / 'store', skips)
    assert files(tmp_path / 'store') == files(tmp_path / 'whole')
    assert (max(start for _, start in killing.starts) > 0) == (flush == 0)
    again = 'starting over, since images were left out with --skip_bad' in capsys.readouterr().out
    assert again == (flush == 0 and skips[:2] == [True, False])


def test_images_repaired_after_skip_bad_are_read_again(tree, tmp_path, monkeypatch):
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), size=24)
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    before = damage(tree)
    with monkeypatch.context() as patch:
        patch.setattr(sources, 'open_source', Killing([9]))
        try_until_made(tree, tmp_path / 'store', [True])
    for name, data in before.items():
        name.write_bytes(data)
    prepare.prepare(str(tree), store=str(tmp_path / 'store'), size=24)
    assert files(tmp_path / 'store') == files(tmp_path / 'whole')


@pytest.mark.parametrize('flush', [0.0, 3600.0])
@pytest.mark.parametrize(
    ('gone', 'message'),
    [
        (
            [('train', 'bee', i) for i in range(6)],
            "no training images of class 'bee' are left: 6 of 6 images cannot be decoded: train/bee/0",
        ),
        (
            [('val', 'ape', i) for i in range(2)] + [('val', 'bee', i) for i in range(3)],
            'no images are left in the val split: 5 of 5 images cannot be decoded: val/ape/000.jpg',
        ),
    ],
)
def test_nothing_left_of_a_class_or_split(tree, tmp_path, monkeypatch, gone, message, flush):
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), size=24)
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', flush)
    before = damage(tree, gone)
    with pytest.raises(UserError, match=message):
        prepare.prepare(str(tree), store=str(tmp_path / 'store'), size=24, skip_bad=True)
    assert sorted(os.listdir(tmp_path)) == ['tree', 'whole']
    for name, data in before.items():
        name.write_bytes(data)
    prepare.prepare(str(tree), store=str(tmp_path / 'store'), size=24, skip_bad=True)
    assert files(tmp_path / 'store') == files(tmp_path / 'whole')


def test_a_progress_file_of_an_earlier_version(tree, tmp_path, monkeypatch):
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), size=24, exif='off')
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    monkeypatch.setattr(store_writer, 'cores', lambda: 1)
    monkeypatch.setattr(sources, 'open_source', Killing([9, 100]))
    path = tmp_path / 'store'
    try_until_made(tree, path, [False])
    with np.load(path / 'progress.npz') as arrays:
        old = {name: arrays[name] for name in ('written', 'image', 'products')}
    old['written'] = old['written'][:2]
    np.savez(path / 'progress.npz', **old)
    told = json.loads((path / 'store.json').read_text())
    del told['exif']
    (path / 'store.json').write_text(json.dumps(told))
    prepare.prepare(str(tree), store=str(path), size=24)
    assert files(path) == files(tmp_path / 'whole')
    assert ('train', 0) not in sources.open_source.starts[1:]  # it did resume


# Messages name the flags of the command


def test_training_is_told_the_command_that_skips(tree, tmp_path):
    damage(tree)
    store_ = tmp_path / 'a store'
    with pytest.raises(UserError) as raised:
        prepare.ensure(source=str(tree), store=str(store_), size=24)
    assert str(raised.value).endswith(
        'leave them out with python -m alexnet_jax.prepare '
        f"--source={tree} '--store={store_}' --format=jpg --size=24 --val_fraction=0.1 --skip_bad"
    )


def test_messages_name_the_flags_of_the_caller(tree, tmp_path):
    small = str(fixtures.write_tree(tmp_path / 'small', {'ape': 2, 'bee': 1}))
    path = str(tmp_path / 'store')
    options = {'source': small, 'store': path, 'val_fraction': 0.01}
    for function, flag in ((prepare.prepare, '--'), (prepare.ensure, '--config.data.')):
        with pytest.raises(UserError, match=f'{flag}val_fraction'):
            function(**options)
        with pytest.raises(UserError, match=f'must be between .* {flag}val_fraction=0.1'):
            function(**{**options, 'val_fraction': 2.0})
        with pytest.raises(UserError, match=f"^{flag}exif='yes': choose one of auto, on, off"):
            function(**options, exif='yes')
        with pytest.raises(UserError, match=f'give another {flag}store'):
            function(source=str(tree), store=str(tree))
    with pytest.raises(UserError, match=r'\(--dir\b.*--config=quickstart'):
        prepare.prepare('imagenet2012', dir=path, store=path)
    with pytest.raises(UserError, match=r'\(--config.data.dir\b.*--config=quickstart'):
        prepare.ensure(source='imagenet2012', dir=path, store=path)


# EXIF orientation


@pytest.fixture
def phone(tmp_path):
    """Wide photographs that should appear rotated."""
    tree = fixtures.write_tree(tmp_path / 'phone' / 'train', {'ape': 2, 'bee': 2})
    fixtures.write_tree(tmp_path / 'phone' / 'val', {'ape': 1, 'bee': 1})
    for name in tree.parent.glob('*/*/*.jpg'):
        name.write_bytes(with_exif(fixtures.picture(hash(name) % 99, 60, 40), 6, 'JPEG'))
    return tree.parent


def expected(tree, exif):
    examples = sources.open_source(str(tree)).read('train', 0)
    return np.stack([square(example.data, 24, exif=exif) for example in examples])


@pytest.mark.parametrize(('exif', 'turned'), [('auto', True), ('on', True), ('off', False)])
def test_a_store_records_whether_images_are_turned(phone, tmp_path, exif, turned):
    path, options = str(tmp_path / 'store'), {'format': 'u8', 'size': 24}
    made = prepare.prepare(str(phone), store=path, exif=exif, **options)
    assert (made.pixels('train') == expected(phone, turned)).all()
    assert (made.pixels('train') != expected(phone, not turned)).any()
    assert json.loads((tmp_path / 'store' / 'store.json').read_text())['exif'] is turned
    prepare.ensure(source=str(phone), store=path, **options)
    other = 'off' if turned else 'on'
    with pytest.raises(UserError, match=f'a different store .exif {turned}, not {not turned}.: '):
        prepare.ensure(source=str(phone), store=path, exif=other, **options)


def test_auto_is_off_for_sources_that_say_so(phone, tmp_path, monkeypatch):
    source = sources.open_source(str(phone))
    flat = sources.Source('a set', source.class_names, source.splits, source.read, exif=False)
    monkeypatch.setattr(sources, 'open_source', lambda *args, **kwargs: flat)
    for exif, turned in (('auto', False), ('on', True)):
        path = str(tmp_path / exif)
        made = prepare.prepare('a_set', store=path, format='u8', size=24, exif=exif)
        assert (made.pixels('train') == expected(phone, turned)).all()


def test_a_store_without_the_record_is_not_turned(phone, tmp_path, monkeypatch):
    path, options = tmp_path / 'store', {'format': 'u8', 'size': 24}

    def forget():
        told = json.loads((path / 'store.json').read_text())
        for field in ('exif', 'crc', 'checksum'):
            told.pop(field, None)
        (path / 'store.json').write_text(json.dumps(told))

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, 'finish', lambda *args, **kwargs: exit())
        with pytest.raises(SystemExit):
            prepare.prepare(str(phone), store=str(path), exif='off', **options)
    forget()  # an earlier version began it
    with pytest.raises(UserError, match='a different store .exif False, not True.'):
        prepare.prepare(str(phone), store=str(path), exif='on', **options)
    made = prepare.prepare(str(phone), store=str(path), **options)
    assert (made.pixels('train') == expected(phone, False)).all()
    forget()  # and an earlier version finished it
    for exif in ('auto', 'off'):
        prepare.ensure(source=str(phone), store=str(path), exif=exif, **options)
    with pytest.raises(UserError, match='a different store .exif False, not True.'):
        prepare.ensure(source=str(phone), store=str(path), exif='on', **options)


# Names


@pytest.mark.parametrize(
    ('name', 'shown', 'wrong'),
    [
        (b'caf\xe9', r'caf\\xe9', 'is not valid UTF-8'),
        (b'a\nb', r'a\\nb', 'contains a line break or another control character'),
        (b'\x1b[31mred', r'\\x1b\[31mred', 'contains a line break or another control character'),
        ('a\u2028b'.encode(), r'a\\u2028b', 'contains a line break or another control character'),
        ('a\x85b'.encode(), r'a\\x85b', 'contains a line break or another control character'),
        (b' ', ' ', 'is empty'),
    ],
)
def test_class_names_that_no_list_can_hold(tree, tmp_path, name, shown, wrong):
    for split in ('train', 'val'):
        os.rename(tree / split / 'bee', os.path.join(os.fsencode(tree / split), name))
    with pytest.raises(UserError) as raised:
        prepare.prepare(str(tree), store=str(tmp_path / 'store'), size=24)
    assert os.listdir(tmp_path) == ['tree']
    done = run(f'--source={tree}', '--size=24', f'--store={tmp_path}/store')
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'error: {printable(str(raised.value))}\n'
    assert done.stderr.isascii() and done.stderr[:-1].isprintable()
    text = done.stderr.replace('\\', '\\\\').replace('[', r'\[')
    assert f'"{shown}" {wrong}: rename it' in text


UMLAUTS = ('Käfer', 'Möwe 🐦')


@pytest.mark.full
def test_names_are_utf_8_in_every_locale(tmp_path):
    """Prepared, trained a step and evaluated where Python treats all text as ASCII."""
    tree = tmp_path / 'Bilder für uns'
    fixtures.write_tree(tree, dict.fromkeys(UMLAUTS, 10))
    environment = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONPATH': str(ROOT)}

    def start(*arguments):
        done = subprocess.run(
            [sys.executable, '-m', *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.isascii()
        return done.stdout.decode()

    start('alexnet_jax.prepare', f'--source={tree}', '--size=72')
    path = tmp_path / 'data' / 'Bilder für uns-72-jpg'
    assert (path / 'names.txt').read_text(encoding='utf-8').splitlines() == sorted(UMLAUTS)
    assert store.open_store(path).names == sorted(UMLAUTS)
    start(
        'alexnet_jax.main',
        '--config=quickstart',
        f'--config.data.source={tree}',
        '--config.data.size=72',
        '--config.augment.crop=64',
        '--config.model.width=0.0625',
        '--config.train.batch=9',
        '--config.run.eval_batch=2',
        '--config.optim.drops=()',
        '--config.optim.epochs=0.5',
        '--workdir=run',
    )
    said = start('alexnet_jax.evaluate', 'run', '--per_class', '--batch=2')
    assert 'K\\xe4fer' in said and 'M\\xf6we \\U0001f426' in said
    image = next((tree / UMLAUTS[0]).iterdir())
    said = start('alexnet_jax.predict', 'run', str(image))
    assert '(correct: K\\xe4fer)' in said and 'f\\xfcr uns' in said
    assert (tmp_path / 'run' / 'names.txt').read_bytes() == (path / 'names.txt').read_bytes()


# A realistic folder


def as_16_bit(image):
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) << 8)


def animated(format):
    frames, data = [fixtures.picture(seed) for seed in (1, 2)], io.BytesIO()
    frames[0].save(data, format, save_all=True, append_images=frames[1:])
    return data.getvalue()


def messy() -> tuple[dict[str, bytes], dict[str, bytes], dict[str, tuple[bytes, str]]]:
    """Files by name: images, others, and images that cannot be decoded, with the reason."""
    image = fixtures.picture(7)
    jpeg, png = fixtures.encode(image), fixtures.encode(image, 'PNG')
    web_page = b'<!DOCTYPE html><html><body>404 Not Found</body></html>'
    good = {
        'plain.jpg': jpeg,
        'CAPITALS.JPG': jpeg,
        'a PNG.jpg': png,
        'no suffix': jpeg,
        'with space.jpeg': jpeg,
        'Übung.jpg': jpeg,
        'two\nlines.jpg': jpeg,
        '\x1b[31mred.jpg': jpeg,
        os.fsdecode(b'latin1 \xe4.jpg'): jpeg,
        'cmyk.jpg': fixtures.encode(image.convert('CMYK')),
        'grey.jpg': fixtures.encode(image.convert('L')),
        '16 bits.png': fixtures.encode(as_16_bit(image), 'PNG'),
        '16 bits.tif': fixtures.encode(as_16_bit(image), 'TIFF'),
        'palette.png': fixtures.encode(image.convert('P'), 'PNG'),
        'alpha.png': fixtures.encode(image.convert('RGBA'), 'PNG'),
        'animated.gif': animated('GIF'),
        'animated.webp': animated('WEBP'),
        'one bit.bmp': fixtures.encode(image.convert('1'), 'BMP'),
        'still.avif': fixtures.encode(image, 'AVIF'),
        'sub/folder/deep.jpg': jpeg,
        'more bytes behind.jpg': jpeg + b'trailing',
        **{f'exif {n}.jpg': with_exif(image, n, 'JPEG') for n in range(1, 9)},
    }
    others = {
        'Thumbs.db': b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1' + bytes(500),
        '.DS_Store': b'\0\0\0\1Bud1' + bytes(500),
        '._plain.jpg': b'\0\5\x16\7\0\2\0\0Mac OS X' + bytes(100),
        '__MACOSX/._plain.jpg': b'\0\5\x16\7\0\2\0\0Mac OS X' + bytes(100),
        'desktop.ini': b'[.ShellClassInfo]\r\n',
        'labels.csv': b'file,label\n',
        'readme.txt': b'Photographs of 2019\n',
        'index.html': web_page,
        'live photo.mp4': b'\0\0\0\x18ftypmp42' + bytes(500),
        'live photo.mov': b'\0\0\0\x14ftypqt  ' + bytes(500),
    }
    bad = {
        'truncated.jpg': (jpeg[: len(jpeg) - 99], 'image file is truncated'),
        'truncated.png': (png[: len(png) // 2], 'image file is truncated'),
        'zero bytes.jpg': (b'', 'an empty file'),
        'zeros.jpg': (bytes(5000), 'only zero bytes'),
        'a web page.jpg': (web_page, 'a web page, not an image'),
        'phone.heic': (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99), 'HEIC: pip install '),
        'really HEIC.jpg': (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(99), 'HEIC: pip '),
        'float.tif': (
            fixtures.encode(Image.fromarray(np.ones((9, 9), np.float32)), 'TIFF'),
            'floating-point pixels',
        ),
        'integers.tif': (
            fixtures.encode(Image.fromarray(np.ones((9, 9), np.int32)), 'TIFF'),
            '32-bit integer pixels',
        ),
        'bad\nname \x1b[31m.jpg': (b'\xff\xd8\xff no', 'a kind of JPEG that Pillow cannot read'),
        'text.png': (b'this is no image', 'not an image that Pillow can read'),
    }
    return good, others, bad


def write(folder, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(data)


def test_a_messy_folder_in_one_start(tmp_path):
    good, others, bad = messy()
    assert len(good) + len(others) + len(bad) > 25
    tree = tmp_path / 'my pictures'
    for split in ('train', 'val'):
        write(tree / split / 'ape', good | others | {name: data for name, (data, _) in bad.items()})
        write(tree / split / 'bee', good | others)
    hidden = 'sys.modules["pillow_heif"] = None'
    program = f'import sys; {hidden}; from alexnet_jax import prepare as p; p.command.run(p.main)'
    done = subprocess.run(
        [sys.executable, '-c', program, f'--source={tree}', '--size=24', '--skip_bad']
        + ['--format=u8', f'--store={tmp_path}/store'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert all(line.isprintable() for line in done.stdout.splitlines())
    made = store.open_store(tmp_path / 'store')
    assert made.counts == {'train': 2 * len(good), 'val': 2 * len(good)}
    lines = (tmp_path / 'store' / 'skipped.txt').read_text().splitlines()
    names = {
        f'{s}/ape/{printable(name)}': why for s in made.counts for name, (_, why) in bad.items()
    }
    assert len(lines) == len(names) and all(line.isascii() for line in lines)
    for line in lines:
        name, reason = line.split('\t')
        assert names.pop(name) in reason, line
    assert not names
    # Every image is there, upright and not black.
    plain = square(good['plain.jpg'], 24).astype(int)
    for pixels in made.pixels('train'):
        gray = np.abs(pixels.mean(2) - plain.mean(2)).mean()
        assert min(gray, np.abs(pixels - plain).mean()) < 60
        assert pixels.mean() > 20
