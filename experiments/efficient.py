"""Do smaller networks reach a similar accuracy with less training? AlexNet and later networks.

    python -m experiments.efficient --scale=small -- --config.data.source=FOLDER

"Computationally efficient architectures like MobileNet and ShuffleNet can achieve similar accuracy with fewer
parameters and reduced training time": each network is trained on the same number of images, with its own
recipe (its preset) and with that of `original` (its `optim`, `augment` and `colour`). Batches have 128
images, and published learning rates are scaled in proportion; they change at the same fractions of training,
and the moving average covers the same fraction of the steps. A cosine schedule replaces the MobileNets'
exponential ones, whose 500-fold decay would leave too few steps at useful rates.

Times are measured after training: steps and predictions of the network alternate with those of `original`,
at batch 128 on the same device. They exclude the input pipeline.

`modern` is also trained without each of its ingredients, with one seed, too few to rank them.
"""

import functools
import math
import time
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.common import configfile
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import network
from alexnet_jax.nets.build import build
from alexnet_jax.training import inference, optim, steps
from alexnet_jax.training.setup import Setup
from experiments import ablations, statistics
from experiments import lab as labs

TITLE = 'Later networks, under the same recipe'
INDEPENDENT = True
REFERENCE = 'original'
BATCH = 128
ROUNDS = 5
NOTES = {
    'small': 'Trained for 20 epochs on 112-pixel crops of 128-pixel images. The width multipliers are '
    '0.25 for the AlexNets, 0.5 for SqueezeNet, 0.25 for MobileNet v1 and 0.35 for v2. A cosine schedule '
    "replaces the MobileNets' exponential ones."
}


class Net(NamedTuple):
    preset: str
    width: float  # at the small scale; 0: the preset's only one
    title: str


NETS = {
    REFERENCE: Net('configs/original.py', 0.25, 'AlexNet (`original`)'),
    'alexnet_bn': Net(
        'configs/alexnet_bn.py', 0.25, 'AlexNet with batch normalization (`alexnet_bn`)'
    ),
    'modern': Net('configs/modern.py', 0.25, 'AlexNet with a modern recipe (`modern`)'),
    'squeezenet': Net('configs/squeezenet.py:1.1', 0.5, 'SqueezeNet v1.1'),
    'mobilenet v1': Net('configs/mobilenet.py:v1', 0.25, 'MobileNet v1'),
    'mobilenet v2': Net('configs/mobilenet.py', 0.35, 'MobileNet v2'),
    'shufflenet': Net('configs/shufflenet.py:x0.5', 0.0, 'ShuffleNet v2 x0.5'),
}
ORIGINAL, MODERN = NETS[REFERENCE].preset, NETS['modern'].preset
SQUARES = {'data.format': 'u8', 'augment.area': ()}
WITHOUT = {  # an ingredient of `modern`: the changes that leave it out
    'the cosine': {'optim.schedule': 'steps'},  # original's, set below
    'warm-up': {'optim.warmup': 0.0},
    'resized crops': SQUARES,
    'smoothing': {'train.smoothing': 0.0},
    'mixup': {'augment.mixup': 0.0},
    'the average': {'train.ema': 0.0, 'train.ema_used': False},
}
TINY = {
    name: value
    for name, value in ablations.TINY.items()
    if name not in ('data.format', 'train.batch')
}
SCALES = {  # changes, epochs
    'smoke': ({**TINY, 'run.eval_every': 1.0}, 0.256),
    'small': ({'data.size': 128, 'augment.crop': 112, 'run.eval_every': 10.0}, 20.0),
    'full': ({'run.eval_every': 10.0}, 90.0),
}
SMOKE = (REFERENCE, 'mobilenet v2')
IMAGES = 1_281_167  # ImageNet's, for which the published recipes were made


def own(preset: str, epochs: float) -> dict:
    """Returns the changes that fit a preset's recipe to a number of epochs, and to batches of `BATCH`."""
    config = configfile.load(preset)
    optim, part = config.optim, epochs / config.optim.epochs
    batches = BATCH / config.train.batch
    changes = labs.shortened(preset, part) | {
        'train.batch': BATCH,
        'optim.rate': round(optim.rate * batches, 6),
        'optim.warmup': round(optim.warmup * part, 6),
        'augment.mixup_off': round(config.augment.mixup_off * part, 6),
    }
    if optim.schedule == 'exponential' and part < 1:
        changes['optim.schedule'] = 'cosine'
    return {name: value for name, value in changes.items() if _of(config, name) != value}


def averaged(preset: str, epochs: float, images: int) -> dict:
    """Returns the changes to what a preset counts in steps or images, for a set of `images`."""
    config, changes = configfile.load(preset), {}
    if config.train.ema:
        before = config.optim.epochs * IMAGES / config.train.batch
        after = epochs * images / BATCH
        changes['train.ema'] = round(max(1 - (1 - config.train.ema) * before / after, 0.5), 4)
    if config.train.recompute:
        changes['train.recompute'] = images
    return changes


def theirs(epochs: float) -> dict:
    """Returns the changes that set the recipe of `original`, with this number of epochs."""
    config = configfile.load(ORIGINAL)
    changes = {
        f'{part}.{name}': value
        for part in ('optim', 'augment', 'colour')
        for name, value in config[part].items()
        if name != 'crop'
    }
    changes |= labs.shortened(ORIGINAL, epochs / config.optim.epochs) | {
        'data.format': 'u8',
        'train.batch': BATCH,
        'train.smoothing': 0.0,
        'train.ema': 0.0,
        'train.ema_used': False,
        'train.recompute': 0,
    }
    return changes


def _of(config, name: str):
    for part in name.split('.'):
        config = config[part]
    return config


def run(lab):
    common, epochs = SCALES[lab.scale]
    examples = {'smoke': 1000, 'small': 10_000, 'full': IMAGES}[lab.scale]

    width = {'smoke': 0.0625, 'small': NETS[REFERENCE].width, 'full': 1.0}[lab.scale]
    look = functools.partial(errors_and_times, width)

    def make(name, net, seed, changes, after):
        given = {**common, 'run.stuck_after': 0, **changes}
        given.pop('model.width', None)
        if net.width and lab.scale != 'full':
            given['model.width'] = net.width if lab.scale == 'small' else width
        given = {k: v for k, v in given.items() if _of(configfile.load(net.preset), k) != v}
        lab.run(name, seed, net.preset, given, after=after)

    chosen = {name: NETS[name] for name in (SMOKE if lab.scale == 'smoke' else NETS)}
    for seed in range(lab.seeds):
        for name, net in chosen.items():
            recipe = own(net.preset, epochs) | averaged(net.preset, epochs, examples)
            squares = {'data.format': 'u8'} if not configfile.load(net.preset).augment.area else {}
            make(name, net, seed, {**recipe, **squares}, look)
        if seed:
            continue
        for name, net in chosen.items():
            if name not in (
                REFERENCE,
                'modern',
            ):  # `modern` differs from the reference in its recipe
                make(f'{name} as original', net, seed, theirs(epochs), ablations.errors)
        for ingredient, changes in WITHOUT.items() if 'modern' in chosen else ():
            recipe = own(MODERN, epochs) | averaged(MODERN, epochs, examples)
            if 'optim.schedule' in changes:
                drops = labs.shortened(ORIGINAL, epochs / configfile.load(ORIGINAL).optim.epochs)
                changes = {**changes, 'optim.drops': drops['optim.drops']}
            name = f'modern without {ingredient}'
            make(name, NETS['modern'], seed, {**recipe, **changes}, ablations.errors)


def errors_and_times(width: float, workdir) -> dict:
    """Returns `ablations.errors`, 'size' and 'times', compared with the reference of this width."""
    trained = inference.describe_run(workdir)
    layers = network.summary(trained.net, trained.config['augment']['crop'])
    size = {name: sum(getattr(x, name) for x in layers) for name in ('parameters', 'macs')}
    return {**ablations.errors(workdir), 'size': size, 'times': times(workdir, width)}


def times(workdir, width: float) -> dict:
    """Returns seconds per image and their ratio, {'train': [own, reference], 'train_ratio': ..., ...}."""
    trained = inference.describe_run(workdir)
    config, reference = ConfigDict(trained.config), configfile.load(ORIGINAL)
    reference.data.size, reference.augment.crop = config.data.size, config.augment.crop
    reference.model.width = width
    store, classes = inference.open_store([trained]), len(trained.facts.names)
    mesh = meshes.make((1, 1), towers=1, batches={'config.train.batch': BATCH})
    pairs = [_timed(one, store, mesh, classes) for one in (config, reference)]
    found = {}
    for kind in ('train', 'predict'):
        rounds = [[pair[kind]() for pair in pairs] for _ in range(ROUNDS)]
        found[kind] = (np.median(rounds, axis=0) / BATCH).tolist()
        found[f'{kind}_ratio'] = float(np.median([a / b for a, b in rounds]))
    return found


def _timed(config, store, mesh, classes: int) -> dict:
    """Returns functions that run a training step, or a prediction, of a batch and return its seconds."""
    config = ConfigDict(config.to_dict())
    config.train.batch = BATCH
    config.augment.update({'area': (), 'jitter': 0.0, 'mixup': 0.0})  # the input is left out
    net = build(classes=classes, **config.model)
    setup = Setup.make(config, mesh, store, net)
    crop, size = config.augment.crop, config.data.size
    state = steps.init_state(
        net, setup.optimizer, mesh, seed=0, crop=crop, ema=config.train.ema > 0
    )
    rng = np.random.default_rng(0)
    local = {
        'image': rng.integers(0, 256, (BATCH, crop, crop, 3), dtype=np.uint8),
        'z': np.zeros((BATCH, 3), np.float32),
        'label': np.arange(BATCH, dtype=np.int32) % classes,
    }
    batch = meshes.global_batch(mesh, BATCH, local)
    whole = jax.device_put(rng.integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8))
    rates = optim.scalars(setup.rates(0, {}))

    def train():
        nonlocal state
        began = time.perf_counter()
        state, sums = setup.train_step(state, batch, rates)
        jax.block_until_ready((state, sums))
        return time.perf_counter() - began

    def predict():
        began = time.perf_counter()
        jax.block_until_ready(setup.predict(state.variables, whole))
        return time.perf_counter() - began

    train(), predict()  # compiles
    return {'train': train, 'predict': predict}


def center(results, name: str) -> dict[int, float]:
    """Returns the top-1 error with the center crop by seed, in percent, of runs that did not diverge."""
    return ablations.of_seeds(results, name, 'top1_error', 'center')


def report(results) -> str:
    lines = [
        '| network | recipe | seeds | parameters | MB | multiply-adds | top-1, center '
        '| top-1, ten crops | minus `original`, center (95% interval) | p | verdict '
        '| training time | prediction time |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    reference, tests = center(results, REFERENCE), {}
    for name in NETS:
        pairs = statistics.by_seed(center(results, name), reference)
        if name != REFERENCE and len(pairs) > 1:
            tests[name] = statistics.paired(pairs)
    corrected = statistics.holm({name: found.p for name, found in tests.items()})
    for name, net in NETS.items():
        for key, recipe in ((name, 'own'), (f'{name} as original', "`original`'s")):
            runs = labs.named(results, key)
            if not runs:
                continue
            errors = center(results, key)
            pairs = [] if key == REFERENCE else statistics.by_seed(errors, reference)
            cells = [net.title, recipe, str(len(errors)), *_size(runs), *_errors(results, key)]
            cells.append(statistics.interval(statistics.paired(pairs)) if pairs else '')
            p = corrected.get(key)
            cells += [f'{p:.2g}', statistics.verdict(tests[key].mean, p)] if p else ['', '']
            cells += [_times(runs, kind) for kind in ('train', 'predict')]
            lines.append(f'| {" | ".join(cells)} |')
    lines += [
        '',
        "Times: relative to `original`'s, and per image; medians over the runs, without the input pipeline. "
        'MB: in float32. Multiply-adds: for one image, in test mode.',
    ]
    if tests:
        lines.append(statistics.family(len(tests), 'top-1 error with the center crop, own recipes'))
    lines += ['', *_ingredients(results)]
    return '\n'.join(lines)


def _size(runs) -> list[str]:
    sizes = [r['extra']['size'] for r in runs if r['extra'] and 'size' in r['extra']]
    if not sizes:
        return ['', '', '']
    parameters, macs = (sizes[0][name] for name in ('parameters', 'macs'))
    return [f'{parameters:,}', f'{4e-6 * parameters:.1f}', f'{macs:,}']


def _errors(results, key: str) -> list[str]:
    found = []
    for view in ('center', 'ten'):
        errors = [*ablations.of_seeds(results, key, 'top1_error', view).values()]
        found.append(statistics.mean_std(errors) if errors else 'diverged')
    return found


def _ratio(runs, kind: str) -> float:
    """Returns a time divided by the reference's, median over runs; NaN if not measured."""
    ratios = [r['extra']['times'][f'{kind}_ratio'] for r in runs if 'times' in (r['extra'] or {})]
    return float(np.median(ratios)) if ratios else math.nan


def _times(runs, kind: str) -> str:
    ratio = _ratio(runs, kind)
    if math.isnan(ratio):
        return ''
    seconds = np.median([r['extra']['times'][kind][0] for r in runs if r['extra']])
    return f'{ratio:.2f} ({1e3 * seconds:.2g} ms)'


def _ingredients(results) -> list[str]:
    modern = center(results, 'modern')
    rows = [(name, center(results, f'modern without {name}')) for name in WITHOUT]
    if 0 not in modern or not any(0 in errors for _, errors in rows):
        return []
    lines = [
        f'`modern` without each ingredient (seed 0, center crop; `modern` itself: {modern[0]:.1f}%); one '
        'seed is too few to rank them:',
        '',
        '| without | top-1 error | minus `modern` |',
        '|---|---|---|',
    ]
    for name, errors in rows:
        if 0 in errors:
            lines.append(f'| {name} | {errors[0]:.1f} | {errors[0] - modern[0]:+.1f} |')
    return lines


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout='constrained')
    colors = ['#000000', '#0072b2', '#56b4e9', '#d55e00', '#e69f00', '#cc79a7', '#009e73']
    panels = {
        'parameters, millions': lambda runs: 1e-6 * runs[0]['extra']['size']['parameters'],
        'multiply-adds of one image, millions': lambda runs: (
            1e-6 * runs[0]['extra']['size']['macs']
        ),
        "training time, relative to `original`'s": lambda runs: _ratio(runs, 'train'),
    }
    for axes, (label, value) in zip(
        figure.subplots(1, 3, sharey=True), panels.items(), strict=True
    ):
        for (name, net), color in zip(NETS.items(), colors, strict=True):
            runs = [r for r in labs.named(results, name) if r['extra']]
            if not runs:
                continue
            errors, x = [*center(results, name).values()], value(runs)
            style = {'color': color, 'capsize': 3, 'ms': 7}
            title = net.title.replace('`', '')
            axes.errorbar(
                x, np.mean(errors), statistics.spread(errors), fmt='o', label=title, **style
            )
            for error in center(results, f'{name} as original').values():
                axes.plot(x, error, 'o', mfc='none', color=color)
        axes.set(xlim=(0, None), xlabel=label.replace('`', ''))
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].set_ylabel('top-1 error, center crop, %')
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        title = (
            "filled: own recipe, ± standard deviation over seeds; open: original's recipe, seed 0"
        )
        figure.legend(
            handles, labels, loc='outside upper center', ncols=4, frameon=False, title=title
        )
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
