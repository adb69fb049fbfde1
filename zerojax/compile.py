"""Compiles the step that a run would train, for devices that are not here, and reads the program.

python -m zerojax.compile --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE ...]
                          --target=tpu:v5e:4x4 | gpu:h100[:8] | cpu [--workdir=DIR]

The step is the run's own, sharded over all of the target's devices unless mesh.data says otherwise;
neither data nor a device is needed, and nothing is run. Targets:

cpu             this machine's
tpu:KIND:SLICE  v4, v5p (1x1x1, 2x2x1 to 4x8x8), v5e, v6e (1x1, 2x2 to 16x16); compiled by libtpu,
                which is there for Linux: pip install 'zerojax[tpu]'
gpu:CARD[:N]    a100, h100, h200 or b200; N of them, or HxN on H hosts, such as 4x8; compiled by
                JAX's CUDA plugin, without a driver: pip install 'zerojax[gpu]'

On Python 3.11 these are jax 0.10.2 with libtpu 0.0.42.1 and jax-cuda12-plugin 0.10.2; it was tried
with them. A TPU's program takes minutes on two cores, many for the paper's network in float32.

One screen says whether the step compiles in both modes of determinism, what memory a device needs
of what it has, operations in products and their precision, bytes read and written, collectives, and
the time that a step cannot be faster than, by the makers' numbers (zerojax.measure.accelerators).
That bound counts no delays and nothing but products, memory and links, so small networks are far
from it. On GPUs, libraries choose their algorithms on the device; no program here shows which, and
one that computes convolutions with fewer multiplications (Winograd) may be faster.

DIR/compile.json (default: runs/compile_NAME) has it all. Exit status: 0 it compiles and fits; 1 it
does not, and one line says what to change; 2 a mistake in flags, config or workdir, or a compiler
that is not installed.
"""

import dataclasses
import importlib.metadata
import re
import sys
import textwrap
from collections import Counter

import jax
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import raise_on_signals
from zerojax.measure import program_cost
from zerojax.measure.compiled import no_compilation_cache, operations_that_may_not_repeat
from zerojax.run import cli
from zerojax.run.compilation import Attempt, compile_in_modes, resolve
from zerojax.run.target import Target, find, installed_compilers
from zerojax.step.precision import numbers_of

SHARE_OF_GPU = 0.75  # what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise

_OVER = re.compile(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])')  # libtpu, of memory
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def record_of(target: Target, attempts: dict[str, Attempt], mode: str) -> records.Record:
    """What compile.json says; null is what nobody knows of a step that does not compile."""
    attempt = attempts[mode]
    record: records.Record = {
        'target': target.text,
        'devices': len(target.devices),
        'compiles': {name: each.executable is not None for name, each in attempts.items()},
        'seconds': round(attempt.seconds, 1),
        'memory_bytes': None,
        'memory_limit_bytes': target.memory,
        'flops': None,
        'bytes': None,
        'bound_ms': None,
        'collectives': None,
        'custom_calls': None,
        'nondeterministic_operations': None,
        'precision': None,
    }
    if attempt.executable is None:
        over = _OVER.search(attempt.reason)
        if over:
            record['memory_bytes'] = round(float(over[1]) * _UNITS[over[2]])
            record['memory_limit_bytes'] = round(float(over[3]) * _UNITS[over[4]])
        return record
    cost = program_cost.cost(attempt.module)
    products = program_cost.products(attempt.module)
    operations = operations_that_may_not_repeat(attempt.executable.as_text(), target.backend)
    return record | {
        'memory_bytes': sum(attempt.memory().values()),
        'flops': cost.flops,
        'bytes': cost.bytes,
        'bound_ms': bound_ms(target, cost),
        'collectives': dict(program_cost.collectives(attempt.module)),
        'custom_calls': dict(program_cost.custom_calls(attempt.module)),
        'nondeterministic_operations': [dataclasses.asdict(each) for each in operations],
        'precision': dict(Counter(f'{each.dtype} {each.precision}' for each in products)),
    }


def bound_ms(target: Target, cost: program_cost.Cost) -> float | None:
    """None where no maker's numbers are known."""
    if target.accelerator is None:
        return None
    return 1e3 * program_cost.least_time(cost, target.accelerator).seconds


def screen(
    config: ConfigDict, target: Target, attempts: dict[str, Attempt], record: records.Record
) -> list[str]:
    """What was found as lines of at most 100 columns."""
    device = target.accelerator.name if target.accelerator else 'CPU'
    packages = ('jax', 'jaxlib', *installed_compilers(target.backend))
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)
    modes = [
        f'{mode} {f"in {each.seconds:.0f} s" if each.executable else "no"}'
        for mode, each in attempts.items()
    ]
    if len({id(each) for each in attempts.values()}) == 1:
        modes = [f'{" and ".join(attempts)}, one program, {modes[0].partition(" ")[2]}']
    lines = [
        f'{config.model.name} on {config.dataset.name} for {target.text}: compiled, never run',
        f'devices     {len(target.devices)} x {device}; {versions}',
        f'step        {config.model.dtype or config.param_dtype}, batch {config.batch_size}, of a '
        f'device {config.batch_size // config.mesh.data}; convolutions '
        f'{config_lib.convolution_of(config, backend=target.backend)}, '
        f'steps_per_call {config.steps_per_call}, {config.optimizer.name}',
        f'compiles    {", ".join(modes)}',
    ]
    attempt = attempts[config.determinism.mode]
    if attempt.executable is not None:
        parts = ', '.join(f'{name} {_gib(size)}' for name, size in attempt.memory().items())
        operations = record['nondeterministic_operations']
        lines += [
            f'memory      {_gib(record["memory_bytes"])} of {_gib(record["memory_limit_bytes"])} '
            f'GiB a device: {parts}',
            f'operations  {record["flops"]:.4g} a device in products: '
            f'{_listed(record["precision"])}',
            f'bytes       {record["bytes"]:.4g} a device read and written',
            *_bound_lines(target, attempt),
            f'collectives {_listed(record["collectives"])}',
            *_wrapped(f'calls       {_listed(record["custom_calls"])}'),
            '',
            'operations known not to repeat on some backend' + ('' if operations else ': none'),
        ]
        for x in operations:
            lines += _wrapped(f'  {x["count"]:>3} {x["name"]}: {x["remark"]}')
    return [line[:100] for line in lines]


def _bound_lines(target: Target, attempt: Attempt) -> list[str]:
    device = target.accelerator
    if device is None:
        return ["bound       none, since there are no maker's numbers for CPUs here"]
    cost = program_cost.cost(attempt.module)
    bound = program_cost.least_time(cost, device)
    peaks = ', '.join(
        f'{device.peak(*kind) / 1e12:.4g} TFLOP/s ({" ".join(kind)})' for kind in cost.operations
    )
    beyond = f' beyond {device.cache / 2**20:.0f} MiB of cache' if device.cache else ''
    return [
        f'bound       {1e3 * bound.seconds:.4g} ms a step, the largest of',
        f'  products  {1e3 * bound.products:.4g} ms at {peaks}',
        f'  memory    {1e3 * bound.memory:.4g} ms at {device.bandwidth / 1e9:.0f} GB/s{beyond}',
        f'  links     {1e3 * bound.links:.4g} ms at {device.links / 1e9:.0f} GB/s',
    ]


def _listed(counts: dict[str, int]) -> str:
    return ', '.join(f'{count} {name}' for name, count in sorted(counts.items())) or 'none'


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 100, subsequent_indent=' ' * 12)


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g}'


def check(
    config: ConfigDict, target: Target, attempts: dict[str, Attempt], record: records.Record
) -> None:
    """Checks that the step compiles in the config's mode, and fits.

    Raises:
        RunError: it does not; says what to change.
    """
    mode, where = config.determinism.mode, f'--target={target.text}'
    needed, there = record['memory_bytes'], record['memory_limit_bytes']
    if needed is not None and needed > there:
        raise RunError(
            f'{where}: the step needs {_gib(needed)} GiB of memory, a device has {_gib(there)}; '
            f'choose {_smaller(config, attempts[mode], there)}'
        )
    if attempts[mode].executable is None:
        other = next((name for name, each in attempts.items() if each.executable), None)
        advice = 'choose other versions of jax and its compiler, or another model or batch_size'
        if other is not None:
            advice = f'choose determinism.mode={other!r}, in which it does'
        raise RunError(
            f'{where}: the step does not compile in determinism.mode={mode!r} '
            f'({attempts[mode].reason}); {advice}'
        )


def _smaller(config: ConfigDict, attempt: Attempt, there: int) -> str:
    """What would fit, as far as temporaries grow with the batch and nothing else does."""
    if attempt.executable is not None:
        memory = attempt.memory()
        share = (there - memory['arguments'] - memory['results']) / memory['temporaries']
        batch_size = int(config.batch_size * share) // config.mesh.data * config.mesh.data
        if batch_size > 0:
            return f'a batch_size of about {batch_size}, or more devices'
    return 'a smaller batch_size, more devices, or a smaller model.width or model.depth'


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    values = cli.text_flags(target=None)
    config, workdir = cli.parse_flags(argv, values, workdir='runs/compile_NAME')
    if values.target is None:
        raise UsageError('--target: missing; such as tpu:v5e:4x4, gpu:h100:8 or cpu')
    jax.config.update('jax_platforms', 'cpu')  # a device that is here is left to others
    target = find(values.target)
    mesh_given = 'mesh.data' in cli.fields_named(argv, 'config')
    config, dataset = resolve(config, target, mesh_given=mesh_given)
    with numbers_of(config.param_dtype), no_compilation_cache():
        cli.make_folder(workdir)
        attempts = compile_in_modes(config, dataset, target)
    record = record_of(target, attempts, config.determinism.mode)
    records.write_json(workdir / 'compile.json', record)
    for line in screen(config, target, attempts, record):
        print(line)
    print(f'{workdir}/compile.json has it all')
    check(config, target, attempts, record)
    if target.backend == 'gpu' and record['memory_bytes'] > SHARE_OF_GPU * target.memory:
        print('JAX takes less of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
