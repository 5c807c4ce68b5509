"""Tests that the training step moves what the formula says between devices, and nothing else."""

import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from PIL import Image

from alexnet_jax.common.errors import UserError
from alexnet_jax.nets import alexnet, layers, network
from alexnet_jax.training import metrics, optim
from configs import caffe, cnn_star, no_talk, one_gpu, original, owt, paper
from experiments.scaling import __main__ as command
from experiments.scaling import accelerators, compilers, formula, hlo, programs, report
from experiments.scaling.accelerators import ACCELERATORS
from experiments.scaling.formula import Move

CROP, CLASSES, IMAGES = 64, 10, 4
HLO_NAMES = {'float32': 'f32', 'bfloat16': 'bf16'}
# Elements exchanged in the narrow network, over both towers.
CONV3, FC6, FC7 = 3 * 3 * 32, 1 * 1 * 32, 512


def narrow(preset=paper, **changes):
    config = preset.get_config()
    config.augment.crop = CROP
    config.model.width = 0.125
    config.model.update(changes)
    return config


def lower(config, shape):
    return programs.train_step(config, CLASSES, programs.make_mesh(shape), IMAGES)


def expected(config, shape, **options):
    net = programs.make_net(config, CLASSES)
    return formula.train_step(net, CROP, IMAGES, shape, **options)


def moved(config, shape):
    return programs.written(lower(config, shape), shape)


# --- the step


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(2, 1), (8, 1)], ids=str)
def test_data_parallel_step_sums_gradients_and_metrics_and_nothing_else(shape, dtype):
    moves = moved(narrow(dtype=dtype), shape)
    assert {(m.kind, m.axis) for m in moves} == {('all-reduce', 'data')}
    params = network.shapes(programs.make_net(narrow(), CLASSES), CROP)['params']
    sizes = sum(x.size for x in jax.tree.leaves(params))
    metrics = len(('count', 'loss', 'top1', 'top5'))
    assert sum(m.elements for m in moves) == sizes + metrics
    # Biases are added in float32, so their gradients are float32, like the metrics.
    # In layers that compute each tower separately they come in two halves.
    halves = {name: 2 if name in alexnet.GROUPED else 1 for name in params}
    biases = [params[name]['bias'].size // n for name, n in halves.items() for _ in range(n)]
    other = [m.elements for m in moves if m.dtype != HLO_NAMES[dtype]]
    assert sorted(other) == (sorted([1] * metrics + biases) if dtype == 'bfloat16' else [])
    assert programs.same(moves, expected(narrow(dtype=dtype), shape))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_two_device_step_exchanges_each_tensor_once_each_way(dtype):
    """conv3, fc6 and fc7 read both towers; the logits are summed in float32."""
    rows, name = 2 * IMAGES, HLO_NAMES[dtype]
    forward = [Move('all-gather', 'model', name, rows * n) for n in (CONV3, FC6, FC7)]
    backward = [Move('reduce-scatter', 'model', name, rows * n) for n in (FC7, FC6, CONV3)]
    logits = Move('all-reduce', 'model', 'f32', rows * CLASSES)
    moves = moved(narrow(dtype=dtype), (1, 2))
    assert moves == [*forward, logits, *backward]
    assert programs.same(moves, expected(narrow(dtype=dtype), (1, 2)))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_both_axes_at_once(dtype):
    config = narrow(dtype=dtype)
    assert programs.same(moved(config, (4, 2)), expected(config, (4, 2)))


@pytest.mark.parametrize('shape', [(8, 1), (2, 2)], ids=str)
def test_the_compiler_adds_nothing(shape):
    """Checks the compiled program in float32, since XLA's CPU backend sends bfloat16 as float32."""
    compiled = lower(narrow(), shape).compile(compiler_options=command.OPTIONS).as_text()
    assert programs.same(programs.found(compiled, shape), expected(narrow(), shape))


@pytest.mark.parametrize(
    'change', [{'norm_window': 'all'}, {'exchange': ()}, {'remove': 'conv1'}], ids=str
)
def test_switches_change_what_is_moved_as_the_formula_says(change):
    config = narrow(**change)
    assert programs.same(moved(config, (2, 2)), expected(config, (2, 2)))


def test_lars_sums_the_norms_of_what_is_divided():
    config = narrow()
    config.optim.name = 'lars'
    wanted = expected(config, (1, 2), lars=True)
    assert len(wanted) == len(expected(config, (1, 2))) + 2 * 15
    assert programs.same(moved(config, (1, 2)), wanted)


def test_the_paper_s_step_at_full_width():
    """128 images on two devices: 28,966,912 bytes gathered and just as many reduce-scattered, in float32."""
    config = paper.get_config()
    totals = programs.totals(
        programs.written(programs.train_step(config, 1000, programs.make_mesh((1, 2)), 64), (1, 2))
    )
    size = 4 * 128 * (13 * 13 * 256 + 6 * 6 * 256 + 4096)
    assert totals == {
        ('all-gather', 'model', 'f32'): [3, size],
        ('reduce-scatter', 'model', 'f32'): [3, size],
        ('all-reduce', 'model', 'f32'): [1, 4 * 128 * 1000],
    }


# --- the tests detect what is added, dropped, or sent in another dtype


def exchange_in_float32(real, towers, axis=None):
    return real(tuple(x.astype(jnp.float32) for x in towers), axis).astype(towers[0].dtype)


def exchange_twice(real, towers, axis=None):
    return real(towers, axis) + real(tuple(2 * x for x in towers), axis)


def exchange_nothing(real, towers, axis=None):
    x = towers[0]
    return jnp.concatenate([x, x], axis=-1) if axis else real(towers, axis)


@pytest.mark.parametrize('broken', [exchange_in_float32, exchange_twice, exchange_nothing])
def test_another_exchange_is_seen(monkeypatch, broken):
    monkeypatch.setattr(layers, 'exchange', partial(broken, layers.exchange))
    config = narrow(dtype='bfloat16')
    assert not programs.same(moved(config, (1, 2)), expected(config, (1, 2)))


def sum_again(real, *args, rates, **kwargs):
    """An optimizer that sums one bias gradient over the devices a second time."""
    inner = real(*args, **kwargs)

    def update(grads, state, params, *, rates):
        bias = lax.pmean(lax.pcast(grads['fc7']['bias'], 'data', to='varying'), 'data')
        grads = {**grads, 'fc7': {**grads['fc7'], 'bias': bias}}
        return inner.update(grads, state, params, rates=rates)

    return type(inner)(inner.init, update)


def test_another_sum_is_seen(monkeypatch):
    monkeypatch.setattr(optim, 'make', partial(sum_again, optim.make, rates=None))
    assert not programs.same(moved(narrow(), (2, 1)), expected(narrow(), (2, 1)))


def test_a_lost_metric_is_seen(monkeypatch):
    real = metrics.count
    monkeypatch.setattr(
        metrics,
        'count',
        lambda *args: {name: x for name, x in real(*args).items() if name != 'top5'},
    )
    assert not programs.same(moved(narrow(), (2, 1)), expected(narrow(), (2, 1)))


def test_sums_in_another_dtype_are_seen():
    wanted = expected(narrow(dtype='bfloat16'), (2, 1))
    assert not programs.same(moved(narrow(), (2, 1)), wanted)


# --- the formula


PRESETS = [paper, original, one_gpu, cnn_star, no_talk, caffe, owt]


@pytest.mark.parametrize('preset', PRESETS, ids=lambda p: p.__name__.split('.')[-1])
def test_the_formula_knows_every_layer(preset):
    config = preset.get_config()
    net = programs.make_net(config, 1000)
    params = network.shapes(net, config.augment.crop)['params']
    sizes = {name: (p['kernel'].size, p['bias'].size) for name, p in params.items()}
    plan = formula.layers(net, config.augment.crop)
    assert {layer.name: (layer.kernel, layer.bias) for layer in plan} == sizes


def test_the_paper_s_arithmetic():
    """`docs/original.md` §1: 724,406,816 multiply-adds; 4.136 GFLOP per image in training."""
    net = programs.make_net(paper.get_config(), 1000)
    plan = formula.layers(net, 224)
    assert sum(layer.macs for layer in plan) == 724_406_816
    assert [layer.gathered for layer in plan if layer.gathered] == [
        (13 * 13 * 256,),
        (9216,),
        (4096,),
    ]
    assert formula.flops(net, 224) == 2 * (3 * 724_406_816 - 105_415_200)


def test_two_gpus_have_less_to_compute_than_one():
    """§3.2: the two-GPU network "takes slightly less time to train than the one-GPU net"."""
    two, one = (
        formula.flops(programs.make_net(preset.get_config(), 1000), 224)
        for preset in (original, one_gpu)
    )
    assert (two, one) == (2 * 2_067_805_248, 2 * 1_121_835_552)
    assert 0.9 < two / 2 / one < 1


# --- reading HLO


def test_collectives_are_read():
    text = """
  %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %b = (f32[4]{0}, /*index=1*/bf16[]) all-reduce(%x, %y), replica_groups=[2,2]<=[2,2]T(1,0)
  %c = bf16[8]{0} all-gather(%a), replica_groups=[1,4]<=[4], metadata={op_name="all-reduce(x)"}
  d.1 = u8[2] reduce-scatter(z), replica_groups={{0,1,2,3}}, dimensions={0}
  %e = f32[2]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %f = f32[9]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  %g = f32[9]{0} get-tuple-element(%all-reduce.5), index=0
  %h = (f32[2], f32[4]) all-gather-start(%x), replica_groups={{0,1},{2,3}}
  %i = f32[4] all-gather-done(%h)
  %j = f32[4] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, to_apply=%sum
  %k = f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, to_apply=%sum
"""
    found = [(*c[1:4], hlo.axis(c.groups, (2, 2))) for c in hlo.collectives(text)]
    assert found == [
        ('all-reduce', 'f32', 6, 'model'),
        ('all-reduce', 'f32', 4, 'data'),
        ('all-reduce', 'bf16', 1, 'data'),
        ('all-gather', 'bf16', 8, 'both'),
        ('reduce-scatter', 'u8', 8, 'both'),
        ('collective-permute', 'f32', 2, 'other'),
        ('all-gather', 'f32', 4, 'model'),
        ('all-reduce', 'f32', 4, 'data'),
        ('all-reduce', 'f32', 4, 'both'),
    ]


def test_kernels_are_read():
    """Two fusions and a loop of three products; what stays on the chip is not counted."""
    text = """
%inner (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %dot = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (p: (f32[4,8], f32[8,2])) -> (f32[4,8], f32[8,2]) {
  %p = (f32[4,8]{1,0}, f32[8,2]{1,0}) parameter(0)
  %q = f32[4,8]{1,0} get-tuple-element(%p), index=0
  %r = f32[8,2]{1,0} get-tuple-element(%p), index=1
  %product = f32[4,2]{1,0} fusion(%q, %r), kind=kLoop, calls=%inner
}
ENTRY %main (x: bf16[2,6,6,3], k: bf16[3,3,3,8]) -> bf16[2,4,4,8] {
  %x = bf16[2,6,6,3]{3,2,1,0} parameter(0)
  %k = bf16[3,3,3,8]{3,2,1,0:T(8,128)S(1)} parameter(1)
  %conv = bf16[2,4,4,8]{3,2,1,0} convolution(%x, %k), window={size=3x3}, dim_labels=b01f_01io->b01f, \
metadata={op_name="jit(step)/jvp(Net)/conv1/conv"}, backend_config={"estimated_cycles":"77"}
  %tuple = (f32[4,8]{1,0}, f32[8,2]{1,0}) tuple(%x, %k)
  %loop = (f32[4,8]{1,0}) while(%tuple), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %sum-start = f32[9]{0} all-reduce-start(%x), replica_groups={{0,1}}
  ROOT %sum = f32[9]{0} all-reduce-done(%sum-start)
}
"""
    conv, product, start, done = hlo.kernels(text)
    assert (conv.bytes, conv.cycles) == (2 * (2 * 6 * 6 * 3 + 2 * 4 * 4 * 8), 77)
    assert conv.flops == 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3)
    assert (product.flops, product.times) == (2 * 4 * 2 * 8, 3)
    assert product.bytes == 4 * (32 + 16 + 8) and product.parts == {'product', 'a', 'b', 'dot'}
    assert start.name in done.operands


def test_an_operand_that_is_passed_twice_is_read_once():
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %square = f32[8]{0} multiply(%x, %x)
}
"""
    (square,) = hlo.kernels(text)
    assert square.bytes == 2 * 4 * 8 and square.operands == ('x', 'x')


# --- what the report says of a program, here for two towers on two of four devices

PROGRAM = """
ENTRY %main (x: bf16[1024,1024], k: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %k = bf16[1024,1024]{1,0} parameter(1)
  %ahead = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]) copy-start(%k)
  %forward = bf16[1024,1024]{1,0} dot(%x, %k), lhs_contracting_dims={1}, \
metadata={op_name="jit(step)/jvp(AlexNet)/fc6/dot"}, backend_config={"estimated_cycles":"3000"}
  %backward = bf16[1024,1024]{1,0} dot(%forward, %k), lhs_contracting_dims={1}, \
metadata={op_name="jit(step)/transpose(jvp(AlexNet))/fc6/dot"}, backend_config={"estimated_cycles":"6000"}
  %sum-start = bf16[1024,1024]{1,0} all-reduce-start(%backward), replica_groups={{0,2},{1,3}}
  %mask = bf16[1024,1024]{1,0} multiply(%x, %x), metadata={op_name="jit(step)/dropout/mul"}
  %sum = bf16[1024,1024]{1,0} all-reduce-done(%sum-start)
  ROOT %update = bf16[1024,1024]{1,0} add(%sum, %x), metadata={op_name="jit(step)/add"}
}
"""
SIZE, PRODUCT = 2 * 1024**2, 2 * 1024**3  # bytes of an array, FLOPs of a product


def described(name, dtype='bfloat16'):
    memory = types.SimpleNamespace(
        argument_size_in_bytes=30_000_000,
        output_size_in_bytes=20_000_000,
        alias_size_in_bytes=10_000_000,
        temp_size_in_bytes=5_000_000,
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: memory)
    net, chip = programs.make_net(narrow(dtype=dtype), CLASSES), compilers.CHIPS[name]
    text = PROGRAM if chip.clock else re.sub('estimated_cycles', 'none', PROGRAM)
    return report.program_lines(compiled, text, chip, (2, 2), net, images=2, flops=10**9)


def test_a_bound_from_bytes_and_products():
    """On a GPU: the copy reads an array, dropout moves two, and the update three."""
    chip, lines = compilers.CHIPS['h100'], described('h100')
    moved, product = SIZE / chip.bandwidth, PRODUCT / chip.flops
    assert product > 3 * moved  # so that arithmetic bounds it
    total = 6 * moved + 2 * product
    assert '45 MB of 85,000: 40 of arguments and results, 5 of temporaries' in lines[1]
    assert '(of one device, which computes 1/2 of the towers)' in lines[2]
    assert f'at least {1e3 * total:.4g} ms' in lines[3] and f'at most {2 / total:,.0f}' in lines[3]
    assert f', {2e9 / total / chip.flops:.0%} of 989 TFLOP/s' in lines[3]
    assert '% of 495 TFLOP/s' in described('h100', 'float32')[3]  # TF32
    starts, ends = (moved + 2 * product) / total, (3 * moved + 2 * product) / total
    assert lines[-1].split()[:6] == ['all-reduce', 'data', '1', 'arrays', f'{SIZE:,}', 'bytes']
    assert lines[-1].endswith(f' from {starts:.0%} to {ends:.0%} of the work')


def test_an_estimate_from_cycles():
    """On a TPU: cycles, else bytes; what starts early is free. Then the layers, and the sum's place."""
    chip, lines = compilers.CHIPS['v5e'], described('v5e')
    moved, known = SIZE / chip.bandwidth, 9000 / chip.clock
    total = known + 5 * moved
    assert f'  {1e3 * total:.4g} ms estimated without collectives, {1e3 * known:.4g} by' in lines[3]
    assert '1.50 GHz (inferred' in lines[4] and 'uncertain' in described('v6e')[4]
    assert 'TFLOP/s' in lines[3] and 'TFLOP/s' not in described('v5e', 'float32')[3]
    rows = [(line[2:24].split(), line.split()[-2:]) for line in lines[6:-1]]
    assert rows == [  # share of the time; MB for each of four images
        (['update,', '...'], [f'{3 * moved / total:.1%}', '3.15']),
        (['dropout'], [f'{2 * moved / total:.1%}', '1.05']),
        (['fc6', 'backward'], [f'{6000 / chip.clock / total:.1%}', '1.57']),
        (['fc6', 'forward'], [f'{3000 / chip.clock / total:.1%}', '1.57']),
    ]
    starts, ends = known / total, (known + 2 * moved) / total
    assert lines[-1].endswith(f' from {starts:.0%} to {ends:.0%} of the work')


@pytest.mark.parametrize(
    'line',
    [
        '%a = f32[2] all-reduce(%x), replica_groups=@mesh',
        "%a = f32[2] all-reduce(%x), replica_groups=mesh['a'=4] {'a':(1)2}",
        '%a = token[] something all-reduce(%x), replica_groups={{0,1}}',
    ],
)
def test_what_cannot_be_read_is_an_error(line):
    with pytest.raises(ValueError, match='read'):
        hlo.collectives(line)


# --- the prediction


def test_bytes_of_a_ring():
    assert formula.sent(Move('all-reduce', 'data', 'f32', 100), 4) == 2 * 3 / 4 * 400
    assert formula.sent(Move('all-gather', 'data', 'bf16', 100), 2) == 100


def test_bandwidth_within_and_between_machines():
    h100, speed = ACCELERATORS['h100'], accelerators.bandwidth
    assert speed(h100, 'data', (8, 1)) == speed(h100, 'model', (32, 2)) == 450e9
    assert (
        speed(h100, 'data', (16, 1)) == 8 * 50e9
    )  # one network link for each of a machine's eight
    assert speed(h100, 'data', (32, 2)) == 4 * 50e9  # half of them for each of two groups
    assert speed(h100, 'data', (8, 8)) == 50e9
    assert speed(ACCELERATORS['gtx580'], 'data', (4, 1)) == 0


@pytest.mark.parametrize(('compute', 'behind'), [(0.5, 1), (2, 2)])
def test_efficiency_by_hand(compute, behind):
    """Two GTX 580s: an all-reduce of 8 GB takes a second, an exchange of 4 GB a quarter of one."""
    card = ACCELERATORS['gtx580']
    gradient = Move('all-reduce', 'data', 'f32', 2 * 10**9, 'gradient')
    exchange = Move('all-gather', 'data', 'f32', 10**9, 'exchange')
    flops = 0.3 * card.peak * compute
    none, full = accelerators.efficiency(card, [gradient, exchange], (2, 1), flops, 0.3)
    assert none == pytest.approx(compute / (compute + 1 + 0.25))
    assert full == pytest.approx(compute / (behind + 0.25))


# --- the command


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """arguments(...) runs the command on the test devices with a narrow preset."""
    preset = tmp_path / 'narrow.py'
    preset.write_text(
        'from configs import paper\n\ndef get_config():\n    config = paper.get_config()\n'
        f'    config.augment.crop = {CROP}\n    config.model.width = 0.125\n    return config\n'
    )
    monkeypatch.setattr(command.meshes, 'configure', lambda cpu_devices: None)

    def call(*args):
        out = tmp_path / 'scaling.png'
        argv = [
            'scaling',
            f'--config={preset}',
            f'--out={out}',
            '--classes=10',
            '--images=4',
            *args,
        ]
        monkeypatch.setattr(sys, 'argv', argv)
        command.main()
        return out

    return call


def test_the_command(arguments, capsys, monkeypatch):
    real, one = command._count, (1, 2)  # one of its three programs is enough
    monkeypatch.setattr(command, '_count', lambda mesh, *args: mesh != one or real(mesh, *args))
    out = arguments('--max_devices=2')
    text = capsys.readouterr().out
    for line in (
        '1x2: compiled in',
        'compiled: 3 all-gather',
        'NVIDIA H100',
        f'wrote {out}',
    ):
        assert line in text
    assert 'DIFFERENT' not in text
    with Image.open(out) as picture:
        assert picture.width > 1000


def test_the_command_fails_where_a_program_moves_something_else(arguments, capsys, monkeypatch):
    monkeypatch.setattr(command, '_count', lambda mesh, *args: mesh != (2, 1))
    with pytest.raises(SystemExit, match='1'):
        arguments('--max_devices=2')
    assert capsys.readouterr().err == 'programs that do not match the formula: 1\n'


def test_what_differs_is_marked():
    moves = [Move('all-reduce', 'data', 'f32', 3), Move('all-gather', 'model', 'bf16', 5)]
    other = [Move('all-reduce', 'data', 'f32', 3), Move('all-gather', 'model', 'bf16', 4)]
    assert [line.endswith('DIFFERENT') for line in report.count_lines(moves, other)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    'wrong',
    [
        '--max_devices=65',
        '--images=0',
        '--images=100001',
        '--share=0',
        '--predict=a',
        '--mesh=0,1',
        '--mesh=2,4 --topology=h100:8',
        '--hlo=/none/x --topology=h100:2',
    ],
)
def test_invalid_arguments(arguments, wrong):
    with pytest.raises(UserError, match=wrong.split('=')[0]):
        arguments(*wrong.split())


def test_a_network_that_the_formula_does_not_know(arguments):
    with pytest.raises(UserError, match="config.model.net='mobilenet': the formula only knows"):
        arguments('--config=configs/mobilenet.py')
