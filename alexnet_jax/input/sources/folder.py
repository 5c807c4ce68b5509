"""Folders with one subfolder of images per class, as in torchvision's ImageFolder, or Tiny ImageNet."""

import collections
import os

from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.input.sources.source import (
    Entry,
    Source,
    above,
    from_entries,
    identity,
    image_files,
    is_image,
    is_path,
    list_folder,
    not_used,
    skipped_note,
    split_in,
    split_of,
)

LIST = 'val_annotations.txt'  # Tiny ImageNet has it instead of class folders in val/
ARCHIVES = ('.zip', '.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.rar', '.7z')
LAYOUT = 'the layout is train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE'


def recognizes(name: str) -> bool:
    """Returns whether a name refers to a folder: every path does, unless an earlier form took it."""
    return is_path(name)


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns False: counting a folder's files takes only a moment."""
    del name, data_dir, pictures
    return False


def open_source(path: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens ROOT/train/CLASS/... with ROOT/val/CLASS/..., ROOT/train alone, or ROOT/CLASS/...

    The sorted names of the class folders are the class names and give the labels. Every file below
    them counts as an image unless its name says otherwise (`source.not_an_image`). `source.ALIASES` lists
    what the folders of the splits may be called. Without val/, the validation split is test/ (as in
    CIFAR-10); without either, `val_fraction` of the images, selected by `seed`, is held out. A test/
    without class folders is not used. Tiny ImageNet is read as distributed; its class names are WordNet
    IDs.
    """
    del data_dir  # only for TFDS
    if os.path.isfile(path):
        raise UserError(f'{path}: give a folder (unpack archives first), or a .csv or .tsv list')
    if not os.path.isdir(path):
        raise UserError(f'{path}: no such folder')
    skipped, notes = collections.Counter(), []
    folders, beside = list_folder(path, collections.Counter())
    splits = split_folders(path, folders)
    if 'train' in splits:
        notes += _unused(path, folders, splits)
        notes += _loose(path, [name for name in beside if is_image(name)])
    tree = splits.get('train', path)
    class_names, loose = _classes(path, tree, skipped)
    if len(class_names) < 2:
        raise UserError(
            f'{tree}: needs at least two class folders, found {len(class_names)}'
            f'{_hint(tree, class_names, loose)}'
        )
    notes += _loose(tree, loose)
    entries = {'train': _entries(path, tree, class_names, class_names, skipped)}
    others = {split: splits[split] for split in ('val', 'test') if split in splits}
    validation = ''
    if 'test' in others:
        name = f'{os.path.basename(others["test"])}/'
        if not _has_classes(others['test'], class_names):
            del others['test']
            notes.append(f'{name} is not used: it has no class folders')
        elif 'val' not in others:
            others, validation = {'val': others['test']}, name
    for split, folder in others.items():
        if os.path.exists(os.path.join(folder, LIST)):
            entries[split] = _listed(folder, class_names)
        else:
            found, loose = _classes(path, folder, skipped)
            entries[split] = _entries(path, folder, found, class_names, skipped)
            notes += _loose(folder, loose)
        if not entries[split]:
            raise UserError(f'{folder}: has no images of the classes in {tree}: {LAYOUT}')
    return from_entries(
        path,
        class_names,
        entries,
        root=path,
        notes=(*notes, *skipped_note(skipped)),
        validation=validation,
        val_fraction=val_fraction,
        seed=seed,
    )


def split_folders(path: str, folders: list[str]) -> dict[str, str]:
    """Returns the split folders among the folders in `path`: {'train': path, ...}.

    Raises:
      UserError: two folders mean the same split, or there are split folders without train/.
    """
    names = collections.defaultdict(list)
    for name in folders:
        if split_of(name):
            names[split_of(name)].append(name)
    for same in names.values():
        if len(same) > 1:
            raise UserError(
                f'{path}: {" and ".join(f"{name}/" for name in same)} mean the same split: '
                'remove or rename one of them'
            )
    if not names:
        _refuse_almost_splits(path, folders)
    if names and 'train' not in names:
        found = ' and '.join(f'{name}/' for name in folders if split_of(name))
        others = [name for name in folders if not split_of(name)]
        beside = f' beside {others[0]}/{"..." if len(others) > 1 else ""}' if others else ''
        itself = 'it is itself a class' if found.count('/') == 1 else 'they are classes themselves'
        raise UserError(
            f'{path}: has {found}{beside} but no train/: move the classes to train on into train/CLASS, '
            f'or rename {found} if {itself}'
        )
    return {split: os.path.join(path, same[0]) for split, same in names.items()}


def _refuse_almost_splits(path: str, folders: list[str]) -> None:
    """Raises UserError for folders such as train_images/ beside valid_images/."""
    meant = {name: split_in(name) for name in folders}
    train = [name for name, split in meant.items() if split == 'train']
    others = [name for name, split in meant.items() if split in ('val', 'test')]
    if train and others:
        raise UserError(
            f'{path}: {train[0]}/ and {others[0]}/ do not look like classes: rename them to train/ and '
            f'{meant[others[0]]}/ or, if they are classes, to something else'
        )


def _classes(path: str, tree: str, skipped: collections.Counter) -> tuple[list[str], list[str]]:
    """Lists the class folders of a tree, and the files beside them; not links to a folder above."""
    folders, loose = list_folder(tree, skipped)
    outer = above(path) | above(tree)
    names = [name for name in folders if identity(os.path.join(tree, name)) not in outer]
    if len(names) < len(folders):
        skipped['link to a folder above'] += len(folders) - len(names)
    return names, loose


def _loose(folder: str, files: list[str]) -> list[str]:
    return [not_used(files, f' (in {folder}, but in no class folder)')] if files else []


def _unused(path: str, folders: list[str], splits: dict[str, str]) -> list[str]:
    """Returns notes about folders beside train/ that are not used; UserError for class folders."""
    others = [name for name in folders if os.path.join(path, name) not in splits.values()]
    train = os.path.basename(splits['train'])
    for name in others:
        _, files = list_folder(os.path.join(path, name), collections.Counter())
        if any(is_image(file) for file in files):
            raise UserError(
                f'{path}: {name}/ has images and is beside {train}/: move it into {train}/ if it is a '
                'class, or out of this folder'
            )
    return [not_used([f'{name}/' for name in others])] if others else []


def _hint(tree: str, folders: list[str], loose: list[str]) -> str:
    """Returns what a folder without two class folders has instead, and what to do."""
    if len(folders) == 1:
        inner = os.path.join(tree, folders[0])
        below, _ = list_folder(inner, collections.Counter())
        if len(below) > 1 or any(map(split_of, below)):
            return f' (give {inner}, which has {len(below)}): {LAYOUT}'
    files = sorted(os.listdir(tree))
    lists = [name for name in files if name.lower().endswith(('.csv', '.tsv'))]
    if lists and not folders:
        return f', but the list {lists[0]}: give {os.path.join(tree, lists[0])}'
    archives = [name for name in files if name.lower().endswith(ARCHIVES)]
    if archives:
        return f', but the archive {archives[0]}: unpack it'
    pictures = [name for name in loose if is_image(name)]
    parent = os.path.dirname(os.path.abspath(tree))
    if pictures and not folders:
        count = f'{len(pictures):,} image{"s" * (len(pictures) > 1)}'
        beside, _ = list_folder(parent, collections.Counter())
        up = f', or give {parent}' if 1 < len(beside) <= 2000 and _all_hold(parent, beside) else ''
        return (
            f', but {count} directly in it: sort them into CLASS/ folders{up}, or give a list FILE.csv '
            'with lines path,label'
        )
    return f': {LAYOUT}'


def _all_hold(parent: str, folders: list[str]) -> bool:
    """Returns whether all folders hold images, so that they may be classes."""
    return all(
        any(map(is_image, list_folder(os.path.join(parent, name), collections.Counter())[1]))
        for name in folders
    )


def _has_classes(test: str, class_names: list[str]) -> bool:
    """Returns whether test/ has class folders, that is, labels."""
    folders, _ = list_folder(test, collections.Counter())
    return bool({*folders} & {*class_names})


def _entries(
    path: str,
    tree: str,
    folders: list[str],
    class_names: list[str],
    skipped: collections.Counter,
) -> list[Entry]:
    """Lists the images in the class folders of a tree, sorted by class and path."""
    labels = {name: label for label, name in enumerate(class_names)}
    entries, empty = [], ''
    for name in folders:
        folder = os.path.join(tree, name)
        if name not in labels:
            raise UserError(f'{folder}: this class has no folder in train/')
        before = skipped.total()
        found = image_files(folder, skipped, path)
        _refuse_splits(folder, found)
        if not found and not empty:
            others = skipped.total() - before
            but = f' but for files that are not images ({others})' if others else ''
            empty = f'{folder}: the class folder is empty{but}: put images there or remove it'
        entries += [Entry(file, 0, None, file, labels[name]) for file in found]
    if empty:
        raise UserError(empty)
    return entries


def _refuse_splits(folder: str, files: list[str]) -> None:
    """Raises UserError if some files are in split folders inside the folder of a class."""
    start = len(folder) + 1
    below = {file[start:].partition(os.sep)[0] for file in files if os.sep in file[start:]}
    splits = sorted(filter(split_of, below))
    if splits:
        name = os.path.basename(folder)
        raise UserError(
            f'{os.path.dirname(folder)}: {name}/ has {splits[0]}/ of its own: this looks like a folder of '
            f'datasets: give {folder}, or rename {name}/{splits[0]}/ if {name} is a class'
        )


def _listed(val: str, class_names: list[str]) -> list[Entry]:
    """Reads Tiny ImageNet's validation list, with one image and its class per line.

    Images of classes without a folder in train/ are left out, so that a subset of classes works.
    """
    path, images = os.path.join(val, LIST), os.path.join(val, 'images')
    try:
        with open(path, encoding='utf-8-sig') as file:
            rows = sorted(line.rstrip('\n').split('\t')[:2] for line in file if line.strip())
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}') from error
    except ValueError as error:
        raise UserError(f'{path}: not UTF-8 ({error}): convert it') from error
    if any(len(row) != 2 for row in rows):
        raise UserError(f'{path}: every line must be IMAGE, tab, CLASS')
    labels = {name: label for label, name in enumerate(class_names)}
    files = [(os.path.join(images, name), labels[wnid]) for name, wnid in rows if wnid in labels]
    there = {*os.listdir(images)} if os.path.isdir(images) else set()
    missing = sum(os.path.basename(file) not in there for file, _ in files)
    if missing:
        raise UserError(
            f'{path}: {missing:,} of {len(files):,} images listed in it are not in {images}: unpack the '
            'set again'
        )
    return [Entry(file, 0, None, file, label) for file, label in files]
