"""Workers: processes that each keep one task ready and repeat it on request.

Uses only the standard library, since a worker may run in another Python. Each line of standard input is a
JSON number, how often to repeat, or a JSON string, the name of another command. Each line of output is a JSON
object. Anything else that a worker prints goes to its standard error.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import select
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def drained(threads: int) -> int:
    """Returns a number of batches that exceeds those ready when a turn begins (`threads` + 2)."""
    return threads + 4


def distance(x, y) -> float:
    """Returns the relative distance of two arrays, |x - y| / |y|."""
    return float(((x - y) ** 2).sum() ** 0.5 / (y**2).sum() ** 0.5)


class WorkerError(Exception):
    """A worker exited instead of answering, or timed out: one line, with its name and last output."""


class Worker:
    """A handle to one worker; `facts` is what it reports once it is ready.

    patience: timeout in minutes, for becoming ready and for every answer. The constructor and `ask` raise
    WorkerError.
    """

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        spec: dict,
        environment: dict[str, str],
        patience: float,
    ):
        self._name, self._patience = name, patience
        self._errors = tempfile.TemporaryFile('w+')
        self._process = subprocess.Popen(
            [python, '-m', module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                **environment,
                'JAX_ENABLE_COMPILATION_CACHE': 'false',  # compilation is timed too
                'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # several processes share a GPU
            },
        )
        try:
            self.facts = self._answer()
        except WorkerError:
            self.close()
            raise

    def ask(self, command: int | str) -> dict:
        try:
            self._process.stdin.write(json.dumps(command) + '\n')
            self._process.stdin.flush()
        except OSError:
            pass  # it has exited: `_answer` reports why
        return self._answer()

    def _answer(self) -> dict:
        if not select.select([self._process.stdout], [], [], 60 * self._patience)[0]:
            self._process.kill()
            raise WorkerError(
                f'{self._name}: no answer in {self._patience:g} minutes; allow more with --patience'
            )
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            text = self._errors.read()
            lines = (
                re.findall(r'^[\w.]*(?:Error|Exception): .*', text, re.MULTILINE)
                or text.splitlines()
            )
            said = lines[-1] if lines else f'exit code {self._process.returncode}'
            raise WorkerError(f'{self._name}: worker exited: {said}')
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def serve(prepare) -> None:
    """Runs a worker: calls prepare(spec) -> (repeat(count), facts, commands), then answers requests.

    repeat can return an object to add to its answer. commands: {name: function without arguments that
    returns an object}.
    """
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

    def answer(value):
        answers.write(json.dumps(value) + '\n')
        answers.flush()

    repeat, facts, commands = prepare(json.loads(sys.argv[1]))
    repeat(1)  # warm up
    answer(facts)
    for line in sys.stdin:
        command = json.loads(line)
        if isinstance(command, str):
            answer(commands[command]())
            continue
        began = time.perf_counter()
        more = repeat(command) or {}
        answer({'seconds': time.perf_counter() - began, **more})


def peak_memory() -> dict:
    """Returns the peak resident set size of this process, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return {'peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
