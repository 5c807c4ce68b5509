"""SqueezeNet v1.0 (Iandola et al., 2016), with the authors' recipe; `squeezenet.py:1.1` is their v1.1.

    python -m alexnet_jax.main --config=configs/squeezenet.py

Published: top-1/top-5 error 42.5/19.7% (DeepScale/SqueezeNet at 264e225, solver.prototxt and
train_val.prototxt: batch 512, rate 0.04, falling linearly to 0 over 170,000 steps, weight decay 0.0002;
biases learn at twice the rate and do not decay). Departures: v1.0's conv10 has no padding (1 pixel there),
pixels are divided by 57, and kernels use He initialization. Not run on ImageNet here.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = {'1.1': {'model.version': '1.1'}}


def get_config(variant: str = ''):
    config = base.get_config()
    config.augment.crop = 227
    config.colour.std = 0.0
    config.model = ConfigDict(
        {
            'net': 'squeezenet',
            'version': '1.0',  # or '1.1', 2.4 times cheaper
            'width': 1.0,  # multiplies the numbers of kernels
            'input_std': 57.0,  # divides the images, in pixel values
            'dropout': 0.5,  # before the last layer
            'dtype': 'float32',  # or 'bfloat16'
        }
    )
    config.optim.update(
        {'rate': 0.04, 'decay': 2e-4, 'schedule': 'linear', 'epochs': 67.94, 'bias_factor': 2.0}
    )
    config.train.batch = 512
    return base.with_variant(config, VARIANTS, variant)
