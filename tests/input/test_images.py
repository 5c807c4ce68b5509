"""Files in people's folders are decoded correctly or refused with a reason, never black or noise."""

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from alexnet_jax.input import images
from alexnet_jax.input.images import Undecodable, decode, square
from tests.helpers import fixtures

# What a camera stores for each EXIF orientation so that it is upright when turned.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def with_exif(image: Image.Image, orientation: int, format: str) -> bytes:
    data, exif = io.BytesIO(), Image.Exif()
    exif[images.ORIENTATION] = orientation
    image.save(data, format, exif=exif, **({'lossless': True} if format == 'WEBP' else {}))
    return data.getvalue()


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP', 'TIFF', 'AVIF'])
@pytest.mark.parametrize('orientation', STORED)
def test_exif_turns_the_image_upright(orientation, format):
    upright = np.asarray(fixtures.picture(4, 64, 32))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = with_exif(stored, orientation, format)
    found = np.asarray(decode(data, exif=True)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < (6 if format in ('JPEG', 'AVIF') else 1e-9)
    if format == 'PNG':
        assert (square(data, 24, exif=True) == square(upright, 24)).all()
        assert (np.asarray(decode(data)) == np.asarray(stored)).all()


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_exif_of_every_mode(mode):
    image = fixtures.picture(4, 60, 40)
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    data = with_exif(image, 6, 'JPEG' if mode == 'CMYK' else 'PNG')
    assert decode(data).size == (60, 40) and decode(data, exif=True).size == (40, 60)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('exif', [b'', b'Exif\0\0garbage', b'MM\0*', b'MM\0*\0\0\0\x08\0\x05\x01'])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_damaged_exif_is_ignored(format, exif):
    image, data = fixtures.picture(4), io.BytesIO()
    image.save(data, format, exif=exif)
    found, expected = (decode(data.getvalue(), exif=exif) for exif in (True, False))
    assert (np.asarray(found) == np.asarray(expected)).all()


GRAY = np.asarray(fixtures.picture(3).convert('L'))
WIDE = GRAY.astype(np.uint16) << 8 | 90  # bytes in the wrong order would be noise


def tiff(values: np.ndarray, order: str, bits: int, format: int = 1, white_is_zero=False) -> bytes:
    """An uncompressed gray TIFF of one strip."""
    raw = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        packed = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        raw = np.stack(packed, 1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 200}
    tags |= {277: 1, 278: height, 279: len(raw), 339: format}
    head = struct.pack(f'{order}2sHIH', b'II' if order == '<' else b'MM', 42, 8, len(tags))
    rows = b''.join(struct.pack(f'{order}HHII', t, 4, 1, v) for t, v in sorted(tags.items()))
    return (head + rows).ljust(200, b'\0') + raw


@pytest.mark.parametrize(
    'data',
    [
        tiff(WIDE, '<', 16),
        tiff(WIDE, '>', 16),
        tiff(65535 - WIDE, '<', 16, white_is_zero=True),
        tiff(GRAY.astype(np.uint16) << 4, '<', 12),
        fixtures.encode(Image.fromarray(WIDE), 'PNG'),
        b'P5 60 45 65535\n' + WIDE.astype('>u2').tobytes(),
        b'P5 60 45 4095\n' + (GRAY.astype(np.uint16) << 4).astype('>u2').tobytes(),
    ],
    ids=['<', '>', 'white is zero', '12 bits', 'PNG', 'PGM', 'PGM 12 bits'],
)
def test_16_bits_keep_the_high_byte(data):
    found = np.asarray(decode(data)).astype(int)
    assert np.abs(found - GRAY[:, :, None]).max() <= 1


def png_16(values: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    chunks = {
        b'IHDR': struct.pack('>2I5B', width, height, 16, 2, 0, 0, 0),
        b'IDAT': zlib.compress(rows),
        b'IEND': b'',
    }
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*item) for item in chunks.items())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def test_16_bit_color():
    colors = np.asarray(fixtures.picture(3))
    assert (np.asarray(decode(png_16(colors.astype(np.uint16) << 8 | 90))) == colors).all()
    assert (np.asarray(decode(colors.astype(np.uint16) << 8 | 90)) == colors).all()


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (tiff(GRAY.astype(np.uint32) << 16, '<', 32), '32-bit integer pixels: convert'),
        (tiff(GRAY.astype(np.int16), '<', 16, format=2), '32-bit integer pixels: convert'),
        (tiff(GRAY.astype(np.float32) / 255, '<', 32, format=3), 'floating-point pixels: convert'),
        (GRAY[:, :, None].astype(np.float32), 'float32 pixels: convert them'),
        (GRAY[:, :, None].astype(np.int64), 'int64 pixels: convert them'),
        (np.zeros((4, 4, 2), np.uint8), 'an array of shape .4, 4, 2.: give'),
        (tiff(GRAY.astype(np.uint16) << 4, '<', 16), '16-bit image with all values below 4,096'),
        (png_16(np.full((4, 4, 3), 4000)), '16-bit image with all values below 4,096'),
        (np.full((4, 4, 3), 4000, np.uint16), '16-bit image with all values below 4,096'),
        (b'', 'an empty file'),
        (bytes(1000), 'only zero bytes'),
        (b'\n<!DOCTYPE html><html>Not found', 'a web page'),
        (b'<?xml version="1.0"?><svg/>', 'SVG'),
        (b'no image at all', '^not an image that Pillow can read$'),
        (fixtures.encode(fixtures.picture(1))[:500], '(?i)truncated'),
        (fixtures.encode(fixtures.picture(1), 'PNG')[:500], 'truncated|broken'),
        (b'\x89PNG\r\n\x1a\n no', '^damaged, or a kind of PNG that Pillow cannot read$'),
        (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', '^HEIC: pip install pillow-heif$'),
        (b'\0\0\0\x18ftypmif1\0\0\0\0mif1heic', '^HEIC: pip install pillow-heif$'),
    ],
)
def test_refused_with_a_reason(data, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    images._register_heif.cache_clear()
    with pytest.raises(Undecodable, match=reason) as raised:
        decode(data)
    assert ' at 0x' not in str(raised.value) and '\n' not in str(raised.value)


def test_a_reason_has_no_object_addresses(monkeypatch):
    def open_(file):
        raise OSError(f'cannot read\n{file}')

    monkeypatch.setattr(Image, 'open', open_)
    with pytest.raises(Undecodable, match='^cannot read the file$'):
        decode(b'data')


def test_heic_where_pillow_heif_is_installed(monkeypatch):
    """Its opener is registered once; the stand-in here reads any HEIC as black."""

    class Opener(Image.Image):
        def __init__(self, file, name):
            super().__init__()
            made = Image.new('RGB', (6, 4))
            self.im, self._mode, self._size, self.tile = made.im, 'RGB', (6, 4), []

    def register():
        calls.append(1)
        Image.register_open('HEIF', Opener, lambda head: head[4:12] == b'ftypheic')

    calls = []
    monkeypatch.setitem(
        sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=register)
    )
    monkeypatch.setattr(Image, 'OPEN', {**Image.OPEN})
    monkeypatch.setattr(Image, 'ID', [*Image.ID])
    images._register_heif.cache_clear()
    for _ in range(2):
        assert decode(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic').size == (6, 4)
    images._register_heif.cache_clear()
    assert calls == [1]


def empty_png(width: int, height: int) -> bytes:
    """One bit a pixel, all black."""
    rows = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b''.join(rows.compress(row) for _ in range(height)) + rows.flush()
    head = struct.pack('>2I5B', width, height, 1, 0, 0, 0, 0)
    chunks = ((b'IHDR', head), (b'IDAT', data), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*item) for item in chunks)


@pytest.mark.slow
def test_a_very_large_image_is_decoded():
    limit = Image.MAX_IMAGE_PIXELS
    assert square(empty_png(20_000, 10_000), 32).shape == (32, 32, 3)
    assert Image.MAX_IMAGE_PIXELS == limit


def test_too_large_names_the_limit():
    head = struct.pack('>2I5B', 40_000, 40_000, 1, 0, 0, 0, 0)
    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
    with pytest.raises(
        Undecodable,
        match='^too large: 40,000 x 40,000 pixels, the limit is 500 million pixels$',
    ):
        decode(data)


@pytest.mark.parametrize('where', ['before', 'after', 'iCCP', 'many'])
def test_large_metadata_is_not_damage(where):
    image = fixtures.picture(5)
    data = fixtures.encode(image, 'PNG')
    text = chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(80_000_000), 1))
    head, rest = data[:33], data[33:]  # the signature and IHDR
    made = {
        'before': lambda: head + text + rest,
        'after': lambda: data[:-12] + text + data[-12:],
        'iCCP': lambda: head + chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(8_000_000))) + rest,
        'many': lambda: head + 70 * chunk(b'tEXt', b'a\0' + bytes(1_000_000)) + rest,
    }[where]()
    with pytest.raises(ValueError):
        Image.open(io.BytesIO(made)).load()  # Pillow alone refuses it
    assert (np.asarray(decode(made)) == np.asarray(image)).all()


def test_large_exif_and_color_profile_of_a_jpeg():
    image, data = fixtures.picture(5), io.BytesIO()
    image.save(data, 'JPEG', exif=b'Exif\0\0' + bytes(60_000), icc_profile=bytes(3_000_000))
    assert decode(data.getvalue(), exif=True).size == image.size


def test_text_of_a_png_may_be_damaged():
    info = PngImagePlugin.PngInfo()
    info.add_text('a', 'b' * 100)
    image, data = fixtures.picture(5), io.BytesIO()
    image.save(data, 'PNG', pnginfo=info)
    flipped = data.getvalue().replace(b'b' * 50, b'c' * 50, 1)
    assert (np.asarray(decode(flipped)) == np.asarray(image)).all()
