"""Shared by all experiments: runs identified by name and seed, stored results, one command line.

An experiment is a module with

    TITLE               the claim, and where the paper makes it
    def run(lab)        requests its runs from the lab, one after another
    def report(results) -> its table, in Markdown
    def plot(results, file)  draws its figure; None if it has none
    NOTES               optional: {scale: how that scale departs from the paper}, printed above the table
    RUNS_OF             the experiment whose run directories it analyzes, if not its own
    TAKES_RUNS          True if its `look` also accepts existing runs, --run=RUN
    INDEPENDENT         True if no run needs the result of another, which enables --only

With `labs.main(__name__)` at its end, it is used as

    python -m experiments.NAME [--scale=smoke|small|full] [--seeds=3] [-- --config.data.source=FOLDER ...]

On CPUs, set GLIBC_TUNABLES first (docs/performance.md): runs are up to twice as fast.
Everything after `--` is passed to every run, as to `python -m alexnet_jax.main`. Finished runs are skipped,
and interrupted ones resume. Results are stored in experiments/results/NAME-SCALE.json, each with its
command, commit, versions and machine; `python -m experiments.report` collects them. They are part of the
repository: to repeat a measurement, or to use other images, pass your own folder, --results=DIR, for the
results, the figure and the run directories. Several commands can work on one experiment at the same time,
each on the runs that its --only names.

Uncommitted code is refused unless --allow_dirty is given (except in smoke runs, which only show that a
command works). Rows of one table share their training code, config and images (`provenance.py`); a run
that would not is refused. For every run that an experiment analyzes, the row also records which validation
images were classified correctly: top-1, center crop.
"""

import concurrent.futures
import fcntl
import json
import math
import multiprocessing
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

import numpy as np

from alexnet_jax import command
from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import DONE, MISTAKE, STOPPED, Stopped, UserError
from alexnet_jax.devices import mesh
from alexnet_jax.rundir import directory, metrics
from alexnet_jax.training import evaluation
from alexnet_jax.training.loop import NOT_FINITE
from experiments import provenance, statistics

SCALES = ('smoke', 'small', 'full')
HERE = pathlib.Path(__file__).parent
STOPPING = threading.Event()  # by SIGTERM, whose exception a library's callback can swallow
RESULTS, FIGURES = HERE / 'results', HERE / 'figures'
EARLIER = 'earlier'  # subfolder for results and figures from earlier versions of the code
Rows = list[dict[str, Any]]


class Lab:
    """Runs of one experiment at one scale, in `folder`; results: all stored ones, {'NAME-SEED': result}.

    A result has 'name', 'seed', 'train' and 'eval' (the rows of metrics.jsonl), 'diverged', 'command';
    'starts' ('commit', 'versions', 'devices' and 'processor' of every distinct start); 'data' ('source',
    'counts' and number of 'classes'); 'extra', which `after` returned; 'hits', which validation images were
    classified correctly (`statistics.unpack`), None without `after`; 'given', the arguments of the command
    line; 'fingerprint' (`provenance.py`); 'uncommitted', whether any start or the analysis used uncommitted
    code.

    given: arguments for every run; UserError if they set what each run sets for itself.
    allow_dirty: whether runs other than smoke runs can use uncommitted code.
    start: makes a run; see `in_new_process`.
    """

    def __init__(
        self,
        experiment: str,
        scale: str,
        *,
        seeds: int,
        given: Iterable[str] = (),
        runs: pathlib.Path = pathlib.Path('runs'),
        results: pathlib.Path = RESULTS,
        start: Callable | None = None,
        runs_of: str = '',
        allow_dirty: bool = False,
    ):
        self.scale, self.seeds = scale, seeds
        self._given, self._start = list(given), start or in_new_process
        self._call = apart if self._start is in_new_process else _here
        self._allow_dirty = allow_dirty or scale == 'smoke'
        for text in self._given:
            if text.lstrip('-').partition('=')[0] in ('config', 'workdir', 'config.seed'):
                raise UserError(
                    f'{text}: set by each run itself; give --scale, --seeds or --results instead'
                )
        # Names and keys of the runs to make (empty: all), and the keys requested so far.
        self._only, self._asked, self._checks = set(), [], True
        self._planned: list[str] = []  # keys of all runs, if known
        self._took: list[float] = []  # seconds, of the runs made here
        self.folder = runs / f'{runs_of or experiment}-{scale}'
        self._file = results / f'{experiment}-{scale}.json'
        self.results = read(self._file)

    def workdir(self, name: str, seed: int) -> pathlib.Path:
        """Returns the run directory of a run."""
        return self.folder / f'{name}-{seed}'.replace(' ', '_')

    @property
    def listing(self) -> bool:
        """Whether runs are only listed, not made."""
        return self._only == {''}

    def value_given(self, field: str) -> str | None:
        """Returns what the command line sets a field to; None if unset or if it cannot change results."""
        return _decisive(self._given).get(f'--config.{field}')

    def run(
        self,
        name: str,
        seed: int,
        config: str,
        changes: dict[str, Any] | None = None,
        *,
        last: dict[str, Any] | None = None,
        until: Callable[[Rows], bool] | None = None,
        after: Callable[[pathlib.Path], dict[str, Any]] | None = None,
    ) -> dict[str, Any] | None:
        """Returns the result of a run, made or resumed if it is missing; None if --only excludes it.

        Raises UserError if the code is not committed, or if the row does not belong in one table with the
        stored ones; before the run starts where possible.

        Args:
          config: as given to --config, FILE[:variant].
          changes: {'model.activation': 'tanh', ...}, applied to it before those of the command line.
          last: changes that override even those of the command line.
          until: takes all train rows so far and returns whether the run can stop here.
          after: takes the run directory and returns what else to store, as JSON; not called if the run
            diverged. Must be a function of a module (or a partial of one): it runs in its own process.
        """
        key = f'{name}-{seed}'
        self._asked.append(key)
        command = [
            f'--config={config}',
            f'--workdir={self.workdir(name, seed)}',
            f'--config.seed={seed}',
            *_arguments(changes),
            *self._given,
            *_arguments(last),
        ]
        there = self.results.get(key)
        if not self._checks:
            return there
        if there and _decisive(there['command']) != _decisive(
            command
        ):  # even if --only names others
            raise UserError(
                f'{self._file}: {key} was run as {" ".join(there["command"])}, not as '
                f'{" ".join(command)}; pass the same arguments, or store the new results in another '
                'folder, --results=DIR'
            )
        if there or self._only and not {name, key} & self._only:
            return there
        for other, result in self.results.items():  # one table, one set of images
            if _decisive(result['given']) != _decisive(self._given):
                raise UserError(
                    f'{self._file}: {other} was run with {" ".join(result["given"]) or "nothing"} after --, '
                    f'and {key} will be compared with it; pass the same, or store the new results in '
                    'another folder, --results=DIR'
                )
        self._same_code(key)
        uncommitted = self._uncommitted(key)
        now = provenance.before(command, after)
        row = {'name': name, 'command': command, 'fingerprint': now}
        provenance.check({**self.results, key: row})

        def unchanged():
            then = provenance.before(command, after)
            looks = provenance.look(after)
            if then == now:
                return
            files = {**now['files'], **looks} == then['files']
            if files and all(then[part] == now[part] for part in ('code', 'config', 'start')):
                raise UserError(
                    f'{key}: {", ".join(looks)} changed during the run; repeat the command to redo the '
                    'analysis'
                )
            raise UserError(
                f'{key}: the training code, a preset or the initial checkpoint changed during the run; '
                f'remove {workdir} and start again'
            )

        if STOPPING.is_set():
            raise Stopped(f'stopped before {key}; repeat the command to resume')
        print(f'{self._position(key)}: python -m alexnet_jax.main {" ".join(command)}', flush=True)
        began = time.monotonic()
        workdir = self.workdir(name, seed)
        provenance.note(workdir, now['code'], now['start'])
        diverged = self._start(command, workdir, until)
        unchanged()
        rows = {kind: _rows(workdir, kind) for kind in ('train', 'eval')}
        if not diverged and not rows['train']:
            raise UserError(
                f'{workdir}: the run ended within its first interval, so it has no rows to '
                'report; remove it and set a shorter interval, --config.run.log_every=N'
            )
        result = {
            'name': name,
            'seed': seed,
            'diverged': diverged,
            **rows,
            'command': command,
            'given': self._given,
            **(origin := _origin(workdir)),
            'uncommitted': uncommitted
            or any(provenance.dirty(start['commit']) for start in origin['starts']),
            'fingerprint': provenance.fingerprint(workdir, now),
        }
        provenance.check({**self.results, key: result})
        found = self._call(_look, after, workdir) if after and not diverged else (None, None)
        unchanged()
        result |= {'extra': found[0], 'hits': found[1]}
        self.results = add(self._file, key, result)
        self._took.append(time.monotonic() - began)
        return result

    def _position(self, key: str) -> str:
        """Returns 'run 3 of 8, about 20 minutes left: KEY', as far as that is known."""
        if key not in self._planned:
            return key
        trained = (training_time(result) for result in self.results.values())
        times = self._took or [seconds for seconds in trained if seconds]
        missing = sum(other not in self.results for other in self._planned)
        left = f', {about(np.mean(times) * missing)} left' if times else ''
        return f'run {self._planned.index(key) + 1} of {len(self._planned)}{left}: {key}'

    def _uncommitted(self, key: str) -> bool:
        """Returns whether the code is uncommitted; UserError if it must be committed."""
        uncommitted = provenance.uncommitted()
        if uncommitted and not self._allow_dirty:
            raise UserError(
                f'{key}: the code is not committed, so this measurement could not be repeated; commit it, or '
                'pass --allow_dirty, which the row will record'
            )
        return uncommitted

    def _same_code(self, key: str) -> str:
        """Returns the fingerprint of the training code; UserError if other rows have a different one."""
        code = provenance.code()
        for other, result in self.results.items():
            there = result.get('fingerprint', {}).get('code', 'not recorded')
            if other != key and there != code:
                raise UserError(
                    f'{self._file}: {other} was made with different training code ({there}) than {key} would '
                    f'be ({code}); check out that code, or store the new results in another folder, '
                    '--results=DIR'
                )
        return code

    def extend(self, key: str, label: str, find: Callable, *args) -> None:
        """Stores find(*args), about several runs, in the 'extra' of one of them, unless already there."""
        result = self.results[key]
        if label not in result['extra']:
            code, looks = self._same_code(''), provenance.look(find)
            uncommitted = result['uncommitted'] | self._uncommitted(key)
            there = result['fingerprint']
            fingerprint = {**there, 'files': there['files'] | looks}
            result = {**result, 'uncommitted': uncommitted, 'fingerprint': fingerprint}
            provenance.check({**self.results, f'{key} ({label})': result})
            extra = {**result['extra'], label: self._call(find, *args)}
            if (provenance.code(), provenance.look(find)) != (code, looks):
                raise UserError(
                    f'{key}: the code changed during the analysis of its runs; repeat the command'
                )
            self.results = add(self._file, key, {**result, 'extra': extra})

    def ask(self, run: Callable[['Lab'], Any], *, checks: bool = True) -> list[str]:
        """Returns the keys, NAME-SEED, of the runs that run(lab) requests; they must be independent.

        checks: raise UserError for stored rows that come from other commands.
        """
        self._only, self._asked, self._checks = {''}, [], checks  # matches no run, so none is made
        run(self)
        self._only, self._checks = set(), True
        return self._asked

    def choose(self, run: Callable[['Lab'], Any], only: Iterable[str]) -> None:
        """Restricts the runs that run(lab) requests to those with one of these names or keys.

        Raises UserError, before anything is run, if one of these matches no run.
        """
        keys = self.ask(run, checks=False)
        names = dict.fromkeys(map(name_of, keys))
        for name in sorted({*only} - {*keys} - {*names}):
            raise UserError(
                f'--only={name}: no such run at --scale={self.scale} --seeds={self.seeds}; choose from '
                f'{", ".join(names)}, or name a single seed, as in --only={shlex.quote(keys[0])}'
            )
        self.ask(run)
        self._only = {*only}

    def plan(self, run: Callable[['Lab'], Any]) -> None:
        """Finds out which runs run(lab) will request, so that each can say how many are left."""
        dry = _Dry(self)
        run(dry)
        self._planned = [
            key for key in dry.results if not self._only or {name_of(key), key} & self._only
        ]


class _Dry(Lab):
    """A copy of a lab that makes no runs: those that are missing count as diverged."""

    def __init__(self, lab: Lab):
        vars(self).update(vars(lab))
        self._stored, self.results = lab.results, {}

    def run(self, name: str, seed: int, *args, **kwargs) -> dict[str, Any]:
        stub = {
            'name': name,
            'seed': seed,
            'diverged': True,
            'train': [],
            'eval': [],
            'extra': None,
        }
        key = f'{name}-{seed}'
        return self.results.setdefault(key, self._stored.get(key, stub))

    def extend(self, *args) -> None:
        pass


def name_of(key: str) -> str:
    """Returns the name in a run's key NAME-SEED."""
    return key.rpartition('-')[0]


def in_new_process(command: list[str], workdir: pathlib.Path, until: Callable | None) -> bool:
    """Starts `alexnet_jax.main` and waits until it ends or can stop -> whether it diverged."""
    log = workdir.parent / f'{workdir.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    before = _rows(workdir, 'train')  # rows of earlier starts do not count
    with open(log, 'ab') as out:
        process = subprocess.Popen(
            [sys.executable, '-m', 'alexnet_jax.main', *command],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        asked = told = False
        try:
            while process.poll() is None:
                if STOPPING.wait(0.5):
                    raise KeyboardInterrupt
                wanted = until and not asked or not told
                rows = _rows(workdir, 'train') if wanted else before
                if (
                    not told and rows[1:] and rows[-1] not in before
                ):  # the first row has compilation
                    most = 'at most ' * bool(until)
                    print(
                        f'{workdir.name}: {most}{about(_left(workdir, rows[-1]))} left', flush=True
                    )
                    told = True
                if until and not asked and rows != before and until(rows):
                    process.send_signal(signal.SIGTERM)
                    asked = True
        except KeyboardInterrupt:
            raise Stopped(f'{workdir}: stopped; repeat the command to resume') from None
        finally:
            # After a stop or an error here, it must not go on training.
            if process.poll() is None:
                process.terminate()  # it saves a checkpoint and exits
                process.wait()
    last = log.read_text(errors='replace').strip().rpartition('\n')[2]
    if process.returncode == MISTAKE and NOT_FINITE in last:
        return True
    if process.returncode == STOPPED and asked or process.returncode == DONE:
        return False
    if process.returncode == STOPPED:
        raise Stopped(f'{workdir}: stopped; repeat the command to resume')
    raise UserError(f'{workdir}: the run exited with {process.returncode} ({last}); see {log}')


def apart(function: Callable, *args):
    """Calls a function in a new process, since this one would keep the device busy; returns its result."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=mesh.configure
    ) as pool:
        try:
            return pool.submit(function, *args).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise Stopped('stopped after a run; repeat the command to resume') from None
        except BrokenProcessPool:
            raise UserError(
                'the process that analyzes a run was killed, perhaps because memory ran out; free some '
                'and repeat the command'
            ) from None


def look_at(runs: Iterable[str], look: Callable) -> dict[str, Any]:
    """Returns results for runs made elsewhere, named after their directories; nothing is stored."""
    seeds = {run: directory.read_config(run)['seed'] for run in runs}
    return {
        run: {
            'name': run,
            'seed': seed,
            'extra': apart(look, paths.path(run)),
            'eval': _rows(paths.path(run), 'eval'),
        }
        for run, seed in seeds.items()
    }


def _look(after: Callable, workdir: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns what `after` finds in a run, and which validation images the run classifies correctly."""
    return after(workdir), statistics.pack(evaluation.hits(workdir))


def _here(function: Callable, *args):
    return function(*args)


def _arguments(changes: dict[str, Any] | None) -> list[str]:
    return [f'--config.{field}={value}' for field, value in (changes or {}).items()]


def _decisive(arguments: list[str]) -> dict[str, str]:
    """Returns the arguments that comparable results must share, {argument: its last value}.

    Each run can have its own --workdir and `config.run` fields, except `run.log_every`, which decides how
    often it writes a row.
    """
    values = (text.partition('=') for text in arguments)
    return {
        name: value
        for name, _, value in values
        if name != '--workdir'
        and (not name.startswith('--config.run.') or name == '--config.run.log_every')
    }


def _rows(workdir: pathlib.Path, kind: str) -> Rows:
    """Returns the rows of one kind in a run's metrics.jsonl."""
    return [row for row in metrics.read(workdir) if row['kind'] == kind]


def _origin(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns 'starts' and 'data' of a result, read from the run directory."""
    starts = []
    for start in json.loads((workdir / 'run.json').read_text()):
        start = {'processor': 'not noted'} | start  # older run directories lack it
        kept = {name: start[name] for name in ('commit', 'versions', 'devices', 'processor')}
        starts += [kept] if kept not in starts else []
    store = json.loads((workdir / 'store.json').read_text())
    data = {
        'source': pathlib.Path(store['source']).name,
        'counts': store['counts'],
        'classes': store['classes'],
    }
    return {'starts': starts, 'data': data}


def _left(workdir: pathlib.Path, row: dict[str, Any]) -> float:
    """Returns a run's remaining training time in seconds, at the speed of a row."""
    epochs = directory.read_config(workdir)['optim']['epochs'] - row['epoch']
    images = json.loads((workdir / 'store.json').read_text())['counts']['train']
    return max(epochs, 0) * images / row['images_per_second']


def training_time(result: dict[str, Any]) -> float:
    """Returns the seconds that a run trained, from its rows; 0 if they do not say."""
    rows, images = result['train'], result.get('data', {}).get('counts', {}).get('train', 0)
    if not all('images_per_second' in row for row in rows):
        return 0.0
    begun = [0.0, *(row['epoch'] for row in rows)]
    return sum(
        (row['epoch'] - start) * images / row['images_per_second']
        for start, row in zip(begun, rows, strict=False)
    )


def about(seconds: float) -> str:
    """Returns 'about 40 seconds', 'about 20 minutes', 'about 16 hours'."""
    units = (('hour', 3600), ('minute', 60), ('second', 1))
    unit, length = next((one for one in units if seconds >= 1.5 * one[1]), units[-1])
    return f'about {count(max(round(seconds / length), 1), unit)}'


def durations(name: str) -> str:
    """Describes how long the stored runs of an experiment trained, a line per scale."""
    lines = ['training time:']
    for scale in SCALES:
        files = [folder / f'{name}-{scale}.json' for folder in (RESULTS, RESULTS / EARLIER)]
        results = next(filter(None, map(read, files)), {})
        timed = {key: t for key, r in results.items() if (t := training_time(r))}
        text = 'not measured'
        if timed:
            starts = [start for key in timed for start in results[key]['starts']]
            each = about(np.median([*timed.values()])) + ' each (median), ' * (len(timed) > 1)
            whole = f'{about(sum(timed.values()))} in all' * (len(timed) > 1)
            on = ', '.join(sorted({start['processor'] for start in starts}))
            text = f'{count(len(timed), "run")} measured, {each}{whole}; processors: {on}'
        lines.append(f'  {scale}: {text}')
    return '\n'.join(lines)


def read(file: pathlib.Path) -> dict[str, Any]:
    """Returns the contents of a results file; {} if it does not exist."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f'{file}: not JSON ({error}); repair or remove it') from error


def add(file: pathlib.Path, key: str, result: dict[str, Any]) -> dict[str, Any]:
    """Adds a result to a results file, which other processes may update too -> all results in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(file) | {key: result}
        write(file, results)
    return results


def write(file: pathlib.Path, results: dict[str, Any]) -> None:
    """Replaces a results file, one line per run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in results.items()]
    paths.replace(file, ('{\n' + ',\n'.join(lines) + '\n}\n').encode())


def measured_on(results: dict[str, Any]) -> str:
    """Returns one Markdown sentence about the data, machines and code behind some results."""
    runs = list(results.values())
    starts = [start for run in runs for start in run['starts']]
    dirty = sum(run.get('uncommitted', False) for run in runs)

    def each(values):
        return ', '.join(sorted({*values}))

    data = each(
        f'{run["data"]["source"]} ({run["data"]["counts"]["train"]:,} training and '
        f'{run["data"]["counts"]["val"]:,} validation images)'
        for run in runs
    )
    codes = each(run['fingerprint']['code'] for run in runs if 'fingerprint' in run)
    return (
        f'{count(len(runs), "run")} on {data}; '
        f'devices: {each(" ".join(start["devices"]) for start in starts)}; '
        f'processors: {each(start["processor"] for start in starts)}; '
        f'jax {each(start["versions"]["jax"] for start in starts)}; '
        f'commit {each(start["commit"] for start in starts)}'
        + (f'; {count(dirty, "run")} with uncommitted code' if dirty else '')
        + (f'; training code {codes}' if codes else '')
        + '.'
    )


def shortened(config: str, part: float) -> dict[str, Any]:
    """Returns the schedule fields of a config, every epoch multiplied by `part`."""
    optim = configfile.load(config).optim
    return {
        'optim.epochs': round(optim.epochs * part, 6),
        'optim.drops': tuple(round(epoch * part, 6) for epoch in optim.drops),
        'optim.conv1': tuple((round(epoch * part, 6), rate) for epoch, rate in optim.conv1),
        'optim.colour_off': round(optim.colour_off * part, 6),
    }


def named(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the results of a run, one per seed, in the order of the seeds."""
    return sorted((r for r in results.values() if r['name'] == name), key=lambda r: r['seed'])


def count(number: int, word: str) -> str:
    """Returns '1 seed', '2 seeds'."""
    return f'{number} {word}{"s" * (number != 1)}'


def chance(classes: int) -> float:
    """Returns the training loss, in nats, below which a run has learned something: 0.95 of chance."""
    return 0.95 * math.log(classes)


def at_chance(result: dict[str, Any]) -> bool:
    """Returns whether a run that did not diverge still has the training loss of chance at its end."""
    return not result['diverged'] and result['train'][-1]['loss'] > chance(
        result['data']['classes']
    )


def table(module: ModuleType, results: dict[str, Any], scale: str = '') -> str:
    """Returns an experiment's table, preceded by the notes on the scale.

    Raises UserError if the rows do not belong in one table.
    """
    provenance.check(results)
    note = getattr(module, 'NOTES', {}).get(scale)
    return '\n\n'.join([*([note] if note else []), module.report(results)])


def draw(module: ModuleType, results: dict[str, Any], file: pathlib.Path) -> pathlib.Path | None:
    """Draws the figure of some results -> its file; None if there is nothing to draw."""
    if not module.plot:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # it may show other results
    module.plot(results, file)
    return file if file.exists() else None


def main(module: str) -> None:
    """Runs the command line of an experiment, given its `__name__`."""
    command.run(lambda: _main(sys.modules[module]))


def _main(module: ModuleType) -> None:
    name = pathlib.Path(module.__file__).stem
    notes = [f'{scale}: {note}' for scale, note in getattr(module, 'NOTES', {}).items()]
    parser = command.ArgumentParser(
        prog=f'python -m experiments.{name}',
        description='\n'.join([module.__doc__, *notes, '', durations(name)]),
        formatter_class=command.Help,
    )
    parser.add_argument('--scale', choices=SCALES, default='small', help='size of the experiment')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds')
    parser.add_argument(
        '--results',
        type=pathlib.Path,
        metavar='DIR',
        help='folder for new results, their figure and run directories (default: experiments/results, '
        'experiments/figures and runs)',
    )
    parser.add_argument(
        '--report', action='store_true', help='only print the table of stored results'
    )
    parser.add_argument(
        '--allow_dirty',
        action='store_true',
        help='measure with uncommitted code, which the rows record',
    )
    if getattr(module, 'TAKES_RUNS', False):
        parser.add_argument(
            '--run',
            action='append',
            default=[],
            metavar='RUN',
            help='only analyze this run directory, without training or storing; can be repeated '
            '(default: train)',
        )
    if getattr(module, 'INDEPENDENT', False):
        parser.add_argument(
            '--only',
            action='append',
            default=[],
            metavar='NAME',
            help='make only these runs, NAME or NAME-SEED; can be repeated (default: all); an unknown name '
            'lists them',
        )
    split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    if options.seeds < 1:
        raise UserError(f'--seeds={options.seeds}: must be at least 1')
    if options.results and options.results.exists() and not options.results.is_dir():
        raise UserError(f'--results={options.results}: not a folder; choose another')

    def stop(number, frame):
        STOPPING.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if taken := getattr(options, 'run', []):
        folder = options.results or paths.path(taken[0])
        show(module, look_at(taken, module.look), folder / f'{name}.png')
        return
    results, figures, runs = RESULTS, FIGURES, pathlib.Path('runs')
    if options.results:
        results, figures, runs = options.results, options.results, options.results / 'runs'
    lab = Lab(
        name,
        options.scale,
        seeds=options.seeds,
        given=sys.argv[split + 1 :],
        runs=runs,
        results=results,
        runs_of=getattr(module, 'RUNS_OF', ''),
        allow_dirty=options.allow_dirty,
    )
    if getattr(options, 'only', []):
        lab.choose(module.run, options.only)
    elif getattr(module, 'INDEPENDENT', False) and not options.report:
        lab.ask(module.run)  # rejects rows of other commands before anything is run
    if not options.report:
        lab.plan(module.run)
        module.run(lab)
    if not lab.results:
        raise UserError(f'{name}, {options.scale}: no results yet; run it without --report')
    if provenance.earlier(lab.results):
        print(f'{provenance.EARLIER}.\n')
    show(module, lab.results, figures / f'{name}-{options.scale}.png', options.scale)


def show(module: ModuleType, results: dict[str, Any], file: pathlib.Path, scale: str = '') -> None:
    """Prints the table of some results and draws their figure."""
    print(table(module, results, scale))
    if draw(module, results, file):
        print(f'figure: {file}')
