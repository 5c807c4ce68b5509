"""Deep Compression: pruning, shared weights and Huffman coding of trained networks.

    python -m experiments.compression --scale=small

Han, Mao, Dally 2015: AlexNet 35 times smaller at the same error. Each network is trained, and compressed with the
defaults of `alexnet_jax.compress`.
"""

import shutil
import sys

import numpy as np

from alexnet_jax import compress
from alexnet_jax.training import evaluation
from alexnet_jax.weights import bundle
from experiments import lab as labs
from experiments import statistics

TITLE = 'Deep Compression'
INDEPENDENT = True
EMBEDDED = {
    'data.source': 'alexnet_shapes',
    'data.size': 128,
    'data.format': 'u8',
    'augment.crop': 112,
    'train.batch': 96,
    'run.eval_batch': 100,
}
NETS = {
    'quickstart': ('configs/quickstart.py', {}),
    'alexnet_bn': (
        'configs/alexnet_bn.py',
        {**EMBEDDED, 'model.width': 0.125, 'optim.epochs': 12.0, 'optim.drops': (8.0, 10.0)},
    ),
}
plot = None


def run(lab):
    for name, (config, changes) in NETS.items():
        for seed in range(lab.seeds):
            lab.run(name, seed, config, changes)
