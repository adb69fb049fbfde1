"""What an audit looks at: a program's train step at symmetric random weights."""

import time
from typing import Any

import jax

from zerojax import config as config_lib
from zerojax.host.progress import Progress
from zerojax.host.records import Record
from zerojax.measure import step_audit
from zerojax.run.building import Source, build_optimizer, scalars_of
from zerojax.run.program import Program
from zerojax.step import TrainState, jit_in_mode

AUDIT_REPEATS = 5  # steps of the audit that a run of mode 'hardware' begins with


def symmetric_state(program: Program, state: TrainState) -> TrainState:
    """`step_audit.symmetric_state` of a program's run."""
    tx = build_optimizer(program.config, scalars_of(program.config))
    state = step_audit.symmetric_state(state, program.model, tx, program.orbits)
    return jax.device_put(state, program.everywhere)


def compile_inspection(program: Program, state: TrainState, source: Source) -> Any:
    """What `step_audit.CompiledStep` calls beside the train steps, without dropout."""
    config = program.config
    model = config_lib.build_model(config, program.dataset.num_classes, dropout=0.0)
    inspect = jit_in_mode(
        step_audit.make_inspection(model, model.layers(), program.make_batch),
        config.determinism.mode,
        out_shardings=program.everywhere,
    )
    return inspect.lower(state, source).compile()


def audit_start(program: Program, state: TrainState, source: Source, progress: Progress) -> Record:
    """What the manifest says of the noise that the run's own executable makes on this machine.

    Measured in a few steps that are thrown away, at symmetric random weights; `zerojax.audit` tells
    more, of compilations and processes too.
    """
    began = time.monotonic()
    compiled = step_audit.CompiledStep(
        program.compile_train_steps(state, source),
        compile_inspection(program, state, source),
        symmetric_state(program, state),
        source,
    )
    verdict = step_audit.audit_compiled(
        compiled, program.feature_axes, AUDIT_REPEATS, program.orbits
    )
    for sentence in verdict.sentences():
        progress.say(f'audit: {sentence}')
    return {'seconds': round(time.monotonic() - began, 1), **verdict.record(full=False)}
