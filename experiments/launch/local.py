"""Starts one run as several processes on this machine, and starts all again when one is lost.

    python -m experiments.launch.local --processes=2 --cpu_devices=2 -- --config=configs/quickstart.py

What follows `--` goes to every process, as to `python -m alexnet_jax.main`. A line of output gets
the number of its process in front; the lines of process 0 are shown, with --all those of all.

SIGTERM and Ctrl-C are passed on, and the processes stop with a checkpoint; the second one kills them.
When a process is lost, the others have --grace seconds to end by themselves (they promise to within
60); then all start again, from the last checkpoint, --restarts times at the most. The launcher gives
up earlier when two starts in a row were lost before a new checkpoint: a third would be, too. Only
SIGKILL to the launcher itself leaves the processes running.

Exit codes: 0 done; 1 given up; 2 the user's to mend; 75 stopped with a checkpoint, start the same
command again; 76 a process was lost while stopping, do the same; 130 killed by a second signal.
"""

import argparse
import collections
import contextlib
import dataclasses
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from alexnet_jax.command import ArgumentParser, run
from alexnet_jax.common import configfile, paths
from alexnet_jax.common.errors import BUG, DONE, INTERRUPTED, LOST, MISTAKE, STOPPED, UserError

PATIENCE = 2  # starts in a row that may be lost before a new checkpoint
AFTER_MISTAKE = 10.0  # seconds for the others after a process has ended with 2; most do as well
TAIL = 10  # last lines of a process that is not shown, printed if it is the first to fail

Event = signal.Signals | tuple[int, int]  # a signal to us, or (process, exit code)


def supervise(
    commands: Callable[[], Sequence[Sequence[str]]],
    *,
    latest: Callable[[], int],
    restarts: int = 3,
    grace: float = 90.0,
    show_all: bool = False,
) -> int:
    """Runs one process per command, all again when one is lost -> the launcher's exit code.

    commands() is asked at every start, since the port is a new one; latest() is the step of the
    latest checkpoint; grace in seconds. Only in the main thread: it handles the signals meanwhile.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with _signals_to(events):
        stuck = 0
        for start in range(restarts + 1):
            before = latest()
            codes, asked = _run_once(commands(), events, grace, show_all)
            code = exit_code(codes, asked)
            if code is not None:
                return code
            stuck = 0 if latest() > before else stuck + 1
            if stuck == PATIENCE:
                _say(f'lost {stuck} times in a row without a new checkpoint: not started again')
                return BUG
            if start < restarts:
                _say(f'starting all again ({start + 1} of {restarts})')
        _say(f'not started again: that was the last of --restarts={restarts}')
        return BUG


def exit_code(codes: list[int], asked: int) -> int | None:
    """The exit code that follows from those of the processes as they ended; None: start again."""
    if asked > 1:
        return INTERRUPTED
    # A process that has just begun does not handle SIGTERM yet, and has nothing to lose.
    good = (DONE, STOPPED, -signal.SIGTERM) if asked else (DONE, STOPPED)
    failed = [code for code in codes if code not in good]
    if not failed:
        return STOPPED if any(codes) else DONE
    if failed[0] == MISTAKE:  # the first one is the cause: who waits in vain for a lost one says 2
        return MISTAKE
    if asked:
        return BUG if BUG in failed else LOST
    return None


def _run_once(
    commands: Sequence[Sequence[str]], events: queue.SimpleQueue, grace: float, show_all: bool
) -> tuple[list[int], int]:
    """One start, to its end -> (exit codes, in the order of ending; number of signals to us)."""
    children: list[_Child] = []
    codes: dict[int, int] = {}
    asked, failed, deadline = 0, False, None

    def signal_rest(number: signal.Signals) -> None:
        for child in children:
            if child.number not in codes:
                child.signal(number)

    try:
        for number, command in enumerate(commands):
            children.append(_Child.start(number, command, events, show_all or number == 0))
        while len(codes) < len(children):
            try:
                event = events.get(timeout=deadline and max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                _say('killing the processes that have not ended')
                signal_rest(signal.SIGKILL)
                deadline = None
                continue
            if isinstance(event, signal.Signals):
                asked += 1
                what = 'the processes are asked to stop' if asked == 1 else 'killing'
                _say(f'{event.name}: {what}')
                # SIGTERM also for Ctrl-C: what a process does then is the same.
                signal_rest(signal.SIGTERM if asked == 1 else signal.SIGKILL)
                continue
            number, code = event
            codes[number] = code
            if code in (DONE, STOPPED) or asked > 1:
                continue
            if not failed:
                children[number].show_tail()  # the first one is the cause
            failed = True
            wait = min(grace, AFTER_MISTAKE) if code == MISTAKE else grace
            deadline = min(deadline or math.inf, time.monotonic() + wait)
            rest = f'; the others have {wait:g} s to end' if len(codes) < len(children) else ''
            _say(f'process {number} ended with {_name(code)}{rest}')
    finally:
        signal_rest(signal.SIGKILL)
    return list(codes.values()), asked


@dataclasses.dataclass(frozen=True)
class _Child:
    number: int
    process: subprocess.Popen
    shown: bool
    tail: collections.deque[str]

    @classmethod
    def start(cls, number: int, command: Sequence[str], events: queue.SimpleQueue, shown: bool):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},  # or its lines come late, in blocks
            start_new_session=True,  # or a terminal's Ctrl-C would reach it too, beside ours
        )
        child = cls(number, process, shown, collections.deque(maxlen=TAIL))
        reader = threading.Thread(target=child._read, daemon=True)
        reader.start()
        threading.Thread(target=child._wait, args=(reader, events), daemon=True).start()
        return child

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)  # with the processes that it has started
            else:
                self.process.send_signal(number)

    def show_tail(self) -> None:
        for line in self.tail:
            _write(f'[{self.number}] {line}')

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in map(str.rstrip, lines):
                if self.shown:
                    _write(f'[{self.number}] {line}')
                else:
                    self.tail.append(line)

    def _wait(self, reader: threading.Thread, events: queue.SimpleQueue) -> None:
        code = self.process.wait()
        reader.join(timeout=5)  # for ever, if a process that it has started still holds the pipe
        events.put((self.number, code))


@contextlib.contextmanager
def _signals_to(events: queue.SimpleQueue):
    """Puts SIGTERM, SIGINT and SIGHUP into a queue, meanwhile; what is ignored (nohup) stays so."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, frame: events.put(signal.Signals(number)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name(code: int) -> str:
    return str(code) if code >= 0 else signal.Signals(-code).name


def _say(text: str) -> None:
    _write(f'launch: {text}')


def _write(line: str) -> None:
    sys.stdout.write(f'{line}\n')  # in one piece: the lines of several threads are not mixed
    sys.stdout.flush()


def free_port() -> int:
    """A TCP port that nobody on this machine listens at."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def latest_step(workdir: str | os.PathLike) -> int:
    """The step of the latest checkpoint in a run directory, -1 if there is none.

    By name alone, so that it is quick and needs no JAX; a damaged one counts. Where nothing can be
    read it is -1 too: the processes will say what is wrong there.
    """
    path = paths.path(workdir)
    try:
        names = [entry.name for entry in (path / 'checkpoints').iterdir()]
    except paths.failures(path):
        return -1
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def run_directory(arguments: Sequence[str]) -> str:
    """The run directory that `alexnet_jax.main` takes with these arguments."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--workdir', '-workdir')
    parser.add_argument('--config', '-config', default='')
    given, _ = parser.parse_known_args(arguments)
    return given.workdir or configfile.run_directory(given.config)


def main() -> None:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='python -m experiments.launch.local --processes=N [options] -- ARGUMENTS',
    )
    parser.add_argument('--processes', type=int, required=True, help='how many')
    parser.add_argument('--cpu_devices', type=int, default=0, help='virtual ones of each process')
    parser.add_argument('--restarts', type=int, default=3, help='at the most; default: 3')
    parser.add_argument('--grace', type=float, default=90.0, help='seconds; default: 90')
    parser.add_argument('--all', action='store_true', help='show the lines of all processes')
    parser.add_argument('--module', default='alexnet_jax.main', help='or alexnet_jax.evaluate')
    split = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if split == len(sys.argv):
        raise UserError('`--` is missing; what follows it goes to every process; see --help')
    if options.processes < 1:
        raise UserError(f'--processes={options.processes}: must be at least 1')
    if options.restarts < 0:
        raise UserError(f'--restarts={options.restarts}: must be at least 0')

    def commands() -> list[list[str]]:
        devices = [f'--cpu_devices={options.cpu_devices}'] if options.cpu_devices else []
        common = [f'--coordinator=localhost:{free_port()}', f'--num_processes={options.processes}']
        return [
            [
                sys.executable,
                '-m',
                options.module,
                *arguments,
                *devices,
                *common,
                f'--process_id={i}',
            ]
            for i in range(options.processes)
        ]

    workdir = run_directory(arguments)
    code = supervise(
        commands,
        latest=lambda: latest_step(workdir),
        restarts=options.restarts,
        grace=options.grace,
        show_all=options.all,
    )
    sys.exit(code)


if __name__ == '__main__':
    run(main)
