"""What do determinism and precision cost on this device? The paper's network, PyTorch beside it.

    python -m experiments.performance.determinism [--workdir=DIR] [--batch=128] [--repetitions=5]

ConstNet-16-10 on random 32x32 images; a row is a precision: TF32 (where the device has it),
float32 and bfloat16 (mixed precision).

    images/s     of training in mode 'deterministic' and in mode 'hardware', augmentation included:
                 median, in brackets smallest and largest of the repetitions, in which all
                 precisions take turns; each mode in a process of its own
    of peak      operations of the deterministic step a second (XLA's count of what is handed to its
                 compiler), as a share of a large matrix product in the same precision
    compiled in  seconds, in both modes, while the other precisions are compiled beside it
    PyTorch      images/s of the same network, eager, channels_last, without augmentation: with
                 cuDNN's fastest algorithms, and with deterministic ones; empty without PyTorch

Ends in table.md and table.csv, which are written anew after each mode and each column of PyTorch's:
what was measured stays if the rest is not. Minutes on a GPU of a data centre, most of them to
compile; hours on a CPU. docs/performance.md keeps the results.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.performance.benchmark import (
    build_config,
    find_machine,
    matrix_peak,
    precisions,
    random_dataset,
)
from experiments.performance.measuring import (
    SECONDS,
    MedianAndRange,
    Row,
    Stepper,
    rates,
    shown,
    time_in_turns,
)
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.stop import raise_on_signals
from zerojax.measure.compiled import no_compilation_cache
from zerojax.run import cli

NETWORK = (16, 10, 32, 3)  # depth, width, size and channels of images


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured of a row in a mode.

    Attributes:
        seconds: of a step.
        compiling: seconds that its program took.
        flops: operations of a step.
        peak: FLOP/s of a large matrix product.
    """

    seconds: MedianAndRange
    compiling: float
    flops: float
    peak: float


def compile_row(row: Row, mode: str) -> tuple[Stepper, float]:
    """The row's program, and the seconds that it took."""
    began = time.perf_counter()
    config = build_config(row)
    config.determinism.mode = mode
    return Stepper(config, random_dataset(row)), time.perf_counter() - began


def measure(rows: list[Row], mode: str, repetitions: int) -> list[Found]:
    """Of each row, in this process."""
    with no_compilation_cache(), concurrent.futures.ThreadPoolExecutor(len(rows)) as threads:
        compiled = list(threads.map(compile_row, rows, [mode] * len(rows)))
    flops = [stepper.flops() for stepper, _ in compiled]
    calls = {row.name: stepper for row, (stepper, _) in zip(rows, compiled, strict=True)}
    times = time_in_turns(calls, repetitions, SECONDS)
    return [
        Found(times[row.name], seconds, count, matrix_peak(row.precision, repetitions))
        for row, (_, seconds), count in zip(rows, compiled, flops, strict=True)
    ]


def measure_torch(rows: list[Row], deterministic: bool, repetitions: int) -> list[MedianAndRange]:
    """Images/s of each row, in this process."""
    from experiments.performance import benchmark_torch

    return [
        benchmark_torch.measure(row, repetitions, compiled=False, deterministic=deterministic)[
            'train'
        ]
        for row in rows
    ]


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, called in a process that is gone afterwards, as is what it holds
    of the device."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(function, *args).result()


def deterministic_columns(row: Row, found: Found) -> dict[str, Any]:
    """Of the row in mode 'deterministic'."""
    flops = found.flops / found.seconds['median']
    return {
        'precision': row.precision,
        'deterministic, images/s': shown(rates(row.batch_size, found.seconds)),
        'deterministic, ms a step': f'{found.seconds["median"] * 1e3:.4g}',
        'TFLOP/s': f'{flops / 1e12:.4g}',
        'peak, TFLOP/s': f'{found.peak / 1e12:.4g}',
        'of peak': f'{100 * flops / found.peak:.0f}%',
        'compiled in, s': f'{found.compiling:.0f}',
    }


def hardware_columns(row: Row, deterministic: Found, hardware: Found) -> dict[str, Any]:
    """Of the row in mode 'hardware', and what the modes cost beside each other."""
    ratio = deterministic.seconds['median'] / hardware.seconds['median']
    return {
        'hardware, images/s': shown(rates(row.batch_size, hardware.seconds)),
        'deterministic over hardware, ms': f'{ratio:.3f}',
        'compiled in, s': f'{deterministic.compiling:.0f}, {hardware.compiling:.0f}',
    }


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    values = cli.text_flags(workdir='runs/experiments/determinism', batch='128', repetitions='5')
    cli.parse(argv, values)
    from experiments import runs  # Matplotlib, which no other process needs

    command = ' '.join(['python -m experiments.performance.determinism', *argv[1:]])
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    repetitions = cli.count(values, 'repetitions', least=1)
    batch = cli.count(values, 'batch', least=1)
    machine = find_machine()
    cli.make_folder(workdir)
    rows = [Row(*NETWORK, batch, each) for each in precisions(machine['backend'])]
    has_torch = importlib.util.find_spec('torch')
    torch = importlib.metadata.version('torch') if has_torch else 'not installed'

    def save() -> None:
        runs.save_table(workdir, command, f'{machine["text"]}, torch {torch}.', lines)

    deterministic = in_fresh_process(measure, rows, 'deterministic', repetitions)
    lines = [deterministic_columns(*each) for each in zip(rows, deterministic, strict=True)]
    save()
    hardware = in_fresh_process(measure, rows, 'hardware', repetitions)
    for line, *each in zip(lines, rows, deterministic, hardware, strict=True):
        line |= hardware_columns(*each)
    save()
    if has_torch:
        for name, repeats in {'fastest': False, 'deterministic': True}.items():
            rates_of_rows = in_fresh_process(measure_torch, rows, repeats, repetitions)
            for line, rate in zip(lines, rates_of_rows, strict=True):
                line[f'PyTorch {name}, images/s'] = shown(rate)
            save()


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
