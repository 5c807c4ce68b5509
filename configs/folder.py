"""Your own photographs, a few hundred to about ten thousand, with one folder per class.

    python -m alexnet_jax.main --config=configs/folder.py --config.data.source=/data/flowers

The network of `paper`, so `--config.train.init_from` can start from a run of it. Batches of 32 give small
sets more steps. The learning rate drops at fixed epochs, because a plateau is hard to see with few
validation images.

Variants: `folder.py:small`, quarter width on 112-pixel crops of 128-pixel images, for CPUs.

Measured with `:small`, seed 0, on 2,000 training and 500 validation photographs of ten classes (Tiny
ImageNet, 64 x 64 pixels, enlarged): 3,750 steps in 7m35s on one busy core of an AMD EPYC server; top-1
error 39.2% with the center crop, 34.8% with ten crops; chance is 90%. The center-crop error with other
rates: 43.2% with 0.01, 53.0% with 0.02. On 300 of the photographs, 563 steps: 59.8%, and 64.0% with
0.01. The rate was chosen on these validation images; the full width was not tried.
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
