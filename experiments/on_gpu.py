"""A few minutes on a GPU: an ordered list of measurements, each with its share of the time.

    python -m experiments.on_gpu --seconds=400 --out=runs/gpu --store=RAW,JPEG --cifar=STORE --reference=RUN
    python -m experiments.on_gpu --seconds=600 --out=runs/rehearsal --rehearse   # tiny, on any machine

Every step is a command, stopped when its time is up; steps that no longer fit are skipped. Repeat the
command to continue: finished steps are not repeated, and training resumes. Each step has its log and its
results in --out; `steps.json` says what ran, how it ended and how long it took.

--store: folders written by `prepare`, of raw and JPEG images; --cifar: one of CIFAR-10. Steps that need
one are skipped without it. --reference: a run on CPUs of the command printed for `steps` (JAX_PLATFORMS=cpu
and another --workdir), whose losses are shown for comparison. PyTorch, if it is installed, is the peer.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common.errors import DONE, STOPPED, UserError, one_line
from alexnet_jax.input.store import open_store
from alexnet_jax.rundir import metrics

BENCHMARK = ('-m', 'experiments.benchmark', '--repeats=4', '--seconds=1', '--patience=2')
LEAST = 20  # seconds; with less, a step is not started
TINY = {  # of networks, in a rehearsal
    'benchmark': ['--config=configs/quickstart.py', '--batch=8', '--seconds=0.1'],
    'train': [
        '--config.model.width=0.0625',
        '--config.run.stop_after=4',
        '--config.run.log_every=1',
    ],
    'schedule': ['--config.run.stop_after=4', '--config.run.log_every=1'],
}


class Step(NamedTuple):
    """A command (the arguments after `python`), and the seconds that it may take.

    again: whether a repeated command resumes; if not, an interrupted one's output is removed.
    """

    name: str
    seconds: int
    command: list[str]
    again: bool = False


def steps(args) -> list[Step]:
    """Returns the steps in order, without those that lack a store; UserError for an invalid store.

    Those before CIFAR-10 take at most 650 seconds, and the first five 400, so that they fit into 15
    minutes, the machine's start included, in two commands.
    """
    torch = importlib.util.find_spec('torch') is not None
    peer = ['--peer=torch', '--peer_form=compile,channels_last'] if torch else []
    stores = [store for store in args.store.split(',') if store]
    opened = [open_store(store) for store in stores]
    if args.cifar and (open_store(args.cifar).classes, open_store(args.cifar).size) != (10, 32):
        raise UserError(f'--cifar={args.cifar}: must be a store of CIFAR-10')

    def benchmark(name, seconds, *more):
        tiny = TINY['benchmark'] if args.rehearse else []
        command = [*BENCHMARK, *more, *tiny, f'--out={args.out / name}']
        return Step(name, seconds, command)

    def train(name, seconds, config, store, *more, tiny='train'):
        small = TINY[tiny] if args.rehearse else []
        command = ['-m', 'alexnet_jax.main', f'--config={config}', f'--workdir={args.out / name}']
        command += [f'--config.data.store={store}', '--config.data.source=', *more, *small]
        return Step(name, seconds, command, again=True)

    bf16 = '--dtype=bfloat16'
    found = [
        benchmark('paper-512', 100, bf16, '--batch=512', *peer),
        benchmark('paper-2048', 100, bf16, '--batch=2048', *peer),
        benchmark('paper-128', 70, bf16, '--batch=128', *peer),
        benchmark('tf32-512', 70, '--batch=512', *peer),
    ]
    if stores:
        tasks = ['--tasks=input,both', f'--store={",".join(stores)}']
        found.append(benchmark('input-512', 60, bf16, '--batch=512', *tasks))
    found.append(
        benchmark('deterministic-512', 60, bf16, '--batch=512', '--tasks=train', '--deterministic')
    )
    if stores:
        store = opened[0]
        shape = {'data.size': store.size, 'data.format': store.format}
        shape |= {'augment.crop': store.size * 7 // 8, 'run.stop_after': 200, 'run.log_every': 20}
        more = [f'--config.{field}={value}' for field, value in shape.items()]
        found.append(train('steps', 60, 'configs/paper.py', stores[0], *more))
    found.append(
        benchmark('mobilenet-256', 80, bf16, '--config=configs/mobilenet.py', '--batch=256', *peer)
    )
    if args.cifar:
        results = [
            '--seeds=1',
            f'--results={args.out / "fig1"}',
            '--',
            f'--config.data.store={args.cifar}',
        ]
        scale = 'smoke' if args.rehearse else 'full'
        fig1 = ['-m', 'experiments.fig1_relu_tanh', f'--scale={scale}', *results]
        found.append(Step('fig1', 200, fig1, again=True))
        for name in ('18pct', '11pct'):
            config = f'configs/cifar10.py:{name}'
            found.append(train(name, 300, config, args.cifar, tiny='schedule'))
    return found


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.on_gpu', description=__doc__, formatter_class=Help
    )
    parser.add_argument('--seconds', type=float, default=400.0, help='in all')
    parser.add_argument(
        '--out', type=pathlib.Path, default='runs/gpu', help='folder for the results'
    )
    parser.add_argument(
        '--store', default='', help='stores of images for end-to-end speed and training'
    )
    parser.add_argument('--cifar', default='', help='a store of CIFAR-10')
    parser.add_argument(
        '--reference',
        default='',
        metavar='RUN',
        help='a finished run of the training steps on CPUs',
    )
    parser.add_argument('--rehearse', action='store_true', help='tiny networks and few steps')
    args = parser.parse_args()
    if not args.seconds > 0:
        raise UserError(f'--seconds={args.seconds}: must be above 0')
    end = time.monotonic() + args.seconds
    if args.reference and not metrics.read(args.reference):
        raise UserError(f'--reference={args.reference}: not a run with metrics')
    planned = steps(args)
    file = args.out / 'steps.json'
    record = _read(file)
    for step in planned:
        there = record.get(step.name, {})
        if there.get('ended') in ('finished', 'stopped') and there['command'] != step.command:
            raise UserError(
                f'{file}: {step.name} ran with different arguments; give another folder as --out, or the '
                'same arguments'
            )
    args.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup
            signal.signal(number, _exit)
    for step in planned:
        there = record.get(step.name, {})
        if there.get('ended') == 'finished':
            continue
        left = end - time.monotonic()
        if left < LEAST:
            print(f'{step.name}: skipped, {max(left, 0):.0f} s left', flush=True)
            continue
        seconds = min(step.seconds, left)
        print(f'{step.name}, {seconds:.0f} s: python {shlex.join(step.command)}', flush=True)
        ended, took = _do(step, seconds, args.out)
        record[step.name] = {
            'ended': ended,
            'seconds': round(there.get('seconds', 0) + took, 1),
            'command': step.command,
        }
        file.write_text(json.dumps(record, indent=1) + '\n')
        log = (args.out / f'{step.name}.log').read_text(errors='replace').strip()
        print(
            f'{step.name}: {ended} after {took:.0f} s',
            *log.splitlines()[-3:],
            sep='\n  ',
            flush=True,
        )
    if args.reference and (line := compared(args.out / 'steps', args.reference)):
        print(line)
    missing = [s.name for s in planned if record.get(s.name, {}).get('ended') != 'finished']
    print(f'not finished: {", ".join(missing)}; repeat the command' if missing else 'all finished')


def _read(file: pathlib.Path) -> dict[str, dict]:
    """What is known about the steps so far; UserError if the file is damaged."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return {name: {**one, 'command': [*one['command']]} for name, one in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{file}: cannot be read ({one_line(error)}); remove it to start over, or give another --out'
        ) from error


def _exit(number, frame) -> None:
    sys.exit(128 + number)


def _do(step: Step, seconds: float, out: pathlib.Path) -> tuple[str, float]:
    """Runs a step -> how it ended, and the seconds that it took."""
    if not step.again:
        shutil.rmtree(out / step.name, ignore_errors=True)
    began = time.monotonic()
    with open(out / f'{step.name}.log', 'ab') as log:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own workers stop with it
        )
        try:
            code = process.wait(seconds)
            asked = any('stop_after' in argument for argument in step.command)
            good = code == DONE or code == STOPPED and asked
            ended = 'finished' if good else f'failed ({code})'
        except subprocess.TimeoutExpired:
            ended = 'stopped'
        finally:  # also when this process is interrupted
            _stop(process)
    return ended, time.monotonic() - began


def _stop(process: subprocess.Popen) -> None:
    """Ends a process and its workers, if any are left; training has 10 seconds to save a checkpoint."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compared(run: str | os.PathLike, other: str | os.PathLike) -> str:
    """Describes how the training losses of two runs differ; '' if either has none."""
    rows = [
        {r['step']: r['loss'] for r in metrics.read(one) if r['kind'] == 'train'}
        for one in (run, other)
    ]
    shared = sorted({*rows[0]} & {*rows[1]})
    if not shared:
        return ''
    pairs = ', '.join(f'{step}: {rows[0][step]:.4f} {rows[1][step]:.4f}' for step in shared[-5:])
    most = max(abs(rows[0][step] - rows[1][step]) for step in shared)
    return f'training loss here and on CPUs, by step: {pairs}; largest difference {most:.2g}'


if __name__ == '__main__':
    run(main)
