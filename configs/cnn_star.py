"""CNN* of the paper's Table 2: a sixth convolutional layer over the last pooling layer (§6; #146).

    python -m alexnet_jax.main --config=configs/cnn_star.py --config.data.source=MORE --workdir=RUN
    python -m alexnet_jax.main --config=configs/cnn_star.py:finetune --config.train.init_from=RUN

MORE is a dataset with more classes (in the paper, the whole Fall 2011 release of ImageNet). `:finetune`
then replaces the last layer and uses the rates of run 146-2012-2011 of the 2012 source code: top-1/top-5
error 38.99/16.62% on ILSVRC-2012 with ten crops. Unlike here, that run trained the new last layer at
0.01 from step 300 to epoch 9. The first command uses #145's rates; in 2012, it started from the
convolutional layers of a network trained on the Fall 2009 release and stopped after 8.1 epochs.

`:fall2009` is the same network on the Fall 2009 release of ImageNet, with 10,184 classes and 8.9 million
images; the paper trained on half of them and tested on the others: top-1/top-5 error 67.4/40.9%. It gives
neither the split nor the rates, so here the half is random, and the rates are #145's. FALL2009 is a folder
with a subfolder per class. The result can be fine-tuned with the second command above.
`experiments/fall2009.py` trains it and compares the errors. None of this has been run here.

    python -m alexnet_jax.prepare --source=FALL2009 --val_fraction=0.5
    python -m alexnet_jax.main --config=configs/cnn_star.py:fall2009 \\
        --config.data.source=FALL2009 --workdir=RUN
    python -m alexnet_jax.evaluate RUN
"""

from configs import base, original

VARIANTS = {
    'fall2009': {
        'data.val_fraction': 0.5,
        'run.eval_every': 5.0,  # epochs; there are as many images for validation as for training
    },
    'finetune': {
        'optim.rate': 0.001,
        'optim.bias_factor': 20.0,  # 0.02, as in `original`
        'optim.drops': (22.0, 42.0),
        'optim.conv1': ((0.0, 1e-4), (5.0, 1e-5), (7.0, 0.0)),
        'optim.colour_off': 38.0,
        'optim.epochs': 54.0,
    },
}


def get_config(variant: str = ''):
    config = original.get_config()
    config.model.update(
        {
            'kernels': (96, 256, 384, 384, 256, 256),
            'exchange': ('conv3', 'conv6', 'fc6', 'fc7'),
            'after': (*config.model.after, 'act'),
            'std': (0.01, 0.01, 0.03, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
            'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        }
    )
    return base.with_variant(config, VARIANTS, variant)
