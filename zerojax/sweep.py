"""Trains many runs: a grid over any fields, with as few compilations as there are programs.

python -m zerojax.sweep --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--runs_at_once=N|auto]
                        [--seeds=N] [--grid.FIELD=VALUE,VALUE,... ...] [--config.FIELD=VALUE ...]
                        [--distributed=auto|HOST:PORT,N,I] [--distributed_timeout=SECONDS]
                        [--launcher=ray|ray:ADDRESS|slurm]

for example

python -m zerojax.sweep --config=configs/digits.py --seeds=4 --grid.perturbation.scale=1e-8,1e-6

Every combination of the values is a run; --seeds=N makes each with the seeds 0 to N - 1, which
decide everything random in it, the perturbation included. A value of perturbation.streams is one
name, several joined by '+', or empty for all. Each run has a folder of its own in DIR
(default: runs/sweep_NAME), named by its values, with the files that `zerojax.main` would leave;
DIR/sweep.csv has a line for each that is finished, of those that the command names. Stopped and
started again, the sweep goes on where it was, and finished runs stay as they are; with more values
it adds their runs.

Runs that differ only in seeds, scale of the perturbation, learning rate, momentum or weight decay
share one compiled program. One after another (--runs_at_once=1) they give the bits that
`zerojax.main` gives. N at once are one batched program, whose bits are its own; their manifests say
so (`execution.runs_at_once`). 'auto', the default, is 1 on CPUs, and on accelerators the number
that is measured to be fastest.

--launcher has the workers of a Ray cluster train the runs, or jobs of Slurm; DIR must be a folder
that all of them see. Runs that share a program are one task, or several if there are more workers
than programs. A lost worker's runs go on from their checkpoints on another; this process, which
only watches them, can be killed and started again. docs/cloud.md has the commands.

Exit status: 0 success; 1 runs failed, after the others were trained; 2 a mistake in flags, config,
data or workdir; 143 or 130 after SIGTERM or SIGINT, once checkpoints are saved.
"""

import contextlib
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, records
from zerojax.host.command import run_command
from zerojax.host.errors import UsageError
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli, launch
from zerojax.run.checks import check_devices
from zerojax.run.many import SUMMARY, Job, sweep

MAX_RUNS = 10_000


def parse_value(field: str, text: str) -> Any:
    """A value of a config's field.

    Raises:
        UsageError: the text is not of its type.
    """
    kind = config_lib.type_of(field)
    if text == 'None':
        return None  # whether the field may be that, its check says
    try:
        if kind is bool:
            return {'true': True, 'false': False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if field in config_lib.TUPLES_OF_NAMES:
            return tuple(text.split('+')) if text else ()
    except (KeyError, ValueError):
        raise UsageError(f'--grid.{field}={text}: must be of type {kind.__name__}') from None
    raise UsageError(f'--grid.{field}: is a {kind.__name__}, which a grid cannot vary')


def grid_values(field: str, text: str) -> list[Any]:
    """The values of a field that --grid.FIELD names.

    Raises:
        UsageError: one is not of the field's type, or is named twice.
    """
    values = [parse_value(field, each) for each in text.split(',')]
    if len(set(values)) < len(values):
        raise UsageError(f'--grid.{field}={text}: names a value twice')
    return values


def grid_jobs(
    config: ConfigDict, grid: dict[str, list[Any]], seeds: int | None, workdir: pathlib.Path
) -> Iterator[tuple[dict[str, Any], Job]]:
    """Changed fields, and job, of each combination of a grid's values."""
    for values in itertools.product(*grid.values(), *([] if seeds is None else [range(seeds)])):
        fields = dict(zip(grid, values, strict=False))
        if seeds is not None:
            fields |= {'seed': values[-1], 'perturbation.seed': values[-1]}
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(fields)
        named = {k: v for k, v in fields.items() if seeds is None or k != 'perturbation.seed'}
        yield fields, (changed, workdir / folder_name(named))


def folder_name(fields: dict[str, Any]) -> str:
    """Name of the folder of a run that differs from others in these fields."""
    texts = {
        field: '-'.join(map(str, x)) if type(x) is tuple else str(x) for field, x in fields.items()
    }
    name = ','.join(f'{field}={text}' for field, text in texts.items()) or 'run'
    return ''.join(c if c.isalnum() or c in '.,=-_' else '_' for c in name)


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    fields = cli.fields_named(argv, 'grid')
    for field in fields:
        if fields.count(field) > 1:
            raise UsageError(f'--grid.{field}: given twice; name all values in one')
    values = cli.text_flags(
        seeds=None,
        runs_at_once='auto',
        launcher=None,
        **cli.DISTRIBUTED,
        **{f'grid.{field}': None for field in fields},
    )
    config, workdir = cli.parse_flags(argv, values, workdir='runs/sweep_NAME')
    seeds = None if values.seeds is None else cli.count(values, 'seeds', least=1)
    automatic = values.runs_at_once == 'auto'
    at_once = None if automatic else cli.count(values, 'runs_at_once', least=1)
    grid = {field: grid_values(field, getattr(values, f'grid.{field}')) for field in fields}
    if seeds is not None and {'seed', 'perturbation.seed'} & grid.keys():
        raise UsageError('--seeds: decides seed and perturbation.seed; leave them out of the grid')
    number = math.prod(map(len, grid.values())) * (seeds or 1)
    if number > MAX_RUNS:
        raise UsageError(f'--grid: asks for {number} runs; must be at most {MAX_RUNS} in a sweep')
    jobs = list(grid_jobs(config, grid, seeds, workdir))
    folders = [job[1] for _, job in jobs]
    longest = max(len(os.fsencode(folder.name)) for folder in folders)
    if longest > 255:
        raise UsageError(
            f'--grid: the name of a folder would have {longest} bytes, must be at most 255; '
            'vary fewer fields, or in config files of your own'
        )
    if len(set(folders)) < len(folders):
        raise UsageError('--grid: two runs would share a folder; their values differ too little')
    if values.launcher is not None and values.distributed is not None:
        raise UsageError('--launcher: each worker trains alone; leave --distributed out')
    cli.join_processes(values)
    with contextlib.ExitStack() as stack:
        cluster = None
        if values.launcher is not None:
            jax.config.update('jax_platforms', 'cpu')  # the devices here are for the workers
            cluster = stack.enter_context(launch.connect(values.launcher, workdir))
        check_devices()  # before anything else asks for them, as below
        refused = False
        try:
            each = [job for _, job in jobs]
            if cluster is None:
                sweep(each, at_once)
            else:
                launch.sweep_on(cluster, each, at_once)
        except UsageError:  # the folders may hold other runs than those that are named
            refused = True
            raise
        finally:
            if distributed.is_first() and not refused:
                write_table(jobs, workdir)


def write_table(jobs: list[tuple[dict[str, Any], Job]], workdir: pathlib.Path) -> None:
    """Writes sweep.csv, of the runs that are finished; nothing if none is."""
    rows = []
    for fields, (_, folder) in jobs:
        file = folder / 'summary.json'
        if file.exists():
            summary = records.read_json(file, SUMMARY)
            rows.append({'run': folder.name, **fields, **{name: summary[name] for name in SUMMARY}})
    if rows:
        records.write_csv(workdir / 'sweep.csv', rows)
        say(f'{workdir}/sweep.csv: {len(rows)} of {len(jobs)} runs')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
