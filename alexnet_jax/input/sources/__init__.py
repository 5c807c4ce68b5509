"""Sources of labeled images: the embedded set, folders, TFDS names and the ImageNet tars.

Each form is a module with `recognizes(name)`, `open_source(name, ...)` and `is_large(name, ...)`.
"""

import dataclasses
import os

from alexnet_jax.common import class_names
from alexnet_jax.input.sources import folder, tfds
from alexnet_jax.input.sources.source import Example, Source, import_tensorflow, is_path

__all__ = ['Example', 'Source', 'import_tensorflow', 'is_large', 'is_path', 'open_source']
# The first form that recognizes a name opens it: folder takes every path, tfds everything else.
FORMS = (folder, tfds)


def _form(name: str):
    return next(form for form in FORMS if form.recognizes(name))


def is_large(name: str, *, data_dir: str | None = None, pictures: int) -> bool:
    """Returns whether opening a source would first build at least `pictures` images, for hours.

    Raises:
      UserError: there is no TFDS set of this name, or its files are missing.
    """
    return _form(name).is_large(name, data_dir, pictures)


def open_source(
    name: str, *, data_dir: str | None = None, val_fraction: float = 0.1, seed: int = 0
) -> Source:
    """Opens a folder of class folders, or a TFDS set by name.

    If a TFDS set does not exist yet, TFDS builds it first (`imagenet2012`: from the two tars, which
    takes hours; `alexnet_shapes`, the embedded set: half a minute, without a download).

    Args:
      name: a path (`is_path`; ~ is the home folder), or the name of a TFDS set.
      data_dir: where TFDS keeps its sets; for `imagenet2012`, the tars may be there too.
      val_fraction: fraction of the images to hold out if the source has no validation split.
      seed: selects the held-out images.

    Raises:
      UserError: there is no such source, it has the wrong layout, or its files are missing.
    """
    where = os.path.expanduser(name) if is_path(name) else name
    source = _form(name).open_source(where, data_dir=data_dir, val_fraction=val_fraction, seed=seed)
    names = class_names.checked(source.class_names, source.name)
    return dataclasses.replace(source, class_names=names)
