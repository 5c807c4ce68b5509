"""Image sources: folders, TFDS sets, the built-in dataset."""

import collections
import io
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import figures
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import images, prepare, sources
from alexnet_jax.input.sources import shapes, tfds
from alexnet_jax.input.sources.source import class_notes, split_off
from tests.helpers import fixtures


def read(source, split, start=0):
    return list(source.read(split, start))


# Folders


def test_folder_with_val_gives_sorted_files_and_labels_by_sorted_names(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'b': 2, 'a': 3})
    fixtures.write_tree(tmp_path / 'val', {'b': 1, 'a': 1})
    (tmp_path / 'train' / 'a' / '.hidden').write_text('not a picture')
    (tmp_path / 'train' / 'a' / 'deeper').mkdir()
    (tmp_path / 'train' / 'a' / 'deeper' / 'no_suffix').write_bytes(b'data')
    (tmp_path / 'train' / 'a' / 'e.jpg').write_bytes(b'more')
    source = sources.open_source(str(tmp_path))
    assert source.class_names == ['a', 'b']
    assert source.splits == {'train': 7, 'val': 2}
    files = [
        f'{tmp_path}/train/{name}'
        for name in (
            'a/000.jpg',
            'a/001.jpg',
            'a/002.jpg',
            'a/deeper/no_suffix',
            'a/e.jpg',
            'b/000.jpg',
            'b/001.jpg',
        )
    ]
    examples = read(source, 'train')
    assert [example.name for example in examples] == files
    assert [example.label for example in examples] == [0, 0, 0, 0, 0, 1, 1]
    assert examples[3].data == b'data'
    assert read(source, 'train', 4) == examples[4:]


def test_without_val_the_test_split_is_used(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'a': 3, 'b': 2})
    fixtures.write_tree(tmp_path / 'test', {'a': 1, 'b': 1})
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 5, 'val': 2}
    assert all(f'{tmp_path}/test/' in name for name, _, _ in source.read('val', 0))


def tiny_imagenet(root):
    """Writes two classes of three images each in Tiny ImageNet's layout -> the names in val/."""
    for wnid in ('n01', 'n02'):
        fixtures.write_tree(root / 'train' / wnid, {'images': 3})
        (root / 'train' / wnid / f'{wnid}_boxes.txt').write_text('not a picture')
    fixtures.write_tree(root / 'val', {'images': 2})
    names = sorted(path.name for path in (root / 'val/images').iterdir())
    lines = [
        f'{name}\t{wnid}\t0\t0\t9\t9\n' for name, wnid in zip(names, ('n02', 'n01'), strict=True)
    ]
    (root / 'val/val_annotations.txt').write_text(''.join(lines))
    return names


def test_tiny_imagenet(tmp_path):
    names = tiny_imagenet(tmp_path)
    source = sources.open_source(str(tmp_path))
    assert (source.class_names, source.splits) == (['n01', 'n02'], {'train': 6, 'val': 2})
    assert [(Path(n).name, label) for n, _, label in source.read('val', 0)] == [
        (names[0], 1),
        (names[1], 0),
    ]
    pictures = [*source.read('train', 0)]
    assert not [name for name, *_ in pictures if name.endswith('.txt')]
    for name, _, label in pictures:  # in CLASS/images
        assert figures.label_of(name, source.class_names) == label
    for listed, complaint in (
        (f'{names[0]}\tn03\t0\n', 'val: has no images of the classes'),
        (f'{names[0]} n01\n', 'val_annotations.txt: every line must be'),
        (
            f'{names[0]}\tn01\nx\tn01\ny\tn02\n',
            'txt: 2 of 3 images listed in it are not in .*val/images',
        ),
        ('\udcff\n', 'val_annotations.txt: not UTF-8'),
    ):
        data = listed.encode('utf-8', 'surrogateescape')
        (tmp_path / 'val/val_annotations.txt').write_bytes(data)
        with pytest.raises(UserError, match=complaint):
            sources.open_source(str(tmp_path))


def test_some_classes_of_tiny_imagenet(tmp_path):
    names = tiny_imagenet(tmp_path)
    with open(tmp_path / 'val/val_annotations.txt', 'a') as file:
        file.write(f'{names[0]}\tn03\t0\n')
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 6, 'val': 2} and source.class_names == ['n01', 'n02']


@pytest.mark.parametrize(
    'train, val, test',
    [('Train', 'Valid', 'Test'), ('training', 'validation', 'testing'), ('TRAIN', 'dev', 'TEST')],
)
def test_split_folders_under_any_name(tmp_path, train, val, test):
    for name, count in ((train, 3), (val, 2), (test, 1)):
        fixtures.write_tree(tmp_path / name, {'a': count, 'b': count})
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 6, 'val': 4, 'test': 2}
    assert all(f'/{val}/' in example.name for example in read(source, 'val'))
    assert all(f'/{test}/' in example.name for example in read(source, 'test'))
    assert not source.notes
    shutil.rmtree(tmp_path / val)
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 6, 'val': 2}
    assert source.validation == f'{test}/' and not source.notes


def test_a_test_split_without_labels_is_not_used(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'a': 10, 'b': 10})
    fixtures.write_tree(tmp_path, {'test': 3})
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 18, 'val': 2}
    assert source.notes[0].startswith('test/ is not used: it has no class folders')


def test_folders_beside_the_splits(tmp_path):
    for name in ('train', 'val'):
        fixtures.write_tree(tmp_path / name, {'a': 2, 'b': 2})
    (tmp_path / 'labels').mkdir()
    assert sources.open_source(str(tmp_path)).notes == ('not used: labels/',)


def test_files_that_are_not_images_are_skipped_and_counted(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'a': 20, 'b': 20})
    a = tmp_path / 'train/a'
    others = {
        '.txt': ('notes.txt', 'LICENSE.TXT', 'a_boxes.txt'),
        '.mp4': ('live.mp4', 'IMG_1.MP4'),
        'Thumbs.db': ('Thumbs.db',),
        '._ file': ('._000.jpg',),
        '.html': ('index.html',),
        '.csv': ('labels.csv',),
        '.DS_Store': ('.DS_Store',),
        'hidden file': ('.gitkeep',),
        'desktop.ini': ('desktop.ini',),
    }
    for name in (name for names in others.values() for name in names):
        (a / name).write_bytes(b'x')
    (a / '__MACOSX').mkdir()
    (a / '__MACOSX/001.jpg').write_bytes(b'x')
    (a / 'gone.jpg').symlink_to(a / 'nothing')
    (a / 'up').symlink_to(tmp_path / 'train/a')  # a circle
    os.mkfifo(a / 'pipe.jpg')
    (tmp_path / 'train/stray.jpg').write_bytes(b'x')
    for tried in ('photo.weird', 'no_extension', 'x.HEIC'):
        (a / tried).write_bytes(b'x')
    source = sources.open_source(str(tmp_path))
    assert sum(source.splits.values()) == 43
    loose, skipped = source.notes
    assert loose == f'not used (in {tmp_path}/train, but in no class folder): stray.jpg'
    counts = {kind: len(names) for kind, names in others.items()}
    counts |= {'__MACOSX/': 1, 'broken link': 1, 'special file': 1}
    start, _, listed = skipped.partition(' skipped: ')
    assert start == f'{sum(counts.values())} files that are not images'
    kinds = (part.split(' ', 1) for part in listed.split(', '))
    assert {kind: int(count) for count, kind in kinds} == counts


def test_fingerprints_see_what_changed(tmp_path):
    fixtures.write_tree(tmp_path, {'a': 10, 'b': 10})

    def files():
        return sources.open_source(str(tmp_path)).files

    first = files()
    assert first[0] == 20 and files() == first
    (tmp_path / 'a/notes.txt').write_text('not an image')
    assert files() == first
    (tmp_path / 'a/000.jpg').rename(tmp_path / 'a/x.jpg')
    renamed = files()
    assert renamed[0] == 20 and renamed != first
    (tmp_path / 'a/x.jpg').rename(tmp_path / 'a/000.jpg')
    assert files() == first
    with open(tmp_path / 'a/000.jpg', 'ab') as file:
        file.write(b'x')
    assert files() != first
    (tmp_path / 'a/000.jpg').unlink()
    assert files()[0] == 19
    shutil.copytree(tmp_path, tmp_path.with_name('moved'))
    assert sources.open_source(str(tmp_path.with_name('moved'))).files == files()


def test_links_are_never_read_twice_and_never_end(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'a': 10, 'b': 10})
    for name, to in (('train/a/up', tmp_path), ('train/b/tree', '..'), ('train/root', tmp_path)):
        (tmp_path / name).symlink_to(to)
    for name in ('self', 'train/self', 'train/a/self'):
        (tmp_path / name).symlink_to('self')
    assert not sources.is_large(str(tmp_path), pictures=1)
    source = sources.open_source(str(tmp_path))
    assert source.splits == {'train': 18, 'val': 2} and source.class_names == ['a', 'b']
    assert '2 broken link' in source.notes[0] and '1 link to a folder above' in source.notes[0]


def test_pictures_in_no_class_folder_are_named(tmp_path):
    for split in ('train', 'val'):
        fixtures.write_tree(tmp_path / split, {'a': 2, 'b': 2, '@eaDir': 1, '$RECYCLE.BIN': 1})
        (tmp_path / split / 'loose.jpg').touch()
    (tmp_path / 'beside.jpg').touch()
    source = sources.open_source(str(tmp_path))
    assert source.class_names == ['a', 'b']
    assert source.notes[:3] == tuple(
        f'not used (in {folder}, but in no class folder): {name}'
        for folder, name in (
            (tmp_path, 'beside.jpg'),
            (tmp_path / 'train', 'loose.jpg'),
            (tmp_path / 'val', 'loose.jpg'),
        )
    )
    assert '2 @eaDir/' in source.notes[3] and '2 $RECYCLE.BIN/' in source.notes[3]


def test_content_sees_names_labels_and_order_but_no_sizes(tmp_path):
    fixtures.write_tree(tmp_path / 'x', {'a': 10, 'b': 10})

    def content(root=tmp_path / 'x', **options):
        return sources.open_source(str(root), **options).content

    first = content()
    with open(tmp_path / 'x/a/000.jpg', 'ab') as file:
        file.write(b'x')
    assert content() == first
    assert content(seed=1) != first
    shutil.copytree(tmp_path / 'x', tmp_path / 'y')
    assert content(tmp_path / 'y') == first
    (tmp_path / 'x/a').rename(tmp_path / 'x/c')
    renamed = content()
    assert renamed != first
    lines = [f'y/{name}/00{i}.jpg,{name}\n' for name in 'ab' for i in range(10)]
    (tmp_path / 'list.csv').write_text(''.join(lines))
    listed = content(tmp_path / 'list.csv')
    lines[0] = lines[0].replace(',a', ',b')
    (tmp_path / 'list.csv').write_text(''.join(lines))
    assert content(tmp_path / 'list.csv') != listed


def test_every_class_keeps_a_training_image(tmp_path):
    labels = [0] * 20 + [1] * 2 + [2]
    fixtures.write_tree(tmp_path, {name: labels.count(i) for i, name in enumerate('abc')})
    for seed in range(40):
        source = sources.open_source(str(tmp_path), val_fraction=0.5, seed=seed)
        found = {s: [e.label for e in source.read(s, 0)] for s in source.splits}
        assert 1 in found['train'] and sum(source.splits.values()) == 23
        where = 'train' if 2 in found['train'] else 'val'
        assert source.notes == (f'1 class has a single image, which is in {where}: c',)


@pytest.mark.parametrize('fraction', [0.1, 0.25, 0.5, 0.9])
def test_every_class_gives_its_share(fraction):
    sizes = np.array([40, 10, 7, 3, 2, 1])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), sizes))
    for seed in range(20):
        split = split_off(63, fraction, seed, '', labels)
        assert sorted([*split['train'], *split['val']]) == list(range(63))
        held = np.bincount(labels[split['val']], minlength=6)
        assert (np.abs(held - fraction * sizes) <= 1).all() and (held[:5] < sizes[:5]).all()
        if fraction < 0.9:  # there, a class of two keeps one
            assert len(split['val']) == round(63 * fraction)
    balanced = np.repeat(np.arange(20), 15)  # half of the classes give two, and not always the same
    held = [np.bincount(balanced[split_off(300, 0.1, s, '', balanced)['val']]) for s in (0, 1)]
    assert {*held[0]} == {*held[1]} == {1, 2} and held[0].tolist() != held[1].tolist()
    first, second = (split_off(63, fraction, seed, '', labels)['val'] for seed in (0, 1))
    assert first.tolist() != second.tolist()
    last = split_off(20, 0.25, 0, '', [0] * 16 + [1, 2, 3, 4])  # of 4.0 and four shares of 0.25
    assert (last['val'] < 16).all()
    plain = split_off(63, fraction, 0, '')  # of unknown labels: any
    assert len(plain['val']) == round(63 * fraction)


def test_an_incomplete_imagenet_is_noted():
    names = [f'n{i:08}' for i in range(1000)]
    whole = np.arange(1_281_167) % 1000, np.arange(50_000) % 1000
    few = {'train': np.arange(13_000) % 1000, 'val': whole[1]}
    both = dict(zip(('train', 'val'), whole, strict=True))
    held_out = {'train': whole[0][:-50_000], 'val': whole[0][-50_000:]}
    older, other_val = {**both, 'train': whole[0][:1_261_406]}, {**both, 'val': whole[1][:10_000]}
    more = {**both, 'train': np.append(whole[0], 0)}
    for labels in (both, {'train': whole[0]}, held_out, older, other_val, few, more):
        assert not class_notes(names, labels)
    (note,) = class_notes(names, {'train': whole[0], 'val': whole[1][:-1]})
    assert (
        'it is incomplete: 1,000 classes, 1,281,167 training and 49,999 validation images' in note
    )
    assert class_notes(names, {**both, 'train': whole[0][1:]})
    assert not class_notes([f'class {i}' for i in range(1000)], {'train': whole[0][1:]})
    labels = {split: x[x != 999] for split, x in zip(('train', 'val'), whole, strict=True)}
    assert 'it is incomplete: 999 classes' in class_notes(names[:-1], labels)[0]


def test_labels_of_val_are_those_of_train_where_a_class_has_no_pictures(tmp_path):
    fixtures.write_tree(tmp_path / 'train', {'a': 2, 'b': 2, 'c': 2})
    fixtures.write_tree(tmp_path / 'val', {'a': 1, 'c': 1})
    source = sources.open_source(str(tmp_path))
    assert [example.label for example in source.read('val', 0)] == [0, 2]


@pytest.mark.parametrize('tree', ['.', 'train'])
def test_folder_without_val_holds_out_a_seeded_fraction(tmp_path, tree):
    fixtures.write_tree(tmp_path / tree, {'a': 12, 'b': 8})

    def names(split, seed):
        source = sources.open_source(str(tmp_path), val_fraction=0.25, seed=seed)
        assert source.splits == {'train': 15, 'val': 5}
        return [example.name for example in source.read(split, 0)]

    train, val = names('train', 0), names('val', 0)
    assert sorted(train + val) == sorted(str(file) for file in tmp_path.rglob('*.jpg'))
    assert names('val', 0) == val
    assert names('val', 1) != val


def empty_class(root):
    fixtures.write_tree(root / 'train', {'a': 2, 'b': 2, 'nothing': 0})


def empty_val_class(root):
    fixtures.write_tree(root / 'train', {'a': 2, 'b': 2})
    fixtures.write_tree(root / 'val', {'a': 2, 'nothing': 0})


def unknown_val_class(root):
    fixtures.write_tree(root / 'train', {'a': 2, 'b': 2})
    fixtures.write_tree(root / 'val', {'a': 2, 'stranger': 2})


def one_class(root):
    fixtures.write_tree(root, {'a': 2})


def val_alone(root):
    fixtures.write_tree(root / 'val', {'a': 2, 'b': 2})


def val_and_test(root):
    for name in ('val', 'test'):
        fixtures.write_tree(root / name, {'a': 2, 'b': 2})


def classes_and_test(root):
    fixtures.write_tree(root, {'a': 2, 'b': 2, 'test': 2})


def two_names(root):
    for name in ('train', 'val', 'valid'):
        fixtures.write_tree(root / name, {'a': 2, 'b': 2})


def class_beside_train(root):
    fixtures.write_tree(root / 'train', {'a': 2, 'b': 2})
    fixtures.write_tree(root, {'c': 2})


def only_text(root):
    fixtures.write_tree(root / 'train', {'a': 2, 'b': 2, 'c': 0})
    (root / 'train/c/notes.txt').write_text('x')


def archive(root):
    root.rmdir()
    root.write_bytes(b'PK')


def wrapped(root):
    fixtures.write_tree(root / 'flowers', {'a': 2, 'b': 2})


def too_few(root):
    fixtures.write_tree(root, {'a': 2, 'b': 2})


def data_sets(root):
    fixtures.write_tree(root / 'cifar/train', {'a': 2, 'b': 2})
    fixtures.write_tree(root, {'alone': 2, 'empty': 0})


def almost_splits(root):
    fixtures.write_tree(root / 'train_images', {'a': 2, 'b': 2})
    fixtures.write_tree(root / 'valid_images', {'a': 2, 'b': 2})


def split_inside(root):
    fixtures.write_tree(root / 'flowers/train', {'a': 2, 'b': 2})


def flat(root):
    root.rmdir()
    fixtures.write_tree(root.parent, {root.name: 3})


def flat_class(root):
    fixtures.write_tree(root, {'a': 2, 'b': 2})
    return root / 'a'


def flat_with_list(root):
    root.rmdir()
    fixtures.write_tree(root.parent, {root.name: 3})
    (root / 'list.csv').touch()


def packed(root):
    (root / 'flowers.TAR').touch()


def circle(root):
    fixtures.write_tree(root, {'a': 2})
    (root / 'self').symlink_to('self')
    (root / 'up').symlink_to('..')


def nothing(root):
    root.rmdir()


@pytest.mark.parametrize(
    'make, message',
    [
        (empty_class, 'train/nothing: the class folder is empty'),
        (empty_val_class, 'val/nothing: this class has no folder in train/'),
        (unknown_val_class, 'val/stranger: this class has no folder in train/'),
        (one_class, 'at least two class folders, found 1'),
        (val_alone, 'has val/ but no train/'),
        (val_and_test, 'has test/ and val/ but no train/'),
        (classes_and_test, 'has test/ beside a/... but no train/'),
        (two_names, 'val/ and valid/ mean the same split'),
        (class_beside_train, 'c/ has images and is beside train/'),
        (only_text, 'train/c: the class folder is empty but for files that are not images \\(1\\)'),
        (archive, 'give a folder \\(unpack archives first\\), or a .csv or .tsv list'),
        (wrapped, 'found 1 \\(give .*/root/flowers, which has 2\\)'),
        (too_few, 'val_fraction 0.1 of the 4 images'),
        (nothing, 'no such folder'),
        (
            data_sets,
            'root: cifar/ has train/ of its own: .* folder of datasets: give .*/root/cifar,',
        ),
        (
            almost_splits,
            'root: train_images/ and valid_images/ do not look like classes: rename',
        ),
        (split_inside, 'give .*/root/flowers, which has 1'),
        (
            flat,
            'found 0, but 3 images directly in it: sort them into CLASS/ folders, or give a list',
        ),
        (flat_class, 'found 0, but 2 images directly in it: .*, or give .*/root, or give a list'),
        (flat_with_list, 'found 0, but the list list.csv: give .*/root/list.csv$'),
        (packed, 'found 0, but the archive flowers.TAR: unpack it$'),
        (circle, 'at least two class folders, found 1'),
    ],
)
def test_folder_errors(tmp_path, make, message):
    root = tmp_path / 'root'
    root.mkdir()
    root = make(root) or root
    with pytest.raises(UserError, match=message):
        sources.open_source(str(root))


@pytest.mark.parametrize(
    'name, path',
    [
        ('here', True),
        ('sub/here', True),
        ('.', True),
        ('/not/there', True),
        ('./gone', True),
        ('../gone', True),
        ('~/gone', True),
        ('imagenet_resized/32x32', False),
        ('sub/gone', False),
        ('mnist', False),
        ('list.csv', True),
        ('gone', False),
    ],
)
def test_what_is_a_path(tmp_path, monkeypatch, name, path):
    monkeypatch.chdir(tmp_path)
    for made in ('here', 'sub/here'):
        (tmp_path / made).mkdir(parents=True)
    for made in ('mnist', 'list.csv'):  # the first is a TFDS name
        (tmp_path / made).touch()
    assert sources.is_path(name) == path


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    fixtures.write_tree(tmp_path / 'flowers', {'a': 5, 'b': 5})
    source = sources.open_source('~/flowers')
    assert source.class_names == ['a', 'b']
    assert read(source, 'val')[0].name.startswith(f'{tmp_path}/flowers/')
    with pytest.raises(UserError, match=f'^{tmp_path}/gone: no such folder$'):
        sources.open_source('~/gone')


# The built-in dataset


def test_figures_are_a_function_of_their_place_and_balanced():
    pictures = [shapes.render(1, 0, index) for index in range(40)]
    assert shapes.render(1, 0, 17) == pictures[17]
    assert shapes.render(2, 0, 17)[0] != pictures[17][0]
    assert shapes.render(1, 1, 17)[0] != pictures[17][0]
    assert set(collections.Counter(label for _, label, _ in pictures).values()) == {4}
    sizes = {Image.open(io.BytesIO(data)).size for data, _, _ in pictures}
    assert len(sizes) == 40
    assert all(shapes.SHORTER_SIDE[0] <= min(size) <= shapes.SHORTER_SIDE[1] for size in sizes)


@pytest.mark.parametrize('label', range(10))
def test_figure_fills_the_same_box_whatever_its_class(label):
    mask, box = shapes._mask(np.random.default_rng(5), label, 120, 150)
    _, first = shapes._mask(np.random.default_rng(5), 0, 120, 150)
    assert box == first
    y, x = np.nonzero(mask[:, :, 0] > 0.1)
    assert np.abs(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).max() < 2.5
    assert 15 <= box[0] and box[2] <= 135  # inside the central square


@pytest.fixture
def small_built_in(monkeypatch):
    def make(**splits):
        monkeypatch.setattr(shapes, 'SPLITS', splits)

    return make


def test_built_in_dataset_goes_through_tfds(tmp_path, small_built_in):
    small_built_in(train=(0, 30), validation=(1, 20))
    source = sources.open_source('alexnet_shapes', data_dir=str(tmp_path))
    assert source.class_names == shapes.NAMES
    assert source.splits == {'train': 30, 'val': 20}
    for split, number in (('train', 0), ('val', 1)):
        examples = read(source, split)
        rendered = [shapes.render(shapes.SEED, number, i) for i in range(source.splits[split])]
        assert {(example.data, example.label) for example in examples} == {
            (data, label) for data, label, _ in rendered
        }
        assert read(source, split, 13) == examples[13:]


def test_tfds_set_without_validation_holds_out_a_fraction(tmp_path, small_built_in):
    small_built_in(train=(0, 20))
    source = sources.open_source('alexnet_shapes', data_dir=str(tmp_path), val_fraction=0.3)
    assert source.splits == {'train': 14, 'val': 6}
    train, val = read(source, 'train'), read(source, 'val')
    assert len({example.data for example in train + val}) == 20
    assert read(source, 'train', 9) == train[9:]
    assert read(source, 'val', 6) == []


def refused(name, root):
    with pytest.raises(UserError) as caught:
        list(sources.open_source(name, data_dir=str(root)).read('train', 0))
    message = str(caught.value)
    assert message.startswith(f'{name}: ') and '\n' not in message
    return message


def test_no_source():
    with pytest.raises(UserError, match='^no images: name their folder or dataset'):
        sources.open_source('')


@pytest.mark.parametrize('name', ['no_such_set', 'sub/gone', 'sub/deep/gone', 'gone/', 'a b/c'])
def test_neither_a_folder_nor_a_tfds_name(tmp_path, name):
    message = refused(name, tmp_path)
    assert 'neither a folder nor a TFDS set: give an existing folder, or a name' in message
    assert not list(tmp_path.iterdir())


def test_a_link_to_nothing(tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to(tmp_path / 'gone')
    monkeypatch.chdir(tmp_path)
    for name in ('link', './link/deep', str(tmp_path / 'link')):
        with pytest.raises(UserError, match='link is a link to .*gone, which does not exist'):
            sources.open_source(name)
    with pytest.raises(UserError, match='--store=link/s: .*link is a link to .*gone'):
        prepare.prepare('flowers', store='link/s')


@pytest.mark.parametrize(
    'name, cause',
    [
        ('imagenet_resized/33x33', 'BuilderConfig 33x33 not found'),
        ('mnist:9.9.9', 'only: 3.0.1'),
        ('huggingface:foo', 'ModuleNotFoundError: '),
    ],
)
def test_tfds_sets_that_do_not_open(tmp_path, name, cause):
    assert cause in refused(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['no_such_set', 'sub/gone'])
def test_names_on_a_machine_without_tensorflow(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    message = refused(name, tmp_path)
    assert 'neither a folder nor a TFDS set' in message
    assert 'needs TensorFlow' in refused('mnist', tmp_path)


def test_a_tfds_name_with_a_config():
    builder = tfds._builder('imagenet_resized/32x32', '/not/there')
    assert builder.info.full_name.startswith('imagenet_resized/32x32/')


def failures():
    from tensorflow_datasets.core.download import download_manager, extractor, util

    kinds = (
        download_manager.NonMatchingChecksumError,
        util.DownloadError,
        extractor.ExtractError,
        ImportError,
    )
    return [kind('two\nlines') for kind in kinds]


@pytest.mark.parametrize('number', range(4))
def test_tfds_sets_that_cannot_be_built(tmp_path, monkeypatch, number):
    from tensorflow_datasets.core import dataset_builder

    failure = failures()[number]

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(dataset_builder.DatasetBuilder, 'download_and_prepare', fail)
    message = refused('mnist', tmp_path)
    assert f'could not build it in {tmp_path} ({type(failure).__name__}: two lines): ' in message


def test_damaged_tfds_records(tmp_path, small_built_in):
    small_built_in(train=(0, 30), validation=(1, 20))
    sources.open_source('alexnet_shapes', data_dir=str(tmp_path))
    for file in tmp_path.rglob('*train.tfrecord*'):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    message = refused('alexnet_shapes', tmp_path)
    assert f'cannot be read from {tmp_path}/alexnet_shapes' in message
    assert 'DataLossError: ' in message and 'remove this folder' in message


@pytest.mark.parametrize(
    'name, pictures, large',
    [
        ('places365_small', 200_000, True),  # a download of 31 GB
        ('food101', 200_000, False),  # 5 GB
        ('alexnet_shapes', 10, False),  # nothing to download
    ],
)
def test_large_tfds_sets_are_known_by_their_download(tmp_path, name, pictures, large):
    assert sources.is_large(name, data_dir=str(tmp_path), pictures=pictures) == large
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'prepared, counts, large',
    [
        (False, {'train': 60, 'validation': 20, 'test': 19, 'extra': 50}, False),  # 99 are read
        (False, {'train': 60, 'test': 40, 'extra': 500}, True),
        (False, {'train': 99, 'extra': 500}, False),
        (False, {'train': 100}, True),
        (True, {'train': 100}, False),  # nothing to build: counted on opening
    ],
)
def test_known_counts_decide_before_the_download(monkeypatch, prepared, counts, large):
    splits = {name: types.SimpleNamespace(num_examples=count) for name, count in counts.items()}
    builder = types.SimpleNamespace(
        is_prepared=lambda: prepared, info=types.SimpleNamespace(splits=splits), url_infos=None
    )
    monkeypatch.setattr(tfds, '_builder', lambda name, root: builder)
    assert sources.is_large('made_up', pictures=100) == large


def make_builder(shape, dtype):
    """A TFDS set with an image per label, all of its pixels 50 times the label."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class MadeUp(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.0.0')

            def _info(self):
                features = {
                    'image': tfds.features.Image(shape=shape, dtype=dtype, encoding_format='png'),
                    'label': tfds.features.ClassLabel(num_classes=5),
                }
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=('image', 'label'),
                )

            def _split_generators(self, dl_manager):
                return {'train': self._generate_examples(), 'test': self._generate_examples()}

            def _generate_examples(self):
                for number in range(5):
                    yield number, {'image': np.full(shape, 50 * number, dtype), 'label': number}

    return MadeUp


@pytest.mark.parametrize('channels, dtype', [(1, np.uint8), (3, np.uint8), (1, np.float32)])
def test_tfds_sets_of_other_kinds_of_images(tmp_path, monkeypatch, channels, dtype):
    made = make_builder((8, 8, channels), dtype)(data_dir=str(tmp_path))
    monkeypatch.setattr(tfds, '_builder', lambda name, root: made)
    if dtype == np.float32:
        assert 'its images are float32' in refused('made_up', tmp_path)
        return
    source = sources.open_source('made_up', data_dir=str(tmp_path))
    assert source.validation == 'the test split'
    for example in source.read('val', 0):
        assert (images.square(example.data, 4) == 50 * example.label).all()


# ImageNet


def test_missing_imagenet_says_which_files_go_where(tmp_path):
    with pytest.raises(UserError) as caught:
        sources.open_source('imagenet2012', data_dir=str(tmp_path))
    for part in (
        'put ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB)',
        f'into {tmp_path}, ',
        '--config=quickstart',
    ):
        assert part in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
