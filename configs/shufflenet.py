"""ShuffleNet v2 x1.0 (Ma et al., 2018), with the authors' recipe; `shufflenet.py:x0.5` is half as wide.

    python -m alexnet_jax.main --config=configs/shufflenet.py

Published top-1 error: x1.0 30.6%, x0.5 38.9% (megvii-model/ShuffleNet-Series: batch 1024, rate 0.5,
falling linearly to 0 over 300,000 steps, weight decay 4e-5 on kernels, label smoothing 0.1,
statistics recomputed in a last epoch). Departures: the mean is subtracted, pixels are divided by 57, and
the order of the jitter is fixed: brightness, contrast, saturation. Not run on ImageNet here.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = {'x0.5': {'model.size': 'x0.5'}}


def get_config(variant: str = ''):
    config = base.get_config()
    config.colour.std = 0.0
    config.augment.update({'area': (0.08, 1.0), 'jitter': 0.4})
    config.data.format = 'whole'
    config.model = ConfigDict(
        {
            'net': 'shufflenet',
            'size': 'x1.0',  # or 'x0.5'
            'input_std': 57.0,  # divides the images, in pixel values
            'norm_momentum': 0.9,  # of the running statistics; PyTorch's is 1 - ours
            'norm_epsilon': 1e-5,
            'dtype': 'float32',  # or 'bfloat16'
        }
    )
    config.optim.update({'rate': 0.5, 'decay': 4e-5, 'schedule': 'linear', 'epochs': 239.8})
    config.train.update({'batch': 1024, 'smoothing': 0.1, 'recompute': 1_281_167})
    return base.with_variant(config, VARIANTS, variant)
