"""What decides a result: the fingerprint of a row. One table has rows of one fingerprint.

    code    the files of `alexnet_jax` that can change a result, as syntax trees: comments, docstrings and
            formatting do not count
    config  the fields of the run's config that decide its result
    data    `Store.identity()` of its pictures: records, labels and class names

Code. Every module in a room of `alexnet_jax` counts, but for those in CANNOT; in doubt a file counts. The
commands do not: they read arguments, which are in the config. Neither do the presets, for the same
reason, nor `experiments/`: it looks at runs and does not train them.

Config. Every field but `config.run` (how a machine runs it; `run.eval_every` counts where evaluations decide
the rates), the seed, and where the pictures lie. Rows of one table are meant to differ in the fields that
the experiment sets. So of two rows of one preset, those fields must agree that neither row's command
names; of two rows of one name, all but `train.init_from`.

Data. Of rows whose commands name the same pictures.

Versions of JAX and the machine change the last bits, not what is trained; they are not part of it, and
stand under each table. So does the commit.
"""

import ast
import fnmatch
import hashlib
import itertools
import json
import pathlib
from typing import Any

import alexnet_jax
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import prepare
from alexnet_jax.input import store as stores
from alexnet_jax.rundir import directory

PACKAGE = pathlib.Path(alexnet_jax.__file__).parent
CANNOT = {  # modules that cannot change a result, and why
    'common/class_names.py': 'words',
    'common/errors.py': 'messages and exit codes',
    'devices/preemption.py': 'when a start ends',
    'input/prepare.py': 'makes the store, which has its own identity',
    'input/store_writer.py': 'the same',
    'input/sources/*.py': 'the same',
    'training/diagnosis.py': 'messages',
    'training/progress.py': 'the log',
}
PLACES = ('config.seed', 'config.data.dir', 'config.data.store', 'config.data.source')
EARLIER = (
    'Measured by earlier versions of the code: rows of one table may come from different commits'
)


def code(package: pathlib.Path = PACKAGE) -> str:
    """The fingerprint of the training code, as it is in the files now."""
    value = hashlib.sha256()
    for file in sorted(package.glob('*/**/*.py')):
        name = file.relative_to(package).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in CANNOT):
            value.update(json.dumps([name, normal(ast.parse(file.read_bytes()))]).encode())
    return value.hexdigest()[:16]


def normal(node: Any) -> Any:
    """A syntax tree as lists, without docstrings; the same on every version of Python.

    `ast.dump` is not: newer versions add fields. They are empty where the syntax is not used, and
    empty fields are left out here.
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


def fingerprint(workdir: pathlib.Path, code: str) -> dict[str, Any]:
    """That of a run, from its run directory and the code that it was trained by."""
    config = directory.read_config(workdir)
    data = config['data']
    path = data['store'] or prepare.default_store(data['source'], data['size'], data['format'])
    store = stores.open_store(path)
    directory.check_store(workdir, store)
    return {'code': code, 'config': deciding(config), 'data': f'{store.identity():08x}'}


def deciding(config: dict) -> dict[str, Any]:
    """The fields of a config that decide a result, by their full names."""
    plateau = config['optim']['schedule'] == 'plateau'
    return {
        name: value
        for name, value in _flat(config, 'config').items()
        if name not in PLACES
        and (not name.startswith('config.run.') or plateau and name == 'config.run.eval_every')
    }


def _flat(config: dict, prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        name = f'{prefix}.{key}'
        found |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return found


def difference(first: dict, second: dict) -> str:
    """Which part of the fingerprint of two rows differs, in words; '' where they go together."""
    one, other = (row.get('fingerprint') for row in (first, second))
    if not one or not other:
        return '' if one == other else 'one has no fingerprint, as rows of earlier versions'
    if one['code'] != other['code']:
        return f'their training code differs ({one["code"]} and {other["code"]})'
    mine, theirs = (_named(row['command']) for row in (first, second))
    if mine['config'] == theirs['config']:
        free = {'config.train.init_from'}
        free |= {*mine, *theirs} if first['name'] != second['name'] else set()
        for field in sorted({*one['config'], *other['config']} - free):
            values = [fields['config'].get(field) for fields in (one, other)]
            if values[0] != values[1]:
                return f'their configs differ in {field} ({values[0]!r} and {values[1]!r})'
    same = _pictures(mine) == _pictures(theirs)
    if same and one['data'] != other['data']:
        return f'their pictures differ (identity {one["data"]} and {other["data"]})'
    return ''


def _named(command: list[str]) -> dict[str, str]:
    """What a command names, {'config': FILE, 'config.optim.rate': text, ...}."""
    pairs = (argument.lstrip('-').partition('=') for argument in command)
    return {name: value for name, _, value in pairs}


def _pictures(named: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in named.items() if name.startswith('config.data.')}


def check(results: dict[str, dict]) -> None:
    """UserError, in one line, if some results do not belong into one table."""
    for (key, row), (other, second) in itertools.combinations(results.items(), 2):
        if words := difference(row, second):
            raise UserError(
                f'{key} and {other} do not belong into one table: {words}; '
                'measure one of them again, into a folder of its own, --results=DIR'
            )


def earlier(results: dict[str, dict]) -> bool:
    """Whether some results are of earlier versions, which kept no fingerprint."""
    return any('fingerprint' not in row for row in results.values())


def uncommitted() -> bool:
    """Whether the code is not that of a commit, or nobody can say because there is no git."""
    commit = directory.commit()
    return commit == 'unknown' or commit.endswith('-dirty')


def note(workdir: pathlib.Path, now: str) -> None:
    """Keeps the training code of a run's first start beside its directory; UserError at another."""
    file = workdir.with_name(f'{workdir.name}.code')
    there = now
    if workdir.exists():  # a start that failed before leaves only the note
        there = file.read_text().strip() if file.exists() else 'not noted'
    if there != now:
        raise UserError(
            f'{workdir}: was begun by other training code ({there}, now {now}); check that out, or '
            'remove the folder'
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{now}\n')
