"""Which initial values and learning rate train tanh units? A sweep, for a fair comparison with ReLU (§3.1).

    python -m experiments.tanh_sweep --scale=small --seeds=1 -- --config.data.source=FOLDER

The paper gives neither. Its initial values suit ReLU: a bias of 1 "accelerates the early stages of learning
by providing the ReLUs with positive inputs", but with it tanh units start close to their bound. So do conv1's
units, whose inputs reach ±100. Each run sets the initial biases, conv1's standard deviation and the
learning rate of `original` or `paper`; ReLU's own rate is swept, too. Based on this sweep,
`paper.py:tanh` and `original.py:tanh` use biases of 0 and a rate of 0.06, the best values or close to them.

Every run has the same few epochs, with the rate divided by 10 after two thirds and five sixths of them.
"""

from typing import NamedTuple

from alexnet_jax.common import configfile
from experiments import ablations, statistics
from experiments import lab as labs

TITLE = 'Initial values and learning rates for tanh (§3.1)'
NOTES = {
    'small': 'The networks are a quarter as wide and are trained for 6 epochs on 112-pixel crops of '
    '128-pixel images.'
}
INDEPENDENT = True


class Setting(NamedTuple):
    preset: str
    activation: str
    biases: float  # initial ones, of the layers that have 1 in the paper
    std: float  # of conv1's initial kernels
    rate: float

    @property
    def name(self) -> str:
        return ' '.join(map(str, self))

    def changes(self) -> dict:
        model = configfile.load(f'configs/{self.preset}.py').model
        return {
            'model.activation': self.activation,
            'model.bias': tuple(self.biases * bias for bias in model.bias),
            'model.std': (self.std, *model.std[1:]),
            'optim.rate': self.rate,
        }


SETTINGS = [
    *(Setting('original', 'relu', 1.0, 0.01, rate) for rate in (0.005, 0.01, 0.02, 0.04)),
    Setting('original', 'tanh', 1.0, 0.01, 0.01),
    *(Setting('original', 'tanh', 0.0, 0.001, rate) for rate in (0.01, 0.03, 0.06, 0.1)),
    *(Setting('original', 'tanh', 0.0, std, 0.03) for std in (0.003, 0.01)),
    Setting('original', 'tanh', 0.0, 0.0003, 0.06),
    Setting('paper', 'relu', 1.0, 0.01, 0.01),
    Setting('paper', 'tanh', 1.0, 0.01, 0.01),
    *(Setting('paper', 'tanh', 0.0, 0.001, rate) for rate in (0.03, 0.06)),
]
COLUMNS = (
    'Biases: those that are 1 in the paper. Final training loss, by seed: mean over the last logged block of '
    'steps (ten at the small scale). Errors: center crop, at the end.'
)
SHORT = {'optim.epochs': 6.0, 'optim.drops': (4.0, 5.0)}
SCALES = {
    'smoke': {**ablations.TINY, 'optim.epochs': 0.008},
    'small': {**ablations.SMALL, **SHORT, 'run.log_every': 10},
    'full': SHORT,
}


def run(lab):
    common = {
        'optim.schedule': 'steps',
        'optim.drops': (),
        'optim.conv1': (),
        'optim.colour_off': 0.0,
        'run.eval_every': 3.0,
        'run.stuck_after': 0,
        **SCALES[lab.scale],
    }
    for seed in range(lab.seeds):
        for setting in SETTINGS[:1] + SETTINGS[5:6] if lab.scale == 'smoke' else SETTINGS:
            config = f'configs/{setting.preset}.py'
            lab.run(setting.name, seed, config, {**common, **setting.changes()})


def report(results) -> str:
    lines = [
        '| preset | activation | biases | std in conv1 | rate | final training loss | top-1 error, % |',
        '|---|---|---|---|---|---|---|',
    ]
    for setting in SETTINGS:
        runs = labs.named(results, setting.name)
        sound = [r for r in runs if not r['diverged']]
        errors = [r['eval'][-1]['top1_error'] for r in sound]
        losses = ', '.join(f'{r["train"][-1]["loss"]:.2f}' for r in sound)
        losses += ', at chance' * any(map(labs.at_chance, sound))
        error = statistics.mean_std(errors) if errors else 'diverged' if runs else 'not run'
        lines.append(f'| {" | ".join(map(str, setting))} | {losses} | {error} |')
    return '\n'.join([*lines, '', COLUMNS])


def plot(results, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout='constrained')
    panels = [('original', 'relu'), ('original', 'tanh'), ('paper', 'tanh')]
    rates = sorted({setting.rate for setting in SETTINGS})
    colors = ['#56b4e9', '#0072b2', '#009e73', '#000000', '#e69f00', '#d55e00', '#cc79a7']
    dashes = {0.01: '-', 0.001: '--', 0.003: ':', 0.0003: '-.'}
    for axes, panel in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        for setting in SETTINGS:
            if setting[:2] != panel:
                continue
            for result in labs.named(results, setting.name)[:1]:
                rows = result['train']
                axes.plot(
                    [row['step'] + 1 for row in rows],
                    [row['loss'] for row in rows],
                    color=colors[rates.index(setting.rate)],
                    ls=dashes[setting.std],
                    lw=2.5 if setting.biases == 1 and panel[1] == 'tanh' else 1.2,
                    label=f'rate {setting.rate}, std {setting.std}, biases {setting.biases:g}',
                )
        axes.set(title=' '.join(panel), xlabel='steps')
        axes.spines[['top', 'right']].set_visible(False)
        if axes.lines:
            below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.13)}
            axes.legend(frameon=False, fontsize=8, **below)
    figure.axes[0].set_ylabel('training loss, nats (seed 0)')
    figure.savefig(file, dpi=150)


if __name__ == '__main__':
    labs.main(__name__)
