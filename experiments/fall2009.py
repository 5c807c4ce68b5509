"""The Fall 2009 release of ImageNet: 10,184 classes, half of the images for testing (§6).

    python -m alexnet_jax.prepare --source=/data/fall2009 --val_fraction=0.5
    python -m experiments.fall2009 --scale=full --seeds=1 -- --config.data.source=/data/fall2009

The network is `configs/cnn_star.py:fall2009`, with the sixth convolutional layer. The paper gives neither
its learning rates nor its views; ours are those of #145, and ten crops. The small scale is that of
`experiments/ablations.py`, on any folder of images without val/ and test/; its errors are not comparable
with the paper's.
"""

from experiments import ablations, table1
from experiments import lab as labs

TITLE = 'ImageNet, Fall 2009 release: 10,184 classes (§6)'
CONFIG = 'configs/cnn_star.py:fall2009'
PAPER = {'best published': (78.1, 60.9), 'CNN, six convolutional layers': (67.4, 40.9)}
NOTES = ablations.NOTES
plot = None


def run(lab):
    table1.train(lab, CONFIG)


def report(results) -> str:
    return table1.table(results, PAPER, {'CNN, six convolutional layers': 'ten'})


if __name__ == '__main__':
    labs.main(__name__)
