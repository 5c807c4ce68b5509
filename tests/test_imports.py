"""Tests the layering of the library's subpackages, and where each heavy dependency may be imported.

A module imports only from its own subpackage and from lower ones, so that each can be read, tested and
replaced without those that use it. Imports are read from the source, including those inside functions.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

PACKAGE = 'alexnet_jax'

# From the bottom up: a subpackage imports from those below it, never from others on the same level.
FLOORS = (
    ('common',),
    ('devices',),
    ('input',),
    ('rundir', 'nets'),
    ('weights',),
    ('training',),
    ('shared',),  # shared by the commands
    ('commands',),
    ('package',),  # alexnet_jax/__init__.py; no module imports it
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SINGLE = {
    '__init__': 'package',
    '__main__': 'package',  # finds the commands by name
    'figures': 'shared',
    'command': 'shared',
}  # modules outside the subpackages; all other such modules are commands


# External module -> (the subpackages that can import it, whether only inside functions).
OUTSIDE = {
    'tensorflow': ({'input', 'weights'}, True),
    'tensorflow_datasets': ({'input'}, True),
    'onnx': ({'weights'}, True),
    'onnxruntime': ({'weights'}, True),
    'pyarrow': ({'input'}, True),
    'huggingface_hub': ({'input', 'weights'}, True),
    'optax': ({'training'}, False),
    'orbax': ({'rundir'}, False),
    'flax': ({'nets', 'weights', 'training'}, False),
    'clu': (set(), False),
    'clu.parameter_overview': ({'training'}, False),
    'tensorboard': ({'rundir'}, False),
    'matplotlib': ({'commands'}, True),  # for drawing
    'etils': ({'common'}, False),  # paths are `common.paths.Path`
    'pathlib': (set(), False),
    'google.cloud': ({'common'}, True),
    'torch': (set(), False),  # files of other frameworks are read without them
    'flatbuffers': (set(), False),
    'h5py': ({'weights'}, True),
    'ml_collections.config_flags': ({'shared'}, False),  # the library has no flags
    'absl.flags': ({'shared', 'commands'}, False),
    'configs': (set(), False),
    'experiments': (set(), False),
    'tests': (set(), False),
}
# Its class derives from one of TFDS, so it imports TFDS at the top, and is itself imported on demand.
ON_DEMAND = 'alexnet_jax.input.sources.shapes_builder'


class Import(NamedTuple):
    name: str  # absolute and dotted, including the imported name: 'alexnet_jax.common.errors.UserError'
    line: int
    in_function: bool


def imports(source: str, package: str = '') -> list[Import]:
    """Returns all imports in a module of this package, in the order of `ast.walk`."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')[: len(package.split('.')) - node.level + 1]
            origin = '.'.join((parents if node.level else []) + [node.module] * bool(node.module))
            names = [f'{origin}.{alias.name}' for alias in node.names]
        else:
            continue
        found += [Import(name, node.lineno, id(node) in inside) for name in names]
    return found


def room(module: str) -> str:
    """Returns the subpackage of a module, 'nets' of 'alexnet_jax.nets.layers'; commands count as one."""
    name = [*module.split('.'), '__init__'][1]
    return name if name in FLOOR else SINGLE.get(name, 'commands')


def violations(source: str, module: str) -> list[str]:
    """Returns the imports of a library module that break the rules, one line each."""
    found = []
    here, package = room(module), module.rpartition('.')[0]
    for name, line, in_function in imports(source, package):
        parts = name.split('.')
        if parts[0] == PACKAGE:
            # `load` in `from alexnet_jax import load` is not a module but a name in the package.
            there = room(name) if len(parts) < 2 or _exists(parts[1]) else 'package'
            if FLOOR[there] > FLOOR[here] or (FLOOR[there] == FLOOR[here] and there != here):
                found.append(f'line {line}: {name} is not below {here}')
            if there == here == 'commands' and name != module:
                found.append(f'line {line}: {name}: a command imports no other')
            if f'{name}.'.startswith(f'{ON_DEMAND}.') and not in_function:
                found.append(f'line {line}: {name} outside a function')
            continue
        # The longest name in the table decides: clu.parameter_overview before clu.
        prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
        rule = next((OUTSIDE[prefix] for prefix in prefixes if prefix in OUTSIDE), None)
        if rule is not None:
            users, lazy = rule
            if here not in users:
                found.append(f'line {line}: {name} is not for {here}')
            elif lazy and not in_function and module != ON_DEMAND:
                found.append(f'line {line}: {name} outside a function')
    return found


def _exists(name: str) -> bool:
    return name in FLOOR or name in SINGLE or (ROOT / PACKAGE / f'{name}.py').exists()


def library() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob('*.py'))


def dotted(path: Path) -> str:
    """'alexnet_jax/input/store.py' -> 'alexnet_jax.input.store'."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', library(), ids=dotted)
def test_module_imports_what_it_may(path):
    assert violations(path.read_text(), dotted(path).removesuffix('.__init__')) == []


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=dotted)
def test_configs_import_nothing_of_the_library(path):
    names = [found.name for found in imports(path.read_text(), 'configs')]
    assert not [name for name in names if name.split('.')[0] == PACKAGE]


@pytest.mark.parametrize(
    ('module', 'source', 'count'),
    [
        ('training.steps', 'from alexnet_jax.nets import layers\nimport jax, optax, flax', 0),
        ('training.steps', 'from alexnet_jax.training import optim\nfrom . import optim', 0),
        ('training.steps', 'from alexnet_jax import predict', 1),
        ('training.steps', 'from .. import predict, common', 1),
        ('training.steps', 'from ..predict import predict', 1),
        ('training.steps', 'from alexnet_jax.main import main', 1),
        ('training.steps', 'import alexnet_jax', 1),
        ('training.steps', 'from alexnet_jax import load', 1),
        ('nets.layers', 'def f():\n    import alexnet_jax.training.steps', 1),
        ('nets.layers', 'from alexnet_jax.rundir import directory', 1),
        ('rundir.directory', 'from alexnet_jax.nets import layers', 1),
        ('weights.torch', 'from alexnet_jax.nets import network\nimport torch', 1),
        ('nets.layers', 'from alexnet_jax.weights import torch', 1),
        ('common.errors', 'from alexnet_jax.devices import mesh', 1),
        ('input.store', 'from alexnet_jax.common.errors import UserError', 0),
        ('main', 'from alexnet_jax.training import loop', 0),
        ('main', 'from alexnet_jax import predict', 1),
        ('input.batches', 'import tensorflow as tf', 1),
        ('input.batches', 'if True:\n    from tensorflow import io', 1),
        (
            'input.batches',
            'def f():\n    import tensorflow as tf\n    import tensorflow_datasets',
            0,
        ),
        ('input.batches', f'import {ON_DEMAND}', 1),
        ('input.batches', f'def f():\n    import {ON_DEMAND}', 0),
        ('training.steps', 'def f():\n    import tensorflow as tf', 1),
        (
            'rundir.metrics',
            'import optax\nimport orbax.checkpoint as ocp\nfrom flax import linen',
            2,
        ),
        ('training.loop', 'from clu import parameter_overview', 0),
        ('training.loop', 'from clu import metrics\nimport clu.metric_writers', 2),
        ('training.loop', 'from configs import base\nimport experiments.table', 2),
        ('training.loop', 'from absl import flags, logging', 1),
    ],
)
def test_the_rules_detect_violations(module, source, count):
    assert len(violations(source, f'{PACKAGE}.{module}')) == count


def test_importing_the_library_imports_no_tensorflow_and_starts_no_device():
    """TensorFlow takes seconds; a device in use before `jax.distributed.initialize` breaks it."""
    modules = {dotted(path).removesuffix('.__init__') for path in library()} - {ON_DEMAND}
    script = f"""
import importlib, sys
for module in {sorted(modules)!r}:
    importlib.import_module(module)
    heavy = {{'tensorflow', 'tensorflow_datasets', 'pyarrow', 'matplotlib'}} & set(sys.modules)
    assert not heavy, f'importing {{module}} imports {{heavy}}'
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 3)  # raises once a device is in use
assert jax.device_count() == 3
"""
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
