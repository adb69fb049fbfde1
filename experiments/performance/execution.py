"""How should a train step be executed here? Convolution × steps in one dispatch × image size.

    python -m experiments.performance.execution

Times ConstNet-10-1 on random images and prints two Markdown tables: milliseconds a step, median
(smallest to largest) of 5 repetitions, each timing 22 steps, after one to warm up; and seconds of
the measurements that each evaluation makes of all layers, the first with its compilation. Seven
minutes on two CPU cores. docs/performance.md keeps a result.
"""

import importlib
import platform
import statistics
import sys
import time

import jax
import numpy as np
import optax

from zerojax import models, step
from zerojax.host.command import run_command
from zerojax.host.stop import exit_on_signals
from zerojax.host.terminal import say
from zerojax.models import convolutions
from zerojax.run import checks, cli, data
from zerojax.run.building import scalars_of
from zerojax.run.program import Program

STEPS = 22
REPETITIONS = 5


def milliseconds_a_step(
    size: int, channels: int, batch_size: int, convolution: str, steps_per_call: int
) -> list[float]:
    """Wall time of a train step, one number a repetition."""
    model = models.create('constnet', depth=10, width=1, convolution=convolution)
    tx = optax.sgd(0.03, momentum=0.9)
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.normal(size=(batch_size, size, size, channels)).astype(np.float32),
        'label': rng.integers(0, 10, batch_size).astype(np.int32),
    }
    batch = jax.device_put(batch)
    state = step.create_state(model, tx, (size, size, channels), seed=0, perturbation_seed=0)
    train_steps = step.make_train_steps(
        step.train_step_function(model, tx),
        determinism='deterministic',
        steps_per_call=steps_per_call,
    )
    times = []
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        for _ in range(STEPS // steps_per_call):
            state, _ = train_steps(state, batch, np.int32(steps_per_call))
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / STEPS * 1e3)
    return times[1:]


def seconds_of_measurements(config_file: str, variant: str) -> tuple[float, list[float]]:
    """Wall time of the first measurement of all layers, compilation included, and of 5 more."""
    config = importlib.import_module(f'configs.{config_file}').get_config(*filter(None, [variant]))
    rng = np.random.default_rng(0)
    size, channels = (8, 1) if config_file == 'digits' else (32, 3)
    images = rng.integers(0, 256, (config.batch_size, size, size, channels)).astype(np.uint8)
    split = data.Split(images, rng.integers(0, 10, config.batch_size).astype(np.int32))
    dataset = data.Dataset(split, split, num_classes=10)
    config = checks.resolve(config, dataset)
    program = Program(config, dataset)
    state = program.initial_state(scalars_of(config))
    times = []
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        program.measure_layers(state)
        times.append(time.perf_counter() - began)
    return times[0], times[1:]


def run(argv: list[str]) -> None:
    """The command, which has no flags."""
    cli.parse(argv, cli.text_flags())
    checks.check_devices()
    device = jax.devices()[0]
    say(f'jax {jax.__version__}, {device.device_kind}, {platform.machine()}')
    say('| images | batch | convolution | steps_per_call | ms a step |')
    say('| --- | --- | --- | --- | --- |')
    for size, channels, batch_size in ((8, 1, 128), (32, 3, 64)):
        for convolution in convolutions.CONVOLUTIONS:
            for steps_per_call in (1, 11):
                times = milliseconds_a_step(size, channels, batch_size, convolution, steps_per_call)
                say(
                    f'| {size}x{size}x{channels} | {batch_size} | {convolution} | {steps_per_call} '
                    f'| {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) |',
                )
    say('\n| measurements | first, s | each further, s |')
    say('| --- | --- | --- |')
    for file, variant in (('digits', ''), ('cifar', 'trial')):
        first, times = seconds_of_measurements(file, variant)
        say(
            f'| configs/{file}.py{variant and ":"}{variant} | {first:.1f} '
            f'| {statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f}) |',
        )


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (with the program's name); returns the exit status."""
    return run_command(run, argv, __doc__, exit_on_signals)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
