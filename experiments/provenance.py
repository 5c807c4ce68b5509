"""The fingerprint of a row: everything that determines its result. Rows of one table must have matching ones.

    code    the files of `alexnet_jax` that can change a result, as syntax trees (comments, docstrings and
            formatting are ignored)
    files   the preset, the presets it imports, configs/base.py, and the function that analyzes the run,
            also as syntax trees
    config  the config fields that determine the result
    start   the initial checkpoint, as the fingerprints of its arrays
    data    the images: records, labels, class names, mean image and color statistics

Code: every module in a subpackage of `alexnet_jax` except those in CANNOT; when in doubt, a file counts.
The commands do not count: they only read arguments, which end up in the config.

Files: a preset's fields are in the config, but rows of different presets can only be compared through the
files they share. In the module that analyzes a run, only that function counts, along with everything in the
module that it refers to.

Config: every field except the seed, the location of the images, and `config.run`, which says how a machine
runs it. Two fields of `config.run` do count: `log_every`, because tables and figures use the rows (when did
the loss leave chance?), and `eval_every` where evaluations determine the learning rate. Rows of one table
are meant to differ in the fields that the experiment sets. So two rows of the same preset must agree in all
fields that neither command names, and two rows of the same name in all but `train.init_from`. Rows that
name the same checkpoint must have started from the same arrays.

Data: compared between rows whose commands name the same images.

JAX versions and machines change the last bits, not what is trained. They are not part of the fingerprint;
like the commit, they are listed under each table.
"""

import ast
import fnmatch
import functools
import hashlib
import inspect
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

import alexnet_jax
from alexnet_jax import main
from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare
from alexnet_jax.input import store as stores
from alexnet_jax.rundir import checkpoint, directory
from alexnet_jax.weights import bundle, hub

PACKAGE = pathlib.Path(alexnet_jax.__file__).resolve().parent
ROOT = PACKAGE.parent
CANNOT = {  # modules that cannot change a result, and why
    'common/class_names.py': 'words',
    'common/errors.py': 'messages and exit codes',
    'devices/preemption.py': 'when a start ends',
    'input/prepare.py': 'writes the store, which has its own identity',
    'input/store_writer.py': 'as above',
    'input/sources/*.py': 'as above',
    'training/compression.py': 'changes networks that are already trained',
    'training/diagnosis.py': 'messages',
    'training/progress.py': 'the log',
    'weights/compressed.py': 'reads bundles; what a run starts from has its own fingerprint',
    'weights/hub.py': 'downloads; as above',
    'weights/registry.py': 'as above',
}
PLACES = ('config.seed', 'config.data.dir', 'config.data.store', 'config.data.source')
EARLIER = (
    'Earlier versions and shorter schedules: rows of one table may come from different commits'
)


def code(package: pathlib.Path = PACKAGE) -> str:
    """Returns the fingerprint of the training code in the files."""
    value = hashlib.sha256()
    for file in sorted(package.glob('*/**/*.py')):
        name = file.relative_to(package).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in CANNOT):
            value.update(_syntax(name, file.read_bytes()))
    return value.hexdigest()[:16]


@functools.cache  # experiments ask before and after every run
def _syntax(name: str, source: bytes) -> bytes:
    return json.dumps([name, normal(ast.parse(source))]).encode()


def normal(node: Any) -> Any:
    """Converts a syntax tree to lists, without docstrings; the result is the same on every Python version.

    `ast.dump`'s is not: newer versions add fields. These are empty where the syntax is not used, so
    empty fields are left out.
    """
    if isinstance(node, list):
        return [normal(one) for one in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields['body'] = node.body[ast.get_docstring(node, clean=False) is not None :]
    if isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds empty strings
        fields['values'] = [part for part in node.values if getattr(part, 'value', None) != '']
    kept = [[name, normal(value)] for name, value in fields.items() if value not in (None, [])]
    return [type(node).__name__, *kept]


def presets(argument: str, root: pathlib.Path = ROOT) -> dict[str, str]:
    """Returns the fingerprints of configs/base.py, a preset FILE[:variant], and the presets it imports."""
    todo, found = [pathlib.Path(argument.partition(':')[0]).resolve(), root / 'configs/base.py'], {}
    while todo:
        file = todo.pop()
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        if name not in found:
            tree = ast.parse(file.read_bytes())
            found[name] = _hash(normal(tree))
            files = (root / f'{module.replace(".", "/")}.py' for module in _imported(tree))
            todo += [file for file in files if file.exists()]
    return found


def _imported(tree: ast.Module) -> list[str]:
    """Returns the modules of `configs` that a module imports; some names may not be modules."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f'{node.module}.{one.name}' for one in node.names)]
    return [name for name in names if name.startswith('configs.')]


def look(function: Callable | None) -> dict[str, str]:
    """Returns the fingerprint of a function and what it uses of its module; {} if it has no source.

    The rest of the module does not count, so adding a row to an experiment's table changes nothing.
    """
    while isinstance(function, functools.partial):
        function = function.func
    try:
        tree = ast.parse(pathlib.Path(inspect.getsourcefile(function)).read_bytes())
    except TypeError:  # None, or built in
        return {}
    statements = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [(one.asname or one.name).partition('.')[0] for one in node.names]
        else:
            parts = (one for one in ast.walk(node) if isinstance(one, ast.Name))
            names = [one.id for one in parts if isinstance(one.ctx, ast.Store)]
        for name in names:
            statements.setdefault(name, []).append(node)
    todo, reached = [function.__name__], {}
    if function.__name__ not in statements:  # nested in another, or anonymous
        todo = [*statements]
    while todo:
        name = todo.pop()
        if name in statements and name not in reached:
            reached[name] = [normal(node) for node in statements[name]]
            todo += [
                one.id
                for node in statements[name]
                for one in ast.walk(node)
                if isinstance(one, ast.Name)
            ]
    return {
        f'{function.__module__}.{function.__qualname__}': _hash(sorted(reached.items(), key=str))
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def before(command: list[str], after: Callable | None) -> dict[str, Any]:
    """Returns the fingerprint of a run before it is made, without 'data'; UserError for invalid arguments."""
    config = main.parse(['alexnet_jax.main', *command]).config.to_dict()
    config = directory.completed(json.loads(json.dumps(config)))
    return {
        'code': code(),
        'files': presets(_named(command)['config']) | look(after),
        'config': deciding(config),
        'start': start(config),
    }


def fingerprint(workdir: pathlib.Path, now: dict[str, Any]) -> dict[str, Any]:
    """Returns the fingerprint of a finished run, from its run directory and the value of `before`."""
    config = directory.read_config(workdir)
    data = config['data']
    path = data['store'] or prepare.default_store(data['source'], data['size'], data['format'])
    store = stores.open_store(path)
    directory.check_store(workdir, store)
    return {**now, 'config': deciding(config), 'data': pictures(store)}


def pictures(store: stores.Store) -> str:
    """Returns the fingerprint of a store: its identity, mean image and color statistics."""
    value = hashlib.sha256(f'{store.identity():08x}'.encode())
    for array in (store.mean, store.eigenvectors, store.sigma):
        value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()[:16]


def start(config: dict) -> str:
    """Returns the fingerprint of the bundle or latest good checkpoint in `train.init_from`, '' if unset."""
    if not (path := config['train']['init_from']):
        return ''
    path = paths.path(hub.locate(path))
    if bundle.is_bundle(path):
        return _hash(bundle.checksums(path))
    leaves = sorted(checkpoint.Checkpoints(path / 'checkpoints').leaves().items())
    return _hash([[name, leaf['fingerprint']] for name, leaf in leaves])


def deciding(config: dict) -> dict[str, Any]:
    """Returns the config fields that determine a result, by full name."""
    run = {'config.run.log_every'}
    if config['optim']['schedule'] == 'plateau':
        run.add('config.run.eval_every')
    return {
        name: value
        for name, value in configfile.fields(config).items()
        if name not in PLACES and (not name.startswith('config.run.') or name in run)
    }


def difference(first: dict, second: dict) -> str:
    """Describes how the fingerprints of two rows differ; '' if the rows can share a table."""
    one, other = (row.get('fingerprint') for row in (first, second))
    if not one or not other:
        return '' if one == other else 'one has no fingerprint, like the rows of earlier versions'
    if {*one, 'data'} != {*other, 'data'}:
        return 'one has a fingerprint from an earlier version'
    if one['code'] != other['code']:
        return f'their training code differs ({one["code"]} and {other["code"]})'
    for name in sorted({*one['files']} & {*other['files']}):
        values = [fields['files'][name] for fields in (one, other)]
        if values[0] != values[1]:
            return f'{name} differed between them ({values[0]} and {values[1]})'
    mine, theirs = (_named(row['command']) for row in (first, second))
    if mine['config'] == theirs['config']:
        free = {'config.train.init_from'}
        free |= {*mine, *theirs} if first['name'] != second['name'] else set()
        for field in sorted({*one['config'], *other['config']} - free):
            values = [fields['config'].get(field) for fields in (one, other)]
            if values[0] != values[1]:
                return f'their configs differ in {field} ({values[0]!r} and {values[1]!r})'
    named = [fields['config'].get('config.train.init_from') for fields in (one, other)]
    if named[0] == named[1] and one['start'] != other['start']:
        return (
            f'{named[0]} was a different checkpoint for each ({one["start"]} and {other["start"]})'
        )
    known = 'data' in one and 'data' in other  # not before a run is made
    if known and _pictures(mine) == _pictures(theirs) and one['data'] != other['data']:
        return f'their images differ (identity {one["data"]} and {other["data"]})'
    return ''


def _named(command: list[str]) -> dict[str, str]:
    """Returns the arguments of a command, {'config': FILE, 'config.optim.rate': text, ...}."""
    pairs = (argument.lstrip('-').partition('=') for argument in command)
    return {name: value for name, _, value in pairs}


def _pictures(named: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in named.items() if name.startswith('config.data.')}


def check(results: dict[str, dict]) -> None:
    """Raises UserError if some results do not belong in one table."""
    for (key, row), (other, second) in itertools.combinations(results.items(), 2):
        if words := difference(row, second):
            raise UserError(
                f'{key} and {other} do not belong in one table: {words}; '
                'measure one of them again, in a separate folder, --results=DIR'
            )


def earlier(results: dict[str, dict]) -> bool:
    """Returns whether some results come from earlier versions, which stored no fingerprint."""
    return any('fingerprint' not in row for row in results.values())


def uncommitted() -> bool:
    """Returns whether the code differs from its commit, or the commit is unknown for lack of git."""
    return dirty(directory.commit())


def dirty(commit: str) -> bool:
    """Returns whether a value of `directory.commit` is not a clean commit."""
    return commit == 'unknown' or commit.endswith('-dirty')


def note(workdir: pathlib.Path, code: str, start: str = '') -> None:
    """Records the training code and initial checkpoint of a run's first start, beside its directory.

    Raises UserError if a later start has different ones.
    """
    now = f'{code} from checkpoint {start}' if start else code
    file = workdir.with_name(f'{workdir.name}.code')
    there = now
    if workdir.exists():  # a start that failed early leaves only the note
        there = file.read_text().strip() if file.exists() else 'not recorded'
    if there != now:
        raise UserError(
            f'{workdir}: the run began with different training code or a different checkpoint ({there}, now '
            f'{now}); restore those, or remove the folder'
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{now}\n')
