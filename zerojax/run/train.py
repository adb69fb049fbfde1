"""One run, from top to bottom; or several that are computed at once."""

import contextlib
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, figures, objectstore, paths
from zerojax.host.checkpoint import has_checkpoint
from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.records import Record
from zerojax.host.stop import Stopped, StopRequest
from zerojax.run.building import Scalars, scalars_of
from zerojax.run.checks import check_backend, check_initial_weights, check_layers, resolve
from zerojax.run.inspection import audit_start
from zerojax.run.program import Program, Programs
from zerojax.run.recorder import Recorder, Recorders, run_facts
from zerojax.run.restore import claim, compare_conditions, restore
from zerojax.run.ticket import load_ticket
from zerojax.step import TrainState
from zerojax.step.precision import numbers_of

__all__ = ['RunError', 'Stopped', 'UsageError', 'train']


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    programs: Programs | None = None,
    progress: Progress | None = None,
) -> Record:
    """Trains `config` in `workdir`, or goes on with the run that is there.

    In any thread, notebook or program: afterwards signal handlers, JAX's options and all else that
    is the process's are as before. Threads take turns. In the main thread SIGTERM and SIGINT stop
    the run meanwhile; in another one nothing does but the end of the process.

    Runs that follow one another may share `programs`, so that they are compiled once, and a
    `progress` of all their steps.

    Returns:
        The run's summary, as in `workdir`/summary.json.

    Raises:
        UsageError: config, data or workdir are wrong; nothing was trained.
        RunError: loss, gradient or state became infinite or NaN, and the last good checkpoint is
            kept; or a checkpoint is damaged.
        Stopped: SIGTERM or SIGINT came; a checkpoint was saved.
    """
    (result,) = train_runs([(config, workdir)], programs or Programs(), progress, batched=False)
    if isinstance(result, RunError):
        raise result
    return result


def train_runs(
    runs: Sequence[tuple[ConfigDict, pathlib.Path]],
    programs: Programs,
    progress: Progress | None,
    *,
    batched: bool,
) -> list[Record | RunError]:
    """Trains runs of one structure (see `zerojax.run.program`) in lockstep, as one batched program.

    Without `batched` it must be one run. Runs that have checkpoints go on from the newest step of
    which all have one; those with and those without must not be mixed.

    Returns:
        For each run its summary, or the error that it alone ended with.

    Raises:
        UsageError, Stopped: as `train`.
        RunError: a checkpoint is damaged.
    """
    started = time.monotonic()
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        # What can be wrong is found out before anything is written.
        for config, _ in runs:
            config_lib.check(config)
        runs = [
            (config_lib.with_absolute_paths(config), absolute_workdir(workdir))
            for config, workdir in runs
        ]
        dataset = programs.dataset(runs[0][0])
        configs = [resolve(config, dataset) for config, _ in runs]
        workdirs = [workdir for _, workdir in runs]
        config = configs[0]  # the others differ in scalars and pruning alone
        check_backend(config.determinism.mode)
        stack.enter_context(numbers_of(config.param_dtype))
        program = programs.program(config, dataset, len(runs) if batched else None)
        scalars = program.place_scalars([scalars_of(each) for each in configs])
        state = program.initial_state(scalars)
        tickets = []
        states = program.split_state(state)
        for one, workdir, its_state in zip(configs, workdirs, states, strict=True):
            check_layers(one, its_state.params, program.feature_axes)
            check_initial_weights(one, its_state.params, program.feature_axes, program.orbits)
            tickets.append(None if has_checkpoint(workdir) else load_ticket(one, its_state))

        # The state: new, or where the runs were left.
        claim(workdirs, configs, stack)
        alone = progress is None
        if progress is None:
            progress = stack.enter_context(Progress(config.num_steps * len(runs)))
        facts = run_facts(program)
        compare_conditions(workdirs, facts, progress)
        each_run = [Recorder(*x, stack) for x in zip(configs, workdirs, tickets, strict=True)]
        state, step = restore(program, state, each_run, progress)
        recorders = Recorders(program, each_run, progress, started)
        recorders.begin(step, facts, stack)

        state = _loop(program, state, step, scalars, recorders, progress, stop)
        results = recorders.finish(state)
        if alone:
            recorders.say_outcome()
    # All wait for the first, which alone draws and closes its files. A signal that came when all
    # steps were done concerns the runs after these.
    stopping = distributed.largest(stop.signal or 0)
    if stopping and not alone:
        raise Stopped(stopping, 'between two runs')
    return results


def absolute_workdir(workdir: pathlib.Path) -> pathlib.Path:
    """The folder of a run, absolute, if it can be one.

    Raises:
        UsageError: it cannot, see `paths.to_write`.
    """
    if objectstore.in_store(workdir):
        return workdir
    return paths.to_write(workdir, f'--workdir={workdir}')


def _loop(
    program: Program,
    state: TrainState,
    step: int,
    scalars: Scalars,
    recorders: Recorders,
    progress: Progress,
    stop: StopRequest,
) -> TrainState:
    """Trains from `step` to the end, and records what is due; the last state.

    Raises:
        Stopped: as `train`.
    """
    config = program.config
    steps_per_epoch = program.steps_per_epoch
    source = program.source(state, scalars, step // steps_per_epoch)
    with program.compiling_measurements(state):
        train_steps = program.compile_train_steps(state, source)
        if program.last_is_smaller:
            last_step = program.compile_last_step(state, source)
    if distributed.is_first():
        figures.import_in_background()
    if recorders.lack_audit():
        recorders.add_audit(audit_start(program, state, source, progress))
    if step == 0:
        recorders.record_evaluation(step, state)
        recorders.save(state)
    progress.skip(step * recorders.number)
    progress.start_clock()

    metrics, stopping = None, 0
    while step < config.num_steps and not stopping and not recorders.all_failed():
        if step % steps_per_epoch == 0:
            source = program.source(state, scalars, step // steps_per_epoch)
        steps, count = train_steps, steps_to_next_due(step, config, steps_per_epoch)
        if program.last_is_smaller:
            before_last = steps_per_epoch - 1 - step % steps_per_epoch
            steps, count = (steps, min(count, before_last)) if before_last else (last_step, 1)
        jax.block_until_ready(metrics)  # of the call before, so that a signal is answered soon
        state, metrics = steps(state, source, program.place(np.int32(count)))
        step += count
        progress.advance(count * recorders.number)

        last = step == config.num_steps
        if last or step % config.log_every_steps == 0:
            recorders.check_finite(state)
            recorders.record_step(step, state, metrics)
        if last or step % config.eval_every_steps == 0:
            recorders.check_finite(state)
            recorders.record_evaluation(step, state)
        if last or step % config.checkpoint_every_steps == 0 or step in config.keep_checkpoints_at:
            recorders.check_finite(state)
            recorders.save(state)
        # Several processes must agree, which takes time.
        if jax.process_count() == 1 or step % config.log_every_steps == 0:
            stopping = distributed.largest(stop.signal or 0)
    if step < config.num_steps and stopping:
        recorders.check_finite(state)
        recorders.save(state)
        recorders.wait()
        if not recorders.all_failed():
            raise Stopped(stopping, f'at step {step}')
    progress.skip((config.num_steps - step) * recorders.number)  # of runs that failed
    return state


def steps_to_next_due(step: int, config: ConfigDict, steps_per_epoch: int) -> int:
    """How many steps one call may take after `step`, until something else must be done.

    That is at most `steps_per_call`, and no further than the end of the run or of the epoch, and
    the next step at which something is logged, evaluated or saved.
    """
    periods = (
        steps_per_epoch,
        config.log_every_steps,
        config.eval_every_steps,
        config.checkpoint_every_steps,
    )
    return min(
        config.steps_per_call,
        config.num_steps - step,
        *(period - step % period for period in periods),
        *(keep - step for keep in config.keep_checkpoints_at if keep > step),
    )
