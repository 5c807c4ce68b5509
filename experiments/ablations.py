"""Ablations: `original` without each of its parts, paired by seed (§3, §4, §7).

    python -m experiments.ablations --scale=small -- --config.data.source=FOLDER

Runs with the same seed see the same images in the same order, with the same crops and noise. Each row shows
its final error minus that of the reference with the same seed, in percentage points: mean and 95% interval
over the seeds; positive means worse than the reference. Verdicts are based on the top-1 error with ten crops;
their tests, one per row, form one family. For the center crop there is also an interval over images.

The table also has the difference in the paper and in the 2012 log, if any (`docs/original.md` §0, §7), or
'worse' if the paper gives no number. A second table is about training, for the parts whose effect on it the
paper describes: ReLU, overlapping pooling, crops and flips, dropout, and weight decay. Its tests form another
family.

The small scale shows the effect of each part in a small network, all rows with the schedule of `original`
(91 epochs). At full scale the presets keep their own; that of `one gpu` has 96.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from alexnet_jax.training import evaluation, metrics
from experiments import lab as labs
from experiments import statistics

TITLE = 'Ablations of the ImageNet network (§3, §4, §7)'
REFERENCE, ONE_CROP = 'reference', 'one crop'
ORIGINAL = 'configs/original.py'
INDEPENDENT = True


class Row(NamedTuple):
    """The changes, and how much worse the paper and the log found them, in points of top-1, top-5 error."""

    changes: dict = {}
    config: str = ORIGINAL
    paper: tuple = ()  # (None, None): worse, but no number given
    log: tuple = ()
    words: str = ''  # the paper's wording, if not an exact number


ROWS = {
    REFERENCE: Row(),
    'tanh': Row({'model.activation': 'tanh'}),
    'tanh at its best': Row(config='configs/original.py:tanh'),
    'no norms': Row({'model.norms': 'none'}, paper=(1.4, 1.2), log=(1.37, 1.15)),
    'first norm only': Row({'model.norms': 'first'}, log=(-0.18, -0.09)),
    'pooling without overlap': Row(
        {'model.pooling': 'disjoint'}, paper=(0.4, 0.3), log=(0.39, 0.30)
    ),
    'one gpu': Row(config='configs/one_gpu.py', paper=(1.7, 1.2), log=(1.70, 1.23)),
    'no talk': Row(config='configs/no_talk.py', log=(1.16, 1.12)),
    'no colour noise': Row({'colour.std': 0.0}, paper=(1.0, None), words='> 1'),
    'no dropout': Row({'model.dropout': 'none'}, paper=(None, None)),
    'no crops and flips': Row({'augment.random': False}, paper=(None, None)),
    'without conv1': Row({'model.remove': 'conv1'}, paper=(None, None)),
    'without conv2': Row({'model.remove': 'conv2'}, paper=(2.0, None), words='≈ 2'),
    'without conv3': Row({'model.remove': 'conv3'}, paper=(2.0, None), words='≈ 2'),
    'without conv4': Row({'model.remove': 'conv4'}, paper=(2.0, None), words='≈ 2'),
    'without conv5': Row({'model.remove': 'conv5'}, paper=(None, None)),
    'no weight decay': Row({'optim.decay': 0.0}),
    ONE_CROP: Row(paper=(1.5, 1.3), log=(1.55, 1.30)),  # uses the reference's runs
}
TINY = {  # smoke runs: two steps on the built-in dataset
    'data.source': 'alexnet_shapes',
    'data.size': 128,
    'data.format': 'u8',
    'augment.crop': 112,
    'model.width': 0.0625,
    'train.batch': 8,
    'run.eval_batch': 100,
    'run.log_every': 1,
}
NOTES = {
    'small': 'The networks are a quarter as wide and are trained on 112-pixel crops of 128-pixel '
    'images, with every learning rate change at the same fraction of training as in the original run.'
}
SMALL = {'data.size': 128, 'augment.crop': 112, 'model.width': 0.25}
SCALES = {  # changes, and the fraction of the original run's epochs
    'smoke': (TINY, 0.008 / 91),
    'small': (SMALL, 1),
    'full': ({}, 1),
}
THEIRS = (
    '`tanh` uses the learning rates and initial values chosen for ReLU, `tanh at its best` its own '
    '(`tanh_sweep.py`; ReLU is at its best in the reference); `one gpu` and `no talk` are the networks of '
    'the 2012 source code, with different numbers of kernels. The differences in the paper and the log come '
    'from one run each, some under different conditions: two GPUs on ILSVRC-2010, first norm only (#167) '
    'with a later schedule.'
)
SPEED = 70.0  # % training error, which ReLU and tanh reach before the rate drops
CLAIMS = {  # what the paper says about training, and a value that is positive if that holds
    'tanh at its best': (
        'ReLUs (§3.1) learn several times faster than tanh',
        f'Epochs to {SPEED:g}% training error with tanh, divided by those with ReLU',
    ),
    'no dropout': (
        'dropout (§4.2) roughly doubles the number of iterations to converge',
        'Steps to converge with it, divided by those without',
    ),
    'pooling without overlap': (
        'overlapping pooling (§3.4) makes overfitting slightly more difficult',
        'Gap without it minus gap with it, points',
    ),
    'no crops and flips': (
        'without crops and flips (§4.1) the network overfits substantially',
        'Gap without them minus gap with them, points (partly because the training images are then easier)',
    ),
    'no weight decay': (
        'weight decay (§5) reduces the training error',
        'Training error without it minus with it, points',
    ),
}
# Ratios, and the smallest that would match the paper's words.
FACTORS = {'tanh at its best': 2, 'no dropout': 2}
POINT = 1.0  # a run has converged if its error is this close to its lowest
SMOKE = (REFERENCE, 'pooling without overlap', 'one gpu', 'without conv1')
ERRORS = ('top1_error', 'top5_error')


def run(lab):
    changes, part = SCALES[lab.scale]
    if lab.scale != 'full':
        changes = {**changes, **labs.shortened(ORIGINAL, part)}
    changes = {'run.eval_every': 5.0, **changes}
    for seed in range(lab.seeds):
        for name in SMOKE if lab.scale == 'smoke' else ROWS:
            if name != ONE_CROP:
                row = ROWS[name]
                lab.run(name, seed, row.config, {**changes, **row.changes}, after=errors)


def errors(workdir) -> dict:
    """Returns the errors of a finished run, {'center': {'top1_error', ...}, 'ten': ...}, in percent."""
    sums = evaluation.compare([workdir])
    return {view: metrics.values(value) for (_, view), value in sums.items()}


def of_seeds(results, name: str, error: str, view: str) -> dict[int, float]:
    """Returns one kind of error by seed for a row, without runs that diverged."""
    if name == ONE_CROP:
        name, view = REFERENCE, 'center'
    return {r['seed']: r['extra'][view][error] for r in labs.named(results, name) if r['extra']}


def differences(results, name: str, error: str, view: str = 'ten') -> list[float]:
    """Returns how much worse a row is than the reference, in points, for every seed that both have."""
    return statistics.by_seed(*(of_seeds(results, row, error, view) for row in (name, REFERENCE)))


def tested(results) -> dict[str, tuple[statistics.Difference, float]]:
    """Returns the top-1 difference with ten crops, and its corrected p value, for rows with several pairs."""
    values = {name: differences(results, name, ERRORS[0]) for name in ROWS if name != REFERENCE}
    found = {name: statistics.paired(v) for name, v in values.items() if len(v) > 1}
    corrected = statistics.holm({name: d.p for name, d in found.items()})
    return {name: (d, corrected[name]) for name, d in found.items()}


class Course(NamedTuple):
    """What the rows of a run say about its training: top-1 errors in percent, loss in nats, steps."""

    training: float  # error in the last tenth of training
    loss: float  # the same, loss
    validation: float  # error at the end, center crop
    gap: float  # validation minus training
    steps: int  # until the first validation error within POINT of the lowest
    epochs: float  # until a training error of SPEED, infinite if the rate drops before


def courses(results, name: str) -> dict[int, Course]:
    """Returns the course of every run of a row by seed, without runs that diverged."""
    found = {}
    for result in labs.named(results, name):
        if result['diverged']:
            continue
        end = result['train'][-1]['epoch']
        rows = [row for row in result['train'] if row['epoch'] > 0.9 * end]
        error, loss = (float(np.mean([row[of] for row in rows])) for of in (ERRORS[0], 'loss'))
        errors = {row['step']: row[ERRORS[0]] for row in result['eval']}
        last, most = errors[max(errors)], min(errors.values()) + POINT + statistics.EQUAL
        steps = min(step for step, error in errors.items() if error <= most)
        epochs = reached(result['train'])
        found[result['seed']] = Course(error, loss, last, last - error, steps, epochs)
    return found


def reached(rows: labs.Rows) -> float:
    """Returns the epoch at which the training error falls to SPEED, by linear interpolation between rows.

    Infinite if the learning rate changes before that.
    """
    before = (0.0, 100.0)
    for row in rows:
        if row['weights'] != rows[0]['weights']:
            break
        here = (row['epoch'], row[ERRORS[0]])
        if here[1] <= SPEED:
            part = (before[1] - SPEED) / (before[1] - here[1])
            return before[0] + part * (here[0] - before[0])
        before = here
    return math.inf


def of_claims(results) -> dict[str, list[float]]:
    """Returns a value per pair for every row of CLAIMS that has pairs, positive if the paper is right.

    For FACTORS, these are logarithms of ratios.
    """
    reference = courses(results, REFERENCE)
    values = {
        'tanh at its best': lambda course: math.log(course.epochs),
        'no dropout': lambda course: -math.log(course.steps),
        'pooling without overlap': lambda course: course.gap,
        'no crops and flips': lambda course: course.gap,
        'no weight decay': lambda course: course.training,
    }
    found = {name: _compared(courses(results, name), reference, values[name]) for name in CLAIMS}
    return {name: pairs for name, pairs in found.items() if pairs}


def _compared(
    own: dict[int, Course], reference: dict[int, Course], value: Callable[[Course], float]
) -> list[float]:
    """Returns own minus reference of a value, for every seed that both have."""
    both = ({seed: value(course) for seed, course in runs.items()} for runs in (own, reference))
    finite = ({seed: v for seed, v in of_seeds.items() if math.isfinite(v)} for of_seeds in both)
    return statistics.by_seed(*finite)


def of_training(results) -> list[str]:
    """Returns the lines about training; [] without a row of CLAIMS."""
    claims = of_claims(results)
    if not claims:
        return []
    reference = courses(results, REFERENCE)
    cells = [
        statistics.mean_std([getattr(course, field) for course in reference.values()], digits)
        for field, digits in (('training', 1), ('loss', 3), ('validation', 1), ('gap', 1))
    ]
    lines = [
        'Training and validation:',
        '',
        '| row | pairs | training, top-1 | training, loss | validation, top-1 | gap '
        f'| epochs to {SPEED:g}%, training | steps to converge, by seed |',
        '|---|---|---|---|---|---|---|---|',
        f'| {REFERENCE} | {len(reference)} | {" | ".join(cells)} | {_epochs(reference)} '
        f'| {_steps(reference)} |',
    ]
    for name in claims:
        own = courses(results, name)
        cells = []
        for field, digits in (('training', 2), ('loss', 3), ('validation', 2), ('gap', 2)):
            found = statistics.paired(_compared(own, reference, operator.attrgetter(field)))
            masked = name == 'no dropout' and field != 'validation'
            cells.append('–' if masked else statistics.interval(found, digits))
        cells += ['–' if name == 'no dropout' else _epochs(own), _steps(own)]
        lines.append(f'| {name} | {len(claims[name])} | {" | ".join(cells)} |')
    found = {name: statistics.paired(values) for name, values in claims.items()}
    corrected = statistics.holm({name: d.p for name, d in found.items()})
    every = min(row['step'] for run in labs.named(results, REFERENCE) for row in run['eval'])
    lines += [
        '',
        'Reference: mean ± standard deviation over the seeds; other rows: difference from it. Training: mean '
        'over the last tenth of the run, with dropout active, so `no dropout` cannot be compared. '
        'Validation: center crop, at the end. Gap: validation minus training. A run has converged at the '
        f'first evaluation within {POINT:g} point of its lowest error. Evaluations are {every:,} '
        'steps apart, and the learning rates drop at the same steps in all runs.',
        '',
    ]
    for name, (claim, value) in CLAIMS.items():
        if name in found:
            number = found[name]
            factor = FACTORS.get(name)
            shown = _ratio(number) if factor else statistics.interval(number)
            short = factor and number.high < math.log(factor)
            verdict = as_claimed(number.mean, corrected[name], factor if short else None)
            lines.append(
                f'- The paper: {claim}. {value}: {shown}, {labs.count(len(claims[name]), "pair")}, '
                f'p = {corrected[name]:.2g}; {verdict}.'
            )
    if 'no dropout' in found:
        gaps = ', '.join(f'{c.gap:.1f}' for c in courses(results, 'no dropout').values())
        lines.append(
            '- The paper: without dropout (§4.2) the network overfits substantially. Gap without it, by '
            f'seed: {gaps} points. The gap with it is not comparable, since its masks raise the training '
            'error.'
        )
    return [*lines, '', statistics.family(len(found), 'the values in this list')]


def as_claimed(mean: float, corrected: float, short_of: float | None = None) -> str:
    """Describes a value that is positive if the paper is right, given its corrected p value.

    short_of: the paper's factor, if the interval is below it.
    """
    if corrected < statistics.LEVEL and mean < 0:
        return 'the opposite of what the paper says'
    if corrected < statistics.LEVEL and not short_of:
        return 'as the paper says'
    if abs(mean) < statistics.EQUAL:
        return 'no difference'
    sign = "the paper's sign" if mean > 0 else 'the opposite sign'
    doubts = ['not significant'] * (corrected >= statistics.LEVEL)
    doubts += [f'less than {short_of:g} times'] if short_of and mean > 0 else []
    return f'{sign}, but {" and ".join(doubts)}'


def _epochs(runs: dict[int, Course]) -> str:
    each = (course.epochs for course in runs.values())
    return ', '.join(f'{epochs:.1f}' if math.isfinite(epochs) else '–' for epochs in each)


def _steps(runs: dict[int, Course]) -> str:
    return ', '.join(str(course.steps) for course in runs.values())


def _ratio(logs: statistics.Difference) -> str:
    """Formats the ratio whose logarithm has this mean and interval."""
    if math.isinf(logs.low):
        return f'{math.exp(logs.mean):.2f}' + (f' ({logs.note})' if logs.note else '')
    between = statistics.between(math.exp(logs.low), math.exp(logs.high), 2, '-')
    return f'{math.exp(logs.mean):.2f} ({between})'


def agrees(verdict: str, row: Row) -> str:
    """Returns whether the top-1 difference has the paper's sign, or the log's if the paper gives none."""
    theirs = row.paper or row.log
    if not theirs:
        return '–'
    if not verdict:
        return '?'
    worse = theirs[0] is None or theirs[0] > 0
    return 'yes' if (verdict == 'worse') == worse else 'no'


def measured(values) -> str:
    """Formats mean and 95% interval."""
    return statistics.interval(statistics.paired(values)) if values else 'not measured'


def theirs(values: tuple, digits: int) -> str:
    if values == (None, None):
        return 'worse'
    return ' / '.join('–' if v is None else f'{v:+.{digits}f}' for v in values)


def report(results) -> str:
    reference = [[*of_seeds(results, REFERENCE, error, 'ten').values()] for error in ERRORS]
    if not reference[0]:
        return 'The reference has not been run, or diverged for every seed.'
    first = next(run for run in labs.named(results, REFERENCE) if run['extra'])
    stored = first.get('fingerprint', {}).get('config', {})
    epochs = stored.get('config.optim.epochs', math.ceil(first['train'][-1]['epoch']))
    lines = [
        f'Reference (`original`), {epochs:g} epochs, ten crops, '
        f'{labs.count(len(reference[0]), "seed")}: top-1 error '
        f'{statistics.mean_std(reference[0])}%, top-5 error {statistics.mean_std(reference[1])}% (± '
        'standard deviation). Other rows: difference from the reference in percentage points (positive: '
        'worse), mean and 95% interval over the pairs.',
        '',
        '| row | pairs | top-1, ten crops | p | verdict | the paper | 2012 log | same sign '
        '| top-5, ten crops | top-1, center crop | center crop, interval over images |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    tests, absent = tested(results), []
    for name, row in ROWS.items():
        if name == REFERENCE:
            continue
        first, fifth = (differences(results, name, error) for error in ERRORS)
        runs = labs.named(results, name)
        if not runs and name != ONE_CROP:
            absent.append(name)
            continue
        pairs = [str(len(first))]
        for word, many in (
            ('diverged', sum(r['diverged'] for r in runs)),
            ('still at chance', sum(map(labs.at_chance, runs))),
        ):
            pairs += [f'{many} {word}'] if many else []
        p = verdict = ''
        if name in tests:
            difference, corrected = tests[name]
            p, verdict = f'{corrected:.2g}', statistics.verdict(difference.mean, corrected)
        sign = agrees(verdict, row) if first else ''
        center = pictures = ''
        if name != ONE_CROP:
            center = measured(differences(results, name, ERRORS[0], 'center'))
            pictures = statistics.over_pictures(runs, labs.named(results, REFERENCE))
        lines.append(
            f'| {name} | {", ".join(pairs)} | {measured(first)} | {p} | {verdict} '
            f'| {row.words or theirs(row.paper, 1)} | {theirs(row.log, 2)} | {sign} '
            f'| {measured(fifth)} | {center} | {pictures} |'
        )
    if absent:
        lines += ['', f'Not run: {", ".join(absent)}.']
    if tests:
        of = 'top-1 error with ten crops, every row with several pairs'
        lines += ['', statistics.family(len(tests), of)]
    lines += ['', same_pictures(results), '', THEIRS]
    training = of_training(results)
    return '\n'.join([*lines, '', *training] if training else lines)


def same_pictures(results) -> str:
    """Describes the uncertainty that intervals over seeds leave out."""
    pictures = labs.named(results, REFERENCE)[0]['data']['counts']['val']
    error = np.mean([*of_seeds(results, REFERENCE, ERRORS[0], 'ten').values()]) / 100
    alone = 100 * (error * (1 - error) / pictures) ** 0.5
    return (
        f'All seeds are evaluated on the same {pictures:,} images, so intervals over seeds do not cover the '
        'choice of images. The last column does, with a paired bootstrap over the images (95%); "—" if a '
        'run did not store which images were classified correctly. For a single network, the standard error '
        f'over images is {alone:.1f} points.'
    )


def plot(results, file):
    from matplotlib.figure import Figure

    shown = [name for name in ROWS if name != REFERENCE and differences(results, name, ERRORS[0])]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(shown)), layout='constrained')
    for i, (axes, error) in enumerate(zip(figure.subplots(1, 2, sharey=True), ERRORS, strict=True)):
        measured = [statistics.paired(differences(results, name, error)) for name in shown]
        for y, found in enumerate(measured):
            several = math.isfinite(found.low)
            axes.errorbar(
                found.mean,
                y,
                xerr=found.high - found.mean if several else None,
                fmt='o',
                mfc='#000000' if several else 'none',
                color='#000000',
                capsize=3,
                ms=4,
                label='measured, 95% interval over seeds'
                if several
                else f'measured, {found.note or "one pair"}',
            )
        for source, marker, color in (('paper', 'D', '#d55e00'), ('log', '+', '#0072b2')):
            there = {y: getattr(ROWS[name], source)[i:] for y, name in enumerate(shown)}
            points = {y: value[0] for y, value in there.items() if value and value[0] is not None}
            axes.plot(
                [*points.values()],
                [*points],
                marker,
                color=color,
                mfc='none',
                ms=8,
                label={'paper': 'the paper', 'log': 'log of 2012'}[source],
            )
        for y, name in enumerate(shown):  # where the paper gives no exact number
            paper = (*ROWS[name].paper, None, None)[:2]
            words = ROWS[name].words if paper[i] is not None else ''
            words = 'worse' if ROWS[name].paper == (None, None) else words
            axes.text(85, y, words, ha='right', va='center', color='#d55e00', size=8)
        axes.axvline(0, color='#777777', lw=0.8)
        # a row that stays at chance must not compress the others
        axes.set_xscale('symlog', linthresh=10)
        ticks = (-50, -10, -5, 0, 5, 10, 50)
        ends = [found.low if math.isfinite(found.low) else found.mean for found in measured]
        highs = [found.high for found in measured if math.isfinite(found.high)]
        axes.set(
            xlabel=f'top-{(1, 5)[i]} error minus that of the reference, points\n(beyond 10: logarithmic)',
            xticks=ticks,
            xticklabels=ticks,
            xlim=(
                min([-8, *(1.2 * end for end in ends)]),
                max([90, *(1.1 * end for end in highs)]),
            ),
            yticks=range(len(shown)),
            yticklabels=[
                name + ' (at chance)' * any(map(labs.at_chance, labs.named(results, name)))
                for name in shown
            ],
        )
        axes.spines[['top', 'right']].set_visible(False)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))  # every row adds a label
    figure.legend(each.values(), each, loc='outside upper center', ncols=len(each), frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
