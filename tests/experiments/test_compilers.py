"""Programs for absent TPUs and GPUs, by XLA's compilers; skipped where those are not installed."""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from alexnet_jax.common.errors import UserError
from experiments.scaling import compilers
from tests.helpers import ROOT

# A process of its own: JAX's devices and XLA's flags cannot change once they are in use.
SCRIPT = """
import json, sys
from alexnet_jax.common import configfile
from experiments.scaling import compilers, formula, programs

topology, shape, what = json.loads(sys.argv[1])
compilers.configure()
mesh = compilers.make_mesh(topology, shape)
config = configfile.load('configs/paper.py')
config.augment.crop, config.data.size = 64, 72
config.model.width, config.model.dtype = 0.125, 'bfloat16'
if what == 'train':
    lowered = programs.train_step(config, 10, mesh, 4)
else:
    lowered = programs.predict_step(config, 10, mesh, 4, what)
compiled = lowered.compile()
memory = compiled.memory_analysis()
moved = programs.found(compiled.as_text(), tuple(shape))
wanted = formula.train_step(programs.make_net(config, 10), 64, 4, tuple(shape))
print(json.dumps({
    'written': lowered.as_text(),
    'compiled': compiled.as_text(),
    'same': programs.same(moved, wanted, dtypes=False),
    'bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes,
}))
"""


@functools.cache
def program(topology, shape, what='train'):
    _, chip, _ = compilers.parse(topology)
    if not importlib.util.find_spec(compilers.MODULES[chip.platform]):
        pytest.skip('needs requirements-compilers.txt: make test-compilers')
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, json.dumps([topology, shape, what])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


TRAINING = [
    ('h100:2', (1, 2), 2_167_000),
    ('h100:2', (2, 1), 3_965_000),
    ('v5e:2x2', (4, 1), 4_284_000),
]


@pytest.mark.parametrize(('topology', 'shape', 'size'), TRAINING)
def test_training(topology, shape, size):
    """The collectives are the formula's, nothing is scattered, and the memory is unchanged."""
    found = program(topology, shape)
    assert found['same'] and found['bytes'] == pytest.approx(size, rel=0.05)
    assert not re.search(r' (select-and-)?scatter\(', found['compiled'])
    # Each platform has its form of the norm and of the pooling gradient.
    assert ('optimization_barrier' in found['written']) == topology.startswith('h100')
    bands = re.findall(
        r'stablehlo.convolution.*tensor<1x1x(\d+)x\1xbf16>\) -> tensor<\S+xf32>', found['written']
    )
    assert bool(bands) == topology.startswith('v5e')


@pytest.mark.parametrize('what', ['centre', 'ten'])
def test_prediction(what):
    found = program('h100:2', (2, 1), what)
    assert not re.search(r' all-(reduce|gather)', found['compiled'])


@pytest.mark.parametrize(
    ('topology', 'words'),
    [('v5e', 'not CHIP:SHAPE'), ('gtx580:2', 'the chips are v5e, v5p'), ('h100:2', 'fewer than')],
)
def test_topologies_that_cannot_be(topology, words):
    with pytest.raises(UserError, match=words):
        compilers.make_mesh(topology, (4, 1))


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs libtpu; install requirements-compilers.txt'):
        compilers.make_mesh('v5e:2x2', (2, 2))
