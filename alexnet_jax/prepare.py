"""Prepares the store that training reads, in one sequential pass over a source of images.

    python -m alexnet_jax.prepare --source=alexnet_shapes --size=128
    python -m alexnet_jax.prepare --source=imagenet2012 --dir=/data/imagenet
    python -m alexnet_jax.prepare --source=/data/flowers
    python -m alexnet_jax.prepare --source=/data/flowers --verify

Images are resized so that the shorter side is `size` and cropped to the central square, as in the
paper (§2). Run the same command again to resume an interrupted pass; the finished store is
identical to that of an uninterrupted one.
"""

import time

from alexnet_jax import command
from alexnet_jax.common.errors import printable
from alexnet_jax.input import prepare, store


def main() -> None:
    parser = command.make_parser('prepare', __doc__)
    parser.add_argument(
        '--source',
        required=True,
        help='a folder, a list (.csv, .tsv), hf://datasets/OWNER/NAME, or a TFDS name: docs/data.md',
    )
    parser.add_argument('--dir', help='TFDS data directory; for imagenet2012, where it is')
    parser.add_argument('--store', help='folder to write (default: data/SOURCE-SIZE-FORMAT)')
    parser.add_argument(
        '--format',
        choices=store.FORMATS,
        default='jpg',
        help='JPEG, raw pixels, or JPEG of whole images',
    )
    parser.add_argument('--size', type=int, default=256, help='side of the square in pixels')
    parser.add_argument(
        '--val_fraction',
        type=float,
        default=0.1,
        help='fraction to hold out if the source has no validation split',
    )
    parser.add_argument(
        '--exif',
        choices=('auto', 'on', 'off'),
        default='auto',
        help='rotate images by their EXIF orientation; auto: off for ImageNet and TFDS sets',
    )
    parser.add_argument(
        '--skip_bad', action='store_true', help='leave out images that cannot be decoded'
    )
    parser.add_argument('--verify', action='store_true', help='check every record of the store')
    options = vars(parser.parse_args())
    if options.pop('verify'):
        path = options['store'] or prepare.default_store(
            *(options[k] for k in ('source', 'size', 'format'))
        )
        store.verify(store.open_store(path))
        print(printable(f'{path}: all records are intact'))
        return
    began = time.monotonic()
    made = prepare.prepare(**options)
    print(
        f'{printable(str(made.path))}: {" + ".join(map(str, made.counts.values()))} images of '
        f'{made.classes} classes, {time.monotonic() - began:.1f} s'
    )
    print(
        f'mean color (R G B) {made.mean.mean((0, 1)).round(2)}, standard deviations along the principal '
        f'axes {made.sigma.round(2)}'
    )


if __name__ == '__main__':
    command.run(main)
