"""What does a reduced network cost, beside the network that it follows?

    python -m experiments.performance.reduced

A train step of ConstNet-16-10 on random images of 32x32x3 in batches of 128, and of its reduced
networks of 1 to 64 features a stream: operations by XLA's count, milliseconds (median of 5
repetitions, which take turns) and seconds to compile. Ten minutes on two CPU cores; the large
network is timed with --full=1, which takes five more. docs/performance.md keeps a result.
"""

import sys
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments import runs
from experiments.performance import measuring
from zerojax import models
from zerojax.host import paths
from zerojax.host.command import run_command
from zerojax.host.stop import raise_on_signals
from zerojax.measure.compiled import count_operations
from zerojax.run import checks, cli
from zerojax.step import create_state, jit_in_mode, train_step_function
from zerojax.symmetry import quotient
from zerojax.symmetry.orbits import feature_counts

FEATURES = (1, 2, 4, 8, 16, 32, 64)
DEPTH, WIDTH = 16, 10
BATCH, SHAPE = 128, (32, 32, 3)
REPETITIONS = 5


def lowered_step(m: int | None) -> tuple[Any, tuple[Any, Any], float]:
    """The train step of the network with m features a stream (None: all), lowered; what it is
    called with; and its operations."""
    model = models.create('constnet', depth=DEPTH, width=WIDTH)
    axes, tx = model.feature_axes(), optax.sgd(0.03, momentum=0.9)

    def new(model: Any, tx: Any) -> Any:
        return create_state(model, tx, SHAPE, seed=0, perturbation_seed=0)

    network: Any = model
    if m is not None:
        params = jax.eval_shape(lambda: new(model, tx)).params
        orbits = quotient.shares(feature_counts(params, axes['params']), m)
        model = model.with_features(orbits.counts())
        network = quotient.Quotient(model, axes, orbits)
        tx = optax.chain(quotient.average_gradients(axes['params'], orbits), tx)
    state = jit_in_mode(lambda: new(model, tx), 'deterministic')()
    random = np.random.default_rng(0)
    batch = {
        'image': random.normal(size=(BATCH, *SHAPE)).astype(np.float32),
        'label': random.integers(0, 10, BATCH).astype(np.int32),
    }
    arguments = state, jax.device_put(batch)
    step = train_step_function(network, tx)
    lowered = jit_in_mode(step, 'deterministic').lower(*arguments)
    return lowered, arguments, count_operations(step, *arguments)


def run(argv: list[str]) -> None:
    """The command; `argv` are the program's name and the flags."""
    values = cli.text_flags(workdir='runs/experiments/reduced', full='0')
    cli.parse(argv, values)
    timed_in_full = cli.count(values, 'full', least=0) > 0
    command = ' '.join(['python -m experiments.performance.reduced', *argv[1:]])
    workdir = paths.meant(values.workdir, f'--workdir={values.workdir}')
    checks.check_devices()
    cli.make_folder(workdir)
    operations, compiling, calls = {}, {}, {}
    for m in (*FEATURES, None):
        name = 'all' if m is None else str(m)
        lowered, arguments, operations[name] = lowered_step(m)
        if m is None and not timed_in_full:
            continue
        began = time.perf_counter()
        compiled = lowered.compile()
        compiling[name] = time.perf_counter() - began

        def call(compiled: Any = compiled, arguments: Any = arguments) -> None:
            jax.block_until_ready(compiled(*arguments))

        calls[name] = measuring.repeat(call)
    # The large one alone, or the others would have to wait for it at each turn.
    large = calls.pop('all', None)
    times = measuring.time_in_turns(calls, REPETITIONS, measuring.SECONDS)
    if large is not None:
        times['all'] = measuring.time_alone(large, REPETITIONS, measuring.SECONDS)
    rows = [
        {
            'features a stream': name,
            'operations a step': f'{count:.3g}',
            'of the network': f'{count / operations["all"]:.2g}',
            'ms a step': f'{times[name]["median"] * 1e3:.0f}' if name in times else '-',
            'least': f'{times[name]["least"] * 1e3:.0f}' if name in times else '-',
            'most': f'{times[name]["most"] * 1e3:.0f}' if name in times else '-',
            's to compile': f'{compiling[name]:.0f}' if name in compiling else '-',
        }
        for name, count in operations.items()
    ]
    runs.save_table(workdir, command, f'{runs.machine()}.', rows)


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, raise_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
