"""Measures what this machine can be trusted with, for the very step that a config would train.

python -m zerojax.audit --config=configs/NAME.py[:VARIANT] [--config.FIELD=VALUE ...]
                        [--workdir=DIR] [--repeats=10] [--compilations=3] [--processes=2]

The step runs --repeats times in one executable, once in each of --compilations executables that are
compiled afresh, and once in each of --processes fresh processes beside this one (0: none). Layer
outputs, loss, gradients and the new state are compared bit by bit; and within each layer its
features, which are equal in exact arithmetic; and, while one stream is broken at a time, those of
all other streams, which stay equal in exact arithmetic. The step is the config's own: first batch,
augmentation, model, optimizer, determinism mode, steps_per_call; without perturbation. Its weights
are random numbers, equal along the feature axes: at constant ones most results are 0 and tell
nothing. Outputs and gradients do not leave the training program, so they are those of a second one,
of the same operations but fused otherwise, and without dropout.

The verdict is printed; DIR/audit.json (default: runs/audit_NAME) has every tensor. Exit status: 0
success, whatever the verdict; 1 a process failed; 2 a mistake in flags, config, data or workdir.
"""

import pathlib
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax.host import manifest, records
from zerojax.host.command import run_command
from zerojax.host.errors import RunError, UsageError
from zerojax.host.stop import raise_on_signals
from zerojax.host.terminal import say
from zerojax.measure import noise, step_audit
from zerojax.measure.compiled import no_compilation_cache
from zerojax.run import checks, cli, data
from zerojax.run.building import scalars_of
from zerojax.run.inspection import compile_inspection, symmetric_state
from zerojax.run.program import Program
from zerojax.step import determinism
from zerojax.step.precision import numbers_of

Flat = dict[str, np.ndarray]


def prepare_step(config: ConfigDict) -> Program:
    """The program of the config to audit, resolved and without perturbation.

    Raises:
        UsageError: config or data are wrong, or the mode cannot be granted here.
    """
    dataset = data.load_of(config)
    config = checks.resolve(config, dataset)
    checks.check_backend(config.determinism.mode)
    program = Program(config, dataset)
    params = program.initial_state(scalars_of(config)).params
    checks.check_layers(config, params, program.feature_axes)
    checks.check_initial_weights(config, params, program.feature_axes, program.orbits)
    config.perturbation.kind = 'none'
    return Program(config, dataset)


def compile_step(program: Program) -> step_audit.CompiledStep:
    """The program's step at symmetric weights, compiled afresh."""
    with no_compilation_cache():
        program = Program(program.config, program.dataset)
        scalars = scalars_of(program.config)
        state = symmetric_state(program, program.initial_state(scalars))
        source = program.source(state, scalars, epoch=0)
        return step_audit.CompiledStep(
            program.compile_train_steps(state, source),
            compile_inspection(program, state, source),
            state,
            source,
        )


def in_fresh_processes(argv: list[str], folder: str, number: int) -> list[pathlib.Path]:
    """Runs the step once in each of several processes, one after another; the files they leave.

    Raises:
        UsageError: a process found a mistake in flags, config or data.
        RunError: a process failed.
    """
    files = [pathlib.Path(folder) / f'{i}.npz' for i in range(number)]
    for file in files:
        command = [sys.executable, '-m', 'zerojax.audit', *argv[1:], f'--tensors_to={file}']
        done = subprocess.run(command, capture_output=True, errors='replace')
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
            if done.returncode == 2:
                raise UsageError(reason.removeprefix('error: '))
            raise RunError(f'a fresh process ended with status {done.returncode}: {reason}')
    return files


def read_tensors(file: pathlib.Path, like: Flat) -> Flat:
    """What a process wrote; NumPy's files forget the names of dtypes such as bfloat16."""
    with np.load(file) as tensors:
        return {name: tensors[name].view(x.dtype) for name, x in like.items()}


def audit(
    config: ConfigDict,
    argv: list[str],
    folder: str,
    repeats: int,
    compilations: int,
    processes: int,
) -> step_audit.Verdict:
    """Measures everything; `argv` is the command line that fresh processes are started with.

    Raises:
        UsageError, RunError: as `prepare_step` and `in_fresh_processes`.
    """
    # Before this process takes the device: a GPU's memory, or a TPU, may not be shared.
    files = in_fresh_processes(argv, folder, processes)
    program = prepare_step(config)
    compiled = compile_step(program)
    first = compiled.run()
    flat = noise.flatten(first)

    def repeated() -> Iterator[Any]:
        yield flat
        for _ in range(repeats - 1):
            yield noise.flatten(compiled.run())

    def recompiled() -> Iterator[Any]:
        yield flat
        for _ in range(compilations - 1):
            yield noise.flatten(compile_step(program).run())

    def elsewhere() -> Iterator[Any]:
        yield flat
        for file in files:
            yield read_tensors(file, flat)

    compared = {step_audit.ONE_EXECUTABLE: repeats, step_audit.COMPILATIONS: compilations}
    floors = {
        step_audit.ONE_EXECUTABLE: noise.noise_floor(repeated()),
        step_audit.COMPILATIONS: noise.noise_floor(recompiled()),
    }
    if processes:
        compared[step_audit.PROCESSES] = 1 + processes
        floors[step_audit.PROCESSES] = noise.noise_floor(elsewhere())

    axes, orbits = program.model.feature_axes(), program.orbits
    new_state = new_state_shows_kernels(program.config)
    features = step_audit.equal_features_of_step(first, axes, orbits, new_state=new_state)
    streams = None
    if orbits is None or not orbits.entries:
        streams = step_audit.break_streams(compiled, axes, orbits, new_state=new_state)
    operations = compiled.operations(jax.default_backend())
    return step_audit.Verdict(compared, floors, operations, features, streams)


def new_state_shows_kernels(config: ConfigDict) -> bool:
    """Whether the new weights' features are equal but for the kernels."""
    return config.model.dropout == 0 and not config.symmetry.project


def screen(config: ConfigDict, verdict: step_audit.Verdict) -> list[str]:
    """The verdict as lines of at most 100 columns."""
    machine, mode = manifest.environment(), config.determinism.mode
    versions = machine['versions']
    options = determinism.compiler_options(mode) or 'none'
    lines = [
        f'audit of {config.model.name} on {config.dataset.name}',
        f'machine   {machine["backend"]}: {machine["device_count"]} x {machine["device_kind"]}, '
        f'{machine["cpu_count"]} CPU cores; jax {versions["jax"]}, jaxlib {versions["jaxlib"]}',
        f'mode      {mode}; compiler options: {options}',
        f'step      {config.param_dtype}, batch {config.batch_size}, convolutions '
        f'{config_lib.convolution_of(config)}, steps_per_call {config.steps_per_call}, '
        f'{config.optimizer.name}',
        'weights   random, N(0, 1) / fan_in, equal within each orbit of features; no perturbation',
        '',
        *verdict.table(),
    ]
    if not new_state_shows_kernels(config):
        cause = 'dropout' if config.model.dropout > 0 else 'projection'
        lines.append(f'  (new weights left out: {cause} decides whether their features are equal)')
    if verdict.streams is None:
        lines += [
            '',
            'streams   left out: identity layers tie one to the next, they break together',
        ]
    sentences = [line for each in verdict.sentences() for line in textwrap.wrap(each, 100)]
    return [line[:100] for line in lines] + ['', *sentences]


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    # --tensors_to is for the processes that the command starts.
    values = cli.text_flags(repeats='10', compilations='3', processes='2', tensors_to=None)
    config, workdir = cli.parse_flags(argv, values, workdir='runs/audit_NAME')
    repeats = cli.count(values, 'repeats', least=2)
    compilations = cli.count(values, 'compilations', least=2)
    processes = cli.count(values, 'processes', least=0)
    if values.tensors_to is not None:
        with numbers_of(config.param_dtype):
            compiled = compile_step(prepare_step(config))
            tensors: Any = noise.flatten(compiled.run())
        np.savez(values.tensors_to, **tensors)
        return
    checks.check_backend(config.determinism.mode)
    cli.make_folder(workdir)
    try:
        folder = tempfile.TemporaryDirectory(dir=workdir, prefix='.tensors_')
    except OSError as error:
        raise UsageError(
            f'--workdir={workdir}: cannot be written ({error.strerror}); name another folder'
        ) from error
    with folder as name, numbers_of(config.param_dtype):
        verdict = audit(config, argv, name, repeats, compilations, processes)
    for line in screen(config, verdict):
        say(line)
    records.write_json(
        workdir / 'audit.json',
        {
            **manifest.environment(),
            'config': config_lib.as_json(config),
            'compiler_options': determinism.compiler_options(config.determinism.mode),
            **verdict.record(full=True),
        },
    )
    say(f'{workdir}/audit.json has every tensor')


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
