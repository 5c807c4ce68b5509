"""Gathers the results of all experiments in one page.

    python -m experiments.report        # writes experiments/RESULTS.md

Of every experiment: what it is about, and at each scale that was run the command, the table, the figure
(drawn anew) and what it was measured on. What has not been run is there too, with the command that would.
Smoke runs only show that a command works, and are left out.
"""

import argparse
import importlib
import re
import shlex

from alexnet_jax import files
from alexnet_jax.errors import ArgumentParser, run
from experiments import lab as labs

EXPERIMENTS = (
    'fig1_relu_tanh', 'cifar_lrn', 'does_it_train', 'ablations', 'table1', 'table2', 'fig3_filters',
    'fig4_retrieval',
)  # fmt: skip
SCALES = ('full', 'small')
PAGE = labs.HERE / 'RESULTS.md'
INTRO = """# Results

Made by `python -m experiments.report` out of [results/](results), where every run is kept with its rows,
command and versions; not edited by hand. What did not work: [LOG.md](LOG.md). *full* is what the paper
did; *small* is something like it that a small machine can do, and does not speak for it.
"""


def assemble() -> str:
    """The page."""
    return '\n'.join([INTRO, *map(section, EXPERIMENTS)])


def section(name: str) -> str:
    """All about one experiment."""
    module = importlib.import_module(f'experiments.{name}')
    parts = [f'## {module.TITLE}']
    for scale in SCALES:
        there = labs.read(labs.RESULTS / f'{name}-{scale}.json')
        parts.append(f'### {scale.capitalize()} scale')
        if not there:
            parts.append(f'**Not run.** It would be:\n\n```\n{usage(module, scale)}\n```')
            continue
        parts.append('```\n' + '\n'.join(commands(name, scale, there)) + '\n```')
        parts.append(module.report(there))
        if figure := labs.draw(module, there, labs.FIGURES / f'{name}-{scale}.png'):
            parts.append(f'![{module.TITLE}](figures/{figure.name})')
        parts.append(f'Measured: {labs.provenance(there)}')
    return '\n\n'.join(parts) + '\n'


def usage(module, scale: str) -> str:
    """How to run an experiment: the first command of its docstring that names this scale, or any."""
    found = re.findall(r'^ +(python -m \S+ --scale=.*?)(?:  +#.*)?$', module.__doc__, re.MULTILINE)
    same = [line for line in found if f'--scale={scale}' in line]
    name = module.__name__.rpartition('.')[2]
    default = f'python -m experiments.{name} --scale={scale} -- --config.data.source=FOLDER'
    return re.sub(r'--scale=\w+', f'--scale={scale}', (same + found + [default])[0])


def commands(name: str, scale: str, results) -> list[str]:
    """The commands that made some results, as many as had other arguments."""
    start = f'python -m experiments.{name} --scale={scale}'
    runs = [*results.values()]
    lines = []
    for given in sorted({tuple(r['given']) for r in runs}):
        seeds = 1 + max(r['seed'] for r in runs if tuple(r['given']) == given)
        lines.append(f'{start} --seeds={seeds}' + (f' -- {shlex.join(given)}' if given else ''))
    return lines


def main() -> None:
    parser = ArgumentParser(prog='python -m experiments.report', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    files.replace(PAGE, assemble().encode())
    print(f'wrote {PAGE}')


if __name__ == '__main__':
    run(main)
