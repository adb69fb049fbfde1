"""Programs as XLA compiles them: compiled anew, and read for what may not repeat.

Works for any function of any JAX user.
"""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from zerojax.step import determinism

Tree = Any


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Within it, JAX's persistent compilation cache is neither read nor written."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # JAX remembers from the first compilation on that it has one
    try:
        yield
    finally:
        jax.config.update('jax_enable_compilation_cache', enabled)
        compilation_cache.reset_cache()


def count_operations(function: Callable[..., Tree], *args: Any) -> float:
    """Floating-point operations of a call, by XLA's count of what is handed to its compiler.

    Counted for a CPU, since JAX's plugins for GPUs and TPUs do not count, and what they compile
    calls libraries whose operations nobody counts.

    Args:
        function: pure, not jitted.
        args: what it would be called with, on whatever device.

    Raises:
        ValueError: JAX has no CPU.
    """
    try:
        cpu = jax.local_devices(backend='cpu')[0]
    except RuntimeError as error:
        raise ValueError(
            f'JAX_PLATFORMS={jax.config.values.get("jax_platforms")}: leaves no CPU, for which '
            'operations are counted; add cpu, as in cuda,cpu'
        ) from error
    shapes = jax.eval_shape(lambda args: args, args)  # Python's numbers have one, too
    with jax.default_device(cpu):
        lowered = determinism.jit_without_products(function).lower(*shapes)  # never compiled
    return float(lowered.cost_analysis().get('flops', 0.0))  # left out where there are none


def compile_afresh(
    function: Callable[..., Tree],
    *args: Any,
    compiler_options: dict[str, bool | int | str] | None = None,
) -> Callable[..., Tree]:
    """Traces, lowers and compiles a function anew, whatever JAX has cached of it.

    What XLA itself keeps in the process (on GPUs: the autotuner's choices) is still used; only a
    fresh process is without it.

    Args:
        function: pure; if it is jitted, without compiler options of its own.
        args: what it will be called with.
        compiler_options: as in `jax.jit`; None: those of mode 'deterministic'.

    Returns:
        The executable; its `as_text()` is the optimised program.
    """

    def anew(*args: Any) -> Tree:
        return function(*args)

    if compiler_options is None:
        determinism.claim_process('deterministic')
        compiler_options = determinism.compiler_options('deterministic')
    with no_compilation_cache():
        return jax.jit(anew, compiler_options=compiler_options).lower(*args).compile()


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of a compiled program that may not repeat: opcode or library call, how many, and
    what is known of them on the backend."""

    name: str
    count: int
    remark: str


_NO_ATOMICS = 'no atomics on this backend: the program fixes the order of additions'
_ATOMICS = 'may add by atomics, in any order; mode deterministic replaces or refuses it'
_ACROSS_DEVICES = 'sums over devices; the runtime decides in what order'
_AUTOTUNED = 'the autotuner chooses the algorithm, so compilations and processes may differ'

# Opcodes, library calls and kinds of fusion, by how they begin.
_REMARKS: tuple[tuple[str, str], ...] = (
    ('all-reduce', _ACROSS_DEVICES),
    ('reduce-scatter', _ACROSS_DEVICES),
    ('rng-bit-generator', ''),  # its state is an argument
    ('AllocateBuffer', ''),  # of TPUs' compiler, as the next
    ('AssumeGatherIndicesInBound', ''),
    ('ConcatBitcast', ''),
    ('X64Combine', ''),  # the halves of 64 bits, as the next two
    ('X64SplitHigh', ''),
    ('X64SplitLow', ''),
    ('rng', 'draws from a state that every call moves on'),
    ('__cudnn$convBackward', 'some of its algorithms add by atomics; the autotuner chooses one'),
    ('__cudnn$', _AUTOTUNED),
    ('__cublas$', _AUTOTUNED),
    ('__triton', _AUTOTUNED),
    ('__ynn_fusion', 'races if it reduces a broadcast (jaxlib 0.10.2 to 0.11); see determinism.py'),
)

_INSTRUCTION = re.compile(r'= (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9-]*)\(')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FUSION_KIND = re.compile(r'"kind":"(__\w+)"')
_FLOAT = re.compile(r'\b(b?f\d|c\d)')


def operations_that_may_not_repeat(hlo: str, backend: str) -> list[Operation]:
    """What a compiled program has in it that is known to be nondeterministic on some backend.

    Scatters of floats whose indices may coincide, select-and-scatter, sums over devices, stateful
    random numbers, calls to cuDNN, cuBLAS, Triton and YNNPACK, and calls to Python. Library calls
    that are not known here are listed as such. An empty list does not prove that a program
    repeats: measure it.

    Args:
        hlo: the optimised program, `compiled.as_text()`.
        backend: 'cpu', 'gpu' or 'tpu', for the remarks.
    """
    found: Counter[str] = Counter()
    remarks: dict[str, str] = {}
    for line in hlo.splitlines():
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        if instruction['opcode'].endswith('-done'):
            continue  # of what has begun with its other half
        name, shape = instruction['opcode'].removesuffix('-start'), instruction['shape']
        if name in ('scatter', 'select-and-scatter'):
            # Distinct indices meet nowhere, and integers add up to the same in any order.
            if 'unique_indices=true' in line or not _FLOAT.search(shape):
                continue
            remark = _ATOMICS if backend == 'gpu' else _NO_ATOMICS
        elif name == 'custom-call' and (target := _TARGET.search(line)):
            name = target[1]
            remark = _remark(name, 'a library call that is not known here')
            if 'callback' in name:
                remark = 'calls Python, which may return anything'
        elif name == 'fusion' and (kind := _FUSION_KIND.search(line)):
            name, remark = kind[1], _remark(kind[1])
        else:
            remark = _remark(name)
        if remark:
            found[name] += 1
            remarks[name] = remark
    return [Operation(name, count, remarks[name]) for name, count in sorted(found.items())]


def _remark(name: str, unknown: str = '') -> str:
    return next((remark for prefix, remark in _REMARKS if name.startswith(prefix)), unknown)
