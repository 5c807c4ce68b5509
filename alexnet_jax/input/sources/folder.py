"""Folders with one subfolder of images per class, as in torchvision's ImageFolder, or Tiny ImageNet."""

import os
from collections.abc import Iterator

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.sources.source import Example, Source, is_path, split_off

# Tiny ImageNet's files other than images: boxes and, instead of class folders in val/, a list.
BOXES, LIST = '_boxes.txt', 'val_annotations.txt'


def _visible(names) -> list[str]:
    return sorted(name for name in names if not name.startswith('.'))


def _classes(tree: str) -> list[str]:
    return [name for name in _visible(os.listdir(tree)) if os.path.isdir(os.path.join(tree, name))]


def _files(tree: str, class_names: list[str]) -> list[tuple[str, int]]:
    """Lists the files below a tree's class folders, sorted by class and path -> [(path, label)]."""
    files = []
    for name in _classes(tree):
        if name not in class_names:
            raise UserError(f'{os.path.join(tree, name)}: this class has no folder in train/')
        found = [
            os.path.join(directory, file)
            for directory, _, names in os.walk(os.path.join(tree, name), followlinks=True)
            for file in _visible(names)
            if not file.endswith(BOXES)
        ]
        if not found:
            raise UserError(
                f'{os.path.join(tree, name)}: the class folder is empty: put pictures '
                'there or remove it'
            )
        label = class_names.index(name)
        files += [(path, label) for path in sorted(found)]
    return files


def _listed(val: str, class_names: list[str]) -> list[tuple[str, int]]:
    """Reads Tiny ImageNet's validation list, one image and its class per line -> [(path, label)].

    Images of classes without a folder in train/ are left out, so that a subset of classes works.
    """
    with open(os.path.join(val, LIST), encoding='utf-8') as file:
        rows = sorted(line.split('\t')[:2] for line in file)
    if any(len(row) != 2 for row in rows):
        raise UserError(f'{os.path.join(val, LIST)}: every line must be PICTURE, tab, CLASS')
    return [
        (os.path.join(val, 'images', name), class_names.index(label))
        for name, label in rows
        if label in class_names
    ]


def recognizes(name: str) -> bool:
    """Returns whether a name refers to a folder: every path does, unless an earlier form took it."""
    return is_path(name)


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns False: a folder's files are counted in a moment."""
    del name, data_dir, pictures
    return False


def open_source(path: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens ROOT/train/CLASS/... with ROOT/val/CLASS/..., ROOT/train alone, or ROOT/CLASS/...

    The sorted names of the class folders are the class names and give the labels. Every file below
    them that is not hidden counts as an image, whatever its name. Without val/, the validation split is
    test/ (as in CIFAR-10); without either, `val_fraction` of the images, selected by `seed`, is held
    out. Tiny ImageNet is read as distributed; its class names are WordNet IDs.
    """
    del data_dir  # only for TFDS
    if not os.path.isdir(path):
        raise UserError(f'{path}: no such folder')
    train, val = os.path.join(path, 'train'), os.path.join(path, 'val')
    if os.path.isdir(val) and not os.path.isdir(train):
        raise UserError(f'{path}: has a val/ but no train/')
    if os.path.isdir(train) and not os.path.isdir(val):
        val = os.path.join(path, 'test')
    tree = train if os.path.isdir(train) else path
    class_names = _classes(tree)
    if len(class_names) < 2:
        raise UserError(
            f'{tree}: needs at least two class folders, found {len(class_names)}: the '
            'layout is train/CLASS/PICTURE and val/CLASS/PICTURE, or CLASS/PICTURE'
        )
    files = {'train': _files(tree, class_names)}
    if os.path.isdir(val):
        listed = os.path.exists(os.path.join(val, LIST))
        files['val'] = _listed(val, class_names) if listed else _files(val, class_names)
        if not files['val']:
            raise UserError(f'{val}: has no pictures of the classes in train/')
    else:
        chosen = split_off(len(files['train']), val_fraction, seed, path)
        files = {split: [files['train'][i] for i in chosen[split]] for split in chosen}

    def read(split: str, start: int) -> Iterator[Example]:
        for name, label in files[split][start:]:
            try:
                with open(name, 'rb') as file:
                    data = file.read()
            except OSError as error:
                raise UserError(f'{name}: cannot be read: {error.strerror}') from error
            yield Example(name, data, label)

    return Source(path, class_names, {split: len(files[split]) for split in files}, read)
