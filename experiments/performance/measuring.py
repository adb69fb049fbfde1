"""What the measurements of time share: calls that take turns, what comes of them, what is timed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zerojax.measure.compiled import count_operations
from zerojax.run.building import scalars_of
from zerojax.run.checks import resolve
from zerojax.run.data import Dataset
from zerojax.run.program import Program

SECONDS = 1.0  # that a repetition takes at least

MedianAndRange = dict[str, float]  # 'median', 'least' and 'most' of several measurements


def median_and_range(values: Sequence[float]) -> MedianAndRange:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values)}


def rates(amount: float, seconds: MedianAndRange) -> MedianAndRange:
    """Amount a second."""
    return {
        'median': amount / seconds['median'],
        'least': amount / seconds['most'],
        'most': amount / seconds['least'],
    }


def repeat(call: Callable[[], Any]) -> Callable[[int], None]:
    """A function that makes n calls, each of which waits for its result."""

    def calls(n: int) -> None:
        for _ in range(n):
            call()

    return calls


def time_in_turns(
    calls: Mapping[str, Callable[[int], None]], repetitions: int, seconds: float
) -> dict[str, MedianAndRange]:
    """Seconds of one call of each, which take turns, so that a slow moment of the machine hits all.

    `calls` are functions that make n calls and wait for the last. All make as many in a repetition,
    so that the fastest takes about `seconds` at least.
    """
    number = 1
    for call in calls.values():
        call(1)  # to warm up
        began = time.perf_counter()
        call(1)
        number = max(number, round(seconds / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            began = time.perf_counter()
            call(number)
            times[name].append((time.perf_counter() - began) / number)
    return {name: median_and_range(each) for name, each in times.items()}


def time_alone(call: Callable[[int], None], repetitions: int, seconds: float) -> MedianAndRange:
    """`time_in_turns` of one."""
    return time_in_turns({'': call}, repetitions, seconds)['']


def shown(found: MedianAndRange) -> str:
    """'median (least to most)'."""
    return f'{found["median"]:.4g} ({found["least"]:.4g} to {found["most"]:.4g})'


@dataclasses.dataclass(frozen=True)
class Row:
    """ConstNet-`depth`-`width` on images of `size` x `size` x `channels`."""

    depth: int
    width: int
    size: int
    channels: int
    batch_size: int
    precision: str  # 'float32', 'tf32' (products alone) or 'bfloat16' (mixed precision)

    @property
    def name(self) -> str:
        short = {'float32': 'f32', 'tf32': 'tf32', 'bfloat16': 'bf16'}[self.precision]
        kind = 'digits' if self.size == 8 else 'cifar'
        return f'{kind}-{self.depth}-{self.width}-{self.batch_size}-{short}'


class Stepper:
    """Train steps of a config that go on and on; of several runs, as one batched program."""

    def __init__(self, config: ConfigDict, dataset: Dataset, runs: int | None = None) -> None:
        config = resolve(config, dataset)
        self.program = Program(config, dataset, runs)
        scalars = self.program.place_scalars([scalars_of(config)] * (runs or 1))
        self.state = self.program.initial_state(scalars)
        self.source = self.program.source(self.state, scalars, epoch=0)
        self.count = np.int32(config.steps_per_call)
        self.executable = self.program.compile_train_steps(self.state, self.source)

    def flops(self) -> float:
        """Operations of one step of a run that is alone, see `count_operations`."""
        return count_operations(self.program.one_step, self.state, self.source)

    def __call__(self, calls: int) -> None:
        """Makes so many calls, each one of `count` train steps, and waits for the last."""
        metrics: Any = None
        for _ in range(calls):
            jax.block_until_ready(metrics)  # of the call before, as `zerojax.run.train` does
            self.state, metrics = self.executable(self.state, self.source, self.count)
        jax.block_until_ready(self.state)
