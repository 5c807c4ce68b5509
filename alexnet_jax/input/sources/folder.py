"""Folders with one subfolder of images per class, as in torchvision's ImageFolder, or Tiny ImageNet."""

import collections
import os

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.sources.source import (
    IMAGES,
    Entry,
    Source,
    from_entries,
    image_files,
    is_path,
    list_folder,
    not_used,
    skipped_note,
    split_of,
)

LIST = 'val_annotations.txt'  # Tiny ImageNet has it instead of class folders in val/
LAYOUT = 'the layout is train/CLASS/PICTURE and val/CLASS/PICTURE, or CLASS/PICTURE'


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
    them counts as an image unless its name says otherwise (`source.not_an_image`). `source.ALIASES` lists
    what the folders of the splits may be called. Without val/, the validation split is test/ (as in
    CIFAR-10); without either, `val_fraction` of the images, selected by `seed`, is held out. Tiny
    ImageNet is read as distributed; its class names are WordNet IDs.
    """
    del data_dir  # only for TFDS
    if os.path.isfile(path):
        raise UserError(f'{path}: give a folder (unpack archives first), or a .csv or .tsv list')
    if not os.path.isdir(path):
        raise UserError(f'{path}: no such folder')
    skipped, notes = collections.Counter(), []
    folders, _ = list_folder(path, collections.Counter())
    splits = split_folders(path, folders)
    if 'train' in splits:
        notes += _unused(path, folders, splits)
    tree = splits.get('train', path)
    class_names, loose = list_folder(tree, skipped)
    if len(class_names) < 2:
        raise UserError(
            f'{tree}: needs at least two class folders, found {len(class_names)}'
            f'{_hint(path, class_names)}: {LAYOUT}'
        )
    if loose:
        notes.append(not_used(loose, f' (in {tree}, but in no class folder)'))
    entries = {'train': _entries(tree, class_names, class_names, skipped)}
    val = splits.get('val')
    validation = ''
    if not val and 'test' in splits:
        if _has_classes(splits['test'], class_names):
            val, validation = splits['test'], f'{os.path.basename(splits["test"])}/'
        else:
            notes.append(
                f'{os.path.basename(splits["test"])}/ is not used: it has no class folders'
            )
    if val:
        if os.path.exists(os.path.join(val, LIST)):
            entries['val'] = _listed(val, class_names)
        else:
            entries['val'] = _entries(val, list_folder(val, skipped)[0], class_names, skipped)
        if not entries['val']:
            raise UserError(f'{val}: has no pictures of the classes in {tree}: {LAYOUT}')
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
    if names and 'train' not in names:
        found = ' and '.join(f'{name}/' for name in folders if split_of(name))
        others = [name for name in folders if not split_of(name)]
        beside = f' beside {others[0]}/{"..." if len(others) > 1 else ""}' if others else ''
        raise UserError(
            f'{path}: has {found}{beside} but no train/: move the classes to train, into train/CLASS, '
            f'or rename {found} if these are classes'
        )
    return {split: os.path.join(path, same[0]) for split, same in names.items()}


def _unused(path: str, folders: list[str], splits: dict[str, str]) -> list[str]:
    """Returns notes about folders beside train/ that are not used; UserError for class folders."""
    others = [name for name in folders if os.path.join(path, name) not in splits.values()]
    train = os.path.basename(splits['train'])
    for name in others:
        _, files = list_folder(os.path.join(path, name), collections.Counter())
        if any(os.path.splitext(file)[1].lower() in IMAGES for file in files):
            raise UserError(
                f'{path}: {name}/ has pictures and is beside {train}/: move it into {train}/ if it is a '
                'class, or out of this folder'
            )
    names = [f'{name}/' for name in others]
    if 'test' in splits and 'val' in splits:
        names.append(f'{os.path.basename(splits["test"])}/')
    return [not_used(names)] if names else []


def _hint(path: str, folders: list[str]) -> str:
    """Returns what to say about a single folder that holds the set."""
    if len(folders) != 1 or folders[0] == path:
        return ''
    inner = os.path.join(path, folders[0])
    below = list_folder(inner, collections.Counter())[0] if os.path.isdir(inner) else []
    return f' (give {inner}, which has {len(below)})' if len(below) > 1 else ''


def _has_classes(test: str, class_names: list[str]) -> bool:
    """Returns whether test/ has class folders, so that it can serve as validation split."""
    folders, _ = list_folder(test, collections.Counter())
    return bool({*folders} & {*class_names})


def _entries(
    tree: str, folders: list[str], class_names: list[str], skipped: collections.Counter
) -> list[Entry]:
    """Lists the images in the class folders of a tree, sorted by class and path."""
    labels = {name: label for label, name in enumerate(class_names)}
    entries = []
    for name in folders:
        folder = os.path.join(tree, name)
        if name not in labels:
            raise UserError(f'{folder}: this class has no folder in train/')
        before = skipped.total()
        found = image_files(folder, skipped)
        if not found:
            others = skipped.total() - before
            but = f' but for files that are not images ({others})' if others else ''
            raise UserError(
                f'{folder}: the class folder is empty{but}: put pictures there or remove it'
            )
        entries += [Entry(file, 0, None, file, labels[name]) for file in found]
    return entries


def _listed(val: str, class_names: list[str]) -> list[Entry]:
    """Reads Tiny ImageNet's validation list, with one image and its class per line.

    Images of classes without a folder in train/ are left out, so that a subset of classes works.
    """
    with open(os.path.join(val, LIST), encoding='utf-8') as file:
        rows = sorted(line.split('\t')[:2] for line in file)
    if any(len(row) != 2 for row in rows):
        raise UserError(f'{os.path.join(val, LIST)}: every line must be PICTURE, tab, CLASS')
    labels = {name: label for label, name in enumerate(class_names)}
    files = [(os.path.join(val, 'images', name), labels.get(wnid)) for name, wnid in rows]
    return [Entry(file, 0, None, file, label) for file, label in files if label is not None]
