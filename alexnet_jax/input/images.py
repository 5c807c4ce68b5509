"""Converts any image to the RGB square that the network reads, and computes image statistics."""

import functools
import io
import re
import threading
from contextlib import nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from alexnet_jax.common import paths
from alexnet_jax.common.errors import InputError, one_line, reason

# Mean absolute difference from cuda-convnet2's INTER_AREA on 903 photographs that shrink: bilinear
# 0.96 levels, Hamming 1.04, box 2.96 (Pillow's box filter takes whole pixels, so it aliases).
FILTER = 'antialiased bilinear down, bicubic up'
# In pixels: larger images are decoded one at a time, or rejected.
LARGE, LARGEST = 50_000_000, 500_000_000
LONGEST = 65_500  # side of a JPEG, by its library
ORIENTATION = 0x0112  # EXIF's tag
TURNS = dict(  # what undoes each orientation
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
HEIF = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
MAGIC = {
    b'\xff\xd8\xff': 'JPEG',
    b'\x89PNG': 'PNG',
    b'GIF8': 'GIF',
    b'II\\*\0|MM\0\\*': 'TIFF',
    b'RIFF....WEBP': 'WebP',
}
METADATA = (b'tEXt', b'zTXt', b'iTXt', b'iCCP')  # PNG chunks that no pixel depends on
_opening, _large = threading.Lock(), threading.Lock()


class Undecodable(Exception):
    """An image that cannot be decoded; the message is the reason, without the image's name."""


def decode(data: bytes | np.ndarray | Image.Image, *, exif: bool = False) -> Image.Image:
    """Decodes an image file of any format, an array u8 or u16[H,W,C], or a Pillow image to RGB.

    Transparency is dropped. With 16 bits per channel, the high byte is kept. exif: rotates the image by its
    EXIF orientation. (TIFF and HEIF images are always upright.)

    Raises:
      Undecodable: the message says why and, if known, what to do.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data)
    try:
        return _to_rgb(data if isinstance(data, Image.Image) else _open(data), exif)
    except Undecodable:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        if isinstance(data, Image.Image):
            raise Undecodable(one_line(error)) from error
        if without := _without_metadata(data):  # Pillow refuses PNGs for their metadata alone
            return decode(without, exif=exif)
        raise Undecodable(_reason(error, data)) from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype == np.uint16:
        array = _high_byte(array)
    if array.dtype != np.uint8:
        raise Undecodable(f'{array.dtype} pixels: convert them to 8 or 16 bits')
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] not in (3, 4):
        raise Undecodable(f'an array of shape {array.shape}: give [H,W,C] with 1, 3 or 4 channels')
    return Image.fromarray(array).convert('RGB')


def _to_rgb(image: Image.Image, exif: bool) -> Image.Image:
    width, height = image.size
    if width * height > LARGEST:
        raise Undecodable(
            f'too large: {width:,} x {height:,} pixels, the limit is '
            f'{LARGEST // 1_000_000} million pixels'
        )
    with _large if width * height > LARGE else nullcontext():
        raw = str(getattr(image, 'tile', [])[:1])  # loading discards it
        image.load()
        orientation = _orientation(image) if exif else 1
        if image.mode == 'F' or image.mode == 'I' and image.format not in ('PNG', 'PPM'):
            kind = 'floating-point' if image.mode == 'F' else '32-bit integer'
            raise Undecodable(f'{kind} pixels: convert them to 8 or 16 bits')
        if image.mode.startswith('I'):  # 16 bits per pixel: Pillow's own conversion would clip
            values = np.asarray(image)
            tags = getattr(image, 'tag_v2', {})
            if tags.get(258) == (12,):  # BitsPerSample
                values = values << 4
            if tags.get(262) == 0:  # PhotometricInterpretation: white is 0
                values = values ^ 0xFFFF
            image = Image.fromarray(_high_byte(values))
            raw = ''
        if image.mode != 'RGB':
            image = image.convert('RGB')
        if ';16' in raw:  # Pillow has kept the high bytes
            _check_range(np.asarray(image))
        if orientation != 1:
            image = image.transpose(TURNS[orientation])
        return image


def _open(data: bytes) -> Image.Image:
    """Opens an image without decoding it; its size is not checked."""
    if data[4:8] == b'ftyp' and data[8:12] in HEIF and b'avif' not in data[12:64]:
        _register_heif()
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        with _opening:  # Pillow's limit is global
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(io.BytesIO(data))
            finally:
                Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise Undecodable('HEIC: pip install pillow-heif') from error
    pillow_heif.register_heif_opener()


def _orientation(image: Image.Image) -> int:
    if image.format == 'JPEG' and not image.info.keys() & {'exif', 'xmp'}:
        return 1  # the usual case, without parsing anything
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata
        return 1
    return orientation if orientation in TURNS else 1


def _high_byte(values: np.ndarray) -> np.ndarray:
    """The high bytes of 16-bit values, as u8."""
    high = (values >> 8).clip(0, 255).astype(np.uint8)
    _check_range(high)
    return high


def _check_range(high: np.ndarray) -> None:
    """Rejects images that would be black, for example 12-bit values in 16-bit pixels."""
    if high.max() < 16:
        raise Undecodable(
            'a 16-bit image with all values below 4,096 of 65,535: scale it to the full range'
        )


def _without_metadata(data: bytes) -> bytes:
    """A PNG file without its text chunks and color profile; b'' if there are none, or it is not a PNG."""
    if not data.startswith(b'\x89PNG\r\n\x1a\n'):
        return b''
    kept, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] not in METADATA:
            kept.append(data[start:end])
        start = end
    result = b''.join(kept)
    return result if len(result) < len(data) else b''


def _reason(error: Exception, data: bytes) -> str:
    """Why a file cannot be decoded, in a few words."""
    begin = data[:1000].lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if not data:
        return 'an empty file'
    if not data.strip(b'\0'):
        return 'only zero bytes'
    if begin.startswith((b'<!doctype html', b'<html')):
        return 'a web page, not an image'
    if begin.startswith((b'<svg', b'<?xml')):
        return 'SVG or XML, not a raster image'
    if isinstance(error, UnidentifiedImageError):
        kind = next((name for magic, name in MAGIC.items() if re.match(magic, data, re.DOTALL)), '')
        if kind:
            return f'damaged, or a kind of {kind} that Pillow cannot read'
        return 'not an image that Pillow can read'
    if isinstance(error, MemoryError):
        return 'not enough memory to decode it'
    text = ' '.join(str(error).split()) if isinstance(error, OSError) else one_line(error)
    return re.sub(r'<[^<>]* at 0x[0-9a-f]+>', 'the file', text)[:200] or type(error).__name__


def read(path: str, size: int, *, exif: bool) -> np.ndarray:
    """Reads an image file of any format -> its `square`, u8[size,size,3].

    Raises InputError if the file cannot be read or decoded.
    """
    try:
        content = paths.Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter for a null byte
        raise InputError(
            f'{path or "an empty path"}: cannot be read: {reason(error)}; give an image file'
        ) from error
    try:
        return square(content, size, exif=exif)
    except Undecodable as error:
        raise InputError(
            f'{path}: cannot be decoded ({error}); repair it or leave it out'
        ) from error


def square(data: bytes | np.ndarray | Image.Image, size: int, *, exif: bool = False) -> np.ndarray:
    """Resizes the shorter side to `size` and crops the central square -> u8[size,size,3].

    As in the paper (§2); rounding, the corner at (n - size) // 2 and bicubic upscaling are those
    of cuda-convnet2 (`docs/original.md` §5). exif, errors: see `decode`.
    """
    image = decode(data, exif=exif)
    shorter, sides = min(image.size), _sides(image, size)
    scales = [old / new for old, new in zip(image.size, sides, strict=True)]
    corner = [(side - size) // 2 for side in sides]
    # Only the part of the image inside the square needs to be resized.
    box = [
        scale * (low + end) for end in (0, size) for scale, low in zip(scales, corner, strict=True)
    ]
    return np.asarray(image.resize((size, size), _filter(shorter, size), box=box))


def whole(data: bytes | np.ndarray | Image.Image, size: int, *, exif: bool = False) -> np.ndarray:
    """Resizes the shorter side to `size`, as `square` does, but keeps all of the image -> u8[H,W,3].

    Raises Undecodable if the longer side would be longer than JPEG allows.
    """
    image = decode(data, exif=exif)
    sides = _sides(image, size)
    if max(sides) > LONGEST:
        raise Undecodable(
            f'{image.width} x {image.height} pixels: too long to be kept whole at {size} pixels'
        )
    return np.asarray(image.resize(sides, _filter(min(image.size), size)))


def central(images, size: int):
    """Returns the central squares of images [...,H,W,3] -> [...,size,size,3]; of a mean image, too."""
    y, x = ((side - size) // 2 for side in images.shape[-3:-1])
    return images[..., y : y + size, x : x + size, :]


def _sides(image: Image.Image, size: int) -> list[int]:
    return [int(side * size / min(image.size) + 0.5) for side in image.size]


def _filter(shorter: int, size: int) -> Image.Resampling:
    return Image.Resampling.BILINEAR if shorter > size else Image.Resampling.BICUBIC


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Resizes a box (left, top, right, bottom) of an image to a square, antialiased -> u8[size,size,3]."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR))


def statistics(image: np.ndarray, products: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Computes the mean image and color PCA from sums over `count` images, in levels (0-255).

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
