"""Many runs on this machine, with as few compilations as there are programs."""

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import records
from zerojax.host.checkpoint import checkpoint_steps
from zerojax.host.errors import DamagedCheckpoint, RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.workdir import InUse
from zerojax.run.building import scalars_of, structure
from zerojax.run.checks import check_devices, check_structure, resolve
from zerojax.run.program import Programs
from zerojax.run.restore import claim
from zerojax.run.train import absolute_workdir, train, train_runs
from zerojax.step import determinism
from zerojax.step.precision import numbers_of

Job = tuple[ConfigDict, pathlib.Path]  # a run: its config, and its folder

MEASURED_CALLS = 3
SUMMARY = (  # what is told of each run, from its summary
    'step', 'train_loss', 'eval_accuracy', 'best_eval_accuracy', 'asymmetry', 'broken_at_step',
    'params_sha256', 'seconds',
)  # fmt: skip


@dataclasses.dataclass
class Plan:
    """What there is to do of a sweep; runs are known by their index in `jobs`."""

    jobs: list[Job]  # with absolute paths
    resolved: dict[int, ConfigDict] = dataclasses.field(default_factory=dict)
    summaries: dict[int, records.Record] = dataclasses.field(default_factory=dict)  # of finished
    pending: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # by structure
    failed: dict[int, RunError] = dataclasses.field(default_factory=dict)

    def num_steps(self) -> int:
        """Steps of all runs that were not finished at first."""
        return sum(self.resolved[i].num_steps for i in itertools.chain(*self.pending.values()))

    def outcome(self, left: ValueError | None = None) -> list[records.Record]:
        """The summaries of all runs, in the order of `jobs`.

        Raises:
            RunError: runs failed, or are `left` for another process for this reason.
        """
        unfinished = []
        if self.failed:
            reasons = '; '.join(f'{self.name(i)}: {error}' for i, error in self.failed.items())
            unfinished.append(f'{len(self.failed)} of {len(self.jobs)} runs failed: {reasons}')
        if left:
            unfinished.append(
                f'runs are left for which the same command must be given again: {left}'
            )
        if unfinished:
            raise RunError('; '.join(unfinished))
        return [self.summaries[i] for i in range(len(self.jobs))]

    def name(self, i: int) -> str:
        """That of a run's folder."""
        return self.jobs[i][1].name


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
    programs = programs or Programs()
    plan = make_plan(jobs, runs_at_once, programs)
    left: ValueError | None = None
    with Progress(plan.num_steps()) as bar:
        for numbers in filter(None, plan.pending.values()):
            try:
                determinism.check_process(plan.resolved[numbers[0]].determinism.mode)
            except ValueError as error:
                left = error
                continue
            train_alike(plan, numbers, runs_at_once, programs, bar)
    return plan.outcome(left)


def make_plan(
    jobs: Sequence[Job], runs_at_once: int | None, programs: Programs, *, elsewhere: bool = False
) -> Plan:
    """What there is to do, once all is checked that can be without training.

    What depends on devices is not if they are `elsewhere`; then runs that are in use are pending.

    Raises:
        UsageError: as `sweep`.
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
    plan = Plan(
        [
            (config_lib.with_absolute_paths(config), absolute_workdir(folder))
            for config, folder in jobs
        ]
    )
    check_devices()
    # In an order in which each dataset is loaded once.
    for i in sorted(range(len(jobs)), key=lambda i: str(plan.jobs[i][0].dataset)):
        config, workdir = plan.jobs[i]
        dataset = programs.dataset(config)
        try:
            plan.resolved[i] = resolve(config, dataset)
            kind = structure(plan.resolved[i])
            if kind not in plan.pending:
                check_structure(plan.resolved[i], dataset, here=not elsewhere)
        except UsageError as error:
            raise UsageError(f'{workdir.name}: {error}') from error
        alike = plan.pending.setdefault(kind, [])
        try:
            summary = finished(plan.resolved[i], workdir)
        except InUse:
            if not elsewhere:
                raise
            summary = None
        if summary is None:
            alike.append(i)
        else:
            plan.summaries[i] = summary
    groups = plan.pending.values()
    if jax.process_count() > 1 and any(len(x) % (runs_at_once or 1) for x in groups):
        raise UsageError(
            f'--runs_at_once={runs_at_once}: must divide the number of unfinished runs that share '
            'a program, so that each batch uses the devices of all processes'
        )
    return plan


def train_alike(
    plan: Plan, numbers: list[int], runs_at_once: int | None, programs: Programs, bar: Progress
) -> None:
    """Trains runs of one structure; what came of each is in the plan afterwards.

    Raises:
        UsageError, Stopped: as `sweep`.
    """
    at_once = runs_at_once or fastest(plan.resolved[numbers[0]], len(numbers), programs, bar)
    for batch in batches([plan.jobs[i][1] for i in numbers], at_once):
        chosen = [numbers[i] for i in batch]
        train_batch = train_together if at_once > 1 else train_each
        results = train_batch([plan.jobs[i] for i in chosen], programs, bar)
        for i, result in zip(chosen, results, strict=True):
            if isinstance(result, RunError):
                plan.failed[i] = result
            else:
                plan.summaries[i] = result


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
    except RunError as error:
        if jax.process_count() > 1:  # all of whose devices no run by itself has use for
            raise
        if isinstance(error, DamagedCheckpoint):  # each for itself they find out whose
            return train_each(jobs, programs, progress)
        return [error for _ in jobs]


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
        return records.read_json(summary_file, SUMMARY)


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
