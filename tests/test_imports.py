"""Who imports whom: the levels of the library, and where each heavy dependency may appear.

A module imports only from lower levels, so that one file can be read, tested and replaced without
those that use it. The imports are read from the source, those inside functions included.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'alexnet_jax'

LEVELS = {
    'errors': -3,
    'allocator': -3,
    'machine': -3,
    'words': -3,
    'backend': -3,
    'files': -2,
    'fingerprint': -1,
    'manager': -1,
    'configfile': -1,
    'stopping': -1,
    'distributed': -1,
    'layers': -1,
    'mesh': 0,
    'optim': 0,
    'sampler': 0,
    'checkpoint': 0,
    'metrics': 0,
    'store': 0,
    'datasets': 0,
    'progress': 0,
    'model': 0,
    'cuda_convnet': 1,
    'prepare': 1,
    'data': 1,
    'rundir': 1,
    'steps': 2,
    'switches': 2,
    'evaluate': 3,
    'checks': 3,
    'diagnosis': 3,
    'job': 4,
    'looking': 4,
    'train': 5,
    'visualize': 5,
    'retrieve': 5,
    'predict': 5,
    'main': 6,
    '__init__': 7,  # the package's own short list of names; nobody imports it
}
# Outside module -> (who may import it, whether only inside functions).
OUTSIDE = {
    'tensorflow': ({'data', 'datasets', 'prepare'}, True),
    'tensorflow_datasets': ({'data', 'datasets', 'prepare'}, True),
    'optax': ({'optim', 'steps'}, False),
    'orbax': ({'checkpoint', 'manager'}, False),
    'flax': ({'model', 'cuda_convnet', 'switches', 'steps'}, False),
    'clu': (set(), False),
    'clu.parameter_overview': (set(LEVELS), False),
    'clu.metric_writers': ({'metrics'}, True),  # needs TensorFlow
    'tensorboard': ({'metrics'}, False),
    'matplotlib': ({'predict', 'retrieve'}, True),  # for what draws
    'etils': ({'files'}, False),
    'google.cloud': ({'files'}, True),
    'ml_collections.config_flags': ({'main'}, False),  # the library has no flags
    'absl.flags': ({'main'}, False),
    'configs': (set(), False),
    'experiments': (set(), False),
    'tests': (set(), False),
}
# Its class is made from one of TFDS: it imports TFDS at the top, and is itself imported on demand.
ON_DEMAND = 'alexnet_jax.datasets.shapes'


class Import(NamedTuple):
    name: str  # absolute and dotted, down to what is imported: 'alexnet_jax.errors.UserError'
    line: int
    in_function: bool


def imports(source: str, package: str = '') -> list[Import]:
    """All imports in a module of this package, in the order of `ast.walk`."""
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


def unit(path: Path) -> str:
    """The name in LEVELS that a file of the library belongs to: all of datasets/ is one."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py')


def violations(source: str, unit: str, module: str = f'{PACKAGE}.some_module') -> list[str]:
    """What the rules have against the imports of a module of the library."""
    found = []
    package = module.rpartition('.')[0]
    for name, line, in_function in imports(source, package):
        parts = name.split('.')
        if parts[0] == PACKAGE:
            other = parts[1] if len(parts) > 1 and parts[1] in LEVELS else '__init__'
            if other != unit and LEVELS[other] >= LEVELS[unit]:
                found.append(f'line {line}: {name} is not on a lower level than {unit}')
            if f'{name}.'.startswith(f'{ON_DEMAND}.') and not in_function:
                found.append(f'line {line}: {name} outside a function')
            continue
        # The longest name in the table decides: clu.metric_writers before clu.
        prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
        rule = next((OUTSIDE[prefix] for prefix in prefixes if prefix in OUTSIDE), None)
        if rule is not None:
            users, lazy = rule
            if unit not in users:
                found.append(f'line {line}: {name} is not for {unit}')
            elif lazy and not in_function and module != ON_DEMAND:
                found.append(f'line {line}: {name} outside a function')
    return found


def library() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob('*.py'))


def dotted(path: Path) -> str:
    """'alexnet_jax/datasets/folder.py' -> 'alexnet_jax.datasets.folder'."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


@pytest.mark.parametrize('path', library(), ids=dotted)
def test_module_imports_what_it_may(path):
    assert unit(path) in LEVELS, 'a new module needs a level in this file'
    assert violations(path.read_text(), unit(path), dotted(path)) == []


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=dotted)
def test_configs_import_nothing_of_the_library(path):
    names = [found.name for found in imports(path.read_text(), 'configs')]
    assert not [name for name in names if name.split('.')[0] == PACKAGE]


@pytest.mark.parametrize(
    ('unit', 'source', 'count'),
    [
        ('steps', 'from alexnet_jax import layers, model, optim\nimport jax, optax, flax', 0),
        ('steps', 'from alexnet_jax import evaluate', 1),
        ('steps', 'from . import evaluate, layers', 1),
        ('steps', 'from .evaluate import ten_crops', 1),
        ('steps', 'from alexnet_jax.main import main', 1),
        ('steps', 'def f():\n    import alexnet_jax.train', 1),
        ('steps', 'import alexnet_jax', 1),
        ('steps', 'from alexnet_jax import load', 1),
        ('sampler', 'from alexnet_jax import store', 1),
        ('errors', 'from alexnet_jax import store', 1),
        ('store', 'from alexnet_jax.errors import UserError', 0),
        ('datasets', 'from alexnet_jax.datasets import folder\nfrom alexnet_jax import errors', 0),
        ('datasets', 'from alexnet_jax.datasets import shapes', 1),
        ('datasets', 'def f():\n    from alexnet_jax.datasets import shapes', 0),
        ('data', 'import tensorflow as tf', 1),
        ('data', 'if True:\n    from tensorflow import io', 1),
        ('data', 'def f():\n    import tensorflow as tf\n    import tensorflow_datasets', 0),
        ('steps', 'def f():\n    import tensorflow as tf', 1),
        ('train', 'import optax\nimport orbax.checkpoint as ocp\nfrom flax import linen', 3),
        ('train', 'from clu import parameter_overview', 0),
        ('train', 'from clu import metrics\nimport clu.metric_writers', 2),
        ('metrics', 'from clu import metric_writers', 1),
        ('metrics', 'def f():\n    from clu import metric_writers', 0),
        ('train', 'from configs import base\nimport experiments.table', 2),
        ('train', 'from absl import flags, logging', 1),
    ],
)
def test_the_rules_see(unit, source, count):
    assert len(violations(source, unit)) == count


def test_importing_the_library_imports_no_tensorflow_and_starts_no_device():
    """TensorFlow takes seconds; a device in use before `jax.distributed.initialize` breaks it."""
    modules = {dotted(path).removesuffix('.__init__') for path in library()} - {ON_DEMAND}
    script = f"""
import importlib, sys
for module in {sorted(modules)!r}:
    importlib.import_module(module)
    heavy = {{'tensorflow', 'tensorflow_datasets', 'matplotlib'}} & set(sys.modules)
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
