"""Reads the collectives from a program's HLO text: what they move, and between which devices."""

import math
import re
from typing import NamedTuple

import numpy as np

BYTES = {
    'pred': 1,
    's8': 1,
    'u8': 1,
    's16': 2,
    'u16': 2,
    'f16': 2,
    'bf16': 2,
    's32': 4,
    'u32': 4,
    'f32': 4,
    's64': 8,
    'u64': 8,
    'f64': 8,
}
KINDS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'collective-broadcast',
    'ragged-all-to-all',
)
# '%name = RESULT KIND(operands), attributes'; RESULT is 'f32[2,3]{1,0}' or '(f32[2]{0}, bf16[]...)'.
INSTRUCTION = re.compile(
    rf'^\s*(?:ROOT )?%?[\w.-]+ = (?P<result>\(.*?\)|\S+) (?P<kind>{"|".join(KINDS)})'
    r'(?P<form>-start|-done|-update)?\((?P<rest>.*)$'
)
SHAPE = re.compile(r'([a-z]+[0-9]*)\[([0-9,]*)\]')
LISTED = re.compile(r'replica_groups=\{((?:\{[0-9,]*\},?)+)\}')
IOTA = re.compile(r'replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?')
PAIRS = re.compile(r'source_target_pairs=\{((?:\{[0-9,]*\},?)+)\}')


class Collective(NamedTuple):
    """One array that goes through one collective.

    elements: of the whole array, which is the output of an all-gather, the input of a reduce-scatter, and
    both for an all-reduce.
    """

    instruction: int  # line number: one instruction can take several arrays
    kind: str
    dtype: str  # HLO's name, 'f32' or 'bf16'
    elements: int
    groups: frozenset[frozenset[int]]  # device numbers, in the mesh's order


def collectives(text: str) -> list[Collective]:
    """Returns all collectives in HLO text, in order, with one entry per array.

    Skips collectives over a single device, which move nothing. Counts an instruction within a loop once.
    Raises ValueError for forms that it cannot parse, so that none is missed.
    """
    found = []
    for number, line in enumerate(text.splitlines()):
        match = INSTRUCTION.match(line)
        if not match:
            # Metadata and operands can contain the name; only an operation is followed by a parenthesis.
            if re.search(rf' (?:{"|".join(KINDS)})(?:-start)?\(', line):
                raise ValueError(f'cannot read this collective: {line.strip()[:200]}')
            continue
        if match['form']:
            raise ValueError(f'cannot read asynchronous collectives: {line.strip()[:200]}')
        groups = _groups(match['rest'])
        size = max(map(len, groups))
        if size == 1:
            continue
        for dtype, shape in SHAPE.findall(match['result']):
            elements = math.prod(int(n) for n in shape.split(',') if n)
            if match['kind'] == 'reduce-scatter':
                elements *= size
            found.append(Collective(number, match['kind'], dtype, elements, groups))
    return found


def _groups(attributes: str) -> frozenset[frozenset[int]]:
    for pattern in (LISTED, PAIRS):
        match = pattern.search(attributes)
        if match:
            groups = re.findall(r'\{([0-9,]*)\}', match[1])
            return frozenset(frozenset(int(i) for i in group.split(',')) for group in groups)
    match = IOTA.search(attributes)
    if match:
        shape, counted, order = (
            [int(n) for n in part.split(',')] if part else None for part in match.groups()
        )
        numbers = np.arange(math.prod(counted)).reshape(counted)
        rows = (numbers.transpose(order) if order else numbers).reshape(shape)
        return frozenset(frozenset(map(int, row)) for row in rows)
    raise ValueError(f'cannot read the groups of a collective: {attributes[:200]}')


def axis(groups: frozenset[frozenset[int]], mesh: tuple[int, int]) -> str:
    """Returns the axis of a (data, model) mesh that the groups span: 'data', 'model', 'both' or 'other'."""
    numbers = np.arange(math.prod(mesh)).reshape(mesh)
    for name, rows in (('data', numbers.T), ('model', numbers), ('both', numbers.reshape(1, -1))):
        if groups == frozenset(frozenset(map(int, row)) for row in rows):
            return name
    return 'other'
