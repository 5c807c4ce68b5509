"""Your own photographs, a few hundred to some ten thousand, with one folder per class.

    python -m alexnet_jax.main --config=configs/folder.py --config.data.source=/data/flowers

The network of `paper`, so `--config.train.init_from` can start from a run of it. Batches of 32 give small
sets more steps; 60 epochs, with two fixed drops of the learning rate, since few validation images make
plateaus hard to see.

Variants: `folder.py:small`, a quarter of the width on 112-pixel crops of 128-pixel images, for CPUs.
"""

from configs import base, paper

VARIANTS = {
    'small': {'data.size': 128, 'data.format': 'u8', 'augment.crop': 112, 'model.width': 0.25},
}


def get_config(variant: str = ''):
    config = paper.get_config()
    config.data.source = ''  # --config.data.source=FOLDER
    config.optim.update({'schedule': 'steps', 'rate': 0.005, 'epochs': 60.0, 'drops': (40.0, 54.0)})
    config.train.batch = 32
    config.run.update(
        {'eval_every': 5.0, 'checkpoint_every': 500, 'log_every': 20, 'stuck_after': 500}
    )
    return base.with_variant(config, VARIANTS, variant)
