"""TFDS sets by name, including ImageNet from its two tars and the embedded set."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator

import numpy as np

from alexnet_jax.common.errors import UserError, one_line
from alexnet_jax.input.sources.source import Example, Source, import_tensorflow, split_off

EMBEDDED = 'alexnet_shapes'
IMAGENET = 'imagenet2012'
PICTURE_BYTES = 100_000  # rough download size of a photograph; ImageNet's average 110 kB
TARS = {'ILSVRC2012_img_train.tar': '138 GB', 'ILSVRC2012_img_val.tar': '6.3 GB'}


def _root(name: str, data_dir: str | None) -> str:
    """Returns the folder where TFDS keeps a set; the embedded set stays beside the stores."""
    if not data_dir:
        default = os.environ.get('TFDS_DATA_DIR', os.path.join('~', 'tensorflow_datasets'))
        data_dir = os.path.join('data', 'tfds') if name == EMBEDDED else default
    return os.path.abspath(os.path.expanduser(data_dir))


def find_imagenet(data_dir: str | None) -> str:
    """Returns the folder with both ImageNet tars (any folder if TFDS has already built the set).

    Needs no TensorFlow.

    Raises:
      UserError: there are neither tars nor a built set; the error says which files go where.
    """
    root = _root(IMAGENET, data_dir)
    manual = os.path.join(root, 'downloads', 'manual')  # where TFDS itself looks for them
    for folder in (root, manual):
        if all(os.path.isfile(os.path.join(folder, tar)) for tar in TARS):
            return folder
    if os.path.isdir(os.path.join(root, IMAGENET)):
        return manual
    wanted = ' and '.join(f'{os.path.join(root, tar)} ({size})' for tar, size in TARS.items())
    raise UserError(
        f'{IMAGENET} not found: register at https://image-net.org, download the two '
        f'tars and put them at {wanted}, or give their folder '
        '(--dir); `make quickstart` trains on an embedded set without any download'
    )


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns whether a set that TFDS has yet to build is known to have at least `pictures` images.

    If TFDS does not know (version 4.9.10 never does), the size of the download decides. Raises
    UserError for a name that TFDS does not know, and for ImageNet without its tars.
    """
    if name == IMAGENET:
        find_imagenet(data_dir)
        return True
    builder = _builder(name, _root(name, data_dir))
    if builder.is_prepared():
        return False  # opening it will count them in a moment
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    if counts:
        return sum(counts[split] for split in {*_origin(counts, name).values()}) >= pictures
    download = sum(info.size or 0 for info in (builder.url_infos or {}).values())
    return download >= pictures * PICTURE_BYTES


def _builder(name: str, root: str):
    """Returns TFDS's builder of a set; UserError if there is no set of this name."""
    try:
        import_tensorflow()
        import tensorflow_datasets as tfds
    except (UserError, ImportError) as error:
        raise UserError(
            f'{name}: not a folder, and it cannot be opened as a TFDS set: {error}'
        ) from error

    logging.getLogger('absl').setLevel(logging.ERROR)  # TFDS warns about sets it is about to build
    if name == EMBEDDED:
        from alexnet_jax.input.sources import shapes_builder  # noqa: F401  registers the builder

        tfds.disable_progress_bar()  # rendering takes only seconds
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # of any kind: this runs the set's own code and reads its files
        catalog = 'a name from https://www.tensorflow.org/datasets/catalog'
        if isinstance(error, tfds.core.DatasetNotFoundError) or str(error).startswith(
            'Parsing builder name'
        ):
            raise UserError(
                f'{name}: neither a folder nor a TFDS set: give an existing folder, or {catalog}'
            ) from error
        raise UserError(
            f'{name}: TFDS cannot open it ({one_line(error)}): fix that, or give {catalog}'
        ) from error


def _origin(counts: dict[str, int], name: str) -> dict[str, str]:
    """Returns the TFDS splits that 'train' and 'val' come from."""
    if 'train' not in counts:
        raise UserError(f'{name}: has no train split, only {", ".join(counts)}')
    held_out = next((split for split in ('validation', 'test') if split in counts), 'train')
    return {'train': 'train', 'val': held_out}


def _build(builder, name: str, root: str) -> None:
    import tensorflow_datasets as tfds

    manual = None
    if name == IMAGENET:
        manual = find_imagenet(root)
        needed = sum(os.path.getsize(os.path.join(manual, tar)) for tar in TARS)
        os.makedirs(root, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < needed:
            raise UserError(
                f'{root}: TFDS needs {needed / 1e9:.1f} GB to build {name}, but only '
                f'{free / 1e9:.1f} GB are free: give another --dir'
            )
    try:
        builder.download_and_prepare(
            file_format='tfrecord', download_config=tfds.download.DownloadConfig(manual_dir=manual)
        )
    except Exception as error:  # of any kind: this downloads, unpacks and runs the set's own code
        raise UserError(
            f'{name}: TFDS could not build it in {root} ({one_line(error)}): fix that '
            'and run the same command again'
        ) from error


def recognizes(name: str) -> bool:
    """Returns True: any name could be that of a TFDS set."""
    del name
    return True


def open_source(name: str, *, data_dir: str | None, val_fraction: float, seed: int) -> Source:
    """Opens a TFDS classification set, building it first if needed.

    The validation split is 'validation', or else 'test'; without either, it is `val_fraction` of
    'train', selected by `seed`.
    """
    root = _root(name, data_dir)
    if name == IMAGENET:
        find_imagenet(data_dir)  # fails at once, before TensorFlow is loaded
    builder = _builder(name, root)
    import tensorflow_datasets as tfds

    if not builder.is_prepared() and name == EMBEDDED:
        print('rendering the embedded pictures', flush=True)
        with contextlib.redirect_stdout(None):  # TFDS would claim to be downloading something
            _build(builder, name, root)
    elif not builder.is_prepared():
        _build(builder, name, root)
    features, keys = builder.info.features, builder.info.supervised_keys
    if (
        not keys
        or len(keys) != 2
        or not isinstance(features[keys[0]], tfds.features.Image)
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise UserError(f'{name}: not a set of pictures with one class label each')
    image, label = keys
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    origin = _origin(counts, name)
    if origin['val'] == 'train':
        chosen = split_off(counts['train'], val_fraction, seed, name)
    else:
        chosen = {split: np.arange(counts[origin[split]]) for split in origin}

    def read(split: str, start: int) -> Iterator[Example]:
        try:
            yield from read_all(split, start)
        except Exception as error:  # TensorFlow raises many kinds: DataLossError, NotFoundError
            raise UserError(
                f'{name}: cannot be read from {builder.data_dir} ({one_line(error)}): '
                'fix that, or remove this folder and run the same command again'
            ) from error

    def read_all(split: str, start: int) -> Iterator[Example]:
        wanted = chosen[split][start:]
        if not len(wanted):
            return
        records = builder.as_dataset(
            split=f'{origin[split]}[{wanted[0]}:]',
            shuffle_files=False,
            decoders={image: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        position = 0
        for index, record in enumerate(records.as_numpy_iterator(), start=wanted[0]):
            if position < len(wanted) and index == wanted[position]:
                place = record.get('file_name', f'{origin[split]}[{index}]'.encode()).decode()
                yield Example(f'{name}: {place}', record[image], int(record[label]))
                position += 1

    return Source(
        name,
        list(features[label].names),
        {split: len(indices) for split, indices in chosen.items()},
        read,
        exif=False,
    )
