"""The one-GPU network that §3.2 compares with two GPUs: `layers-145-half.cfg` of the 2012 source code.

    python -m alexnet_jax.main --config=configs/one_gpu.py

Half the kernels in conv1 to conv4, but all 256 in conv5, so that it has about as many parameters as
the two-tower network. The 2012 run: top-1/top-5 error 39.17/18.23% on the ILSVRC-2010 test set with
ten crops, 1.70/1.23 points worse than #145. Not yet run here.
"""

from configs import original


def get_config():
    config = original.get_config()
    config.model.update({'towers': 1, 'kernels': (48, 128, 192, 192, 256)})
    config.optim.update(
        {
            'drops': (20.0, 48.0),
            'conv1': ((66.0, 1e-5), (72.0, 0.0)),
            'colour_off': 66.0,
            'epochs': 96.0,
        }
    )
    return config
