"""Converts another framework's weight file to a bundle, for load, evaluate, predict and init_from.

Reads the networks listed in docs/weights.md from files of PyTorch (.pth, .safetensors), Caffe (.caffemodel),
ONNX, Keras (.h5), TensorFlow Lite and Deep Compression (.net). Their input scale is folded into the first
layer, so that the network takes pixels from 0 to 255 minus a mean.
"""

import jax
import numpy as np

from alexnet_jax import command
from alexnet_jax.common.errors import say
from alexnet_jax.weights import bundle, readers
from alexnet_jax.weights.variables import Options


def main() -> None:
    parser = command.make_parser('convert', __doc__)
    parser.add_argument('file', metavar='IN', help='the weight file')
    parser.add_argument('out', metavar='OUT', help='the folder to write, new or empty')
    parser.add_argument(
        '--net', default='', help='its preset, such as caffenet, if the file does not say'
    )
    parser.add_argument(
        '--mean', default='', help="R,G,B from 0 to 255, or Caffe's mean image (.binaryproto, .npy)"
    )
    parser.add_argument(
        '--std', default='', help='R,G,B: what its network divides pixels (0 to 255) by'
    )
    parser.add_argument(
        '--crop', type=int, default=0, help='side in pixels of the images that the network sees'
    )
    parser.add_argument(
        '--size',
        type=int,
        default=0,
        help='side in pixels of the images that crops are taken from (default: 256 for crops of '
        '224 to 227, else 8/7 of the crop)',
    )
    parser.add_argument(
        '--names',
        default='',
        help="file of class names, one per line (default for 1,000 classes: ImageNet's)",
    )
    args = parser.parse_args()
    bundle.check_new(args.out)
    std = readers.numbers('--std', args.std, 1e-3, 1e3) if args.std else None
    found = readers.read(
        args.file,
        Options(args.net, std, args.crop),
        mean=readers.mean_of(args.mean) if args.mean else None,
        size=args.size,
        names=readers.names_of(args.names) if args.names else None,
        made=command.made('convert'),
    )
    bundle.write(args.out, found)
    count = sum(x.size for x in jax.tree.leaves(found.variables['params']))
    red, green, blue = found.mean.mean((0, 1), np.float64).tolist()
    crop, size = found.config['augment']['crop'], found.config['data']['size']
    say(
        f'{found.card["title"]}, {found.card["source"]}: {count:,} parameters, {len(found.names):,} classes; '
        f'{crop}-pixel crops of {size}-pixel images, mean {red:.2f}, {green:.2f}, {blue:.2f}'
    )
    say(f'wrote {args.out}')


if __name__ == '__main__':
    command.run(main)
