"""Converts any image to the RGB square that the network reads, and computes image statistics."""

import io

import numpy as np
from PIL import Image

# Mean absolute difference from the INTER_AREA of the 2012 source code on 903 photographs: bilinear
# 0.96 levels, Hamming 1.04, box 2.96 (Pillow's box filter takes whole pixels, so it aliases).
FILTER = 'antialiased bilinear down, bicubic up'


def decode(data: bytes | np.ndarray) -> Image.Image:
    """Decodes an image file of any format, or u8[H,W,C], to RGB; EXIF orientation is ignored.

    Pillow's decoders can raise almost any exception on damaged files.
    """
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data[:, :, 0] if data.shape[2] == 1 else data)
    else:
        image = Image.open(io.BytesIO(data))
    if image.mode.startswith('I'):  # 16 bits per pixel: Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')


def square(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to `size` and crops the central square -> u8[size,size,3].

    As in the paper (§2); rounding, the corner at (n - size) // 2 and bicubic upscaling are those
    of the 2012 source code (`docs/original.md` §5). Raises whatever `decode` raises.
    """
    image = decode(data)
    shorter = min(image.size)
    sides = [int(side * size / shorter + 0.5) for side in image.size]
    scales = [old / new for old, new in zip(image.size, sides, strict=True)]
    corner = [(side - size) // 2 for side in sides]
    # Only the part of the image inside the square needs to be resized.
    box = [
        scale * (low + end) for end in (0, size) for scale, low in zip(scales, corner, strict=True)
    ]
    method = Image.Resampling.BILINEAR if shorter > size else Image.Resampling.BICUBIC
    return np.asarray(image.resize((size, size), method, box=box))


def statistics(image: np.ndarray, products: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Computes the mean image and colour PCA from sums over `count` images, in levels (0-255).

    Args:
      image: i64[S,S,3], the sum of all images.
      products: i64[3,3], the sum of r_i r_j over all pixels.

    Returns:
      mean f32[S,S,3]; eigenvectors f32[3,3], one per column, largest first, with nonnegative sums;
      sigma f32[3], the standard deviations along them.
    """
    pixels = count * image.shape[0] * image.shape[1]
    rgb = image.sum((0, 1)) / pixels
    variances, vectors = np.linalg.eigh(products / pixels - np.outer(rgb, rgb))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)
    return {
        'mean': (image / count).astype(np.float32),
        'eigenvectors': vectors.astype(np.float32),
        'sigma': np.sqrt(variances.clip(0)).astype(np.float32),
    }
