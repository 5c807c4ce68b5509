"""Config files, and what can be wrong with them and with the fields set on the command line.

`config_flags` finds most of these mistakes too, but reports them in several lines or a traceback.
"""

import difflib
import math
import runpy
import traceback
from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.common.errors import UserError
from alexnet_jax.common.paths import Path


def load(argument: str) -> ConfigDict:
    """FILE[:variant] -> its config; UserError if there is none, whatever the file does."""
    file, colon, variant = argument.partition(':')
    if not Path(file).is_file():
        raise UserError(
            f'--config={argument}: there is no file {file}; the presets are configs/*.py'
        )
    try:
        make = runpy.run_path(file).get('get_config')
        config = make(*([variant] if colon else [])) if make else None
    except Exception as error:  # a file may do anything
        stack = traceback.extract_tb(error.__traceback__)
        lines = [f'line {frame.lineno}: ' for frame in stack if frame.filename == file]
        text = ' '.join(str(error).split())
        kind = f'{type(error).__name__}: '
        if text.startswith('get_config() takes'):
            kind, text = '', f'this config has no variants: --config={file}'
        at = lines[-1] if lines else ''
        raise UserError(f'--config={argument}: {at}{kind}{text}') from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'--config={argument}: has no get_config() that returns a ConfigDict, as '
            'configs/base.py has'
        )
    return config


def run_directory(argument: str) -> str:
    """FILE[:variant] -> where its run lies by default, 'runs/FILE[-variant]'."""
    path, _, variant = argument.partition(':')
    return f'runs/{Path(path).stem}' + (f'-{variant}' if variant else '')


def fields(config: ConfigDict, prefix: str = 'config') -> dict[str, Any]:
    """All values by their full names, {'config.model.width': 1.0, ...}."""
    return {
        name: value
        for key, entry in config.items()
        for name, value in (
            fields(entry, f'{prefix}.{key}')
            if isinstance(entry, ConfigDict)
            else {f'{prefix}.{key}': entry}
        ).items()
    }


def check_name(name: str, known: dict[str, Any]) -> None:
    """UserError if no field of the config is called `name`, with the ones that may be meant."""
    if name in known:
        return
    inside = [field for field in known if field.startswith(f'{name}.')]
    same = [field for field in known if field.split('.')[-1] == name.split('.')[-1]]
    close = inside[:1] or same or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    meant = f' (perhaps {" or ".join(close)})' if close else ''
    raise UserError(f'{name}: there is no such field{meant}; configs/base.py lists them all')


def check_value(name: str, value: Any, default: Any) -> None:
    """UserError for numbers that no field can have, and for tuples that mix or change types.

    Fields are typed, but not what their tuples hold: that must be of the type of the first element
    of `default`, the tuple of the config file, where it has one.
    """
    if isinstance(value, tuple):
        if default and not all(_like(element, default[0]) for element in value):
            raise UserError(
                f'{name}={value!r}: every element must be of the type '
                f'{type(default[0]).__name__}, as in {default!r}'
            )
        for element in value:
            if isinstance(element, float) and not math.isfinite(element):
                raise UserError(f'{name}={value!r}: the numbers must be finite')
            if isinstance(element, int) and element < 0:
                raise UserError(f'{name}={value!r}: the numbers must not be below 0')
    elif isinstance(value, int | float) and not 0 <= value < math.inf:
        raise UserError(f'{name}={value!r}: must be a finite number, not below 0')


def _like(element: Any, example: Any) -> bool:
    return isinstance(element, (int, float) if isinstance(example, float) else type(example))
