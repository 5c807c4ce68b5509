"""Every config field, with its unit and meaning; the values are those of `paper.py:text`.

A preset imports this and changes a few lines. Any field can be set on the command line, as in
`--config.model.activation=tanh`. Unknown fields and values of the wrong type are errors. Sections (§)
are those of the paper; "the source" is the 2012 source code, and #145 its network behind the tables.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # determines everything random: parameters, order, crops, masks, noise

    config.data = ConfigDict(
        {
            'source': 'imagenet2012',  # a path, a TFDS name, ... (docs/data.md); 'alexnet_shapes': built in
            'dir': '',  # where TFDS keeps its datasets, or where imagenet2012 is; '': TFDS's default
            'store': '',  # a prepared store, or gs://BUCKET/STORE; '': data/<source>-<size>-<format>
            # of the store: 'jpg' (38 GB for ImageNet), 'u8' (raw, 262 GB, faster), or 'whole' (as 'jpg', but
            # of whole images, for config.augment.area)
            'format': 'jpg',
            'size': 256,  # pixels, side of the prepared square images (§2)
            # Rotate images by their EXIF orientation: 'on', 'off', or 'auto', which is off for ImageNet (as
            # in 2012) and TFDS sets, and keeps an existing store's setting.
            'exif': 'auto',
            'val_fraction': 0.1,  # of the training images, held out if the source has no validation split
        }
    )
    config.augment = ConfigDict(
        {
            'crop': 224,  # pixels, side of the crops the network sees (§4.1)
            # Random resized crops: the smallest and largest fraction of an image's area, such as (0.08, 1.0),
            # for stores of whole images; (): crops at random offsets.
            'area': (),
            'jitter': 0.0,  # brightness, contrast and saturation vary by this factor, such as 0.4
            'random': True,  # random crops and flips; False: always the center crop
            # Mixup: each image is mixed with its neighbor in the batch, in shares drawn from
            # Beta(mixup, mixup); 0: none. The training error counts the image's own label.
            'mixup': 0.0,
            'mixup_off': 0.0,  # epoch from which nothing is mixed; 0: never
            'chunk': 1,  # consecutive images that share a crop offset and a flip; 32 in the source
        }
    )
    config.colour = ConfigDict(
        {
            'std': 0.1,  # of the noise along each PCA axis, relative to the pixels' own (§4.1); 0: no noise
            'rescale': False,  # divide noisy images by 1 + std, as the source did
        }
    )
    config.model = ConfigDict(
        {
            'net': 'alexnet',  # presets of other networks list their own fields
            'towers': 2,
            'kernels': (96, 256, 384, 384, 256),  # of conv1 to conv5 (or conv6), over all towers
            'hidden': (4096, 4096),  # units of fc6 and fc7, over all towers
            'groups': 1,  # Caffe's groups in conv2, conv4 and conv5, within a tower
            'exchange': ('conv3', 'fc6', 'fc7'),  # the layers that read all towers (§3.2)
            'remove': 'none',  # or 'conv1' to 'conv5': omits that layer, its activation and norm (§7)
            'activation': 'relu',  # or 'tanh', of all hidden layers (§3.1)
            # what follows each convolution
            'after': ('act norm pool', 'act norm pool', 'act', 'act', 'act pool'),
            'norms': 'all',  # or 'first' (only layer 1's), or 'none' (§3.3)
            'norm_alpha': 1e-4,
            'norm_alpha_per': 'element',  # alpha multiplies each square; 'window': alpha / norm_n does
            'norm_k': 2.0,
            'norm_n': 5,  # channels in the window, odd
            'norm_beta': 0.75,
            'norm_window': 'tower',  # the window ends at the tower's edge; 'all': it crosses the edge
            'pooling': 'overlapping',  # or 'disjoint': run #147's 2 x 2 windows and paddings (§3.4)
            'dropout': 'original',  # x0.5 at test time (§4.2); 'inverted': x2 in training; or 'none'
            'dropout_at': 'outputs',  # of fc6 and fc7; 'inputs': as in torchvision
            'conv1_padding': (0, 3),  # pixels (top and left, bottom and right) around the crop
            'width': 1.0,  # multiplies the numbers of kernels and hidden units
            'init': 'gaussian',  # with std and bias below; 'torch': PyTorch's uniform default
            'std': (0.01,) * 8,  # of the initial kernels, conv1 to fc8 (§5)
            'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),  # initial biases, conv1 to fc8 (§5)
            # Of the arithmetic; or 'bfloat16'. Parameters are always float32. GPUs and TPUs round the
            # factors of float32 products (to TF32, bfloat16) unless JAX_DEFAULT_MATMUL_PRECISION=highest.
            'dtype': 'float32',
        }
    )
    config.optim = ConfigDict(
        {
            # or 'lars': each layer scales the rate by its own norm (`large_batch.py`); or 'rmsprop',
            # TensorFlow's: divides by the root of a running mean of squares (`mobilenet.py`)
            'name': 'sgd',
            'momentum': 0.9,
            'nesterov': False,  # Nesterov's momentum
            'decay': 5e-4,  # weight decay (§5)
            'decay_roles': ('kernel', 'depthwise'),  # which parameters decay; or 'bias', 'scale'
            'decays': (),  # ((layer, decay), ...): layers with their own weight decay
            'clip': 0.0,  # largest norm of the whole gradient; 0: no limit
            'rms_decay': 0.9,  # 'rmsprop': of the running mean
            'rms_epsilon': 1.0,  # 'rmsprop': added to it, inside the root
            'trust': 0.001,  # 'lars': fraction of its norm by which a layer changes per step, at rate 1
            'rate': 0.01,  # initial learning rate (§5)
            'bias_factor': 1.0,  # the biases' rate as a multiple of `rate`; 2 in the source and Caffe
            'bias_drops': True,  # the biases' rate drops with the kernels'
            'bias_final': 0.0,  # the biases' rate from the last drop on; 0: no override
            # or, running for all `epochs`: 'steps' (at `drops`), 'exponential' (every `drop_every`), or
            # 'poly', 'linear', 'cosine', which fall to 0
            'schedule': 'plateau',
            'factor': 0.1,  # multiplies the rate at every drop
            'epochs': 120.0,  # the run ends no later than this (the paper: roughly 90)
            'drops': (),  # 'steps': the epochs of the drops
            'drop_every': 1.0,  # 'exponential': epochs between drops
            'power': 2.0,  # 'poly': the rate is multiplied by (1 - step / total steps) ** power
            'patience': 5.0,  # 'plateau': epochs without improvement before a drop
            'threshold': 0.1,  # 'plateau': points of top-1 error that count as an improvement
            'max_drops': 3,  # 'plateau': after this many drops, the next stall ends the run
            'warmup': 0.0,  # epochs of linear growth from 0, fewer than `epochs`
            'conv1': (),  # ((epoch, rate), ...): conv1's own rate from that epoch on; 0 freezes it
            'colour_off': 0.0,  # epoch at which the color noise is turned off; 0: never
        }
    )
    config.train = ConfigDict(
        {
            'batch': 128,  # images per step, over all devices
            'init_from': '',  # a run directory, bundle or hub:NAME to start from (docs/weights.md)
            # Moving average of parameters and statistics: the fraction kept per step, such as 0.9999;
            # 0: none. The log shows its error beside that of the last parameters.
            'ema': 0.0,
            'ema_used': False,  # the average determines the best checkpoint, and is what `load` returns
            'smoothing': 0.0,  # label smoothing: part of the target spread evenly over all classes
            # Training images used to recompute batch normalization's statistics at the end (at most all of
            # them); 0: none
            'recompute': 0,
            'freeze': (),  # layers whose parameters do not change, for example ('conv1',)
        }
    )
    config.run = ConfigDict(
        {  # may change between the starts of a run
            'mesh': (0, 0),  # devices along (data, model); 0: chosen automatically, and logged
            'eval_every': 1.0,  # epochs
            'eval_batch': 128,  # images
            'checkpoint_every': 1000,  # steps; every evaluation also saves one
            'keep': 2,  # latest checkpoints, in addition to the best
            'log_every': 50,  # steps
            'deterministic': False,  # on GPUs: a resumed run ends with the same bits; on CPUs it always does
            # Steps handed to the device as one program, for networks so small that a GPU would idle between
            # steps. Must divide log_every and checkpoint_every, and be far smaller than the number of steps
            # between evaluations. A run then stops only at the end of a group, and the device holds three
            # groups of batches. Other values can change the last bit.
            'dispatch': 1,
            'threads': 0,  # of the input pipeline; 0: one per core available to the process
            # When this start saves a checkpoint and stops: after steps ('1000') or a time ('90s', '45m',
            # '23h', '2d'), for a queue's time limit; '': never. SIGTERM and Ctrl-C do the same.
            'stop_after': '',
            # Training continues while a checkpoint is written; 'wait': it pauses, so a kill never
            # costs more than `checkpoint_every` steps.
            'saves': 'background',
            # A checkpoint that cannot be written ends the run; 'warn': the run continues, unless it
            # was the last one (single process only).
            'failed_save': 'stop',
            # Steps with the loss at chance level, ln(classes), before a warning; 0: no warning.
            'stuck_after': 2000,
            'profile': (0, 0),  # steps (from, to) of a profiler trace in the work directory
        }
    )
    return config.lock()


def with_variant(config: ConfigDict, variants: dict[str, dict], name: str) -> ConfigDict:
    """Returns the config with the named variant's fields, {'model.activation': 'tanh', ...}, set."""
    if name and name not in variants:
        raise ValueError(f'no variant {name!r} of this config; choose one of {", ".join(variants)}')
    config.update_from_flattened_dict(variants.get(name, {}))
    return config
