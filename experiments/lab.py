"""What the experiments share: runs by name and seed, kept results, one command line.

An experiment is a module with

    TITLE               the claim, and where the paper makes it
    def run(lab)        asks the lab for its runs, one after another
    def report(results) -> its table, in Markdown
    def plot(results, file)  its figure, or None where it has none
    NOTES               {scale: what is otherwise than in the paper there}, above the table; not needed
    RUNS_OF             the experiment whose run directories it looks at, if not its own
    TAKES_RUNS          True where its `look` can also be given runs that are there already, --run=RUN
    INDEPENDENT         True where no run needs the result of another: --only then chooses some

and, with `labs.main(__name__)` at its end, is used as

    python -m experiments.NAME [--scale=smoke|small|full] [--seeds=3] [-- --config.data.source=FOLDER ...]

What follows `--` goes to every run, as to `python -m alexnet_jax.main`. A finished run is not run
again, an interrupted one goes on. Results lie in experiments/results/NAME-SCALE.json, with the
command, commit, versions and machine of each; `python -m experiments.report` gathers them. They come with
the repository: to measure anew, or on other pictures, give a folder of your own, --results=DIR, for
results, figure and run directories. Several commands may work at one experiment at the same time, each
at the runs that its --only names.

Nothing is measured with uncommitted code, unless --allow_dirty says so (smoke runs only show that a command
works, and may). Rows of one table share their training code, config and pictures (`provenance.py`); a run
that would not is refused. Of every run that an experiment looks at afterwards the row keeps, too, which
validation pictures were right: top-1, centre crop.
"""

import argparse
import concurrent.futures
import fcntl
import json
import math
import multiprocessing
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

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
RESULTS, FIGURES = HERE / 'results', HERE / 'figures'
EARLIER = 'earlier'  # folder of results, and of figures, of earlier versions of the code
Rows = list[dict[str, Any]]


class Lab:
    """Runs of one experiment at one scale, in `folder`; results: all that are there, {'NAME-SEED': result}.

    A result: 'name', 'seed', 'train' and 'eval' (the rows of metrics.jsonl), 'diverged', 'command';
    'starts', their 'commit', 'versions', 'devices' and 'processor', as many as differ; 'data', its 'source',
    'counts' and number of 'classes'; 'extra', what `after` gave; 'hits', which validation pictures were right
    (`statistics.unpack`), None without `after`; 'given', the arguments of the command line; 'fingerprint', as
    `provenance.py` says; 'uncommitted', whether the code of any start, or of what looked at it, was.

    given: such arguments; UserError if they set what every run has of its own.
    allow_dirty: whether uncommitted code may make runs that are no smoke runs.
    start: how a run is made; see `in_new_process`.
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
                    f'{text}: every run has its own; an experiment takes --scale, --seeds '
                    'and --results'
                )
        # Names and keys of the runs to make, none if all; keys of those that were asked for.
        self._only, self._asked = set(), []
        self.folder = runs / f'{runs_of or experiment}-{scale}'
        self._file = results / f'{experiment}-{scale}.json'
        self.results = read(self._file)

    def workdir(self, name: str, seed: int) -> pathlib.Path:
        """The run directory of a run."""
        return self.folder / f'{name}-{seed}'.replace(' ', '_')

    def value_given(self, field: str) -> str | None:
        """What the command line sets a field to; None if it does not, or if that decides no result."""
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
        """The result of a run, which is made or continued if it is not there; None if --only leaves it out.

        Raises UserError, before it is made where that can be known, if the code is not committed, or the
        row does not belong into one table with those that are there.

        Args:
          config: as given to --config, FILE[:variant].
          changes: {'model.activation': 'tanh', ...}, on top of it; then come the command line's.
          last: changes that even the command line's give way to.
          until: given all train rows so far, whether the run can be stopped here.
          after: given the run directory, what else to keep, as JSON; None of a run that diverged. It
            must be a function of a module (or a partial of one), for it runs in a process of its own.
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
        if there and _decisive(there['command']) != _decisive(
            command
        ):  # also where --only names others
            raise UserError(
                f'{self._file}: {key} was run as {" ".join(there["command"])}, not as '
                f'{" ".join(command)}; give the same arguments, or a folder for other results, '
                '--results=DIR'
            )
        if there or self._only and not {name, key} & self._only:
            return there
        for other, result in self.results.items():  # one table, one set of pictures
            if _decisive(result['given']) != _decisive(self._given):
                raise UserError(
                    f'{self._file}: {other} was run with {" ".join(result["given"]) or "nothing"} after --; '
                    f'{key} is to be compared with it: give the same, or a folder for other results, '
                    '--results=DIR'
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
                    f'{key}: {", ".join(looks)} changed while it was made; the same command looks again'
                )
            raise UserError(
                f'{key}: the training code, a preset or the checkpoint to start from changed while it was '
                f'made; remove {workdir}, and start again'
            )

        print(f'{key}: python -m alexnet_jax.main {" ".join(command)}', flush=True)
        workdir = self.workdir(name, seed)
        provenance.note(workdir, now['code'], now['start'])
        diverged = self._start(command, workdir, until)
        unchanged()
        rows = {kind: _rows(workdir, kind) for kind in ('train', 'eval')}
        if not diverged and not rows['train']:
            raise UserError(
                f'{workdir}: the run ended within its first interval, so it has no rows to '
                'report; remove it, and give a shorter interval, --config.run.log_every=N'
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
        return result

    def _uncommitted(self, key: str) -> bool:
        """Whether the code is not committed; UserError if it must be."""
        uncommitted = provenance.uncommitted()
        if uncommitted and not self._allow_dirty:
            raise UserError(
                f'{key}: the code is not committed, so nobody could measure this again; commit it, or '
                'give --allow_dirty, and the row will say so'
            )
        return uncommitted

    def _same_code(self, key: str) -> str:
        """The fingerprint of the training code; UserError if other rows were made by another."""
        code = provenance.code()
        for other, result in self.results.items():
            there = result.get('fingerprint', {}).get('code', 'not noted')
            if other != key and there != code:
                raise UserError(
                    f'{self._file}: {other} was made by other training code ({there}) than {key} would be '
                    f'({code}); check that out, or give a folder for other results, --results=DIR'
                )
        return code

    def extend(self, key: str, label: str, find: Callable, *args) -> None:
        """Keeps find(*args), of several runs, as a label of one's 'extra', unless it is there."""
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
                    f'{key}: the code changed while its runs were looked at; the same command does it again'
                )
            self.results = add(self._file, key, {**result, 'extra': extra})

    def ask(self, run: Callable[['Lab'], Any]) -> list[str]:
        """The keys, NAME-SEED, of the runs that run(lab) asks for where none needs another's result."""
        self._only, self._asked = {''}, []  # so it makes nothing
        run(self)
        self._only = set()
        return self._asked

    def choose(self, run: Callable[['Lab'], Any], only: Iterable[str]) -> None:
        """Of the runs that run(lab) asks for, makes only those with one of these names or keys.

        Raises UserError, before anything is run, if there is none.
        """
        keys = self.ask(run)
        self._only = {*only}
        for name in sorted(self._only - {*keys} - {*map(name_of, keys)}):
            raise UserError(
                f'--only={name}: there is no such run at --scale={self.scale} --seeds={self.seeds}'
            )


def name_of(key: str) -> str:
    """The name of a run, of its key NAME-SEED."""
    return key.rpartition('-')[0]


def in_new_process(command: list[str], workdir: pathlib.Path, until: Callable | None) -> bool:
    """One start of `alexnet_jax.main`, to its end or until it may stop -> whether it diverged."""
    log = workdir.parent / f'{workdir.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    before = _rows(workdir, 'train')  # of earlier starts: this one cannot be stopped yet
    with open(log, 'ab') as out:
        process = subprocess.Popen(
            [sys.executable, '-m', 'alexnet_jax.main', *command],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        asked = False
        try:
            while process.poll() is None:
                time.sleep(0.5)
                rows = _rows(workdir, 'train') if until and not asked else before
                if rows != before and until(rows):
                    process.send_signal(signal.SIGTERM)
                    asked = True
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)  # it saves, and ends
            process.wait()
            raise Stopped(f'{workdir}: stopped; the same command goes on') from None
    last = log.read_text(errors='replace').strip().rpartition('\n')[2]
    if process.returncode == MISTAKE and NOT_FINITE in last:
        return True
    if process.returncode == STOPPED and asked or process.returncode == DONE:
        return False
    if process.returncode == STOPPED:
        raise Stopped(f'{workdir}: stopped; the same command goes on')
    raise UserError(f'{workdir}: the run ended with {process.returncode} ({last}); see {log}')


def apart(function: Callable, *args):
    """What a function returns, called in a new process: this one would keep the device it used."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=spawn, initializer=mesh.configure
    ) as pool:
        try:
            return pool.submit(function, *args).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise Stopped('stopped after a run; the same command goes on') from None
        except BrokenProcessPool:
            raise UserError(
                'what looks at a run was killed, perhaps for want of memory; make room, the same '
                'command goes on'
            ) from None


def look_at(runs: Iterable[str], look: Callable) -> dict[str, Any]:
    """Results of runs that were made elsewhere, called like their directories; they are not kept."""
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
    """What `after` finds in a run, and which validation pictures it gets right."""
    return after(workdir), statistics.pack(evaluation.hits(workdir))


def _here(function: Callable, *args):
    return function(*args)


def _arguments(changes: dict[str, Any] | None) -> list[str]:
    return [f'--config.{field}={value}' for field, value in (changes or {}).items()]


def _decisive(arguments: list[str]) -> dict[str, str]:
    """What results that belong together must share, {argument: its last value}.

    Where a run lies (--workdir), and how a machine runs it, is its own affair; but not how often it
    writes a row (`run.log_every`).
    """
    values = (text.partition('=') for text in arguments)
    return {
        name: value
        for name, _, value in values
        if name != '--workdir'
        and (not name.startswith('--config.run.') or name == '--config.run.log_every')
    }


def _rows(workdir: pathlib.Path, kind: str) -> Rows:
    """The rows of one kind in a run's metrics.jsonl."""
    return [row for row in metrics.read(workdir) if row['kind'] == kind]


def _origin(workdir: pathlib.Path) -> dict[str, Any]:
    """What a run was made with, from its run directory."""
    starts = []
    for start in json.loads((workdir / 'run.json').read_text()):
        start = {'processor': 'not noted'} | start  # it is not in older run directories
        kept = {name: start[name] for name in ('commit', 'versions', 'devices', 'processor')}
        starts += [kept] if kept not in starts else []
    store = json.loads((workdir / 'store.json').read_text())
    data = {
        'source': pathlib.Path(store['source']).name,
        'counts': store['counts'],
        'classes': store['classes'],
    }
    return {'starts': starts, 'data': data}


def read(file: pathlib.Path) -> dict[str, Any]:
    """What a file of results holds; nothing, if it is not there."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f'{file}: not JSON ({error}); mend or remove it') from error


def add(file: pathlib.Path, key: str, result: dict[str, Any]) -> dict[str, Any]:
    """Puts a result into a file of results, where others may do the same -> all that are there then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = read(file) | {key: result}
        write(file, results)
    return results


def write(file: pathlib.Path, results: dict[str, Any]) -> None:
    """Replaces a file of results, one line a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in results.items()]
    paths.replace(file, ('{\n' + ',\n'.join(lines) + '\n}\n').encode())


def measured_on(results: dict[str, Any]) -> str:
    """On what some results were measured, one sentence in Markdown."""
    runs = list(results.values())
    starts = [start for run in runs for start in run['starts']]
    dirty = sum(run.get('uncommitted', False) for run in runs)

    def each(values):
        return ', '.join(sorted({*values}))

    data = each(
        f'{run["data"]["source"]} ({run["data"]["counts"]["train"]:,} training and '
        f'{run["data"]["counts"]["val"]:,} validation pictures)'
        for run in runs
    )
    codes = each(run['fingerprint']['code'] for run in runs if 'fingerprint' in run)
    return (
        f'{count(len(runs), "run")} on {data}; '
        f'devices: {each(" ".join(start["devices"]) for start in starts)}; '
        f'processors: {each(start["processor"] for start in starts)}; '
        f'jax {each(start["versions"]["jax"] for start in starts)}; '
        f'commit {each(start["commit"] for start in starts)}'
        + (f'; {count(dirty, "run")} of uncommitted code' if dirty else '')
        + (f'; training code {codes}' if codes else '')
        + '.'
    )


def shortened(config: str, part: float) -> dict[str, Any]:
    """The fields of a config's schedule of steps, every epoch of it multiplied by `part`."""
    optim = configfile.load(config).optim
    return {
        'optim.epochs': round(optim.epochs * part, 6),
        'optim.drops': tuple(round(epoch * part, 6) for epoch in optim.drops),
        'optim.conv1': tuple((round(epoch * part, 6), rate) for epoch, rate in optim.conv1),
        'optim.colour_off': round(optim.colour_off * part, 6),
    }


def named(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The results of a run, one for each of its seeds, in their order."""
    return sorted((r for r in results.values() if r['name'] == name), key=lambda r: r['seed'])


def count(number: int, word: str) -> str:
    """'1 seed', '2 seeds'."""
    return f'{number} {word}{"s" * (number != 1)}'


def chance(result: dict[str, Any]) -> float:
    """The training loss, nats, below which a run has learnt something: 0.95 of that of pure chance."""
    return 0.95 * math.log(result['data']['classes'])


def at_chance(result: dict[str, Any]) -> bool:
    """Whether a run that did not diverge ends as it began: with the training loss of chance."""
    return not result['diverged'] and result['train'][-1]['loss'] > chance(result)


def table(module: ModuleType, results: dict[str, Any], scale: str = '') -> str:
    """An experiment's table, after what is to be known about the scale.

    Raises UserError if the rows do not belong into one table.
    """
    provenance.check(results)
    note = getattr(module, 'NOTES', {}).get(scale)
    return '\n\n'.join([*([note] if note else []), module.report(results)])


def draw(module: ModuleType, results: dict[str, Any], file: pathlib.Path) -> pathlib.Path | None:
    """Draws the figure of some results -> its file; None where there is none to draw."""
    if not module.plot:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # of other results
    module.plot(results, file)
    return file if file.exists() else None


def main(module: str) -> None:
    """The command line of an experiment, given its `__name__`."""
    command.run(lambda: _main(sys.modules[module]))


def _main(module: ModuleType) -> None:
    name = pathlib.Path(module.__file__).stem
    notes = [f'{scale}: {note}' for scale, note in getattr(module, 'NOTES', {}).items()]
    parser = command.ArgumentParser(
        prog=f'python -m experiments.{name}',
        description='\n'.join([module.__doc__, *notes]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--scale', choices=SCALES, default='small')
    parser.add_argument('--seeds', type=int, default=3, help='runs of everything; default: 3')
    parser.add_argument(
        '--results',
        type=pathlib.Path,
        metavar='DIR',
        help='where to keep results, figure and run directories, to measure anew',
    )
    parser.add_argument('--report', action='store_true', help='only the table of what is there')
    parser.add_argument(
        '--allow_dirty',
        action='store_true',
        help='measure with code that is not committed; the rows say so',
    )
    if getattr(module, 'TAKES_RUNS', False):
        parser.add_argument(
            '--run',
            action='append',
            default=[],
            metavar='RUN',
            help='only look at this run directory, train and keep nothing; may be repeated',
        )
    if getattr(module, 'INDEPENDENT', False):
        parser.add_argument(
            '--only',
            action='append',
            default=[],
            metavar='NAME',
            help='make only these runs, NAME or NAME-SEED; may be repeated',
        )
    split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    if options.seeds < 1:
        raise UserError(f'--seeds={options.seeds}: must be at least 1')
    if options.results and options.results.exists() and not options.results.is_dir():
        raise UserError(f'--results={options.results}: not a folder; give another')

    def stop(number, frame):
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
        lab.ask(module.run)  # so that rows of other commands are found before anything is run
    if not options.report:
        module.run(lab)
    if not lab.results:
        raise UserError(f'{name}, {options.scale}: nothing has been run; start it without --report')
    if provenance.earlier(lab.results):
        print(f'{provenance.EARLIER}.\n')
    show(module, lab.results, figures / f'{name}-{options.scale}.png', options.scale)


def show(module: ModuleType, results: dict[str, Any], file: pathlib.Path, scale: str = '') -> None:
    """Prints the table of some results, and draws their figure."""
    print(table(module, results, scale))
    if draw(module, results, file):
        print(f'figure: {file}')
