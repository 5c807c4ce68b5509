"""Sources of labelled pictures: the embedded set, folders, TFDS names and the ImageNet tars.

Each form is a module with `recognizes(name)`, `open_source(name, ...)` and `is_large(name, ...)`.
"""

import os

from alexnet_jax.input.sources import folder, tfds
from alexnet_jax.input.sources.source import Example, Source, import_tensorflow, is_path

__all__ = ['Example', 'Source', 'import_tensorflow', 'is_large', 'is_path', 'open_source']
# The first form that recognizes a name opens it: folder takes every path, tfds whatever is left.
FORMS = (folder, tfds)


def _form(name: str):
    return next(form for form in FORMS if form.recognizes(name))


def is_large(name: str, *, data_dir: str | None = None, pictures: int) -> bool:
    """Whether opening a source would first build a set of so many pictures or more, for hours.

    Raises:
      UserError: there is no TFDS set of this name, or its files are missing.
    """
    return _form(name).is_large(name, data_dir, pictures)


def open_source(
    name: str, *, data_dir: str | None = None, val_fraction: float = 0.1, seed: int = 0
) -> Source:
    """Opens a folder of class folders, or a TFDS set by name.

    A TFDS set is first built by TFDS if it is not there (`imagenet2012`: from the two tars, which
    takes hours; `alexnet_shapes`, the embedded set: half a minute, nothing to download).

    Args:
      name: a path (`is_path`; ~ is the home folder), or the name of a TFDS set.
      data_dir: where TFDS keeps its sets; for `imagenet2012` also where the tars may lie.
      val_fraction: part of the pictures to hold out where the source has no validation split.
      seed: chooses which.

    Raises:
      UserError: if there is no such source, it is not of this form, or its files are missing.
    """
    where = os.path.expanduser(name) if is_path(name) else name
    return _form(name).open_source(where, data_dir=data_dir, val_fraction=val_fraction, seed=seed)
