"""What a program as XLA compiled it asks of a device, and the least time that this takes.

Counted are the instructions that run, once each: of a loop the body as often as the program says,
or once; of a conditional the branch with the fewest operations. So the numbers of a program that
loops over train steps are those of one step.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from zerojax.measure.accelerators import Accelerator
from zerojax.measure.hlo import Array, Computation, Instruction, Module

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_WINDOW = re.compile(r'window=\{([^}]*)\}')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
_PRECISION = re.compile(r'operand_precision(?:=\{|":\[)([\w",]*)')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)')

# Names for what is there already.
_FREE = frozenset((
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
    'replica-id', 'opt-barrier',
))  # fmt: skip
_COUNTED = ('-update', '-done')  # where it began
_PARTS = ('slice', 'dynamic-slice', 'gather')  # read no more of an array than they give


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
        dtype: of what is multiplied: 'f32', 'bf16', 'f64', ...
        precision: 'default', 'high' or 'highest'.
        operations: two for each multiplication, without those by padding; zeros that the program
            writes out before it multiplies count.
    """

    dtype: str
    precision: str
    operations: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program asks of one device each time it runs.

    Attributes:
        operations: in products, by (dtype, precision), see `Product`.
        read_and_written: sizes in bytes of all arrays that instructions read and write, but for
            those that the compiler keeps on the chip.
        sent: bytes of each collective that every device must send if sums are not made on the way,
            and if they are.
    """

    operations: Counter[tuple[str, str]]
    read_and_written: Counter[int]
    sent: tuple[float, float] = (0.0, 0.0)

    @property
    def flops(self) -> int:
        return sum(self.operations.values())

    @property
    def bytes(self) -> int:
        return sum(size * count for size, count in self.read_and_written.items())


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a program takes at least: for its products, its memory and its links."""

    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory, self.links)


def least_time(cost: Cost, device: Accelerator) -> Bound:
    """The bound that the maker's numbers set.

    An array may stay in a cache between two instructions, so no more of it counts than what is
    larger than that. Not counted are delays, arithmetic that is not in products, and networks
    between machines. A library that computes a convolution with fewer multiplications (Winograd,
    FFT) may be below the first number.
    """
    products = sum(n / device.peak(*kind) for kind, n in cost.operations.items())
    memory = sum(max(0, size - device.cache) * n for size, n in cost.read_and_written.items())
    sent = cost.sent[device.switch_adds]
    return Bound(products, memory / device.bandwidth, sent / device.links)


def cost(module: Module) -> Cost:
    """What the program asks of one device."""
    return _cost_of(module, module.entry)


def products(module: Module) -> list[Product]:
    """All products in the program's text."""
    found = (product(*each) for each in _instructions(module))
    return [each for each in found if each is not None]


def custom_calls(module: Module) -> Counter[str]:
    """Calls of libraries and of the compiler's own, by target."""
    targets = (target_of(each) for _, each in _instructions(module))
    return Counter(target for target in targets if target)


def collectives(module: Module) -> Counter[str]:
    """Operations over several devices in the program's text, by kind."""
    kinds = (each.opcode for _, each in _instructions(module))
    return Counter(kind for kind in kinds if kind in COLLECTIVES)


def target_of(instruction: Instruction) -> str:
    """The target of a custom call, '' for anything else."""
    found = _TARGET.search(instruction.attributes)
    return found[1] if found and instruction.opcode == 'custom-call' else ''


def product(computation: Computation, instruction: Instruction) -> Product | None:
    """The product that an instruction is; None if it is none, or a library's of an unknown kind."""
    target, opcode = target_of(instruction), instruction.opcode
    is_convolution = opcode == 'convolution' or target.startswith('__cudnn$conv')
    if not (is_convolution or opcode == 'dot' or target.startswith('__cublas$')):
        return None
    lhs, rhs = (computation.arrays(name)[0] for name in instruction.operands[:2])
    out = instruction.results[0]
    if not is_convolution:
        contracted = _CONTRACTED.search(instruction.attributes)
        axes = re.findall(r'\d+', contracted[1]) if contracted else []
        operations = 2 * math.prod(out.dims) * math.prod(lhs.dims[int(i)] for i in axes)
    else:
        # XLA describes cuDNN's gradients by the convolution that they are the gradients of.
        if 'BackwardInput' in target:
            lhs, out = out, lhs
        elif 'BackwardFilter' in target:
            rhs, out = out, rhs
        operations = _convolution_operations(instruction.attributes, lhs, rhs, out)
    return Product(lhs.dtype, _precision(instruction.attributes), operations)


def _precision(attributes: str) -> str:
    found = _PRECISION.search(attributes)
    given = re.findall(r'\w+', found[1].lower())[:2] if found else []
    return max(given, key=('default', 'high', 'highest').index, default='default')


def _convolution_operations(attributes: str, lhs: Array, rhs: Array, out: Array) -> int:
    labels = _LABELS.search(attributes)
    if labels is None:
        raise ValueError(f'no convolution of XLA: {attributes[:100]}')
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = _WINDOW.search(attributes)
    fields = dict(x.split('=') for x in window[1].split()) if window else {}

    def number(name: str, axis: int, default: int) -> int:
        if name not in fields:
            return default
        return int(fields[name].split('x')[axis].split('_')[0])  # of pad the one before

    operations = 2 * rhs.dims[rhs_labels.index('i')]
    operations *= out.dims[out_labels.index('b')] * out.dims[out_labels.index('f')]
    for i in range(len(out.dims) - 2):
        operations *= _taps(
            lhs.dims[lhs_labels.index(str(i))],
            out.dims[out_labels.index(str(i))],
            rhs.dims[rhs_labels.index(str(i))],
            number('stride', i, 1),
            number('pad', i, 0),
            number('lhs_dilate', i, 1),
            number('rhs_dilate', i, 1),
        )
    return operations


@functools.cache
def _taps(
    inputs: int, outputs: int, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Along one axis: how many pairs of an output and a tap of the kernel meet an input."""
    last = (inputs - 1) * lhs_dilate
    positions = (
        output * stride + tap * rhs_dilate - pad for output in range(outputs) for tap in range(size)
    )
    return sum(0 <= x <= last and x % lhs_dilate == 0 for x in positions)


def _sum(costs: Iterable[Cost], times: int = 1) -> Cost:
    operations: Counter[tuple[str, str]] = Counter()
    read_and_written: Counter[int] = Counter()
    unsummed, summed = 0.0, 0.0
    for each in costs:
        operations.update({kind: n * times for kind, n in each.operations.items()})
        read_and_written.update({size: n * times for size, n in each.read_and_written.items()})
        unsummed += each.sent[0] * times
        summed += each.sent[1] * times
    return Cost(operations, read_and_written, (unsummed, summed))


def _cost_of(module: Module, name: str) -> Cost:
    computation = module.computations[name]
    return _sum(_cost_of_one(module, computation, x) for x in computation.instructions.values())


def _instructions(module: Module) -> Iterator[tuple[Computation, Instruction]]:
    """All there are, each once, those in two halves where they begin."""
    for computation, instruction in module.instructions():
        yield computation, _whole(computation, instruction)


def _whole(computation: Computation, instruction: Instruction) -> Instruction:
    """X in place of X-start, with the results of X alone; anything else as it is."""
    opcode = instruction.opcode.removesuffix('-start')
    if opcode in (instruction.opcode, 'async'):
        return instruction
    results = instruction.results
    if opcode == 'copy':  # gives the copy, what was copied, and a context
        results = results[:1]
    elif opcode != 'all-reduce':  # others give what they were given, what X gives, and contexts
        given = sum(len(computation.arrays(name)) for name in instruction.operands)
        results = tuple(x for x in results[given:] if x.dims or x.dtype not in ('s32', 'u32'))
    return dataclasses.replace(instruction, opcode=opcode, results=results)


def _cost_of_one(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    instruction = _whole(computation, instruction)
    opcode = instruction.opcode
    if opcode == 'while':
        (body,) = instruction.called()
        return _sum([_cost_of(module, body)], instruction.trips())
    if opcode == 'conditional':
        return min((_cost_of(module, x) for x in instruction.called()), key=lambda x: x.flops)
    if opcode in ('call', 'async-start'):
        return _sum(_cost_of(module, x) for x in instruction.called())
    sizes = Counter(_traffic(module, computation, instruction))
    if opcode == 'fusion':
        inner = _sum(_cost_of(module, x) for x in instruction.called())
        return Cost(inner.operations, sizes, inner.sent)
    found = product(computation, instruction)
    operations = Counter({(found.dtype, found.precision): found.operations} if found else {})
    return Cost(operations, sizes, _sent(module, computation, instruction))


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> list[int]:
    """Bytes that an instruction reads of each operand, and writes of each result."""
    opcode, results, target = instruction.opcode, instruction.results, target_of(instruction)
    if opcode in _FREE or opcode.endswith(_COUNTED) or target in ('AllocateBuffer', 'Sharding'):
        return []
    of_library = target.startswith(('__cublas$', '__cudnn$'))
    if of_library and len(results) > 1 and results[-1].dtype in ('s8', 'u8'):
        results = results[:-1]  # the last is room to work in
    operands = [computation.arrays(name) for name in instruction.operands]
    if opcode == 'fusion':
        inner = module.computations[instruction.called()[0]]
        parameters = inner.parameters()
        read = [_read_of(module, inner, parameters[i]) for i in range(len(operands))]
        read = [0 if _on_chip(x) else size for x, size in zip(operands, read, strict=True)]
        return [x for x in (*read, *_written(inner, results)) if x]
    if opcode in _PARTS:
        return _main_memory(results) + ([] if _on_chip(operands[0]) else [_bytes(results)])
    if opcode == 'dynamic-update-slice':
        return _main_memory(operands[1]) + ([] if _on_chip(results) else [_bytes(operands[1])])
    return [size for each in (*operands, results) for size in _main_memory(each)]


def _main_memory(arrays: Iterable[Array]) -> list[int]:
    return [x.bytes for x in arrays if not x.on_chip and x.bytes]


def _on_chip(arrays: tuple[Array, ...]) -> bool:
    return all(x.on_chip for x in arrays)


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(x.bytes for x in arrays)


def _read_of(module: Module, computation: Computation, parameter: Instruction) -> int:
    """Bytes that a fusion reads of an operand: all of it, or the parts that it takes."""
    read, whole = 0, _bytes(parameter.results)
    for user in computation.instructions.values():
        if parameter.name not in user.operands:
            continue
        first = user.operands[0] == parameter.name
        if user.opcode in _PARTS and first:
            read += _bytes(user.results)
        elif user.opcode == 'dynamic-update-slice' and first:
            continue  # the rest of it stays where it is
        elif user.opcode == 'fusion':
            inner = module.computations[user.called()[0]]
            for i, operand in enumerate(user.operands):
                if operand == parameter.name:
                    read += _read_of(module, inner, inner.parameters()[i])
        else:
            return whole
    return min(read, whole)


def _written(computation: Computation, results: tuple[Array, ...]) -> list[int]:
    """Bytes that a fusion writes of each result."""
    root = computation.instructions[computation.root]
    roots = [root]
    if root.opcode == 'tuple':
        roots = [computation.instructions[name] for name in root.operands]
    if len(roots) != len(results):  # a tuple within a tuple
        return _main_memory(results)
    written = []
    for each, result in zip(roots, results, strict=True):
        if each.opcode == 'dynamic-update-slice':
            written.append(0 if result.on_chip else _bytes(computation.arrays(each.operands[1])))
        else:
            written.append(0 if result.on_chip else result.bytes)
    return written


def _sent(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[float, float]:
    """Bytes that each device must send for a collective; and if sums are made on the way."""
    kind = instruction.opcode
    if kind not in COLLECTIVES:
        return 0.0, 0.0
    n = _group_size(instruction.attributes, module.partitions)
    size = sum(_bytes(computation.arrays(name)) for name in instruction.operands)
    if kind == 'all-reduce':
        return 2 * size * (n - 1) / n, size
    shares = {'all-gather': n - 1.0, 'collective-permute': 1.0}
    sent = size * shares.get(kind, (n - 1) / n)
    return sent, sent


def _group_size(attributes: str, partitions: int) -> int:
    """How many devices take part with each other."""
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", mesh[2]))
    iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
    return len(listed[1].split(',')) if listed else partitions
