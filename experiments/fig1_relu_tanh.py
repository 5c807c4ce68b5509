"""Figure 1: ReLU reaches 25% training error on CIFAR-10 several times faster than tanh (§3.1).

    python -m experiments.fig1_relu_tanh --scale=full -- --config.data.source=FOLDER

The paper: "a four-layer convolutional neural network with ReLUs reaches a 25% training error rate
on CIFAR-10 six times faster than an equivalent network with tanh neurons. The learning rates for
each network were chosen independently to make training as fast as possible. No regularization of any
kind was employed." It does not say which network. We use cuda-convnet's 19% network, three convolutions and
the last layer, without weight decay, crops or flips (`docs/original.md` §8).

For each activation, the learning rate in RATES with the lowest training error in the third epoch is chosen;
then every seed trains with it until it reaches 25%. The training error is accumulated during training,
over the last epoch, and is updated every 78 batches, a fifth of an epoch. A single block of these 9,984
images reaches 25% earlier (cuda-convnet printed the error of such blocks, of 10,000): every epoch has a new
order here, so images at the start of an epoch were often seen recently, and their error is lower. The table
shows both.
"""

import math

import numpy as np

from experiments import lab as labs
from experiments import statistics

TITLE = 'Figure 1: ReLU against tanh on CIFAR-10 (§3.1)'
TARGET = 25.0  # % training error
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
NETS = {'ReLU': 'configs/cifar10.py:fig1', 'tanh': 'configs/cifar10.py:fig1_tanh'}
CHOICES = (
    'The paper does not name its network. Our choice is the 19% network of cuda-convnet, three '
    'convolutions and the last layer, without weight decay, crops or flips (`docs/original.md` §8). The '
    'training error is accumulated during training and computed after every block of 78 batches '
    '(a fifth of an epoch of CIFAR-10): over the whole preceding epoch, and over the block alone. The latter '
    'is lower at the start of an epoch, when many images have been seen recently. Between blocks it is '
    'interpolated linearly.'
)
SCALES = {  # rates, epochs of the sweep, maximum epochs to the target, further changes
    'smoke': (RATES[1:3], 1.0, 2.0, {'data.source': 'alexnet_shapes', 'run.log_every': 4}),
    'small': (RATES[1:4], 2.0, 20.0, {'run.log_every': 78}),
    'full': (RATES, 3.0, 150.0, {'run.log_every': 78}),
}


def run(lab):
    rates, sweep, longest, changes = SCALES[lab.scale]
    changes = {**changes, 'run.checkpoint_every': 500, 'run.eval_every': longest}
    for net, config in NETS.items():
        for rate in rates:
            lab.run(
                f'{net} sweep {rate}',
                0,
                config,
                {**changes, 'optim.rate': rate, 'optim.epochs': sweep},
            )
        rate = best_rate(lab.results, net)
        for seed in range(lab.seeds):
            lab.run(
                net,
                seed,
                config,
                {**changes, 'optim.rate': rate, 'optim.epochs': longest},
                until=lambda rows: reached(over_an_epoch(rows)) is not None,
            )


def best_rate(results, net: str) -> float:
    """Returns the rate in the sweep with the lowest training error in the last epoch."""
    swept = rates(results, net)
    return min(swept, key=lambda rate: last_epoch(swept[rate]))


def rates(results, net: str) -> dict:
    """Returns the runs of the sweep by rate."""
    return {
        float(r['name'].split()[-1]): r
        for r in results.values()
        if r['name'].startswith(f'{net} sweep')
    }


def last_epoch(result) -> float:
    """Returns a run's mean training error in its last epoch, %; infinite if it diverged or was shorter."""
    rows = [] if result['diverged'] else over_an_epoch(result['train'])
    return rows[-1]['top1_error'] if rows else math.inf


def over_an_epoch(rows) -> list[dict]:
    """Returns the rows from the end of the first epoch, each with the mean error over the epoch before it."""
    many = max(round(1 / rows[0]['epoch']), 1) if rows else 1
    return [
        {
            'epoch': rows[end - 1]['epoch'],
            'top1_error': float(np.mean([row['top1_error'] for row in rows[end - many : end]])),
        }
        for end in range(many, len(rows) + 1)
    ]


def reached(rows) -> float | None:
    """Returns the epoch at which the training error falls to TARGET, None if it has not.

    Interpolates linearly between the first row at or below TARGET and the row before it.
    """
    before = (0.0, 90.0)  # chance
    for row in rows:
        here = (row['epoch'], row['top1_error'])
        if here[1] <= TARGET:
            part = (before[1] - TARGET) / (before[1] - here[1])
            return before[0] + part * (here[0] - before[0])
        before = here
    return None


OVER = {'the last epoch': over_an_epoch, 'the last block': lambda rows: rows}


def report(results) -> str:
    lines = [
        CHOICES,
        '',
        '| network | rate | error over | epochs to 25%, by seed | mean ± std | final epoch, % |',
        '|---|---|---|---|---|---|',
    ]
    found = {over: {} for over in OVER}  # epochs by network and seed
    for net in NETS:
        runs = labs.named(results, net)
        if not runs:
            lines.append(f'| {net} | | | not run | | |')
            continue
        rate, swept = best_rate(results, net), rates(results, net)
        edge = ' (at the edge of the sweep)' if rate in (min(swept), max(swept)) else ''
        ends = ', '.join(f'{last_epoch(result):.1f}' for result in runs)
        for over, rows_of in OVER.items():
            epochs = [reached(rows_of(result['train'])) for result in runs]
            each = ', '.join('not reached' if e is None else f'{e:.1f}' for e in epochs)
            text = ''
            if None not in epochs:
                by_seed = zip((r['seed'] for r in runs), epochs, strict=True)
                found[over][net] = dict(by_seed)
                text = statistics.mean_std(epochs)
            lines.append(f'| {net} | {rate:g}{edge} | {over} | {each} | {text} | {ends} |')
    lines += ['']
    for over, of_nets in found.items():
        seeds = sorted({*of_nets.get('tanh', ())} & {*of_nets.get('ReLU', ())})
        if seeds:
            ratio, *bounds = statistics.ratio(
                *([of_nets[net][seed] for seed in seeds] for net in ('tanh', 'ReLU'))
            )
            spread = statistics.NO_SPREAD
            if math.isfinite(bounds[1]):
                spread = f'95% interval {statistics.between(*bounds, 1, "-")}'
            among = f'{spread}, {len(seeds)} seeds' if len(seeds) > 1 else 'one seed'
            lines.append(
                f'- By the error over {over}, tanh needs {ratio:.1f} times as many epochs as ReLU '
                f'({among}; the paper: about 6).'
            )
        else:
            lines.append(f'- By the error over {over}: not measured.')
    lines += [
        '',
        "Ratios: geometric mean over the seeds that both have, Student's t on the logarithms.",
        '',
        'Training error in the last epoch of the sweep, %: '
        + '; '.join(
            f'{net}: '
            + ', '.join(
                f'{rate:g}: {"diverged" if r["diverged"] else f"{last_epoch(r):.1f}"}'
                for rate, r in rates(results, net).items()
            )
            for net in NETS
        )
        + '.',
    ]
    return '\n'.join(lines)


def plot(results, file):
    from matplotlib.figure import Figure

    if not any(labs.named(results, net) for net in NETS):
        return  # the sweep only
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    for net, color, style in (('ReLU', '#000000', '-'), ('tanh', '#d55e00', '--')):
        for i, result in enumerate(labs.named(results, net)):
            rows = over_an_epoch(result['train'])
            axes.plot(
                [row['epoch'] for row in rows],
                [row['top1_error'] for row in rows],
                style,
                color=color,
                lw=1.2,
                label=net if i == 0 else None,
            )
    axes.axhline(TARGET, color='#777777', lw=0.8, ls=':')
    axes.set(
        xlabel='epochs',
        ylabel='training error over the last epoch, %',
        ylim=(0, 80),
        xlim=(0, None),
    )
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
