"""Table 2: one network, ensembles, and networks pre-trained on more classes (CNN*), §6.

    python -m experiments.table2 --scale=small --seeds=5 -- --config.data.source=FOLDER

`--seeds` is the number of CNNs. There are two CNN*, as in the paper, or one with --seeds=1. The paper's "5
CNNs" had different architectures (`docs/original.md` §7); ours are seeds of `configs/original.py`. "7 CNNs*"
combines the two CNN* and the five CNNs, without runs that diverged. Ensembles average the probabilities of
all networks over ten crops. A different number of seeds needs new ensembles, so keep the run directories.

CNN* (`configs/cnn_star.py`, a sixth convolutional layer) is pre-trained on the larger set of classes. Then
its last layer is replaced and all layers are trained on the classes of the table, with the learning rates of
the 2012 source code (`:finetune`). At the small scale (that of `experiments/ablations.py`) FOLDER is the
larger set, and the table uses the first half of its classes, through a folder of links created here. So
unlike in the paper, CNN* sees the same images of these classes as the CNNs do, plus those of the other half,
for more epochs. The smoke scale does the same with sixty of the built-in images. At full scale the table
uses ILSVRC-2012, and the pre-trained networks must exist for seeds 0 and 1. With the larger set in FALL2011:

    python -m alexnet_jax.prepare --source=FALL2011
    python -m alexnet_jax.main --config=configs/cnn_star.py --config.data.source=FALL2011 \\
        --config.seed=0 --workdir=runs/table2-full/pretrained-0
    python -m experiments.table2 --scale=full --seeds=5
"""

import functools
import os
import pathlib
import shutil

from alexnet_jax.common.errors import UserError
from alexnet_jax.input import sources
from alexnet_jax.input.sources import shapes
from alexnet_jax.training import evaluation, metrics
from experiments import ablations, statistics
from experiments import lab as labs

TITLE = 'Table 2: ensembles, and networks pre-trained on more classes (§6)'
CNN, STAR, FINETUNE = 'configs/original.py', 'configs/cnn_star.py', 'configs/cnn_star.py:finetune'
STARS = 2
SIFT = 'SIFT + FVs'  # an earlier method
PAPER = {  # ILSVRC-2012: top-1 and top-5 validation error, top-5 test error
    SIFT: ('–', '–', '26.2%'),
    '1 CNN': ('40.7%', '18.2%', '–'),
    '5 CNNs': ('38.1%', '16.4%', '16.4%'),
    '1 CNN*': ('39.0%', '16.6%', '–'),
    '7 CNNs*': ('36.7%', '15.4%', '15.3%'),
}
SHAPES = {'train': 40, 'validation': 20}  # images of the built-in dataset in a smoke run
NOTES = ablations.NOTES
plot = None


def run(lab):
    changes, part = ablations.SCALES[lab.scale]
    finetune = changes
    more, fewer = {}, {}  # the location of the images
    if lab.scale != 'full':
        changes, finetune = (
            {**changes, **labs.shortened(config, part)} for config in (CNN, FINETUNE)
        )
        source = lab.value_given('data.source')
        if lab.scale == 'smoke' and not source:
            source = draw(lab.folder / 'shapes')
            more = {'data.source': source, 'data.store': f'{source}-store'}
        if not source:
            raise UserError('table2: give a folder of images, -- --config.data.source=FOLDER')
        if lab.value_given('data.val_fraction'):
            raise UserError(
                'table2: data.val_fraction would only apply to the larger set of classes; omit it, '
                'and give a folder with train/ and val/ if the split matters'
            )
        half = first_half(source, lab.folder / f'half-of-{pathlib.Path(source).name}')
        fewer = {'data.source': half, 'data.store': f'{half}-store'}
    changes, finetune = ({'run.eval_every': 5.0, **fields} for fields in (changes, finetune))
    stars = min(STARS, lab.seeds)
    pretrained = [lab.workdir('pretrained', seed) for seed in range(stars)]
    for first in pretrained if lab.scale == 'full' else ():
        if not first.exists():
            raise UserError(
                f'{first}: needs a network pre-trained on more classes; '
                'see python -m experiments.table2 --help for the commands'
            )

    for seed in range(lab.seeds):
        lab.run('cnn', seed, CNN, changes, last=fewer, after=functools.partial(alone, '1 CNN'))
    together(lab, 'CNNs', cnns := sound(lab, 'cnn', lab.seeds))
    for seed, first in enumerate(pretrained):
        if lab.scale != 'full':
            lab.run('pretrained', seed, STAR, changes, last=more)
        lab.run(
            'star',
            seed,
            FINETUNE,
            {**finetune, 'train.init_from': str(first)},
            last=fewer,
            after=functools.partial(alone, '1 CNN*'),
        )
    if starred := sound(lab, 'star', stars):
        together(lab, 'CNNs*', {**starred, **cnns})


def sound(lab, name: str, seeds: int) -> dict[str, pathlib.Path]:
    """Returns the run directories of the first seeds, by key, without those that diverged."""
    found = {f'{name}-{seed}': lab.workdir(name, seed) for seed in range(seeds)}
    return {key: workdir for key, workdir in found.items() if not lab.results[key]['diverged']}


def together(lab, label: str, runs: dict[str, pathlib.Path]) -> None:
    """Evaluates several networks as an ensemble and stores the errors with the first of them."""
    if len(runs) > 1:
        lab.extend(next(iter(runs)), f'{len(runs)} {label}', errors, *runs.values())


def errors(*workdirs) -> dict:
    """Returns the ten-crop errors, in percent, of the averaged predictions of some networks."""
    *_, sums = evaluation.compare(workdirs, views=('ten',)).values()  # the last is the ensemble's
    return metrics.values(sums)


def alone(label: str, workdir) -> dict:
    return {label: errors(workdir)}


def draw(folder: pathlib.Path) -> str:
    """Writes some images of the built-in dataset to a folder."""
    for split, count in SHAPES.items():
        for index in range(count):
            data, label, _ = shapes.render(shapes.SEED, shapes.SPLITS[split][0], index)
            place = folder / {'validation': 'val'}.get(split, split) / shapes.NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f'{index}.jpg').write_bytes(data)
    return str(folder)


def first_half(source: str, folder: pathlib.Path) -> str:
    """Creates a folder of links to the images of the first half of a folder's classes."""
    if folder.exists():
        link, root = next(folder.glob('*/*/*')), os.path.abspath(os.path.expanduser(source))
        if not os.readlink(link).startswith(f'{root}/'):
            raise UserError(
                f'{folder}: holds links to images outside {root}; '
                'store the results in another folder, --results=DIR'
            )
        return str(folder)
    if not sources.is_path(source):
        raise UserError(f'{source}: must be a folder, since half of its classes will be linked')
    opened = sources.open_source(source)
    begun = folder.with_name(f'{folder.name}.begun')
    shutil.rmtree(begun, ignore_errors=True)
    for split in opened.splits:
        for index, picture in enumerate(opened.read(split, 0)):
            if picture.label < len(opened.class_names) // 2:
                place = begun / split / f'{picture.label:05d}'
                place.mkdir(parents=True, exist_ok=True)
                (place / str(index)).symlink_to(os.path.abspath(picture.name))
    begun.rename(folder)
    return str(folder)


def report(results) -> str:
    found = {}  # by row, the errors of every run or of the ensemble
    for result in results.values():
        for name, values in (result['extra'] or {}).items():
            found[name] = [*found.get(name, []), values] if name.startswith('1 ') else [values]
    pictures = sorted({result['data']['source'] for result in results.values() if result['extra']})
    lines = [
        '| model | the paper, ILSVRC-2012 validation: top-1, top-5 error | the paper, test: top-5 error '
        f'| ours, {", ".join(pictures)}: top-1, top-5 error | runs |',
        '|---|---|---|---|---|',
    ]
    names = {*PAPER, *found} - {SIFT}
    for name in [SIFT, *sorted(names, key=lambda name: ('*' in name, int(name.split()[0])))]:
        *validation, test = PAPER.get(name, ('', ''))
        values = found.get(name, [])
        ours = (
            ', '.join(
                f'{statistics.mean_std([value[error] for value in values])}%'
                for error in ablations.ERRORS
            )
            if values
            else ''
        )
        ours = 'not measured' if name == SIFT else ours
        lines.append(
            f'| {name} | {", ".join(validation)} | {test} | {ours} | {len(values) or ""} |'
        )
    lines += ['', 'Test errors cannot be measured here: the labels of the test set are not public.']
    diverged = sum(result['diverged'] for result in results.values())
    return '\n'.join(
        [*lines, *(['', f'{labs.count(diverged, "run")} diverged.'] if diverged else [])]
    )


if __name__ == '__main__':
    labs.main(__name__)
