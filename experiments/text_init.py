"""How long does the loss stay at chance with the text's initial values? (§5; `docs/original.md` §3)

    python -m experiments.text_init --scale=small --seeds=2 -- --config.data.source=FOLDER

The standard deviation in conv3 to conv5 is the text's 0.01 (`paper.py:text`) or the source's 0.03
(`paper.py`); the number of classes varies. FOLDER has train/CLASS/ and val/CLASS/, with at least as many
classes as the largest run. A run with N of them takes every (classes // N)-th in the order of their names,
through a folder of links created here.

A run leaves chance at the first logged step from which its training loss stays below 0.95 ln(classes) for
100 steps. It stops then, or after 6,100 steps (full scale: 30,100). The learning rate is constant. The
largest number of classes and the runs at full width have one seed.
"""

import functools
import pathlib
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError
from experiments import ablations, few_labels, statistics, table2
from experiments import lab as labs

TITLE = "How long the loss stays at chance with the text's initial values (§5)"
NOTES = {
    'small': 'The networks are a quarter as wide unless noted, which doubles all standard deviations '
    'but that of conv1 (`config.model.width`), and train on 112-pixel crops of 128-pixel images.'
}
INDEPENDENT = True
INITS = {'text': 'configs/paper.py:text', 'source': 'configs/paper.py'}
WIDE = ' full width'
HOLD = 100  # steps
IMAGENET = (1000, 1_281_167)  # classes, training images
BATCH = 128


class Scale(NamedTuple):
    classes: tuple[int, ...]
    wide: tuple[int, ...]  # numbers of classes that also run at full width
    steps: int
    changes: dict


SCALES = {
    'smoke': Scale((5, 10), (), 4, ablations.TINY),
    'small': Scale(
        (20, 50, 100, 200), (20,), 6000 + HOLD, {**ablations.SMALL, 'data.format': 'u8'}
    ),
    'full': Scale((20, 50, 100, 200, 500, 1000), (), 30_000 + HOLD, {}),
}


def run(lab):
    scale = SCALES[lab.scale]
    common = {
        'train.batch': BATCH,
        'optim.schedule': 'steps',  # without drops
        'run.eval_every': 1e6,  # at the end
        'run.stuck_after': 0,
        'run.log_every': 10,
        **scale.changes,
    }
    source = lab.value_given('data.source')
    if lab.scale == 'smoke' and not source:
        source = table2.draw(lab.folder / 'shapes')
    if not (source or lab.listing):
        raise UserError('give the images, as in -- --config.data.source=FOLDER')
    rows = [(n, '') for n in scale.classes] + [(n, WIDE) for n in scale.wide]
    for seed in range(lab.seeds):
        for classes, wide in rows:
            if seed and (wide or classes == max(scale.classes)):
                continue
            last = {'model.width': 1.0} if wide else {}
            if source:
                folder = lab.folder / f'{classes}-of-{pathlib.Path(source).name}'
                images = subset(source, folder, classes)
                last |= {
                    'data.source': str(folder),
                    'data.store': f'{folder}-store',
                    'optim.epochs': scale.steps * common['train.batch'] / images,
                }
            for init, config in INITS.items():
                until = functools.partial(left, classes=classes)
                lab.run(f'{init} {classes}{wide}', seed, config, common, last=last, until=until)


def subset(source: str, folder: pathlib.Path, classes: int) -> int:
    """Makes a folder of links to some classes, evenly spaced -> its number of training images.

    Raises UserError if `source` has no train/CLASS/ and val/CLASS/, or too few classes.
    """
    kinds = few_labels.kinds(source)
    if len(kinds) < classes:
        raise UserError(
            f'--config.data.source={source}: {len(kinds)} classes, fewer than {classes}'
        )
    chosen = kinds[:: len(kinds) // classes][:classes]
    for train in chosen:
        val = train.parents[1] / 'val' / train.name
        if not val.is_dir():
            raise UserError(f'{val}: missing; give a folder with train/CLASS/ and val/CLASS/')
        for split, kind in (('train', train), ('val', val)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            few_labels.link(folder / split / kind.name, kind)
    there = {link.name: link.resolve() for link in (folder / 'train').iterdir()}
    if there != {kind.name: kind.resolve() for kind in chosen}:
        raise UserError(
            f'{folder}: links to classes other than those of {source}; '
            'store the results in another folder, --results=DIR'
        )
    return sum(len(few_labels.images(kind)) for kind in chosen)


def left(rows, classes: int) -> int | None:
    """Returns the first step from which the loss stays below that of chance for HOLD steps; None if never."""
    step = None
    for row in rows:
        below = row['loss'] < labs.chance(classes)
        step = (step or row['step'] + 1) if below else None
        if step and row['step'] + 1 - step >= HOLD:
            return step
    return None


def leaving(results, name: str) -> dict[int, tuple[str, int]]:
    """Returns ('', step at which the loss leaves chance) by seed, without runs that diverged.

    ('> ', the last step at which it would have been seen to leave) for a run that never did.
    """
    found = {}
    for result in labs.named(results, name):
        if not result['diverged']:
            rows = result['train']
            step = left(rows, result['data']['classes'])
            most = max(rows[-1]['step'] + 1 - HOLD, 1)
            found[result['seed']] = ('> ', most) if step is None else ('', step)
    return found


def rows_of(results) -> list[str]:
    """Returns the rows of the table: numbers of classes in order, then those at full width."""
    found = {result['name'].partition(' ')[2] for result in results.values()}
    return sorted(found, key=lambda row: (WIDE in row, int(row.removesuffix(WIDE))))


def texts(results) -> list[tuple[int, str, int]]:
    """Returns the text's runs, without those at full width: classes, and the two values of `leaving`."""
    return [
        (int(row), *found)
        for row in rows_of(results)
        if WIDE not in row
        for found in leaving(results, f'text {row}').values()
    ]


def law(results) -> tuple | None:
    """Fits a power law of the classes to the text's steps.

    Returns the classes of the runs in the fit, the exponent, and the steps at ImageNet's classes
    (`statistics.power_law`); None for fewer than three runs or two numbers of classes.
    """
    points = [(classes, step) for classes, sign, step in texts(results) if not sign]
    if len(points) < 3 or len({classes for classes, _ in points}) < 2:
        return None
    classes, steps = zip(*points, strict=True)
    return classes, *statistics.power_law(classes, steps, IMAGENET[0])


def report(results) -> str:
    lines = [
        "| classes | text's 0.01: leaves ln(classes) at step, by seed | source's 0.03 | ratio, by seed |",
        '|---|---|---|---|',
    ]
    for row in rows_of(results):
        text, source = (leaving(results, f'{init} {row}') for init in INITS)
        ratios = [
            f'{text[seed][0]}{text[seed][1] / source[seed][1]:.1f}' if not source[seed][0] else '–'
            for seed in text
            if seed in source
        ]
        cells = [_cell(results, f'{init} {row}') for init in INITS]
        lines.append(
            f'| {row.replace(WIDE, "," + WIDE)} | {" | ".join(cells)} | {", ".join(ratios)} |'
        )
    lines += [
        '',
        'A run leaves ln(classes) at the first logged step from which its training loss stays below 0.95 '
        f'ln(classes) for {HOLD} steps; > N: not by step N.',
        '',
        _implied(results),
    ]
    return '\n'.join(lines)


def _cell(results, name: str) -> str:
    each = [f'{sign}{step:,}' for sign, step in leaving(results, name).values()]
    each += ['diverged' for result in labs.named(results, name) if result['diverged']]
    return ', '.join(each) or 'not run'


def _implied(results) -> str:
    """Describes the power law, and what it implies for ImageNet."""
    if not (found := law(results)):
        return "Too few runs with the text's values have left chance for a power law."
    classes, exponent, steps = found
    never = sum(bool(sign) for _, sign, _ in texts(results))
    about = [f'{float(f"{value:.2g}"):,.0f}' for value in steps]
    number, images = IMAGENET
    far = number / max(classes)
    start = (
        f'**Extrapolated, not measured**: at {number:,} classes, {far:.3g} times the largest number in the '
        'fit,'
        if far > 1
        else f'At {number:,} classes'
    )
    return (
        f"With the text's values, the steps grow as classes^{exponent[0]:.2f} ({exponent[1]:.2f} to "
        f'{exponent[2]:.2f}; least squares of the logarithms, {labs.count(len(classes), "run")}'
        f'{", without full width" * any(WIDE in row for row in rows_of(results))}). {start} this law '
        f'gives about {about[0]} steps ({about[1]} to {about[2]}), '
        f'{steps[0] * BATCH / images:.2g} epochs of ImageNet. The 95% intervals assume that the law holds.'
        + f' Runs that never left chance are not in the fit, so it is too low: {never}.'
        * bool(never)
    )


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout='constrained')
    axes = figure.subplots()
    labeled = set()
    for init, color in zip(INITS, ('#d55e00', '#0072b2'), strict=True):
        for row in rows_of(results):
            classes, wide = int(row.removesuffix(WIDE)), WIDE in row
            for sign, step in leaving(results, f'{init} {row}').values():
                label = f'{init}{"," + WIDE if wide else ""}'
                axes.plot(
                    [classes],
                    [step],
                    '^' if sign else 'os'[wide],
                    color=color,
                    mfc='none' if wide else color,
                    label=None if label in labeled else label,
                )
                labeled.add(label)
                if sign:
                    place = {'xytext': (6, 0), 'textcoords': 'offset points', 'va': 'center'}
                    axes.annotate(f'{sign}{step:,}', (classes, step), **place)
    numbers = {int(row.removesuffix(WIDE)) for row in rows_of(results)}
    if found := law(results):
        classes, (exponent, *_), (steps, *_) = found
        ends = np.array([min(classes), max(classes), max(IMAGENET[0], *classes)])
        fitted = steps * (ends / IMAGENET[0]) ** exponent
        axes.plot(ends[:2], fitted[:2], color='black', label=f'text: classes^{exponent:.2f}')
        axes.plot(ends[1:], fitted[1:], ':', color='black', label='extrapolated')
        numbers.add(IMAGENET[0])
    axes.set(xscale='log', yscale='log', xticks=sorted(numbers), xticklabels=sorted(numbers))
    axes.minorticks_off()
    axes.set(xlabel='classes', ylabel='steps until the loss leaves ln(classes)')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize='small')
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
