"""Compiles the step that a run would train, for devices that are not here, and reads the program.

python -m zerojax.compile --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE ...]
                          --target=tpu:v5e:4x4 | gpu:h100[:8] | cpu [--workdir=DIR]

The step is the run's own, sharded over all of the target's devices unless mesh.data says otherwise;
neither data nor a device is needed, and nothing is run. So what a run checks of its data and of the
weights it starts with (symmetry.project, pruning.source) is not checked; with last_batch='keep' the
step is that of a full batch. Targets:

cpu             this machine's
tpu:KIND:SLICE  v4, v5p (1x1x1, 2x2x1 to 4x8x8), v5e, v6e (1x1, 2x2 to 16x16); compiled by libtpu,
                which is there for Linux: pip install 'zerojax[tpu]'
gpu:CARD[:N]    a100, h100, h200 or b200; N of them, or HxN on H hosts, such as 4x8; compiled by
                JAX's CUDA plugin, without a driver: pip install 'zerojax[gpu]'

On Python 3.11 these are jax 0.10.2 with libtpu 0.0.42.1 and jax-cuda12-plugin 0.10.2; it was tried
with them. A TPU's program takes minutes on two cores, many for the paper's network in float32.

One screen says whether the step compiles in both modes of determinism, what memory a device needs
of what a process can have there, operations in products (with zeros that the program writes out)
and their precision, bytes read and written, collectives, and the time that a step cannot be faster
than, by the makers' numbers (zerojax.measure.accelerators). That bound counts no delays and nothing
but products, memory and links, so small networks are far from it. On GPUs, libraries choose their
algorithms on the device; no program here shows which, and one that computes convolutions with fewer
multiplications (Winograd) may be faster. A step that does not fit is compiled once more, with one
example a device, to say what would.

DIR/compile.json (default: runs/compile_NAME) has it all. Exit status: 0 it compiles and fits; 1 it
does not, and one line says what to change; 2 a mistake in flags, config or workdir, or a compiler
that is not installed.
"""

import dataclasses
import importlib.metadata
import os
import re
import sys
import textwrap
from collections import Counter

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # for XLA, which reads it when JAX loads

import jax
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.measure import program_cost
from zerojax.measure.compiled import no_compilation_cache, operations_that_may_not_repeat
from zerojax.run import cli
from zerojax.run.compilation import Attempt, compile_in_modes, compile_step, resolve
from zerojax.run.data import Dataset
from zerojax.run.target import SHARE_OF_GPU, Target, find, installed_compilers
from zerojax.step.precision import numbers_of

JAX_TAKES = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise

_OVER = (  # what libtpu says: needed, there; of other memory than HBM it says the like
    re.compile(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm'),
    re.compile(r'\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)'),
)
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def memory_of(attempt: Attempt, target: Target) -> tuple[int | None, int]:
    """Bytes that a device needs, None where nobody knows, and bytes that it has."""
    if attempt.executable is not None:
        return sum(attempt.memory().values()), target.memory
    for pattern in _OVER:
        over = pattern.search(attempt.reason)
        if over:
            needed, there = (round(float(over[i]) * _UNITS[over[i + 1]]) for i in (1, 3))
            return needed, there
    return None, target.memory


def record_of(config: ConfigDict, target: Target, attempts: dict[str, Attempt]) -> records.Record:
    """What compile.json says; null is what nobody knows of a step that does not compile."""
    attempt = attempts[config.determinism.mode]
    needed, there = memory_of(attempt, target)
    record: records.Record = {
        'target': target.text,
        'devices': config.mesh.data,
        'compiles': {name: each.executable is not None for name, each in attempts.items()},
        'seconds': round(attempt.seconds, 1),
        'memory_bytes': needed,
        'memory_limit_bytes': there,
        'flops': None,
        'bytes': None,
        'bound_ms': None,
        'collectives': None,
        'custom_calls': None,
        'nondeterministic_operations': None,
        'precision': None,
    }
    if attempt.executable is None:
        return record
    cost = program_cost.cost(attempt.module)
    products = program_cost.products(attempt.module)
    operations = operations_that_may_not_repeat(attempt.executable.as_text(), target.backend)
    return record | {
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
    number = f'{len(target.devices)} x {device}'
    if config.mesh.data < len(target.devices):
        number = f'{config.mesh.data} of {number}'
    packages = ('jax', 'jaxlib', *installed_compilers(target.backend))
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)
    modes = [
        f'{mode} {f"in {each.seconds:.0f} s" if each.executable else "no"}'
        for mode, each in attempts.items()
    ]
    attempt = attempts[config.determinism.mode]
    if len({id(each) for each in attempts.values()}) == 1:
        modes = [f'{" and ".join(attempts)}, one program, {modes[0].partition(" ")[2]}']
    elif attempt.executable is not None:
        modes[-1] += f'; what follows is of {config.determinism.mode}'
    lines = [
        f'{config.model.name} on {config.dataset.name} for {target.text}: compiled, never run',
        f'devices     {number}; {versions}',
        f'step        {config.model.dtype or config.param_dtype}, batch {config.batch_size}, of a '
        f'device {config.batch_size // config.mesh.data}; convolutions '
        f'{config_lib.convolution_of(config, backend=target.backend)}, '
        f'steps_per_call {config.steps_per_call}, {config.optimizer.name}',
        f'compiles    {", ".join(modes)}',
    ]
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
            f'calls       {_listed(record["custom_calls"])}',
            '',
            'operations known not to repeat on some backend' + ('' if operations else ': none'),
        ]
        lines += [f'  {x["count"]:>3} {x["name"]}: {x["remark"]}' for x in operations]
    return [part for line in lines for part in _wrapped(line)]


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
    wrapped = textwrap.wrap(line, 100, subsequent_indent=' ' * 12, break_on_hyphens=False)
    return wrapped or [line]


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g}'


def check(
    config: ConfigDict, dataset: Dataset, target: Target, attempts: dict[str, Attempt]
) -> None:
    """Checks that the step compiles in the config's mode, and fits.

    Raises:
        RunError: it does not; says what to change.
    """
    mode, where = config.determinism.mode, f'--target={target.text}'
    needed, there = memory_of(attempts[mode], target)
    if needed is not None and needed > there:
        raise RunError(
            f'{where}: the step needs {_gib(needed)} GiB of memory, a device has {_gib(there)}; '
            f'{_smaller(config, dataset, target, needed, there)}'
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


def _smaller(config: ConfigDict, dataset: Dataset, target: Target, needed: int, there: int) -> str:
    """What to choose, by what is left of the need with one example a device."""
    fewest = ConfigDict(config.to_dict())
    fewest.batch_size = config.mesh.data
    least, _ = memory_of(compile_step(fewest, dataset, target), target)
    if least is None:
        return 'choose a smaller batch_size, model.width or model.depth'
    if least > there:
        narrower = '' if config.param_dtype == 'bfloat16' else ', or param_dtype=bfloat16'
        return (
            f'with one example a device it would need {_gib(least)}: choose a smaller model.width '
            f'or model.depth{narrower}'
        )
    of_each = (needed - least) / (config.batch_size - fewest.batch_size)
    more = int((there - least) / of_each) // config.mesh.data * config.mesh.data
    return f'choose a batch_size of about {fewest.batch_size + more}, or more devices'


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
    cli.make_folder(workdir)
    file = workdir / 'compile.json'
    if file.is_dir():
        raise UsageError(f'--workdir={workdir}: {file} is a folder; name another workdir')
    with numbers_of(config.param_dtype), no_compilation_cache():
        attempts = compile_in_modes(config, dataset, target)
        record = record_of(config, target, attempts)
        for line in screen(config, target, attempts, record):
            say(line)
        records.write_json(file, record)
        say(f'{file} has it all')
        check(config, dataset, target, attempts)
    gpu = target.accelerator
    if gpu is not None and gpu.backend == 'gpu' and record['memory_bytes'] > JAX_TAKES * gpu.memory:
        say(f'JAX takes less of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION={SHARE_OF_GPU}')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
