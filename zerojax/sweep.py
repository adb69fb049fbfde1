"""Trains many runs: a grid over any fields, with as few compilations as there are programs.

python -m zerojax.sweep --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--runs_at_once=N|auto]
                        [--seeds=N] [--grid.FIELD=VALUE,VALUE,... ...] [--config.FIELD=VALUE ...]
                        [--distributed=auto|HOST:PORT,N,I] [--distributed_timeout=SECONDS]

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

Exit status: 0 success; 1 runs failed, after the others were trained; 2 a mistake in flags, config,
data or workdir; 143 or 130 after SIGTERM or SIGINT, once checkpoints are saved.
"""

import contextlib
import itertools
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, records
from zerojax.host.checkpoint import checkpoint_steps
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.run import cli
from zerojax.run.building import scalars_of, structure
from zerojax.run.checks import check_devices, check_structure, resolve
from zerojax.run.program import Programs
from zerojax.run.train import absolute_workdir, claim, train, train_runs
from zerojax.step import determinism
from zerojax.step.precision import numbers_of

Job = tuple[ConfigDict, pathlib.Path]  # a run: its config, and its folder

MAX_RUNS = 10_000
MEASURED_CALLS = 3
COLUMNS = (  # of sweep.csv, from each run's summary
    'step', 'train_loss', 'eval_accuracy', 'best_eval_accuracy', 'asymmetry', 'broken_at_step',
    'params_sha256', 'seconds',
)  # fmt: skip


def sweep(
    jobs: Sequence[Job], runs_at_once: int | None = None, programs: Programs | None = None
) -> list[records.Record]:
    """Trains all runs that are not finished yet; their summaries, in the order of `jobs`.

    Args:
        jobs: config and folder of each run; the folders differ.
        runs_at_once: how many runs of one structure (see `zerojax.run.program`) are computed as one
            batched program (the last ones may be fewer); None: what is measured to be fastest on
            this backend, 1 on several processes.
        programs: shared by sweeps that follow one another, so that they do not compile anew.

    Raises:
        UsageError: a config or a folder is wrong; nothing was trained, unless it depends on the
            weights that a run starts with.
        RunError: runs failed, all others are finished; or, on a GPU, those of one mode of
            determinism are, and the others need another process.
        Stopped: SIGTERM or SIGINT came; checkpoints were saved.
    """
    for config, workdir in jobs:
        try:
            config_lib.check(config)
        except UsageError as error:
            raise UsageError(f'{workdir.name}: {error}') from error
        if config.determinism.mode == 'hardware' and (runs_at_once or 1) > 1:
            raise UsageError(
                f'--runs_at_once={runs_at_once}: must be 1 with determinism.mode=hardware, where '
                'each run is audited'
            )
    jobs = [
        (config_lib.with_absolute_paths(config), absolute_workdir(folder))
        for config, folder in jobs
    ]
    check_devices()
    programs = programs or Programs()
    resolved: dict[int, ConfigDict] = {}
    summaries: dict[int, records.Record] = {}
    pending: dict[str, list[int]] = {}
    # In an order in which each dataset is loaded once.
    for i in sorted(range(len(jobs)), key=lambda i: str(jobs[i][0].dataset)):
        config, workdir = jobs[i]
        dataset = programs.dataset(config)
        try:
            resolved[i] = resolve(config, dataset)
            kind = structure(resolved[i])
            if kind not in pending:
                check_structure(resolved[i], dataset)
        except UsageError as error:
            raise UsageError(f'{workdir.name}: {error}') from error
        alike = pending.setdefault(kind, [])
        summary = finished(resolved[i], workdir)
        if summary is None:
            alike.append(i)
        else:
            summaries[i] = summary
    if jax.process_count() > 1 and any(len(x) % (runs_at_once or 1) for x in pending.values()):
        raise UsageError(
            f'--runs_at_once={runs_at_once}: must divide the number of unfinished runs that share '
            'a program, so that each batch uses the devices of all processes'
        )

    failed: dict[pathlib.Path, RunError] = {}
    left: ValueError | None = None
    with Progress(sum(resolved[i].num_steps for i in itertools.chain(*pending.values()))) as bar:
        for numbers in filter(None, pending.values()):
            try:
                determinism.check_process(resolved[numbers[0]].determinism.mode)
            except ValueError as error:
                left = error
                continue
            at_once = runs_at_once or fastest(resolved[numbers[0]], len(numbers), programs, bar)
            for batch in batches([jobs[i][1] for i in numbers], at_once):
                chosen = [numbers[i] for i in batch]
                train_batch = train_together if at_once > 1 else train_each
                results = train_batch([jobs[i] for i in chosen], programs, bar)
                for i, result in zip(chosen, results, strict=True):
                    if isinstance(result, RunError):
                        failed[jobs[i][1]] = result
                    else:
                        summaries[i] = result
    unfinished = []
    if failed:
        reasons = '; '.join(f'{workdir.name}: {error}' for workdir, error in failed.items())
        unfinished.append(f'{len(failed)} of {len(jobs)} runs failed: {reasons}')
    if left:
        unfinished.append(f'runs are left for which the same command must be given again: {left}')
    if unfinished:
        raise RunError('; '.join(unfinished))
    return [summaries[i] for i in range(len(jobs))]


def train_each(
    jobs: list[Job], programs: Programs, progress: Progress
) -> list[records.Record | RunError]:
    """Trains runs one after another; for each its summary, or what it failed with."""
    results: list[records.Record | RunError] = []
    for job in jobs:
        try:
            results.append(train(*job, programs, progress))
        except RunError as error:
            results.append(error)
    return results


def train_together(
    jobs: list[Job], programs: Programs, progress: Progress
) -> list[records.Record | RunError]:
    """`train_each` as one batched program, as long as none has a damaged checkpoint."""
    try:
        return train_runs(jobs, programs, progress, batched=True)
    except RunError:  # it is that of one run; each for itself they find out whose
        return train_each(jobs, programs, progress)


def finished(resolved: ConfigDict, workdir: pathlib.Path) -> records.Record | None:
    """The summary of the run in `workdir` if it is finished; None if there is more to do.

    Raises:
        UsageError: it is a run of another config, in use, or its summary is damaged.
    """
    config_file, summary_file = workdir / 'config.json', workdir / 'summary.json'
    if not (config_file.exists() or summary_file.exists()):
        return None
    with contextlib.ExitStack() as stack:
        claim([workdir], [resolved], stack)
        if not summary_file.exists():
            return None
        return records.read_json(summary_file, COLUMNS)


def batches(workdirs: Sequence[pathlib.Path], at_once: int) -> Iterator[list[int]]:
    """Indices of the runs to be trained together, `at_once` or, at last, those that are left.

    Runs in lockstep must go on from a step of which all have a checkpoint, so those that have one
    are put together only with such, and if there is no common step they go on alone.
    """
    steps = [set(checkpoint_steps(workdir)) or {0} for workdir in workdirs]
    new = [i for i, its_steps in enumerate(steps) if its_steps == {0}]
    begun = [i for i, its_steps in enumerate(steps) if its_steps != {0}]
    for group in (new, begun):
        for begin in range(0, len(group), at_once):
            batch = group[begin : begin + at_once]
            if set.intersection(*(steps[i] for i in batch)):
                yield batch
            else:
                yield from ([i] for i in batch)


def fastest(config: ConfigDict, number: int, programs: Programs, progress: Progress) -> int:
    """How many of `number` runs of a resolved config to compute at once.

    One on CPUs, where a batched program was never measured to be faster (docs/performance.md), and
    in mode 'hardware', where each run is audited, and on several processes, whose clocks would not
    agree. On accelerators each power of 4 is timed, as long as memory suffices.
    """
    if (
        number == 1
        or jax.default_backend() == 'cpu'
        or jax.process_count() > 1
        or config.determinism.mode == 'hardware'
    ):
        return 1
    candidates = [n for n in (1, 4, 16, 64, 256, 1024) if n < number] + [number]
    seconds: dict[int, float] = {}
    for runs in candidates:
        try:
            seconds[runs] = seconds_a_call(config, runs, programs) / runs
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or not seconds:
                raise
            break
    best = min(seconds, key=lambda runs: seconds[runs])
    progress.say(f'measured: {best} runs at once are fastest')
    return best


def seconds_a_call(config: ConfigDict, runs: int, programs: Programs) -> float:
    """Wall time of `steps_per_call` train steps of so many runs, from their initial states."""
    with numbers_of(config.param_dtype):
        batched = runs if runs > 1 else None
        program = programs.program(config, programs.dataset(config), batched)
        scalars = program.place_scalars([scalars_of(config)] * runs)
        state = program.initial_state(scalars)
        source = program.source(state, scalars, epoch=0)
        train_steps = program.compile_train_steps(state, source)
        count = np.int32(min(config.steps_per_call, config.num_steps))
        times = []
        for _ in range(1 + MEASURED_CALLS):
            began = time.perf_counter()
            state, _ = train_steps(state, source, count)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - began)
        return min(times[1:])


# The command line.


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
    cli.join_processes(values)
    check_devices()  # before anything else asks for them, as below
    try:
        sweep([job for _, job in jobs], at_once)
    finally:
        if distributed.is_first():
            write_table(jobs, workdir)


def write_table(jobs: list[tuple[dict[str, Any], Job]], workdir: pathlib.Path) -> None:
    """Writes sweep.csv, of the runs that are finished; nothing if none is."""
    rows = []
    for fields, (_, folder) in jobs:
        file = folder / 'summary.json'
        if file.exists():
            summary = records.read_json(file, COLUMNS)
            rows.append({'run': folder.name, **fields, **{name: summary[name] for name in COLUMNS}})
    if rows:
        records.write_csv(workdir / 'sweep.csv', rows)
        say(f'{workdir}/sweep.csv: {len(rows)} of {len(jobs)} runs')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
