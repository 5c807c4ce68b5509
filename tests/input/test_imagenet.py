"""ImageNet in all its forms, what is refused, and from the two tars to ten-crop errors."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare, sources
from alexnet_jax.input.sources import imagenet
from alexnet_jax.rundir import metrics
from tests.helpers import ROOT, fixtures

VAL = 10
WNIDS = ['n01440764', 'n01739381', 'n02105855']
TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
    """The folder of the two tars, and what is in them."""
    folder = tmp_path_factory.mktemp('tars')
    return folder, fixtures.write_imagenet_tars(folder, per_class=3, val=VAL, width=40)


def files(store):
    """The bytes of a store; of store.json the counts."""
    found = {path.name: path.read_bytes() for path in store.iterdir()}
    description = json.loads(found['store.json'])
    return found | {'store.json': {key: description[key] for key in ('classes', 'counts')}}


@pytest.mark.parametrize('stray', ['.DS_Store', 'README.txt', ''])
def test_an_empty_folder_of_its_name(tmp_path, monkeypatch, stray):
    (tmp_path / 'imagenet2012').mkdir()
    (tmp_path / 'imagenet2012' / stray).touch()
    monkeypatch.chdir(tmp_path)
    for name in ('imagenet2012', str(tmp_path / 'imagenet2012')):
        with pytest.raises(
            UserError, match='no training images and .* expected ILSVRC2012_img_train'
        ):
            sources.open_source(name)


def test_a_validation_tar_that_is_cut_off_is_found_first(tars, tmp_path, monkeypatch):
    shutil.copytree(tars[0], tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / TARS[1], 12_000)
    monkeypatch.setattr(imagenet, '_train', None)  # reading its index takes a minute
    with pytest.raises(UserError, match=f'{TARS[1]}: cut off: 12,000 bytes'):
        sources.open_source(str(tmp_path))


def test_all_forms_give_the_same_store(tars, tmp_path, capsys):
    folder, made = tars
    places = {'tars': [('imagenet2012', folder), (str(folder), None)]}
    for form in ('flat', 'class_tars', 'torchvision', 'kaggle'):
        root = fixtures.unpack_imagenet(folder, tmp_path / form, form)
        places[form] = [('imagenet2012', root), (str(root), None)]
    top = tmp_path / 'kaggle/ILSVRC'
    places['kaggle'] += [(str(top), None), (str(top / 'Data/CLS-LOC'), None)]
    (tmp_path / 'tfds/downloads').mkdir(parents=True)
    (tmp_path / 'tfds/downloads/manual').symlink_to(folder)  # where TFDS itself looks
    places['tars'].append(('imagenet2012', tmp_path / 'tfds'))
    stores = {}
    for form, ways in places.items():
        for number, (source, where) in enumerate(ways):
            store = tmp_path / f'store-{form}-{number}'
            prepare.prepare(source, dir=where and str(where), store=str(store), size=16)
            stores[form, number] = files(store)
    first = stores['tars', 0]
    assert len(stores) == 13 and {'train.jpg', 'val.labels.npy', 'stats.npz'} <= {*first}
    assert first['names.txt'].decode().split() == WNIDS
    for way, store in stores.items():
        assert store == first, way
    printed = capsys.readouterr().out
    assert printed.count('reading the index of the tars') == 5
    assert printed.count('test/ is not used: it has no labels') == 4


@pytest.mark.parametrize('form', ['tars', 'flat', 'kaggle'])
def test_records_are_sorted_and_labels_follow_the_wordnet_ids(tars, tmp_path, form):
    folder, made = tars
    root = folder if form == 'tars' else fixtures.unpack_imagenet(folder, tmp_path, form)
    source = sources.open_source('imagenet2012', data_dir=str(root))
    assert source.class_names == WNIDS and not source.exif
    for split in ('train', 'val'):
        examples = list(source.read(split, 0))
        found = [(WNIDS[e.label], e.name.split('/')[-1].split(' ')[-1]) for e in examples]
        assert found == sorted((wnid, name) for name, wnid in made[split].items())
        for start in (1, 4, source.splits[split]):
            assert list(source.read(split, start)) == examples[start:]


def test_kaggles_list_comes_before_that_of_tfds(tars, tmp_path):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, 'kaggle')
    name = min(tars[1]['val'])
    solution = root / 'LOC_val_solution.csv'
    solution.write_text(
        solution.read_text().replace(f'{name[:-5]},n02105855', f'{name[:-5]},n01440764')
    )
    labels = {e.name[-len(name) :]: e.label for e in sources.open_source(str(root)).read('val', 0)}
    assert tars[1]['val'][name] == 'n02105855' and labels[name] == 0


def test_a_subset_of_the_classes(tars, tmp_path):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, 'flat')
    shutil.rmtree(root / 'train/n01739381')
    source = sources.open_source(str(root))
    count = sum(wnid == 'n01739381' for wnid in tars[1]['val'].values())
    assert source.class_names == ['n01440764', 'n02105855']
    assert source.splits == {'train': 6, 'val': VAL - count} and count
    assert f'{count} validation images left out' in source.notes[0]


def test_a_mixture_of_forms(tars, tmp_path):
    """An interrupted script: a class is still in its tar, half of val/ is in class folders."""
    folder, made = tars
    root = fixtures.unpack_imagenet(folder, tmp_path / 'half', 'torchvision')
    source = sources.open_source(str(root))
    assert not source.exif
    whole = {split: [(e.data, e.label) for e in source.read(split, 0)] for split in source.splits}
    packed = fixtures.unpack_imagenet(folder, tmp_path / 'packed', 'class_tars')
    shutil.move(packed / 'train/n01440764.tar', root / 'train')
    (root / 'train/n01440764/n01440764_1.JPEG').unlink()
    moved = next((root / 'val/n02105855').iterdir())
    moved.rename(root / 'val' / moved.name)
    (root / 'train/n01739381/Thumbs.db').write_bytes(b'')
    (root / 'train/more').mkdir()
    (root / 'train/lost+found').mkdir()
    mixed = sources.open_source(str(root))
    for split, pictures in whole.items():
        assert [(e.data, e.label) for e in mixed.read(split, 0)] == pictures
    assert mixed.notes == (
        'not used (in train/, not called nXXXXXXXX): more',
        '1 file that is not an image skipped: 1 Thumbs.db',
    )


@pytest.mark.parametrize('train, val', [('Train', 'Val'), ('TRAIN', 'dev'), ('training', 'VALID')])
@pytest.mark.parametrize('form', ['flat', 'class_tars'])
def test_split_folders_under_any_name(tars, tmp_path, form, train, val):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, form)
    expected = sources.open_source(str(root)).content
    (root / 'train').rename(root / train)
    (root / 'val').rename(root / val)
    for source, where in (('imagenet2012', str(root)), (str(root), None)):
        opened = sources.open_source(source, data_dir=where)
        assert opened.splits == {'train': 9, 'val': VAL}
        assert opened.content != expected  # the names of the folders count


@pytest.mark.parametrize('inside', ['train', '.'])
def test_class_folders_without_val_are_held_out_by_name_as_by_path(tars, tmp_path, inside):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, 'torchvision')
    shutil.rmtree(root / 'val')
    root = root / 'train' if inside == '.' else root
    by_name = sources.open_source('imagenet2012', data_dir=str(root))
    by_path = sources.open_source(str(root))
    assert by_name.splits == by_path.splits == {'train': 8, 'val': 1}
    assert by_name.name == 'imagenet2012'
    assert list(by_name.read('val', 0)) == list(by_path.read('val', 0)) and not by_name.exif


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        sources.open_source(str(source), **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def only(*names):
    def make(folder, root):
        root.mkdir()
        for name in names:
            shutil.copy(folder / name, root) if name in TARS else (root / name).write_bytes(b'')

    return make


def unpacked(*removed, form='flat'):
    def make(folder, root):
        fixtures.unpack_imagenet(folder, root, form)
        for name in removed:
            shutil.rmtree(root / name)

    return make


def unnamed(folder, root):
    fixtures.unpack_imagenet(folder, root, 'flat')
    for number, path in enumerate((root / 'val').iterdir()):
        path.rename(path.with_name(f'{number}.JPEG'))


@pytest.mark.parametrize(
    'make, parts',
    [
        (only(TARS[1]), ('no training images', f'found {TARS[1]};')),
        (only(TARS[0]), ('no validation images', f'found {TARS[0]};')),
        (
            only('ILSVRC2012_devkit_t12.tar.gz'),
            ('ILSVRC2012_devkit_t12.tar.gz', 'no training images and'),
        ),
        (unpacked('train'), ('no training images', 'found val/;')),
        (
            unpacked('ILSVRC/Data/CLS-LOC/val', form='kaggle'),
            ('no validation images', 'found 3 train/nXXXXXXXX/, test/, train/;'),
        ),
        (unnamed, ('the files in val/ are not in class folders, and not called ILSVRC2012_val',)),
    ],
)
def test_what_is_not_a_form_of_imagenet(tars, tmp_path, make, parts):
    make(tars[0], tmp_path / 'root')
    for message in (
        refused(tmp_path / 'root'),
        refused('imagenet2012', data_dir=str(tmp_path / 'root')),
    ):
        assert all(part in message for part in parts[:1]), message
        assert "Kaggle's ILSVRC/Data/CLS-LOC" in message
    assert parts[-1] in refused(tmp_path / 'root')


def test_a_folder_inside_imagenet(tars, tmp_path):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, 'class_tars')
    assert 'looks like ImageNet' in refused(root / 'train')
    assert 'looks like ImageNet' in refused(root / 'val')


@pytest.mark.parametrize('tar, cut', [(TARS[0], 0.7), (TARS[0], 0.4), (TARS[1], 0.5)])
def test_truncated_tars(tars, tmp_path, tar, cut):
    for name in TARS:
        shutil.copy(tars[0] / name, tmp_path)
    size = int((tmp_path / tar).stat().st_size * cut)
    os.truncate(tmp_path / tar, size)
    message = refused(tmp_path)
    assert f'{tmp_path / tar}: cut off: {size:,} bytes, but ' in message
    assert 'download or copy the tar again' in message


def test_a_tar_that_ends_between_two_files(tars, tmp_path):
    for name in TARS:
        shutil.copy(tars[0] / name, tmp_path)
    with tarfile.open(tmp_path / TARS[1]) as tar:
        size = tar.getmembers()[4].offset
    os.truncate(tmp_path / TARS[1], size)
    message = refused(tmp_path)
    assert f'{size:,} bytes, but the end of the archive is not at {size:,}' in message


def test_damaged_tars(tars, tmp_path):
    for name in TARS:
        shutil.copy(tars[0] / name, tmp_path)
    with tarfile.open(tmp_path / TARS[0]) as tar:
        inner = tar.getmembers()[1]
    data = bytearray((tmp_path / TARS[0]).read_bytes())
    data[inner.offset_data + 3] ^= 1  # in the name of a file: the checksum of the header fails
    (tmp_path / TARS[0]).write_bytes(data)
    assert f'{TARS[0]}: {inner.name}: not an uncompressed tar' in refused(tmp_path)
    (tmp_path / TARS[1]).write_bytes(b'<html>' * 200)
    shutil.copy(tars[0] / TARS[0], tmp_path)
    assert f'{TARS[1]}: not an uncompressed tar' in refused(tmp_path)


def test_lists_of_labels_that_do_not_fit(tars, tmp_path, monkeypatch):
    root = fixtures.unpack_imagenet(tars[0], tmp_path, 'kaggle')
    solution = root / 'LOC_val_solution.csv'
    lines = solution.read_text().splitlines(keepends=True)
    solution.write_text(''.join(lines[:-1]))
    name = lines[-1].split(',')[0]
    assert f'{name}.JPEG: {solution} does not list its class' in refused(root)
    solution.write_text(lines[0] + 'x,y\n')
    assert f'{solution}, line 2: not ILSVRC2012_val_NUMBER' in refused(root)
    solution.write_bytes(b'\xff\xff')
    assert f'{solution}: not a list in UTF-8' in refused(root)
    solution.write_text(''.join(lines), encoding='utf-8-sig')
    assert sources.open_source(str(root)).splits['val'] == VAL
    solution.unlink()
    assert sources.open_source(str(root)).splits['val'] == VAL  # TFDS's list
    monkeypatch.setattr(imagenet.importlib.util, 'find_spec', lambda name: None)
    assert 'pip install tensorflow-datasets' in refused(root)


def test_a_miniature_is_prepared_on_first_use_only_if_it_is_a_path(tars, tmp_path):
    root = str(tars[0])
    assert sources.is_large('imagenet2012', data_dir=root, pictures=200_000)
    assert not sources.is_large(root, pictures=200_000)
    with open(tmp_path / TARS[0], 'wb') as file:
        file.truncate(137_000_000_000)  # sparse
    (tmp_path / TARS[1]).touch()
    assert sources.is_large(str(tmp_path), pictures=200_000)


@pytest.mark.slow
def test_a_copy_that_tfds_has_built_is_used_first(tars, tmp_path):
    import tensorflow_datasets as tfds

    shutil.copytree(tars[0], tmp_path / 'downloads/manual')
    builder = tfds.builder('imagenet2012', data_dir=str(tmp_path))
    builder.download_and_prepare()
    assert sources.is_large('imagenet2012', data_dir=str(tmp_path), pictures=200_000)
    source = sources.open_source('imagenet2012', data_dir=str(tmp_path))
    assert len(source.class_names) == 1000 and source.files is None
    for split, name in (('train', 'train'), ('val', 'validation')):
        examples = list(source.read(split, 0))
        built = builder.as_dataset(
            split=name,
            shuffle_files=False,
            decoders={'image': tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        assert [(e.data, e.label) for e in examples] == [
            (row['image'], row['label']) for row in built.as_numpy_iterator()
        ]
    names = {e.name.split()[-1]: source.class_names[e.label] for e in source.read('train', 0)}
    assert names == tars[1]['train']


def command(module, *arguments, folder, code=0):
    done = subprocess.run(
        [sys.executable, '-m', f'alexnet_jax.{module}', *arguments],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_paper_from_the_tars_to_ten_crops(tmp_path):
    """Miniature tars, including a CMYK and a PNG file; `configs/paper.py` at full width."""
    (tmp_path / 'tars').mkdir()
    made = fixtures.write_imagenet_tars(tmp_path / 'tars', per_class=4, val=VAL)
    command('prepare', '--source=imagenet2012', f'--dir={tmp_path / "tars"}', folder=tmp_path)
    store = json.loads((tmp_path / 'data/imagenet2012-256-jpg/store.json').read_text())
    assert store['classes'] == 3
    assert store['counts'] == {split: len(names) for split, names in made.items()}
    printed = command(
        'main',
        f'--config={ROOT}/configs/paper.py',
        '--cpu_devices=2',
        f'--config.data.dir={tmp_path / "tars"}',
        '--config.train.batch=8',
        '--config.run.eval_batch=8',
        '--config.run.log_every=1',
        '--config.run.stop_after=10',
        '--config.run.eval_every=1e9',
        folder=tmp_path,
        code=75,  # stopped before the end
    )
    assert f'Total: {60_965_224 - 997 * 4097:,}' in printed  # 1000 classes, not 3
    assert 'each tower on its own device' in printed
    rows = [row for row in metrics.read(tmp_path / 'runs/paper') if row['kind'] == 'train']
    assert [row['step'] for row in rows] == [*range(10)]
    assert all(0 < row['loss'] < 20 for row in rows)
    printed = command(
        'evaluate', 'runs/paper', '--step=latest', '--batch=4', '--cpu_devices=2', folder=tmp_path
    )
    lines = printed.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [str(VAL)] * 2  # 1 crop, 10 crops
    assert all('(step 10)' in line for line in lines[1:])
