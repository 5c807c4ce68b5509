"""Reads Protocol Buffers, the format of .caffemodel and .onnx files: messages of numbered fields.

Nothing is trusted: every read lies within the message or raises `Damaged`, and bytes are views of the file.
The format: https://protobuf.dev/programming-guides/encoding/.
"""

import struct

import numpy as np

from alexnet_jax.weights.variables import Damaged

MOST = 100_000  # fields of a message
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class Message:
    """The fields of a message by number: integers, or views of bytes."""

    def __init__(self, data: bytes | memoryview):
        self._data, self._at = memoryview(data), 0
        self.fields: dict[int, list[tuple[int, int | memoryview]]] = {}
        for _ in range(MOST):
            if self._at == len(self._data):
                return
            tag = self._varint()
            self.fields.setdefault(tag >> 3, []).append((tag & 7, self._value(tag & 7)))
        raise Damaged(f'a message of more than {MOST:,} fields')

    def number(self, field: int, default: int = 0) -> int:
        """The last value of an integer."""
        return self._values(field, VARINT)[-1] if field in self.fields else default

    def float(self, field: int, default: float) -> float:
        """The last value of a float."""
        found = self._values(field, FIXED32)
        return struct.unpack('<f', found[-1])[0] if found else default

    def numbers(self, field: int) -> list[int]:
        """A list of integers, packed or not."""
        found = []
        for kind, value in self.fields.get(field, []):
            if kind == VARINT:
                found.append(value)
            elif kind == BYTES and len(value) <= MOST:
                packed = Message(b'')
                packed._data = value
                while packed._at < len(value):
                    found.append(packed._varint())
            else:
                raise Damaged(f'field {field} has the wrong type')
        return found

    def text(self, field: int) -> str:
        """The last value of a string; '' if there is none."""
        found = self._values(field, BYTES)
        return str(found[-1], 'utf-8', 'replace') if found else ''

    def bytes(self, field: int) -> list[memoryview]:
        return self._values(field, BYTES)

    def messages(self, field: int) -> list['Message']:
        return [Message(data) for data in self._values(field, BYTES)]

    def array(self, field: int, dtype: str) -> np.ndarray | None:
        """Packed floats, f[N]; None if there are none."""
        parts = self._values(field, BYTES)
        if any(len(part) % np.dtype(dtype).itemsize for part in parts):
            raise Damaged(f'field {field} ends within a number')
        arrays = [np.frombuffer(part, dtype) for part in parts]
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0] if arrays else None

    def _values(self, field: int, wanted: int) -> list:
        found = self.fields.get(field, [])
        if any(kind != wanted for kind, _ in found):
            raise Damaged(f'field {field} has the wrong type')
        return [value for _, value in found]

    def _value(self, kind: int) -> int | memoryview:
        if kind == VARINT:
            return self._varint()
        if kind not in (FIXED64, BYTES, FIXED32):
            raise Damaged(f'a field of type {kind} at byte {self._at:,} of a message')
        size = self._varint() if kind == BYTES else 8 if kind == FIXED64 else 4
        if size > len(self._data) - self._at:
            raise Damaged(f'a field ends {size - len(self._data) + self._at:,} bytes past the end')
        self._at += size
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if self._at >= len(self._data):
                raise Damaged('it ends within a number')
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1)
        raise Damaged('a number of more than 10 bytes')
