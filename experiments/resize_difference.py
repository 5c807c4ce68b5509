"""Measures how prepared images differ from those of cuda-convnet2, resized by OpenCV's INTER_AREA.

    pip install opencv-python-headless
    python -m experiments.resize_difference FOLDER [--size=256]

The 2012 source code reads images that are already resized; cuda-convnet2, its successor, has code for that
(`docs/original.md` §5). FOLDER is searched recursively. Both resize the shorter side to `size` pixels and
crop the central square; cuda-convnet2 enlarges images with INTER_CUBIC. Prints the mean absolute difference
in levels (0-255), separately for images that shrink and for those that grow.
"""

import pathlib

import numpy as np

from alexnet_jax.command import ArgumentParser, Help, run
from alexnet_jax.common.errors import UserError
from alexnet_jax.input.images import decode, square


def opencv_square(image: np.ndarray, size: int) -> np.ndarray:
    """u8[H,W,3] -> u8[size,size,3], resized and cropped as in cuda-convnet2."""
    import cv2

    height, width = image.shape[:2]
    scale = size / min(height, width)
    sides = int(width * scale + 0.5), int(height * scale + 0.5)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(image, sides, interpolation=method)
    x, y = ((side - size) // 2 for side in sides)
    return resized[y : y + size, x : x + size]


def main() -> None:
    parser = ArgumentParser(
        prog='python -m experiments.resize_difference', description=__doc__, formatter_class=Help
    )
    parser.add_argument('folder', type=pathlib.Path, help='images, in any subfolder')
    parser.add_argument('--size', type=int, default=256, help='pixels per side')
    args = parser.parse_args()
    suffixes = {'.jpg', '.jpeg', '.png'}
    files = sorted(p for p in args.folder.rglob('*') if p.suffix.lower() in suffixes)
    if not files:
        raise UserError(f'{args.folder}: contains no images ({", ".join(sorted(suffixes))})')
    differences = {'shrunk': [], 'enlarged': []}
    for file in files:
        image = np.asarray(decode(file.read_bytes()))
        ours = square(image, args.size).astype(np.int16)
        kind = 'shrunk' if min(image.shape[:2]) > args.size else 'enlarged'
        differences[kind].append(np.abs(ours - opencv_square(image, args.size)).mean())
    for kind, values in differences.items():
        if values:
            print(
                f'{kind}: mean absolute difference {np.mean(values):.2f} levels '
                f'({len(values)} images)'
            )


if __name__ == '__main__':
    run(main)
