"""What each part of the network is worth: `original` without it, paired by seed (§3, §4, §7).

    python -m experiments.ablations --scale=small -- --config.data.source=FOLDER

Runs of one seed see the same pictures in the same order, with the same crops and noise. Of every row:
its error at the end minus that of the reference with the same seed, in points, mean and 95 % interval over
the seeds; positive is worse than the reference. The verdicts are about top-1 errors with ten crops: one
family of tests, one a row. With the centre crop there is the interval over pictures, too.

Beside it the paper's difference and that of the log of 2012, where there are any (`docs/original.md` §0,
§7); 'worse' where the paper gives no number. Of weight decay the paper says only that it lowers the
training error, and this is of the validation error.

The small scale says what a part is worth in a small network. At full scale the presets have their own
schedules, 96 epochs for `one gpu`.
"""

import math
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
    """What is done to the reference, and by how many points of top-1, top-5 error it got worse."""

    changes: dict = {}
    config: str = ORIGINAL
    paper: tuple = ()  # (None, None): worse, but without a number
    log: tuple = ()
    words: str = ''  # of the paper, where `paper` is not what it prints


ROWS = {
    REFERENCE: Row(),
    'tanh': Row({'model.activation': 'tanh'}),
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
    ONE_CROP: Row(paper=(1.5, 1.3), log=(1.55, 1.30)),  # no run of its own: of the reference's
}
TINY = {  # of smoke runs: two steps on the embedded set
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
    'small': 'The networks have a quarter of the width and are trained for 30 epochs, with every change '
    'of rate at the same part of them as in the source, on 112-pixel crops of 128-pixel '
    'pictures.'
}
SMALL = {'data.size': 128, 'augment.crop': 112, 'model.width': 0.25}
SCALES = {  # changes, and the part of the source's epochs
    'smoke': (TINY, 0.008 / 91),
    'small': (SMALL, 30 / 91),
    'full': ({}, 1),
}
THEIRS = (
    '`tanh` has the rates and biases that were chosen for ReLU; `one gpu` and `no talk` are the nets of the '
    "source, with other numbers of kernels. The paper's and the log's differences are of one run each, and "
    'some were measured otherwise: two GPUs on ILSVRC-2010, the first norm only (#167) with a later schedule.'
)
SMOKE = (REFERENCE, 'pooling without overlap', 'one gpu', 'without conv1')
ERRORS = ('top1_error', 'top5_error')


def run(lab):
    changes, part = SCALES[lab.scale]
    if part < 1:
        changes = {**changes, **labs.shortened(ORIGINAL, part)}
    changes = {'run.eval_every': 5.0, **changes}
    for seed in range(lab.seeds):
        for name in SMOKE if lab.scale == 'smoke' else ROWS:
            if name != ONE_CROP:
                row = ROWS[name]
                lab.run(name, seed, row.config, {**changes, **row.changes}, after=errors)


def errors(workdir) -> dict:
    """The errors of a finished run, {'centre': {'top1_error', ...}, 'ten': ...}, in percent."""
    sums = evaluation.compare([workdir])
    return {view: metrics.values(value) for (_, view), value in sums.items()}


def of_seeds(results, name: str, error: str, view: str) -> dict[int, float]:
    """An error of each seed of a row; runs that diverged have none."""
    if name == ONE_CROP:
        name, view = REFERENCE, 'centre'
    return {r['seed']: r['extra'][view][error] for r in labs.named(results, name) if r['extra']}


def differences(results, name: str, error: str, view: str = 'ten') -> list[float]:
    """How much worse than the reference with the same seed, points, for the seeds that both have."""
    own, reference = (of_seeds(results, row, error, view) for row in (name, REFERENCE))
    return [own[seed] - reference[seed] for seed in sorted(own) if seed in reference]


def tested(results) -> dict[str, tuple[statistics.Difference, float]]:
    """Of each row with several pairs its top-1 difference, ten crops, and its p value, corrected."""
    values = {name: differences(results, name, ERRORS[0]) for name in ROWS if name != REFERENCE}
    found = {name: statistics.paired(v) for name, v in values.items() if len(v) > 1}
    corrected = statistics.holm({name: d.p for name, d in found.items()})
    return {name: (d, corrected[name]) for name, d in found.items()}


def agrees(verdict: str, row: Row) -> str:
    """Whether the sign is the paper's, or where it has none the log's, of the top-1 error."""
    theirs = row.paper or row.log
    if not theirs:
        return '–'
    if not verdict:
        return '?'
    worse = theirs[0] is None or theirs[0] > 0
    return 'yes' if (verdict == 'worse') == worse else 'no'


def measured(values) -> str:
    """Mean and 95 % interval."""
    return statistics.interval(statistics.paired(values)) if values else 'not measured'


def theirs(values: tuple, digits: int) -> str:
    if values == (None, None):
        return 'worse'
    return ' / '.join('–' if v is None else f'{v:+.{digits}f}' for v in values)


def report(results) -> str:
    reference = [[*of_seeds(results, REFERENCE, error, 'ten').values()] for error in ERRORS]
    if not reference[0]:
        return 'The reference has not been run, or always diverged.'
    lines = [
        f'Reference (`original`), ten crops, {labs.count(len(reference[0]), "seed")}: top-1 error '
        f'{statistics.mean_std(reference[0])} %, top-5 error {statistics.mean_std(reference[1])} % (± '
        'standard deviation). The others, in points more than it (positive: worse), mean and 95 % interval '
        'of the pairs:',
        '',
        '| row | pairs | top-1, ten crops | p | verdict | the paper | log of 2012 | same sign '
        '| top-5, ten crops | top-1, centre crop | the same over pictures |',
        '|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    tests = tested(results)
    for name, row in ROWS.items():
        if name == REFERENCE:
            continue
        first, fifth = (differences(results, name, error) for error in ERRORS)
        runs = labs.named(results, name)
        pairs = [str(len(first))]
        for word, many in (
            ('diverged', sum(r['diverged'] for r in runs)),
            ('at chance at the end', sum(map(labs.at_chance, runs))),
        ):
            pairs += [f'{many} {word}'] if many else []
        p = verdict = ''
        if name in tests:
            difference, corrected = tests[name]
            p, verdict = f'{corrected:.2g}', statistics.verdict(difference.mean, corrected)
        sign = agrees(verdict, row) if first else ''
        centre = pictures = ''
        if name != ONE_CROP:
            centre = measured(differences(results, name, ERRORS[0], 'centre'))
            pictures = statistics.over_pictures(runs, labs.named(results, REFERENCE))
        lines.append(
            f'| {name} | {", ".join(pairs)} | {measured(first)} | {p} | {verdict} '
            f'| {row.words or theirs(row.paper, 1)} | {theirs(row.log, 2)} | {sign} '
            f'| {measured(fifth)} | {centre} | {pictures} |'
        )
    if tests:
        of = 'top-1 error with ten crops of every row with several pairs'
        lines += ['', statistics.family(len(tests), of)]
    return '\n'.join([*lines, '', same_pictures(results), '', THEIRS])


def same_pictures(results) -> str:
    """What the spread over seeds leaves out."""
    pictures = labs.named(results, REFERENCE)[0]['data']['counts']['val']
    error = np.mean([*of_seeds(results, REFERENCE, ERRORS[0], 'ten').values()]) / 100
    alone = 100 * (error * (1 - error) / pictures) ** 0.5
    return (
        f'All seeds are judged by the same {pictures:,} pictures: what other pictures would have said is '
        'in no interval over seeds. The last column has it, by a paired bootstrap over the pictures (95 %); '
        '"—" where a run did not keep which pictures were right. Of one network by itself the standard '
        f'error over pictures is {alone:.1f} points.'
    )


def plot(results, file):
    from matplotlib.figure import Figure

    shown = [name for name in ROWS if name != REFERENCE and differences(results, name, ERRORS[0])]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(shown)), layout='constrained')
    for i, (axes, error) in enumerate(zip(figure.subplots(1, 2, sharey=True), ERRORS, strict=True)):
        for y, name in enumerate(shown):
            values = differences(results, name, error)
            found = statistics.paired(values)
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
                label='measured, 95 % interval over seeds'
                if several
                else f'measured, {found.note or "one pair"}',
            )
        for source, marker, colour in (('paper', 'D', '#d55e00'), ('log', '+', '#0072b2')):
            there = {y: getattr(ROWS[name], source)[i:] for y, name in enumerate(shown)}
            points = {y: value[0] for y, value in there.items() if value and value[0] is not None}
            axes.plot(
                [*points.values()],
                [*points],
                marker,
                color=colour,
                mfc='none',
                ms=8,
                label={'paper': 'the paper', 'log': 'log of 2012'}[source],
            )
        for y, name in enumerate(shown):  # the paper, where it gives no number, or not quite one
            paper = (*ROWS[name].paper, None, None)[:2]
            words = ROWS[name].words if paper[i] is not None else ''
            words = 'worse' if ROWS[name].paper == (None, None) else words
            axes.text(85, y, words, ha='right', va='center', color='#d55e00', size=8)
        axes.axvline(0, color='#777777', lw=0.8)
        # a row that stays at chance must not squeeze the others
        axes.set_xscale('symlog', linthresh=10)
        ticks = (-50, -10, -5, 0, 5, 10, 50)
        least = min((np.mean(differences(results, name, error)) for name in shown), default=0)
        axes.set(
            xlabel=f'top-{(1, 5)[i]} error, points more than the reference\n(beyond 10: logarithmic)',
            xticks=ticks,
            xticklabels=ticks,
            xlim=(min(-8, 1.2 * least), 90),
            yticks=range(len(shown)),
            yticklabels=[
                name + ' (at chance)' * any(map(labs.at_chance, labs.named(results, name)))
                for name in shown
            ],
        )
        axes.spines[['top', 'right']].set_visible(False)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))  # every row has labelled its own
    figure.legend(each.values(), each, loc='outside upper center', ncols=len(each), frameon=False)
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
