"""Sources of labeled images: ImageNet, lists, Parquet, WebDataset, folders, TFDS sets, the built-in dataset.

Each form is a module with `recognizes(name)`, `open_source(name, ...)` and `is_large(name, ...)`.
"""

import dataclasses
import os

from alexnet_jax.common import class_names, paths
from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.input.sources import folder, imagenet, listing, parquet, tfds, webdataset
from alexnet_jax.input.sources.source import Example, Source, import_tensorflow, is_path

__all__ = ['Example', 'Source', 'import_tensorflow', 'is_large', 'is_path', 'open_source']
# The first form that recognizes a name opens it: folder takes every other path, tfds
# every other name.
FORMS = (imagenet, listing, parquet, webdataset, folder, tfds)


def _form(name: str):
    """Returns the form of a source and its name with ~ expanded."""
    if not name:
        raise UserError('no images: name their folder or dataset, as in --source=FOLDER')
    name = os.path.expanduser(name) if is_path(name) else name
    if is_path(name):
        paths.check_links(name, paths.Path(name))
    try:
        return next(form for form in FORMS if form.recognizes(name)), name
    except OSError as error:  # a folder that may not be read
        raise UserError(f'{error.filename or name}: cannot be read: {reason(error)}') from error


def is_large(name: str, *, data_dir: str | None = None, pictures: int) -> bool:
    """Returns whether opening a source would take long because it has at least `pictures` images.

    Raises:
      UserError: there is no set of this name, or its files are missing.
    """
    form, name = _form(name)
    return form.is_large(name, data_dir, pictures)


def open_source(
    name: str, *, data_dir: str | None = None, val_fraction: float = 0.1, seed: int = 0
) -> Source:
    """Opens a folder, a list, a TFDS set, `imagenet2012`, or hf://datasets/OWNER/NAME.

    If a TFDS set does not exist yet, TFDS builds it first (`alexnet_shapes`, the built-in dataset: half a
    minute, without a download).

    Args:
      name: a path (`is_path`; ~ is the home folder), or a name; each form's module says what it reads.
      data_dir: where TFDS keeps its sets; for `imagenet2012`, the folder with any form of ImageNet.
      val_fraction: fraction of the images to hold out if the source has no validation split.
      seed: selects the held-out images.

    Raises:
      UserError: there is no such source, it has the wrong layout, or its files are missing.
    """
    form, name = _form(name)
    source = form.open_source(name, data_dir=data_dir, val_fraction=val_fraction, seed=seed)
    names = class_names.checked(source.class_names, source.name)
    return dataclasses.replace(source, class_names=names)
