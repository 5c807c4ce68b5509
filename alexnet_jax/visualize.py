"""Draws the kernels of the first convolution as in the paper's Figure 3.

    python -m alexnet_jax.visualize RUN

Each row has 16 kernels, with tower 0 above tower 1. Black is the smallest weight of all kernels, white
the largest; with --per_kernel each kernel is first normalized to mean 0 and standard deviation 1.
"""

import numpy as np

from alexnet_jax import command, figures
from alexnet_jax.common.errors import UserError, printable
from alexnet_jax.devices import mesh as meshes
from alexnet_jax.training import inference, progress


def first_kernels(trained: inference.Run) -> np.ndarray:
    """The kernels of the first convolution, f32[T,h,w,3,C]; UserError if there are none."""
    kernels = trained.net.first_kernels(trained.variables['params'])
    if kernels is None:
        raise UserError(
            f'{trained.path}: the first layer of this network has no kernels to draw; give another run'
        )
    return np.asarray(kernels)


def main() -> None:
    parser = figures.parser('visualize', __doc__, output='PNG file (default: kernels.png in RUN)')
    parser.add_argument(
        '--per_kernel', action='store_true', help='normalize each kernel separately'
    )
    parser.add_argument('--scale', type=int, default=6, help='side of a weight in pixels')
    args = figures.start(parser)
    output = figures.output(args, 'kernels.png')
    if not 1 <= args.scale <= 100:
        raise UserError(f'--scale={args.scale}: must be 1 to 100 pixels')
    mesh = meshes.make((1, 1), towers=1, batches={})
    trained = inference.open_run(args.run, mesh, args.step)
    kernels = first_kernels(trained)
    towers, h, w, _, count = kernels.shape
    print(
        f'{printable(trained.title)}: {towers * count} kernels of {h} x {w}, '
        f'towers: {towers}, weights from {kernels.min():.3g} to {kernels.max():.3g}'
    )
    picture = progress.kernel_picture(kernels, scale=args.scale, per_kernel=args.per_kernel)
    figures.write(output, figures.png(picture))


if __name__ == '__main__':
    command.run(main)
