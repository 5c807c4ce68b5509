"""Reads the collectives out of a program's HLO text: what one device takes part in, and with whom."""

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

    elements: of the whole array, which is what an all-gather leaves on every device, what a
    reduce-scatter begins with on every device, and both for an all-reduce.
    """

    instruction: int  # the number of its line: one instruction may take several arrays
    kind: str
    dtype: str  # HLO's name, 'f32' or 'bf16'
    elements: int
    groups: frozenset[frozenset[int]]  # device numbers in the mesh's order, who exchanges with whom


def collectives(text: str) -> list[Collective]:
    """All collectives in HLO text, in its order; one of several arrays gives an entry for each.

    Those of a single device, which move nothing, are left out. An instruction within a loop counts
    once. Raises ValueError for a form that is not understood, so that none is overlooked.
    """
    found = []
    for number, line in enumerate(text.splitlines()):
        match = INSTRUCTION.match(line)
        if not match:
            # A name may stand in metadata or among operands; an operation has its bracket at once.
            if re.search(rf' (?:{"|".join(KINDS)})(?:-start)?\(', line):
                raise ValueError(f'a collective that cannot be read: {line.strip()[:200]}')
            continue
        if match['form']:
            raise ValueError(f'asynchronous collectives are not read: {line.strip()[:200]}')
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
    raise ValueError(f'the groups of a collective cannot be read: {attributes[:200]}')


def axis(groups: frozenset[frozenset[int]], mesh: tuple[int, int]) -> str:
    """Over which axis of a (data, model) mesh the groups lie: 'data', 'model', 'both', or 'other'."""
    numbers = np.arange(math.prod(mesh)).reshape(mesh)
    for name, rows in (('data', numbers.T), ('model', numbers), ('both', numbers.reshape(1, -1))):
        if groups == frozenset(frozenset(map(int, row)) for row in rows):
            return name
    return 'other'
