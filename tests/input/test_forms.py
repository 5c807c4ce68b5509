"""Parquet, WebDataset and list sources: the same records as a folder of the same images, and errors.

Layouts: huggingface.co/docs/datasets (Image and ClassLabel features, in the schema's metadata of files
such as data/train-00000-of-00002.parquet), github.com/webdataset/webdataset (KEY.jpg and KEY.cls), and
huggingface.co/clip-benchmark (train/0.tar, test/0.tar, classnames.txt).
"""

import gzip
import io
import json
import os
import sys
import tarfile
import types

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare, sources
from tests.helpers import fixtures

NAMES = ['cat', 'dog', 'eel']


@pytest.fixture
def tree(tmp_path):
    """A folder of class folders, train/ and val/."""
    for seed, (split, count) in enumerate((('train', 5), ('val', 2))):
        fixtures.write_tree(tmp_path / 'tree' / split, dict.fromkeys(NAMES, count), seed=seed * 40)
    return tmp_path / 'tree'


def examples(tree, split):
    return list(sources.open_source(str(tree)).read(split, 0))


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        sources.open_source(str(source), **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# Writers of each form, from the folder


def write_parquet(path, rows, *, features=None, image='image', label='label', kind=dict, group=4):
    """Writes (data, label)s, as `datasets.Dataset.to_parquet` does, in groups of four rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [
        {'bytes': data, 'path': f'{number}.jpg'} if kind is dict else data
        for number, (data, _) in enumerate(rows)
    ]
    table = pa.table({'id': [0.5] * len(rows), image: images, label: [y for _, y in rows]})
    if features:
        metadata = {'huggingface': json.dumps({'info': {'features': features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


FEATURES = {
    'id': {'dtype': 'float64', '_type': 'Value'},
    'image': {'_type': 'Image'},
    'label': {'names': NAMES, '_type': 'ClassLabel'},
}


def rows_of(tree, split):
    return [(example.data, example.label) for example in examples(tree, split)]


def to_parquet(tree, root):
    train, val = rows_of(tree, 'train'), rows_of(tree, 'val')
    for number, part in enumerate((train[:7], train[7:])):
        name = f'data/train-{number:05}-of-00002.parquet'
        write_parquet(root / name, part, features=FEATURES)
    write_parquet(root / 'data/validation-00000-of-00001.parquet', val, features=FEATURES)
    write_parquet(
        root / 'data/test-00000-of-00001.parquet', [(val[0][0], -1)] * 2, features=FEATURES
    )
    return root


def write_shard(path, rows, start=0, kinds=('jpg', 'cls', 'json')):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for number, (data, label) in enumerate(rows, start):
            parts = {'jpg': data, 'cls': str(label).encode(), 'json': b'{}'}
            for kind in kinds:
                entry = tarfile.TarInfo(f'{number:06}.{kind}')
                entry.size = len(parts[kind])
                tar.addfile(entry, io.BytesIO(parts[kind]))


def to_webdataset(tree, root):
    train = rows_of(tree, 'train')
    write_shard(root / 'set-train-0000.tar', train[:7])
    write_shard(root / 'set-train-0001.tar', train[7:])
    write_shard(root / 'set-validation-0000.tar', rows_of(tree, 'val'))
    (root / 'classnames.txt').write_text(''.join(f'{name}\n' for name in NAMES))
    return root


def to_list(tree, root):
    """Lines in no particular order, images elsewhere, columns ordered by the header."""
    root.mkdir()
    lines = [
        f'{NAMES[example.label]},{split},"{os.path.relpath(example.name, root)}"\n'
        for split in ('train', 'val')
        for example in examples(tree, split)
    ]
    np.random.default_rng(0).shuffle(lines)
    (root / 'images.csv').write_text('label,split,path\n' + ''.join(lines))
    return root / 'images.csv'


@pytest.mark.parametrize('write', [to_parquet, to_webdataset, to_list])
def test_forms_give_the_store_of_the_folder(tree, tmp_path, write):
    made = write(tree, tmp_path / 'other')
    stores = []
    for number, source in enumerate((tree, made)):
        store = tmp_path / f'store{number}'
        prepare.prepare(str(source), store=str(store), size=16)
        stores.append({path.name: path.read_bytes() for path in store.iterdir()})
        stores[-1].pop('store.json')
    assert stores[0] == stores[1] and len(stores[0]) > 8


@pytest.mark.parametrize('write', [to_parquet, to_webdataset, to_list])
@pytest.mark.parametrize('held_out', [False, True])
def test_reading_from_the_middle(tree, tmp_path, write, held_out):
    made = write(tree, tmp_path / 'other')
    if held_out:
        for path in (tmp_path / 'other').rglob('*'):
            if 'val' in path.name or 'test' in path.name:
                path.unlink()
        if made.suffix:
            made.write_text(made.read_text().replace('val,"', 'train,"'))
    source = sources.open_source(str(made), val_fraction=0.3)
    assert source.files[0] == sum(source.splits.values()) and source.exif
    for split, count in source.splits.items():
        whole = list(source.read(split, 0))
        assert len(whole) == count
        for start in range(count + 1):
            assert list(source.read(split, start)) == whole[start:]


# Parquet


def test_parquet_test_without_labels_is_named(tree, tmp_path):
    source = sources.open_source(str(to_parquet(tree, tmp_path / 'set')))
    assert source.notes == ('the test split is not used: it has no labels',)
    (tmp_path / 'set/data/validation-00000-of-00001.parquet').unlink()
    source = sources.open_source(str(tmp_path / 'set'), val_fraction=0.2)
    assert source.splits == {'train': 12, 'val': 3}


@pytest.mark.parametrize(
    'names',
    [
        ('train.parquet', 'test.parquet'),
        ('plain_text/train-00000-of-00001.parquet', 'plain_text/test-00000-of-00001.parquet'),
        ('default/train/0000.parquet', 'default/test/0000.parquet'),  # as the Hub converts sets
        ('train/0000.parquet', 'test/0000.parquet'),
    ],
)
def test_parquet_validates_on_test_under_any_layout(tree, tmp_path, names):
    for name, split in zip(names, ('train', 'val'), strict=True):
        write_parquet(tmp_path / 'set' / name, rows_of(tree, split), features=FEATURES)
    source = sources.open_source(str(tmp_path / 'set'))
    assert source.splits == {'train': 15, 'val': 6} and source.class_names == NAMES
    assert source.validation == 'the test split' and not source.notes


def test_parquet_without_metadata(tree, tmp_path):
    rows = rows_of(tree, 'train')
    write_parquet(tmp_path / 'numbers/part-0.parquet', rows, image='x', label='y', kind=bytes)
    source = sources.open_source(str(tmp_path / 'numbers'))
    assert source.class_names == ['0', '1', '2'] and source.splits == {'train': 13, 'val': 2}
    texts = [(data, NAMES[label]) for data, label in rows]
    write_parquet(tmp_path / 'texts/train.parquet', texts, label='breed')
    write_parquet(tmp_path / 'texts/val.parquet', texts[-3:], label='breed')
    source = sources.open_source(str(tmp_path / 'texts'))
    assert source.class_names == NAMES
    assert [(e.data, e.label) for e in source.read('train', 0)] == rows


def test_parquet_with_two_columns_of_labels(tree, tmp_path):
    features = FEATURES | {
        'label': {'names': NAMES, '_type': 'ClassLabel'},
        'coarse': {'names': ['x'], '_type': 'ClassLabel'},
    }
    path = tmp_path / 'set/train.parquet'
    write_parquet(path, rows_of(tree, 'train'), features=features)
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.append_column('coarse', [[0] * len(table)]), path)
    source = sources.open_source(str(tmp_path / 'set'))
    assert source.class_names == NAMES
    assert source.notes == ("labels come from the column 'label', not coarse",)


def test_parquet_reads_only_the_row_groups_it_needs(tree, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    source = sources.open_source(str(to_parquet(tree, tmp_path / 'set')))
    read, groups = pq.ParquetFile.iter_batches, []

    def spy(self, *args, row_groups, **options):
        groups.append(row_groups)
        return read(self, *args, row_groups=row_groups, **options)

    monkeypatch.setattr(pq.ParquetFile, 'iter_batches', spy)
    assert len(list(source.read('train', 12))) == 3
    assert groups == [[1]]  # of the second file: groups of 4 rows after 7


def test_what_is_wrong_with_parquet(tree, tmp_path):
    rows = rows_of(tree, 'train')
    path = tmp_path / 'set/train.parquet'
    write_parquet(path, [*rows, (rows[0][0], 3), (rows[0][0], -1)], features=FEATURES)
    assert f'{path}: rows with labels outside the 3 classes: 2; the first is row 15' in (
        refused(path.parent)
    )
    write_parquet(path, rows, label='a')
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.append_column('b', [[0] * len(table)]), path)
    assert 'which column has the labels? It has id, image, a, b' in refused(path.parent)
    pq.write_table(table.drop(['image']), path)
    assert 'which column has the images? It has id, a' in refused(path.parent)
    write_parquet(path, [(None, 0), *rows], features=FEATURES)
    source = sources.open_source(str(path.parent))
    first = [e for split in source.splits for e in source.read(split, 0) if ': row 0 ' in e.name]
    assert [e.data for e in first] == [b'']  # a bad image, not the end of the pass
    path.write_bytes(path.read_bytes()[:-30])
    assert f'{path}: cannot be read as Parquet' in refused(path.parent)
    path.rename(path.with_name('other-1.parquet'))
    write_parquet(path, rows)
    assert 'other-1.parquet: its name does not say to which split' in refused(path.parent)
    path.unlink()
    path.with_name('other-1.parquet').rename(path.with_name('val.parquet'))
    assert 'Parquet files of val, but none of train' in refused(path.parent)
    for name in ('a', 'b'):
        write_parquet(tmp_path / 'two' / name / 'train.parquet', rows)
    assert 'several folders have Parquet files (a, b): give one of them' in refused(
        tmp_path / 'two'
    )


@pytest.mark.parametrize('name', ['cifar-{}', 'mnist_{}', 'data.{}-00'])
def test_any_word_of_a_parquet_file_tells_its_split(tree, tmp_path, name):
    for split in ('train', 'test'):
        rows = rows_of(tree, 'train' if split == 'train' else 'val')
        write_parquet(tmp_path / 'set' / f'{name.format(split)}.parquet', rows)
    assert sources.open_source(str(tmp_path / 'set')).splits == {'train': 15, 'val': 6}


def test_parquet_splits_that_name_the_classes_in_another_order(tree, tmp_path):
    val = [(data, 2 - label) for data, label in rows_of(tree, 'val')]
    write_parquet(tmp_path / 'set/train.parquet', rows_of(tree, 'train'), features=FEATURES)
    features = FEATURES | {'label': {'names': NAMES[::-1], '_type': 'ClassLabel'}}
    write_parquet(tmp_path / 'set/val.parquet', val, features=features)
    source = sources.open_source(str(tmp_path / 'set'))
    assert [(e.data, e.label) for e in source.read('val', 0)] == rows_of(tree, 'val')


@pytest.mark.parametrize('kind', ['dictionary', 'bool', 'float', 'images'])
def test_types_of_parquet_columns(tree, tmp_path, kind):
    import pyarrow as pa

    rows = [(data, label) for data, label in rows_of(tree, 'train') if label < 2]
    write_parquet(tmp_path / 'set/train.parquet', rows)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / 'set/train.parquet')
    labels = [label for _, label in rows]
    column = {
        'dictionary': pa.array([NAMES[y] for y in labels]).dictionary_encode(),
        'bool': pa.array(labels).cast(pa.bool_()),
        'float': pa.array(labels, pa.float64()),
        'images': pa.array([[image] for image in table['image'].to_pylist()]),
    }[kind]
    name = 'image' if kind == 'images' else 'label'
    table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, tmp_path / 'set/train.parquet')
    if kind in ('float', 'images'):
        message = refused(tmp_path / 'set')
        shown = 'double' if kind == 'float' else 'list<'
        assert f'train.parquet: the column {name!r} is {shown}' in message
        return
    source = sources.open_source(str(tmp_path / 'set'))
    assert source.class_names == (NAMES[:2] if kind == 'dictionary' else ['0', '1'])
    assert sorted(e.label for s in source.splits for e in source.read(s, 0)) == labels


def test_labels_that_make_no_sense_in_parquet(tree, tmp_path):
    rows = rows_of(tree, 'train')
    path, second = tmp_path / 'set/train-0.parquet', tmp_path / 'set/train-1.parquet'
    texts = [(data, NAMES[label]) for data, label in rows]
    write_parquet(path, [(rows[0][0], None), *texts])
    assert f'{path}: rows with labels outside the' in refused(path.parent)
    assert 'the first is row 0 (None)' in refused(path.parent)
    write_parquet(path, rows)
    write_parquet(second, texts)
    assert f'{second}: its labels are text, but those of {path} are numbers' in refused(path.parent)
    write_parquet(second, rows, image='picture')
    assert f"{second}: has no column 'image', only id, picture, label" in refused(path.parent)
    second.unlink()
    write_parquet(path, [(rows[0][0], None)] * 3)
    refused(path.parent)
    write_parquet(path, [*rows, (rows[0][0], 1234567)])
    assert f'{path}: label 1234567, but there are only 16 training' in refused(path.parent)
    write_parquet(path, [*rows, (rows[0][0], 5)])
    (empty, single) = sources.open_source(str(path.parent)).notes
    assert empty == '2 of the 6 classes have no images: 3, 4'
    assert single == '1 class has a single image, which is in train: 5'
    write_parquet(path, [], features=FEATURES)
    refused(path.parent)


@pytest.mark.parametrize('left', ['left.parquet', 'flowers.tar', 'train/0000.parquet'])
def test_archives_beside_class_folders_are_not_datasets(tmp_path, left):
    fixtures.write_tree(tmp_path / 'train', {'a': 10, 'b': 10})
    (tmp_path / left).write_bytes(b'x')
    assert sources.open_source(str(tmp_path)).class_names == ['a', 'b']


def test_imagenet_as_parquet_is_not_turned(tree, tmp_path):
    names = ['tench, Tinca tinca', *(f'class {number}' for number in range(1, 1000))]
    features = FEATURES | {'label': {'names': names, '_type': 'ClassLabel'}}
    write_parquet(tmp_path / 'set/train.parquet', rows_of(tree, 'train'), features=features)
    assert not sources.open_source(str(tmp_path / 'set')).exif


# The Hub


@pytest.fixture
def hub(tree, tmp_path, monkeypatch):
    """A huggingface_hub that has one set, and records how it is called."""
    root, calls = to_parquet(tree, tmp_path / 'hub'), []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        if repo_id == 'me/gone':
            raise RuntimeError('404\nRepository Not Found')
        return str(root)

    def dataset_info(self, repo_id, *, revision, files_metadata):
        assert files_metadata
        files = [('data/train-0.parquet', 9_000), ('data/x.zip', 10**9), ('b/y.parquet', 10**9)]
        siblings = [types.SimpleNamespace(rfilename=name, size=size) for name, size in files]
        return types.SimpleNamespace(siblings=siblings)

    made = types.ModuleType('huggingface_hub')
    made.snapshot_download = snapshot_download
    made.HfApi = type('HfApi', (), {'dataset_info': dataset_info})
    monkeypatch.setitem(sys.modules, 'huggingface_hub', made)
    return calls


def test_hub_sets_are_downloaded_and_read_like_folders(tree, tmp_path, hub):
    source = sources.open_source('hf://datasets/me/pets')
    assert source.class_names == NAMES and source.splits == {'train': 15, 'val': 6}
    assert [(e.data, e.label) for e in source.read('val', 0)] == rows_of(tree, 'val')
    assert source.files == sources.open_source(str(tmp_path / 'hub')).files
    sources.open_source('hf://datasets/me/pets@refs%2Fconvert%2Fparquet/data')
    common = {'repo_type': 'dataset'}
    assert hub == [
        ('me/pets', common | {'revision': None, 'allow_patterns': '*.parquet'}),
        (
            'me/pets',
            common | {'revision': 'refs/convert/parquet', 'allow_patterns': 'data/*.parquet'},
        ),
    ]


def test_hub_sets_are_large_by_their_parquet_files(hub):
    assert sources.is_large('hf://datasets/me/pets', pictures=200)
    assert not sources.is_large('hf://datasets/me/pets/data', pictures=200)


def test_hub_errors(hub, monkeypatch):
    for name in ('hf://me/pets', 'hf://datasets/pets', 'hf://datasets/'):
        assert 'expected hf://datasets/OWNER/NAME' in refused(name)
    message = refused('hf://datasets/me/gone')
    assert '404 Repository Not Found' in message and '`hf auth login`' in message
    monkeypatch.setattr(
        sys.modules['huggingface_hub'], 'snapshot_download', lambda *a, **k: '/gone'
    )
    assert 'has no Parquet files' in refused('hf://datasets/me/pets')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    assert refused('hf://datasets/me/pets').endswith('pip install huggingface_hub')


# WebDataset


def test_shards_in_split_folders_and_without_names(tree, tmp_path):
    write_shard(tmp_path / 'set/train/0.tar', rows_of(tree, 'train'))
    write_shard(tmp_path / 'set/test/0.tar', rows_of(tree, 'val'))
    source = sources.open_source(str(tmp_path / 'set'))
    assert source.splits == {'train': 15, 'val': 6} and source.class_names == ['0', '1', '2']
    json_skipped = '21 files that are not images skipped: 21 .json'
    assert source.validation == 'the test shards' and source.notes == (json_skipped,)
    write_shard(tmp_path / 'set/extra.tar', [])
    notes = sources.open_source(str(tmp_path / 'set')).notes
    assert notes == ('not used: extra.tar', json_skipped)
    (tmp_path / 'set/extra.tar').unlink()
    (tmp_path / 'set/train/0.tar').rename(tmp_path / 'set/00000.tar')
    (tmp_path / 'set/test/0.tar').unlink()
    source = sources.open_source(str(tmp_path / 'set'), val_fraction=0.2)
    assert source.splits == {'train': 12, 'val': 3}


def test_what_is_wrong_with_shards(tree, tmp_path):
    root = tmp_path / 'set'
    rows = rows_of(tree, 'train')
    write_shard(root / 'x-val.tar', rows)
    assert 'x-val.tar is not named as a training shard' in refused(root)
    (root / 'x-val.tar').rename(root / 'x-train.tar')
    (root / 'classnames.txt').write_text('a\nb\n')
    assert 'label 2, but' in refused(root) and 'names only 2 classes' in refused(root)
    write_shard(root / 'x-train.tar', [(rows[0][0], 'dog')])
    assert "000000.cls is b'dog', not a class index" in refused(root)
    write_shard(root / 'x-train.tar', rows, kinds=('jpg',))
    assert '15 images have no label; the first is 000000.jpg' in refused(root)
    write_shard(root / 'x-train.tar', rows, kinds=('cls',))
    assert 'the train shards have no images' in refused(root)
    write_shard(root / 'x-train.tar', rows)
    os.truncate(root / 'x-train.tar', (root / 'x-train.tar').stat().st_size // 2 - 100)
    assert 'x-train.tar: cut off: ' in refused(root)
    write_shard(root / 'x-train.tar', [*rows, (rows[0][0], 10**6)])
    (root / 'classnames.txt').unlink()
    assert 'label 1000000, but there are only 16 training images' in refused(root)
    (root / 'x-train.tar').write_bytes(gzip.compress((root / 'x-train.tar').read_bytes()))
    assert (
        'x-train.tar: compressed with gzip: rename it to x-train.tar.gz and gunzip it'
        in refused(root)
    )
    write_members(root / 'x-train.tar', {'a/0.jpg': b'x', 'b/0.jpg': b'x'})
    assert 'x-train.tar: holds folders of images without KEY.cls' in refused(root)


def write_members(path, members):
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_keys_of_shards(tmp_path):
    """Dots in keys, any kind of image, and other members of a key."""
    members = {'img.001.jpg': b'0', 'img.002.bmp': b'1', 'd.x/3.TIF': b'2', 'd.x/4.gif': b'3'}
    labels = {f'{os.path.splitext(name)[0]}.cls': data for name, data in members.items()}
    others = {'d.x/4.mask.png': b'm', 'd.x/4.txt': b'', 'README': b''}
    write_members(tmp_path / 'train.tar', members | labels | others)
    write_members(tmp_path / 'val.tar', members | labels)
    source = sources.open_source(str(tmp_path))
    assert [(e.data, e.label) for e in source.read('train', 0)] == [
        (data, int(data)) for data in members.values()
    ]
    (skipped,) = source.notes
    assert all(k in skipped for k in ('3 files', '.mask.png', '.txt', 'file without extension'))


# Lists


def write_list(tree, text):
    path = tree / 'list.tsv'
    path.write_text(text)
    return path


def test_lists_without_a_header(tree):
    for file in ('train/cat/000.jpg', 'train/dog/000.jpg'):
        assert (tree / file).exists()
    rows = [
        f'train/{name}/00{i}.jpg\t{label}'
        for name, label in zip(NAMES, (10, 9, 2), strict=True)
        for i in range(4)
    ]
    for header in ('', 'where\twhat\n'):  # a header with unknown column names
        source = sources.open_source(str(write_list(tree, header + '\n'.join(rows) + '\n\n')))
        assert source.class_names == ['2', '9', '10'] and sum(source.splits.values()) == 12
        assert {e.name for e in source.read('val', 0)} | {
            e.name for e in source.read('train', 0)
        } == {str(tree / row.split('\t')[0]) for row in rows}


def test_splits_of_lists(tree):
    rows = [
        f'train/{name}/00{i}.jpg\t{name}\t{split}'
        for name in NAMES
        for i, split in enumerate(('Train', 'TESTING', 'valid'))
    ]
    source = sources.open_source(str(write_list(tree, '\n'.join(rows))))
    assert source.splits == {'train': 3, 'val': 3, 'test': 3} and not source.notes
    source = sources.open_source(
        str(write_list(tree, '\n'.join(r for r in rows if 'val' not in r)))
    )
    assert source.splits == {'train': 3, 'val': 3}
    assert source.validation == 'the test split' and not source.notes


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'is empty'),
        (
            'train/cat/000.jpg\tcat\nx.jpg\tdog\ny\tdog\n',
            r'2 of 3 files are missing \(line 2: .*x.jpg;',
        ),
        ('train/cat/000.jpg\tcat\ntrain/dog/000.jpg\n', 'line 2: needs a path and a label'),
        ('train/cat/000.jpg\tcat\tfoo\n', "line 1: split 'foo': give train, val or test"),
        ('train/cat/000.jpg\tcat\tval\n', 'has no images for training, only for val'),
        ('train/cat/000.jpg\tcat\n', 'needs at least two labels, found 1'),
        (
            'train/cat/000.jpg,cat\n',
            'line 1: needs a path and a label, separated by a tab .in .csv:',
        ),
        (
            'train/cat/000.jpg\tcat\ntrain/../train/cat/000.jpg\tdog\n',
            "lines 1 and 2: .*cat/000.jpg has two labels, 'cat' and 'dog'",
        ),
        (
            'train/cat/000.jpg\tcat\ntrain/cat/000.jpg\tcat\tval\n',
            'lines 1 and 2: .*cat/000.jpg has two splits, train and val',
        ),
        ('path\tlabel\tclass\nx\ta\tb\n', 'columns label and class both mean the label'),
        (
            'train/cat/000.jpg\tcat\ntrain/dog/000.jpg\tdog\t\nval/eel/000.jpg\teel\tval\n',
            "the label 'eel' has no images for training",
        ),
    ],
)
def test_what_is_wrong_with_lists(tree, text, message):
    with pytest.raises(UserError, match=message):
        sources.open_source(str(write_list(tree, text)))


def test_repeated_lines_and_labels_that_are_the_same_number(tree):
    rows = [
        f'train/{name}/00{i}.jpg\t{label}'
        for name, label in zip(NAMES, ('1', '01', '001'), strict=True)
        for i in range(4)
    ]
    source = sources.open_source(str(write_list(tree, '\n'.join([*rows, *rows[:2]]))))
    assert source.class_names == ['001', '01', '1'] and sum(source.splits.values()) == 12
    assert source.notes == ('2 lines repeat others: each image counts once',)


def test_lists_that_cannot_be_read(tree):
    (tree / 'list.csv').write_bytes(b'train/\xff.jpg,cat\n')
    assert 'not UTF-8' in refused(tree / 'list.csv')
    for gone in ('/not/there.csv', 'gone.tsv'):
        assert f'{gone}: cannot be read: No such file' in refused(gone)
