"""Does the network train from the initial values in the paper? (§5; `docs/original.md` §3)

    python -m experiments.does_it_train --scale=small -- --config.data.source=FOLDER

The paper's text has standard deviation 0.01 in every layer, bias 1 in conv2, conv4, conv5 and the hidden
layers, "to accelerate the early stages of learning", and alpha = 1e-4 in the normalization. The 2012 source
code of the network behind its tables has 0.03 in conv3 to conv5, and alpha divided by the five channels of
the window. Caffe found that bias 1 "gave flat loss" and used 0.1; biases of 0 test whether those of 1
accelerate anything. Each run changes one of these, starting from the text; `original` differs in more
(`configs/original.py`).

A run has learned something once its training loss leaves ln(classes), the loss of pure chance: at the end of
the interval in which it falls below 0.95 ln(classes) for good. Learning rates are the presets' initial ones,
without drops. The small scale has 400 steps, 0.512 epochs of Tiny ImageNet; full scale has 3000, 0.3 epochs
of ImageNet. For a smaller set pass `--config.optim.epochs=STEPS * 128 / IMAGES`.

At the start and at every checkpoint, the mean square of every layer's output (after activation, norm and
pooling) is measured, and the standard deviation of the logits across 64 validation images, spread evenly
over the split.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax import figures
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.input.images import central
from alexnet_jax.nets import network
from alexnet_jax.rundir import checkpoint
from alexnet_jax.training import inference, steps
from experiments import lab as labs
from experiments import statistics

TITLE = "Does it train from the paper's initial values? (§5)"
NOTES = {
    'small': 'The networks are a quarter as wide, which doubles all standard deviations but that of '
    'conv1 (`config.model.width`); the table lists those at full width.'
}
SOURCE_STD = (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)
SMALL_BIAS = (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0)
RUNS = {  # name: std in conv3 to conv5, bias, alpha, config, its changes
    'paper': ('0.01', '1', '1e-4', 'paper.py:text', {}),
    'original': ('0.03', '1', '1e-4 / 5', 'original.py', {}),
    'paper std': ('0.03', '1', '1e-4', 'paper.py:text', {'model.std': SOURCE_STD}),
    'paper bias': ('0.01', '0.1', '1e-4', 'paper.py:text', {'model.bias': SMALL_BIAS}),
    'paper no bias': ('0.01', '0', '1e-4', 'paper.py:text', {'model.bias': (0.0,) * 8}),
    'paper alpha': ('0.01', '1', '1e-4 / 5', 'paper.py:text', {'model.norm_alpha_per': 'window'}),
    'paper std alpha': (
        '0.03',
        '1',
        '1e-4 / 5',
        'paper.py:text',
        {'model.std': SOURCE_STD, 'model.norm_alpha_per': 'window'},
    ),
}
OTHERWISE = (
    '`original` differs from the text in more than these columns: in the order of norm and ReLU, a second '
    'norm in layer 2, the learning rate of the biases, the brightness of noisy images, and the number of '
    'images that share a crop.'
)
STYLES = {  # color-blind safe (Okabe and Ito); the dashes differ too
    'paper': ('#000000', '-'),
    'original': ('#cc79a7', (0, (9, 2))),
    'paper std': ('#d55e00', '--'),
    'paper bias': ('#0072b2', '-.'),
    'paper no bias': ('#56b4e9', (0, (3, 3))),
    'paper alpha': ('#e69f00', ':'),
    'paper std alpha': ('#009e73', (0, (6, 1, 1, 1, 1, 1))),
}
SCALES = {
    'smoke': {
        'data.source': 'alexnet_shapes',
        'data.size': 128,
        'data.format': 'u8',
        'augment.crop': 112,
        'model.width': 0.0625,
        'train.batch': 8,
        'run.eval_batch': 100,
        'run.log_every': 1,
        'run.checkpoint_every': 2,
        'optim.epochs': 0.016,
    },
    'small': {
        'model.width': 0.25,
        'run.log_every': 10,
        'run.checkpoint_every': 50,
        'optim.epochs': 0.512,
    },
    'full': {'run.log_every': 50, 'run.checkpoint_every': 200, 'optim.epochs': 0.3},
}
PICTURES = 64
INDEPENDENT = True


def run(lab):
    common = {
        'optim.schedule': 'steps',
        'optim.drops': (),
        'optim.conv1': (),
        'optim.colour_off': 0.0,
        'run.eval_every': 1000.0,
        'run.stuck_after': 0,
        'run.keep': 20,
        **SCALES[lab.scale],
    }
    chosen = ('paper', 'original') if lab.scale == 'smoke' else RUNS
    for seed in range(lab.seeds):
        for name in chosen:
            config, changes = RUNS[name][-2:]
            lab.run(name, seed, f'configs/{config}', {**common, **changes}, after=look)


def look(workdir) -> dict:
    """Measures the network of a run at its start and at every checkpoint."""
    mesh = meshes.make((1, 1), towers=1, batches={})
    trained = inference.open_run(workdir, mesh)
    kept = checkpoint.Checkpoints(workdir / 'checkpoints').steps()
    store = inference.open_store([trained])
    count = store.counts['val']  # spread over the split, which may be sorted by class
    chosen = np.linspace(0, count - 1, min(count, PICTURES)).astype(int)
    images = figures.squares(store, 'val', chosen)
    crop = trained.config['augment']['crop']
    x = steps.normalize(central(images, crop), central(trained.facts.mean, crop))
    key = jax.random.key(trained.config['seed'])
    first = jax.jit(lambda: network.init(trained.net, key, crop))()
    measure = jax.jit(lambda variables: activations(trained.net, variables, x))
    measured = {'0': plain(measure(first))}
    for step in kept:
        measured[str(step)] = plain(measure(inference.open_run(workdir, mesh, step).variables))
    return {'measured': measured}


def activations(net, variables, x) -> dict:
    """x f32[B,H,W,3] -> the mean square of each layer's output, and the spread of the logits."""
    logits, out, _ = network.apply(net, variables, x)
    squares = {}
    for i in range(len(net.kernels)):
        squares[f'conv{i + 1}'] = out[f'{(net.ops(i) or ["conv"])[-1]}{i + 1}']
    squares |= {name: out[name] for name in ('fc6', 'fc7')} | {'fc8': (logits,)}
    return {
        'squares': {name: jnp.mean(jnp.stack(xs) ** 2) for name, xs in squares.items()},
        'logits_std': jnp.sqrt(jnp.mean(jnp.var(logits, axis=0))),
    }


def plain(tree):
    return jax.tree.map(float, tree)


def left(result) -> int | None:
    """Returns the step at which a run's training loss falls below that of chance for good; None if never."""
    step = None
    for row in result['train']:
        below = row['loss'] < labs.chance(result['data']['classes'])
        step = (step or row['step'] + 1) if below else None
    return step


def report(results) -> str:
    lines = [
        '| init | std in conv3-5 | bias | alpha | leaves ln(classes) at step, by seed | steps trained '
        '| final training loss | final validation error, % | std of logits, start, end |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    sentences = []
    for name, (std, bias, alpha, *_) in RUNS.items():
        runs = labs.named(results, name)
        sound = [r for r in runs if not r['diverged']]
        if not sound:  # or none at all
            what = 'diverged' if runs else 'not run'
            lines.append(f'| {name} | {std} | {bias} | {alpha} | {what} | | | | |')
            continue
        steps_left = [*map(left, sound)]
        made = [r['train'][-1]['step'] + 1 for r in sound]
        length = max(made)
        each = [f'not within {length:,} steps' if s is None else f'{s:,}' for s in steps_left]
        each += ['diverged'] * (len(runs) - len(sound))
        losses = [f'{r["train"][-1]["loss"]:.2f}' for r in sound]
        spreads = [[m['logits_std'] for m in r['extra']['measured'].values()] for r in sound]
        deviations = np.mean([(each[0], each[-1]) for each in spreads], axis=0)
        errors = [r['eval'][-1]['top1_error'] for r in sound if r['eval']]
        lines.append(
            f'| {name} | {std} | {bias} | {alpha} | {", ".join(each)} '
            f'| {", ".join(map(str, made))} | {", ".join(losses)} '
            f'| {statistics.mean_std(errors) if len(errors) == len(sound) else ""} '
            f'| {deviations[0]:.2g}, {deviations[1]:.2g} |'
        )
        words = conclusion(name, [s for s in steps_left if s is not None], len(runs), length)
        if values := later(results, name):
            found = statistics.interval(statistics.paired(values), 0)
            words += f' Steps relative to `paper`, {labs.count(len(values), "pair")}: {found}.'
        sentences.append(words)
    note = '; '.join(f'ln({n}) = {math.log(n):.3f}' for n in classes(results))
    lines += ['', *(f'- {text}' for text in sentences), '', f'Chance: {note}. {OTHERWISE}']
    lines += [
        '',
        'A run leaves ln(classes) at the step from which its training loss stays below 0.95 ln(classes). '
        'Steps relative to `paper`: paired by seed, mean and 95% interval, not corrected. Std of logits: '
        f'over {PICTURES} validation images, mean over the seeds.',
    ]
    return '\n'.join(lines)


def later(results, name: str) -> list[int]:
    """Returns how many steps later than `paper` a row leaves chance, by seed; [] for `paper` itself."""
    own, paper = (
        {r['seed']: left(r) for r in labs.named(results, row) if not r['diverged']}
        for row in (name, 'paper')
    )
    both = [seed for seed in sorted({*own} & {*paper}) if None not in (own[seed], paper[seed])]
    return [own[seed] - paper[seed] for seed in both] if name != 'paper' else []


def classes(results) -> list[int]:
    """Returns the distinct numbers of classes in some results."""
    return sorted({result['data']['classes'] for result in results.values()})


def conclusion(name: str, steps_left: list[int], seeds: int, length: int) -> str:
    """Describes one row."""
    start = f'{name}: the loss left ln(classes) in {len(steps_left)} of {labs.count(seeds, "seed")}'
    if not steps_left:
        return f'{start} within {length:,} steps.'
    between = f'{min(steps_left):,} and {max(steps_left):,}'
    one = min(steps_left) == max(steps_left)
    return f'{start}, {f"at step {steps_left[0]:,}" if one else f"between steps {between}"}.'


def plot(results, file):
    """Draws loss, spread of the logits and initial mean squares; then a panel of mean squares per row."""
    from matplotlib.figure import Figure

    shown = [name for name in STYLES if labs.named(results, name)]
    rows = 1 + math.ceil(len(shown) / 3)
    figure = Figure(figsize=(11, 10 * rows / 3), layout='constrained')
    losses, spreads, start, *rest = figure.subplots(rows, 3).flat
    over_time = dict(zip(shown, rest, strict=False))
    for axes in rest[len(shown) :]:
        axes.remove()
    for axes in over_time.values():
        axes.sharey(start)
    widths = np.linspace(4, 1, len(STYLES))  # keeps coinciding curves visible
    for (name, (color, style)), width in zip(STYLES.items(), widths, strict=True):
        runs = labs.named(results, name)
        for result in runs:
            rows = result['train']
            losses.plot(
                [row['step'] + 1 for row in rows],
                [row['loss'] for row in rows],
                color=color,
                ls=style,
                lw=1.4,
                label=name if result is runs[0] else None,
            )
            if result['seed'] or not result['extra']:
                continue
            measured = result['extra']['measured']
            spreads.plot(
                [*map(int, measured)],
                [m['logits_std'] for m in measured.values()],
                color=color,
                ls=style,
                lw=1.4,
                marker='.',
            )
            squares = measured['0']['squares']
            start.plot([*squares], [*squares.values()], color=color, ls=style, lw=width, marker='.')
            for part, (step, m) in zip(
                np.linspace(0.75, 0, len(measured)), measured.items(), strict=True
            ):
                over_time[name].plot(
                    [*m['squares']],
                    [*m['squares'].values()],
                    color=str(part),
                    lw=1.4,
                    marker='.',
                    label=f'step {int(step):,}',
                )
    for number in classes(results):
        losses.axhline(math.log(number), color='#777777', lw=0.8)
    losses.set(xlabel='steps', ylabel='training loss, nats (line: chance)', xlim=(0, None))
    figure.legend(
        *losses.get_legend_handles_labels(), loc='outside upper center', ncols=6, frameon=False
    )
    spreads.set(xlabel='steps', ylabel='standard deviation of the logits, seed 0', yscale='log')
    for name, axes in {'at the start': start, **over_time}.items():
        axes.set(title=name, yscale='log', ylabel='mean square of outputs, seed 0')
        axes.tick_params(axis='x', rotation=45)
        if axes is not start and axes.lines:
            axes.legend(frameon=False, fontsize=7)
    for axes in (losses, spreads, start, *over_time.values()):
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
