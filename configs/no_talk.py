"""Two towers that exchange nothing before the softmax: run #150 of the 2012 source code.

    python -m alexnet_jax.main --config=configs/no_talk.py

In each tower, conv2 has 160 kernels and fc6 has 4096 units, to make up for the inputs they lack. The
2012 run: top-1/top-5 error 41.83/19.33% on ILSVRC-2012 with ten crops, 1.16/1.12 points worse than
#145. Not yet run here.
"""

from configs import original


def get_config():
    config = original.get_config()
    config.model.update(
        {
            'kernels': (96, 320, 384, 384, 256),
            'hidden': (8192, 4096),
            'exchange': (),
        }
    )
    return config
