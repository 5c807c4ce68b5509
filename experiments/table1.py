"""Table 1: errors on the ILSVRC-2010 test set, with one crop and with ten (§6).

    python -m alexnet_jax.prepare --source=/data/ilsvrc2010
    python -m experiments.table1 --scale=full --seeds=1 -- --config.data.source=/data/ilsvrc2010

The folder has train/ and test/ but no val/, so errors are measured on test/, as in the paper. The network is
`configs/original.py:2010`, the run behind the paper's numbers. The small scale is that of
`experiments/ablations.py`, on any folder of images, with this run's schedule; its errors are not comparable
with the paper's.
"""

from experiments import ablations, statistics
from experiments import lab as labs

TITLE = 'Table 1: one crop and ten, compared with earlier methods (§6)'
CONFIG = 'configs/original.py:2010'
PAPER = {  # top-1 and top-5 error, %, ILSVRC-2010 test
    'sparse coding': (47.1, 28.2),
    'SIFT + FVs': (45.7, 25.7),
    'CNN, one crop': (39.0, 18.3),
    'CNN, ten crops': (37.5, 17.0),
}
VIEWS = {'CNN, one crop': 'center', 'CNN, ten crops': 'ten'}
SCALES = {  # changes, and the fraction of the original run's 93 epochs
    'smoke': (ablations.TINY, 0.008 / 93),
    'small': (ablations.SMALL, 1),
    'full': ({}, 1),
}
NOTES = ablations.NOTES
plot = None


def run(lab):
    train(lab, CONFIG)


def train(lab, config: str):
    """Trains one network per seed."""
    changes, part = SCALES[lab.scale]
    if lab.scale != 'full':
        changes = {**changes, **labs.shortened(config, part)}
    for seed in range(lab.seeds):
        lab.run('CNN', seed, config, changes, after=ablations.errors)


def report(results) -> str:
    return table(results, PAPER, VIEWS)


def table(results, paper: dict[str, tuple[float, float]], views: dict[str, str]) -> str:
    """Returns a table of the paper's errors and, for the rows of `views`, ours."""
    runs = [result for result in results.values() if result['extra']]
    pictures = ', '.join(sorted({run['data']['source'] for run in runs}))
    lines = [
        f'| model | the paper: top-1, top-5 error | ours, {pictures}: top-1, top-5 error |',
        '|---|---|---|',
    ]
    for name, (first, fifth) in paper.items():
        ours = ''
        if runs and name in views:
            ours = ', '.join(
                f'{statistics.mean_std([run["extra"][views[name]][error] for run in runs])}%'
                for error in ablations.ERRORS
            )
        lines.append(f'| {name} | {first}%, {fifth}% | {ours} |')
    diverged = len(results) - len(runs)
    seeds = f'{labs.count(len(runs), "seed")}' + (
        f', plus {diverged} that diverged' if diverged else ''
    )
    return '\n'.join([*lines, '', f'{seeds}; mean ± standard deviation.'])


if __name__ == '__main__':
    labs.main(__name__)
