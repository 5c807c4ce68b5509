"""Figure 1: ReLU reaches 25 % training error on CIFAR-10 several times sooner than tanh (§3.1).

    python -m experiments.fig1_relu_tanh --scale=full -- --config.data.source=FOLDER

The paper: "a four-layer convolutional neural network with ReLUs reaches a 25 % training error rate
on CIFAR-10 six times faster than an equivalent network with tanh neurons. The learning rates for
each network were chosen independently to make training as fast as possible. No regularization of any
kind was employed." It does not name the network. Ours: cuda-convnet's 19 % network, three
convolutions and the last layer, without weight decay, crops or flips (`original.md` §8).

For each activation the rate with the lowest training error in the third epoch is taken, of RATES;
then every seed runs with it until 25 %. Training error: over successive blocks of 10,000 pictures as they
were trained on, as cuda-convnet printed it; the target is reached where the first block is at or below it.
"""

import math

import numpy as np

from experiments import lab as labs

TITLE = 'Figure 1: ReLU against tanh on CIFAR-10 (§3.1)'
TARGET = 25.0  # % training error
RATES = (0.0005, 0.001, 0.002, 0.004, 0.008)
NETS = {'ReLU': 'configs/cifar10.py:fig1', 'tanh': 'configs/cifar10.py:fig1_tanh'}
CHOICES = (
    'The paper does not name its network. Ours, by our own choice: the 19 % network of cuda-convnet, three '
    'convolutions and the last layer, without weight decay, crops or flips (`original.md` §8). 25 % is '
    'reached with the first block of 10,000 successive training pictures, as they are trained on, whose '
    'error is not above it; from the end of the block before to its own a straight line is drawn.'
)
SCALES = {  # rates, epochs of the sweep and, at the most, to the target, further changes
    'smoke': (RATES[1:3], 1.0, 2.0, {'data.source': 'alexnet_shapes', 'run.log_every': 4}),
    'small': (RATES[1:4], 2.0, 20.0, {'run.log_every': 78}),
    'full': (RATES, 3.0, 150.0, {'run.log_every': 78}),
}


def run(lab):
    rates, sweep, longest, changes = SCALES[lab.scale]
    changes = {**changes, 'run.checkpoint_every': 500, 'run.eval_every': longest}
    for net, config in NETS.items():
        for rate in rates:
            lab.run(f'{net} sweep {rate}', 0, config,
                    {**changes, 'optim.rate': rate, 'optim.epochs': sweep})
        rate = best_rate(lab.results, net)
        for seed in range(lab.seeds):
            lab.run(net, seed, config, {**changes, 'optim.rate': rate, 'optim.epochs': longest},
                    until=lambda rows: reached(rows) is not None)


def best_rate(results, net: str) -> float:
    """The rate whose run in the sweep ended with the lowest training error of its last epoch."""
    swept = rates(results, net)
    return min(swept, key=lambda rate: last_epoch(swept[rate]))


def rates(results, net: str) -> dict:
    """The runs of the sweep by their rates."""
    return {float(r['name'].split()[-1]): r for r in results.values()
            if r['name'].startswith(f'{net} sweep')}  # fmt: skip


def last_epoch(result) -> float:
    """Mean training error, %, of a run's last epoch; infinite if it diverged."""
    rows = result['train']
    if result['diverged'] or not rows:
        return float('inf')
    return float(np.mean([row['top1_error'] for row in rows if row['epoch'] > rows[-1]['epoch'] - 1]))


def reached(rows) -> float | None:
    """The epoch at which the training error falls to TARGET, None if it has not.

    It lies between the ends of the first row that is no more and of the row before, as if the error fell in
    a straight line from one to the other.
    """
    before = (0.0, 90.0)  # chance
    for row in rows:
        here = (row['epoch'], row['top1_error'])
        if here[1] <= TARGET:
            part = (before[1] - TARGET) / (before[1] - here[1])
            return before[0] + part * (here[0] - before[0])
        before = here
    return None


def report(results) -> str:
    lines = [CHOICES, '', '| network | rate | epochs to 25 % training error, by seed | mean ± std |',
             '|---|---|---|---|']  # fmt: skip
    means = {}
    for net in NETS:
        runs = labs.named(results, net)
        if not runs:
            lines.append(f'| {net} | | not run | |')
            continue
        epochs = [reached(result['train']) for result in runs]
        each = ', '.join('not reached' if e is None else f'{e:.1f}' for e in epochs)
        text = ''
        if None not in epochs:
            means[net] = np.mean(epochs), labs.standard_error(epochs)
            text = labs.mean_std(epochs)
        rate, swept = best_rate(results, net), rates(results, net)
        edge = ' (at the edge of the sweep)' if rate in (min(swept), max(swept)) else ''
        lines.append(f'| {net} | {rate:g}{edge} | {each} | {text} |')
    if len(means) == 2:
        ratio = means['tanh'][0] / means['ReLU'][0]
        parts = [error / mean for mean, error in means.values()]
        lines += ['', f'tanh needs {ratio:.1f} ± {ratio * math.hypot(*parts):.1f} times the epochs of ReLU '
                      '(± standard error over seeds; the paper: about 6).']  # fmt: skip
    lines += ['', 'The sweep, training error in % over its last epoch: ' + '; '.join(
        f'{net}: ' + ', '.join(
            f'{rate:g}: {"diverged" if r["diverged"] else f"{last_epoch(r):.1f}"}'
            for rate, r in rates(results, net).items())
        for net in NETS) + '.']  # fmt: skip
    return '\n'.join(lines)


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    for net, colour, style in (('ReLU', '#000000', '-'), ('tanh', '#d55e00', '--')):
        for i, result in enumerate(labs.named(results, net)):
            rows = result['train']
            axes.plot([row['epoch'] for row in rows], [row['top1_error'] for row in rows],
                      style, color=colour, lw=1.2, label=net if i == 0 else None)
    axes.axhline(TARGET, color='#777777', lw=0.8, ls=':')
    axes.set(xlabel='epochs', ylabel='training error, %', ylim=(0, 80), xlim=(0, None))
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
