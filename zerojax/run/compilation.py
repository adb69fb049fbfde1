"""A run's train step, compiled for devices that need not be here."""

import dataclasses
import functools
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from zerojax.host.errors import first_line
from zerojax.measure import hlo
from zerojax.run import checks, data
from zerojax.run.program import Program
from zerojax.run.target import Target
from zerojax.step import determinism
from zerojax.step.precision import numbers_of


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of compiling a step in one mode.

    Attributes:
        backend: 'cpu', 'gpu' or 'tpu'.
        seconds: for lowering and compiling.
        executable: None if it does not compile.
        reason: why it does not, in one line.
    """

    backend: str
    seconds: float
    executable: Any = None
    reason: str = ''

    @functools.cached_property
    def module(self) -> hlo.Module:
        """The program, to be read."""
        return hlo.parse(self.executable.as_text(), self.backend)

    def memory(self) -> dict[str, int]:
        """Bytes of one device; results that take the place of arguments count as these."""
        stats = self.executable.memory_analysis()
        return {
            'arguments': stats.argument_size_in_bytes,
            'results': stats.output_size_in_bytes - stats.alias_size_in_bytes,
            'temporaries': stats.temp_size_in_bytes,
        }


def resolve(
    config: ConfigDict, target: Target, *, mesh_given: bool
) -> tuple[ConfigDict, data.Dataset]:
    """The config as a run on the target would have it, and what stands for its data.

    Unless `mesh_given`, or the config itself names more than one, all devices share each batch.

    Raises:
        UsageError: a field does not fit.
    """
    config = ConfigDict(config.to_dict())
    if config.mesh.data == 1 and not mesh_given:
        config.mesh.data = len(target.devices)
    dataset = data.stand_in(config)
    if len(config.dataset.mean) == 0:  # two constants of the program; any will do
        channels = dataset.image_shape[-1]
        config.dataset.mean = config.dataset.std = (127.5,) * channels
    config = checks.resolve(config, dataset)
    _checked_program(config, dataset, target)
    return config, dataset


def _checked_program(config: ConfigDict, dataset: data.Dataset, target: Target) -> Program:
    with numbers_of(config.param_dtype):
        program = Program(config, dataset, devices=target.devices)
        state, _ = program.shapes()
    checks.check_layers(config, state.params, program.feature_axes)
    return program


def compile_in_modes(
    config: ConfigDict, dataset: data.Dataset, target: Target
) -> dict[str, Attempt]:
    """Compiles the step of a resolved config in each mode of determinism.

    The deterministic one comes first, since what XLA chooses for a GPU outlives a compilation.
    Modes of the same compiler options are one program, which is compiled once.
    """
    modes = 'deterministic', 'hardware'
    options = {mode: determinism.compiler_options(mode, target.backend) for mode in modes}
    attempts: dict[str, Attempt] = {}
    for mode in modes:
        same = [each for each in attempts if options[each] == options[mode]]
        if same:
            attempts[mode] = attempts[same[0]]
            continue
        of_mode = ConfigDict(config.to_dict())
        of_mode.determinism.mode = mode
        attempts[mode] = compile_step(of_mode, dataset, target)
    return attempts


def compile_step(config: ConfigDict, dataset: data.Dataset, target: Target) -> Attempt:
    """Compiles the step of a resolved config."""
    program = _checked_program(config, dataset, target)
    began = time.monotonic()
    lowered = program.train_steps.lower(*program.shapes(), np.int32(1))
    try:
        executable = lowered.compile()
    except Exception as error:  # compilers raise many kinds
        reason = first_line(error)
        return Attempt(target.backend, time.monotonic() - began, reason=reason)
    return Attempt(target.backend, time.monotonic() - began, executable)
