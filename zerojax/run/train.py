"""One run, from top to bottom; or several that are computed at once."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, figures, records
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import RunError, UsageError
from zerojax.host.progress import Progress
from zerojax.host.stop import Stopped, StopRequest
from zerojax.host.workdir import Workdir
from zerojax.measure import step_audit
from zerojax.run.checks import (
    Ticket,
    check_backend,
    check_initial_weights,
    check_layers,
    has_checkpoint,
    load_ticket,
    resolve,
)
from zerojax.run.evaluate import as_record
from zerojax.run.program import (
    Program,
    Programs,
    Scalars,
    Source,
    build_schedule,
    compile_inspection,
    scalars_of,
    symmetric,
)
from zerojax.step import TrainState, determinism
from zerojax.step.precision import numbers_of

AUDIT_REPEATS = 5  # steps of the audit that a run of mode 'hardware' begins with


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    programs: Programs | None = None,
    progress: Progress | None = None,
) -> records.Record:
    """Trains `config` in `workdir`, or goes on with the run that is there.

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
) -> list[records.Record | RunError]:
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
        dataset = programs.dataset(runs[0][0])
        configs = [resolve(config, dataset) for config, _ in runs]
        check_backend(configs[0].determinism.mode)
        stack.enter_context(numbers_of(configs[0].param_dtype))
        program = programs.program(configs[0], dataset, len(runs) if batched else None)
        scalars = program.place_scalars([scalars_of(config) for config in configs])
        state = program.initial_state(scalars)
        tickets = []
        for (_, workdir), config, its_state in zip(
            runs, configs, program.split_state(state), strict=True
        ):
            check_layers(config, its_state.params)
            check_initial_weights(config, its_state.params, program)
            tickets.append(None if has_checkpoint(workdir) else load_ticket(config, its_state))
        claim([workdir for _, workdir in runs], configs, stack)
        claimed = [
            Run(config, workdir, ticket, stack)
            for (_, workdir), config, ticket in zip(runs, configs, tickets, strict=True)
        ]
        if progress is None:
            progress = stack.enter_context(Progress(configs[0].num_steps * len(runs)))
        return _train(program, state, scalars, claimed, progress, stop, started)


def claim(
    workdirs: list[pathlib.Path], configs: list[ConfigDict], stack: contextlib.ExitStack
) -> None:
    """Locks the folders until `stack` is closed; of several processes the first does it for all.

    Raises:
        UsageError: a folder is in use, cannot be written, or holds a run of another config.
    """
    problem = None
    if distributed.is_first():
        try:
            for workdir, config in zip(workdirs, configs, strict=True):
                stack.enter_context(Workdir(workdir, json.loads(json.dumps(config.to_dict()))))
        except UsageError as error:
            problem = error
    distributed.agree(problem)


class Run:
    """One of the runs that are trained: its config, its folder, and what it writes there."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        ticket: Ticket | None,
        stack: contextlib.ExitStack,
    ) -> None:
        """Opens the checkpoints, until `stack` is closed."""
        self.config = config
        self.workdir = workdir
        self.ticket = ticket
        self.checkpoints = stack.enter_context(
            Checkpoints(workdir / 'checkpoints', config.keep_checkpoints_at)
        )
        self.seconds_before = 0.0  # in processes before this one
        self.error: RunError | None = None  # what it ended with before its time
        self._schedule = build_schedule(config, config.optimizer.learning_rate)

    def open_metrics(self, step: int, stack: contextlib.ExitStack) -> None:
        """Opens metrics.jsonl to go on after `step`.

        Raises:
            UsageError: the file is damaged, or lacks what the checkpoint presumes.
        """
        self.metrics = stack.enter_context(
            records.Metrics(self.workdir, step if step > 0 else -1, writes=distributed.is_first())
        )
        if step > 0 and self.metrics.last('eval') is None:
            raise UsageError(
                f'--workdir={self.workdir}: has a checkpoint of step {step} but metrics.jsonl is '
                'empty; name another folder'
            )

    def check_finite(self, nonfinite_at_step: int) -> None:
        """Ends the run if an update up to here gave a number that is not finite."""
        if nonfinite_at_step >= 0:
            self.checkpoints.wait()
            self.error = RunError(
                f'step {nonfinite_at_step}: loss, gradient or weights are not finite; the last '
                f'good checkpoint is that of step {self.checkpoints.latest_step}; try a lower '
                'optimizer.learning_rate'
            )

    def record_step(self, step: int, values: dict[str, Any], asymmetry: dict[str, Any]) -> None:
        """Writes the 'train' line of an update: its metrics, and each layer's asymmetry after."""
        self.metrics.write(
            step,
            'train',
            **{name: float(value) for name, value in values.items()},
            asymmetry=max(float(x) for x in asymmetry.values()),
            learning_rate=float(self._schedule(step - 1)),
        )

    def record_evaluation(
        self,
        step: int,
        evaluation: dict[str, Any],
        asymmetry: dict[str, Any],
        unique_features: dict[str, Any],
        layers: Any,
    ) -> None:
        """Writes the lines of an evaluation, unless its loss is not finite, which ends the run."""
        evaluation = {name: float(value) for name, value in evaluation.items()}
        if not np.isfinite(evaluation['loss']):
            self.error = RunError(
                f'step {step}: the loss on the held-out set is not finite; try smaller initial '
                'weights (model.*) or a lower optimizer.learning_rate'
            )
            return
        self.metrics.write(step, 'eval', **evaluation)
        by_layer = {name: float(value) for name, value in asymmetry.items()}
        self.metrics.write(
            step,
            'symmetry',
            asymmetry=max(by_layer.values()),
            asymmetry_by_layer=by_layer,
            unique_features={name: int(number) for name, number in unique_features.items()},
        )
        self.metrics.write(step, 'layers', **as_record(layers))

    def shown(self) -> dict[str, float]:
        """Loss and accuracy of the last evaluation, and the asymmetry then."""
        evaluation, symmetry = self.metrics.last('eval'), self.metrics.last('symmetry')
        assert evaluation is not None and symmetry is not None
        return {
            'loss': evaluation['loss'],
            'accuracy': evaluation['accuracy'],
            'asymmetry': symmetry['asymmetry'],
        }

    def save(self, state: TrainState, seconds: float) -> None:
        """Saves a checkpoint; `seconds` is the time of this process."""
        self.metrics.flush()  # a checkpoint presumes the lines up to its step
        self.checkpoints.save(state, self.seconds_before + seconds)

    def finish(self, state: TrainState, seconds: float) -> records.Record:
        """Writes summary and figure of a run that is at its end."""
        self.checkpoints.wait()
        summary = summarize(state, self.metrics, self.seconds_before + seconds)
        if distributed.is_first():
            records.write_json(self.workdir / 'summary.json', summary)
            figure = self.workdir / 'figures' / 'run.png'
            figures.draw_run(self.metrics.lines, summary['broken_at_step'], figure)
        return summary


def restore(
    program: Program, state: TrainState, runs: list[Run], progress: Progress
) -> tuple[TrainState, int]:
    """The state to go on from and its step: `state`, or what the runs have in their checkpoints.

    That is the newest step of which all have an intact checkpoint; runs without any are at step 0.
    What is newer is out of the way afterwards: damaged checkpoints are set aside, intact ones,
    which will be made again, removed.

    Raises:
        RunError: there is no such step; all checkpoints are left as they are.
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
    damaged: dict[tuple[Run, int], RunError] = {}
    steps = [set(run.checkpoints.steps) or {0} for run in runs]
    for step in sorted(set.intersection(*steps), reverse=True):
        restored = []
        for run, its_state in zip(runs, states, strict=True):
            try:
                new = not run.checkpoints.steps
                restored.append(
                    (its_state, 0.0) if new else run.checkpoints.restore(step, like=its_state)
                )
            except RunError as reason:
                damaged[run, step] = reason
        if len(restored) == len(runs):
            break
    else:
        reasons = '; '.join(map(str, damaged.values())) or 'no step is common to all runs'
        of_these = {run for run, _ in damaged} or runs
        folders = ', '.join(str(run.workdir / 'checkpoints') for run in runs if run in of_these)
        raise RunError(f'{reasons}; none is left to resume from: remove {folders} to begin anew')
    for (run, bad_step), error in damaged.items():
        folder = run.checkpoints.set_aside(bad_step)
        progress.say(f'{error}; moved to {folder}, going on from step {step}')
    for run, (_, seconds) in zip(runs, restored, strict=True):
        run.seconds_before = seconds
        for newer in [each for each in run.checkpoints.steps if each > step]:
            run.checkpoints.delete(newer)
    return program.stack_states([its_state for its_state, _ in restored]), step


def _train(
    program: Program,
    state: TrainState,
    scalars: Scalars,
    runs: list[Run],
    progress: Progress,
    stop: StopRequest,
    started: float,
) -> list[records.Record | RunError]:
    config = program.config  # of a run with this program; these differ in scalars and pruning

    # The state: new, or where the runs were left.
    state, step = restore(program, state, runs, progress)
    for run in runs:
        verb = 'RESUMING at' if run.checkpoints.latest_step is not None else 'starting at'
        progress.say(f'{verb} step {step} of {config.num_steps} in {run.workdir}')
    manifests = []
    if distributed.is_first():
        manifests = [
            records.add_start(run.workdir / 'manifest.json', step, run_facts(program))
            for run in runs
        ]

    # The executables, and the training set on the device.
    steps_per_epoch = len(program.dataset.train.labels) // config.batch_size
    order_epoch = step // steps_per_epoch
    order = program.epoch_order(state.keys['order'], order_epoch)
    train_steps = program.compile_train_steps(state, Source(program.examples, order, scalars))
    audited = config.determinism.mode == 'hardware' and not program.runs
    if audited and distributed.largest(any('audit' not in each for each in manifests)):
        source = Source(program.examples, order, scalars)
        audit = audit_start(program, train_steps, state, source, progress)
        for run, manifest in zip(runs, manifests, strict=False):
            records.add_audit(run.workdir / 'manifest.json', manifest, audit)

    @functools.cache
    def on_device(count: int) -> jax.Array:
        return jax.device_put(np.int32(count), program.everywhere)

    def each(*trees: Any) -> Iterator[Any]:
        """(run, its part of each tree) for the runs that have not ended with an error."""
        for run, *parts in zip(runs, *map(program.split, trees), strict=True):
            if run.error is None:
                yield run, *parts

    def check_finite() -> None:
        for run, at_step in each(distributed.fetch(state.nonfinite_at_step)):
            run.check_finite(int(at_step))

    def record_evaluation() -> None:
        evaluation, layers = program.evaluate(state), program.measure_layers(state)
        asymmetry = distributed.fetch(program.measure_asymmetry(state.params))
        unique = program.unique_features(state.params)
        for run, *measured in each(evaluation, asymmetry, unique, layers):
            run.record_evaluation(step, *measured)
        for run in runs:
            if run.error is None:
                where = f'step {step}/{config.num_steps}'
                progress.evaluated(
                    where if len(runs) == 1 else f'{run.workdir.name}  {where}', **run.shown()
                )

    def save() -> None:
        for run, its_state in zip(runs, program.split_state(state), strict=True):
            if run.error is None:
                run.save(its_state, time.monotonic() - started)

    with contextlib.ExitStack() as stack:
        for run in runs:
            run.open_metrics(step, stack)
        if step == 0:
            record_evaluation()
            save()
        last_metrics, stopping = None, 0
        progress.skip(step * len(runs))
        progress.start_clock()
        while step < config.num_steps and not stopping and not all(r.error for r in runs):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = program.epoch_order(state.keys['order'], epoch), epoch
            count = min(
                config.steps_per_call,
                steps_per_epoch - position,
                config.num_steps - step,
                *(
                    every - step % every
                    for every in (
                        config.log_every_steps,
                        config.eval_every_steps,
                        config.checkpoint_every_steps,
                    )
                ),
                *(keep - step for keep in config.keep_checkpoints_at if keep > step),
            )
            # Wait for the call before the last, so that a signal is answered soon.
            jax.block_until_ready(last_metrics)
            source = Source(program.examples, order, scalars)
            state, last_metrics = train_steps(state, source, on_device(count))
            step += count
            progress.advance(count * len(runs))

            last = step == config.num_steps
            if last or step % config.log_every_steps == 0:
                check_finite()
                asymmetry = program.measure_asymmetry(state.params)
                for run, *measured in each(*distributed.fetch((last_metrics, asymmetry))):
                    run.record_step(step, *measured)
                progress.show(**next((run.shown() for run in runs if run.error is None), {}))
            if last or step % config.eval_every_steps == 0:
                check_finite()
                record_evaluation()
            due = step % config.checkpoint_every_steps == 0 or step in config.keep_checkpoints_at
            if last or due:
                check_finite()
                save()
            # Several processes must agree, which takes time.
            if jax.process_count() == 1 or step % config.log_every_steps == 0:
                stopping = distributed.largest(stop.signal or 0)
        if step < config.num_steps and stopping:
            check_finite()
            save()
            for run in runs:
                run.checkpoints.wait()
            raise Stopped(stopping, step)
        return [
            run.error or run.finish(its_state, time.monotonic() - started)
            for run, its_state in zip(runs, program.split_state(state), strict=True)
        ]


def audit_start(
    program: Program, train_steps: Any, state: TrainState, source: Source, progress: Progress
) -> records.Record:
    """What the manifest says of the noise that the run's own executable makes on this machine.

    Measured in a few steps that are thrown away, at symmetric random weights; `zerojax.audit` tells
    more, of compilations and processes too.
    """
    began = time.monotonic()
    compiled = step_audit.CompiledStep(
        train_steps, compile_inspection(program, state, source), symmetric(program, state), source
    )
    verdict = step_audit.audit_compiled(
        compiled, program.feature_axes, AUDIT_REPEATS, program.orbits
    )
    for sentence in verdict.sentences():
        progress.say(f'audit: {sentence}')
    return {'seconds': round(time.monotonic() - began, 1), **verdict.record(full=False)}


def run_facts(program: Program) -> records.Record:
    """What the manifest says of a run beyond versions and devices."""
    config, dataset = program.config, program.dataset
    return {
        'compiler_options': determinism.compiler_options(config.determinism.mode),
        'execution': {
            'determinism': config.determinism.mode,
            'steps_per_call': config.steps_per_call,
            'convolution': config.model.convolution,
            'param_dtype': config.param_dtype,
            'runs_at_once': program.runs or 1,
            'mesh': None if program.mesh is None else dict(program.mesh.shape),
            'processes': jax.process_count(),
        },
        'dataset': {
            'name': config.dataset.name,
            'train_examples': len(dataset.train.labels),
            'eval_examples': len(dataset.eval.labels),
            'train_sha256': dataset.train.sha256(),
            'eval_sha256': dataset.eval.sha256(),
        },
    }


def summarize(state: TrainState, metrics: records.Metrics, seconds: float) -> records.Record:
    """What `summary.json` holds; the fields are explained in the README."""
    symmetry_line = metrics.of_kind('symmetry')[-1]
    broken_at_step = int(state.broken_at_step)
    if broken_at_step < 0 and symmetry_line['asymmetry'] > 0:
        broken_at_step = int(state.step)  # the very last update broke it
    evaluations = metrics.of_kind('eval')
    return {
        'step': int(state.step),
        'train_loss': metrics.of_kind('train')[-1]['loss'],
        'eval_accuracy': evaluations[-1]['accuracy'],
        'best_eval_accuracy': max(line['accuracy'] for line in evaluations),
        'asymmetry': symmetry_line['asymmetry'],
        'unique_features': symmetry_line['unique_features'],
        'broken_at_step': None if broken_at_step < 0 else broken_at_step,
        'params_sha256': records.params_sha256(jax.device_get(state.params)),
        'seconds': round(seconds, 1),
    }
