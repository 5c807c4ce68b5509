"""The paper's network with a modern recipe; `modern.py:bn` has batch normalization instead of LRN.

    python -m alexnet_jax.main --config=configs/modern.py

Batch 1,024, a rate of 0.06 with warm-up and half a cosine, random resized crops, label smoothing, mixup
until 12 epochs before the end, a moving average, and inverted dropout. The aim is a top-1/top-5 error of
38.1/16.1% with a single crop, the best known for a plain AlexNet (imgclsmob, without towers). Not run on
ImageNet here.
"""

from configs import alexnet_bn, base, paper

EPOCHS = 150.0
VARIANTS = {'bn': {}}  # of `alexnet_bn.py` instead of `paper.py`


def get_config(variant: str = ''):
    config = alexnet_bn.get_config() if variant == 'bn' else paper.get_config()
    if not variant:
        config.model.dropout = 'inverted'
    config.data.format = 'whole'
    config.augment.update({'area': (0.08, 1.0), 'mixup': 0.2, 'mixup_off': EPOCHS - 12})
    config.optim.update(
        {
            'rate': 0.06,
            'decay': 1e-4,
            'schedule': 'cosine',
            'warmup': 5.0,
            'epochs': EPOCHS,
        }
    )
    config.train.update({'batch': 1024, 'smoothing': 0.1, 'ema': 0.9999, 'ema_used': True})
    return base.with_variant(config, VARIANTS, variant)
