"""Finds and runs config files, and checks the fields set on the command line.

`config_flags` catches most of these mistakes too, but reports them as a traceback or several lines.
"""

import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from alexnet_jax.common.errors import UserError
from alexnet_jax.common.paths import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel has the presets inside the package, a checkout beside it.
PRESETS = _PACKAGE / 'configs' if (_PACKAGE / 'configs').is_dir() else _PACKAGE.parent / 'configs'
LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which devices compute
LONG = 300  # how much of a config file's error is shown, in characters


def find(name: str) -> str:
    """The path of a config file: an existing file, else the preset called NAME or configs/NAME.py.

    Raises UserError, listing the presets, if there is neither.
    """
    preset = re.fullmatch(r'(configs/)?(\w+)(?(1)\.py)', name)
    file = PRESETS / f'{preset[2]}.py' if preset else None
    if Path(name).is_file() and (name.endswith('.py') or not file or not file.is_file()):
        return name
    if file and file.is_file():
        return str(file)
    close = difflib.get_close_matches(Path(name).stem, presets(), n=1)
    meant = f' (did you mean {close[0]}?)' if close else ''
    raise UserError(
        f'--config={name}: no such file or preset{meant}; the presets are {", ".join(presets())}'
    )


def presets() -> list[str]:
    """The names of the presets, in alphabetical order."""
    return sorted(file.stem for file in PRESETS.glob('*.py') if file.stem != 'base')


def load(argument: str) -> ConfigDict:
    """Returns the config of FILE[:variant] or PRESET[:variant].

    The file can import the presets from `configs`, as in `from configs import base`, and modules beside
    it by their names or from `configs`. Raises UserError if there is no such file, if running it
    fails in any way, or if its fields are not those of `configs/base.py`.
    """
    name, colon, variant = argument.partition(':')
    if Path(argument).is_file():  # its name has a colon
        name, colon = argument, ''
    file = find(name)
    try:
        config = _execute(file, *([variant] if colon else []))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a config file can do anything
        stack = traceback.extract_tb(error.__traceback__)
        lines = [f'line {frame.lineno}: ' for frame in stack if frame.filename == file]
        text = ' '.join(str(error).split())
        kind = f'{type(error).__name__}: '
        if text.startswith('get_config() takes'):
            kind, text = '', f'this config has no variants: --config={name}'
        at = lines[-1] if lines else ''
        if text.startswith('no variant '):  # of `with_variant` in configs/base.py
            kind = at = ''
        text = text if len(text) <= LONG else f'{text[:LONG]} ...'
        raise UserError(f'--config={argument}: {at}{kind}{text}') from error
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'--config={argument}: must define get_config() and return a ConfigDict from it, as '
            'configs/base.py does'
        )
    _check_fields(argument, config)
    return config


def _execute(file: str, *arguments: str) -> Any:
    with _importable(os.path.dirname(os.path.abspath(file))):
        make = runpy.run_path(file).get('get_config')
        return make(*arguments) if make else None


def _check_fields(argument: str, config: ConfigDict) -> None:
    """Raises UserError unless a config has the fields of `configs/base.py`, with values of their types.

    The fields of `config.model` other than `net` are those of its network, which checks them.
    """

    def checked(config):
        return {
            name: value
            for name, value in fields(config).items()
            if name == 'config.model.net' or not name.startswith('config.model.')
        }

    there, base = checked(config), checked(_execute(str(PRESETS / 'base.py')))
    lacking = [name for name in base if name not in there]
    if lacking:
        more = f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''
        raise UserError(
            f'--config={argument}: lacks fields of configs/base.py ({lacking[0]}{more}); start from a '
            'preset, as in `from configs import base`'
        )
    for name, value in there.items():
        check_name(name, base)
        if not _like(value, base[name]):
            raise UserError(
                f'--config={argument}: {name}={value!r}: must be of type '
                f'{type(base[name]).__name__}, like {base[name]!r}'
            )


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Makes `configs` a package with the presets and the modules of `folder`, and of no other folder.

    Presets come first: a module beside a config cannot replace what the presets import.
    """

    def loaded():
        return [name for name in sys.modules if name == 'configs' or name.startswith('configs.')]

    before = {name: sys.modules.pop(name) for name in loaded()}
    package = types.ModuleType('configs')
    package.__path__ = [str(PRESETS), folder]
    sys.modules['configs'] = package
    path = sys.path.copy()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


def run_directory(argument: str) -> str:
    """The default run directory of a config argument: FILE[:variant] -> runs/FILE[-variant]."""
    path, _, variant = argument.partition(':')
    return f'runs/{Path(path).stem}' + (f'-{variant}' if variant else '')


def fields(config: ConfigDict | dict, prefix: str = 'config') -> dict[str, Any]:
    """All values by their full names: {'config.model.width': 1.0, ...}."""
    return {
        name: value
        for key, entry in config.items()
        for name, value in (
            fields(entry, f'{prefix}.{key}')
            if isinstance(entry, ConfigDict | dict)
            else {f'{prefix}.{key}': entry}
        ).items()
    }


def check_name(name: str, known: dict[str, Any]) -> None:
    """Raises UserError, with suggestions, unless `name` is the full name of a config field."""
    if name in known:
        return
    inside = [field for field in known if field.startswith(f'{name}.')]
    same = [field for field in known if field.split('.')[-1] == name.split('.')[-1]]
    close = inside[:1] or same or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    meant = f' (did you mean {" or ".join(close)}?)' if close else ''
    raise UserError(f'{name}: no such field{meant}; configs/base.py lists them all')


def check_value(name: str, value: Any, default: Any) -> None:
    """Raises UserError for invalid numbers, and for tuples with elements of the wrong type.

    Numbers must fit in float32 or 32 bits, at any depth, and not be negative; floats in a tuple may be.
    ConfigDict checks the types of fields, but not of the elements of a tuple: they must have the type
    of the first element of `default`, the config file's own value, unless that is empty.
    """
    if isinstance(value, tuple) and default and not all(_like(x, default[0]) for x in value):
        raise UserError(
            f'{name}={value!r}: every element must be of type '
            f'{type(default[0]).__name__}, as in {default!r}'
        )
    for number in _numbers(value):
        if isinstance(number, float) and not abs(number) <= LARGEST:
            raise UserError(
                f'{name}={value!r}: must be finite, and at most {LARGEST:.2g} (float32)'
            )
        if number < 0 and (isinstance(number, int) or not isinstance(value, tuple)):
            raise UserError(f'{name}={value!r}: must not be negative')
        if isinstance(number, int) and number >= 2**32:
            raise UserError(f'{name}={value!r}: must be below 2^32')


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, tuple):
        for element in value:
            yield from _numbers(element)
    elif isinstance(value, int | float):
        yield value


def _like(value: Any, example: Any) -> bool:
    """Whether a value has the type of an example; an integer can stand for a float, but not a bool."""
    if isinstance(value, bool) or isinstance(example, bool):
        return type(value) is type(example)
    return isinstance(value, (int, float) if isinstance(example, float) else type(example))
