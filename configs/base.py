"""Every field of a run, once, with its unit and meaning; the values are those of `paper.py`.

A preset imports this and changes a few lines. Any field can be set on the command line:
`--config.model.activation=tanh`. Fields that do not exist, and values of another type, are errors.
Sections (§) are those of the paper; #145 is the net of the source of 2012 that gave its tables.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # everything random follows from it: parameters, order, crops, masks, noise

    config.data = ConfigDict(
        {
            'source': 'imagenet2012',  # a TFDS name, 'alexnet_shapes' (embedded), or a folder of images
            'dir': '',  # where TFDS keeps its data sets and finds ImageNet's tars; '': TFDS's default
            'store': '',  # where the prepared pictures lie; '': data/<source>-<size>-<format>
            'format': 'jpg',  # of the store: 'jpg' (38 GB for ImageNet) or 'u8' (raw, 262 GB, faster)
            'size': 256,  # pixels, side of the prepared square pictures (§2)
            'val_fraction': 0.1,  # of the training pictures, for sources that have no validation split
        }
    )
    config.augment = ConfigDict(
        {
            'crop': 224,  # pixels, side of the crops the network sees (§4.1)
            'random': True,  # random crops and flips; False: always the centre crop
            'chunk': 1,  # consecutive images that share a crop offset and a flip; 32 in the source
        }
    )
    config.colour = ConfigDict(
        {
            'std': 0.1,  # of the draws along the PCA axes, in standard deviations (§4.1); 0: no noise
            'rescale': False,  # divide noisy images by 1 + std, as the source did
        }
    )
    config.model = ConfigDict(
        {
            'net': 'alexnet',  # 'cuda_convnet' has fields of its own, see `cifar10.py`
            'towers': 2,
            'kernels': (96, 256, 384, 384, 256),  # of conv1 to conv5 (or conv6), over all towers
            'hidden': (4096, 4096),  # units of fc6 and fc7, over all towers
            'groups': 1,  # Caffe's: parts of conv2, conv4 and conv5 inside one tower
            'exchange': ('conv3', 'fc6', 'fc7'),  # the layers that read all towers (§3.2)
            'remove': 'none',  # conv1 to conv5: that layer, its activation and norm are left out (§7)
            'activation': 'relu',  # or 'tanh', of all hidden layers (§3.1)
            # what follows each convolution
            'after': ('act norm pool', 'act norm pool', 'act', 'act', 'act pool'),
            'norms': 'all',  # or 'first' (only layer 1's), or 'none' (§3.3)
            'norm_alpha': 1e-4,
            'norm_alpha_per': 'element',  # alpha multiplies each square; 'window': divided by n first
            'norm_k': 2.0,
            'norm_n': 5,  # channels in the window, odd
            'norm_beta': 0.75,
            'norm_window': 'tower',  # the window ends at the tower's edge; 'all': it crosses it
            'pooling': 'overlapping',  # or 'disjoint': run #147's 2 x 2 windows and paddings (§3.4)
            'dropout': 'original',  # x0.5 at test time (§4.2); 'inverted': x2 in training; or 'none'
            'dropout_at': 'outputs',  # of fc6 and fc7; 'inputs': torchvision's place
            'conv1_padding': (0, 3),  # pixels (top and left, bottom and right) around the crop
            'width': 1.0,  # multiplies every number of kernels and hidden units
            'init': 'gaussian',  # with std and bias below; 'torch': PyTorch's uniform default
            'std': (0.01,) * 8,  # of the initial kernels, conv1 to fc8 (§5)
            'bias': (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0),  # initial biases, conv1 to fc8 (§5)
            # Of the arithmetic, or 'bfloat16'; parameters are always float32. GPUs and TPUs round the
            # factors of float32 products (to TF32, bfloat16), unless JAX_DEFAULT_MATMUL_PRECISION=highest.
            'dtype': 'float32',
        }
    )
    config.optim = ConfigDict(
        {
            'name': 'sgd',  # or 'lars': every layer adapts the rate to its own size (`large_batch.py`)
            'momentum': 0.9,
            'decay': 5e-4,  # weight decay, on kernels only (§5)
            'decays': (),  # ((layer, decay), ...): layers with a weight decay of their own
            'trust': 0.001,  # 'lars': by how much of its norm a layer changes in a step, at rate 1
            'rate': 0.01,  # learning rate at the start (§5)
            'bias_factor': 1.0,  # the biases' rate as a multiple of `rate`; 2 in the source and Caffe
            'bias_drops': True,  # the biases' rate drops with the kernels'
            'bias_final': 0.0,  # the biases' rate from the last drop on; 0: as it would be
            'schedule': 'plateau',  # or to the end at `epochs`: 'steps', 'poly' (see `drops`, `power`)
            'factor': 0.1,  # of every drop
            'epochs': 120.0,  # the run ends here at the latest (the paper: roughly 90)
            'drops': (),  # 'steps': the epochs of the drops
            'power': 2.0,  # 'poly': the rate is multiplied by (1 - step / steps in all) ** power
            'patience': 5.0,  # 'plateau': epochs without improvement before a drop
            'threshold': 0.1,  # 'plateau': points of top-1 error that count as an improvement
            'max_drops': 3,  # 'plateau': the next stall after so many drops ends the run
            'warmup': 0.0,  # epochs of linear growth from 0
            'conv1': (),  # ((epoch, rate), ...): conv1's own rate from there on; 0 freezes it
            'colour_off': 0.0,  # epoch from which there is no colour noise; 0: never
        }
    )
    config.train = ConfigDict(
        {
            'batch': 128,  # images a step, over all devices
            'init_from': '',  # a run directory whose parameters are the start
            'freeze': (),  # layers whose parameters stay as they are, for example ('conv1',)
        }
    )
    config.run = ConfigDict(
        {  # may differ between the starts of one run
            'mesh': (0, 0),  # devices along (data, model); 0: chosen, and logged
            'eval_every': 1.0,  # epochs
            'eval_batch': 128,  # images
            'checkpoint_every': 1000,  # steps; every evaluation is followed by one as well
            'keep': 2,  # checkpoints, the latest ones, beside the best
            'log_every': 50,  # steps
            'deterministic': False,  # on GPUs: a stopped run ends with the same bits; CPUs always do
            # Steps that are handed over to the device as one program, for networks so small that a GPU would
            # wait for the next: far fewer than between two evaluations, and a divisor of log_every and
            # checkpoint_every. A run then stops only where such a group ends; three groups of batches are in
            # the device's memory. Other numbers may change the last bit.
            'dispatch': 1,
            'threads': 0,  # of the input pipeline; 0: one per core that the process may use
            # When this start stops, with a checkpoint: steps ('1000') or a time ('90s', '45m', '23h', '2d'),
            # for a queue's limit; '': never. SIGTERM and Ctrl-C do the same.
            'stop_after': '',
            # Training continues while a checkpoint is written; 'wait': it doesn't, so a kill never
            # costs more than `checkpoint_every` steps.
            'saves': 'background',
            # A checkpoint that cannot be written ends the run; 'warn': the run continues, unless it
            # was the last one (single process only).
            'failed_save': 'stop',
            # Steps at the loss of pure chance, ln(classes), before a warning; 0: no warning.
            'stuck_after': 2000,
            'profile': (0, 0),  # steps (from, to) of a profiler trace in the work directory
        }
    )
    return config


def with_variant(config: ConfigDict, variants: dict[str, dict], name: str) -> ConfigDict:
    """The config with the named variant's fields, {'model.activation': 'tanh', ...}, set."""
    if name and name not in variants:
        raise ValueError(f'no variant {name!r} of this config; there are: {", ".join(variants)}')
    config.update_from_flattened_dict(variants.get(name, {}))
    return config
