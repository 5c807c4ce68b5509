"""Batches of up to 32,768 images: linear scaling with warm-up, or LARS. The network of `paper`.

    python -m alexnet_jax.main --config=configs/large_batch.py:8k-lars

Linear scaling, `512`, `1k` (the default), `4k`: the rate is the paper's 0.01 for every 128 images,
and everything else is as in `paper`. Theory suggests the square root, but Krizhevsky found that a
rate proportional to the batch works best (2014, "One weird trick for parallelizing convolutional
neural networks"). Goyal et al. 2017, "Accurate, Large Minibatch SGD", made it a rule for ResNet-50,
with 5 epochs of warm-up; theirs starts at the rate of the small batch, ours at 0.

LARS, `1k-lars` to `32k-lars`: You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional
Networks". Rates and warm-ups are those of the authors' solver files for Caffe's AlexNet, 100 epochs
each (NVIDIA/caffe: models/bvlc_alexnet/solver{,_8K,_16K}.prototxt at c49eb1b6, 4k at 2683ab5f).
They report no loss of accuracy up to 8k. `32k-lars` uses the settings of their AlexNet-BN
(models/alexnet_bn/solver_32k.prototxt), which has batch normalization, unlike ours; You et al. 2018,
"ImageNet Training in Minutes", also train at 32k for 100 epochs. Differences from these files: our
network; warm-up from 0, not from rate 1; biases do not decay. Not yet run here.
"""

from configs import base, paper


def linear(batch: int) -> dict:
    return {
        'train.batch': batch,
        'optim.rate': 0.01 * batch / 128,
        'optim.warmup': 5.0,
    }


def lars(batch: int, rate: float, warmup: float) -> dict:
    return {
        'train.batch': batch,
        'optim.name': 'lars',
        'optim.rate': rate,
        'optim.warmup': warmup,
        'optim.schedule': 'poly',
        'optim.epochs': 100.0,
        'run.log_every': 10,  # at 32k an epoch has 40 steps
    }


VARIANTS = {
    '512': linear(512),
    '1k': linear(1024),
    '4k': linear(4096),
    '1k-lars': lars(1024, rate=2.0, warmup=0.0),
    '4k-lars': lars(4096, rate=10.0, warmup=4.0),  # 1250 steps
    '8k-lars': lars(8192, rate=10.0, warmup=3.8),  # 600 steps
    '16k-lars': lars(16384, rate=16.0, warmup=5.0),  # 400 steps
    '32k-lars': lars(32768, rate=32.0, warmup=10.0),  # 400 steps
}


def get_config(variant: str = ''):
    return base.with_variant(paper.get_config(), VARIANTS, variant or '1k')
