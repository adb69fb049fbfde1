"""What do determinism and precision cost on this device? The paper's network, PyTorch beside it.

    python -m experiments.performance.determinism [--workdir=DIR] [--batch=128] [--repetitions=5]

ConstNet-16-10 on random 32x32 images; a row is a precision: TF32 (where the device has it),
float32 and bfloat16 (mixed precision).

    images/s     of training in mode 'deterministic' and in mode 'hardware', augmentation included:
                 median, in brackets smallest and largest of the repetitions, in which all programs
                 take turns
    of peak      operations of the deterministic step a second (XLA's count of what is handed to its
                 compiler), as a share of a large matrix product in the same precision
    compiled in  seconds, in both modes, while the other precisions are compiled beside it
    PyTorch      images/s of the same network, eager, channels_last, without augmentation: with
                 cuDNN's fastest algorithms, and with deterministic ones; empty without PyTorch

Ends in table.md and table.csv. Two minutes on a GPU of a data centre, hours on a CPU;
docs/performance.md keeps the results.
"""

import concurrent.futures
import importlib.metadata
import importlib.util
import multiprocessing
import sys
import time
from typing import Any

from experiments.performance.benchmark import (
    build_config,
    in_process,
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
from zerojax.host.errors import RunError
from zerojax.host.stop import raise_on_signals
from zerojax.run import cli
from zerojax.step.determinism import MODES

NETWORK = (16, 10, 32, 3)  # depth, width, size and channels of images


def stepper_of(row: Row, mode: str) -> tuple[Stepper, float]:
    """The mode's program, compiled, and the seconds that it took."""
    began = time.perf_counter()
    config = build_config(row)
    config.determinism.mode = mode
    return Stepper(config, random_dataset(row)), time.perf_counter() - began


def measure(rows: list[Row], repetitions: int) -> list[dict[str, Any]]:
    """A line of the table for each row, without PyTorch."""
    made: dict[tuple[Row, str], tuple[Stepper, float]] = {}
    for mode in MODES:  # 'deterministic' first: a GPU's process does not grant it after the other
        with concurrent.futures.ThreadPoolExecutor(len(rows)) as threads:
            of_mode = list(threads.map(stepper_of, rows, [mode] * len(rows)))
        made |= {(row, mode): each for row, each in zip(rows, of_mode, strict=True)}
    calls = {f'{row.name} {mode}': stepper for (row, mode), (stepper, _) in made.items()}
    times = time_in_turns(calls, repetitions, SECONDS)
    lines = []
    for row in rows:
        steppers, compilations = zip(*(made[row, mode] for mode in MODES), strict=True)
        deterministic, hardware = (times[f'{row.name} {mode}'] for mode in MODES)
        flops = steppers[0].flops() / deterministic['median']
        peak = matrix_peak(row.precision, repetitions)
        lines.append(
            {
                'precision': row.precision,
                'deterministic, images/s': shown(rates(row.batch_size, deterministic)),
                'hardware, images/s': shown(rates(row.batch_size, hardware)),
                'deterministic, ms a step': f'{deterministic["median"] * 1e3:.4g}',
                'deterministic over hardware, ms': (
                    f'{deterministic["median"] / hardware["median"]:.3f}'
                ),
                'TFLOP/s': f'{flops / 1e12:.4g}',
                'peak, TFLOP/s': f'{peak / 1e12:.4g}',
                'of peak': f'{100 * flops / peak:.0f}%',
                'compiled in, s': ', '.join(f'{x:.0f}' for x in compilations),
            }
        )
    return lines


def measure_torch(row: Row, repetitions: int, deterministic: bool) -> MedianAndRange:
    from experiments.performance import benchmark_torch

    found = benchmark_torch.measure(row, repetitions, compiled=False, deterministic=deterministic)
    return found['train']


def torch_columns(rows: list[Row], repetitions: int) -> list[dict[str, str]]:
    """PyTorch's part of each line, measured in a process that is gone afterwards."""
    if not importlib.util.find_spec('torch'):
        return [{}] * len(rows)
    columns = {'PyTorch fastest, images/s': False, 'PyTorch deterministic, images/s': True}
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return [
            {
                name: shown(process.submit(measure_torch, row, repetitions, how).result())
                for name, how in columns.items()
            }
            for row in rows
        ]


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    from experiments import runs

    values = cli.text_flags(workdir='runs/experiments/determinism', batch='128', repetitions='5')
    cli.parse(argv, values)
    command = ' '.join(['python -m experiments.performance.determinism', *argv[1:]])
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    repetitions = cli.count(values, 'repetitions', least=1)
    batch = cli.count(values, 'batch', least=1)
    machine, _ = in_process('machine')
    if machine is None:
        raise RunError('JAX finds no device it can use, see the line above')
    cli.make_folder(workdir)
    rows = [Row(*NETWORK, batch, each) for each in precisions(machine['backend'])]
    beside = torch_columns(rows, repetitions)  # before this process takes the device
    lines = [a | b for a, b in zip(measure(rows, repetitions), beside, strict=True)]
    torch = importlib.util.find_spec('torch') and importlib.metadata.version('torch')
    conditions = f'{machine["text"]}, torch {torch or "not installed"}.'
    runs.save_table(workdir, command, conditions, lines)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
