"""Kills a training with SIGKILL again and again, and compares what it ends with to one left alone.

    python -m experiments.chaos --kills=30      # 12 to 20 minutes on two cores

A small net learns made-up pictures, with dropout, colour noise and crops in chunks, started as a
user starts it. It is killed at seeded random moments: while training, while a checkpoint is being
written, or before the first step of a start. The same command resumes it, until it is through.

    mesh kept     always 1x2, a tower on each device. The final parameters, velocity and history, and
                  the rows of metrics.jsonl but for their times, must be those of an uninterrupted
                  run, bit for bit.
    mesh changed  every start takes a random mesh out of 1x1, 1x2, 2x1 and 2x2. Rounding differs, so
                  with d, the relative L2 distance of the final parameters between uninterrupted runs
                  on 1x1 and on 2x2, the killed run must lie within 3d of both.

Every start must go on from the newest checkpoint that was ever finished. What a kill costs is the
steps after that one, as far as rows were written; they are done again: never more than one interval
between checkpoints. With --saves=background training goes on while a checkpoint is written, as it does
unless `config.run.saves` is 'wait': a kill meanwhile also costs the steps made since that one was begun,
which are counted apart (`+`); never is more than one unfinished. No half-written folder may be left at
the end. Exit code 1, with a line for each promise that is broken.

The net has tanh: where a ReLU switches by the last bit gradients jump, and training makes so much of
it that in the end a wrong batch is no further away than rounding. Measured on 744 steps at this rate:
with ReLU d = 0.031, and 0.019 for one batch with wrong labels; with tanh 3e-8, and 2e-3.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from alexnet_jax.command import ArgumentParser, run
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.rundir import checkpoint, directory, metrics
from alexnet_jax.training import optim, progress

ROOT = pathlib.Path(__file__).parent.parent
CLASSES, EXAMPLES, BATCH = 4, 60, 8  # 7.5 steps an epoch
STEPS = 24
CHECKPOINT_EVERY, LOG_EVERY, EVAL_EVERY = 15, 2, 5.0  # steps, steps, epochs
FIELDS = (
    '--config.model.activation=tanh',
    '--config.optim.rate=0.002',
    '--config.data.size=72',
    '--config.augment.crop=64',
    '--config.augment.chunk=4',
    f'--config.train.batch={BATCH}',
    f'--config.run.checkpoint_every={CHECKPOINT_EVERY}',
    f'--config.run.log_every={LOG_EVERY}',
    f'--config.run.eval_every={EVAL_EVERY}',
    f'--config.run.eval_batch={BATCH}',
)
KEPT, CHANGED = (1, 2), ((1, 1), (1, 2), (2, 1), (2, 2))
# What a kill waits for, in the shares of `plan`.
KINDS = ('saving', 'training', 'saving', 'training', 'starting', 'training')
PATIENCE = 600  # seconds for one start to reach its kill, or its end
ROUNDED = ('loss', 'top1_error', 'top5_error')  # of a row: what another mesh rounds otherwise


class Kill(NamedTuple):
    """When a start is killed; 'saving' and 'training' never before a step of its own was seen."""

    kind: str
    step: int  # the row of this step or a later one must have been written, and then
    delay: float  # seconds, after that, or after the beginning of a checkpoint
    share: float  # 'starting': of the time until the first row

    def due(self, waited: float, steps: list[int], saving: bool) -> bool:
        """waited: as a share of the usual time to the first row; steps: rows written since."""
        if self.kind == 'starting':
            return waited >= self.share or bool(steps)
        return bool(steps) and steps[-1] >= self.step and (saving or self.kind == 'training')


class Start(NamedTuple):
    """One start of a run that was killed or came to its end."""

    mesh: tuple[int, int]
    kind: str
    killed: bool
    seconds: float
    wait: float | None  # seconds to the first row
    resumed: int  # the newest checkpoint as it began, 0 without one
    steps: list[int]  # of the train rows that it wrote
    newest: int  # the newest checkpoint as it ended
    saving: bool  # a half-written checkpoint of this start was left


class Outcome(NamedTuple):
    """What a run ends with."""

    step: int
    arrays: dict[str, np.ndarray]  # parameters, velocity, step
    meta: dict  # history, and the sums since the last row
    rows: list[dict]  # of metrics.jsonl


def plan(kills: int, steps: int, rng: np.random.Generator) -> list[Kill]:
    """One kill about every `steps` steps."""
    kinds = rng.permutation([KINDS[i % len(KINDS)] for i in range(kills)])
    return [
        Kill(
            str(kind),
            steps * (i + 1) - int(rng.integers(steps // 2)),
            rng.uniform(0, 0.1),
            rng.uniform(),
        )
        for i, kind in enumerate(kinds)
    ]


def due_steps(total: int) -> list[int]:
    """The steps at which a run of `total` steps begins a checkpoint, ascending."""
    evaluations = itertools.takewhile(
        lambda step: step < total,
        (optim.steps_per(n * EVAL_EVERY, EXAMPLES, BATCH) for n in itertools.count(1)),
    )
    return sorted({*range(CHECKPOINT_EVERY, total, CHECKPOINT_EVERY), *evaluations, total})


def repeated(start: Start, due: list[int]) -> tuple[int, int]:
    """The steps that the next start does again: (up to the next checkpoint due, after that)."""
    if not start.steps:
        return 0, 0  # they were counted before
    reached = start.steps[-1] + 1
    begun = next((step for step in due if step > start.newest), start.newest)
    return max(min(reached, begun) - start.newest, 0), max(reached - begun, 0)


def problems(start: Start, due: list[int], saves: str) -> list[str]:
    """The promises that one start has broken; saves: `config.run.saves`."""
    found = []
    if start.newest < start.resumed:
        found.append(
            f'the checkpoint of step {start.resumed} was lost, {start.newest} is the newest'
        )
    first = start.resumed + (LOG_EVERY - 1 - start.resumed) % LOG_EVERY
    if start.steps and start.steps[0] != first:
        found.append(
            f'it went on with a row of step {start.steps[0]}, not {first}, as the checkpoint of '
            f'step {start.resumed} asks'
        )
    before, after = repeated(start, due)
    later = [step for step in due if step > start.newest]
    later = later[: 1 if saves == 'wait' else 2]  # in the background the second waits for the first
    if start.newest + before + after > max(later, default=start.newest):
        found.append(
            f'{before} + {after} steps after the checkpoint of step {start.newest} are done again, '
            f'though others were due at {" and ".join(map(str, later))}'
        )
    return found


def own_rows(before: list[dict], now: list[dict]) -> list[int]:
    """The steps of the train rows that were written since `before` (two never have equal times)."""
    pairs = zip(before, now, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [row['step'] for row in now[same:] if row['kind'] == 'train']


def unfinished(run_dir: pathlib.Path) -> set[tuple[str, int]]:
    """What is not a finished checkpoint in checkpoints/: (name, time of its last change in ns)."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(run_dir / 'checkpoints'):
            if not entry.name.isdigit():
                with contextlib.suppress(FileNotFoundError):  # finished just now
                    found.add((entry.name, entry.stat().st_ctime_ns))
    return found


def finished(run_dir: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints, ascending."""
    return checkpoint.Checkpoints(run_dir / 'checkpoints').steps()


def compilation_cache(folder: pathlib.Path) -> dict[str, str]:
    """Environment for starts that need the same programs: only the first one compiles them."""
    return {
        'JAX_COMPILATION_CACHE_DIR': str(folder),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }


def draw_pictures(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Writes train/CLASS/ and val/CLASS/ with blurred patches of colour."""
    for split, count in (('train', EXAMPLES), ('val', EXAMPLES // 3)):
        for i in range(count):
            path = folder / split / f'class_{i % CLASSES}' / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((80, 72)).save(path)


class Broken(Exception):
    """A run cannot be brought to its end."""


class Job(NamedTuple):
    """What all runs of one comparison have in common."""

    folder: pathlib.Path  # with pictures/, and all that the runs make
    devices: int
    kills: int
    seed: int
    steps: int = STEPS  # from one kill to the next, about
    program: tuple[str, str] = ('-m', 'alexnet_jax.main')
    saves: str = 'background'

    @property
    def total(self) -> int:
        return self.steps * (self.kills + 1)

    def command(self, name: str, mesh: tuple[int, int]) -> list[str]:
        epochs = self.total * BATCH / EXAMPLES
        return [
            sys.executable,
            *self.program,
            f'--config={ROOT}/configs/quickstart.py',
            f'--cpu_devices={self.devices}',
            f'--workdir={self.folder / name}',
            f'--config.data.source={self.folder / "pictures"}',
            f'--config.data.store={self.folder / "store"}',
            *FIELDS,
            f'--config.optim.epochs={epochs!r}',
            f'--config.optim.drops=({epochs / 2!r}, {epochs * 3 / 4!r})',
            '--config.run.mesh=({}, {})'.format(*mesh),
            f'--config.run.saves={self.saves}',
        ]

    def start(
        self, name: str, mesh: tuple[int, int], kill: Kill | None = None, usual: float = math.inf
    ) -> Start:
        """Starts the run `name`, and waits for its end, or kills it at its moment."""
        run_dir = self.folder / name
        rows, there, steps = metrics.read(run_dir), unfinished(run_dir), []
        resumed = max(finished(run_dir), default=0)
        cache = compilation_cache(self.folder / 'cache')
        began, seconds, wait, seen = time.monotonic(), 0.0, None, None
        with open(self.folder / f'{name}.log', 'ab') as log:
            process = subprocess.Popen(
                self.command(name, mesh), cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log
            )
        try:
            while process.poll() is None and seconds < PATIENCE:
                time.sleep(0.003)
                seconds = time.monotonic() - began
                state = _changed(run_dir / metrics.FILE)
                if state != seen:
                    seen, steps = state, own_rows(rows, metrics.read(run_dir))
                if steps and wait is None:
                    wait = seconds
                if kill and kill.due(seconds / usual, steps, bool(unfinished(run_dir) - there)):
                    time.sleep(kill.delay)
                    break
        finally:
            process.kill()
            process.wait()
        killed = process.returncode == -signal.SIGKILL and kill is not None
        if seconds >= PATIENCE or (process.returncode and not killed):
            raise Broken(
                f'{name}: exit code {process.returncode} after {seconds:.0f} s, {log.name}'
            )
        return Start(
            mesh=mesh,
            kind=kill.kind if kill else '',
            killed=killed,
            seconds=seconds,
            wait=wait,
            resumed=resumed,
            steps=own_rows(rows, metrics.read(run_dir)),
            newest=max(finished(run_dir), default=0),
            saving=bool(unfinished(run_dir) - there),
        )

    def alone(self, mesh: tuple[int, int]) -> Outcome:
        """An uninterrupted run, `alone-DATAxMODEL`."""
        name = f'alone-{_name(mesh)}'
        start = self.start(name, mesh)
        print(f'{name}: {self.total} steps, {start.seconds:.0f} s', flush=True)
        return outcome(self.folder / name)

    def killed(self, name: str, chosen: list[tuple[int, int]]) -> dict:
        """The run `name`, killed and resumed until its end on the meshes `chosen`.

        Returns its column of the table, and under 'broken' the promises that were.
        """
        due, starts, broken, usual = due_steps(self.total), [], [], math.inf
        kills = [*plan(self.kills, self.steps, np.random.default_rng([self.seed, 1])), None]
        for kill, mesh in zip(kills, chosen, strict=True):
            start = self.start(name, mesh, kill, usual)
            starts.append(start)
            usual = min(usual, start.wait or usual)
            cost = repeated(start, due)
            print(
                f'{name}: start {len(starts)} on {_name(mesh)}, {start.kind or "to the end"}: from '
                f'step {start.resumed} to {start.steps[-1] + 1 if start.steps else "-"}, newest '
                f'checkpoint {start.newest}, {"one half-written, " if start.saving else ""}'
                f'to repeat {cost[0]} + {cost[1]}',
                flush=True,
            )
            broken += [
                f'{name}, start {len(starts)}: {line}' for line in problems(start, due, self.saves)
            ]
            if not start.killed:
                break
        deaths = [start for start in starts if start.killed]
        if len(deaths) < self.kills:
            broken.append(f'{name}: it ended after {len(deaths)} of {self.kills} kills')
        left = sorted(entry for entry, _ in unfinished(self.folder / name))
        if left:
            broken.append(f'{name}: left half-written in checkpoints/: {", ".join(left)}')
        costs = [repeated(start, due) for start in deaths]
        return {
            'meshes': sorted({_name(start.mesh) for start in starts}),
            'kills': len(deaths),
            'kills_while_saving': sum(start.saving for start in deaths),
            'kills_before_a_row': sum(not start.steps for start in deaths),
            'steps': self.total,
            'repeated_in_all': sum(before + after for before, after in costs),
            'repeated_most': max(costs, key=sum, default=(0, 0)),
            'repeated_most_if_none_was_cut': max(
                (sum(repeated(start, due)) for start in deaths if not start.saving), default=0
            ),
            'finished_left': finished(self.folder / name),
            'unfinished_left': left,
            'starts': [
                {
                    **start._asdict(),
                    'steps': [*start.steps[:1], *start.steps[-1:]],
                    'repeated': repeated(start, due),
                }
                for start in starts
            ],
            'broken': broken,
        }


def mesh_kept(job: Job, mesh: tuple[int, int], alone: Outcome) -> dict:
    """Kills a run on one mesh: its column of the table."""
    column = job.killed('kept', [mesh] * (job.kills + 1))
    found = compare_kept(outcome(job.folder / 'kept'), alone)
    return column | found | {'broken': column['broken'] + found['broken']}


def mesh_changed(job: Job, one: Outcome, four: Outcome) -> dict:
    """Kills a run whose starts take random meshes: its column of the table."""
    rng = np.random.default_rng([job.seed, 2])
    chosen = [CHANGED[i] for i in rng.integers(len(CHANGED), size=job.kills + 1)]
    column = job.killed('changed', chosen)
    found = compare_changed(outcome(job.folder / 'changed'), one, four)
    return column | found | {'broken': column['broken'] + found['broken']}


def compare_kept(found: Outcome, expected: Outcome) -> dict:
    """What differs from an uninterrupted run on the same mesh; all of it breaks the promise."""
    bits = {
        name: int(np.bitwise_count(_bytes(x) ^ _bytes(expected.arrays[name])).sum())
        for name, x in found.arrays.items()
    }
    rows = differing_rows(found.rows, expected.rows)
    broken = [f'kept: {name} differs in {count} bits' for name, count in bits.items() if count]
    broken += [f'kept: {row}' for row in rows]
    if found.step != expected.step:
        broken.append(f'kept: the last step is {found.step}, not {expected.step}')
    if found.meta != expected.meta:
        broken.append(f'kept: history and sums are {found.meta}, not {expected.meta}')
    return {'bits': sum(bits.values()), 'rows': len(rows), 'broken': broken}


def compare_changed(found: Outcome, one: Outcome, four: Outcome) -> dict:
    """How far a run on changing meshes is from those on 1x1 and on 2x2, and whether it may be."""
    d = distance(four, one)
    distances = {'1x1': distance(found, one), '2x2': distance(found, four)}
    rows = differing_rows(found.rows, one.rows, ignore=ROUNDED)
    broken = [f'changed: {row}' for row in rows]
    broken += [
        f'changed: the distance from {mesh} is {value:.3g}, more than 3 x {d:.3g}'
        for mesh, value in distances.items()
        if not value <= 3 * d  # NaN is none
    ]
    if found.step != one.step:
        broken.append(f'changed: the last step is {found.step}, not {one.step}')
    return {
        'd': d,
        'from_1x1': distances['1x1'],
        'from_2x2': distances['2x2'],
        'rows': len(rows),
        'broken': broken,
    }


def outcome(run_dir: pathlib.Path) -> Outcome:
    """What the newest checkpoint of a run holds, and its rows."""
    checkpoints = checkpoint.Checkpoints(run_dir / 'checkpoints')
    here = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for name, leaf in checkpoints.shapes().items()
    }
    step, arrays, meta = checkpoints.restore(target)
    return Outcome(step, jax.device_get(arrays), meta, metrics.read(run_dir))


def differing_rows(a: list[dict], b: list[dict], ignore: tuple[str, ...] = ()) -> list[str]:
    """The rows that are not the same in both, times and `ignore` aside, one line for each."""
    ignored = {*progress.TIMES, *ignore}
    lines = []
    for x, y in itertools.zip_longest(a, b, fillvalue={}):
        x, y = ({k: v for k, v in row.items() if k not in ignored} for row in (x, y))
        if x != y:
            lines.append(f'a row of metrics.jsonl is {json.dumps(x)}, not {json.dumps(y)}')
    return lines


def distance(a: Outcome, b: Outcome) -> float:
    """Relative L2 distance of the parameters: |a - b| / |b|."""
    x, y = (
        np.concatenate(
            [
                outcome.arrays[name].astype(np.float64).ravel()
                for name in sorted(outcome.arrays)
                if name.startswith('params/')
            ]
        )
        for outcome in (a, b)
    )
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def table(columns: dict[str, dict]) -> list[str]:
    """The lines of the table; a column for every comparison."""

    def cell(name, form):
        values = [column.get(name) for column in columns.values()]
        return ['-' if value is None else form(value) for value in values]

    def names(values):
        return ' '.join(map(str, values)) or 'none'

    rows = [
        ('', list(columns)),
        ('meshes', cell('meshes', names)),
        ('steps of the run', cell('steps', str)),
        ('kills', cell('kills', str)),
        ('  of them while a checkpoint was written', cell('kills_while_saving', str)),
        ('  before the first row of a start', cell('kills_before_a_row', str)),
        (
            f'steps repeated, the most (interval {CHECKPOINT_EVERY})',
            cell('repeated_most', lambda cost: '{} + {}'.format(*cost)),
        ),
        ('  by kills that cut no checkpoint', cell('repeated_most_if_none_was_cut', str)),
        ('  in all', cell('repeated_in_all', str)),
        ('bits that differ, of all arrays', cell('bits', str)),
        ('rows that differ', cell('rows', str)),
        ('d: from 1x1 to 2x2, uninterrupted', cell('d', '{:.3g}'.format)),
        ('  the killed run from 1x1', cell('from_1x1', '{:.3g}'.format)),
        ('  the killed run from 2x2', cell('from_2x2', '{:.3g}'.format)),
        ('checkpoints left', cell('finished_left', names)),
        ('  half-written', cell('unfinished_left', names)),
    ]
    return [f'{label:<44}' + ''.join(f'{value:>20}' for value in values) for label, values in rows]


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.ascontiguousarray(x)).view(np.uint8)


def _name(mesh: tuple[int, int]) -> str:
    return '{}x{}'.format(*mesh)


def _changed(path: pathlib.Path):
    with contextlib.suppress(FileNotFoundError):
        state = path.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.chaos',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--kills', type=int, default=30, help='of each of the two runs')
    parser.add_argument('--seed', type=int, default=0, help='of the moments and the meshes')
    parser.add_argument('--saves', choices=('wait', 'background'), default='wait', help='how')
    parser.add_argument(
        '--workdir',
        type=pathlib.Path,
        default=pathlib.Path('runs/chaos'),
        help='folder to make, for everything',
    )
    parser.add_argument('--out', type=pathlib.Path, help='default: chaos.json in the workdir')
    args = parser.parse_args()
    if args.kills < 1 or args.seed < 0:
        raise UserError(f'--kills={args.kills} --seed={args.seed}: at least 1, and at least 0')
    folder = args.workdir.absolute()
    out = args.out or folder / 'chaos.json'
    try:
        folder.mkdir(parents=True)
        out.touch()
    except FileExistsError as error:
        raise UserError(f'--workdir={args.workdir}: is there; remove it or give another') from error
    except OSError as error:
        raise UserError(f'{error.filename}: cannot be written: {error.strerror}') from error
    meshes.configure(cpu_devices=1)
    draw_pictures(folder / 'pictures', np.random.default_rng([args.seed, 0]))
    record = {
        'command': ['python', '-m', 'experiments.chaos', *sys.argv[1:]],
        'commit': directory.commit(),
        'jax': version('jax'),
        'orbax': version('orbax-checkpoint'),
        'machine': f'{platform.system()} {platform.machine()}, {os.cpu_count()} cores',
    }
    two, four = (
        Job(folder, devices, args.kills, args.seed, saves=args.saves) for devices in (2, 4)
    )
    comparisons = {
        'mesh kept': lambda: mesh_kept(two, KEPT, two.alone(KEPT)),
        'mesh changed': lambda: mesh_changed(four, four.alone((1, 1)), four.alone((2, 2))),
    }
    began, columns, broken = time.monotonic(), {}, []
    for name, compare in comparisons.items():
        try:
            columns[name] = compare()
            broken += columns[name]['broken']
        except Broken as error:
            broken.append(f'{name}: {error}')
    record |= {'seconds': time.monotonic() - began, 'runs': columns, 'broken': broken}
    out.write_text(json.dumps(record, indent=1) + '\n')
    print('', *table(columns), f'{record["seconds"]:.0f} s; {out}', sep='\n', flush=True)
    if broken:
        sys.exit('\n'.join(f'broken: {line}' for line in broken))


if __name__ == '__main__':
    run(main)
