"""ImageNet (ILSVRC-2012) in all its common forms.

    train                                   val
    ILSVRC2012_img_train.tar                ILSVRC2012_img_val.tar              image-net.org
    train/nXXXXXXXX.tar                     val/ILSVRC2012_val_NUMBER.JPEG      unpacked once
    train/nXXXXXXXX/nXXXXXXXX_N.JPEG        val/nXXXXXXXX/...                   torchvision

Each form on the left works with each on the right; Kaggle has them in ILSVRC/Data/CLS-LOC. Labels follow the
sorted WordNet IDs. Records are sorted by (WordNet ID, file name), so that all forms give the same store.
"""

import collections
import csv
import dataclasses
import glob
import importlib.util
import os
import re
from typing import NamedTuple

from alexnet_jax.common.errors import UserError, reason, say
from alexnet_jax.input.sources import folder, tars, tfds
from alexnet_jax.input.sources.source import (
    PICTURE_BYTES,
    WNID,
    Entry,
    Source,
    from_entries,
    is_path,
    list_folder,
    not_an_image,
    not_used,
    skipped_note,
    split_of,
)

NAME = 'imagenet2012'
TRAIN_TAR, VAL_TAR = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
SIZES = {TRAIN_TAR: '138 GB', VAL_TAR: '6.3 GB'}
# Names of the split folders, in addition to those in `source.ALIASES`.
TRAIN, VAL = 'ILSVRC2012_img_train', 'ILSVRC2012_img_val'
SOLUTION = 'LOC_val_solution.csv'  # Kaggle's labels of val
KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC', 'CLS-LOC')  # below the folder that is given
# Names in a folder that holds ImageNet, or a part of it.
KNOWN = re.compile(
    r'ILSVRC$|ILSVRC2012_(img|devkit|val_\d|bbox)|LOC_\w+\.csv$|n\d{8}\.tar$|'
    r'imagenet[-_]object[-_]localization'
)
NUMBER = re.compile(r'ILSVRC2012_val_(\d{8})\.\w+', re.IGNORECASE)
FORMS = (
    f'{TRAIN_TAR} and {VAL_TAR}; train/ with nXXXXXXXX.tar or nXXXXXXXX/ and val/ with '
    "ILSVRC2012_val_NUMBER.JPEG or nXXXXXXXX/; Kaggle's ILSVRC/Data/CLS-LOC"
)


class Parts(NamedTuple):
    """Where the images are: one or several kinds of places for each split."""

    root: str
    train_tar: str | None  # the tar of tars
    class_tars: dict[str, str]  # by WordNet ID
    class_folders: dict[str, str]
    val_tar: str | None
    val_flat: str | None  # a folder of ILSVRC2012_val_NUMBER.JPEG
    val_folders: dict[str, str]

    def has_train(self) -> bool:
        return bool(self.train_tar or self.class_tars or self.class_folders)

    def has_val(self) -> bool:
        return bool(self.val_tar or self.val_flat or self.val_folders)


def recognizes(name: str) -> bool:
    """Returns whether a name is `imagenet2012`, or a path to a form of ImageNet or to a part of it.

    Not torchvision's folders: class folders are read like any others, and in the same order.
    """
    if not is_path(name):
        return name == NAME
    if not os.path.isdir(name):
        return False
    parts = _find(name)
    return bool(
        parts.train_tar
        or parts.class_tars
        or parts.val_tar
        or parts.val_flat
        or parts.root != name
        or _unnamed(parts)
        or any(KNOWN.match(file) for file in os.listdir(name) if file not in (TRAIN, VAL))
        or os.path.basename(os.path.abspath(name)) == NAME
        and not any(entry.is_dir() for entry in os.scandir(name))
    )


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns whether there are at least `pictures` images: always for `imagenet2012`, tars by size.

    Raises:
      UserError: it is not there, or not complete.
    """
    if _built(name, data_dir) or _class_folders_alone(name, data_dir):
        return True
    parts = _parts(name, data_dir)
    files = [parts.train_tar, *parts.class_tars.values(), parts.val_tar]
    size = sum(os.path.getsize(file) for file in files if file)
    return not is_path(name) or size >= pictures * PICTURE_BYTES


def open_source(name: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens `imagenet2012` (a copy that TFDS has built, else any form in `data_dir`), or a folder.

    Validation images of classes without training images are left out, so that a subset works.

    Raises:
      UserError: it is not there, incomplete, or of no known form; the message says what was found and what is
      expected.
    """
    built = _built(name, data_dir)
    if built:
        return tfds.open_built(built, name, val_fraction=val_fraction, seed=seed)
    plain = _class_folders_alone(name, data_dir)
    if plain:
        source = folder.open_source(plain, data_dir=None, val_fraction=val_fraction, seed=seed)
        return dataclasses.replace(source, name=name)
    parts = _parts(name, data_dir)
    if parts.train_tar or parts.class_tars or parts.val_tar:
        say(f'{parts.root}: reading the index of the tars')
    skipped = collections.Counter()
    val = _val(parts, skipped)  # first: a tar that is cut off is found in seconds
    train = _train(parts, skipped)
    class_names = sorted(train)
    labels = {wnid: label for label, wnid in enumerate(class_names)}
    there = {wnid: files for wnid, files in val.items() if wnid in labels}
    left_out = sum(len(files) for files in val.values()) - sum(map(len, there.values()))
    if len(class_names) < 2 or not there:
        raise UserError(
            f'{parts.root}: found {len(class_names)} classes with training images, '
            f'{len(there)} of them with validation images; needs at least two '
            'with training images and one with validation images'
        )
    notes = _strangers(parts)
    notes += skipped_note(skipped)
    if os.path.isdir(os.path.join(parts.root, 'test')):
        notes += ('test/ is not used: it has no labels',)
    if left_out:
        notes += (f'{left_out} validation images left out: train has no images of their classes',)
    splits = {
        split: [
            Entry(file, offset, size, path, labels[wnid])
            for wnid in sorted(files)
            for _, path, file, offset, size in sorted(files[wnid])
        ]
        for split, files in (('train', train), ('val', there))
    }
    return from_entries(
        name,
        class_names,
        splits,
        root=parts.root,
        notes=notes,
        val_fraction=val_fraction,
        seed=seed,
    )


# Finding a form


def _built(name: str, data_dir: str | None) -> str | None:
    """Returns the folder of the newest copy that TFDS has built of `imagenet2012`, if any."""
    if is_path(name):
        return None
    versions = os.path.join(glob.escape(tfds.data_root(NAME, data_dir)), NAME, '*.*.*')
    found = [
        folder
        for folder in glob.glob(versions)
        if os.path.isfile(os.path.join(folder, 'dataset_info.json'))
    ]
    return max(found, default=None, key=lambda folder: [*map(int, re.findall(r'\d+', folder))])


def _class_folders_alone(name: str, data_dir: str | None) -> str | None:
    """Returns the folder of `imagenet2012` if it has class folders, in train/ or not, but nothing of val.

    It is read as if given by its path: a part of the training images is held out.
    """
    root = tfds.data_root(NAME, data_dir)
    if is_path(name) or not os.path.isdir(root) or recognizes(root):
        return None
    parts = _find(root)
    inside = _class_folders(root, os.listdir(root))
    alone = parts.class_folders or (not parts.has_train() and len(inside) > 1)
    return root if alone and not parts.has_val() else None


def _parts(name: str, data_dir: str | None) -> Parts:
    """Finds a complete form; UserError if there is none."""
    if is_path(name):
        parts = _find(name)
        if _complete(parts):
            return parts
        raise UserError(
            f'{name}: looks like ImageNet, but {_missing(parts)}; found {_found(name)}; expected '
            f'{FORMS}'
        )
    root = tfds.data_root(NAME, data_dir)
    places = [root, os.path.join(root, 'downloads', 'manual')]  # TFDS looks in the second
    found = [_find(place) for place in places if os.path.isdir(place)]
    complete = next((parts for parts in found if _complete(parts)), None)
    if complete:
        return complete
    wanted = ' and '.join(f'{tar} ({size})' for tar, size in SIZES.items())
    partial = next((parts for parts in found if parts.has_train() or parts.has_val()), None)
    if partial:
        problem = f'{_missing(partial)}; found {_found(partial.root)}'
    else:
        problem = f'not found{f"; {root} has {_found(root)}" if found else ""}'
    forms = f', of the form {FORMS}' if found else ''
    raise UserError(
        f'{NAME}: {problem}: put {wanted} from https://image-net.org into {root}, or give the folder of '
        f'any copy (--dir){forms}; --config=quickstart trains without any download'
    )


def _find(root: str) -> Parts:
    """Finds the parts of ImageNet in a folder, or below it in Kaggle's layout."""
    kaggle = [os.path.join(root, path) for path in KAGGLE]
    root = next((path for path in kaggle if os.path.isdir(path)), root)
    train, val = _split_folder(root, 'train'), _split_folder(root, 'val')
    train_names = os.listdir(train) if train else []
    val_names = os.listdir(val) if val else []
    train_tar, val_tar = (os.path.join(root, tar) for tar in (TRAIN_TAR, VAL_TAR))
    return Parts(
        root,
        train_tar if os.path.isfile(train_tar) else None,
        {
            name[:-4]: os.path.join(train, name)
            for name in train_names
            if WNID.fullmatch(name[:-4]) and name.endswith('.tar')
        },
        _class_folders(train, train_names),
        val_tar if os.path.isfile(val_tar) else None,
        val if any(NUMBER.fullmatch(name) for name in val_names) else None,
        _class_folders(val, val_names),
    )


def _split_folder(root: str, split: str) -> str | None:
    """Returns the folder of a split, if any: the first of train/ and val/, other names, the tar's name."""
    tar = TRAIN if split == 'train' else VAL
    names = [name for name in os.listdir(root) if split_of(name) == split or name == tar]
    names.sort(key=lambda name: (name != split, name == tar, name))
    paths = [os.path.join(root, name) for name in names]
    return next((path for path in paths if os.path.isdir(path)), None)


def _class_folders(tree: str | None, names: list[str]) -> dict[str, str]:
    return {
        name: os.path.join(tree, name)
        for name in names
        if WNID.fullmatch(name) and os.path.isdir(os.path.join(tree, name))
    }


def _unnamed(parts: Parts) -> bool:
    """Returns whether val/ beside class folders is flat, with names that say nothing about the labels."""
    if not parts.class_folders or parts.has_val():
        return False
    val = _split_folder(parts.root, 'val')
    folders, files = list_folder(val, collections.Counter()) if val else ([], [])
    return bool(files) and not folders


def _complete(parts: Parts) -> bool:
    return parts.has_train() and parts.has_val()


def _missing(parts: Parts) -> str:
    if _unnamed(parts):
        return (
            'the files in val/ are not in class folders, and not called ILSVRC2012_val_NUMBER.JPEG'
        )
    missing = [
        f'no {split} images'
        for split, there in (('training', parts.has_train()), ('validation', parts.has_val()))
        if not there
    ]
    return f'there are {" and ".join(missing)}'


def _found(root: str) -> str:
    """Lists what is in a folder, and in its train/ and val/, in a few words."""
    parts = _find(root)
    shown = []
    for kind, things in (
        ('train/nXXXXXXXX.tar', parts.class_tars),
        ('train/nXXXXXXXX/', parts.class_folders),
        ('val/nXXXXXXXX/', parts.val_folders),
    ):
        if things:
            shown.append(f'{len(things)} {kind}')
    names = sorted(name for name in os.listdir(parts.root) if not name.startswith('.'))
    shown += [
        f'{name}/' if os.path.isdir(os.path.join(parts.root, name)) else name for name in names[:8]
    ]
    return (', '.join(shown) + (', ...' if len(names) > 8 else '')) or 'an empty folder'


# Listing the images: {WordNet ID: [(file name, name for messages, file, offset, size)]}


def _train(parts: Parts, skipped: collections.Counter) -> dict[str, list[tuple]]:
    if parts.train_tar:
        inner = {
            os.path.basename(member.name).removesuffix('.tar'): member
            for member in tars.members(parts.train_tar)
            if WNID.fullmatch(os.path.basename(member.name).removesuffix('.tar'))
        }
        if not inner:
            raise UserError(f'{parts.train_tar}: holds no nXXXXXXXX.tar: download it again')
        found = {
            wnid: _in_tar(parts.train_tar, tars.members(parts.train_tar, member), skipped)
            for wnid, member in inner.items()
        }
    else:
        # A tar beside the folder of its class is complete; the folder may not be.
        found = {
            wnid: _in_folder(path, skipped)
            for wnid, path in parts.class_folders.items()
            if wnid not in parts.class_tars
        }
        for wnid, path in parts.class_tars.items():
            found[wnid] = _in_tar(path, tars.members(path), skipped)
    empty = sorted(wnid for wnid, files in found.items() if not files)
    if empty:
        raise UserError(f'{parts.root}: the class {empty[0]} has no training images: copy it again')
    return found


def _strangers(parts: Parts) -> tuple[str, ...]:
    """Returns a note about folders in train/ that are not named after a WordNet ID, if any."""
    if parts.train_tar:
        return ()
    tree = os.path.dirname(next(iter({**parts.class_folders, **parts.class_tars}.values())))
    folders, _ = list_folder(tree, collections.Counter())
    names = [name for name in folders if not WNID.fullmatch(name)]
    return (not_used(names, ' (in train/, not called nXXXXXXXX)'),) if names else ()


def _val(parts: Parts, skipped: collections.Counter) -> dict[str, list[tuple]]:
    if parts.val_tar:
        flat = _in_tar(parts.val_tar, tars.members(parts.val_tar), skipped)
    else:
        flat = _in_folder(parts.val_flat, skipped) if parts.val_flat else []
    found = collections.defaultdict(list)
    if flat:
        wnid_of = _labels(parts)
        for file in flat:
            match = NUMBER.fullmatch(file[0])
            if not match:
                raise UserError(
                    f'{file[1]}: not called ILSVRC2012_val_NUMBER.JPEG, so its class is unknown: '
                    'remove it'
                )
            found[wnid_of(int(match[1]), file[1])].append(file)
    if not parts.val_tar:
        for wnid, path in parts.val_folders.items():
            found[wnid] += _in_folder(path, skipped)
    return found


def _in_tar(path: str, members: list[tars.Member], skipped: collections.Counter) -> list[tuple]:
    found = []
    for name, offset, size in members:
        base = os.path.basename(name)
        kind = not_an_image(base)
        if kind:
            skipped[kind] += 1
        else:
            found.append((base, f'{path}: {base}', path, offset, size))
    return found


def _in_folder(tree: str, skipped: collections.Counter) -> list[tuple]:
    _, names = list_folder(tree, skipped)
    paths = [os.path.join(tree, name) for name in names]
    return [(name, path, path, 0, None) for name, path in zip(names, paths, strict=True)]


def _labels(parts: Parts):
    """Returns a function (number in a validation image's name, that name for messages) -> WordNet ID.

    From Kaggle's list if it is there, else from the one that TFDS ships: a WordNet ID per image.
    """
    for place in ('.', '..', '../..', '../../..'):
        path = os.path.normpath(os.path.join(parts.root, place, SOLUTION))
        if os.path.isfile(path) and (place == '.' or os.path.basename(parts.root) == 'CLS-LOC'):
            table = _solution(path)
            break
    else:
        package = importlib.util.find_spec('tensorflow_datasets')
        if package is None:
            raise UserError(
                f'{parts.root}: the labels of the validation images come with tensorflow-datasets, '
                'which is not installed: pip install tensorflow-datasets'
            )
        (package_folder,) = package.submodule_search_locations
        path = os.path.join(package_folder, 'datasets', NAME, 'validation_labels.txt')
        with open(path, encoding='utf-8') as file:
            table = dict(enumerate(file.read().split(), start=1))

    def wnid_of(number: int, name: str) -> str:
        if number not in table:
            raise UserError(
                f'{name}: {path} does not list its class: remove it, or complete the list'
            )
        return table[number]

    return wnid_of


def _solution(path: str) -> dict[int, str]:
    """Reads Kaggle's list: ImageId,PredictionString; the string starts with the class, boxes follow."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            rows = [row for row in csv.reader(file) if row and row[0] != 'ImageId']
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}') from error
    except (ValueError, csv.Error) as error:
        raise UserError(f'{path}: not a list in UTF-8 ({error}): download it again') from error
    table = {}
    for line, row in enumerate(rows, start=2):
        number = NUMBER.fullmatch(f'{row[0]}.JPEG')
        wnid = WNID.match(row[1]) if len(row) > 1 else None
        if not number or not wnid:
            raise UserError(
                f'{path}, line {line}: not ILSVRC2012_val_NUMBER,nXXXXXXXX ...: download it again'
            )
        table[int(number[1])] = wnid[0]
    return table
