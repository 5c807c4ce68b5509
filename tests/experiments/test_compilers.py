"""Programs compiled for TPUs and GPUs that are not present; skipped without XLA's compilers for them."""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from experiments.scaling import compilers, programs
from experiments.scaling.formula import Move
from tests.helpers import ROOT

# A process of its own: JAX's devices and XLA's flags cannot change once they are in use.
SCRIPT = """
import json, sys
from alexnet_jax.common import configfile
from experiments.scaling import compilers, formula, programs, report

topology, shape, what = json.loads(sys.argv[1])
compilers.configure()
mesh = compilers.make_mesh(topology, shape)
config = configfile.load('configs/paper.py')
config.augment.crop, config.data.size = 64, 72
config.model.width, config.model.dtype = 0.125, 'bfloat16'
if what == 'train':
    lowered = programs.train_step(config, 10, mesh, 4)
elif what == 'score':
    lowered = programs.score_step(10, mesh, 4)
else:
    lowered = programs.predict_step(config, 10, mesh, 4, what)
compiled = lowered.compile()
wanted = formula.train_step(programs.make_net(config, 10), 64, 4, tuple(shape))
print(json.dumps({
    'written': lowered.as_text(),
    'compiled': compiled.as_text(),
    'moved': programs.found(compiled.as_text(), tuple(shape)),
    'wanted': wanted,
    'peak': report.peak_memory(compiled.memory_analysis())[1],
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


PADDED = re.compile(r'stablehlo.pad .*interior = \[0, 1, 1, 0\]')
TRAINING = [
    ('h100:2', (1, 2), 2_167_000),
    ('h100:2', (2, 1), 3_966_000),
    ('h100:4', (2, 2), 2_169_000),
    ('v5e:2x2', (4, 1), 4_284_000),
    ('v5e:2x2', (2, 2), 2_295_000),
]


@pytest.mark.parametrize(('topology', 'shape', 'size'), TRAINING)
def test_training(topology, shape, size):
    """The collectives are the formula's, nothing is scattered, and the memory is unchanged."""
    found = program(topology, shape)
    wanted = [Move(*move) for move in found['wanted']]
    # The TPU compiler keeps only the largest reduce-scatter (docs/scaling.md).
    if topology.startswith('v5e'):
        sizes = [move.elements for move in wanted if move.kind == 'reduce-scatter']
        wanted = [
            move._replace(kind='all-reduce')
            if move.kind == 'reduce-scatter' and move.elements < max(sizes)
            else move
            for move in wanted
        ]
    assert programs.same([Move(*move) for move in found['moved']], wanted)
    assert found['peak'] == pytest.approx(size, rel=0.05)
    assert not re.search(r' (select-and-)?scatter\(', found['compiled'])
    # Each platform has its form of the norm and of the pooling gradient.
    assert ('optimization_barrier' in found['written']) == topology.startswith('h100')
    bands = re.findall(
        r'stablehlo.convolution.*tensor<1x1x(\d+)x\1xbf16>\) -> tensor<\S+xf32>', found['written']
    )
    assert bool(bands) == topology.startswith('v5e')
    towers = 2 // shape[1]  # of a device, with three pools each
    arrays = 4 if topology.startswith('v5e') else 9
    assert len(PADDED.findall(found['written'])) == 3 * arrays * towers


def test_pooling_has_its_form_of_cpus_there():
    """On CPUs nothing is padded, so the padded arrays above come from pooling."""
    config = configfile.load('configs/paper.py')
    config.augment.crop, config.model.width = 64, 0.125
    lowered = programs.train_step(config, 10, programs.make_mesh((1, 1)), 4)
    assert not PADDED.search(lowered.as_text())


@pytest.mark.parametrize(
    ('topology', 'shape', 'what'),
    [
        ('h100:2', (2, 1), 'center'),
        ('h100:2', (2, 1), 'ten'),
        ('h100:2', (2, 1), 'score'),
        ('v5e:2x2', (4, 1), 'center'),
    ],
)
def test_evaluation(topology, shape, what):
    """Prediction moves nothing between devices; only the sums after it do."""
    found = program(topology, shape, what)
    assert {move[0] for move in found['moved']} == ({'all-reduce'} if what == 'score' else set())


@pytest.mark.parametrize(
    ('topology', 'words'),
    [
        ('v5e', 'not CHIP:SHAPE'),
        ('h100:0', 'not CHIP:SHAPE'),
        ('gtx580:2', 'the chips are v5e, v5p'),
        ('h100:2', 'fewer than --mesh=4,1'),
        ('h100:9999999', 'at most 10,000'),
    ],
)
def test_invalid_topologies(topology, words):
    with pytest.raises(UserError, match=words):
        compilers.make_mesh(topology, (4, 1))


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs libtpu; install requirements-compilers.txt'):
        compilers.make_mesh('v5e:2x2', (2, 2))


def test_a_program_that_cannot_be_compiled():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED:\nRan out of memory')

    with pytest.raises(UserError, match='--topology=v5e:2x2: .*EXHAUSTED: Ran out of memory'):
        compilers.compile(Lowered(), 'v5e:2x2')
