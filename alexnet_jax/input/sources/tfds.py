"""TFDS sets by name, including the built-in dataset, and ImageNet if TFDS has built it."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

import numpy as np

from alexnet_jax.common.errors import UserError, one_line, say
from alexnet_jax.input.sources.source import (
    HELD_OUT,
    PICTURE_BYTES,
    Example,
    Source,
    import_tensorflow,
    split_off,
    unlabeled,
)

BUILT_IN = 'alexnet_shapes'


def data_root(name: str, data_dir: str | None) -> str:
    """Returns the folder where TFDS keeps a set; the built-in dataset stays beside the stores."""
    if not data_dir:
        default = os.environ.get('TFDS_DATA_DIR', os.path.join('~', 'tensorflow_datasets'))
        data_dir = os.path.join('data', 'tfds') if name == BUILT_IN else default
    return os.path.abspath(os.path.expanduser(data_dir))


def is_large(name: str, data_dir: str | None, pictures: int) -> bool:
    """Returns whether a set that TFDS has yet to build is known to have at least `pictures` images.

    If TFDS does not know (version 4.9.10 never does), the size of the download decides. Raises
    UserError for a name that TFDS does not know.
    """
    builder = _builder(name, data_root(name, data_dir))
    if builder.is_prepared():
        return False  # opening it counts them, which takes only a moment
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    if counts:
        return sum(counts[split] for split in {*_origin(counts, name).values()}) >= pictures
    download = sum(info.size or 0 for info in (builder.url_infos or {}).values())
    return download >= pictures * PICTURE_BYTES


def _builder(name: str, root: str):
    """Returns TFDS's builder of a set; UserError if there is no set of this name."""
    try:
        import tensorflow_datasets as tfds

        known = name == BUILT_IN or _is_known(name, root)
        if known:
            import_tensorflow()  # takes seconds
    except (UserError, ImportError) as error:
        raise UserError(
            f'{name}: not a folder, and it cannot be opened as a TFDS set: {error}'
        ) from error

    catalog = 'a name from https://www.tensorflow.org/datasets/catalog'
    unknown = f'{name}: neither a folder nor a TFDS set: give an existing folder, or {catalog}'
    if not known:
        raise UserError(unknown)
    logging.getLogger('absl').setLevel(logging.ERROR)  # TFDS warns about sets it is about to build
    if name == BUILT_IN:
        from alexnet_jax.input.sources import shapes_builder  # noqa: F401  registers the builder

        tfds.disable_progress_bar()  # rendering takes only seconds
    try:
        return tfds.builder(name, data_dir=root)
    except Exception as error:  # of any kind: this runs the set's own code and reads its files
        if isinstance(error, tfds.core.DatasetNotFoundError) or str(error).startswith(
            'Parsing builder name'
        ):
            raise UserError(unknown) from error
        raise UserError(
            f'{name}: TFDS cannot open it ({one_line(error)}): fix that, or give {catalog}'
        ) from error


def _is_known(name: str, root: str) -> bool:
    """Checks, without TensorFlow, whether TFDS may have a set of this name; True for other forms."""
    import tensorflow_datasets as tfds

    base = name.partition('/')[0]
    if not re.fullmatch(r'\w+', base) or os.path.isdir(os.path.join(root, base)):
        return True
    try:
        tfds.builder_cls(base)
    except tfds.core.DatasetNotFoundError:
        return False
    except Exception:  # of any kind: `tfds.builder` reports it
        pass
    return True


def _origin(counts: dict[str, int], name: str) -> dict[str, str]:
    """Returns the TFDS splits that 'train', 'val' and, if there is one, 'test' come from."""
    if 'train' not in counts:
        raise UserError(f'{name}: has no train split, only {", ".join(counts)}')
    held_out = next((split for split in ('validation', 'test') if split in counts), 'train')
    test = {'test': 'test'} if held_out == 'validation' and 'test' in counts else {}
    return {'train': 'train', 'val': held_out, **test}


def _build(builder, name: str, root: str) -> None:
    try:
        builder.download_and_prepare(file_format='tfrecord')
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
    'train', selected by `seed`. A 'test' whose first label is -1 is not used.

    Raises:
      UserError: there is no such set, it cannot be built or read, or it does not consist of images of
        8 or 16 bits per channel with one label each.
    """
    root = data_root(name, data_dir)
    builder = _builder(name, root)
    if not builder.is_prepared() and name == BUILT_IN:
        say('rendering the built-in images')
        with contextlib.redirect_stdout(None):  # TFDS would claim to be downloading something
            _build(builder, name, root)
    elif not builder.is_prepared():
        _build(builder, name, root)
    return _source(builder, name, val_fraction, seed)


def open_built(directory: str, name: str, *, val_fraction: float, seed: int) -> Source:
    """Opens a set that TFDS has built in a folder, as `open_source`."""
    try:
        import_tensorflow()
        import tensorflow_datasets as tfds

        logging.getLogger('absl').setLevel(logging.ERROR)
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # of any kind: files that TFDS cannot read
        raise UserError(
            f'{directory}: TFDS cannot open it ({one_line(error)}): fix that, or remove this folder'
        ) from error
    return _source(builder, name, val_fraction, seed)


def _source(builder, name: str, val_fraction: float, seed: int) -> Source:
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys
    if (
        not keys
        or len(keys) != 2
        or not isinstance(features[keys[0]], tfds.features.Image)
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise UserError(f'{name}: not a set of images with one class label each')
    image, label = keys
    dtype = np.dtype(features[image].np_dtype)
    if dtype not in (np.uint8, np.uint16):
        raise UserError(
            f'{name}: its images are {dtype.name}, without a known range: only sets of uint8 or uint16 '
            'images can be used; convert it to a folder of images'
        )
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    notes = ()

    def records(split: str, start: int, stop: int | str = '') -> Iterator[dict]:
        try:
            yield from builder.as_dataset(
                split=f'{split}[{start}:{stop}]',
                shuffle_files=False,
                decoders={image: tfds.decode.SkipDecoding()},
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
            ).as_numpy_iterator()
        except Exception as error:  # TensorFlow raises many kinds: DataLossError, NotFoundError
            raise UserError(
                f'{name}: cannot be read from {builder.data_dir} ({one_line(error)}): '
                'fix that, or remove this folder and run the same command again'
            ) from error

    if counts.get('test') and any(one[label] == -1 for one in records('test', 0, 1)):
        del counts['test']
        notes = (unlabeled('the test split'),)
    origin = _origin(counts, name)
    if origin['val'] == 'train':
        chosen = split_off(counts['train'], val_fraction, seed, name)
    else:
        chosen = {split: np.arange(counts[origin[split]]) for split in origin}

    def read(split: str, start: int) -> Iterator[Example]:
        wanted = chosen[split][start:]
        if not len(wanted):
            return
        position = 0
        for index, record in enumerate(records(origin[split], wanted[0]), start=wanted[0]):
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
        notes=notes,
        validation={'test': 'the test split', 'train': HELD_OUT}.get(origin['val'], ''),
    )
