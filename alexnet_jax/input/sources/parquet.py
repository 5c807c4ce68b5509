"""Parquet files as Hugging Face stores image classification sets, in a folder or on the Hub.

    train-00000-of-00294.parquet, validation-..., test-...      in the folder, in data/ or another one
    train/0000.parquet, ...                                     or in a folder per split

One column has encoded images (a struct with `bytes`, or binary); another has labels (integers, booleans,
or strings, whose sorted values are the classes). The schema's metadata, if any, says which and names the
classes.
"""

import collections
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError, one_line, say
from alexnet_jax.input.sources.source import (
    HELD_OUT,
    PICTURE_BYTES,
    SPLITS,
    Example,
    Source,
    class_notes,
    content_of,
    fingerprint,
    holds_images,
    is_imagenet,
    is_path,
    list_folder,
    number_names,
    split_in,
    split_off,
    unlabeled,
)

HUB = 'hf://'
# Preferred if several columns could be meant.
IMAGE_NAMES, LABEL_NAMES = ('image', 'img'), ('label', 'labels')


class Columns(NamedTuple):
    """The columns of a set, and the names of its classes if the metadata have them."""

    image: str
    label: str
    names: list[str] | None
    note: tuple[str, ...]


def recognizes(name: str) -> bool:
    """Returns whether a name is hf://..., or a folder with Parquet files and no folders of images."""
    if not is_path(name):
        return name.startswith(HUB)
    return os.path.isdir(name) and not holds_images(name) and bool(_files(name))


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns whether a set on the Hub has at least `pictures` images, judging by its download size.

    False for a folder: counting its rows takes only a moment.
    """
    del data_dir
    if not name.startswith(HUB):
        return False
    repository, revision, folder = _address(name)
    hub = _import_hub(name)
    try:
        info = hub.HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # of many kinds: no network, no such set, no access
        raise _unreachable(name, error) from error
    size = sum(
        file.size or 0
        for file in info.siblings
        if file.rfilename.endswith('.parquet') and file.rfilename.startswith(folder)
    )
    return size >= pictures * PICTURE_BYTES


def open_source(name: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens a folder, or hf://datasets/OWNER/NAME[@REVISION][/FOLDER], which is first downloaded.

    Without a validation split, the test split is used if it has labels; without either, `val_fraction`
    of the rows, selected by `seed`, is held out.

    Raises:
      UserError: the files, the columns or the labels are not as described above.
    """
    del data_dir  # only for TFDS
    root = _download(name) if name.startswith(HUB) else name
    files = _files(root)
    notes, validation = [], ''
    if 'train' not in files:
        raise UserError(f'{name}: there are Parquet files of {", ".join(files)}, but none of train')
    columns = _columns(files['train'][0])
    notes += columns.note
    values = {
        split: [(path, _values(path, columns, files['train'][0])) for path in paths]
        for split, paths in files.items()
    }
    if 'test' in files and not _labeled(values['test']):
        del files['test']
        notes.append(unlabeled('the test split'))
    elif 'test' in files and 'val' not in files:
        files['val'], values['val'] = files.pop('test'), values['test']
        validation = 'the test split'
    values = {split: values[split] for split in SPLITS if split in files}
    for split, parts in values.items():
        if not any(found for _, found in parts):
            raise UserError(f'{parts[0][0]}: there are no rows of {split}: download it again')
    names = columns.names or _class_names(values)
    labels = {split: _labels(parts, names) for split, parts in values.items()}
    if 'val' in files:
        chosen = {split: np.arange(len(labels[split])) for split in labels}
        origin = {split: split for split in labels}
    else:
        validation = HELD_OUT
        chosen = split_off(len(labels['train']), val_fraction, seed, name, labels['train'])
        origin = {'train': 'train', 'val': 'train'}

    def read(split: str, start: int) -> Iterator[Example]:
        place, wanted = origin[split], chosen[split][start:]
        rows = _rows(files[place], columns.image, wanted)
        for index, (where, data) in zip(wanted, rows, strict=True):
            yield Example(where, data, int(labels[place][index]))

    def prints(*wanted: str) -> tuple[int, int]:
        used = [split for split in wanted if split in files]
        paths = ((path, None) for split in used for path in files[split])
        return fingerprint(root, paths, sum(len(labels[split]) for split in used))

    places = {
        split: [f'{path}: {row}' for path, found in parts for row in range(len(found))]
        for split, parts in values.items()
    }
    final = {split: labels[origin[split]][rows] for split, rows in chosen.items()}
    named = {split: [places[origin[split]][row] for row in rows] for split, rows in chosen.items()}
    pairs = {split: [*zip(named[split], final[split].tolist(), strict=True)] for split in chosen}
    test = {'test': pairs.pop('test', [])}
    return Source(
        name,
        names,
        {split: len(rows) for split, rows in chosen.items()},
        read,
        exif=not is_imagenet(names),
        notes=(*notes, *class_notes(names, final)),
        validation=validation,
        files=prints('train', 'val'),
        content=content_of(names, pairs, root),
        test=(*prints('test'), content_of(names, test, root)) if 'test' in files else None,
    )


def _files(root: str) -> dict[str, list[str]]:
    """Returns the sorted Parquet files of each split; {} if there are none.

    They may be in the folder, in data/ or in one other folder; without any split in their names, all
    are 'train'.
    """
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for folder in (root, *_folders(root), *(f for g in _folders(root) for f in _folders(g))):
        for name in sorted(os.listdir(folder)):
            if name.endswith('.parquet') and not name.startswith('.'):
                path = os.path.join(folder, name)
                split = split_in(name.removesuffix('.parquet'))
                above = None if split or folder == root else split_in(os.path.basename(folder))
                place = os.path.dirname(folder) if above else folder
                found[place][split or above].append(path)
    place = next((path for path in (root, os.path.join(root, 'data')) if path in found), None)
    if place is None and len(found) > 1:
        shown = ', '.join(os.path.relpath(path, root) for path in sorted(found)[:5])
        raise UserError(f'{root}: several folders have Parquet files ({shown}): give one of them')
    splits = found[place] if place else next(iter(found.values()), {})
    if {*splits} == {None}:
        return {'train': splits[None]}
    if None in splits:
        raise UserError(
            f'{splits[None][0]}: its name does not say to which split it belongs: rename it to '
            'train-..., validation-... or test-...'
        )
    return dict(splits)


def _folders(root: str) -> list[str]:
    folders, _ = list_folder(root, collections.Counter())
    return [os.path.join(root, name) for name in folders]


def _open(path: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f'{path}: cannot be read as Parquet ({one_line(error)}): download it again')


def _columns(path: str) -> Columns:

    with _open(path) as file:
        schema = file.schema_arrow
    features = _features(schema)
    kinds = {name: feature.get('_type') for name, feature in features.items()}
    images = [name for name in schema.names if kinds.get(name) == 'Image'] or [
        field.name for field in schema if _holds_bytes(field.type)
    ]
    labels = [name for name in schema.names if kinds.get(name) == 'ClassLabel'] or [
        field.name
        for field in schema
        if field.name in LABEL_NAMES or (_kind(field.type) and not _is_rare(field.type))
    ]
    labels = labels or [field.name for field in schema if _kind(field.type)]
    classes = any(kinds.get(name) == 'ClassLabel' for name in labels)
    image = _choose(path, 'image', images, IMAGE_NAMES, schema.names)
    first = labels[0] if classes else None  # of several ClassLabels
    label = _choose(path, 'label', labels, (*LABEL_NAMES, first), schema.names)
    _check(path, schema, image, label)
    others = [name for name in labels if name != label] if classes else []
    note = (f'labels come from the column {label!r}, not {", ".join(others)}',) if others else ()
    names = _class_label(schema, label)
    return Columns(image, label, names, note)


def _features(schema) -> dict[str, dict]:
    """Returns what the metadata says about the columns, or {} if it says nothing."""
    metadata = (schema.metadata or {}).get(b'huggingface')
    try:
        features = json.loads(metadata)['info']['features'] if metadata else {}
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _class_label(schema, label: str) -> list[str] | None:
    """Returns the names of the classes in the metadata, if any."""
    feature = _features(schema).get(label, {})
    return feature.get('names') if feature.get('_type') == 'ClassLabel' else None


def _holds_bytes(kind) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == 'bytes' and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _kind(kind) -> type | None:
    """Returns int or str, if a column of this type can hold labels."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return int
    return str if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _is_rare(kind) -> bool:
    """Returns whether a column of this type has labels only if no other column can have them."""
    import pyarrow as pa

    return pa.types.is_dictionary(kind) or pa.types.is_boolean(kind)


def _check(path: str, schema, image: str, label: str) -> None:
    """Raises UserError if a file lacks one of the two columns, or one has the wrong type."""
    for name, good, expected in (
        (image, _holds_bytes, 'encoded images: a struct with `bytes`, or binary'),
        (label, _kind, 'one label per row: integers, booleans or strings'),
    ):
        if name not in schema.names:
            raise UserError(
                f'{path}: has no column {name!r}, only {", ".join(schema.names)}: remove this file, or '
                'rename the column'
            )
        kind = schema.field(name).type
        if not good(kind):
            raise UserError(f'{path}: the column {name!r} is {kind}, not {expected}')


def _choose(path: str, what: str, found: list[str], preferred: tuple, there: list[str]) -> str:
    name = found[0] if len(found) == 1 else next((p for p in preferred if p in found), None)
    if name is None and not found and next((p for p in preferred if p in there), None):
        return next(p for p in preferred if p in there)  # `_check` says what is wrong with it
    if name is None:
        raise UserError(
            f'{path}: which column has the {what}s? It has {", ".join(there)}; rename one to {what!r}'
        )
    return name


def _values(path: str, columns: Columns, first: str) -> list[int | str | None]:
    """Reads the labels of a file: integers or strings, None for null.

    Integers become strings if the file's metadata names the classes differently from that of `first`.
    """
    import pyarrow as pa

    with _open(path) as file:
        schema = file.schema_arrow
        _check(path, schema, columns.image, columns.label)
        try:
            values = file.read(columns=[columns.label]).column(columns.label).to_pylist()
        except (KeyError, OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
    values = [int(value) if isinstance(value, bool) else value for value in values]
    names = _class_label(schema, columns.label)
    if not names or names == columns.names:
        return values
    if columns.names is None:
        raise UserError(
            f'{path}: its metadata names the classes, but that of {first} does not: write both the same way'
        )
    known = range(len(names))
    return [names[v] if isinstance(v, int) and v in known else v for v in values]


def _labeled(parts: list[tuple[str, list]]) -> bool:
    return any(value not in (None, -1, '') for _, values in parts for value in values)


def _class_names(values: dict[str, list[tuple[str, list]]]) -> list[str]:
    """Returns the names of classes that no metadata lists; UserError if the labels make no sense."""
    kind = first = None
    for path, found in (part for parts in values.values() for part in parts):
        value = next((value for value in found if value is not None), None)
        if value is None:
            continue
        if kind not in (None, type(value)):
            raise UserError(
                f'{path}: its labels are {_KINDS[type(value)]}, but those of {first} are {_KINDS[kind]}: '
                'write both the same way'
            )
        kind, first = type(value), first or path
    labels = [(value, path) for path, found in values['train'] for value in found]
    there = [(value, path) for value, path in labels if value is not None]
    if not there:
        raise UserError(f'{values["train"][0][0]}: has no labels, only null')
    if kind is str:
        return sorted({value for value, _ in there})
    largest, path = max(there)
    return number_names(largest, len(labels), path)


_KINDS = {int: 'numbers', str: 'text'}


def _labels(parts: list[tuple[str, list]], names: list[str]) -> np.ndarray:
    """Returns the labels of a split, i64[N], checked."""
    number = {name: label for label, name in enumerate(names)}
    found = []
    for path, values in parts:
        labels = [number.get(v) if isinstance(v, str) else v for v in values]
        bad = [i for i, v in enumerate(labels) if v is None or not 0 <= v < len(names)]
        if bad:
            raise UserError(
                f'{path}: rows with labels outside the {len(names)} classes: {len(bad)}; '
                f'the first is row {bad[0]} ({values[bad[0]]!r}): remove them'
            )
        found += labels
    return np.array(found, np.int64)


def _rows(paths: list[str], image: str, wanted: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Reads the images of some rows, given in ascending order -> (name for messages, bytes)."""
    import pyarrow as pa

    first = 0  # row of the current row group, counted over all files
    for path in paths:
        with _open(path) as file:
            begin = first
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                low, high = np.searchsorted(wanted, (first, first + count))
                try:
                    if low < high:
                        rows = _group(file, group, image, wanted[low:high] - first)
                        for row, (data, name) in rows:
                            where = f'{path}: row {first - begin + row}'
                            # Null becomes an empty file, which is then one more bad image.
                            yield f'{where} ({name})' if name else where, data or b''
                except (OSError, pa.ArrowException) as error:
                    raise _unreadable(path, error) from error
                first += count


def _group(file, group: int, image: str, wanted: np.ndarray) -> Iterator:
    """Reads rows of one row group, a few at a time -> (row, (bytes, file name))."""
    start = 0
    for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[image]):
        low, high = np.searchsorted(wanted, (start, start + len(batch)))
        for row in wanted[low:high].tolist():
            value = batch.column(0)[row - start].as_py()
            if isinstance(value, dict):
                yield row, (value['bytes'], value.get('path'))
            else:
                yield row, (value, None)
        start += len(batch)


# The Hub


def _address(name: str) -> tuple[str, str | None, str]:
    """Splits hf://datasets/OWNER/NAME[@REVISION][/FOLDER] -> (OWNER/NAME, REVISION, FOLDER)."""
    match = re.fullmatch(r'hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?', name.rstrip('/'))
    if not match:
        raise UserError(f'{name}: expected hf://datasets/OWNER/NAME[@REVISION][/FOLDER]')
    revision = match[2] and match[2].replace('%2F', '/').replace('%2f', '/')
    return match[1], revision, match[3] or ''


def _import_hub(name: str):
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f'{name}: needs a package: pip install huggingface_hub') from error
    return huggingface_hub


def _unreachable(name: str, error: Exception) -> UserError:
    return UserError(
        f'{name}: not available from the Hub ({one_line(error)}): check the name and the network, '
        'and log in with `hf auth login` if access is restricted'
    )


def _download(name: str) -> str:
    """Downloads the Parquet files of a set, or finds them in the cache of the Hub -> their folder."""
    repository, revision, folder = _address(name)
    hub = _import_hub(name)
    say(f'{name}: downloading from the Hub, or using its cache')
    try:
        snapshot = hub.snapshot_download(
            repository,
            repo_type='dataset',
            revision=revision,
            allow_patterns=os.path.join(folder, '*.parquet'),
        )
    except Exception as error:  # of many kinds: no network, no such set, no access, a full disk
        raise _unreachable(name, error) from error
    root = os.path.join(snapshot, folder)
    if not os.path.isdir(root) or not _files(root):
        raise UserError(
            f'{name}: has no Parquet files; if the Hub has converted the set, '
            f'hf://datasets/{repository}@refs%2Fconvert%2Fparquet does'
        )
    return root
