"""Programs of XLA, read from the text that `compiled.as_text()` gives."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'bf16': 16, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?')
_SPACE = re.compile(r'S\((\d+)\)')  # of memory other than the device's main one
_HOST = '5'
_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'  (ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ([a-z][a-z0-9\-]*)\(')
_BRACKET = re.compile(r'[()]')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type.

    Attributes:
        dtype: 'f32', 'bf16', 'pred', ...
        dims: its shape.
        on_chip: whether it is kept in memory of a TPU's chip, as the compiler decides.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Without what a layout adds for padding."""
        number = re.search(r'\d+', self.dtype)
        bits = _BITS.get(self.dtype, int(number[0]) if number else 0)
        return math.ceil(math.prod(self.dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name, opcode: as XLA has them.
        results: what it gives, flat where it is a tuple.
        operands: names of instructions of the same computation.
        argument: what else stands in its brackets, such as a parameter's number.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str

    def called(self) -> list[str]:
        """Names of the computations that it runs, one or, of a conditional, its branches."""
        branches = _BRANCHES.search(self.attributes)
        if branches:
            return _NAME.findall(branches[1])
        return _CALLED.findall(self.attributes)

    def trips(self) -> int:
        """How often a loop's body runs; 1 if the program does not say."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else 1


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text; the last but for `root` is not special."""

    instructions: dict[str, Instruction]
    root: str

    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {
            int(each.argument): each
            for each in self.instructions.values()
            if each.opcode == 'parameter'
        }

    def arrays(self, operand: str) -> tuple[Array, ...]:
        """What an operand of one of the instructions is."""
        return self.instructions[operand].results


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which of them is the whole."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
        """All there are, each once."""
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                yield computation, instruction


def parse(text: str, backend: str) -> Module:
    """Reads the text of an optimised program.

    `backend` is 'cpu', 'gpu' or 'tpu', whose memories have numbers of its own.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ''
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        header = None if line.startswith(' ') else _HEADER.match(line)
        if header:
            name, root, instructions = header[2], '', {}
            entry = name if header[1] else entry
        elif line.startswith('}') and name:
            computations[name] = Computation(instructions, root)
            name = ''
        elif name and (start := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(start[2], line[start.end() :], backend)
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root
    if not entry:
        raise ValueError('no program of XLA: it has no ENTRY computation')
    found = re.search(r'num_partitions=(\d+)', text)
    return Module(computations, entry, int(found[1]) if found else 1)


def _parse_instruction(name: str, text: str, backend: str) -> Instruction:
    shape_ends = _closing(text, 0) if text.startswith('(') else text.index(' ')
    opcode = _OPCODE.match(text, shape_ends)
    if opcode is None:
        raise ValueError(f'no instruction of XLA: {text[:100]}')
    ends = _closing(text, opcode.end() - 1)
    argument = text[opcode.end() : ends - 1]
    return Instruction(
        name,
        opcode[1],
        tuple(_arrays(text[:shape_ends], backend)),
        tuple(_NAME.findall(argument)),
        argument,
        text[ends:],
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` has been closed."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == '(' else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f'no instruction of XLA: {text[:100]}')


def _arrays(text: str, backend: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(x.lstrip('<=')) for x in dims.split(',') if x)
        space = _SPACE.search(layout)
        on_chip = backend == 'tpu' and space is not None and space[1] != _HOST
        yield Array(dtype, sizes, on_chip)
