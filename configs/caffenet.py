"""Caffe's CaffeNet: `caffe` with pooling before normalization, and biases starting at 1.

    python -m alexnet_jax.main --config=configs/caffenet.py

Caffe's own top-1/top-5 error: 42.6/19.6%, center crop. Not yet run here.
"""

from configs import caffe


def get_config():
    config = caffe.get_config()
    config.model.update(
        {
            'after': ('act pool norm', 'act pool norm', 'act', 'act', 'act pool'),
            'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        }
    )
    return config
