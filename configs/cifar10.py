"""The CIFAR-10 networks of cuda-convnet, named by the test error each is known for (§3.1, §3.3).

    python -m alexnet_jax.main --config=configs/cifar10.py:18pct

The images come from TFDS (`cifar10`), or from a folder of classes with train/ and test/:
--config.data.source=FOLDER. Variants, with their numbers of parameters (`docs/original.md` §8):

    80sec          145,578   three convolutions and a hidden layer, 10 epochs; 26%
    19pct           89,578   three convolutions, strong weight decay in the last layer; 19%
    18pct           89,578   the same with norms over 3 x 3 squares of each map; 18%
    13pct        1,116,490   two convolutions and two locally connected layers, random crops; 13%
    11pct        2,112,970   the same with more units and norms across channels; 11%
    11pct_plain  2,112,970   the 11% network without its norms, to isolate their effect
    fig1            89,578   the 19% network without any regularization, for Figure 1
    fig1_tanh       89,578   the same with tanh

Our choices where the 2012 config files are silent: the 19% network uses the 18% one's schedule, which
ends 10 epochs after its second drop; the 26% one ends 2 epochs after its only drop (at 8, as in its
file); none of the 50,000 training images is held out, since every schedule is fixed.
"""

from ml_collections import ConfigDict

from configs import base

CROPPED = {  # shared by the locally connected networks
    'augment.crop': 24,
    'augment.random': True,
    'model.layers': ('conv', 'conv', 'local', 'local'),
    'model.std': (1e-4, 0.01, 0.04, 0.04, 0.01),
    'optim.decay': 0.0,
    'optim.bias_drops': False,
}
ELEVEN = {
    **CROPPED,
    'model.units': (64, 64, 64, 32),
    'model.after': ('act max norm', 'act norm max', 'act', 'act'),
    'model.norms': 'all',
    'model.norm_window': 'channels',
    'model.norm_n': 9,
    'model.norm_scale': 0.001,
    'optim.decays': (('local3', 0.004), ('local4', 0.004), ('fc10', 0.01)),
    'optim.drops': (500.0, 510.0),
    'optim.epochs': 520.0,
}
PLAIN = {'optim.decay': 0.0, 'optim.decays': (), 'optim.drops': (), 'optim.epochs': 100.0}
VARIANTS = {
    '80sec': {
        'model.layers': ('conv', 'conv', 'conv', 'fc'),
        'model.units': (32, 32, 64, 64),
        'model.after': ('max act', 'act avg', 'act avg', 'act'),
        'model.std': (1e-4, 0.01, 0.01, 0.1, 0.1),
        'optim.decays': (('fc4', 0.03), ('fc10', 0.03)),
        'optim.drops': (8.0,),
        'optim.epochs': 10.0,
    },
    '19pct': {},
    '18pct': {
        'model.norms': 'all',
        'optim.decays': (('fc10', 1.0),),
    },
    '13pct': {
        **CROPPED,
        'model.units': (64, 64, 32, 32),
        'model.after': ('act max', 'act max', 'act', 'act'),
        'optim.decays': (('local3', 0.004), ('local4', 0.004), ('fc10', 0.004)),
        'optim.drops': (140.0, 150.0),
        'optim.epochs': 160.0,
    },
    '11pct': ELEVEN,
    '11pct_plain': {**ELEVEN, 'model.norms': 'none'},
    'fig1': PLAIN,
    'fig1_tanh': {**PLAIN, 'model.activation': 'tanh'},
}


def get_config(variant: str = '18pct'):
    config = base.get_config()
    config.data.update({'source': 'cifar10', 'size': 32, 'format': 'u8'})
    config.augment.update({'crop': 32, 'random': False})
    config.colour.std = 0.0
    config.model = ConfigDict(
        {
            'net': 'cuda_convnet',
            'towers': 1,
            # 'conv': 5 x 5 kernels; 'local': 3 x 3, with separate weights at every position; 'fc'
            'layers': ('conv', 'conv', 'conv'),
            'units': (32, 32, 64),  # kernels or hidden units of each
            # What follows each: 'act', 'norm', and 'max' or 'avg' pooling, 3 x 3 with stride 2
            'after': ('max act norm', 'act avg norm', 'act avg'),
            'norms': 'none',  # the norms in `after` are left out; or 'all'
            'norm_window': 'map',  # norm_n x norm_n pixels of each map; or 'channels': norm_n channels
            'norm_n': 3,
            'norm_scale': 5e-5,  # alpha times the number of values in the window, as in 2012
            'activation': 'relu',  # or 'tanh'
            # of the initial kernels of each layer, including the last
            'std': (1e-4, 0.01, 0.01, 0.01),
            'dtype': 'float32',
        }
    )
    config.optim.update(
        {
            'rate': 0.001,
            'bias_factor': 2.0,
            'decay': 0.004,
            'decays': (('fc10', 3.0),),
            'schedule': 'steps',
            'drops': (120.0, 130.0),
            'epochs': 140.0,
        }
    )
    config.run.update({'eval_batch': 125, 'checkpoint_every': 2000})
    return base.with_variant(config, VARIANTS, variant)
