"""WebDataset shards: tars of KEY.jpg (or another extension of images) and KEY.cls, the label as a number.

A word in a shard's path gives its split (imagenet1k-train-0000.tar, val/0.tar); without any, all shards are
for training. `classnames.txt` may name the classes, one per line. Other members are skipped and counted.
"""

import collections
import os

from alexnet_jax.common.errors import UserError, say
from alexnet_jax.input.sources import tars
from alexnet_jax.input.sources.source import (
    IMAGES,
    PICTURE_BYTES,
    SPLITS,
    Entry,
    Source,
    from_entries,
    holds_images,
    is_path,
    not_an_image,
    not_used,
    number_names,
    skipped_note,
    split_in,
    split_of,
    unlabeled,
)

NAMES = 'classnames.txt'


def recognizes(name: str) -> bool:
    """Returns whether a name is a folder with shards or split folders of shards, and no images."""
    return is_path(name) and os.path.isdir(name) and bool(_shards(name)) and not holds_images(name)


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns whether the shards are as large as `pictures` photographs."""
    del data_dir
    size = sum(os.path.getsize(os.path.join(name, shard)) for shard in _shards(name))
    return size >= pictures * PICTURE_BYTES


def open_source(path: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens the shards in a folder, sorted by name; records are in the order of the shards.

    Raises:
      UserError: a shard is damaged, or an image has no label or one without a name.
    """
    del data_dir  # only for TFDS
    shards, notes, validation = collections.defaultdict(list), [], ''
    for shard in _shards(path):
        shards[split_in(shard)].append(shard)
    if {*shards} == {None}:
        shards['train'] = shards.pop(None)
    if 'train' not in shards:
        raise UserError(
            f'{path}: {shards[next(iter(shards))][0]} is not named as a training shard, and no other '
            'shard is: rename the training shards to ...train...tar'
        )
    if None in shards:
        notes.append(not_used(shards[None]))
    say(f'{path}: reading the index of the shards')
    skipped = collections.Counter()
    entries = {
        split: [
            entry
            for shard in shards[split]
            for entry in _entries(path, shard, skipped, labeled=split != 'test')
        ]
        for split in SPLITS
        if split in shards
    }
    missing = [entry for entry in entries.get('test', ()) if entry.label == -1]
    if missing and len(missing) == len(entries['test']):
        del entries['test']
        notes.append(unlabeled('the test split'))
    elif missing:
        raise UserError(f'{missing[0].name}: has no label, but other images of the test split do')
    elif 'test' in entries and 'val' not in entries:
        entries['val'] = entries.pop('test')
        validation = 'the test shards'
    for split, found in entries.items():
        if not found:
            raise UserError(
                f'{path}: the {split} shards have no images: a shard has KEY.jpg and KEY.cls'
            )
    names = _names(path, entries)
    return from_entries(
        path,
        names,
        entries,
        root=path,
        notes=(*notes, *skipped_note(skipped)),
        validation=validation,
        val_fraction=val_fraction,
        seed=seed,
    )


def _shards(path: str) -> list[str]:
    """Returns the sorted tars in a folder, or in its split folders, relative to it."""
    names = sorted(os.listdir(path))
    inside = [
        os.path.join(folder, name)
        for folder in names
        if split_of(folder) and os.path.isdir(os.path.join(path, folder))
        for name in sorted(os.listdir(os.path.join(path, folder)))
    ]
    return [
        name
        for name in (*names, *inside)
        if name.endswith('.tar') and not os.path.basename(name).startswith('.')
    ]


def _entries(path: str, shard: str, skipped: collections.Counter, *, labeled: bool) -> list[Entry]:
    """Lists the images of a shard with their labels, in the order of the shard.

    If not `labeled`, images may have the label -1, and all do in a shard without labels.
    """
    file = os.path.join(path, shard)
    found, labels = [], {}
    for member in tars.members(file):
        key, extension = os.path.splitext(member.name)
        extension = extension.lower()
        if extension == '.cls':
            labels[key] = member
        elif extension in IMAGES and not os.path.basename(key).startswith('.'):
            found.append((key, member))
        else:
            kind = not_an_image(os.path.basename(member.name))
            skipped[kind or extension or 'file without extension'] += 1
    images = {}
    for key, member in found:
        folder, name = os.path.split(key)
        if key not in labels and os.path.join(folder, name.partition('.')[0]) in labels:
            skipped[f'.{name.partition(".")[2]}{os.path.splitext(member.name)[1]}'] += 1
            continue  # KEY.mask.png beside KEY.jpg
        if key in images:
            raise UserError(f'{file}: two images have the key {key}: make the keys unique')
        images[key] = member
    if not labeled and not labels:
        return [
            Entry(file, image.offset, image.size, f'{file}: {image.name}', -1)
            for image in images.values()
        ]
    missing = [key for key in images if key not in labels]
    if missing and not labels and all(map(os.path.dirname, images)):
        raise UserError(
            f'{file}: holds folders of images without KEY.cls, so it is not a WebDataset shard: unpack it, '
            'and give the folder'
        )
    if missing:
        raise UserError(
            f'{file}: {len(missing)} images have no label; the first is {images[missing[0]].name}: '
            f'add {missing[0]}.cls, a number as text'
        )
    entries = []
    with open(file, 'rb') as shard_file:
        for key, image in images.items():
            shard_file.seek(labels[key].offset)
            text = shard_file.read(labels[key].size)
            try:
                label = int(text)
            except ValueError:
                label = -2
            if label < (0 if labeled else -1):
                raise UserError(f'{file}: {labels[key].name} is {text[:20]!r}, not a class index')
            entries.append(Entry(file, image.offset, image.size, f'{file}: {image.name}', label))
    return entries


def _names(path: str, entries: dict[str, list[Entry]]) -> list[str]:
    largest = max((entry for found in entries.values() for entry in found), key=lambda e: e.label)
    try:
        with open(os.path.join(path, NAMES), encoding='utf-8-sig') as file:
            names = file.read().splitlines()
    except FileNotFoundError:
        return number_names(largest.label, len(entries['train']), largest.name)
    except ValueError as error:
        raise UserError(f'{path}/{NAMES}: not UTF-8 ({error}): convert it') from error
    if largest.label >= len(names):
        raise UserError(
            f'{largest.name}: label {largest.label}, but {path}/{NAMES} names only {len(names)} classes'
        )
    return names
