"""Caffe's bvlc_alexnet: one device, groups of 2 in conv2, conv4 and conv5, biases 0.1 instead of 1.

    python -m alexnet_jax.main --config=configs/caffe.py

227-pixel crops without padding, normalization across all channels with k=1, dropout rescaled in
training, no color noise, batch 256, rates dropped every 100,000 of 450,000 iterations (every 20
epochs). Unlike in Caffe, the central window of the mean image is subtracted from every crop, and
resizing keeps the aspect ratio. Caffe's own top-1/top-5 error: 42.9/19.8%, center crop. Not yet run
here.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.augment.crop = 227
    config.colour.std = 0.0
    config.model.update(
        {
            'towers': 1,
            'groups': 2,
            'norm_alpha_per': 'window',
            'norm_k': 1.0,
            'dropout': 'inverted',
            'conv1_padding': (0, 0),
            'std': (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
            'bias': (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0),
        }
    )
    config.optim.update(
        {
            'bias_factor': 2.0,
            'schedule': 'steps',
            'drops': (20.0, 40.0, 60.0, 80.0),
            'epochs': 90.0,
        }
    )
    config.train.batch = 256
    return config
