"""Figure 3: the kernels of conv1; one tower for gray patterns, one for color (§6.1).

    python -m experiments.fig3_filters --scale=full                       # `original` on ImageNet
    python -m experiments.fig3_filters --scale=small -- --config.data.source=FOLDER
    python -m experiments.fig3_filters --run=runs/original                # stores nothing

The paper: "The kernels on GPU 1 are largely color-agnostic, while the kernels on GPU 2 are largely
color-specific. This kind of specialization occurs during every run and is independent of any particular
random weight initialization (modulo a renumbering of the GPUs)." We measure two numbers per kernel:

    color         the share of its sum of squares that remains after subtracting the mean of R, G and B at
                  every position: 0 for a gray pattern, 1 for one that does not respond to gray, 0.67 for
                  noise
    orientation   1 minus the circular variance of its gradient directions, weighted by their squares: 1 for
                  edges in a single direction, near 0 for a spot and for noise

`fig4_retrieval` analyzes the same runs.
"""

import base64
import io

import jax
import numpy as np
from PIL import Image

from alexnet_jax import visualize
from alexnet_jax.common import paths
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.nets import network
from alexnet_jax.training import inference, progress
from experiments import lab as labs
from experiments import statistics

TITLE = 'Figure 3: what the two towers specialize in (§6.1)'
TAKES_RUNS = True
CONFIG = 'configs/original.py'
NOTES = {
    'small': 'The network is `original` at a quarter of its width, trained for a third of its '
    'schedule (30.33 epochs) on 112-pixel crops of 128-pixel images, from a raw store.'
}
SMALL = {'data.size': 128, 'data.format': 'u8', 'augment.crop': 112}
SCALES = {  # fraction of the schedule, changes
    'smoke': (
        0.0002,
        {
            **SMALL,
            'data.source': 'alexnet_shapes',
            'model.width': 0.0625,
            'train.batch': 8,
            'run.eval_batch': 100,
            'run.log_every': 1,
        },
    ),
    'small': (1 / 3, {**SMALL, 'model.width': 0.25, 'run.log_every': 100}),
    'full': (1.0, {'run.log_every': 1000}),
}


def run(lab):
    train(lab, look)


def train(lab, after):
    """Makes the runs of figures 3 and 4, and stores what `after` finds in them."""
    part, changes = SCALES[lab.scale]
    changes = {**labs.shortened(CONFIG, part), **changes}
    for seed in range(lab.seeds):
        lab.run('original', seed, CONFIG, changes, after=after)


def look(workdir) -> dict:
    """Returns an image of conv1's kernels, and the measures of each at the start and end of training."""
    trained = inference.open_run(workdir, meshes.make((1, 1), towers=1, batches={}))
    kernels = visualize.first_kernels(trained)
    seed, crop = trained.config['seed'], trained.config['augment']['crop']
    fresh = jax.jit(lambda: network.init(trained.net, jax.random.key(seed), crop))()
    return {
        'picture': packed(progress.kernel_picture(kernels), 'PNG'),
        'start': measures(np.asarray(trained.net.first_kernels(fresh['params']))),
        'end': measures(kernels),
    }


def measures(kernels: np.ndarray) -> dict[str, list]:
    """Kernels f32[T,h,w,3,C] -> 'color', 'orientation', 'energy' (sum of squares) by tower and kernel."""
    numbers = {
        'color': color(kernels),
        'orientation': orientation(kernels),
        'energy': (kernels**2).sum((1, 2, 3)),
    }
    return {
        name: [[float(f'{x:.4g}') for x in tower] for tower in values]
        for name, values in numbers.items()
    }


def color(kernels: np.ndarray) -> np.ndarray:
    """f32[T,h,w,3,C] -> f32[T,C]; see the module docstring."""
    own = kernels - kernels.mean(3, keepdims=True)
    return (own**2).sum((1, 2, 3)) / np.maximum((kernels**2).sum((1, 2, 3)), 1e-30)


def orientation(kernels: np.ndarray) -> np.ndarray:
    """f32[T,h,w,3,C] -> f32[T,C]; see the module docstring."""
    y, x = np.gradient(kernels.astype(np.float64), axis=(1, 2))
    turned = (x + 1j * y) ** 2  # opposite gradients count as the same direction
    return np.abs(turned.sum((1, 2, 3))) / np.maximum(np.abs(turned).sum((1, 2, 3)), 1e-30)


def packed(picture: np.ndarray, format: str) -> str:
    """Encodes an image u8[H,W,3] as text, for a results file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(text: str) -> np.ndarray:
    """Inverts `packed`."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert('RGB'))


def called(result) -> str:
    return f'{result["name"]}, seed {result["seed"]}'


def report(results) -> str:
    lines = [
        '| run | tower | kernels | color, mean | weighted by energy | orientation, mean |',
        '|---|---|---|---|---|---|',
    ]
    compared = {
        key: statistics.welch(*result['extra']['end']['color'])
        for key, result in results.items()
        if result['extra'] and len(result['extra']['end']['color']) == 2
    }
    corrected = statistics.holm({key: d.p for key, d in compared.items()})
    sentences, found = [], []
    for key, result in results.items():
        if not result['extra']:
            lines.append(f'| {called(result)} | diverged | | | | |')
            continue
        end = result['extra']['end']
        for t, (share, direction, energy) in enumerate(
            zip(end['color'], end['orientation'], end['energy'], strict=True)
        ):
            lines.append(
                f'| {called(result)} | {t} | {len(share)} | {np.mean(share):.2f} '
                f'| {np.average(share, weights=energy):.2f} | {np.mean(direction):.2f} |'
            )
        if key not in compared:
            continue
        words = []
        for name in ('color', 'orientation'):
            d, before = (
                statistics.welch(*result['extra'][when][name]) for when in ('end', 'start')
            )
            p = f', p = {corrected[key]:.2g}' if name == 'color' else ''
            words.append(
                f'{name} {statistics.interval(d)}{p}, before training {statistics.interval(before)}'
            )
        survives = statistics.verdict(compared[key].mean, corrected[key])
        found.append(int(compared[key].mean > 0) if survives else None)
        sentences.append(f'- {called(result)}, tower 1 minus tower 0: {"; ".join(words)}.')
    lines += [
        '',
        "Color: the share of a kernel's sum of squares that remains after subtracting the mean of R, G and "
        'B at every position (gray: 0); weighted by energy: by the sum of squares. Orientation: 1 minus the '
        'circular variance of the gradients (1: edges in one direction; near 0: a spot or noise). Before '
        'training all kernels are noise, with a color of 0.67; any difference between the towers is due to '
        'chance.',
        '',
    ]
    lines += sentences
    if found:
        each = found.count(0), found.count(1)
        lines.append(
            f'- One tower is more color-specific in {sum(each)} of {len(found)} runs, by the corrected p '
            f'(tower 0 in {each[0]}, tower 1 in {each[1]}); the paper: largely so, in every run.'
        )
    if drawn(results):
        lines.append(
            '- Figure: for each run, the kernels of tower 0 above those of tower 1. All kernels of a run '
            'share one scale: black is the smallest weight, white the largest.'
        )
    if compared:
        of = 'the final color of the kernels, tower 1 minus tower 0, for each run'
        lines += ['', statistics.family(len(compared), of, "Welch's t over kernels")]
    return '\n'.join(lines)


def drawn(results) -> list:
    """Returns the results whose kernels are in the figure."""
    return [result for result in results.values() if result['extra']]


def figure(results):
    """Draws the kernels of every run, one tower below the other, as a matplotlib figure.

    If there are several runs, each has its name as a title.
    """
    from matplotlib.figure import Figure

    shown = drawn(results)
    pictures = [unpacked(result['extra']['picture']) for result in shown]
    heights, widths = zip(*(picture.shape[:2] for picture in pictures), strict=True)
    # inches, at 25 weights each
    size = max(widths) / 25 + 0.8, sum(heights) / 25 + 0.65 * len(shown)
    made = Figure(figsize=size, layout='constrained')
    made.get_layout_engine().set(h_pad=0.2)  # above and below each run; towers are 0.28 apart
    grid = made.subplots(len(shown), 1, squeeze=False, height_ratios=heights)
    for axes, result, picture in zip(grid.flat, shown, pictures, strict=True):
        axes.imshow(picture, interpolation='nearest')
        axes.set_anchor('W')
        towers = len(result['extra']['end']['color'])
        rows = np.flatnonzero((picture < 255).any((1, 2)))  # pixel rows that show kernels
        middles = [part.mean() for part in np.array_split(rows, towers)]
        axes.set_yticks(middles, [f'tower {t}' for t in range(towers)], va='center')
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(shown) > 1:
            axes.set_title(called(result), loc='left', fontsize=10, parse_math=False)
    return made


def plot(results, file):
    if drawn(results):
        buffer = io.BytesIO()
        figure(results).savefig(buffer, format='png', dpi=150, bbox_inches='tight')
        paths.replace(file, buffer.getvalue())


if __name__ == '__main__':
    labs.main(__name__)
