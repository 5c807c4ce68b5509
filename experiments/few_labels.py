"""Does AlexNet depend on labels? Pre-trained networks with 10, 50 and 500 labeled images per class.

    python -m experiments.few_labels --scale=small -- --config.data.source=FOLDER

"It depends on labeled data": MobileNet v2 and SqueezeNet are fine-tuned from their ImageNet weights
(`python -m alexnet_jax.hub`), and trained from scratch, for twice as many epochs; the AlexNet of
`folder.py` (at the small scale, of `folder.py:small`) is trained from scratch. FOLDER has train/CLASS/ and
val/CLASS/. Each seed draws its own training images, and the smaller sets are subsets of the larger ones.

All see random crops and flips, in batches of 50. The learning rate follows a cosine from the best of two to
four rates, chosen on seed 10 with 50 images per class.
"""

import pathlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError
from alexnet_jax.input.sources import source as sources
from experiments import ablations, statistics
from experiments import lab as labs

TITLE = 'Few labels: pre-trained networks and training from scratch'
INDEPENDENT = True
NOTES = {
    'full': 'With the learning rates that are best at the small scale.',
    'small': 'On 96-pixel crops of 112-pixel images. The pre-trained networks know these classes: '
    'they are among the thousand that they were trained on, with about 1,300 labels each; Tiny ImageNet '
    'is a subset of ImageNet, so some of these validation images may have been training images. From '
    "scratch, runs are short (6 epochs with 500 images per class), and most of SqueezeNet's were near chance "
    'halfway.',
}


class Net(NamedTuple):
    title: str
    preset: str
    fields: dict
    weights: str  # '': there are none
    tuned: float  # learning rates: fine-tuned, from scratch
    scratch: float


NETS = {
    'mobilenet v2': Net(
        'MobileNet v2',
        'configs/mobilenet.py',
        {'model.padding': 'tensorflow'},
        'hub:coral/mobilenet_v2',
        0.0003,
        0.02,
    ),
    'squeezenet': Net(
        'SqueezeNet v1.0', 'configs/squeezenet.py', {}, 'hub:squeezenet', 0.0001, 0.002
    ),
    'alexnet': Net('AlexNet, quarter width', 'configs/folder.py:small', {}, '', 0.0, 0.02),
    'full alexnet': Net('AlexNet', 'configs/folder.py', {}, '', 0.0, 0.02),
    'quickstart': Net('Quickstart', 'configs/quickstart.py', {}, 'hub:quickstart', 0.01, 0.01),
}
SCALES = {  # networks, changes
    'smoke': (('quickstart',), {'run.log_every': 1}),
    'small': (('mobilenet v2', 'squeezenet', 'alexnet'), {'data.size': 112, 'augment.crop': 96}),
    'full': (
        ('mobilenet v2', 'squeezenet', 'full alexnet'),
        {'data.size': 256, 'augment.crop': 224},
    ),
}
COUNTS = {10: 50.0, 50: 20.0, 500: 3.0}  # images per class: epochs
STARTS = ('fine-tuned', 'from scratch')
LONGER = 2  # times as many epochs from scratch
RECIPE = {
    'data.format': 'u8',
    'augment.area': (),
    'optim.schedule': 'cosine',
    'train.batch': 50,
    'run.eval_every': 1e6,  # at the end
    'run.stuck_after': 0,
    'run.log_every': 20,
}


def run(lab):
    smoke = lab.scale == 'smoke'
    source = lab.value_given('data.source')
    if not (source or smoke or lab.listing):
        raise UserError('give the images, as in -- --config.data.source=FOLDER')
    nets, common = SCALES[lab.scale]
    for seed in range(lab.seeds):
        for count, epochs in ({10: 0.2} if smoke else COUNTS).items():
            last = {}
            if source:
                last['data.source'] = draw(source, lab.folder / f'few-{count}-{seed}', count, seed)
            for name in nets:
                net = NETS[name]
                starts = {'from scratch': {'optim.rate': net.scratch}}
                if net.weights:
                    tuned = {'optim.rate': net.tuned, 'train.init_from': net.weights}
                    starts['fine-tuned'] = tuned
                for start, changes in starts.items():
                    longer = LONGER if start == 'from scratch' else 1
                    changes = changes | net.fields | {'optim.epochs': longer * epochs}
                    title = f'{name} {start} {count}'
                    lab.run(
                        title,
                        seed,
                        net.preset,
                        RECIPE | common | changes,
                        last=last,
                        after=ablations.errors,
                    )


def draw(source: str, folder: pathlib.Path, count: int, seed: int) -> str:
    """Makes a folder of links to `count` training images of each class, and to val/ -> its path.

    Raises UserError if `source` has no train/ and val/, or fewer images in a class.
    """
    rng = np.random.default_rng(seed)
    for kind in kinds(source):
        files = images(kind)
        if len(files) < count:
            raise UserError(f'{kind}: {len(files)} images, fewer than {count}')
        target = folder / 'train' / kind.name
        target.mkdir(parents=True, exist_ok=True)
        for i in rng.permutation(len(files))[:count]:
            link(target / files[i].name, files[i])
    link(folder / 'val', pathlib.Path(source).resolve() / 'val')
    return str(folder)


def kinds(source: str) -> list[pathlib.Path]:
    """Returns the folders train/CLASS/ of a source, sorted; UserError if it has no train/ and val/."""
    root = pathlib.Path(source).resolve()
    if not ((root / 'train').is_dir() and (root / 'val').is_dir()):
        raise UserError(f'--config.data.source={source}: not a folder with train/ and val/')
    return sorted(path for path in (root / 'train').iterdir() if path.is_dir())


def images(kind: pathlib.Path) -> list[pathlib.Path]:
    """Returns the images in the folder of a class, sorted."""
    return sorted(path for path in kind.resolve().rglob('*') if sources.is_image(path.name))


def link(place: pathlib.Path, target: pathlib.Path) -> None:
    if not place.is_symlink():
        place.symlink_to(target)


def center(results, net: str, start: str, count: int) -> dict[int, float]:
    """Returns the top-1 error with the center crop by seed, in percent, of runs that did not diverge."""
    return ablations.of_seeds(results, f'{net} {start} {count}', 'top1_error', 'center')


def report(results) -> str:
    lines = [
        f'| network | {" | ".join(f"{count} images per class" for count in COUNTS)} |',
        f'|---|{"---|" * len(COUNTS)}',
    ]
    most = max(Counter(result['name'] for result in results.values()).values())
    tests = {}
    for name, net in NETS.items():
        for start in STARTS:
            errors = [[*center(results, name, start, count).values()] for count in COUNTS]
            if any(errors):
                cells = [_cell(values, most) for values in errors]
                lines.append(f'| {net.title}, {start} | {" | ".join(cells)} |')
        for count in COUNTS:
            pairs = statistics.by_seed(*(center(results, name, start, count) for start in STARTS))
            if len(pairs) > 1:
                tests[f'{net.title}, {count} per class'] = pairs
    seeds = labs.count(most, 'seed')
    lines += ['', f'Top-1 error with the center crop, in percent; {seeds} unless noted.']
    if tests:
        found = {name: statistics.paired(pairs) for name, pairs in tests.items()}
        corrected = statistics.holm({name: d.p for name, d in found.items()})
        lines += [
            '',
            '| fine-tuned minus from scratch | pairs | points (95% interval) | p | verdict |',
            '|---|---|---|---|---|',
        ]
        for name, pairs in tests.items():
            p = corrected[name]
            verdict = statistics.verdict(found[name].mean, p)
            shown = statistics.interval(found[name])
            lines.append(f'| {name} | {len(pairs)} | {shown} | {p:.2g} | {verdict} |')
        lines += ['', statistics.family(len(tests), 'top-1 error with the center crop')]
    return '\n'.join(lines)


def _cell(errors: list[float], most: int) -> str:
    if not errors:
        return ''
    seeds = f' ({labs.count(len(errors), "seed")})' if len(errors) < most else ''
    return statistics.mean_std(errors) + seeds


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.6), layout='constrained')
    axes = figure.subplots()
    for net, color in zip(NETS.items(), '#0072b2 #d55e00 black black #009e73'.split(), strict=True):
        name, net = net
        for start, style in zip(STARTS, ('o-', 's--'), strict=True):
            found = {count: [*center(results, name, start, count).values()] for count in COUNTS}
            found = {count: errors for count, errors in found.items() if errors}
            if found:
                means, spreads = (
                    [f(e) for e in found.values()] for f in (np.mean, statistics.spread)
                )
                axes.errorbar(
                    [*found],
                    means,
                    spreads,
                    fmt=style,
                    color=color,
                    capsize=3,
                    label=f'{net.title}, {start}',
                )
    axes.set(xscale='log', xticks=[*COUNTS], xticklabels=[*COUNTS], ylim=(0, 100))
    axes.minorticks_off()
    axes.set(
        xlabel='labeled training images per class',
        ylabel='top-1 error, center crop, % (± std over seeds)',
    )
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize='small')
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
