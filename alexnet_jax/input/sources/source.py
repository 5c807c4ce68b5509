"""The interface of all image sources: names, counts, and reading in a fixed order.

Sources that consist of files share the rest: which files are images, what the folders of the splits are
called, and how entries are read.
"""

import collections
import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError, reason


class Example(NamedTuple):
    """One image as the source stores it."""

    name: str  # a file or an id, for error messages
    data: bytes | np.ndarray  # an encoded image, or u8[H,W,C]
    label: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A labeled set of images with the splits 'train', 'val' and, if it has both, 'test'."""

    name: str
    class_names: list[str]  # by label
    splits: dict[str, int]  # {'train': N, 'val': M}, in this order; maybe also 'test'
    read: Callable[[str, int], Iterator[Example]]  # (split, start): records start, start + 1, ...
    exif: bool = True  # what `data.exif` 'auto' means: images are rotated by their EXIF orientation
    notes: tuple[str, ...] = ()  # what the user should know, one line each
    validation: str = ''  # where the validation images come from, if not from a split of their own
    # Of train and val; None for TFDS sets.
    files: tuple[int, int] | None = None  # `fingerprint`
    content: int | None = None  # `content_of`
    test: tuple[int, int, int] | None = None  # both of the test split


class Entry(NamedTuple):
    """One image in a file: all of it, or `size` bytes from `offset`."""

    file: str
    offset: int
    size: int | None  # None: the whole file
    name: str  # for error messages
    label: int


WNID = re.compile(r'n\d{8}')  # a WordNet ID, ImageNet's name of a class
SPLITS = ('train', 'val', 'test')
TRAIN_IMAGES, VAL_IMAGES = (1_281_167, 1_261_406), 50_000  # of ILSVRC-2012 and -2010
HELD_OUT = 'a part of the training images that is held out'
PICTURE_BYTES = 100_000  # rough size of a photograph's file; ImageNet's average 110 kB

ALIASES = {
    'train': ('train', 'training'),
    'val': ('val', 'valid', 'validation', 'dev'),
    'test': ('test', 'testing'),
}
SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}


def split_of(name: str) -> str | None:
    """Returns the split that a word means, ignoring case ('Validation' -> 'val'), or None."""
    return SPLIT_OF.get(name.casefold())


def split_in(path: str) -> str | None:
    """Returns the split that a word of a path means ('set-train-0001.tar' -> 'train'), or None.

    Words of the file's name come before those of its folders; the first one decides.
    """
    words = [word for part in reversed(path.split(os.sep)) for word in re.split(r'[\W_]+', part)]
    return next((split for split in map(split_of, words) if split), None)


# Extensions of images, and of files that are common among images.
IMAGES = frozenset(
    '.jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2 '
    '.j2k .heic .heif .avif .ico .pcx .sgi .mpo'.split()
)
OTHERS = frozenset(
    '.csv .tsv .txt .md .rst .html .htm .xml .json .jsonl .yaml .yml .toml .ini .cfg .log .db .lnk .url '
    '.mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .3gp .mp3 .wav .m4a .aae .xmp .thm '
    '.pdf .doc .docx .xls .xlsx .ppt .pptx .zip .gz .tar .tgz .bz2 .xz .rar .7z '
    '.py .pyc .ipynb .m .r .sh .bat .exe .js .css .mat .npy .npz .pkl .pt .pth .h5 .hdf5 .parquet '
    '.tfrecord .lock .bak .part .crdownload'.split()
)
# Of archivers, Python, Synology, Windows and Linux.
SKIPPED_FOLDERS = frozenset(
    ('__MACOSX', '__pycache__', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')
)


def not_an_image(name: str) -> str | None:
    """Returns what kind of file a name means if it is not an image ('.txt'), None if it may be one.

    Files with unknown extensions or none may be images: their content decides when they are read.
    """
    if name.startswith('._'):
        return '._ file'  # of macOS: it has the extension of the image beside it
    if name.casefold() in ('.ds_store', 'thumbs.db', 'ehthumbs.db', 'desktop.ini'):
        return name
    if name.startswith('.'):
        return 'hidden file'
    extension = os.path.splitext(name)[1].lower()
    return extension if extension in OTHERS else None


def scan(folder: str) -> list[tuple[os.DirEntry, bool | None]]:
    """Lists a folder -> (item, True: a folder, False: a file, None: neither, such as a broken link)."""
    try:
        with os.scandir(folder) as found:
            return [(item, _is_folder(item)) for item in found]
    except OSError as error:
        raise UserError(f'{folder}: cannot be read: {reason(error)}') from error


def _is_folder(item: os.DirEntry) -> bool | None:
    try:
        return True if item.is_dir() else False if item.is_file() else None
    except OSError:  # a link to itself
        return None


def list_folder(folder: str, skipped: collections.Counter) -> tuple[list[str], list[str]]:
    """Lists the folders and the files in a folder that may be or hold images -> two sorted lists.

    The kinds of all others are counted in `skipped`.
    """
    folders, files = [], []
    for item, is_folder in scan(folder):
        if is_folder:
            kind = f'{item.name}/' if _is_skipped(item.name) else None
        elif is_folder is False:
            kind = not_an_image(item.name)
        else:
            kind = 'broken link' if item.is_symlink() else 'special file'
        if kind:
            skipped[kind] += 1
        else:
            (folders if is_folder else files).append(item.name)
    return sorted(folders), sorted(files)


def _is_skipped(folder: str) -> bool:
    return folder.startswith('.') or folder in SKIPPED_FOLDERS


def image_files(tree: str, skipped: collections.Counter, root: str | None = None) -> list[str]:
    """Lists the files below a folder that may be images, sorted by path; counts others in `skipped`.

    Links to a folder above `tree` or to `root` and those above it are not followed.
    """
    found, waiting = [], [tree]
    seen = above(os.path.dirname(tree)) | (above(root) if root else set())
    while waiting:
        folder = waiting.pop()
        if identity(folder) in seen:
            continue
        seen.add(identity(folder))
        folders, files = list_folder(folder, skipped)
        waiting += [os.path.join(folder, name) for name in folders]
        found += [os.path.join(folder, name) for name in files]
    return sorted(found)


def identity(path: str) -> tuple[int, int]:
    """Returns a key that is the same for all paths to a folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def above(path: str) -> set[tuple[int, int]]:
    """Returns the `identity` of a folder and of all those that it is in."""
    path = os.path.realpath(path)
    found = {identity(path)}
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        found.add(identity(path))
    return found


def holds_images(root: str) -> bool:
    """Returns whether there are images in a subfolder, or up to three levels deeper.

    If so, archives beside them are only leftovers.
    """

    def below(folder: str, depth: int) -> bool:
        inner = [item.path for item, is_folder in scan(folder) if is_folder]
        inner = [path for path in inner if not _is_skipped(os.path.basename(path))]
        return any(_image_in(path) or (depth > 1 and below(path, depth - 1)) for path in inner)

    return below(root, 4)


def _image_in(folder: str) -> bool:
    return any(is_image(item.name) for item, is_folder in scan(folder) if is_folder is False)


def is_image(name: str) -> bool:
    """Returns whether a file has the extension of an image, and is not one of macOS's ._ files."""
    return os.path.splitext(name)[1].lower() in IMAGES and not name.startswith('.')


def not_used(names: Sequence[str], why: str = '') -> str:
    """Returns a note about files or folders that are not used, the first three by name."""
    return f'not used{why}: {_first(names)}'


def _first(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return f'{", ".join(names[:3])}{more}'


def unlabeled(test: str) -> str:
    """Returns the note about a test split without labels; test: what to call it."""
    return f'{test} is not used: it has no labels'


def skipped_note(skipped: collections.Counter) -> tuple[str, ...]:
    """Returns the note about the files that were skipped, if any."""
    if not skipped:
        return ()
    count = skipped.total()
    kinds = ', '.join(f'{number} {kind}' for kind, number in skipped.most_common())
    subject = '1 file that is not an image' if count == 1 else f'{count} files that are not images'
    return (f'{subject} skipped: {kinds}',)


def fingerprint(root: str, files: Iterable[tuple[str, int | None]], count: int) -> tuple[int, int]:
    """Returns the number of images and the CRC-32 of the names below `root` and sizes of some files.

    files: (path, size in bytes; None: look it up).
    """
    lines = []
    for name, size in files:
        try:
            size = os.stat(name).st_size if size is None else size
        except OSError as error:
            raise UserError(f'{name}: cannot be read: {reason(error)}') from error
        lines.append(f'{name.removeprefix(root).lstrip(os.sep)}\0{size}\n')
    return count, zlib.crc32(''.join(sorted(lines)).encode('utf-8', 'surrogateescape'))


def content_of(
    class_names: Sequence[str], splits: dict[str, Iterable[tuple[str, int]]], root: str
) -> int:
    """Returns the CRC-32 of the class names, and of the names below `root` and labels of all images.

    splits: (name, label) of each image by split, in the order of reading; sizes do not count.
    """
    crc = zlib.crc32('\0'.join(map(str, class_names)).encode('utf-8', 'surrogatepass'))
    for split in sorted(splits):
        lines = [f'{name.removeprefix(root).lstrip(os.sep)}\0{y}\n' for name, y in splits[split]]
        crc = zlib.crc32(''.join((f'\n{split}\n', *lines)).encode('utf-8', 'surrogatepass'), crc)
    return crc


def class_notes(class_names: Sequence[str], labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Returns notes about classes with no image or only one, and about an incomplete ImageNet.

    labels: {split: i64[N]}
    """
    counts = {
        split: np.bincount(np.asarray(found, np.int64), minlength=len(class_names))
        for split, found in labels.items()
    }
    notes, total = [], sum(counts.values())
    empty = np.flatnonzero(total == 0)
    if empty.size:
        names = _first([class_names[label] for label in empty])
        notes.append(f'{empty.size} of the {len(class_names)} classes have no images: {names}')
    for split, count in counts.items():
        single = np.flatnonzero((total == 1) & (count == 1))
        if single.size:
            subject = '1 class has' if single.size == 1 else f'{single.size} classes have'
            names = _first([class_names[label] for label in single])
            notes.append(f'{subject} a single image, which is in {split}: {names}')
    train, val = (int(counts[split].sum()) if split in counts else 0 for split in ('train', 'val'))
    if 990 <= len(class_names) <= 1000 and is_imagenet(class_names):
        whole = {train, train + val} & {*TRAIN_IMAGES}  # the sum, if val is held out
        short = not whole and 0.9 * TRAIN_IMAGES[0] <= train + val and train < TRAIN_IMAGES[0]
        if short or 0.9 * VAL_IMAGES <= val < VAL_IMAGES:
            notes.append(
                f'if this is ILSVRC-2012, it is incomplete: {len(class_names):,} classes, {train:,} training '
                f'and {val:,} validation images, not 1,000, {TRAIN_IMAGES[0]:,} and {VAL_IMAGES:,}'
            )
    return tuple(notes)


def number_names(largest: int, count: int, name: str) -> list[str]:
    """Returns the names of classes that are known by index only.

    Raises:
      UserError: `largest`, the largest label (of the image or file `name`), is absurd for `count` images.
    """
    if largest >= 10 * count + 1000:
        raise UserError(
            f'{name}: label {largest}, but there are only {count} training images: labels must be '
            'class indices, starting at 0'
        )
    return [str(label) for label in range(largest + 1)]


def read_entries(entries: Iterable[Entry]) -> Iterator[Example]:
    """Reads the images of some entries; a file with many of them is opened once.

    Raises:
      UserError: a file cannot be read, or has become shorter.
    """
    file = None
    try:
        for entry in entries:
            try:
                if file is None or file.name != entry.file:
                    if file:
                        file.close()
                    file = open(entry.file, 'rb')
                file.seek(entry.offset)
                data = file.read() if entry.size is None else file.read(entry.size)
            except OSError as error:
                raise UserError(f'{entry.file}: cannot be read: {reason(error)}') from error
            if entry.size is not None and len(data) != entry.size:
                raise UserError(f'{entry.file}: has become shorter: run the same command again')
            yield Example(entry.name, data, entry.label)
    finally:
        if file:
            file.close()


def from_entries(
    path: str,
    class_names: list[str],
    splits: dict[str, Sequence[Entry]],
    *,
    root: str,
    notes: Iterable[str] = (),
    validation: str = '',
    val_fraction: float,
    seed: int,
) -> Source:
    """Makes a source of entries; without a split 'val', `val_fraction` of 'train' is held out.

    root: the folder that the names of the entries start with.
    """
    test = splits.get('test', ())
    everything = [e for split in splits if split != 'test' for e in splits[split]]
    files, test_files = (
        fingerprint(root, ((entry.name, entry.size) for entry in entries), len(entries))
        for entries in (everything, test)
    )
    if 'val' not in splits:
        validation = HELD_OUT
        labels = [entry.label for entry in splits['train']]
        chosen = split_off(len(labels), val_fraction, seed, path, labels)
        splits = {split: [splits['train'][i] for i in chosen[split]] for split in chosen}
    splits = {split: splits[split] for split in SPLITS if split in splits}
    labels = {split: [entry.label for entry in entries] for split, entries in splits.items()}
    pairs = {split: [(e.name, e.label) for e in entries] for split, entries in splits.items()}
    test_pairs = {'test': pairs.pop('test', [])}
    return Source(
        path,
        class_names,
        {split: len(entries) for split, entries in splits.items()},
        lambda split, start: read_entries(splits[split][start:]),
        exif=not is_imagenet(class_names),
        notes=(*notes, *class_notes(class_names, labels)),
        validation=validation,
        files=files,
        content=content_of(class_names, pairs, root),
        test=(*test_files, content_of(class_names, test_pairs, root)) if test else None,
    )


def is_imagenet(class_names: list[str]) -> bool:
    """Returns whether classes are ImageNet's or some of them: WordNet IDs, or tench and 999 more."""
    return all(WNID.fullmatch(name) for name in class_names) or (
        len(class_names) == 1000 and class_names[0].split(',')[0] == 'tench'
    )


def is_path(name: str) -> bool:
    """Returns whether a name is a path: a folder, a file with a suffix, or what starts like a path.

    A '/' alone does not decide: TFDS names can contain one, as in imagenet_resized/32x32.
    """
    file = os.path.isfile(name) and bool(os.path.splitext(name)[1])
    folder = os.path.isdir(name) or os.path.islink(name)
    return file or folder or name.startswith(('/', './', '../', '~'))


def split_off(
    count: int, fraction: float, seed: int, name: str, labels: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Splits records 0..count-1 at random -> {'train': i64[N], 'val': i64[M]}, each ascending.

    If labels are given, every class contributes its share, up to rounding, but keeps at least one record for
    training if it has two, so fewer may be held out. Shares of classes of one record are rounded up last.
    """
    held_out = round(count * fraction)
    if not 0 < held_out < count:
        raise UserError(
            f'val_fraction {fraction} of the {count} images of {name} leaves '
            f'{count - held_out} for training and {held_out} for validation: give another '
            '--val_fraction, or a val/ split'
        )
    labels = np.zeros(count, np.int64) if labels is None else np.asarray(labels, np.int64)
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    most = np.maximum(sizes - 1, 1)
    exact = sizes * (held_out / count)
    quota = exact.astype(np.int64)
    rng = np.random.default_rng(seed)
    order, ties = rng.permutation(count), rng.permutation(len(sizes))
    # The largest remainders first, equal ones in random order.
    largest = np.lexsort((ties, np.round(quota - exact, 9), sizes == 1))
    quota[largest[quota[largest] < most[largest]][: held_out - quota.sum()]] += 1
    order = order[np.argsort(labels[order], kind='stable')]  # by class, at random within it
    place = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = place < np.repeat(quota, sizes)
    return {'train': np.sort(order[~held]), 'val': np.sort(order[held])}


def import_tensorflow():
    """Imports TensorFlow quietly and without accelerators; UserError if it is not installed."""
    # No notes about CPU features or missing GPUs.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    # Not needed here, and it prints a note on every start.
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f'this needs TensorFlow, which cannot be imported ({error})') from error
    # Reading needs no GPU, and JAX wants all of its memory.
    tf.config.set_visible_devices([], 'GPU')
    return tf
