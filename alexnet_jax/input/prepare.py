"""Makes a store from a source of images in one sequential pass, or opens the one a config needs.

Images are resized to a shorter side of `size` and cropped to the central square, as in the paper
(§2). An interrupted pass resumes where it stopped and ends with the same bytes.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil

import numpy as np
import PIL

from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError, choose, reason, say
from alexnet_jax.input import buckets, sources, store_writer
from alexnet_jax.input import store as stores
from alexnet_jax.input.images import FILTER
from alexnet_jax.input.sources.source import HELD_OUT

COMMAND = 'python -m alexnet_jax.prepare'
FIELDS = '(source|dir|store|format|size|val_fraction|exif)'  # of `config.data`, and flags here
LARGE = 200_000  # images; `ensure` does not prepare sources of this size or more


def default_store(source: str, size: int, format: str) -> str:
    """Returns the default path of a store, data/SOURCE-SIZE-FORMAT.

    SOURCE is the last part of a folder's path, or a TFDS name with '-' in place of '/'. If that is
    the store of another source, 8 hex digits of the SHA-1 of the whole path (or name) follow SOURCE.
    """

    def places(name: str, origin: str) -> tuple[str, str]:
        digest = hashlib.sha1(os.fsencode(origin)).hexdigest()[:8]
        first, second = (
            os.path.join('data', f'{stem}-{size}-{format}') for stem in (name, f'{name}-{digest}')
        )
        return first, second

    origin = whole = _whole(source)
    first, second = places(os.path.basename(whole), whole)
    if not _is_path(source, first) and not _is_path(source, second):
        origin = source
        first, second = places(source.replace('/', '-'), source)
    for path in (first, second):
        if _source(path) == origin:
            return path
    # If the folder is gone, no new store can be made: keep this path, whose error says what to do.
    taken = _source(first) and (origin == source or os.path.exists(whole))
    return second if taken else first


def prepare(
    source: str,
    *,
    dir: str | None = None,
    store: str | None = None,
    format: str = 'jpg',
    size: int = 256,
    val_fraction: float = 0.1,
    exif: str = 'auto',
    skip_bad: bool = False,
    limit: float = np.inf,
    resuming: bool = False,
) -> stores.Store:
    """Makes a store, resumes an interrupted one, or opens a complete one.

    Waits if another process is making the same store. A complete store given by `store` is opened
    regardless of its source if format and size match, since the images may have moved.

    Otherwise a complete store must match the current files of its source, if that is a path that
    still exists.

    Args: those of the command; `limit`: reject sources with this many images or more, and do not
      compare such stores; `resuming`: compare none.

    Raises:
      UserError: the source is unusable, images cannot be decoded, the disk is too small, or the
        folder holds something else. A pass that fails within seconds (store_writer.FLUSH_SECONDS) leaves
        nothing behind; a longer one keeps its work and resumes once the images are repaired.
    """
    _check_options(format, size, val_fraction, exif)
    if store and '://' in store:
        raise UserError(
            f'--store={store}: prepare writes to a local disk: give a folder, and copy it with gcloud '
            f'storage cp -r FOLDER {store}'
        )
    path, named = store or default_store(source, size, format), bool(store)
    is_path = _is_path(source, path)
    origin = _whole(source) if is_path else source
    wanted = {'format': format, 'size': size, 'source': origin, 'val_fraction': val_fraction}
    if exif != 'auto':
        wanted['exif'] = exif == 'on'
    if dir and not is_path:  # two TFDS folders can have different images under the same name
        wanted['dir'] = _whole(dir)
    finished = _finished(path, wanted, named)
    if finished:
        if not named and not resuming and sum(finished.counts.values()) < limit:
            _check_source(path, source, dir, val_fraction)
        return finished
    advice = _advice(source, dir, store, format, size, val_fraction, exif)
    try:
        with store_writer.locked(path):  # the process we waited for may have finished the store
            if named or path == default_store(source, size, format):
                return _finished(path, wanted, named) or _make(
                    path, wanted, source, dir, limit, advice, skip_bad
                )
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {reason(error)}') from error
    # That process made the store of another source, so this one's is elsewhere.
    return prepare(
        source,
        dir=dir,
        format=format,
        size=size,
        val_fraction=val_fraction,
        exif=exif,
        skip_bad=skip_bad,
        limit=limit,
    )


def ensure(
    *,
    source: str,
    dir: str | None = None,
    store: str | None = None,
    format: str = 'jpg',
    size: int = 256,
    val_fraction: float = 0.1,
    exif: str = 'auto',
    alone: bool = True,
    resuming: bool = False,
) -> stores.Store:
    """Opens a source's store for training, preparing it first if the set is small (< 200,000).

    alone: whether this is the only process; if not, nothing is prepared. resuming: whether a run has
    begun with this store, which is then not compared with its source. A store in a bucket,
    gs://BUCKET/STORE, is copied to this host first (`buckets.local_copy`).

    Raises:
      UserError: as `prepare`. If a large set has no store yet, the error gives the command to run;
        the set is not built if its size is known before TFDS builds it.
    """
    if store and '://' in store:
        store = buckets.local_copy(store)
    options = {
        'dir': dir,
        'store': store,
        'format': format,
        'size': size,
        'val_fraction': val_fraction,
        'exif': exif,
    }
    with _named(_command(source=source, **options)):
        _check_options(format, size, val_fraction, exif)
        there = _description(store or default_store(source, size, format))
        complete = there and there['complete']
        if not complete and (not alone or sources.is_large(source, data_dir=dir, pictures=LARGE)):
            raise UserError(_advice(source, **options))
        return prepare(source, **options, limit=LARGE, resuming=resuming)


def existing(*, source: str, store: str, format: str, size: int, **options) -> stores.Store:
    """Opens the store that the config of a run names, if there is one on this machine.

    A run directory may be someone else's: this prepares and copies nothing, and reads no source.
    Arguments: those of `ensure`. If there is none, raises UserError with the command that makes it.
    """
    remote = '://' in store
    path = buckets.copy_of(store) if remote else store or default_store(source, size, format)
    if os.path.isfile(os.path.join(path, 'store.json')):
        return stores.open_store(path)
    given = {'source': source, 'store': store, 'format': format, 'size': size, **options}
    how = f'--store={store} to copy it' if remote else f'prepare it: {_command(**given)}'
    raise UserError(f'{path}: there is no store here; give --store=DIR, or {how}')


@contextlib.contextmanager
def _named(command: str):
    """Makes errors raised in its block name config fields instead of `prepare`'s flags.

    Training has no --skip_bad: `command` is the one to run with it.
    """
    try:
        yield
    except UserError as error:
        text, prepare, rest = str(error).partition(COMMAND)
        text = re.sub(rf'(?<![\w-])--(?={FIELDS}\b)', '--config.data.', text)
        text = text.replace('with --skip_bad', f'with {command} --skip_bad')
        raise UserError(f'{text}{prepare}{rest}') from error


def _check_options(format: str, size: int, val_fraction: float, exif: str) -> None:
    choose('--exif', exif, ('auto', 'on', 'off'))
    if format not in stores.FORMATS or size < 1:
        raise UserError(
            f'format {format!r}, size {size}: the format must be one of '
            f'{", ".join(stores.FORMATS)}, the size a positive number of pixels'
        )
    if not 0 < val_fraction < 1:
        raise UserError(
            f'val_fraction {val_fraction}: must be between 0 and 1, as in --val_fraction=0.1'
        )


def _whole(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder))


def _is_path(source: str, path: str) -> bool:
    """Returns whether a source is a path, or was one when the store in `path` was made from it."""
    return sources.is_path(source) or _source(path) == _whole(source)


def _source(path: str) -> str | None:
    """Returns the source that the store in `path`, complete or not, was made from, if any."""
    try:
        with open(os.path.join(path, 'store.json'), encoding='utf-8') as file:
            return json.load(file)['source']
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _finished(path: str, wanted: dict, named: bool) -> stores.Store | None:
    """Returns the store if it is complete; UserError if `path` holds anything else."""
    there = _description(path)
    if not there:
        return None
    if named and there['complete']:
        _check_same(path, there, {k: wanted[k] for k in ('format', 'size', 'exif') if k in wanted})
        different = _differences(there, wanted)
        if different:
            say(f'{path}: using this complete store as is ({different})')
    else:
        _check_same(path, there, wanted)
    if not there['complete']:
        return None
    store_writer.clean(path)
    return stores.open_store(path)


def _make(
    path: str,
    wanted: dict,
    source: str,
    dir: str | None,
    limit: float,
    advice: str,
    skip_bad: bool,
) -> stores.Store:
    size, format = wanted['size'], wanted['format']
    begun = _description(path)
    try:
        opened = _open(source, dir, wanted['val_fraction'])
        for note in opened.notes:
            say(note)
        if opened.validation:
            say(f'validation images: {opened.validation}')
        pictures = sum(opened.splits.values())
        if pictures >= limit:
            raise UserError(advice)
        exif = wanted.pop('exif', opened.exif)
        wanted = {
            **wanted,
            'filter': FILTER,
            'exif': begun['exif'] if begun else exif,
            'classes': len(opened.class_names),
            'validation': opened.validation,
            'counts': opened.splits,
            'versions': {'pillow': PIL.__version__, 'numpy': np.__version__},
        }
        by_class = opened.validation == HELD_OUT and opened.content is not None
        if begun and by_class and _held_out_before(begun):
            raise UserError(
                f'{path}: an earlier version began this pass and chose other validation images: remove '
                f'{path} and run prepare again'
            )
        # A pass that an earlier version began has no test split yet.
        known = {**wanted, 'counts': {s: opened.splits.get(s) for s in (begun or wanted)['counts']}}
        _check_same(path, begun or {}, known)
        if opened.content is not None:
            wanted['content'] = opened.content
        if by_class:
            wanted['held_out'] = 'by class'  # earlier versions: over all classes
        if opened.test:
            wanted['test'] = [*opened.test]
        for field in {'content', 'test'} & {*wanted} & {*(begun or {})}:
            if begun[field] != wanted[field]:
                raise UserError(
                    f'{path}: the images, labels or names of {source} have changed since this pass began: '
                    f'remove {path} and run prepare again'
                )
        if opened.files:
            wanted['files'] = [*opened.files]
        begun = None  # from here on, the files in the folder are ours
        progress = store_writer.read_progress(path, size, skip_bad=skip_bad)
        _check_disk(path, pictures - progress['read'].sum(), size, format)
        store_writer.write_description(path, {**wanted, 'complete': False})
        store_writer.write_records(
            path,
            opened,
            size=size,
            format=format,
            progress=progress,
            exif=wanted['exif'],
            skip_bad=skip_bad,
        )
        store_writer.finish(
            path, opened, format=format, progress=progress, description={**wanted, 'complete': True}
        )
    except Exception:
        if not begun and not os.path.exists(os.path.join(path, store_writer.PROGRESS)):
            store_writer.empty(path)
        raise
    return stores.open_store(path)


def _check_source(path: str, source: str, dir: str | None, val_fraction: float) -> None:
    """UserError if the files of a source that is a path have changed since its store was made."""
    there = _description(path)
    if not there or not there.get('files') or not os.path.exists(there['source']):
        return
    try:
        opened = _open(source, dir, val_fraction)
    except UserError as error:
        say(f'{path}: cannot be compared with its source ({error})')
        return
    if opened.test and 'test' not in there:
        say(
            f'{path}: lacks the test split of its source, since an earlier version made it or the '
            'split is new; to add it, remove the store and prepare it again'
        )
    test = (opened.test or (0, 0, 0)) if 'test' in there else ()
    now, then = (
        [*(opened.files or there['files']), *test],
        [*there['files'], *there.get('test', ())],
    )
    more = sum(now[:4:2]) - sum(then[:4:2])  # number and digest of train and val, then of test
    if more:
        what = f'{abs(more):,} {"more" if more > 0 else "fewer"} image{"s" * (abs(more) != 1)} than'
    elif now[:4] != then[:4]:
        what = 'different images from'
    elif now == then and _held_out_before(there):
        if opened.class_names == stores.open_store(path).names:
            say(
                f'{path}: keeps the validation images that an earlier version chose; changes in the labels '
                'of a list are not noticed'
            )
            return
        what = 'different class names from'
    elif opened.content != there.get('content', opened.content) or now != then:
        what = 'different labels or class names from'
    else:
        return
    quoted = shlex.quote(path)
    raise UserError(
        f'{there["source"]} has {what} the store {path}: remove {path} and run the same command again, '
        f'or pass --store={quoted} to use the store as is'
    )


def _open(source: str, dir: str | None, val_fraction: float) -> sources.Source:
    try:
        return sources.open_source(source, data_dir=dir, val_fraction=val_fraction)
    except OSError as error:
        raise UserError(f'{source}: cannot be read: {reason(error)}') from error


def _held_out_before(description: dict) -> bool:
    """Whether an earlier version chose a store's validation images, over all classes together."""
    return description.get('validation') == HELD_OUT and 'held_out' not in description


def _description(path: str) -> dict | None:
    """Returns the store.json of a folder, or None if a new store can be started there."""
    paths.check_links(f'--store={path}', paths.Path(path))
    try:
        with open(os.path.join(path, 'store.json'), 'rb') as file:
            return {'complete': False, 'exif': False, **stores.decode(file.read())}
    except FileNotFoundError as error:
        others = {*os.listdir(path)} - {*store_writer.TEMPORARY} if os.path.exists(path) else {}
        if others and 'store.json' not in others:  # another process may just have started
            raise UserError(f'{path}: holds other files: give another --store') from error
        return None
    except OSError as error:
        raise UserError(
            f'{path}: cannot be read as a store: {reason(error)}: give another --store'
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f'{path}: not a store, or a damaged one ({error}): give another --store, or '
            f'remove {path} and run prepare again'
        ) from error


def _check_same(path: str, there: dict, wanted: dict) -> None:
    different = _differences(there, wanted)
    if different:
        as_it_is = there['complete'] and 'source' in wanted  # else --store was given already
        raise UserError(
            f'{path} is a different store ({different}): give another --store'
            f'{f" (--store={path} uses this one as is)" if as_it_is else ""}, or '
            f'remove {path} and run prepare again'
        )


def _differences(there: dict, wanted: dict) -> str:
    return '; '.join(
        f'{key} {there.get(key)}, not {value}'
        for key, value in wanted.items()
        if there.get(key, value) != value
    )


def _check_disk(path: str, pictures: int, size: int, format: str) -> None:
    # A JPEG record takes 0.45 bytes per pixel for a photograph, more for noisy images.
    needed = pictures * (size * size * {'u8': 3, 'jpg': 0.55, 'whole': 0.8}[format] + 1000) / 1e9
    free = shutil.disk_usage(path).free / 1e9
    text = f'about {needed:.2f} GB for {pictures:,} images ({free:.2f} GB are free)'
    if free < needed:
        raise UserError(f'{path}: not enough disk space, needs {text}: give another --store')
    say(f'{path}: needs {text}')


def _advice(source: str, *options, **named) -> str:
    return (
        f'{source} has no store yet, and is too large to prepare on first use, or several '
        f'processes would prepare it at once: run {_command(source, *options, **named)}'
    )


def _command(source, dir, store, format, size, val_fraction, exif) -> str:
    options = {
        'source': source,
        'dir': dir,
        'store': store,
        'format': format,
        'size': size,
        'val_fraction': val_fraction,
        'exif': exif if exif != 'auto' else '',
    }
    given = [f'--{key}={value}' for key, value in options.items() if value]
    return shlex.join([*COMMAND.split(), *given])
