"""Counts what parallel training moves between devices, and predicts how well it scales.

    python -m experiments.scaling                          # configs/paper.py, up to 64 devices
    python -m experiments.scaling --max_devices=8 --dtype=bfloat16 --config=configs/original.py

Compiles the training step for meshes of virtual CPU devices from shapes alone, without running it. For each
mesh it prints the collectives in the program, their bytes next to those of the formula (`formula.py`), and
the FLOPs and memory of one device. Then it prints and plots the predictions of `accelerators.py`. Exits with
1 if a program moves anything that the formula does not predict.

    python -m experiments.scaling --topology=v5e:16x16 --dtype=bfloat16 --images=128
    python -m experiments.scaling --topology=v5e:2x2 --mesh=1,1 --dtype=bfloat16 --images=128 --forms=plain
    python -m experiments.scaling --topology=h100:8 --mesh=4,2 --dtype=bfloat16 --images=2048

With --topology, XLA's compiler for that chip compiles the program for one mesh instead, and the command
prints what it reports: memory, collectives, kernels, bytes, costs by layer, and a bound (GPU) or an estimate
(TPU) of the time. All of it is the compiler's model, not measured. Chips: v5e, v5p, v6e, h100, h200; needs
requirements-compilers.txt.
"""

import collections
import pathlib
import re
import sys
import time

from alexnet_jax import figures
from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common import configfile
from alexnet_jax.common.errors import UserError
from alexnet_jax.devices import backend
from alexnet_jax.devices import mesh as meshes
from experiments.scaling import compilers, formula, hlo, programs, report
from experiments.scaling.accelerators import ACCELERATORS

MAX_DEVICES = 64
MAX_IMAGES = 100_000  # per device; the rows of a batch are numbered in 32 bits
OPTIONS = {'xla_backend_optimization_level': 0}  # halves compile time; the code never runs


def main() -> None:
    args = _arguments()
    config = configfile.load(args.config)
    config.model.dtype = args.dtype or config.model.dtype
    if args.topology:
        _compile(config, args)
        return
    meshes.configure(cpu_devices=args.max_devices)
    net, crop = programs.make_net(config, args.classes), config.augment.crop
    counts = [2**i for i in range(args.max_devices.bit_length())]
    wanted = list(dict.fromkeys(s for count in counts for s in report.schemes(count, net).values()))
    print(f'{args.config}, {config.model.dtype}, {args.images} images per device', flush=True)
    began = time.perf_counter()
    different = [mesh for mesh in wanted if not _count(mesh, config, args, net)]
    print(f'\n{len(wanted)} programs in {time.perf_counter() - began:.0f} s', flush=True)

    predicted = {}
    print(f'\npredicted, at {args.share:.0%} of peak')
    for key, accelerator in ACCELERATORS.items():
        for images in args.predict:
            points = report.curves(
                net, crop, accelerator, images=images, devices=counts, share=args.share
            )
            print('', *report.curve_lines(accelerator, images, points), sep='\n')
            if accelerator.domain > 2:  # a curve has more than two points
                predicted[key, images] = points
    out = pathlib.Path(args.out)
    title = (
        f'{args.config}: predicted scaling efficiency, at {args.share:.0%} of peak\n'
        'With markers: no overlap. Thin: all gradient sums overlap'
    )
    if args.max_devices > 1:
        report.draw(predicted, title, out)
        print(f'\nwrote {out}')
    if different:
        print(f'programs that do not match the formula: {len(different)}', file=sys.stderr)
        sys.exit(1)


def _compile(config, args) -> None:
    """Compiles a program for a topology of devices that are not present; prints what its compiler says."""
    _, chip, count = compilers.parse(args.topology)
    shape = args.mesh or (count, 1)
    net, crop = programs.make_net(config, args.classes), config.augment.crop
    if shape[1] not in (1, net.towers):
        raise UserError(
            f'--mesh={shape[0]},{shape[1]}: the second number must be 1 or {net.towers}'
        )
    if args.hlo:
        figures.check_file('--hlo', args.hlo)
    compilers.configure()
    mesh = compilers.make_mesh(args.topology, shape)
    forms = backend.choices(mesh)
    if args.forms == 'plain':
        forms = forms._replace(pooling='interleaved', band=False, barrier=False)
    print(
        f'{args.config}, {config.model.dtype}, {args.what}, {args.topology}, mesh {shape}, '
        f'{args.images} images per device, {args.forms} forms; compiling can take minutes',
        flush=True,
    )
    began = time.perf_counter()
    with backend.using(forms):
        if args.what == 'train':
            lowered = programs.train_step(config, args.classes, mesh, args.images)
        elif args.what == 'score':
            lowered = programs.score_step(args.classes, mesh, args.images)
        else:
            lowered = programs.predict_step(config, args.classes, mesh, args.images, args.what)
    compiled = compilers.compile(lowered, args.topology)
    text = compiled.as_text()
    if args.hlo:
        pathlib.Path(args.hlo).write_text(text)
    formula_flops = formula.flops(net, crop) if args.what == 'train' else 0
    print(
        f'compiled in {time.perf_counter() - began:.0f} s',
        *report.program_lines(compiled, text, chip, shape, net, args.images, formula_flops),
        sep='\n',
    )


def _count(mesh, config, args, net) -> bool:
    """Compiles the step on one mesh and prints its counts; returns whether they match the formula."""
    crop = config.augment.crop
    began = time.perf_counter()
    lowered = programs.train_step(config, args.classes, programs.make_mesh(mesh), args.images)
    compiled = lowered.compile(compiler_options=OPTIONS)
    took = time.perf_counter() - began
    wanted = formula.train_step(net, crop, args.images, mesh, lars=config.optim.name == 'lars')
    written = programs.written(lowered, mesh)
    text = compiled.as_text()
    made = programs.found(text, mesh)
    exact = net.dtype == 'float32'  # XLA's CPU backend converts bfloat16 collectives
    right = programs.same(written, wanted), programs.same(made, wanted, dtypes=exact)
    instructions = collections.Counter(
        {c.instruction: c.kind for c in hlo.collectives(text)}.values()
    )
    listed = ', '.join(f'{count} {kind}' for kind, count in sorted(instructions.items()))
    memory = compiled.memory_analysis()
    print(
        f'\n{mesh[0]}x{mesh[1]}: compiled in {took:.1f} s; per device: '
        f'{compiled.cost_analysis()["flops"] / 1e9:.1f} GFLOP '
        f'(formula: {formula.flops(net, crop) * args.images / 1e9:.1f}), '
        f'{memory.argument_size_in_bytes / 2**20:,.0f} MiB of arguments, '
        f'{memory.temp_size_in_bytes / 2**20:,.0f} MiB of temporaries',
        *report.count_lines(written, wanted),
        f'  compiled: {listed or "no collective"}{"" if right[1] else "  DIFFERENT ELEMENTS"}',
        sep='\n',
        flush=True,
    )
    return all(right)


def _arguments():
    parser = ArgumentParser(
        prog='python -m experiments.scaling',
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument('--config', default='configs/paper.py', help='a preset')
    parser.add_argument(
        '--dtype',
        default='',
        choices=('', 'float32', 'bfloat16'),
        help="dtype of the computation; '': the preset's",
    )
    parser.add_argument('--classes', type=int, default=1000, help='number of classes')
    parser.add_argument(
        '--topology',
        default='',
        metavar='CHIP:SHAPE',
        help="devices that are not present; '': virtual CPU devices",
    )
    parser.add_argument(
        '--mesh',
        default='',
        metavar='DATA,MODEL',
        help='with --topology: DATA,MODEL, the numbers of devices that split the batch and the towers; '
        "'': all split the batch",
    )
    parser.add_argument(
        '--forms',
        default='chosen',
        choices=('chosen', 'plain'),
        help="with --topology: norm and pooling as chosen for the chip, or XLA's own way",
    )
    parser.add_argument(
        '--what',
        default='train',
        choices=('train', 'center', 'ten', 'score'),
        help='with --topology: a training step, prediction from the center or ten crops, or the sums '
        'of errors in `evaluate`',
    )
    parser.add_argument(
        '--hlo', default='', metavar='FILE', help='with --topology: write the program to FILE'
    )
    parser.add_argument('--images', type=int, default=64, help='per device, in compiled programs')
    parser.add_argument('--max_devices', type=int, default=MAX_DEVICES, help='virtual CPU devices')
    parser.add_argument('--share', type=float, default=0.3, help='fraction of peak FLOP/s reached')
    parser.add_argument('--predict', default='16,64,512', help='images per device, in predictions')
    parser.add_argument('--out', default='runs/scaling/scaling.png', help='file for the plot')
    args = parser.parse_args()
    try:
        args.predict = [int(n) for n in args.predict.split(',')]
    except ValueError:
        raise UserError(f'--predict={args.predict}: must be numbers, as in 16,64') from None
    if args.mesh:
        if not re.fullmatch(r'[1-9]\d{0,4},[1-9]\d{0,4}', args.mesh):
            raise UserError(f'--mesh={args.mesh}: must be two numbers, DATA,MODEL, as in 4,2')
        args.mesh = tuple(map(int, args.mesh.split(',')))
    if min(args.predict) < 1:
        raise UserError(f'--predict={args.predict}: must be at least 1')
    for name in ('classes', 'images', 'max_devices'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name}={getattr(args, name)}: must be at least 1')
    for name, most in (('max_devices', MAX_DEVICES), ('images', MAX_IMAGES)):
        if getattr(args, name) > most:
            raise UserError(f'--{name}={getattr(args, name)}: must be at most {most}')
    if not 0 < args.share <= 1:
        raise UserError(f'--share={args.share}: must be above 0 and at most 1')
    return args


if __name__ == '__main__':
    run(main)
