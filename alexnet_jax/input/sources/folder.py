"""A folder with one folder of pictures per class, as torchvision's users have it, or Tiny ImageNet."""

import os
from collections.abc import Iterator

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.sources.source import Example, Source, is_path, split_off

# What Tiny ImageNet has besides pictures: boxes and, instead of class folders in val/, a list.
BOXES, LIST = '_boxes.txt', 'val_annotations.txt'


def _visible(names) -> list[str]:
    return sorted(name for name in names if not name.startswith('.'))


def _classes(tree: str) -> list[str]:
    return [name for name in _visible(os.listdir(tree)) if os.path.isdir(os.path.join(tree, name))]


def _files(tree: str, class_names: list[str]) -> list[tuple[str, int]]:
    """Every file below the class folders of a tree, sorted by class and path -> (path, label)s."""
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
    """Tiny ImageNet's validation split: a list with a picture and its class in every line.

    Pictures of classes without a folder in train/ are left out: some of the classes is a subset.
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
    """Whether a source's name means a folder: every path does that no other form has taken."""
    return is_path(name)


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Never: a folder is counted in a moment."""
    del name, data_dir, pictures
    return False


def open_source(path: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens ROOT/train/CLASS/... with ROOT/val/CLASS/..., ROOT/train alone, or ROOT/CLASS/...

    Labels follow the sorted names of the class folders, which are the classes' names. All files below
    them that are not hidden count as pictures, whatever they are called. Without val/ the validation
    split is test/ (as of CIFAR-10), and without either `val_fraction` of the pictures, chosen by `seed`,
    is held out. Tiny ImageNet is read as it is distributed; its classes are called by WordNet's numbers.
    """
    del data_dir  # of TFDS
    if not os.path.isdir(path):
        raise UserError(f'{path}: there is no such folder')
    train, val = os.path.join(path, 'train'), os.path.join(path, 'val')
    if os.path.isdir(val) and not os.path.isdir(train):
        raise UserError(f'{path}: there is a val/ but no train/')
    if os.path.isdir(train) and not os.path.isdir(val):
        val = os.path.join(path, 'test')
    tree = train if os.path.isdir(train) else path
    class_names = _classes(tree)
    if len(class_names) < 2:
        raise UserError(
            f'{tree}: need at least two class folders, found {len(class_names)}: the '
            'layout is train/CLASS/PICTURE and val/CLASS/PICTURE, or CLASS/PICTURE'
        )
    files = {'train': _files(tree, class_names)}
    if os.path.isdir(val):
        listed = os.path.exists(os.path.join(val, LIST))
        files['val'] = _listed(val, class_names) if listed else _files(val, class_names)
        if not files['val']:
            raise UserError(f'{val}: there are no pictures of the classes in train/')
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
