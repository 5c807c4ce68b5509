"""A list of images: a .csv or .tsv file with a path and a label per line, and optionally a split.

Paths are relative to the list. A header with usual names (path, label, split, ...) may choose and order the
columns; otherwise they are PATH, LABEL and SPLIT. Class names are the labels, sorted numerically if all are
numbers.
"""

import csv
import os

from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.input.sources.source import Entry, Source, from_entries, split_of, unlabeled

DELIMITERS = {'.csv': ',', '.tsv': '\t'}
HEADERS = {
    'path': 'path file filepath file_path filename file_name image image_path img img_path',
    'label': 'label labels class class_name category target y',
    'split': 'split set subset dataset partition fold',
}
COLUMN = {name: column for column, names in HEADERS.items() for name in names.split()}


def recognizes(name: str) -> bool:
    """Returns whether a name has one of the two extensions."""
    return _extension(name) in DELIMITERS and not os.path.isdir(name)


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns False: counting a list's lines takes only a moment."""
    del name, data_dir, pictures
    return False


def open_source(path: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens a list; records are sorted by (label, path), whatever the order of the lines.

    Splits may have any name in `source.ALIASES`. Without 'val', the test split is used; without
    either, `val_fraction` of the images, selected by `seed`, is held out. A test split whose labels are
    all -1 is not used.

    Raises:
      UserError: a line or a split is not as described, a file is missing, or a class has no images in
        train.
    """
    del data_dir  # only for TFDS
    root = os.path.dirname(path)
    rows = [
        (number, os.path.join(root, file), label, split)
        for number, file, label, split in _columns(path, _rows(path))
    ]
    missing = [(number, file) for number, file, *_ in rows if not os.path.isfile(file)]
    if missing:
        shown = '; '.join(f'line {number}: {file}' for number, file in missing[:3])
        more = '; ...' if len(missing) > 3 else ''
        raise UserError(
            f'{path}: {len(missing)} of {len(rows)} files are missing ({shown}{more}): paths are '
            'relative to the list'
        )
    rows, notes = _unique(path, rows)
    splits, validation = {}, ''
    for number, file, label, name in rows:
        split = split_of(name) if name else 'train'
        if split is None:
            raise UserError(f'{path}, line {number}: split {name!r}: give train, val or test')
        splits.setdefault(split, []).append((label, file))
    if 'train' not in splits:
        raise UserError(f'{path}: has no images for training, only for {", ".join(splits)}')
    if all(label == '-1' for label, _ in splits.get('test', [])) and splits.pop('test', None):
        notes.append(unlabeled('the test split'))
    if 'test' in splits and 'val' not in splits:
        splits['val'] = splits.pop('test')
        validation = 'the test split'
    names = _sorted({label for label, _ in splits['train']})
    if len(names) < 2:
        raise UserError(f'{path}: needs at least two labels, found {len(names)}')
    numbers = {name: number for number, name in enumerate(names)}
    strange = _sorted({label for found in splits.values() for label, _ in found} - {*names})
    if strange:
        raise UserError(f'{path}: the label {strange[0]!r} has no images for training')
    entries = {
        split: [
            Entry(file, 0, None, file, number)
            for number, file in sorted((numbers[label], file) for label, file in found)
        ]
        for split, found in splits.items()
    }
    return from_entries(
        path,
        names,
        entries,
        root=root,
        notes=notes,
        validation=validation,
        val_fraction=val_fraction,
        seed=seed,
    )


def _unique(path: str, rows: list[tuple]) -> tuple[list[tuple], list[str]]:
    """Drops lines that repeat another one -> (rows, notes); UserError if they contradict it."""
    first, unique = {}, []
    for number, file, label, name in rows:
        said = (label, split_of(name) or name if name else 'train')
        key = os.path.normpath(file)
        if key not in first:
            first[key] = (number, said)
            unique.append((number, file, label, name))
        elif first[key][1] != said:
            before, (old, split) = first[key]
            differs = (
                f'two labels, {old!r} and {label!r}'
                if old != label
                else f'two splits, {split} and {said[1]}'
            )
            raise UserError(
                f'{path}, lines {before} and {number}: {file} has {differs}: remove one of the lines'
            )
    repeated = len(rows) - len(unique)
    if not repeated:
        return rows, []
    lines = '1 line repeats another one' if repeated == 1 else f'{repeated} lines repeat others'
    return unique, [f'{lines}: each image counts once']


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _rows(path: str) -> list[tuple[int, list[str]]]:
    """Reads the lines that are not empty -> [(line number, cells without spaces around them)]."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.reader(file, delimiter=DELIMITERS[_extension(path)])
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {reason(error)}') from error
    except ValueError as error:
        raise UserError(f'{path}: not UTF-8 ({error}): convert it') from error
    except csv.Error as error:
        raise UserError(f'{path}, line {reader.line_num}: {error}') from error
    rows = [(number, row) for number, row in rows if any(row)]
    if not rows:
        raise UserError(f'{path}: is empty')
    return rows


def _columns(path: str, rows: list[tuple[int, list[str]]]) -> list[tuple[int, str, str, str]]:
    """Drops the header -> [(line number, path, label, split or '')]."""
    header = rows[0][1]
    columns = [COLUMN.get(name.lower()) for name in header]
    if {'path', 'label'} <= {*columns}:
        for column in HEADERS:
            same = [name for name, meant in zip(header, columns, strict=True) if meant == column]
            if len(same) > 1:
                raise UserError(
                    f'{path}: the columns {" and ".join(same)} both mean the {column}: remove or rename '
                    'all but one'
                )
    places = {COLUMN[name.lower()]: i for i, name in enumerate(header) if name.lower() in COLUMN}
    if {'path', 'label'} <= {*places}:
        rows = rows[1:]
    else:
        places = {'path': 0, 'label': 1, 'split': 2}
        files = [os.path.isfile(os.path.join(os.path.dirname(path), row[0])) for _, row in rows[:2]]
        if files == [False, True]:
            rows = rows[1:]  # a header with unknown names
    found = []
    for number, row in rows:
        cells = [row[places[c]] if places.get(c, len(row)) < len(row) else '' for c in HEADERS]
        if not (cells[0] and cells[1]):
            raise UserError(
                f'{path}, line {number}: needs a path and a label, separated by '
                f'{"a comma (in .tsv: a tab)" if _extension(path) == ".csv" else "a tab (in .csv: a comma)"}'
            )
        found.append((number, *cells))
    return found


def _sorted(labels: set[str]) -> list[str]:
    if all(label.removeprefix('-').isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)
