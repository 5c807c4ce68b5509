"""Arrays with few distinct values in few bits: pruned, with shared weights, Huffman coded (docs/weights.md).

The coding of Han, Mao, Dally 2015, "Deep Compression". It is lossless; `training.compression` prepares the
arrays. Nothing in a file is trusted.
"""

import heapq
import itertools
import json
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from alexnet_jax.common.errors import UserError
from alexnet_jax.weights import variables
from alexnet_jax.weights.safetensors import DTYPES
from alexnet_jax.weights.variables import Damaged

MAGIC, FORMAT = b'ALEXCOMP', 1
INDEX_BITS = 4
MOST = 256  # values of a shared array
LONGEST_CODE, LONGEST_HEADER = 16, 2**24  # bits, bytes
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Coded(NamedTuple):
    """How an array is stored. For kinds other than 'shared', the numbers are 0, except `bits` for 'levels'.

    kind: 'raw'; 'shared', values by index and gaps; or 'levels', whole numbers from 0 to 255, as
    differences.
    """

    name: str
    kind: str
    dtype: str  # as in .safetensors
    shape: tuple[int, ...]
    kept: int = 0  # weights that are stored
    gaps: int = 0  # numbers that say where they are
    values: int = 0  # distinct ones
    index_bits: int = 0  # of a gap, before Huffman coding
    bits: int = 0  # of all values
    gap_bits: int = 0  # of all gaps

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def parts(self) -> tuple[int, ...]:
        """The sizes in bytes of what follows the header, in order."""
        streams = -(-self.bits // 8), -(-self.gap_bits // 8)
        if self.kind == 'raw':
            return (self.count * DTYPES[self.dtype].itemsize,)
        if self.kind == 'levels':
            return MOST, streams[0]
        return 4 * self.values, self.values, 2**self.index_bits, *streams

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(self.parts)


def encoded(arrays: dict[str, np.ndarray], *, huffman: bool = True) -> bytes:
    """The content of a file; each array in the smallest form that keeps all its bits.

    huffman: whether frequent symbols get shorter codes.
    """
    found = [_encode(name, np.asarray(x), huffman) for name, x in arrays.items()]
    text = json.dumps([[*coded] for coded, _ in found], separators=(',', ':'))
    header = zlib.compress(text.encode(), 9)
    start = struct.pack('<8sII', MAGIC, FORMAT, len(header))
    return b''.join([start, header, *itertools.chain(*(parts for _, parts in found))])


def decoded(data: bytes, file: str) -> dict[str, np.ndarray]:
    """The arrays of a file, by name; file: what errors call it. Raises UserError if it is damaged."""
    try:
        contents, at = _header(data, file)
        found = {}
        for coded in contents:
            parts = []
            for size in coded.parts:
                parts.append(np.frombuffer(data, np.uint8, size, at))
                at += size
            found[coded.name] = _decode(coded, parts)
    except Damaged as error:
        raise UserError(f'{file}: not a compressed network ({error}): get a fresh copy') from None
    return found


def described(data: bytes, file: str) -> list[Coded]:
    """How a file stores its arrays, in order. Raises UserError if it is damaged."""
    try:
        return _header(data, file)[0]
    except Damaged as error:
        raise UserError(f'{file}: not a compressed network ({error}): get a fresh copy') from None


def _header(data: bytes, file: str) -> tuple[list[Coded], int]:
    """(what the header says, where it ends), if all arrays are there."""
    if len(data) < 16 or data[:8] != MAGIC:
        raise Damaged(f'it does not begin with {MAGIC.decode()}')
    version, length = struct.unpack_from('<II', data, 8)
    if version != FORMAT:
        raise UserError(f'{file}: has format {version}; update alexnet_jax, which reads {FORMAT}')
    try:
        text = zlib.decompressobj().decompress(data[16 : 16 + length], LONGEST_HEADER)
        rows = json.loads(text.decode())
        contents = [_checked(Coded(*row)) for row in rows]
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise Damaged('its header is wrong') from None
    if len({coded.name for coded in contents}) < len(contents):
        raise Damaged('a name appears twice')
    if sum(coded.count * DTYPES[coded.dtype].itemsize for coded in contents) > variables.LARGEST:
        raise Damaged('its arrays would take more than 2 GiB')
    end = 16 + length + sum(coded.size for coded in contents)
    if end != len(data):
        raise Damaged(f'{len(data):,} bytes, but its header describes {end:,}')
    return contents, 16 + length


def _checked(row: Coded) -> Coded:
    """A row of a header; ValueError, ... if it is impossible."""
    coded = row._replace(shape=tuple(row.shape))
    numbers = [*coded.shape, *coded[4:]]
    valid = [
        isinstance(coded.name, str),
        coded.kind in ('raw', 'shared', 'levels'),
        coded.kind == 'raw' or coded.dtype == 'F32',
        coded.dtype in DTYPES,
        len(coded.shape) <= 32,
        all(type(n) is int and 0 <= n < 2**40 for n in numbers),
    ]
    if not all(valid):
        raise ValueError
    if coded.kind == 'shared':
        valid = [
            coded.kept <= min(coded.count, coded.gaps),
            coded.values <= MOST,
            2 <= coded.index_bits <= 8,
        ]
    if coded.kind == 'levels':
        valid = [len(coded.shape) == 3, coded.count]
    if not all(valid):
        raise ValueError
    return coded


def _encode(name: str, x: np.ndarray, huffman: bool) -> tuple[Coded, list[bytes]]:
    """The smallest form of an array, and its parts."""
    x = x.astype(x.dtype.newbyteorder('<'), copy=False)
    if x.dtype not in CODES:
        raise UserError(f'{name}: cannot hold an array of {x.dtype}')
    raw = Coded(name, 'raw', CODES[x.dtype], x.shape)
    forms = [(raw, [x.tobytes()])]
    if x.dtype == np.float32:
        forms += _shared(raw, x, huffman)
        forms += _levels(raw, x, huffman)
    return min(forms, key=lambda form: form[0].size)


def _shared(raw: Coded, x: np.ndarray, huffman: bool) -> list:
    words = np.ascontiguousarray(x).reshape(-1).view(np.uint32)  # so that -0 and NaN are kept, too
    places = np.flatnonzero(words)
    values, numbers = np.unique(words[places], return_inverse=True)
    if len(values) > MOST:
        return []
    gaps = _gaps(places, INDEX_BITS)
    code, lengths, bits = _stream(numbers, len(values), huffman)
    gap_code, gap_lengths, gap_bits = _stream(gaps, 2**INDEX_BITS, huffman)
    coded = raw._replace(
        kind='shared',
        kept=len(places),
        gaps=len(gaps),
        values=len(values),
        index_bits=INDEX_BITS,
        bits=bits,
        gap_bits=gap_bits,
    )
    return [(coded, [values.tobytes(), lengths.tobytes(), gap_lengths.tobytes(), code, gap_code])]


def _levels(raw: Coded, x: np.ndarray, huffman: bool) -> list:
    words = x.astype(np.uint8) if ((x >= 0) & (x <= 255)).all() else x
    if x.ndim != 3 or words is x or (words != x).any() or np.signbit(x).any():
        return []
    code, lengths, bits = _stream(_differences(words), MOST, huffman)
    return [(raw._replace(kind='levels', bits=bits), [lengths.tobytes(), code])]


def _differences(levels: np.ndarray) -> np.ndarray:
    """u8[H,W,C] -> u8[H*W*C], modulo 256: from the pixel on the left, and from the first one above."""
    left = np.diff(levels, axis=1, prepend=np.uint8(0))
    left[:, 0] = np.diff(levels[:, 0], axis=0, prepend=np.uint8(0))
    return left.reshape(-1)


def _decode(coded: Coded, parts: list[np.ndarray]) -> np.ndarray:
    if coded.kind == 'raw':
        return parts[0].view(DTYPES[coded.dtype]).reshape(coded.shape).copy()  # aligned
    if coded.kind == 'levels':
        left = _symbols(parts[1], parts[0], coded.bits, coded.count).reshape(coded.shape)
        left[:, 0] = np.cumsum(left[:, 0], axis=0, dtype=np.uint8)
        return np.cumsum(left, axis=1, dtype=np.uint8).astype(np.float32)
    values, lengths, gap_lengths, code, gap_code = parts
    numbers = _symbols(code, lengths, coded.bits, coded.kept)
    gaps = _symbols(gap_code, gap_lengths, coded.gap_bits, coded.gaps)
    places = _places(gaps, coded.index_bits)
    if len(places) != coded.kept or (len(places) and places[-1] >= coded.count):
        raise Damaged(f'{coded.name[:60]} has weights outside its shape')
    words = np.zeros(coded.count, np.uint32)
    words[places] = values.view('<u4')[numbers]
    return words.view(np.float32).reshape(coded.shape)


def _gaps(places: np.ndarray, bits: int) -> np.ndarray:
    """The zeros before each weight at these places (ascending), i64[G].

    2^bits - 1 stands for that many zeros, with no weight yet.
    """
    most = 2**bits - 1
    gaps = np.diff(places, prepend=-1) - 1
    full = gaps // most
    found = np.full(len(places) + full.sum(), most)
    found[np.cumsum(full + 1) - 1] = gaps % most
    return found


def _places(gaps: np.ndarray, bits: int) -> np.ndarray:
    """Inverts `_gaps`."""
    weight = gaps != 2**bits - 1
    return (np.cumsum(gaps.astype(np.int64) + weight) - 1)[weight]


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """The bits of each symbol in a Huffman code for symbols that occur this often: u8[N], 0 for never.

    At most `LONGEST_CODE`, so if some counts are extremely small, the code is not quite optimal.
    """
    counts = np.asarray(counts, np.int64)
    while True:
        lengths = np.zeros(len(counts), np.int64)
        heap = [(int(counts[i]), i, [i]) for i in np.flatnonzero(counts)]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, i, first), (b, _, second) = heapq.heappop(heap), heapq.heappop(heap)
            lengths[first + second] += 1
            heapq.heappush(heap, (a + b, i, first + second))
        if lengths.max(initial=0) <= LONGEST_CODE:
            return lengths.astype(np.uint8)
        counts = (counts + 1) // 2


def _codes(lengths: np.ndarray) -> np.ndarray:
    """The canonical code: shorter ones first, then by symbol, i64[N]. Raises Damaged if they do not fit."""
    found, code, before = np.zeros(len(lengths), np.int64), 0, 0
    for symbol in np.argsort(lengths, kind='stable').tolist():
        if length := int(lengths[symbol]):
            if length > LONGEST_CODE:
                raise Damaged('a code is too long')
            code <<= length - before
            if code >> length:
                raise Damaged('its codes do not fit')
            found[symbol], code, before = code, code + 1, length
    return found


def _stream(symbols: np.ndarray, count: int, huffman: bool) -> tuple[bytes, np.ndarray, int]:
    """(the coded symbols, the bits of each symbol u8[count], all bits)."""
    counts = np.bincount(symbols, minlength=count)
    fixed = np.full(count, max(1, (count - 1).bit_length()), np.uint8)
    lengths = code_lengths(counts) if huffman else fixed
    codes, chunks, bits = _codes(lengths), [], 0
    for start in range(0, len(symbols), 2**18):
        part = symbols[start : start + 2**18]
        size = lengths[part].astype(np.int64)
        left = np.repeat(np.cumsum(size), size) - 1 - np.arange(size.sum())
        chunks.append((np.repeat(codes[part], size) >> left & 1).astype(np.uint8))
        bits += len(left)
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *chunks])).tobytes(), lengths, bits


def _symbols(code: np.ndarray, lengths: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Decodes `count` symbols u8[count], which must take these bits."""
    if count > bits:  # each takes at least one bit
        raise Damaged('a code is wrong')
    table = np.zeros((2, 2**LONGEST_CODE), np.uint8)  # symbol and length, by the next bits
    for symbol, first in enumerate(_codes(lengths).tolist()):
        if length := int(lengths[symbol]):
            free = LONGEST_CODE - length
            table[:, first << free : first + 1 << free] = [[symbol], [length]]
    data = np.concatenate([code, np.zeros(3, np.uint8)]).astype(np.uint32)
    ahead = data[:-2] << 16 | data[1:-1] << 8 | data[2:]
    ahead = (ahead[:, None] >> np.arange(8, 0, -1, dtype=np.uint32) & 0xFFFF).astype(np.uint16)
    ahead = ahead.reshape(-1)  # the 16 bits from each bit on
    steps, at, starts = table[1][ahead].tobytes(), 0, np.zeros(count, np.int64)
    for i in range(count):
        if at >= bits:
            raise Damaged('a code is wrong')
        starts[i] = at
        at += steps[at]
    if at != bits:
        raise Damaged('a code is wrong')
    return table[0][ahead[starts]]
