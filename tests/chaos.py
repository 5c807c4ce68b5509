"""Repeatedly kills a training run with SIGKILL, and compares its final state with that of
an uninterrupted run.

    python -m tests.chaos --kills=15

A small network trains on synthetic images, with dropout, color noise and crops in chunks, from the command
line. It is killed at seeded random moments: while training, while writing a checkpoint, or before the first
step of a start. The same command resumes it until it is done. The starts alternate between the values of
`config.run.saves`: 'wait', 'background', 'wait', ...

    same mesh     Every start uses 2x2. The last checkpoint and the rows of metrics.jsonl, except for times,
                  must match those of an uninterrupted run bit for bit.
    other meshes  Every start uses a random mesh out of 1x1, 1x2, 2x1 and 2x2. Rounding differs: if d is the
                  relative L2 distance of the final parameters between uninterrupted runs on 1x1 and 2x2, the
                  killed run must be within 3d of both.

Every start must resume from the newest checkpoint that was ever finished. A kill must not cost more than the
steps since the last checkpoint was due or, if checkpoints are saved in the background, since the one before
it. No half-written folder may remain at the end. Exits with 1, and one line per broken promise.

The network uses tanh. With ReLU, a unit that switches because of rounding makes gradients jump, and training
amplifies this until rounding moves the parameters as far as a wrong batch. Measured over 744 steps at this
learning rate: with ReLU d = 0.031, and 0.019 for one batch with wrong labels; with tanh 3e-8, and 2e-3.
"""

import argparse
import contextlib
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from alexnet_jax.command import ArgumentParser, run
from alexnet_jax.common.errors import UserError
from alexnet_jax.rundir import checkpoint, metrics
from alexnet_jax.training import optim
from tests.helpers import ROOT
from tests.helpers.commands import outcome
from tests.helpers.processes import compilation_cache

CLASSES, EXAMPLES, BATCH = 4, 60, 8  # 7.5 steps per epoch
STEPS = 24  # approximate distance between kills
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
MESHES = ((1, 1), (1, 2), (2, 1), (2, 2))
SAVES = ('wait', 'background')
# What kills wait for, in these proportions.
KINDS = ('saving', 'training', 'saving', 'training', 'starting', 'training')
PATIENCE = 600  # seconds for one start to reach its kill, or its end
ROUNDED = ('loss', 'top1_error', 'top5_error')  # fields that depend on the mesh through rounding

Outcome = tuple[int, dict[str, bytes], dict, list[dict]]  # from `tests.helpers.commands.outcome`


class Kill(NamedTuple):
    """When to kill a start; 'saving' and 'training' only after it has written a row."""

    kind: str
    step: int  # wait for the row of this step or a later one (and for 'saving', for a checkpoint to begin)
    delay: float  # seconds to wait after that
    share: float  # for 'starting': when to kill, as a fraction of the usual time to the first row

    def due(self, waited: float, steps: list[int], saving: bool) -> bool:
        """waited: time as a fraction of that usual time; steps: rows written by this start."""
        if self.kind == 'starting':
            return waited >= self.share or bool(steps)
        return bool(steps) and steps[-1] >= self.step and (saving or self.kind == 'training')


class Start(NamedTuple):
    """One start of a run, which was killed or finished."""

    saves: str
    killed: bool
    wait: float | None  # seconds to the first row
    resumed: int  # the newest checkpoint at its beginning, 0 if none
    steps: list[int]  # of the train rows that it wrote
    newest: int  # the newest checkpoint at its end


def plan(kills: int, rng: np.random.Generator) -> list[Kill]:
    """Plans one kill about every STEPS steps."""
    kinds = rng.permutation([KINDS[i % len(KINDS)] for i in range(kills)])
    return [
        Kill(
            str(kind),
            STEPS * (i + 1) - int(rng.integers(STEPS // 2)),
            rng.uniform(0, 0.1),
            rng.uniform(),
        )
        for i, kind in enumerate(kinds)
    ]


def due_steps(total: int) -> list[int]:
    """Returns the steps at which a run of `total` steps begins a checkpoint, in ascending order."""
    evaluations = itertools.takewhile(
        lambda step: step < total,
        (optim.steps_per(n * EVAL_EVERY, EXAMPLES, BATCH) for n in itertools.count(1)),
    )
    return sorted({*range(CHECKPOINT_EVERY, total, CHECKPOINT_EVERY), *evaluations, total})


def problems(start: Start, due: list[int]) -> list[str]:
    """Returns the promises that one start broke."""
    found = []
    if start.newest < start.resumed:
        found.append(
            f'the checkpoint of step {start.resumed} was lost; the newest is {start.newest}'
        )
    first = start.resumed + (LOG_EVERY - 1 - start.resumed) % LOG_EVERY
    if start.steps and start.steps[0] != first:
        found.append(
            f'it resumed with a row of step {start.steps[0]}, not {first}, from the checkpoint of '
            f'step {start.resumed}'
        )
    reached = start.steps[-1] + 1 if start.steps else 0
    later = [step for step in due if step > start.newest]
    # In the background the second checkpoint waits for the first.
    later = later[: 1 if start.saves == 'wait' else 2]
    if reached > max(later, default=start.newest):
        found.append(
            f'it reached step {reached}, but the newest checkpoint is that of step {start.newest}, '
            f'although others were due at {" and ".join(map(str, later))}'
        )
    return found


def own_rows(before: list[dict], now: list[dict]) -> list[int]:
    """Returns the steps of the train rows written since `before` (no two rows have equal times)."""
    pairs = zip(before, now, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [row['step'] for row in now[same:] if row['kind'] == 'train']


def unfinished(run_dir: pathlib.Path) -> set[tuple[str, int]]:
    """Returns entries of checkpoints/ that are not finished checkpoints: (name, last change in ns)."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(run_dir / 'checkpoints'):
            if not entry.name.isdigit():
                with contextlib.suppress(FileNotFoundError):  # it has just been finished
                    found.add((entry.name, entry.stat().st_ctime_ns))
    return found


def newest(run_dir: pathlib.Path) -> int:
    """Returns the step of the newest finished checkpoint, 0 if none."""
    return max(checkpoint.Checkpoints(run_dir / 'checkpoints').steps(), default=0)


def draw_pictures(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Writes train/CLASS/ and val/CLASS/ with images of blurred color patches."""
    for split, count in (('train', EXAMPLES), ('val', EXAMPLES // 3)):
        for i in range(count):
            path = folder / split / f'class_{i % CLASSES}' / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((80, 72)).save(path)


class Job(NamedTuple):
    """What all runs of one comparison share."""

    folder: pathlib.Path  # contains pictures/ and everything that the runs write
    kills: int
    seed: int
    program: tuple[str, ...] = ('-m', 'alexnet_jax.main')

    @property
    def total(self) -> int:
        return STEPS * (self.kills + 1)

    def command(self, name: str, mesh: tuple[int, int], saves: str) -> list[str]:
        epochs = self.total * BATCH / EXAMPLES
        return [
            sys.executable,
            *self.program,
            f'--config={ROOT}/configs/quickstart.py',
            '--cpu_devices=4',
            f'--workdir={self.folder / name}',
            f'--config.data.source={self.folder / "pictures"}',
            f'--config.data.store={self.folder / "store"}',
            *FIELDS,
            f'--config.optim.epochs={epochs!r}',
            f'--config.optim.drops=({epochs / 2!r}, {epochs * 3 / 4!r})',
            '--config.run.mesh=({}, {})'.format(*mesh),
            f'--config.run.saves={saves}',
        ]

    def start(
        self,
        name: str,
        mesh: tuple[int, int],
        saves: str = 'wait',
        kill: Kill | None = None,
        usual: float = math.inf,
    ) -> Start:
        """Starts the run `name`, and waits for its end or kills it when `kill` is due."""
        run_dir = self.folder / name
        rows, there, steps = metrics.read(run_dir), unfinished(run_dir), []
        resumed = newest(run_dir)
        environment = os.environ | compilation_cache(self.folder / 'cache')
        began, seconds, wait, seen = time.monotonic(), 0.0, None, None
        with open(self.folder / f'{name}.log', 'ab') as log:
            process = subprocess.Popen(
                self.command(name, mesh, saves), cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        try:
            while process.poll() is None and seconds < PATIENCE:
                time.sleep(0.003)
                seconds = time.monotonic() - began
                state = _state(run_dir / metrics.FILE)
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
            raise RuntimeError(
                f'{name}: exit code {process.returncode} after {seconds:.0f} s, {log.name}'
            )
        steps = own_rows(rows, metrics.read(run_dir))
        return Start(saves, killed, wait, resumed, steps, newest(run_dir))

    def alone(self, mesh: tuple[int, int]) -> Outcome:
        """Returns the outcome of an uninterrupted run, 'alone-DATAxMODEL'."""
        name = 'alone-{}x{}'.format(*mesh)
        self.start(name, mesh)
        print(f'{name}: {self.total} steps', flush=True)
        return outcome(self.folder / name)

    def killed(self, name: str, meshes: list[tuple[int, int]]) -> list[str]:
        """Kills and resumes the run `name` until its end, one start per mesh -> the promises it broke."""
        due, deaths, broken, usual = due_steps(self.total), 0, [], math.inf
        kills = [*plan(self.kills, np.random.default_rng([self.seed, 1])), None]
        for i, (kill, mesh) in enumerate(zip(kills, meshes, strict=True)):
            start = self.start(name, mesh, SAVES[i % 2], kill, usual)
            usual = min(usual, start.wait or usual)
            deaths += start.killed
            print(
                f'{name}: start {i + 1} on {mesh[0]}x{mesh[1]}, saves={start.saves}, '
                f'{kill.kind if kill else "to the end"}: from step {start.resumed} to '
                f'{start.steps[-1] + 1 if start.steps else "-"}, newest checkpoint {start.newest}',
                flush=True,
            )
            broken += [f'{name}, start {i + 1}: {line}' for line in problems(start, due)]
            if not start.killed:
                break
        if deaths < self.kills:
            broken.append(f'{name}: it ended after {deaths} of {self.kills} kills')
        left = sorted(entry for entry, _ in unfinished(self.folder / name))
        if left:
            broken.append(f'{name}: half-written entries left in checkpoints/: {", ".join(left)}')
        return broken


def same_mesh(job: Job, alone: Outcome) -> list[str]:
    """Kills a run on 2x2, the mesh of `alone` -> the promises it broke."""
    broken = job.killed('same', [(2, 2)] * (job.kills + 1))
    return broken + [f'same: {x}' for x in differences(outcome(job.folder / 'same'), alone)]


def other_meshes(job: Job, one: Outcome, four: Outcome) -> list[str]:
    """Kills a run whose starts use random meshes -> the promises it broke.

    one, four: the outcomes of uninterrupted runs on 1x1 and on 2x2.
    """
    rng = np.random.default_rng([job.seed, 2])
    meshes = [MESHES[i] for i in rng.integers(len(MESHES), size=job.kills + 1)]
    broken = job.killed('other', meshes)
    return broken + [f'other: {x}' for x in too_far(outcome(job.folder / 'other'), one, four)]


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """Returns the differences between two runs on the same mesh, one line each."""
    lines = [f'{name} differs' for name, bits in expected[1].items() if found[1].get(name) != bits]
    if found[2] != expected[2]:
        lines.append(f'history and sums are {found[2]}, not {expected[2]}')
    return [*lines, *differing_rows(found, expected)]


def too_far(found: Outcome, one: Outcome, four: Outcome) -> list[str]:
    """Returns what differs from uninterrupted runs on 1x1 and 2x2 by more than rounding, one line each."""
    d = distance(four, one)
    lines = []
    for mesh, alone in (('1x1', one), ('2x2', four)):
        value = distance(found, alone)
        if not value <= 3 * d:  # also true for NaN
            lines.append(f'the distance from {mesh} is {value:.3g}, more than 3 x {d:.3g}')
    return [*lines, *differing_rows(found, one, ignore=ROUNDED)]


def differing_rows(a: Outcome, b: Outcome, ignore: tuple[str, ...] = ()) -> list[str]:
    """Returns differences in the last step and the rows, without the fields in `ignore`, one line each."""
    lines = [] if a[0] == b[0] else [f'the last step is {a[0]}, not {b[0]}']
    for x, y in itertools.zip_longest(a[3], b[3], fillvalue={}):
        x, y = ({k: v for k, v in row.items() if k not in ignore} for row in (x, y))
        if x != y:
            lines.append(f'a row of metrics.jsonl is {x}, not {y}')
    return lines


def distance(a: Outcome, b: Outcome) -> float:
    """Returns the relative L2 distance of the parameters: |a - b| / |b|."""
    names = sorted(name for name in b[1] if name.startswith('params/'))
    x, y = (
        np.concatenate([np.frombuffer(outcome[1][name], np.float32) for name in names])
        for outcome in (a, b)
    )
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _state(path: pathlib.Path):
    """Returns a value that changes whenever a file does."""
    with contextlib.suppress(FileNotFoundError):
        state = path.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns


def main() -> None:
    parser = ArgumentParser(
        prog='python -m tests.chaos',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--kills', type=int, default=15, help='kills for each of the two runs')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments and meshes')
    parser.add_argument('--workdir', default='runs/chaos', help='a new folder for all files')
    args = parser.parse_args()
    folder = pathlib.Path(args.workdir).absolute()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'--workdir={args.workdir}: {error.strerror}; choose another') from error
    draw_pictures(folder / 'pictures', np.random.default_rng([args.seed, 0]))
    job = Job(folder, args.kills, args.seed)
    one, four = job.alone((1, 1)), job.alone((2, 2))
    if broken := same_mesh(job, four) + other_meshes(job, one, four):
        sys.exit('\n'.join(f'broken: {line}' for line in broken))
    print('every promise was kept')


if __name__ == '__main__':
    run(main)
