"""The quickstart: the network of `original` at a quarter of its width, on small rendered images.

    python -m alexnet_jax.main --config=configs/quickstart.py --cpu_devices=2

NOT the paper's recipe: the built-in dataset `alexnet_shapes` (2,000 training images, 10 classes),
112-pixel crops of 128-pixel images, and learning rates for a run of a few minutes.
"""

from configs import original


def get_config():
    config = original.get_config()
    config.data.update({'source': 'alexnet_shapes', 'size': 128, 'format': 'u8'})
    config.augment.crop = 112
    config.model.width = 0.25
    config.optim.update(
        {
            'rate': 0.02,
            'bias_factor': 1.0,
            'bias_drops': True,
            'drops': (28.0, 34.0),
            'conv1': (),
            'colour_off': 0.0,
            'epochs': 36.0,
        }
    )
    config.train.batch = 96
    config.run.update({'eval_every': 4.0, 'eval_batch': 100, 'checkpoint_every': 200})
    return config
