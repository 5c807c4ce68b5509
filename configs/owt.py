"""torchvision's `alexnet`: the one-tower net of "One weird trick" (Krizhevsky, 2014).

    python -m alexnet_jax.main --config=configs/owt.py

Not the network of 2012: different numbers of kernels, no towers, no normalization, dropout on the
inputs of fc6 and fc7. The rates are torchvision's. Differences from torchvision: no random resized
crops, biases do not decay, and pixels are 0-255 minus the mean image, not scaled to unit variance.
torchvision's own top-1/top-5 error: 43.48/20.93%, center crop. Not yet run here.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.colour.std = 0.0
    config.model.update(
        {
            'towers': 1,
            'kernels': (64, 192, 384, 256, 256),
            'norms': 'none',
            'dropout': 'inverted',
            'dropout_at': 'inputs',
            'conv1_padding': (2, 2),
            'init': 'torch',
        }
    )
    config.optim.update(
        {
            'decay': 1e-4,
            'schedule': 'steps',
            'drops': (30.0, 60.0),
            'epochs': 90.0,
        }
    )
    config.train.batch = 256
    return config
