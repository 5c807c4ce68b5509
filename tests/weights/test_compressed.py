"""model.compressed: Huffman codes, gaps, round trips to the last bit; damaged files are refused."""

import itertools
import json
import re
import struct
import zlib

import numpy as np
import pytest

from alexnet_jax.common.errors import UserError
from alexnet_jax.rundir import fingerprint
from alexnet_jax.weights import bundle, compressed
from tests.helpers.weight_files import EVIL, SHOWN
from tests.weights.test_bundle import _replace, assert_same, made


def f32(*values):
    return np.float32(values)


def sparse(count, at, values):
    x = np.zeros(count, np.float32)
    x[at] = values
    return x


RNG = np.random.default_rng(0)
PLACES = np.sort(RNG.choice(20_000, 1500, replace=False))
VALUES = RNG.normal(size=32).astype(np.float32)
ARRAYS = {
    'empty': np.zeros((0, 3), np.float32),
    'zeros': np.zeros((40, 50), np.float32),
    'one weight, at the end': sparse(1000, [999], 0.5),
    'one weight, at the start': sparse(1000, [0], -3),
    'one value': np.full((30, 20), 0.1, np.float32),
    'long gaps': sparse(5000, [14, 30, 46, 61, 900, 4999], [1, 2, 3, 1, 2, 1]),
    'a kernel': sparse(20_000, PLACES, VALUES[RNG.integers(0, 32, 1500)]).reshape(5, 5, 8, 100),
    'negative zero and NaN': np.tile(f32(-0.0, 0.0, np.nan, -np.inf, 1e-45), 50),
    'too many values': np.arange(1, 300, dtype=np.float32),
    'most values': np.tile(np.arange(1, 257, dtype=np.float32), 20),
    'levels': np.rint(128 + 127 * np.sin(np.arange(3000) / 150).reshape(20, 50, 3)).astype(
        np.float32
    ),
    'steep levels': RNG.integers(0, 256, (9, 11, 3)).astype(np.float32),
    'half': np.float16([1, 2, 3]),
    'double': np.linspace(0, 1, 7),
    'scalar': np.float32(3),
}


@pytest.mark.parametrize('name', ARRAYS)
@pytest.mark.parametrize('huffman', [True, False])
def test_round_trip(name, huffman):
    data = compressed.encoded({'before': f32(1, 2), name: ARRAYS[name]}, huffman=huffman)
    found = compressed.decoded(data, 'file')
    assert [*found] == ['before', name]
    assert found[name].dtype == ARRAYS[name].dtype and found[name].shape == ARRAYS[name].shape
    assert found[name].tobytes() == ARRAYS[name].tobytes()
    described = {one.name: one for one in compressed.described(data, 'file')}
    assert described[name].size <= ARRAYS[name].nbytes


def test_each_array_has_the_form_that_fits():
    data = compressed.encoded(ARRAYS)
    forms = {one.name: one.kind for one in compressed.described(data, '')}
    expected = dict.fromkeys(ARRAYS, 'shared')
    expected |= dict.fromkeys(['empty', 'too many values', 'half', 'double', 'scalar'], 'raw')
    expected |= {'levels': 'levels', 'steep levels': forms['steep levels']}
    assert forms == expected
    kernel = next(one for one in compressed.described(data, '') if one.name == 'a kernel')
    assert (kernel.kept, kernel.values) == (1500, 32)
    assert kernel.size < ARRAYS['a kernel'].nbytes / 35


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_gaps(bits):
    most = 2**bits - 1
    places = np.cumsum([1, most, most + 1, 2 * most, 2 * most + 1, 10 * most, 1, 1])
    gaps = compressed._gaps(places, bits)
    assert gaps.max() <= most and gaps.min() >= 0
    np.testing.assert_array_equal(compressed._places(gaps, bits), places)
    assert not len(compressed._gaps(places[:0], bits))


def test_huffman_codes():
    counts = np.array([45, 0, 13, 12, 16, 9, 5])  # Cormen et al., "Introduction to Algorithms"
    lengths = compressed.code_lengths(counts)
    assert lengths.tolist() == [1, 0, 3, 3, 3, 4, 4]
    codes = compressed._codes(lengths)
    words = [f'{c:0{n}b}' for c, n in zip(codes.tolist(), lengths.tolist(), strict=True) if n]
    assert not any(a.startswith(b) for a, b in itertools.permutations(words, 2))
    assert compressed.code_lengths(np.array([0, 7])).tolist() == [0, 1]
    assert compressed.code_lengths(np.zeros(3, int)).tolist() == [0, 0, 0]


def test_no_code_is_too_long():
    counts = [1, 1]
    while len(counts) < 40:  # of these, the longest code has 39 bits
        counts.append(counts[-1] + counts[-2])
    lengths = compressed.code_lengths(np.array(counts)).astype(int)
    assert lengths.max() == compressed.LONGEST_CODE and (2.0**-lengths).sum() <= 1


def edited(change, arrays=None):
    """A file whose header `change` has altered."""
    data = compressed.encoded(arrays or {'a': ARRAYS['long gaps']})
    length = struct.unpack_from('<I', data, 12)[0]
    rows = json.loads(zlib.decompress(data[16 : 16 + length]))
    header = zlib.compress(json.dumps(change(rows) or rows).encode())
    return struct.pack('<8sII', b'ALEXCOMP', 1, len(header)) + header + data[16 + length :]


def field(number, value):
    def change(rows):
        rows[0][number] = value

    return edited(change)


def with_parts(**changes):
    """A file with different bytes in some parts of its first array."""
    data = compressed.encoded({'a': ARRAYS['long gaps']})
    (coded,), at = compressed._header(data, '')
    parts = {}
    for name, size in zip(
        ('values', 'lengths', 'gap_lengths', 'code', 'gap_code'), coded.parts, strict=True
    ):
        parts[name], at = data[at : at + size], at + size
    parts |= {name: change(parts[name]) for name, change in changes.items()}
    return data[: len(data) - coded.size] + b''.join(parts.values())


WHOLE = compressed.encoded({'a': ARRAYS['long gaps']})
BOMB = zlib.compress(b'[' + b' ' * 2**25)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'does not begin'),
        (b'ALEXCOMQ' + WHOLE[8:], 'does not begin'),
        (WHOLE[:8] + struct.pack('<I', 2) + WHOLE[12:], 'has format 2; update alexnet_jax'),
        (WHOLE[:-1], 'bytes, but its header describes'),
        (WHOLE + b'\0', 'bytes, but its header describes'),
        (WHOLE[:20], 'header is wrong'),
        (WHOLE[:12] + struct.pack('<I', 2**31) + WHOLE[16:], 'header is wrong|describes'),
        (struct.pack('<8sII', b'ALEXCOMP', 1, len(BOMB)) + BOMB, 'header is wrong'),
        (edited(lambda rows: {'a': 1}), 'header is wrong'),
        (edited(lambda rows: [rows[0][:3]]), 'header is wrong'),
        (edited(lambda rows: rows + rows), 'name appears twice'),
        (field(0, 5), 'header is wrong'),
        (field(1, 'pickle'), 'header is wrong'),
        (field(1, 'levels'), 'header is wrong'),
        (field(2, 'F16'), 'header is wrong'),
        (field(2, ['F32']), 'header is wrong'),
        (field(3, [-5000]), 'header is wrong'),
        (field(3, [5000.0]), 'header is wrong'),
        (field(3, [2**35]), 'more than 2 GiB'),
        (field(3, [4999]), 'outside its shape'),
        (
            edited(lambda rows: [[EVIL, *rows[0][1:3], [4999], *rows[0][4:]]]),
            f'{re.escape(SHOWN)} has weights outside',
        ),
        (field(4, 7), 'a code is wrong'),
        (field(4, 5001), 'header is wrong'),
        (field(5, 2**39), 'a code is wrong'),
        (field(6, 257), 'header is wrong'),
        (field(7, 40), 'header is wrong'),
        (field(8, 10), 'a code is wrong'),
        (field(9, 10**9), 'header describes'),
        (with_parts(lengths=lambda b: b'\1' * len(b)), 'codes do not fit'),
        (with_parts(lengths=lambda b: b'\x11' * len(b)), 'code is too long'),
        (with_parts(lengths=lambda b: bytes(len(b))), 'a code is wrong'),
        (with_parts(gap_code=lambda b: bytes(len(b))), 'a code is wrong|outside its shape'),
    ],
)
def test_damaged_files(data, message):
    with pytest.raises(UserError, match=message) as error:
        compressed.decoded(data, 'a/file')
    assert str(error.value).startswith('a/file: ') and str(error.value).isprintable()


def test_flipped_bits():
    """Each is refused or gives different weights; none raises anything else."""
    data = compressed.encoded({'a': ARRAYS['long gaps'], 'm': ARRAYS['levels'], 'b': f32(1, 2)})
    refused = 0
    for place in RNG.integers(0, 8 * len(data), 400).tolist():
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            compressed.decoded(bytes(damaged), 'file')
        except UserError:
            refused += 1
    assert refused > 50


def test_a_bundle(tmp_path):
    layer = {'kernel': ARRAYS['a kernel'], 'bias': np.zeros(100, np.float32)}
    expected = made(variables={'params': {'conv1': layer}, 'batch_stats': {}})
    bundle.write(tmp_path / 'a', expected, compress=True)
    assert bundle.is_bundle(tmp_path / 'a')
    assert {*bundle.files(tmp_path / 'a')} == {file.name for file in (tmp_path / 'a').iterdir()}
    assert 'model.compressed' in bundle.files(tmp_path / 'a')
    found = bundle.read(tmp_path / 'a')
    assert_same(found, expected)
    bundle.write(tmp_path / 'b', found)
    assert 'model.safetensors' in bundle.files(tmp_path / 'b')
    assert_same(bundle.read(tmp_path / 'b'), expected)
    (tmp_path / 'a' / 'model.compressed').write_bytes(WHOLE)
    with pytest.raises(UserError, match='does not have the SHA-256'):
        bundle.read(tmp_path / 'a')
    _replace(tmp_path / 'a', 'model.compressed', WHOLE[:-1])
    with pytest.raises(UserError, match='model.compressed: not a compressed network'):
        bundle.read(tmp_path / 'a')
    assert fingerprint.named_leaves(found.variables).keys() == {
        'params/conv1/kernel',
        'params/conv1/bias',
    }
