"""Reads a program's HLO text: its collectives, and what its kernels read, write and compute."""

import math
import re
from collections.abc import Iterator
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
    rf'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<kind>{"|".join(KINDS)})'
    r'(?P<form>-start|-done|-update)?\((?P<rest>.*)$'
)
SHAPE = re.compile(r'([a-z]+[0-9]*)\[([0-9,]*)\]')
LISTED = re.compile(r'replica_groups=\{((?:\{[0-9,]*\},?)+)\}')
IOTA = re.compile(r'replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?')
MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
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
    groups: frozenset[frozenset[int]]  # device indices, in the mesh's order
    name: str


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
        if match['form'] in ('-done', '-update'):  # of one that has started
            continue
        groups = _groups(match['rest'])
        size = max(map(len, groups))
        if size == 1:
            continue
        shapes = SHAPE.findall(match['result'])
        if match['form'] == '-start' and match['kind'] != 'all-reduce':
            shapes = shapes[len(shapes) // 2 :]  # its operands come first
        for dtype, shape in shapes:
            elements = math.prod(int(n) for n in shape.split(',') if n)
            if match['kind'] == 'reduce-scatter':
                elements *= size
            found.append(Collective(number, match['kind'], dtype, elements, groups, match['name']))
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
    match = MESH.search(attributes)  # mesh['a'=2,'b'=4] {'b'}: groups over the axis b
    if match:
        axes = re.findall(r"'(\w+)'=(\d+)", match[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        moved = [names.index(name) for name in re.findall(r"'(\w+)'", match[2])]
        if moved and match[2] == ','.join(f"'{names[i]}'" for i in moved):  # whole axes
            rows = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), moved, range(len(moved)))
            rows = rows.reshape(math.prod(sizes[i] for i in moved), -1).T
            return frozenset(frozenset(map(int, row)) for row in rows)
    raise ValueError(f'cannot read the groups of a collective: {attributes[:200]}')


def axis(groups: frozenset[frozenset[int]], mesh: tuple[int, int]) -> str:
    """Returns the axis of a (data, model) mesh that the groups span: 'data', 'model', 'both' or 'other'."""
    numbers = np.arange(math.prod(mesh)).reshape(mesh)
    for name, rows in (('data', numbers.T), ('model', numbers), ('both', numbers.reshape(1, -1))):
        if groups == frozenset(frozenset(map(int, row)) for row in rows):
            return name
    return 'other'


LINE = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$'
)
HEAD = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$')
CALLED = re.compile(r'calls=%?([\w.-]+)')
PLACED = re.compile(r'([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?')
# Operations that do nothing, or whose work is that of their start.
FREE = {
    'parameter',
    'get-tuple-element',
    'bitcast',
    'tuple',
    'constant',
    'after-all',
    'partition-id',
}
ON_CHIP = re.compile(r'S\([1-9]\d*\)')  # in a layout: not in the device's main memory


class Kernel(NamedTuple):
    """An instruction of a compiled program that runs by itself.

    bytes: what it reads and writes in the device's memory, if it reads all of its operands once, 0 for
    the end of a collective; flops: of convolutions and matrix products; cycles: the compiler's estimate, 0
    if it gives none.
    """

    name: str
    op: str  # HLO's name, such as 'fusion'
    source: str  # JAX's names, such as 'jit(step)/jvp(AlexNet)/conv1/add'
    bytes: int
    flops: int
    cycles: int
    times: int  # how often it runs, in a loop
    operands: tuple[str, ...]  # the instructions that it reads
    parts: frozenset[str]  # the instructions in it, itself included


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a compiled program in the order in which they start."""
    bodies, entry, current = {}, '', None
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = bodies.setdefault(head['name'], [])
            entry = head['name'] if head['entry'] else entry
        elif current is not None and (match := LINE.match(line)):
            current.append(match)
    return _kernels(bodies, entry, 1)


def _kernels(bodies: dict, name: str, times: int) -> list[Kernel]:
    found = []
    for match, operands in _instructions(bodies.get(name, ())):
        op, rest = match['op'], match['rest']
        if op in FREE or op.endswith('-done') and not op.startswith((*KINDS, 'async')):
            continue
        if op in ('while', 'call', 'conditional'):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            inner = re.findall(r'(?:body|to_apply|branch_computations)=\{?%?([\w.-]+)', rest)
            for one in inner:
                found += _kernels(bodies, one, times * int(trips[1] if trips else 1))
            continue
        source = re.search(r'op_name="([^"]*)"', rest)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', rest)
        result = match['result']
        if op == 'copy-start':  # (what it writes, what it reads, a flag)
            result = PLACED.search(result)[0]
        called = CALLED.findall(rest)
        found.append(
            Kernel(
                name=match['name'],
                op=op,
                source=source[1] if source else '',
                bytes=0
                if op.endswith('-done')
                else sum(map(_bytes, [*dict(operands).values(), result])),
                flops=_flops(bodies, match, operands),
                cycles=int(cycles[1]) if cycles else 0,
                times=times,
                operands=tuple(name for name, _ in operands),
                parts=frozenset(
                    [match['name'], *(one['name'] for body in called for one in bodies[body])]
                ),
            )
        )
    return found


def _instructions(body) -> Iterator[tuple[re.Match, list[tuple[str, str]]]]:
    """Yields the instructions of a computation, each with what it reads, (name, result)."""
    results = {}
    for match in body:
        results[match['name']] = match['result']
        names = re.findall(r'%([\w.-]+)', _operands(match['rest']))
        yield match, [(name, results[name]) for name in names if name in results]


def _operands(rest: str) -> str:
    """The part of an instruction up to the parenthesis that ends its operands."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == '(') - (letter == ')')
        if not depth:
            return rest[:i]
    return rest


def _bytes(shapes: str) -> int:
    return sum(
        math.prod(_sizes(sizes)) * BYTES.get(dtype, 0)
        for dtype, sizes, layout in PLACED.findall(shapes)
        if not ON_CHIP.search(layout)
    )


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(',') if n]


def _flops(bodies: dict, match: re.Match, operands: list[tuple[str, str]]) -> int:
    op, rest = match['op'], match['rest']
    arrays = (PLACED.search(x) for x in (match['result'], *(x for _, x in operands)))
    shapes = [_sizes(array[2]) for array in arrays if array]
    if op == 'dot' or op == 'custom-call' and '"__cublas' in rest:
        contracted = re.search(r'lhs_contracting_dim(?:s|ension)[^0-9]*([0-9",]+)', rest)
        inner = [shapes[1][int(n)] for n in re.findall(r'\d+', contracted[1])]
        return 2 * math.prod(shapes[0]) * math.prod(inner)
    if op == 'convolution' or op == 'custom-call' and '"__cudnn$conv' in rest:
        kernel, other = shapes[2], shapes[0]  # forward: of the output
        if 'BackwardInput' in rest:
            other = shapes[1]
        if 'BackwardFilter' in rest:
            kernel, other = shapes[0], shapes[2]
        outputs = re.search(r'dim_labels=\w+_(\w+)->', rest)[1].index('o')
        return 2 * math.prod(other) * math.prod(kernel) // kernel[outputs]
    inside = (one for name in CALLED.findall(rest) for one in _instructions(bodies.get(name, ())))
    return sum(_flops(bodies, *one) for one in inside)
