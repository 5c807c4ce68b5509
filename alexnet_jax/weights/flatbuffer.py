"""Reads FlatBuffers, the format of .tflite files: tables with numbered fields, found by offsets.

Nothing is trusted: every read lies within the file or raises `Damaged`, and an array is a view of the
file. The format: https://flatbuffers.dev/internals/.
"""

import struct

import numpy as np

from alexnet_jax.weights.variables import Damaged

MOST = 10_000  # tables in a vector


class Table:
    """A table of a file; its fields are numbered as in the schema, from 0."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at
        self.fields = at - self._number('i', at)
        self.size = self._number('H', self.fields)

    def number(self, field: int, code: str, default=0):
        """A number; code: its type, as in `struct`."""
        at = self._place(field)
        return default if at is None else self._number(code, at)

    def table(self, field: int) -> 'Table | None':
        at = self._place(field)
        return None if at is None else Table(self.data, self._target(at))

    def tables(self, field: int) -> list['Table']:
        """A vector of tables; [] if there is none."""
        offsets = self.array(field, np.uint32, MOST)
        start = 0 if not len(offsets) else self._target(self._place(field)) + 4
        return [Table(self.data, start + 4 * i + int(offset)) for i, offset in enumerate(offsets)]

    def array(self, field: int, dtype, most: int | None = None) -> np.ndarray:
        """A vector of at most `most` numbers (None: any number), a view; empty if there is none.

        Many tables can share one vector, so give `most` for what is copied.
        """
        at, dtype = self._place(field), np.dtype(dtype).newbyteorder('<')
        if at is None:
            return np.zeros(0, dtype)
        start = self._target(at)
        count = self._number('I', start)
        if count > (len(self.data) - start - 4) // dtype.itemsize:
            raise Damaged(f'it ends before the {count:,} numbers at byte {start:,}')
        if most is not None and count > most:
            raise Damaged(f'a vector of {count:,} numbers')
        return np.frombuffer(self.data, dtype, count, start + 4)

    def _place(self, field: int) -> int | None:
        entry = 4 + 2 * field
        offset = self._number('H', self.fields + entry) if entry + 2 <= self.size else 0
        return self.at + offset if offset else None

    def _target(self, at: int) -> int:
        return at + self._number('I', at)

    def _number(self, code: str, at: int):
        if not 0 <= at <= len(self.data) - struct.calcsize('<' + code):
            raise Damaged(f'it points to byte {at:,}, which is outside the file')
        return struct.unpack_from('<' + code, self.data, at)[0]


def root(data: bytes, identifier: bytes) -> Table:
    """The outermost table of a file with these four letters at byte 4."""
    if data[4:8] != identifier:
        raise Damaged(f'it lacks the letters {identifier.decode()} at byte 4')
    return Table(data, struct.unpack_from('<I', data)[0])
