"""A source with a validation and a test split: all three are in the store."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare, sources, store, store_writer
from alexnet_jax.input.sources import shapes, shapes_builder
from alexnet_jax.rundir import directory
from configs import base
from tests.helpers import fixtures
from tests.input.test_forms import rows_of, write_list, write_parquet, write_shard

NAMES = ['ape', 'bee']
COUNTS = {'train': 12, 'val': 6, 'test': 4}
OPTIONS = {'format': 'u8', 'size': 24}


@pytest.fixture
def tree(tmp_path):
    for seed, (split, count) in enumerate(COUNTS.items()):
        names = dict.fromkeys(NAMES, count // 2)
        fixtures.write_tree(tmp_path / 'tree' / split, names, seed=100 * seed)
    return tmp_path / 'tree'


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_test(folder) -> dict[str, bytes]:
    """The files of a store, except those of its test split."""
    found = {n: data for n, data in files(folder).items() if not n.startswith('test.')}
    told = json.loads(found.pop('store.json'))
    del told['counts']['test'], told['test'], told['checksum']
    told['crc'] = {name: crc for name, crc in told['crc'].items() if not name.startswith('test.')}
    return found | {'store.json': store.encode(told)}


def test_the_test_split_changes_nothing_else(tree, tmp_path):
    """A store without one is, byte for byte, what earlier versions wrote."""
    made = prepare.prepare(str(tree), store=str(tmp_path / 'a'), **OPTIONS)
    assert made.counts == COUNTS and made.labels('test').tolist() == [0, 0, 1, 1]
    store.verify(made)
    pictures = [e.data for e in sources.open_source(str(tree)).read('test', 0)]
    assert [e.name.split('/')[-3] for e in sources.open_source(str(tree)).read('test', 0)] == (
        ['test'] * len(pictures)
    )
    (tree / 'test').rename(tmp_path / 'moved')
    plain = prepare.prepare(str(tree), store=str(tmp_path / 'b'), **OPTIONS)
    assert plain.counts == {'train': 12, 'val': 6}
    assert without_test(tmp_path / 'a') == files(tmp_path / 'b')
    assert 'test' not in json.loads((tmp_path / 'b/store.json').read_text())
    assert made.identity() == plain.identity()  # runs on one resume with the other
    plain.check_split('val')
    with pytest.raises(
        UserError, match=r"b has no split 'test', only train, val; a store has one if"
    ):
        plain.check_split('test')
    directory.write(base.get_config(), tmp_path / 'run', plain)
    directory.check_store(tmp_path / 'run', made)
    directory.write(base.get_config(), tmp_path / 'other', made)
    directory.check_store(tmp_path / 'other', plain)


def test_a_damaged_test_split_is_found(tree, tmp_path):
    made = prepare.prepare(str(tree), store=str(tmp_path / 'a'), **OPTIONS)
    with open(made.splits['test'].file, 'r+b') as file:
        file.seek(2 * 24 * 24 * 3)
        file.write(b'torn')
    with pytest.raises(UserError, match=r'damaged records in .*: 1 .*test.u8 2'):
        store.verify(made)


@pytest.mark.parametrize('format', ['jpg', 'u8'])
@pytest.mark.parametrize('earlier', [False, True])
def test_a_killed_pass_ends_with_the_same_bytes(tree, tmp_path, monkeypatch, format, earlier):
    """Also one that was begun by an earlier version, which left the test split out."""
    options, real = {'format': format, 'size': 24}, sources.open_source
    for number in range(10, 20):  # more than are read ahead
        shutil.copy(tree / 'test/bee/001.jpg', tree / f'test/bee/{number:03}.jpg')
    prepare.prepare(str(tree), store=str(tmp_path / 'whole'), **options)
    monkeypatch.setattr(store_writer, 'FLUSH_SECONDS', 0)
    monkeypatch.setattr(store_writer, 'cores', lambda: 1)
    path, starts = tmp_path / 'store', []

    class Killed(BaseException):
        pass

    def opening(budget, split):
        def killing(*args, **kwargs):
            source = real(*args, **kwargs)

            def read(name, start):
                starts.append((name, start))
                for number, example in enumerate(source.read(name, start), start=start):
                    if (name, number) == (split, budget):
                        raise Killed
                    yield example

            return dataclasses.replace(source, read=read)

        return killing

    for budget, split in ((9, 'train'), (8, 'test'), (11, 'test')):
        monkeypatch.setattr(sources, 'open_source', opening(budget, split))
        with pytest.raises(Killed):
            prepare.prepare(str(tree), store=str(path), **options)
        if earlier and split == 'train':
            with np.load(path / 'progress.npz') as arrays:
                old = dict(arrays)
            np.savez(path / 'progress.npz', **old | {k: old[k][:2] for k in ('written', 'read')})
            told = json.loads((path / 'store.json').read_text())
            del told['counts']['test'], told['test']
            (path / 'store.json').write_text(json.dumps(told))
            (path / 'test.index').unlink(missing_ok=True)
    monkeypatch.setattr(sources, 'open_source', opening(99, 'test'))
    prepare.prepare(str(tree), store=str(path), **options)
    assert files(path) == files(tmp_path / 'whole')
    assert ('train', 0) not in starts[1:] and max(n for s, n in starts if s == 'test') > 0


def test_a_test_split_that_changed_is_noticed(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare.prepare('tree', **OPTIONS)
    prepare.prepare('tree', **OPTIONS)
    capsys.readouterr()
    (tree / 'test/ape/001.jpg').rename(tmp_path / 'kept.jpg')
    with pytest.raises(UserError, match='tree has 1 fewer image than the store data/tree-24-u8'):
        prepare.prepare('tree', **OPTIONS)
    (tmp_path / 'kept.jpg').rename(tree / 'test/bee/009.jpg')
    with pytest.raises(UserError, match='tree has different images from the store'):
        prepare.prepare('tree', **OPTIONS)


def test_a_store_of_an_earlier_version_is_used(tree, tmp_path, monkeypatch, capsys):
    """The source has a test split that the store lacks, and a message says so."""
    monkeypatch.chdir(tmp_path)
    (tree / 'test').rename(tmp_path / 'moved')
    before = prepare.prepare('tree', **OPTIONS)
    (tmp_path / 'moved').rename(tree / 'test')
    after = prepare.prepare('tree', **OPTIONS)
    assert before.counts == after.counts == {'train': 12, 'val': 6}
    assert 'data/tree-24-u8: lacks the test split of its source, since' in capsys.readouterr().out
    (tree / 'val/ape/001.jpg').unlink()
    with pytest.raises(UserError, match='tree has 1 fewer image'):
        prepare.prepare('tree', **OPTIONS)


# The test split of each form


def as_parquet(tree, root, labels):
    for split in COUNTS:
        rows = rows_of(tree, split)
        if split == 'test':
            rows = [(data, y) for (data, _), y in zip(rows, labels, strict=True)]
        write_parquet(root / f'{split}.parquet', rows)
    return root


def as_shards(tree, root, labels):
    for split in COUNTS:
        rows = rows_of(tree, split)
        if split == 'test':
            rows = [(data, y) for (data, _), y in zip(rows, labels, strict=True)]
        write_shard(root / f'{split}-0.tar', rows)
    return root


def as_list(tree, root, labels):
    rows = [
        f'{split}/{name}/{i:03}.jpg\t{label}\t{split}'
        for split, count in COUNTS.items()
        for label, name in enumerate(NAMES)
        for i in range(count // 2)
    ]
    tests = [row.split('\t') for row in rows if row.endswith('test')]
    changed = [f'{file}\t{y}\ttest' for (file, _, _), y in zip(tests, labels, strict=True)]
    rest = [row for row in rows if not row.endswith('test')]
    return write_list(tree, '\n'.join([*rest, *changed]))


@pytest.mark.parametrize('write', [as_parquet, as_shards, as_list])
def test_forms(tree, tmp_path, write):
    source = sources.open_source(str(write(tree, tmp_path / 'set', [0, 0, 1, 1])))
    assert source.splits == COUNTS and [*source.splits] == [*COUNTS]
    assert not any('not used' in note for note in source.notes)
    expected = [(e.data, e.label) for e in sources.open_source(str(tree)).read('test', 0)]
    for start in range(5):
        assert [(e.data, e.label) for e in source.read('test', start)] == expected[start:]
    assert source.test[0] == 4 and source.files[0] == 18


@pytest.mark.parametrize('write', [as_parquet, as_shards, as_list])
@pytest.mark.parametrize('val', [True, False])
def test_labels_of_minus_one_mean_unlabeled(tree, tmp_path, write, val):
    """One line says so immediately; without a validation split, a part of train is held out."""
    made = write(tree, tmp_path / 'set', [-1] * 4)
    if not val and made.is_dir():
        next(made.glob('val*')).unlink()
    elif not val:
        made.write_text('\n'.join(r for r in made.read_text().split('\n') if '\tval' not in r))
    source = sources.open_source(str(made), val_fraction=0.25)
    assert source.splits == ({'train': 12, 'val': 6} if val else {'train': 9, 'val': 3})
    notes = [note for note in source.notes if 'skipped' not in note]
    assert notes == ['the test split is not used: it has no labels']
    assert source.test is None and (source.validation == '') == val


@pytest.mark.parametrize('write', [as_parquet, as_shards, as_list])
def test_some_labels_of_minus_one_are_an_error(tree, tmp_path, write):
    made = write(tree, tmp_path / 'set', [0, -1, 1, 1])
    with pytest.raises(UserError) as caught:
        sources.open_source(str(made))
    assert '\n' not in str(caught.value) and (
        '-1' in str(caught.value) or 'no label' in str(caught.value)
    )


def test_shards_without_labels(tree, tmp_path):
    import tarfile

    root = as_shards(tree, tmp_path / 'set', [0, 0, 1, 1])
    with tarfile.open(root / 'test-0.tar') as old, tarfile.open(root / 'new.tar', 'w') as new:
        for member in old:
            if not member.name.endswith('.cls'):
                new.addfile(member, old.extractfile(member))
    (root / 'new.tar').replace(root / 'test-0.tar')
    source = sources.open_source(str(root))
    assert source.splits == {'train': 12, 'val': 6}
    assert 'the test split is not used: it has no labels' in source.notes


@pytest.mark.parametrize('labeled', [True, False])
def test_a_tfds_set(tmp_path, monkeypatch, labeled):
    splits = {'train': (0, 20), 'validation': (1, 10), 'test': (2, 7)}
    monkeypatch.setattr(shapes, 'SPLITS', splits)
    generate = shapes_builder.AlexnetShapes._generate_examples

    def unlabeled(self, number, count):
        for key, example in generate(self, number, count):
            yield key, example | ({'label': -1} if number == 2 and not labeled else {})

    monkeypatch.setattr(shapes_builder.AlexnetShapes, '_generate_examples', unlabeled)
    source = sources.open_source('alexnet_shapes', data_dir=str(tmp_path))
    if labeled:
        assert source.splits == {'train': 20, 'val': 10, 'test': 7} and not source.notes
        assert [e.data for e in source.read('test', 3)] == [e.data for e in source.read('test', 0)][
            3:
        ]
    else:
        assert source.splits == {'train': 20, 'val': 10}
        assert source.notes == ('the test split is not used: it has no labels',)
