"""Published weights by name: where they are, what is known about them, and how to check a download."""

from typing import NamedTuple

ALL = 'ImageNet validation split, center crop, by the publisher'
SAMPLES = (
    '1,000 sample photographs, one per class and probably from the training split; center crop'
)
CORAL = 'https://github.com/google-coral/test_data/raw/104342d2d3480b3e66203073dac24f4e2dbb4c41/'
TORCH = 'https://download.pytorch.org/models/'
CAFFE = 'http://dl.caffe.berkeleyvision.org/'
KERAS = 'https://storage.googleapis.com/tensorflow/keras-applications/'
HAN = 'https://github.com/songhan/SqueezeNet-Deep-Compression/raw/fb13faa2cf121ced9999f8a9d538ec6c56084733/'


class Entry(NamedTuple):
    """A weight file on the web.

    checksum: (algorithm, hex digits), the publisher's if `theirs`, else ours, of the file that we downloaded;
    the first digits suffice. None: the publisher gives none.
    """

    title: str
    url: str
    preset: str  # the config of the network, such as 'squeezenet:1.1'
    size: int | None  # bytes; of torchvision's files within 1 kB; None: not published
    license: str
    checksum: tuple[str, str] | None
    theirs: bool = True
    published: dict = {}  # `bundle.METRICS` in percent, and 'on'
    measured: dict = {}  # the same, by this program
    page: str = ''  # where the publisher describes it


def errors(top1: float, top5: float | None = None, on: str = ALL) -> dict:
    """Converts the top-1 and top-5 accuracies that publishers give to errors, in percent."""
    found = {'top1_error': round(100 - top1, 3)}
    return found | ({} if top5 is None else {'top5_error': round(100 - top5, 3)}) | {'on': on}


def _torchvision(title, file, preset, mib, top1, top5) -> Entry:
    return Entry(
        title=f"torchvision's {title}",
        url=f'{TORCH}{file}.pth',
        preset=preset,
        size=round(mib * 2**20),
        license='not stated for the weights (torchvision itself: BSD-3-Clause)',
        checksum=('sha256', file.rpartition('-')[2]),  # how torch.hub checks it, too
        published=errors(top1, top5),
        page='https://docs.pytorch.org/vision/stable/models.html',
    )


def _caffe(title, name, preset, sha1, top1, top5) -> Entry:
    return Entry(
        title=title,
        url=f'{CAFFE}{name}.caffemodel',
        preset=preset,
        size=None,
        license='unrestricted use',
        checksum=('sha1', sha1),
        published=errors(top1, top5),
        page=f'https://github.com/BVLC/caffe/tree/master/models/{name}',
    )


def _keras(title, file, preset, size, published) -> Entry:
    return Entry(
        title=f"keras.applications' {title}",
        url=f'{KERAS}{file}.h5',
        preset=preset,
        size=size,
        license='not stated for the weights (Keras itself: Apache-2.0)',
        checksum=None,
        published=published,
        page='https://keras.io/api/applications/mobilenet/',
    )


def _coral(title, file, preset, size, sha256, published, measured) -> Entry:
    return Entry(
        title=f'{title}, 8-bit weights of TensorFlow Lite',
        url=f'{CORAL}{file}_quant.tflite',
        preset=preset,
        size=size,
        license='Apache-2.0',
        checksum=('sha256', sha256),
        theirs=False,
        published=errors(*published, f'{ALL}, with 8-bit activations'),
        measured={'top1_error': measured[0], 'top5_error': measured[1], 'on': SAMPLES},
        page='https://www.tensorflow.org/lite/guide/hosted_models',
    )


ENTRIES = {
    'squeezenet': Entry(
        title='SqueezeNet v1.0 in 676 kB, by Deep Compression',
        url=f'{HAN}compressed_SqueezeNet.net',
        preset='squeezenet',
        size=675_763,
        license='BSD-2-Clause',
        checksum=('sha256', 'e4ab6960ae8cd81505e1c2136921201507e930966c53deaf15862a395b3a3261'),
        theirs=False,
        published=errors(57.5, 80.3),
        measured={'top1_error': 38.4, 'top5_error': 16.2, 'on': SAMPLES},
        page='https://github.com/songhan/SqueezeNet-Deep-Compression',
    ),
    'torchvision/alexnet': _torchvision(
        'AlexNet, the one-tower network of 2014',
        'alexnet-owt-7be5be79',
        'owt',
        233.087,
        56.522,
        79.066,
    ),
    'torchvision/squeezenet1_0': _torchvision(
        'SqueezeNet v1.0', 'squeezenet1_0-b66bff10', 'squeezenet', 4.778, 58.092, 80.420
    ),
    'torchvision/squeezenet1_1': _torchvision(
        'SqueezeNet v1.1', 'squeezenet1_1-b8a52dc0', 'squeezenet:1.1', 4.729, 58.178, 80.624
    ),
    'torchvision/mobilenet_v2': _torchvision(
        'MobileNet v2', 'mobilenet_v2-b0353104', 'mobilenet', 13.555, 71.878, 90.286
    ),
    'torchvision/shufflenet_v2_x0_5': _torchvision(
        'ShuffleNet v2 x0.5',
        'shufflenetv2_x0.5-f707e7126e',
        'shufflenet:x0.5',
        5.282,
        60.552,
        81.746,
    ),
    'torchvision/shufflenet_v2_x1_0': _torchvision(
        'ShuffleNet v2 x1.0', 'shufflenetv2_x1-5666bf0f80', 'shufflenet', 8.791, 69.362, 88.316
    ),
    'caffe/alexnet': _caffe(
        "Caffe's AlexNet",
        'bvlc_alexnet',
        'caffe',
        '9116a64c0fbe4459d18f4bb6b56d647b63920377',
        57.1,
        80.2,
    ),
    'caffe/caffenet': _caffe(
        "Caffe's CaffeNet",
        'bvlc_reference_caffenet',
        'caffenet',
        '4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46',
        57.4,
        80.4,
    ),
    'keras/mobilenet': _keras(
        'MobileNet v1',
        'mobilenet/mobilenet_1_0_224_tf',
        'mobilenet:v1',
        17_225_924,
        errors(70.4, 89.5),
    ),
    **{
        f'keras/mobilenet_{width}': _keras(
            f'MobileNet v1, width {width}',
            f'mobilenet/mobilenet_{called}_224_tf',
            'mobilenet:v1',
            None,
            errors(top1),
        )
        for width, called, top1 in ((0.75, '7_5', 68.4), (0.5, '5_0', 63.7), (0.25, '2_5', 50.6))
    },
    'keras/mobilenet_v2': _keras(
        'MobileNet v2',
        'mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224',
        'mobilenet',
        14_536_120,
        errors(71.3, 90.1),
    ),
    'coral/mobilenet_v1_0.25_128': _coral(
        'MobileNet v1, width 0.25 at 128 pixels',
        'mobilenet_v1_0.25_128',
        'mobilenet:v1',
        525_598,
        'cb273c23ee76374b05b9583177e28aa19744858a7679c56a250e83d0333da785',
        (39.5, 64.4),
        (54.1, 28.4),
    ),
    'coral/mobilenet_v1_0.5_160': _coral(
        'MobileNet v1, width 0.5 at 160 pixels',
        'mobilenet_v1_0.5_160',
        'mobilenet:v1',
        1_392_846,
        '3cc6d2ca460abd2e0f699a6d0d2550c6b61c6e3b0e27a3616e384ea74cb86f43',
        (57.2, 80.5),
        (32.8, 12.0),
    ),
    'coral/mobilenet_v1_0.75_192': _coral(
        'MobileNet v1, width 0.75 at 192 pixels',
        'mobilenet_v1_0.75_192',
        'mobilenet:v1',
        2_652_542,
        '41daeb22fdcf947e0e5ec32373aa9df7c31f3ef45dbd0ef7b5940fbce3c20f6a',
        (66.1, 86.2),
        (19.3, 5.4),
    ),
    'coral/mobilenet_v2': _coral(
        'MobileNet v2',
        'mobilenet_v2_1.0_224',
        'mobilenet',
        3_610_798,
        '7aad0c74c5e3c06e5eb3c827e13304fdd68a83da6087d92ee169c24ff9fd4776',
        (70.8, 89.9),
        (11.3, 2.1),
    ),
}
