"""The paper's text, taken literally; where it is silent, the 2012 source code.

    python -m alexnet_jax.main --config=configs/paper.py

ILSVRC-2012, two towers, batch 128, learning rate 0.01, divided by 10 three times, when the
validation error stops improving. In the paper: 90 epochs, five to six days on two GTX 580;
top-1/top-5 error 40.7/18.2 % with ten crops. Not yet run in full here.
Variants: `paper.py:tanh`; `paper.py:source_std`, with the 2012 standard deviation of 0.03 in conv3 to
conv5, which took half as many steps to leave chance level on twenty classes at a quarter of the width
(`experiments/does_it_train.py`).
"""

from configs import base

VARIANTS = {
    'tanh': {'model.activation': 'tanh'},
    'source_std': {'model.std': (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)},
}


def get_config(variant: str = ''):
    return base.with_variant(base.get_config(), VARIANTS, variant)
