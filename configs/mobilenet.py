"""MobileNet v2 (Sandler et al., 2018) with torchvision's recipe; `mobilenet.py:v1` (Howard et al., 2017).

    python -m alexnet_jax.main --config=configs/mobilenet.py
    python -m alexnet_jax.main --config=configs/mobilenet.py:finetune --config.data.source=/data/flowers

Published top-1 error: v2 28.12% (torchvision: batch 256, rate 0.045, times 0.98 every epoch, 300
epochs, weight decay on all parameters), v1 29.1% (TensorFlow's slim). v1 has the rates of slim's
mobilenet_v1_train.py, times 0.94 every 2.5 epochs, and its weight decay, on all kernels but the depthwise
ones. Departures from that script: momentum 0.9 (none there), batch 256 (64), running statistics that keep
0.99 per step (0.9997), 250 epochs (no end), He initialization, and no color distortion. `v1-rmsprop`
has the optimizer of slim's train_image_classifier.py. Not run on ImageNet here.
"""

from ml_collections import ConfigDict

from configs import base

V1 = {
    'model.version': 1,
    'model.padding': 'tensorflow',
    'model.dropout': 0.001,
    'model.norm_momentum': 0.99,
    'model.norm_epsilon': 1e-3,
    'optim.factor': 0.94,
    'optim.drop_every': 2.5,
    'optim.decay_roles': ('kernel',),
    'optim.epochs': 250.0,
}
VARIANTS = {
    'v1': V1,
    'v1-rmsprop': {**V1, 'optim.name': 'rmsprop'},
    'finetune': {
        'train.init_from': 'hub:coral/mobilenet_v2',
        'train.batch': 50,
        'model.padding': 'tensorflow',  # that of these weights
        'data.source': '',  # --config.data.source=FOLDER
        'data.size': 112,
        'data.format': 'u8',
        'augment.crop': 96,
        'augment.area': (),
        'optim.rate': 0.0003,
        'optim.schedule': 'cosine',
        'optim.epochs': 20.0,
        'run.eval_every': 5.0,
        'run.log_every': 20,
    },
}


def get_config(variant: str = ''):
    config = base.get_config()
    config.colour.std = 0.0
    config.augment.area = (0.08, 1.0)
    config.data.format = 'whole'
    config.model = ConfigDict(
        {
            'net': 'mobilenet',
            'version': 2,
            'width': 1.0,  # the papers' multiplier alpha; the resolution is config.augment.crop
            'padding': 'torch',  # of convolutions with stride 2; or 'tensorflow'
            'activation': 'relu6',  # or 'relu'
            'input_std': 57.0,  # divides the images, in pixel values
            'dropout': 0.2,  # before the last layer
            'norm_momentum': 0.9,  # of the running statistics; PyTorch's is 1 - ours
            'norm_epsilon': 1e-5,
            'dtype': 'float32',  # or 'bfloat16'
        }
    )
    config.optim.update(
        {
            'rate': 0.045,
            'decay': 4e-5,
            'decay_roles': ('kernel', 'depthwise', 'scale', 'bias'),
            'schedule': 'exponential',
            'factor': 0.98,
            'drop_every': 1.0,
            'epochs': 300.0,
        }
    )
    config.train.batch = 256
    return base.with_variant(config, VARIANTS, variant)
