"""CNN* of the paper's Table 2: a sixth convolutional layer over the last pooling layer (§6; #146).

    python -m alexnet_jax.main --config=configs/cnn_star.py --config.train.init_from=RUN

RUN is this net trained on a larger set of classes (the paper: the whole Fall 2011 release of
ImageNet); its last layer is replaced. The source's run: top-1/top-5 error 38.99/16.62 % on
ILSVRC-2012 with ten crops. Not yet run here.
"""

from configs import original


def get_config():
    config = original.get_config()
    config.model.update({
        'kernels': (96, 256, 384, 384, 256, 256),
        'exchange': ('conv3', 'conv6', 'fc6', 'fc7'),
        'after': (*config.model.after, 'act'),
        'std': (0.01, 0.01, 0.03, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
        'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    })
    return config
