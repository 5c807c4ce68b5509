"""A small run of the program as users run it: `from tests.helpers.commands import command, outcome`."""

import json
import os
import sys

import numpy as np
import orbax.checkpoint as ocp

from alexnet_jax.rundir import metrics
from alexnet_jax.training import progress
from tests.helpers import ROOT
from tests.helpers.processes import compilation_cache
from tests.helpers.stores import write_store

EXAMPLES, BATCH = 40, 8  # five steps per epoch, twenty steps in total

# Like `python -m MODULE`, without TensorFlow, whose import takes seconds and raw stores do not need.
WITHOUT_TENSORFLOW = """
import runpy, sys
sys.modules['tensorflow'] = None
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""

# The program as users run it, except that it kills itself at one event.
DRIVER = """
import os, pathlib, signal, sys, tempfile, time
from alexnet_jax import main
from alexnet_jax.common import paths
from alexnet_jax.command import run
from alexnet_jax.input import batches
from alexnet_jax.rundir import checkpoint, metrics
from alexnet_jax.training import evaluation, loop

event, number = sys.argv[1], int(sys.argv[2])
if event not in ('TensorFlow', 'SIGTERM'):
    sys.modules['tensorflow'] = None  # importing it takes seconds; the other reader gives the same bytes
sys.argv = ['alexnet_jax.main', *sys.argv[3:]]
count = 0

def kill_at(where, signal_=signal.SIGKILL):
    global count
    if where == event:
        count += 1
        if count == number:
            os.kill(os.getpid(), signal_)

read = batches.train_batches
def train_batches(*args, **kwargs):
    kill_at('SIGTERM before the first step', signal.SIGTERM)
    for batch in read(*args, **kwargs):
        kill_at('step')  # while the device computes the previous step
        kill_at('SIGTERM', signal.SIGTERM)
        kill_at('SIGINT', signal.SIGINT)
        if event == 'slow' or event.startswith('SIG') and count >= number:
            time.sleep(0.3)  # several processes need a second to agree
        yield batch
batches.train_batches = train_batches

saves, unfinished = 0, None
rename = os.rename
def rename_but_one(source, target, *args, **kwargs):
    if os.path.basename(target) == unfinished:
        time.sleep(600)  # orbax's last action, which must not precede the kill
    rename(source, target, *args, **kwargs)
os.rename = rename_but_one

save = checkpoint.Checkpoints.save
def save_and_kill(self, step, *args):
    global saves, unfinished
    saves += 1
    if (event, number) == ('save', saves):
        unfinished = str(step)
    save(self, step, *args)  # returns while orbax still writes
    if unfinished:
        while not list(self.directory.glob(unfinished + '.*')):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = save_and_kill

start = loop.Setup.start
def start_and_terminate(*args):
    kill_at('SIGTERM while starting', signal.SIGTERM)
    return start(*args)
loop.Setup.start = start_and_terminate

if event == 'blind':
    paths.existing = lambda path: pathlib.Path(tempfile.mkdtemp())

real = evaluation.evaluate
def evaluate_and_kill(*args, **kwargs):
    kill_at('before evaluation')
    return real(*args, **kwargs)
evaluation.evaluate = evaluate_and_kill

write = metrics.Writer.write
def write_and_kill(self, kind, step, values):
    write(self, kind, step, values)
    kill_at('after evaluation' if kind == 'eval' else 'after row')
metrics.Writer.write = write_and_kill

run(main.main)
"""


def command(workdir, store, *more, event='never', number=1) -> list[str]:
    """Twenty steps of the quickstart's recipe, five per epoch, with an evaluation each epoch."""
    return [
        sys.executable,
        '-c',
        DRIVER,
        event,
        str(number),
        f'--config={ROOT}/configs/quickstart.py',
        f'--workdir={workdir}',
        '--config.data.source=made_up',
        f'--config.data.store={store}',
        '--config.data.size=72',
        '--config.augment.crop=64',
        '--config.augment.chunk=4',
        '--config.optim.epochs=4.0',
        '--config.optim.drops=(2.0,3.0)',
        f'--config.train.batch={BATCH}',
        '--config.run.eval_every=1.0',
        f'--config.run.eval_batch={BATCH}',
        '--config.run.checkpoint_every=3',
        '--config.run.log_every=2',
        *more,
    ]


def environment(store) -> dict[str, str]:
    return (
        os.environ
        | compilation_cache(store.parent / 'cache')
        | {
            # Threads split sums, and a process with two devices would have fewer of them.
            'PJRT_NPROC': '4',
        }
    )


def make_store(path):
    """Writes forty noise images for training and twelve for evaluation."""
    rng = np.random.default_rng(0)
    pictures = {
        split: rng.integers(0, 256, (n, 72, 72, 3), dtype=np.uint8)
        for split, n in (('train', EXAMPLES), ('val', 12))
    }
    write_store(path, format='u8', size=72, classes=3, pictures=pictures)
    return path


def outcome(workdir):
    """The last checkpoint's step, arrays and meta (history and running sums); the rows without times."""
    there = [p for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()]  # not half-written
    folder = max(there, key=lambda p: int(p.name))
    record = json.loads((folder / 'meta' / 'metadata').read_text())
    whole = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in record['leaves']}
    arrays = ocp.PyTreeCheckpointer().restore(folder / 'state', restore_args=whole)
    rows = metrics.read(workdir)
    for row in rows:
        for name in progress.TIMES:
            row.pop(name, None)
    bits = {name: np.asarray(x).tobytes() for name, x in arrays.items()}
    return int(folder.name), bits, record['meta'], rows


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert [name for name in expected[1] if found[1][name] != expected[1][name]] == []
    assert found[2:] == expected[2:]
