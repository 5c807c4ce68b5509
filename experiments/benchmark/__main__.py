"""Measures training and prediction speed against hardware ceilings, other implementations and PyTorch.

    python -m experiments.benchmark                                     # training and prediction
    python -m experiments.benchmark --layers --plain --two_devices      # compare implementations
    python -m experiments.benchmark --peer=torch --peer_python=~/torch/bin/python --out=runs/torch
    python -m experiments.benchmark --tasks=input,both --store=data/flowers-256-u8 --out=runs/input

Every contestant stays ready in its own process, and they take turns in rotating order, `--repeats` times.
Ratios are computed within a round, so that drifts in machine speed do not bias them. The tables show medians,
minima and maxima; FLOP/s and bytes/s are fractions of what large matrix products and copies reach in the same
rounds. Bytes are the compiler's estimate. On Linux CPUs all processes use the malloc settings of
docs/devices.md, except the plain form and PyTorch forms without "our malloc" in their name. Results are
written to benchmark.json and benchmark.png in `--out`, a folder that must not contain earlier ones.
"""

import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError, reason
from alexnet_jax.devices import cpu
from alexnet_jax.input.store import open_store
from alexnet_jax.rundir import directory
from experiments.benchmark import report
from experiments.benchmark.protocol import Worker, WorkerError, drained

# The settings that docs/devices.md recommends on CPUs, with which malloc keeps its memory.
MALLOC = (
    'glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1'
    ':glibc.malloc.trim_threshold=1099511627776:glibc.malloc.hugetlb=1'
)
OURS, PEER = 'experiments.benchmark.ours', 'experiments.benchmark.peer'
FORMS = {
    'mode': ('eager', 'compile'),
    'layout': ('contiguous', 'channels_last'),
    'lrn': ('builtin', 'slices'),
}
TASKS = ('train', 'infer', 'input', 'both')
# Options that only apply to some tasks.
NEEDS = {
    'layers': {'train'},
    'dispatch': {'train', 'both'},
    **dict.fromkeys(('plain', 'two_devices', 'deterministic', 'peer'), {'train', 'infer'}),
    **dict.fromkeys(('store', 'cold'), {'input', 'both'}),
}
DETERMINISTIC = 'alexnet_jax, deterministic'
# Maximum relative L2 distance of a peer's logits and gradients from ours in full float32. ReLUs that flip
# because of rounding errors change gradients by a few thousandths.
TOLERANCE = {'float32': 0.02, 'bfloat16': 0.2}
# An unrelated gradient of the right norm has distance sqrt(2); a zero gradient has 1.
UNRELATED = 0.7


def main() -> None:
    args = _arguments()
    out = _folder(args.out)
    backend, kind = _device()
    spec = {
        'config': args.config,
        'dtype': args.dtype,
        'batch': args.batch,
        'classes': args.classes,
        'devices': 1,
        'form': 'ours',
        'cpu': backend == 'cpu',
        'threads': cpu.cores(),
        'malloc': backend == 'cpu' and sys.platform == 'linux',
        'deterministic': False,
        'dispatch': 1,
        'patience': args.patience,
    }
    record = {
        'command': ['python', '-m', 'experiments.benchmark', *sys.argv[1:]],
        **spec,
        'machine': _machine(kind),
        'tasks': {},
    }
    print(f'{args.config}, batch {args.batch}, {args.dtype}, {record["machine"]}', flush=True)
    if spec['malloc']:
        forms = 'the plain form and PyTorch without "our malloc"'
        print(f'GLIBC_TUNABLES={MALLOC}, except {forms}', flush=True)
    title = f'{args.config}, batch {args.batch}, {args.dtype}: {record["machine"]["device"]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        reference = {}
        if args.plain or args.peer:
            file = str(pathlib.Path(folder) / 'reference.npz')
            asked = {
                **spec,
                'task': 'reference',
                'file': file,
                'plain': args.plain,
                'tolerance': TOLERANCE[args.dtype],
            }
            reference = {'file': file, **_facts(asked)}
        for task in args.tasks:
            contestants = _contestants(args, {**spec, 'task': task}, reference)
            rows, layers = _measure(contestants, args)
            record['tasks'][task] = rows
            (out / 'benchmark.json').write_text(json.dumps(record, indent=1) + '\n')
            report.draw(record['tasks'], title, out / 'benchmark.png')
            print(f'\n{task}', *report.lines(rows, args.classes), sep='\n', flush=True)
            if layers:
                record['layers'] = layers
                ceiling = report.ceiling(rows, 'flops')
                own = next(row for row in rows if row['ratio'] is None)['seconds']['median']
                print(
                    '', *report.layer_lines(layers, args.batch, ceiling, own), sep='\n', flush=True
                )
                (out / 'benchmark.json').write_text(json.dumps(record, indent=1) + '\n')
    print(f'\nwrote {out}/benchmark.json and benchmark.png')


def _arguments():
    parser = ArgumentParser(
        prog='python -m experiments.benchmark',
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument('--config', default='configs/paper.py', help='a preset')
    parser.add_argument('--tasks', default='train,infer', help=f'any of {",".join(TASKS)}')
    parser.add_argument('--batch', type=int, default=128, help='images per batch')
    parser.add_argument('--dtype', default='float32', choices=TOLERANCE, help='compute dtype')
    parser.add_argument('--classes', type=int, default=1000, help='number of classes')
    parser.add_argument('--repeats', type=int, default=10, help='number of rounds')
    parser.add_argument('--seconds', type=float, default=2.0, help='minimum length of a turn')
    parser.add_argument(
        '--patience',
        type=float,
        default=30.0,
        help='minutes to wait for a worker to be ready, and for each answer',
    )
    parser.add_argument('--layers', action='store_true', help='also time every operation alone')
    parser.add_argument(
        '--plain', action='store_true', help='compare with a straightforward implementation'
    )
    parser.add_argument(
        '--two_devices', action='store_true', help='compare with one tower on each of two devices'
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='compare with the bitwise reproducible GPU mode',
    )
    parser.add_argument(
        '--dispatch',
        type=int,
        default=1,
        help='compare with this many training steps per program, config.run.dispatch',
    )
    parser.add_argument(
        '--store', default='', help='folders written by prepare, for input and both'
    )
    parser.add_argument(
        '--cold',
        action='store_true',
        help='evict the store from the page cache before each turn of input and both (Linux)',
    )
    parser.add_argument(
        '--peer', choices=('torch',), help='compare with the same network in PyTorch'
    )
    parser.add_argument('--peer_python', default=sys.executable, help='a Python with PyTorch')
    parser.add_argument(
        '--peer_form',
        default='',
        help='try only these forms of the peer: MODE, '
        'MODE,LAYOUT or MODE,LAYOUT,LRN, as in compile,channels_last',
    )
    parser.add_argument('--out', default='runs/benchmark', help='folder for the results')
    args = parser.parse_args()
    args.tasks = args.tasks.split(',')
    for task in args.tasks:
        if task not in TASKS:
            raise UserError(f'--tasks={task}: choose from {",".join(TASKS)}')
    if {'input', 'both'} & {*args.tasks} and not args.store:
        raise UserError(
            '--tasks=input and both need --store=DIR, a folder written by alexnet_jax.prepare'
        )
    for name, tasks in NEEDS.items():
        if getattr(args, name) != parser.get_default(name) and not tasks & {*args.tasks}:
            raise UserError(f'--{name} needs --tasks={" or ".join(sorted(tasks))}')
    for name in ('peer_form', 'peer_python'):
        if getattr(args, name) != parser.get_default(name) and not args.peer:
            raise UserError(f'--{name} needs --peer')
    config = configfile.load(args.config)
    if args.two_devices and getattr(config.model, 'towers', 1) == 1:
        raise UserError(f'--config={args.config}: --two_devices needs a network with two towers')
    if config.model.net != 'alexnet' and args.plain:
        raise UserError(f"--config={args.config}: --plain only supports networks like the paper's")
    args.store = [os.path.abspath(os.path.expanduser(s)) for s in args.store.split(',') if s]
    for store in args.store:
        open_store(store)
    for name in ('seconds', 'patience'):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f'--{name}={getattr(args, name)}: must be above 0')
    for name in ('batch', 'repeats', 'classes', 'dispatch'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name}={getattr(args, name)}: must be at least 1')
    args.peer_form = args.peer_form.split(',') if args.peer_form else []
    if not all(value in FORMS[name] for name, value in zip(FORMS, args.peer_form, strict=False)):
        choices = ', '.join(' or '.join(values) for values in FORMS.values())
        raise UserError(f'--peer_form={",".join(args.peer_form)}: give {choices}, in this order')
    args.peer_python = os.path.expanduser(args.peer_python)
    return args


def _folder(name: str) -> pathlib.Path:
    """Creates the folder for the results; UserError if it already holds some."""
    out = pathlib.Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / 'benchmark.json').touch()
    except OSError as error:
        raise UserError(f'--out={out}: cannot write there: {reason(error)}') from error
    if (out / 'benchmark.json').stat().st_size:
        raise UserError(
            f'--out={out}: holds the results of an earlier command; choose another folder, or '
            'remove them'
        )
    return out


def _device() -> tuple[str, str]:
    """Returns JAX's backend and device kind, queried in another process so that this one holds no device."""
    script = 'import jax; print(jax.default_backend(), jax.devices()[0].device_kind)'
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, check=False
    )
    if done.returncode:
        (*_, said) = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
        raise UserError(f'JAX does not start on this machine: {said}')
    backend, _, kind = done.stdout.strip().splitlines()[-1].partition(' ')
    return backend, kind


def _machine(kind: str) -> dict:
    return {
        'device': kind,
        'cores': cpu.cores(),
        'processor': cpu.processor(),
        'python': platform.python_version(),
        'jax': version('jax'),
        'jaxlib': version('jaxlib'),
        'commit': directory.commit(),
        'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
    }


def _facts(spec: dict) -> dict:
    worker = _start('the reference', OURS, sys.executable, spec)
    worker.close()
    return worker.facts


def _start(name: str, module: str, python: str, spec: dict) -> Worker:
    environment = {'GLIBC_TUNABLES': MALLOC if spec['malloc'] else ''}
    if module == PEER:  # compilation is timed, so workers must not share compiled kernels
        folder = tempfile.mkdtemp(prefix='inductor-', dir=os.path.dirname(spec['file']))
        environment['TORCHINDUCTOR_CACHE_DIR'] = folder
    try:
        return Worker(name, python, module, spec, environment, spec['patience'])
    except (WorkerError, OSError) as error:
        mistake = str(error).partition('UserError: ')[2]
        raise UserError(mistake or f'{spec["task"]} on {python}: {error}') from error


def _pace(worker: Worker, count: int = 1) -> float:
    """Returns the mean seconds per repetition, over enough of them to hide the cost of synchronization.

    count: the smallest number of repetitions.
    """
    while (seconds := worker.ask(count)['seconds']) < 0.3:
        count *= 2
    return seconds / count


def _contestants(args, spec: dict, reference: dict) -> dict[str, tuple[str, str, dict]]:
    """Returns {name: (module, Python, spec)}; the others are compared with the first."""
    ours = sys.executable
    if spec['task'] in ('input', 'both'):
        chosen = {}
        for store in args.store:
            one = {**spec, 'store': store, 'cold': args.cold}
            chosen[store] = (OURS, ours, one)
            if args.dispatch > 1 and spec['task'] == 'both':
                name = f'{store}, {args.dispatch} steps at once'
                chosen[name] = (OURS, ours, {**one, 'dispatch': args.dispatch})
        return chosen
    chosen = {'alexnet_jax': (OURS, ours, spec)}
    if args.two_devices:
        chosen['alexnet_jax, two devices'] = (OURS, ours, {**spec, 'devices': 2})
    if args.deterministic:
        chosen[DETERMINISTIC] = (OURS, ours, {**spec, 'deterministic': True})
    if args.dispatch > 1 and spec['task'] == 'train':
        name = f'alexnet_jax, {args.dispatch} steps at once'
        chosen[name] = (OURS, ours, {**spec, 'dispatch': args.dispatch})
    if args.plain:
        chosen['the plain form'] = (OURS, ours, {**spec, 'form': 'plain', 'malloc': False})
    if args.peer:
        chosen |= _peers(args, {**spec, **reference})
    return chosen


def _limits(task: str, tolerance: float, own: float) -> dict[str, float]:
    """Returns the limits on a peer's distances; for gradients, twice our own distance if that is larger.

    Gradients only count for `train`: some of PyTorch's compiled forms predict correctly without gradients.
    """
    limits = {'logits_difference': tolerance}
    if task == 'train':
        limits['gradients_difference'] = min(max(tolerance, 2 * own), UNRELATED)
    return limits


def _agrees(name: str, facts: dict, limits: dict[str, float]) -> bool:
    """Returns whether a peer computes the same function as ours; prints a line if not."""
    for kind, limit in limits.items():
        if not facts[kind] < limit:
            print(
                f'{name}: skipped, it computes a different function: {kind} {facts[kind]:.2g}',
                flush=True,
            )
            return False
    return True


def _peers(args, spec: dict) -> dict[str, tuple[str, str, dict]]:
    """Returns PyTorch's stock form, and its fastest eager and compiled forms, after trying them all."""

    def try_out(mode, layout, lrn, kept):
        """Returns (time as a multiple of ours in the same minute, name, spec) for a form."""
        form = {
            **spec,
            'mode': mode,
            'layout': layout,
            'lrn': lrn,
            'malloc': kept,
            'stock': False,
        }
        name = f'torch {mode}, {layout}, {lrn} LRN' + (', our malloc' if kept else '')
        worker = _start(name, PEER, args.peer_python, form)
        try:
            if not _agrees(name, worker.facts, spec['limits']):
                return math.inf, name, form
            ratios = [_pace(worker) / _pace(ours) for _ in range(4)]
        except WorkerError as error:
            raise UserError(f'{spec["task"]}: {error}') from error
        finally:
            worker.close()
        ratio = statistics.median(ratios[1:])
        print(
            f'{name}: {ratio:.2f} times our time; distance from ours: logits '
            f'{worker.facts["logits_difference"]:.0e}, gradients {worker.facts["gradients_difference"]:.0e}',
            flush=True,
        )
        return ratio, name, form

    spec['limits'] = _limits(spec['task'], TOLERANCE[args.dtype], spec.pop('own'))
    given = dict(zip(FORMS, args.peer_form, strict=False))
    modes, layouts, norms = ([given[name]] if name in given else FORMS[name] for name in FORMS)
    ours = _start('alexnet_jax', OURS, sys.executable, spec)
    stock = {
        'mode': 'eager',
        'layout': 'contiguous',
        'lrn': 'builtin',
        'malloc': False,
        'stock': True,
    }
    chosen = {'torch eager, stock': {**spec, **stock}}
    kept = spec['malloc']
    try:
        for mode in modes:
            tried = [try_out(mode, *form, kept) for form in itertools.product(layouts, norms)]
            best = min(tried, key=lambda one: one[0])[2]
            if kept:  # also without the malloc settings, in case it is faster
                tried.append(try_out(mode, best['layout'], best['lrn'], False))
            ratio, name, form = min(tried, key=lambda one: one[0])
            if ratio == math.inf:
                raise UserError(
                    f'torch {mode}: none of its forms computes the same function as ours'
                )
            chosen[name] = form
    finally:
        ours.close()
    return {name: (PEER, args.peer_python, form) for name, form in chosen.items()}


def _measure(contestants, args) -> tuple[list[dict], list[dict]]:
    """Returns the rows of results, ceilings last, and those of the operations with --layers."""
    spec = next(iter(contestants.values()))[2]
    ours, peer = (
        next((entry for entry in contestants.values() if entry[0] == module), None)
        for module in (OURS, PEER)
    )
    ceilings = {}
    if spec['task'] != 'input':
        ceilings = {report.PRODUCTS: (ours, 'matmul'), report.COPIES: (ours, 'copy')}
        if peer:
            ceilings[f'{report.PRODUCTS}, PyTorch'] = (peer, 'matmul')
    entries = contestants | {
        name: (module, python, {**one, 'task': task})
        for name, ((module, python, one), task) in ceilings.items()
    }
    workers, answers, counts = {}, {name: [] for name in entries}, {}
    try:
        for name, (module, python, one) in entries.items():
            workers[name] = _start(name, module, python, one)
            checked = module == PEER and name in contestants
            if checked and not _agrees(name, workers[name].facts, one['limits']):
                workers.pop(name).close()
                continue
            workers[name].ask(1)
            # Enough that batches ready at the start of a turn do not matter.
            ready = drained(one['threads'])
            least = {'input': 10 * ready, 'both': ready}.get(one['task'], 1)
            count = max(least, math.ceil(args.seconds / _pace(workers[name], one['dispatch'])))
            counts[name] = one['dispatch'] * math.ceil(count / one['dispatch'])
        names = list(workers)
        for round_ in range(args.repeats):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                if entries[name][2]['task'] in ('input', 'both'):
                    workers[name].ask('drain')
                answers[name].append(workers[name].ask(counts[name]))
        facts = {name: worker.facts for name, worker in workers.items()}
        for name in facts:
            facts[name] |= workers[name].ask('peak') if name in contestants else {}
        if DETERMINISTIC in facts and spec['task'] == 'train':
            for name in (names[0], DETERMINISTIC):
                facts[name] |= workers[name].ask('repeats')
        layers = []
        if args.layers and spec['task'] == 'train':
            layers = workers[names[0]].ask('layers')['rows']
    except WorkerError as error:
        raise UserError(f'{spec["task"]}: {error}') from error
    finally:
        for worker in workers.values():
            worker.close()
    return report.rows(facts, answers, counts, contestants, args.batch), layers


if __name__ == '__main__':
    run(main)
