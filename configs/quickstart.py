"""The quickstart: `original`'s switches at a quarter of the width on small pictures. NOT the paper's recipe.

    python -m alexnet_jax.main --config=configs/quickstart.py --cpu_devices=2

The embedded set `alexnet_shapes`, 10 classes, 128-pixel pictures and 112-pixel crops.
"""

from configs import original


def get_config():
    config = original.get_config()
    config.data.update({'source': 'alexnet_shapes', 'size': 128})
    config.augment.crop = 112
    config.model.width = 0.25
    config.optim.update({'drops': (), 'conv1': (), 'colour_off': 0.0, 'epochs': 30.0})
    config.train.batch = 64
    return config
