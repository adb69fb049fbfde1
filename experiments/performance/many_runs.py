"""What do many small runs cost, one after another and many at once?

    python -m experiments.performance.many_runs [--config=CONFIG] [--workdir=DIR] [--runs=N,N,...]
                                    [--config.FIELD=VALUE ...]

Two tables, of `configs/digits.py` by default:

    at once   milliseconds of a train step of N runs that are one batched program, the numbers of
              runs taking turns; and that time over N times the time of one
    sweep     wall time of `python -m zerojax.sweep --seeds=N`, a fresh process each, without a
              compilation cache; what each run beyond the first took; how many it computed at once

Ends in at_once.md and .csv, sweep.md and .csv. Six minutes on two CPU cores with --runs=1,2,16, the
default. docs/performance.md keeps the results.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from ml_collections import ConfigDict, config_flags

from experiments import runs
from experiments.performance import benchmark, measuring
from zerojax.host import records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import raise_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli, data

REPETITIONS = 5


def at_once(config: ConfigDict, numbers: list[int]) -> list[dict[str, Any]]:
    """The rows of the first table."""
    dataset = data.load_of(config)
    programs = {
        str(number): measuring.Stepper(config, dataset, number if number > 1 else None)
        for number in numbers
    }
    times = measuring.time_in_turns(programs, REPETITIONS, measuring.SECONDS)
    milliseconds = {
        number: {name: x * 1e3 / config.steps_per_call for name, x in times[str(number)].items()}
        for number in numbers
    }
    alone = milliseconds[1]['median']
    return [
        {
            'runs at once': number,
            'ms a step of all': measuring.shown(ms),
            'over one run': f'{ms["median"] / alone:.2f}',
            'over as many one after another': f'{ms["median"] / alone / number:.2f}',
        }
        for number, ms in milliseconds.items()
    ]


def sweep_seconds(flags: list[str], workdir: pathlib.Path, number: int) -> tuple[float, int]:
    """Wall time of a sweep over so many seeds, in a new folder in `workdir`; runs at once.

    Raises:
        RunError: the sweep failed.
    """
    folder = tempfile.mkdtemp(prefix=f'sweep_{number}_', dir=workdir)
    command = [sys.executable, '-m', 'zerojax.sweep', *flags, f'--workdir={folder}']
    began = time.perf_counter()
    without_cache = os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
    done = subprocess.run(
        [*command, f'--seeds={number}'], capture_output=True, text=True, env=without_cache
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise RunError(f'the sweep of {number} runs failed: {reason}')
    manifest = next(pathlib.Path(folder).glob('*/manifest.json')).read_text()
    return seconds, json.loads(manifest)['execution']['runs_at_once']


def sweeps(flags: list[str], workdir: pathlib.Path, numbers: list[int]) -> list[dict[str, Any]]:
    """The rows of the second table."""
    measured = {number: sweep_seconds(flags, workdir, number) for number in numbers}
    first = measured[1][0]
    return [
        {
            'runs': number,
            's': f'{seconds:.1f}',
            'each further run, s': f'{(seconds - first) / (number - 1):.1f}' if number > 1 else '-',
            'runs at once': together,
        }
        for number, (seconds, together) in measured.items()
    ]


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    command = ' '.join(['python -m experiments.performance.many_runs', *argv[1:]])
    values = cli.text_flags(runs='1,2,16')
    config, workdir = cli.parse_flags(
        argv, values, config_file='configs/digits.py', workdir='runs/experiments/many_runs'
    )
    words = values.runs.split(',')
    numbers = [int(x[:9]) if x.isascii() and x.isdigit() else 0 for x in words]
    if numbers[:2] != [1, 2] or numbers != sorted(set(numbers)):
        raise UsageError(f'--runs={values.runs}: must be rising whole numbers that begin with 1,2')
    overrides = config_flags.get_override_values(values['config'])
    flags = [
        f'--config={config_flags.get_config_filename(values["config"])}',
        *(f'--config.{field}={value}' for field, value in overrides.items()),
    ]
    benchmark.find_machine()
    cli.make_folder(workdir)
    # The sweeps first: this process must not hold a device that they need.
    tables = {'sweep': sweeps(flags, workdir, numbers)}
    tables['at_once'] = at_once(config, numbers)
    for name, rows in tables.items():
        records.write_csv(workdir / f'{name}.csv', rows)
        table = runs.markdown(rows)
        (workdir / f'{name}.md').write_text(
            f'    {command}\n\n{runs.machine()}.\n\n{table}\n', encoding='utf-8'
        )
        say(f'\n{table}\n\n{workdir}/{name}.md, {name}.csv')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
