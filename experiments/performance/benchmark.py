"""How fast is a train step, and what does each guarantee cost? PyTorch is measured beside it.

    python -m experiments.performance.benchmark [--workdir=DIR] [--rows=NAME,NAME,...]
                                                [--repetitions=N]

A row is a network, a batch size and a precision, on random images. Every measurement of a row is
made in fresh processes, one after another, so that memory is its own and nothing is warm that
should be cold:

    first step   seconds from the start of the process to the end of its first train step, with an
                 empty persistent compilation cache (cold) and with that of the first (warm)
    images/s     of training (augmentation included) and of evaluation: median, in brackets smallest
                 and largest of N repetitions, after one to warm up
    of peak      FLOPs of the step by XLA's count of what is handed to its compiler, per second, as
                 a share of a large matrix product of the same precision on the same device
    memory       largest ever in use: of the device on a GPU, of the process on a CPU
    prices       ratio of times a step: determinism mode 'deterministic' over 'hardware', and
                 symmetry.project over without, whose executables take turns; and the time of the
                 measurements of one evaluation (loss and accuracy not included) in train steps
    PyTorch      images/s of training for the same network, batch and precision, channels_last,
                 without augmentation; by torch.compile where that works, else eager

Without PyTorch (pip install -e '.[torch]') its columns stay empty. Ends in table.md and table.csv.
All rows take 25 minutes on two CPU cores; docs/performance.md keeps the results.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import cifar, digits
from experiments.performance.measuring import (
    SECONDS,
    Row,
    Stepper,
    rates,
    repeat,
    shown,
    time_alone,
    time_in_turns,
)
from zerojax.host import paths, records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import raise_on_signals
from zerojax.host.terminal import say
from zerojax.run import checks, cli
from zerojax.run.data import Dataset, Split


def precisions(backend: str) -> tuple[str, ...]:
    """Of `Row` that a backend has."""
    return ('float32', 'bfloat16') if backend == 'cpu' else ('tf32', 'float32', 'bfloat16')


def all_rows(backend: str) -> list[Row]:
    """The rows that suit a device: a CPU takes smaller batches of the wide networks."""
    batches = {
        (10, 1, 8, 1): (32, 128, 512),
        (16, 1, 32, 3): (128,) if backend == 'cpu' else (128, 512, 2048),
        (16, 4, 32, 3): (32,) if backend == 'cpu' else (128, 512),
        (16, 10, 32, 3): (8,) if backend == 'cpu' else (128, 512),
    }
    return [
        Row(*network, batch_size, precision)
        for network, sizes in batches.items()
        for batch_size in sizes
        for precision in precisions(backend)
    ]


# What runs in a process of its own; it prints one JSON line.


def build_config(row: Row) -> ConfigDict:
    config = digits.get_config() if row.size == 8 else cifar.get_config()
    config.num_epochs, config.num_steps = None, 10_000
    config.determinism.mode = 'deterministic'
    config.batch_size = row.batch_size
    config.model.depth, config.model.width = row.depth, row.width
    config.model.dtype = 'bfloat16' if row.precision == 'bfloat16' else None
    config.model.precision = 'default' if row.precision == 'tf32' else 'highest'
    return config


def random_dataset(row: Row) -> Dataset:

    generator = np.random.default_rng(0)

    def split(number: int) -> Split:
        shape = (number, row.size, row.size, row.channels)
        images = generator.integers(0, 256, shape).astype(np.uint8)
        return Split(images, generator.integers(0, 10, number).astype(np.int32))

    return Dataset(split(max(2 * row.batch_size, 500)), split(500), num_classes=10)


def first_step(row: Row) -> bool:
    """Comes to the end of the first train step."""
    stepper = Stepper(build_config(row), random_dataset(row))
    stepper.count = np.int32(1)
    stepper(1)
    return True


def matrix_peak(precision: str, repetitions: int) -> float:
    """FLOP/s of a large matrix product, the best of all repetitions."""
    size = 2048 if jax.default_backend() == 'cpu' else 8192
    generator = np.random.default_rng(0)  # products of zeros or ones take less power, so less time
    x = jnp.asarray(
        generator.normal(size=(size, size)), 'bfloat16' if precision == 'bfloat16' else 'float32'
    )
    of_factors = 'highest' if precision == 'float32' else 'default'
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=of_factors))
    times = time_alone(repeat(lambda: product(x).block_until_ready()), repetitions, SECONDS)
    return 2 * size**3 / times['least']


def peak_memory() -> int:
    """Bytes: of the device where it says so, else of this process."""
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(statistics_of_device.get('peak_bytes_in_use', of_process))


def measure(row: Row, repetitions: int) -> dict[str, Any]:
    """Everything but the time to the first step and PyTorch."""
    dataset = random_dataset(row)
    config = build_config(row)
    step = Stepper(config, dataset)
    step(1)
    memory = peak_memory()
    count, program = int(step.count), step.program
    alone = time_alone(step, repetitions, SECONDS)

    def evaluate() -> None:
        program.evaluate(step.state)

    def measurements() -> None:
        program.measure_layers(step.state)
        jax.block_until_ready(program.measure_asymmetry(step.state.params))
        jax.block_until_ready(program.measure_distance(step.state.params))
        program.measure_params(step.state.params)

    evaluation = time_alone(repeat(evaluate), repetitions, SECONDS)
    measured = time_alone(repeat(measurements), repetitions, SECONDS)

    projected = build_config(row)
    projected.symmetry.project = True
    compared = {'plain': step, 'projected': Stepper(projected, dataset)}
    in_turns = time_in_turns(compared, repetitions, SECONDS)
    return {
        'train': rates(row.batch_size * count, alone),
        'evaluation': rates(len(dataset.eval.labels), evaluation),
        'milliseconds a step': alone['median'] / count * 1e3,
        'flops a step': step.flops(),
        'peak': matrix_peak(row.precision, repetitions),
        'memory': memory,
        'projected over plain': in_turns['projected']['median'] / in_turns['plain']['median'],
        'measurements in steps': measured['median'] / (alone['median'] / count),
    }


def measure_hardware(row: Row, repetitions: int) -> float:
    """Milliseconds of a step in mode 'hardware', which on a GPU needs a process of its own."""
    config = build_config(row)
    config.determinism.mode = 'hardware'
    stepper = Stepper(config, random_dataset(row))
    times = time_alone(stepper, repetitions, SECONDS)
    return times['median'] / int(stepper.count) * 1e3


# The parent, which starts these processes.


def in_process(
    kind: str, row: Row | None = None, repetitions: int = 1, cache: str = ''
) -> tuple[Any, float]:
    """What a fresh process measured (None if it failed), and how long it ran.

    This process itself never takes the device, whose memory the others need.
    """
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': cache,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
        'JAX_TRACEBACK_FILTERING': 'off',  # so that the last line is the error
    }
    child = json.dumps([kind, row and dataclasses.asdict(row), repetitions])
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.performance.benchmark', f'--child={child}'],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        say(f'{row.name if row else ""} {kind}: failed: {reason}')
        return None, seconds
    return json.loads(done.stdout.splitlines()[-1]), seconds


def find_machine() -> dict[str, str]:
    """'backend' of this machine, and a 'text' about it, without taking its device.

    Raises:
        UsageError: JAX has no device here.
    """
    machine, _ = in_process('machine')
    if machine is None:
        raise UsageError('JAX finds no device it can use, see the line above')
    found: dict[str, str] = machine
    return found


def child(text: str) -> None:
    """Measures one thing of one row, and prints it."""
    kind, fields, repetitions = json.loads(text)
    found: Any
    if kind == 'machine':
        from experiments import runs

        checks.check_devices()
        found = {'backend': jax.default_backend(), 'text': runs.machine()}
    elif kind == 'first step':
        found = first_step(Row(**fields))
    elif kind == 'jax':
        found = measure(Row(**fields), repetitions)
    elif kind == 'hardware':
        found = measure_hardware(Row(**fields), repetitions)
    else:
        from experiments.performance import benchmark_torch

        compiled = kind == 'torch.compile'
        found = benchmark_torch.measure(Row(**fields), repetitions, compiled=compiled)
    say(json.dumps(found))


def measure_row(row: Row, repetitions: int, *, with_torch: bool) -> dict[str, Any]:
    """A line of the table.

    Raises:
        RunError: a process failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        done, cold = in_process('first step', row, repetitions, cache)
        done, warm = in_process('first step', row, repetitions, cache)
        found, _ = in_process('jax', row, repetitions, cache)
        hardware, _ = in_process('hardware', row, repetitions, cache)
        if done is None or found is None or hardware is None:
            raise RunError(f'{row.name}: could not be measured')
        eager = compiled = None
        if with_torch:
            eager, _ = in_process('torch', row, repetitions, cache)
            compiled, _ = in_process('torch.compile', row, repetitions, cache)
    flops = found['flops a step'] / found['milliseconds a step'] * 1e3
    beside = max((x['train']['median'] for x in (eager, compiled) if x is not None), default=None)
    return {
        'network': f'ConstNet-{row.depth}-{row.width}, {row.size}x{row.size}x{row.channels}',
        'batch': row.batch_size,
        'precision': row.precision,
        'first step, cold (warm), s': f'{cold:.1f} ({warm:.1f})',
        'ms a step': f'{found["milliseconds a step"]:.4g}',
        'train images/s': shown(found['train']),
        'evaluation images/s': shown(found['evaluation']),
        'GFLOP a step': f'{found["flops a step"] / 1e9:.4g}',
        'peak, GFLOP/s': f'{found["peak"] / 1e9:.4g}',
        'of peak': f'{100 * flops / found["peak"]:.0f}%',
        'memory, MB': f'{found["memory"] / 1e6:.0f}',
        'deterministic / hardware': f'{found["milliseconds a step"] / hardware:.3f}',
        'projected / plain': f'{found["projected over plain"]:.3f}',
        'measurements, steps': f'{found["measurements in steps"]:.2g}',
        'PyTorch eager, images/s': '-' if eager is None else shown(eager['train']),
        'PyTorch compiled, images/s': '-' if compiled is None else shown(compiled['train']),
        'over best PyTorch': (
            '-' if beside is None else f'{found["train"]["median"] / beside:.2f}'
        ),
    }


def tables(lines: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines as two tables that fit on a page: speed beside PyTorch's, and all the rest."""
    row = ('network', 'batch', 'precision')
    speed = (
        'ms a step', 'train images/s', 'PyTorch eager, images/s', 'PyTorch compiled, images/s',
        'over best PyTorch',
    )  # fmt: skip
    rest = [name for name in lines[0] if name not in row + speed]
    return [
        [{name: line[name] for name in (*row, *names)} for line in lines] for names in (speed, rest)
    ]


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    # --child is for the processes that the command starts.
    values = cli.text_flags(
        workdir='runs/experiments/benchmark', repetitions='5', rows=None, child=None
    )
    cli.parse(argv, values)
    if values.child is not None:
        child(values.child)
        return
    from experiments import runs  # Matplotlib: not in the processes whose memory is measured

    command = ' '.join(['python -m experiments.performance.benchmark', *argv[1:]])
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    repetitions = cli.count(values, 'repetitions', least=1)
    machine = find_machine()
    rows = {row.name: row for row in all_rows(machine['backend'])}
    if values.rows is not None:
        for name in values.rows.split(','):
            if name not in rows:
                raise UsageError(f'--rows={name}: no such row; allowed: {", ".join(rows)}')
        rows = {name: rows[name] for name in values.rows.split(',')}
    if machine['backend'] == 'cpu':
        say('no accelerator here: the CPU is measured')
    torch_version = importlib.util.find_spec('torch') and importlib.metadata.version('torch')
    cli.make_folder(workdir)
    lines = []
    for name, row in rows.items():
        say(f'-- {name}')
        lines.append(measure_row(row, repetitions, with_torch=torch_version is not None))
        records.write_csv(workdir / 'table.csv', lines)
    both = '\n\n'.join(runs.markdown(table) for table in tables(lines))
    where = f'{machine["text"]}, torch {torch_version or "not installed"}'
    (workdir / 'table.md').write_text(f'    {command}\n\n{where}.\n\n{both}\n', encoding='utf-8')
    say(f'\n{both}\n\n{workdir}/table.md, table.csv')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
