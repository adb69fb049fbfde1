"""What runs leave in their folders: manifest, checkpoints, metrics, summary and figure."""

import contextlib
import pathlib
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import distributed, figures, manifest, paths, records
from zerojax.host.checkpoint import Checkpoints
from zerojax.host.errors import RunError, UsageError
from zerojax.host.hashes import params_sha256
from zerojax.host.metrics_log import MetricsLog, lines_sha256, read_until
from zerojax.host.progress import COLUMNS, Progress
from zerojax.host.records import Record
from zerojax.run.building import build_schedule
from zerojax.run.evaluate import as_record
from zerojax.run.program import Program
from zerojax.run.ticket import Ticket
from zerojax.step import Metrics, TrainState, determinism


class Recorder:
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
        self.manifest: Record | None = None  # of the process that writes it
        self.outcome: list[str] = []  # what is said of it at its end
        self._schedule = build_schedule(config, config.optimizer.learning_rate)

    def begin(self, step: int, facts: Record, stack: contextlib.ExitStack) -> None:
        """Adds this start to the manifest, and opens metrics.jsonl to go on after `step`.

        `facts` as in `manifest.add_start`.

        Raises:
            UsageError: a file is damaged.
        """
        self.metrics = stack.enter_context(
            MetricsLog(self.workdir, step if step > 0 else -1, writes=distributed.is_first())
        )
        if distributed.is_first():
            self.manifest = manifest.add_start(self.workdir / 'manifest.json', step, facts)

    def resume(self, step: int, saved: Record) -> None:
        """Takes over what was saved beside the state of `step`, from which the run goes on.

        Raises:
            UsageError: metrics.jsonl is not the one that the checkpoint presumes.
        """
        self.seconds_before = saved.get('seconds', 0.0)
        if step == 0:
            return
        lines = read_until(self.workdir / 'metrics.jsonl', step)
        if not any(line['kind'] == 'eval' for line in lines):
            raise UsageError(
                f'--workdir={self.workdir}: has a checkpoint of step {step} but metrics.jsonl is '
                'empty; put it back, or name another folder'
            )
        if saved.get('metrics_sha256') not in (None, lines_sha256(lines)):
            raise UsageError(
                f'--workdir={self.workdir}: metrics.jsonl is not the one that the checkpoint of '
                f'step {step} was saved with, lines are missing or others; put it back, or name '
                'another folder'
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

    def record_step(
        self, step: int, values: dict[str, Any], asymmetry: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        """Writes the 'train' line of an update: its metrics, and the asymmetry after it."""
        by_layer, by_stream = asymmetry
        self.metrics.write(
            step,
            'train',
            **{name: float(value) for name, value in values.items()},
            asymmetry=max(float(x) for x in by_layer.values()),
            asymmetry_by_stream={name: float(value) for name, value in by_stream.items()},
            learning_rate=float(self._schedule(step - 1)),
        )

    def record_evaluation(
        self,
        step: int,
        evaluation: dict[str, Any],
        asymmetry: tuple[dict[str, Any], dict[str, Any]],
        distance_by_stream: dict[str, Any],
        of_params: tuple[dict[str, Any], Any],
        of_layer_outputs: Any,
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
        counts, of_kernels = of_params
        by_layer, by_stream = (
            {name: float(value) for name, value in each.items()} for each in asymmetry
        )
        self.metrics.write(
            step,
            'symmetry',
            asymmetry=max(by_layer.values()),
            asymmetry_by_layer=by_layer,
            asymmetry_by_stream=by_stream,
            **as_record({'distance_by_stream': distance_by_stream} | counts),
        )
        self.metrics.write(step, 'layers', **as_record(of_kernels | of_layer_outputs))

    def shown(self) -> dict[str, float | str]:
        """`shown`, of the last evaluation."""
        evaluation, symmetry = self.metrics.last('eval'), self.metrics.last('symmetry')
        assert evaluation is not None and symmetry is not None
        return shown(evaluation, symmetry)

    def save(self, state: TrainState, seconds: float) -> None:
        """Saves a checkpoint; `seconds` is the time of this process."""
        self.metrics.flush()  # a checkpoint presumes the lines up to its step
        self.checkpoints.save(state, self.seconds_before + seconds, self.metrics.sha256())

    def finish(self, state: TrainState, seconds: float) -> Record:
        """Writes summary and figure of a run that is at its end."""
        self.checkpoints.wait()
        summary = summarize(state, self.metrics, self.seconds_before + seconds)
        if distributed.is_first():
            records.write_json(self.workdir / 'summary.json', summary)
            figure = self.workdir / 'figures' / 'run.png'
            broken = summary['broken_streams']
            drawn = figures.try_to_draw(
                figure, lambda: figures.draw_run(self.metrics.lines, broken, figure)
            )
            self.outcome = outcome(summary, paths.shown(self.workdir), drawn)
        return summary


class Recorders:
    """The recorders of runs that are trained in lockstep; those that have failed are left out."""

    def __init__(
        self, program: Program, runs: list[Recorder], progress: Progress, started: float
    ) -> None:
        """`started` is the `time.monotonic()` at which this process began with them."""
        self.number = len(runs)
        self._program = program
        self._runs = runs
        self._progress = progress
        self._started = started

    def _of_each(self, *trees: Any) -> Iterator[Any]:
        """(recorder, its part of each tree) for the runs that have not failed."""
        for run, *parts in zip(self._runs, *map(self._program.split, trees), strict=True):
            if run.error is None:
                yield run, *parts

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def all_failed(self) -> bool:
        """Whether no run is left to be trained."""
        return all(run.error for run in self._runs)

    def begin(self, step: int, facts: Record, stack: contextlib.ExitStack) -> None:
        """Says where each run goes on, and `Recorder.begin`."""
        for run in self._runs:
            verb = 'RESUMING at' if run.checkpoints.latest_step is not None else 'starting at'
            num_steps = run.config.num_steps
            where = paths.shown(run.workdir)
            self._progress.say(f'{verb} step {step} of {num_steps} in {where}')
        for run in self._runs:
            run.begin(step, facts, stack)

    def lack_audit(self) -> bool:
        """Whether these runs begin with an audit that their manifests do not have yet."""
        audited = self._program.config.determinism.mode == 'hardware' and not self._program.runs
        found = [run.manifest for run in self._runs if run.manifest is not None]
        return audited and bool(distributed.largest(any('audit' not in each for each in found)))

    def add_audit(self, audit: Record) -> None:
        """Adds it to the manifests."""
        for run in self._runs:
            if run.manifest is not None:
                manifest.add_audit(run.workdir / 'manifest.json', run.manifest, audit)

    def check_finite(self, state: TrainState) -> None:
        """Ends the runs in which an update up to here gave a number that is not finite."""
        for run, at_step in self._of_each(distributed.fetch(state.nonfinite_at_step)):
            run.check_finite(int(at_step))

    def record_step(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Writes each run's 'train' line of an update, and shows the first one's state."""
        asymmetry = self._program.measure_asymmetry(state.params)
        for run, *measured in self._of_each(*distributed.fetch((metrics, asymmetry))):
            run.record_step(step, *measured)
        self._progress.show(**next((run.shown() for (run,) in self._of_each()), {}))

    def record_evaluation(self, step: int, state: TrainState) -> None:
        """Evaluates and measures all runs; writes and shows each one's lines."""
        program = self._program
        measured = (
            program.evaluate(state),
            *distributed.fetch(
                (
                    program.measure_asymmetry(state.params),
                    program.measure_distance(state.params),
                )
            ),
            program.measure_params(state.params),
            program.measure_layers(state),
        )
        for run, *its_own in self._of_each(*measured):
            run.record_evaluation(step, *its_own)
        for (run,) in self._of_each():
            where = f'step {step}/{program.config.num_steps}'
            if self.number > 1:
                where = f'{run.workdir.name}  {where}'
            self._progress.evaluated(where, **run.shown())

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint of each run."""
        for run, its_state in zip(self._runs, self._program.split_state(state), strict=True):
            if run.error is None:
                run.save(its_state, self._seconds())
                # Orbax tells saves apart by a counter of each process, so theirs must not overlap.
                if self.number > 1 and jax.process_count() > 1:
                    run.checkpoints.wait()

    def wait(self) -> None:
        """Returns when all checkpoints are on disk."""
        for run in self._runs:
            run.checkpoints.wait()

    def finish(self, state: TrainState) -> list[Record | RunError]:
        """Writes summary and figure of each run; for each its summary, or what it failed with."""
        return [
            run.error or run.finish(its_state, self._seconds())
            for run, its_state in zip(self._runs, self._program.split_state(state), strict=True)
        ]

    def say_outcome(self) -> None:
        """Says what came of each run that has finished."""
        for run in self._runs:
            for line in run.outcome:
                self._progress.say(line)


def shown(evaluation: Record, symmetry: Record) -> dict[str, float | str]:
    """Loss and accuracy, asymmetry and number of broken streams, of two lines of a step."""
    by_stream = symmetry['asymmetry_by_stream'].values()
    return {
        'loss': evaluation['loss'],
        'accuracy': evaluation['accuracy'],
        'asymmetry': symmetry['asymmetry'],
        'broken': f'{sum(value > 0 for value in by_stream)}/{len(by_stream)}',
    }


def outcome(summary: Record, workdir: pathlib.Path, drawn: bool) -> list[str]:
    """A summary as lines of at most 100 columns, but for where it is."""
    at_steps: dict[int | None, list[str]] = {}
    for stream, at_step in summary['broken_streams'].items():
        at_steps.setdefault(at_step, []).append(stream)
    broken = ', '.join(
        f'{"never" if at_step is None else f"at step {at_step}"} ({", ".join(streams)})'
        for at_step, streams in sorted(at_steps.items(), key=lambda each: (each[0] is None, each))
    )
    return [
        f'held-out accuracy {summary["eval_accuracy"]:.4f} after step {summary["step"]}, best '
        f'{summary["best_eval_accuracy"]:.4f}; asymmetry {summary["asymmetry"]:.4g}',
        *textwrap.wrap(f'symmetry broken: {broken}', COLUMNS, max_lines=2, placeholder=' ...'),
        f'{workdir}/summary.json' + (', figures/run.png' if drawn else ''),
    ]


def summarize(state: TrainState, metrics: MetricsLog, seconds: float) -> Record:
    """What `summary.json` holds; the fields are explained in docs/howto/configure.md."""
    symmetry_line = metrics.of_kind('symmetry')[-1]
    broken_streams = when_broken(
        state.broken_streams, symmetry_line['asymmetry_by_stream'], int(state.step)
    )
    broken_at_steps = [at_step for at_step in broken_streams.values() if at_step is not None]
    evaluations = metrics.of_kind('eval')
    return {
        'step': int(state.step),
        'train_loss': metrics.of_kind('train')[-1]['loss'],
        'eval_accuracy': evaluations[-1]['accuracy'],
        'best_eval_accuracy': max(line['accuracy'] for line in evaluations),
        'asymmetry': symmetry_line['asymmetry'],
        'unique_features': symmetry_line['unique_features'],
        'broken_at_step': min(broken_at_steps, default=None),
        'asymmetry_by_stream': symmetry_line['asymmetry_by_stream'],
        'unique_features_by_stream': symmetry_line['unique_features_by_stream'],
        'broken_streams': broken_streams,
        'params_sha256': params_sha256(jax.device_get(state.params)),
        'seconds': round(seconds, 1),
    }


def when_broken(
    remembered: Mapping[str, Any], asymmetry_by_stream: Mapping[str, float], step: int
) -> dict[str, int | None]:
    """The step at which each stream broke, None if it never did, known after `step` updates.

    `remembered` is `TrainState.broken_streams`. At what the very last update broke no gradient was
    taken yet; its asymmetry tells.
    """
    broken: dict[str, int | None] = {}
    for stream, at_step in remembered.items():
        if at_step >= 0:
            broken[stream] = int(at_step)
        else:
            broken[stream] = step if asymmetry_by_stream.get(stream, 0) > 0 else None
    return broken


def run_facts(program: Program) -> Record:
    """What the manifest says of a run beyond versions and devices."""
    config, dataset = program.config, program.dataset
    return {
        'compiler_options': determinism.compiler_options(config.determinism.mode),
        'execution': {
            'determinism': config.determinism.mode,
            'steps_per_call': config.steps_per_call,
            'convolution': config_lib.convolution_of(config, batched=program.runs is not None),
            'precision': config.model.precision,
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
