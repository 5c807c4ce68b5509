"""Deep Compression (Han, Mao, Dally 2015): networks many times smaller with the same error.

    python -m experiments.compression --scale=small

Pruning with retraining, shared weights and Huffman coding made the paper's AlexNet 35 times smaller. Each
network is trained, and compressed with the defaults of `python -m alexnet_jax.compress`. Sizes are those of
the files, mean image included, compared with 4 bytes per parameter.
"""

import pathlib
import shutil

import numpy as np

from alexnet_jax import compress
from alexnet_jax.rundir import directory
from alexnet_jax.training import compression, evaluation
from experiments import lab as labs
from experiments import statistics

TITLE = 'Deep Compression: smaller files at the same error'
INDEPENDENT = True
BUILT_IN = {
    'data.source': 'alexnet_shapes',
    'data.size': 128,
    'data.format': 'u8',
    'augment.crop': 112,
    'train.batch': 96,
    'run.eval_batch': 100,
}
TINY = {'model.width': 0.0625, 'optim.epochs': 0.5, 'optim.drops': (), 'run.log_every': 1}
SCALES = {  # name: preset, changes
    'smoke': {'quickstart': ('configs/quickstart.py', TINY)},
    'small': {
        'quickstart': ('configs/quickstart.py', {}),
        'alexnet_bn': (
            'configs/alexnet_bn.py',
            {
                **BUILT_IN,
                'model.width': 0.125,
                'optim.rate': 0.02,
                'optim.epochs': 36.0,
                'optim.drops': (28.0, 34.0),
            },
        ),
    },
    'full': {'original': ('configs/original.py', {})},
}
NOTES = {
    'small': 'On the built-in dataset of rendered images: the quickstart, and `alexnet_bn` at an eighth of '
    'its width with its schedule.'
}
COLUMNS = (
    'Layers: weights kept; bits per weight, with fixed codes and with Huffman codes; bits of the gap to the '
    "next weight, Huffman-coded; size in percent of float32's, pruned and quantized (P+Q), then also "
    "Huffman-coded (P+Q+H). Right: the paper's AlexNet."
)
plot = None


def run(lab):
    for name, (config, changes) in SCALES[lab.scale].items():
        for seed in range(lab.seeds):
            lab.run(name, seed, config, changes, after=look)


def look(workdir) -> dict:
    """Compresses a run -> the facts in the bundle's card, and which validation images are right."""
    folder = pathlib.Path(f'{workdir}-compressed')
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted analysis
    card = compress.compress(workdir, folder, compression.DEFAULTS)
    hits = evaluation.hits(folder, store=directory.recorded_store(workdir))
    return {
        'facts': card['compression'],
        'measured': card['measured'],
        'hits': statistics.pack(hits),
    }


def report(results) -> str:
    lines = [
        '| network | seed | weights kept, % | float32, kB | compressed, kB | times smaller '
        '| top-1 error, % | compressed, % |',
        '|---|---|---|---|---|---|---|---|',
    ]
    names = dict.fromkeys(r['name'] for r in results.values() if not r['diverged'])
    for r in (r for name in names for r in labs.named(results, name) if not r['diverged']):
        facts = r['extra']['facts']
        lines.append(
            f'| {r["name"]} | {r["seed"]} | {facts["kept"]:.1f} | {facts["dense"] / 1e3:,.0f} '
            f'| {facts["compressed"] / 1e3:,.0f} | {facts["times"]:.1f} '
            f'| {facts["before"]["top1_error"]:.2f} | {r["extra"]["measured"]["top1_error"]:.2f} |'
        )
    lines += [
        '',
        'Errors: validation images, center crop. Compressed minus original, in points:',
        '',
    ]
    for name in names:
        lines.append(f'- {name}: {difference(labs.named(results, name))}')
    lines += ['', COLUMNS]
    for name in names:
        first = labs.named(results, name)[0]
        lines += [
            '',
            f'The layers of {name}, seed {first["seed"]}:',
            '',
            '```',
            compression.table(first['extra']['facts']['layers']),
        ]
        lines.append('```')
    return '\n'.join(lines)


def difference(results: list[dict]) -> str:
    """Describes how the errors of compressed networks differ, over seeds and over images."""
    pairs = [(r, r['extra']) for r in results if not r['diverged']]
    count = pairs[0][0]['data']['counts']['val']
    own, reference = (
        np.stack([statistics.unpack(pair[i]['hits'], count) for pair in pairs]) for i in (1, 0)
    )
    over = statistics.between(*statistics.bootstrap(own, reference), 2)
    errors = [x['measured']['top1_error'] - x['facts']['before']['top1_error'] for _, x in pairs]
    changed = ', '.join(map(str, (own != reference).sum(1)))
    return (
        f'{statistics.interval(statistics.paired(errors))} over {labs.count(len(pairs), "seed")}; 95% '
        f'interval over the {count:,} images (bootstrap): {over}; images flipped between correct and '
        f'incorrect, by seed: {changed}'
    )


if __name__ == '__main__':
    labs.main(__name__)
