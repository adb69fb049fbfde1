"""Before the first step: the folders are claimed, and a run that was left goes on."""

import contextlib
import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, manifest
from zerojax.host.checkpoint import OtherState
from zerojax.host.errors import DamagedCheckpoint, UsageError
from zerojax.host.progress import Progress
from zerojax.host.records import Record
from zerojax.host.workdir import Workdir
from zerojax.run.program import Program
from zerojax.run.recorder import Recorder
from zerojax.step import TrainState


def claim(
    workdirs: list[pathlib.Path], configs: list[ConfigDict], stack: contextlib.ExitStack
) -> None:
    """Locks the folders until `stack` is closed; of several processes the first does it for all.

    Raises:
        UsageError: a folder is in use, cannot be written, or holds a run of another config.
    """
    problem: Exception | None = None
    if distributed.is_first():
        try:
            for workdir, config in zip(workdirs, configs, strict=True):
                stack.enter_context(Workdir(workdir, config_lib.as_json(config)))
        except Exception as error:  # the others wait for this process
            problem = error
    distributed.agree(problem)


def compare_conditions(workdirs: list[pathlib.Path], facts: Record, progress: Progress) -> None:
    """Says loudly if runs go on under other conditions than they were left under.

    `facts` as in `manifest.add_start`.

    Raises:
        UsageError: they must not, see `manifest.differences`.
    """
    problem: Exception | None = None
    if distributed.is_first():
        try:
            for workdir in workdirs:
                found = manifest.differences(workdir / 'manifest.json', facts)
                if found:
                    progress.say(
                        f'OTHER CONDITIONS than when {workdir} was left: {"; ".join(found)}; from '
                        'here on its bits may be others than those of an undisturbed run'
                    )
        except Exception as error:  # the others wait for this process
            problem = error
    distributed.agree(problem)


def restore(
    program: Program, state: TrainState, runs: list[Recorder], progress: Progress
) -> tuple[TrainState, int]:
    """The state to go on from and its step: `state`, or what the runs have in their checkpoints.

    That is the newest step of which all have an intact checkpoint; runs without any are at step 0.
    What is newer is out of the way afterwards: damaged checkpoints are set aside, intact ones,
    which will be made again, removed.

    Raises:
        UsageError: the checkpoints hold states of another structure, one was renamed, or the
            metrics are not those that they presume.
        DamagedCheckpoint: there is no such step.
        In all of these nothing is moved or removed, but what `Checkpoints` had moved before.
    """
    states = [
        its_state
        if run.ticket is None
        else dataclasses.replace(its_state, **jax.device_put(run.ticket, program.everywhere))
        for run, its_state in zip(runs, program.split_state(state), strict=True)
    ]
    for run in runs:
        for moved, folder in run.checkpoints.moved.items():
            progress.say(f'checkpoint {moved} is damaged (its metadata); moved to {folder}')
    damaged: dict[tuple[Recorder, int], DamagedCheckpoint] = {}
    steps = [set(run.checkpoints.steps) or {0} for run in runs]
    for step in sorted(set.intersection(*steps), reverse=True):
        restored = []
        for run, its_state in zip(runs, states, strict=True):
            try:
                new = not run.checkpoints.steps
                restored.append(
                    (its_state, {}) if new else run.checkpoints.restore(step, like=its_state)
                )
            except DamagedCheckpoint as reason:
                damaged[run, step] = reason
        if not distributed.largest(len(restored) < len(runs)):
            break
    else:
        if damaged and all(isinstance(each, OtherState) for each in damaged.values()):
            raise UsageError(
                f'{next(iter(damaged.values()))}; resume it with those that it was saved by, or '
                'name another folder'
            )
        reasons = '; '.join(map(str, damaged.values())) or 'no step is common to all runs'
        of_these = {run for run, _ in damaged} or runs
        folders = ', '.join(str(run.workdir / 'checkpoints') for run in runs if run in of_these)
        raise DamagedCheckpoint(
            f'{reasons}; none is left to resume from: move {folders} away to begin anew'
        )
    for run, (_, saved) in zip(runs, restored, strict=True):
        run.resume(step, saved)
    for (run, bad_step), error in damaged.items():
        folder = run.checkpoints.set_aside(bad_step)
        progress.say(f'{error}; moved to {folder}, going on from step {step}')
    for run in runs:
        for newer in [each for each in run.checkpoints.steps if each > step]:
            run.checkpoints.delete(newer)
    return program.stack_states([its_state for its_state, _ in restored]), step
