"""Tests the benchmark: its counts, that all forms compute the same function, and the command."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.input import batches
from alexnet_jax.input.store import open_store
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from configs import cifar10, original, paper
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import operations, ours, plain, report
from experiments.benchmark.protocol import ROOT, Worker, WorkerError
from tests.helpers.run_dirs import without_tensorflow
from tests.helpers.stores import write_store


def make_net(preset, **changes):
    config = preset.get_config()
    config.model.update(changes)
    return build(classes=1000, **config.model)


def test_arithmetic_of_the_paper_s_network():
    """`docs/performance.md`: 1.449 GFLOP per image forward, 4.136 in training."""
    totals = operations.totals(make_net(paper), batch=2, crop=224)
    assert totals['infer'] / 2e9 == pytest.approx(1.449, abs=5e-4)
    assert totals['train'] / 2e9 == pytest.approx(4.136, abs=5e-4)


def test_the_first_layer_that_is_there_needs_no_gradient_of_the_images():
    net = make_net(paper, width=0.125, remove='conv1')
    ops = operations.operations(net, batch=2, crop=224)
    assert [op.name for op in ops][:3] == ['images max_pool', 'images max_pool', 'conv2 conv']
    totals = operations.totals(net, batch=2, crop=224)
    conv2 = sum(operations.flops(op) for op in ops if op.name == 'conv2 conv')
    assert conv2 == 2 * 2 * 2 * (27 * 27 * 16) * (5 * 5 * 3)  # images, towers, products and sums
    assert totals['train'] == 3 * totals['infer'] - conv2
    rows = {row['name']: row for row in operations.table(net, batch=1, crop=96, repeats=1)}
    assert rows['conv2 conv']['products'] == 2 and rows['conv3 conv']['products'] == 3
    assert rows['images max_pool']['backward_s'] == 0


def test_operations_are_named_and_complete():
    names = [op.name for op in operations.operations(make_net(original), batch=2, crop=224)]
    assert names.count('conv1 conv') == names.count('conv3 conv') == 1  # the towers read the same
    assert names.count('conv2 conv') == 2  # one per tower
    assert names.count('fc6 dense') == names.count('fc8 dense') == 1  # both towers at once
    assert names.count('conv2 lrn') == names.count('conv2 map_norm') == 2
    assert [names.count(f'conv{i} max_pool') for i in (1, 2, 3, 4, 5)] == [2, 2, 0, 0, 2]
    assert names.count('fc6 dropout_mask') == 2


def test_arithmetic_of_locally_connected_layers():
    """9 pixels of 64 and 32 channels, 32 kernels, at 36 positions."""
    net = build(classes=10, **cifar10.get_config('13pct').model)
    found = {op.name: operations.flops(op) for op in operations.operations(net, batch=2, crop=24)}
    assert found['local3 local'] == 2 * 2 * 36 * 9 * 64 * 32
    assert found['local4 local'] == 2 * 2 * 36 * 9 * 32 * 32
    net = build(classes=10, **cifar10.get_config('18pct').model)
    names = [op.name for op in operations.operations(net, batch=2, crop=32)]
    assert {'conv2 avg_pool', 'conv3 avg_pool'} < {*names}


def test_operations_are_timed_without_waiting_for_each():
    """Times a device that takes no time, but 10 ms to synchronize."""

    class Answer:
        def block_until_ready(self):
            time.sleep(0.01)

    assert operations._time(Answer, ()) < 0.005


def test_table_times_every_operation():
    rows = operations.table(make_net(paper, width=0.125), batch=1, crop=96, repeats=1)
    assert [row['name'] for row in rows][:3] == ['conv1 conv', 'conv1 lrn', 'conv1 max_pool']
    assert all(row['forward_s'] > 0 for row in rows)


@pytest.mark.full
def test_plain_form_is_the_same_function():
    """Logits and gradients agree in float64 for `original`, which has every operation."""
    crop = 96
    net = make_net(original, width=0.125)
    params = network.init(net, jax.random.key(0), crop)['params']
    with jax.enable_x64(True):
        net = make_net(original, width=0.125, dtype='float64')
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        images = jnp.asarray(np.random.default_rng(0).normal(0, 60, (3, crop, crop, 3)))

        def loss(function):
            return lambda params: jnp.sum(jnp.sin(100 * function(params)))

        with jax.numpy_rank_promotion('allow'):  # the plain form broadcasts implicitly
            ours, theirs = (
                jax.jit(jax.value_and_grad(loss(function)))(params)
                for function in (
                    lambda p: net.apply({'params': p}, images)[0],
                    lambda p: plain.logits(net, p, images),
                )
            )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_reference_is_in_full_float32(tmp_path, monkeypatch):
    """A GPU is timed with TF32, its default; `own` is how far that is from the reference."""
    precisions = []

    def grad(loss, has_aux):
        def gradients(params, x, labels):
            precisions.append(jax.config.jax_default_matmul_precision)
            return params, jnp.ones((1, 10))

        return gradients

    net = make_net(paper, width=0.125)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), network.shapes(net, 64))
    monkeypatch.setattr(network, 'init', lambda *args: variables)
    monkeypatch.setattr(jax, 'grad', grad)
    config = configfile.load('configs/paper.py')
    config.augment.crop = 64
    spec = {'batch': 1, 'classes': 10, 'plain': False, 'file': str(tmp_path / 'file.npz')}
    for cpu, expected in ((True, ['highest']), (False, ['highest', None])):
        precisions.clear()
        ours._reference({**spec, 'cpu': cpu}, config, net)
        assert precisions == expected


def test_peers_must_agree(capsys):
    assert benchmark._limits('infer', 0.02, 0.0) == {'logits_difference': 0.02}
    assert benchmark._limits('train', 0.02, 0.0)['gradients_difference'] == 0.02
    assert benchmark._limits('train', 0.2, 0.15)['gradients_difference'] == 0.3
    # a zero gradient has 1
    assert benchmark._limits('train', 0.2, 0.6)['gradients_difference'] < 1
    limits = benchmark._limits('train', 0.02, 0.0)
    for distance, agrees in ((0.01, True), (0.03, False), (float('nan'), False)):
        facts = {'logits_difference': 0.0, 'gradients_difference': distance}
        assert benchmark._agrees('peer', facts, limits) == agrees
    assert capsys.readouterr().out.count('a different function') == 2


def test_bytes_of_library_calls():
    text = """
  %p.0 = bf16[2,3]{1,0} parameter(0)
  %f.1 = f32[4]{0} fusion(%p.0), kind=kLoop, calls=%c
  %conv-bias.2 = (bf16[5]{0}, u8[1000]{0}) custom-call(%p.0, f32[4]{0} %f.1), custom_call_target="cudnn"
  %gemm.3 = (f32[7]{0}, s8[4096]{0}) custom-call(%f.1), custom_call_target="cublas"
  ROOT %other.4 = u8[9]{0} custom-call(%f.1)
"""
    assert operations.library_bytes(text) == (10 + 12 + 16) + (28 + 16) + (9 + 16)


def test_repeats_compares_bits():
    noise = iter(range(100))
    step = jax.jit(lambda x: (x + jnp.nan, x), donate_argnums=0)
    state = jnp.ones(3)
    assert ours.repeats(step, state)
    assert not ours.repeats(lambda x: (x, next(noise)), state)
    assert state.sum() == 3  # not donated


def test_peers_compile_anew(tmp_path, monkeypatch):
    environments = []
    monkeypatch.setattr(benchmark, 'Worker', lambda *args: environments.append(args[4]))
    for module in (benchmark.PEER, benchmark.PEER, benchmark.OURS):
        spec = {'malloc': True, 'file': str(tmp_path / 'file'), 'patience': 1}
        benchmark._start('worker', module, 'python', spec)
    folders = [environment.get('TORCHINDUCTOR_CACHE_DIR') for environment in environments]
    assert folders[0] != folders[1] and folders[0].startswith(str(tmp_path)) and not folders[2]


@pytest.mark.parametrize('wanted', [True, False])
def test_workers_have_the_settings_of_malloc(monkeypatch, wanted):
    environments = []
    monkeypatch.setattr(benchmark, 'Worker', lambda *args: environments.append(args[4]))
    monkeypatch.setenv(
        'GLIBC_TUNABLES', 'glibc.malloc.check=3'
    )  # the shell's settings do not apply
    benchmark._start('worker', benchmark.OURS, 'python', {'malloc': wanted, 'patience': 1})
    assert environments == [{'GLIBC_TUNABLES': benchmark.MALLOC if wanted else ''}]


@pytest.mark.parametrize(
    'file',
    [
        *('docs/devices.md', 'docs/performance.md', 'Makefile', 'Dockerfile'),
        'experiments/launch/slurm.sbatch',
    ],
)
def test_the_settings_are_the_documented_ones(file):
    assert re.findall(r'glibc\.malloc[\w.=:]+', (ROOT / file).read_text()) == [benchmark.MALLOC]


def test_the_ceiling_is_that_of_the_faster_library():
    facts = {'alexnet_jax': {'flops': 8}, report.PRODUCTS: {'flops': 1}}
    facts[f'{report.PRODUCTS}, PyTorch'] = {'flops': 2}
    answers = {name: [{'seconds': 1.0}] for name in facts}
    rows = report.rows(facts, answers, dict.fromkeys(facts, 1), ['alexnet_jax'], 1)
    assert rows[0]['flops_share'] == 4 and report.ceiling(rows, 'bytes') is None


def test_spread():
    assert report.spread([3.0, 1.0, 2.0]) == {'median': 2.0, 'min': 1.0, 'max': 3.0}


def test_worker_that_ends_says_why():
    with pytest.raises(WorkerError, match='^ours: worker exited: KeyError'):
        Worker('ours', sys.executable, 'experiments.benchmark.ours', {}, {}, patience=5)


@pytest.mark.full
@pytest.mark.parametrize('ready', [False, True])
def test_a_worker_that_hangs_is_named(tmp_path, ready):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\n' + ready * 'echo {}\n' + 'exec sleep 600\n')
    python.chmod(0o755)
    spec = {'task': 'train', 'malloc': True, 'file': str(tmp_path / 'file'), 'patience': 0.01}
    began = time.monotonic()
    if ready:
        worker = benchmark._start(
            'torch eager', benchmark.PEER, str(python), {**spec, 'patience': 0.1}
        )
        with pytest.raises(WorkerError, match='^torch eager: no answer in 0.1 minutes'):
            worker.ask(1)
        worker.close()
    else:
        with pytest.raises(UserError, match='^train on .*: torch eager: no answer in 0.01 minutes'):
            benchmark._start('torch eager', benchmark.PEER, str(python), spec)
    assert time.monotonic() - began < 25  # killed, not waited for


def test_workers_compile_anew(tmp_path):
    """A worker must not time programs that another one cached."""
    environment = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs')}
    spec = {'task': 'copy', 'form': 'plain', 'cpu': True}
    Worker(
        'ours', sys.executable, 'experiments.benchmark.ours', spec, environment, patience=5
    ).close()
    assert not (tmp_path / 'programs').exists()


def test_pace_does_not_count_the_wait():
    class Device:  # a step takes 1 ms, and synchronizing 20
        def ask(self, count):
            return {'seconds': 0.02 + 0.001 * count}

    assert benchmark._pace(Device()) < 0.0011


def command(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'experiments.benchmark', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize('reader', ['tf', 'threads'])
@pytest.mark.parametrize('cold', [False, True])
def test_a_turn_does_not_count_batches_prepared_before_it(tmp_path, monkeypatch, cold, reader):
    if reader == 'threads':
        without_tensorflow(monkeypatch)
    write_store(
        tmp_path / 'store', format='u8', size=40, classes=10, counts={'train': 64, 'val': 8}
    )
    config = configfile.load('configs/paper.py')
    config.augment.crop = 32
    spec = {
        'store': str(tmp_path / 'store'),
        'batch': 4,
        'cold': cold,
        'threads': 2,
    }
    pipeline = ours.Pipeline(spec, config)
    first = next(pipeline)['image']
    pipeline.rest()
    if os.path.exists('/proc/self/maps'):  # a mapped page stays in the cache
        assert (spec['store'] in pathlib.Path('/proc/self/maps').read_text()) != cold
    pipeline.drain()
    again = next(pipeline)['image']  # cold: reopened at the start
    assert np.array_equal(first, again) == cold


@pytest.mark.parametrize('random', [False, True])
def test_the_input_is_that_of_the_preset(tmp_path, monkeypatch, random):
    without_tensorflow(monkeypatch)
    write_store(
        tmp_path / 'store', format='u8', size=32, classes=10, counts={'train': 64, 'val': 8}
    )
    config = configfile.load('configs/paper.py')
    config.augment.update(crop=32, random=random)
    spec = {'store': str(tmp_path / 'store'), 'batch': 64, 'cold': False}
    images = next(ours.Pipeline(spec, config))['image']
    pixels = open_store(spec['store']).pixels('train')
    unchanged = {image.tobytes() for image in images} == {image.tobytes() for image in pixels}
    assert unchanged != random  # half of them are flipped


def test_drains_as_many_batches_as_many_threads_keep_ready(tmp_path, monkeypatch):
    without_tensorflow(monkeypatch)
    monkeypatch.setattr(batches, 'cores', lambda: 16)
    made, taken, cut = [], [], batches._cut
    monkeypatch.setattr(batches, '_cut', lambda *args: made.append(1) or cut(*args))
    write_store(
        tmp_path / 'store', format='u8', size=40, classes=10, counts={'train': 64, 'val': 8}
    )
    config = configfile.load('configs/paper.py')
    config.augment.crop = 32
    spec = {
        'store': str(tmp_path / 'store'),
        'batch': 4,
        'cold': False,
        'threads': 16,
    }
    pipeline = ours.Pipeline(spec, config)
    next(pipeline)
    deadline = time.monotonic() + 10
    while len(made) < 18 and time.monotonic() < deadline:  # one taken, and 17 ready
        time.sleep(0.01)
    assert len(made) >= 18
    pipeline._batches = map(taken.append, pipeline._batches)
    pipeline.drain()
    assert len(taken) >= 17


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        pytest.param({'task': 'infer'}, marks=pytest.mark.full),
        pytest.param({'task': 'infer', 'devices': 2}, marks=pytest.mark.full),
        {'task': 'train', 'devices': 2},
        pytest.param({'task': 'both'}, marks=pytest.mark.full),
        {'task': 'both', 'dispatch': 3, 'cold': True},
    ],
    ids=str,
)
def test_every_task_makes_what_it_counts(tmp_path, monkeypatch, changes):
    without_tensorflow(monkeypatch)
    write_store(
        tmp_path / 'store', format='u8', size=72, classes=10, counts={'train': 64, 'val': 8}
    )
    config = configfile.load('configs/paper.py')
    config.model.width, config.augment.crop = 0.125, 64
    net = build(classes=10, **config.model)
    spec = {
        'batch': 4,
        'classes': 10,
        'devices': 1,
        'form': 'ours',
        'dispatch': 1,
        'cpu': True,
        'threads': 1,
        'store': str(tmp_path / 'store'),
        'cold': False,
        **changes,
    }
    task = {'train': ours._train, 'infer': ours._infer, 'both': ours._both}[spec['task']]
    repeat, facts, commands = task(spec, config, net)
    more = repeat(4)
    assert facts['flops'] > 0 and commands['peak']()['peak_bytes'] > 0
    if spec['task'] == 'both':
        assert 0 < more['waiting_s'] < 60 and commands['drain']() == {}
        assert ('bytes' in facts) == (spec['dispatch'] == 1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--tasks=fly'], 'choose from train,infer,input,both'),
        (['--tasks=input'], '--store'),
        (['--tasks=input', '--store=/nowhere'], '/nowhere'),
        (['--batch=0'], 'at least 1'),
        (['--dispatch=0'], 'at least 1'),
        (['--seconds=nan'], '--seconds'),
        (['--patience=0'], '--patience=0.0: must be above 0'),
        (['--peer_form=compile'], '--peer_form needs --peer'),
        (['--peer_python=/usr/bin/python'], '--peer_python needs --peer'),
        (
            ['--peer=torch', '--peer_form=fast'],
            '--peer_form=fast: give eager or compile, contiguous',
        ),
        (['--layers', '--tasks=infer'], '--layers needs --tasks=train'),
        (['--cold'], '--cold needs --tasks=both or input'),
        (['--two_devices', '--config=configs/one_gpu.py'], 'two towers'),
        (['--config=configs/nothing.py'], 'configs/nothing.py'),
        (['--config=configs/cifar10.py:13pct', '--plain'], '--plain only supports'),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark', *arguments, f'--out={tmp_path / "out"}'])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        benchmark.main()
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_earlier_results_stay(tmp_path, monkeypatch):
    file = tmp_path / 'benchmark.json'
    # nothing yet
    assert benchmark._folder(str(tmp_path)) == benchmark._folder(str(tmp_path)) == tmp_path
    file.write_text('{}')
    monkeypatch.setattr(sys, 'argv', ['benchmark', f'--out={tmp_path}'])
    with pytest.raises(
        UserError, match='holds the results of an earlier command; choose another folder'
    ):
        benchmark.main()
    assert file.read_text() == '{}'


@pytest.mark.full
def test_the_command(tmp_path):
    config = tmp_path / 'small.py'
    config.write_text(
        textwrap.dedent("""
        from configs import paper
        def get_config():
            config = paper.get_config()
            config.model.width = 0.125
            config.augment.crop = 96
            return config
    """)
    )
    done = command(
        f'--config={config}',
        '--batch=2',
        '--repeats=2',
        '--seconds=0.01',
        '--classes=10',
        '--plain',
        '--tasks=train',
        '--layers',
        '--deterministic',
        '--dispatch=3',
        f'--out={tmp_path / "out"}',
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    rows = record['tasks']['train']
    names = [
        'alexnet_jax',
        'alexnet_jax, deterministic',
        'alexnet_jax, 3 steps at once',
        'the plain form',
        'ceiling: products',
        'ceiling: copies',
    ]
    assert [row['name'] for row in rows] == names
    assert rows[0]['ratio'] is None and 0 < rows[0]['flops_share'] < 2
    assert rows[1]['ratio']['min'] > 0 and len(rows[1]['rates']) == 2
    assert rows[0]['repeats'] and rows[1]['repeats'] and 'repeats' not in rows[2]
    assert done.stdout.count('the same bits') == 2
    assert record['layers'][0]['name'] == 'conv1 conv'
    assert 'the whole step' in done.stdout
    assert (tmp_path / 'out' / 'benchmark.png').stat().st_size > 10_000
