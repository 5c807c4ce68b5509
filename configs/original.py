"""Network #145 of the 2012 source code, behind the paper's single-CNN results (`docs/original.md` §0 to §5).

    python -m alexnet_jax.main --config=configs/original.py

Differences from the paper's text: layer 1 normalizes before its ReLU; alpha is divided by the window
size, 1e-4 / 5; layer 2 has a second norm, over 5 x 5 squares of each map; the standard deviation is 0.03
in conv3 to conv5; biases learn at twice the rate, which does not drop; toward the end, conv1 is frozen
and the color noise turned off; noisy images are divided by 1.1; 32 images share a crop and a flip.
The rates are those of the ILSVRC-2012 run (top-1/top-5 error 40.66/18.21% with ten crops) or, with
`original.py:2010`, those of the ILSVRC-2010 run (37.47/17.00% on the test set). Not yet run here.
`original.py:tanh` has tanh units, with the initial values and rate of `paper.py:tanh`.
"""

from configs import base, paper

VARIANTS = {
    'tanh': paper.TANH,
    '2010': {
        'optim.drops': (23.0, 51.0, 78.0),
        'optim.conv1': ((68.0, 1e-5), (72.0, 0.0)),
        'optim.colour_off': 68.0,
        'optim.epochs': 93.0,
        'optim.bias_final': 0.002,
    },
}


def get_config(variant: str = ''):
    config = base.get_config()
    config.augment.chunk = 32
    config.colour.rescale = True
    config.model.update(
        {
            'after': ('norm pool act', 'act norm map_norm pool', 'act', 'act', 'pool act'),
            'norm_alpha_per': 'window',
            'std': paper.STD,
        }
    )
    config.optim.update(
        {
            'bias_factor': 2.0,
            'bias_drops': False,
            'schedule': 'steps',
            'drops': (25.0, 51.0, 79.0),
            'conv1': ((67.0, 1e-5), (72.0, 0.0)),
            'colour_off': 67.0,
            'epochs': 91.0,
        }
    )
    return base.with_variant(config, VARIANTS, variant)
