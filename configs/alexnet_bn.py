"""The paper's two towers with batch normalization in place of the norms, and the paper's recipe.

    python -m alexnet_jax.main --config=configs/alexnet_bn.py

Every convolution and hidden layer is followed by batch normalization and ReLU; dropout is inverted. Kernels
use He initialization, and the rate drops at fixed epochs. Not run on ImageNet here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = base.get_config()
    config.model = ConfigDict(
        {
            'net': 'alexnet_bn',
            'towers': 2,
            'kernels': (96, 256, 384, 384, 256),  # of conv1 to conv5, over all towers
            'hidden': (4096, 4096),  # units of fc6 and fc7, over all towers
            'exchange': ('conv3', 'fc6', 'fc7'),  # the layers that read all towers (§3.2)
            'dropout': 0.5,  # after fc6 and fc7
            'conv1_padding': (0, 3),  # pixels (top and left, bottom and right) around the crop
            'width': 1.0,  # multiplies the numbers of kernels and hidden units
            'norm_momentum': 0.9,  # of the running statistics; PyTorch's is 1 - ours
            'norm_epsilon': 1e-5,
            'dtype': 'float32',  # or 'bfloat16'
        }
    )
    config.optim.update({'schedule': 'steps', 'drops': (30.0, 60.0, 80.0), 'epochs': 90.0})
    return config
