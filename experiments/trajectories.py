"""Many short runs that differ in their perturbation: loss and asymmetry at every step.

They are runs of `zerojax.sweep` that log each step and evaluate at the end alone, each in a folder
named by its perturbation and seed. What is predicted from an unperturbed run is no run of its own:
it is kept in JSON files beside, named by a hash of all that decides them, so that an experiment
that is stopped goes on where it was.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import runs
from zerojax import config as config_lib
from zerojax.host import records
from zerojax.host.errors import UsageError
from zerojax.measure.prediction import Curves
from zerojax.measure.stability import ONSET
from zerojax.perturb import NONE, Perturbation
from zerojax.run.building import Source, keeps_last, scalars_of
from zerojax.run.checks import resolve
from zerojax.run.prediction import Predictor
from zerojax.run.program import Programs
from zerojax.step import TrainState
from zerojax.step.precision import numbers_of
from zerojax.sweep import Job, folder_name, sweep

FEATURES = 8  # of a stream of the reduced networks
METHODS = ('linear', 'reduced')  # of prediction

Arm = TypeVar('Arm')


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One run.

    Attributes:
        loss: of the training batch of each step, [num_steps], in nats.
        asymmetry: the largest of any layer after each step, [num_steps].
        by_stream: the same of each stream.
        accuracy: on the held-out set after the last step.
        broken_at_step: as in summary.json; None if it never was.
    """

    loss: np.ndarray
    asymmetry: np.ndarray
    by_stream: dict[str, np.ndarray]
    accuracy: float
    broken_at_step: int | None

    def onset(self) -> int | None:
        """Number of updates after which the asymmetry first is `ONSET`; None if it never is."""
        return first_at_least(self.asymmetry, ONSET)


def first_at_least(asymmetry: np.ndarray, threshold: float) -> int | None:
    """Number of updates after which an asymmetry [num_steps] first reaches the threshold."""
    reached = np.flatnonzero(asymmetry >= threshold)
    return int(reached[0]) + 1 if len(reached) else None


def listed_steps(steps: Sequence[int | None]) -> str:
    """For a table: of each seed the step at which something happened, 'never' for None."""
    return ', '.join('never' if each is None else str(each) for each in steps)


def read_trajectory(workdir: pathlib.Path) -> Trajectory:
    """That of a finished run that logged each step."""
    summary = records.read_json(workdir / 'summary.json')
    lines = records.read_metrics(workdir / 'metrics.jsonl')
    lines = [line for line in lines if line['kind'] == 'train']
    return Trajectory(
        np.array([line['loss'] for line in lines]),
        np.array([line['asymmetry'] for line in lines]),
        {
            name: np.array([line['asymmetry_by_stream'][name] for line in lines])
            for name in lines[0]['asymmetry_by_stream']
        },
        summary['eval_accuracy'],
        summary['broken_at_step'],
    )


class Laboratory:
    """Runs of one config, whatever its perturbation and seed; each has a folder in `folder`."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path) -> None:
        config_lib.check(config)
        if keeps_last(config):
            raise UsageError("dataset.last_batch='keep': predictions need batches of one size")
        self.folder = folder
        self.programs = Programs()
        dataset = self.programs.dataset(config)
        num_steps = resolve(config, dataset).num_steps
        config = runs.changed(
            config,
            log_every_steps=1,
            eval_every_steps=num_steps,
            checkpoint_every_steps=num_steps,
            **{f'perturbation.{name}': value for name, value in vars(NONE).items()},
        )
        self.config = resolve(config, dataset)
        with numbers_of(config.param_dtype):
            self.program = self.programs.program(self.config, dataset, None)
        self.dataset = dataset
        self.model = self.program.model
        self.make_batch = self.program.make_batch
        self.axes = self.program.feature_axes
        self.orbits = self.program.orbits

    def run(self, perturbation: Perturbation = NONE, seed: int = 0) -> Trajectory:
        """The run of a perturbation and seed, which decides everything random in it."""
        (trajectory,) = self.run_all([(perturbation, seed)])
        return trajectory

    def run_all(self, wanted: Sequence[tuple[Perturbation, int]]) -> list[Trajectory]:
        """The runs of perturbations and seeds, in this order; one sweep."""
        sweep([self._job(*each) for each in dict.fromkeys(wanted)], programs=self.programs)
        return [read_trajectory(self._job(*each)[1]) for each in wanted]

    def run_arms(self, arms: dict[Arm, Perturbation], seeds: int) -> dict[Arm, list[Trajectory]]:
        """The runs of each arm, those of the seeds 0 to `seeds` - 1; one sweep."""
        found = iter(self.run_all([(p, seed) for p in arms.values() for seed in range(seeds)]))
        return {arm: [next(found) for _ in range(seeds)] for arm in arms}

    def _job(self, perturbation: Perturbation, seed: int) -> Job:
        fields = vars(perturbation)
        named = {name: x for name, x in fields.items() if x != getattr(NONE, name)} | {'seed': seed}
        config = runs.changed(
            self.config,
            seed=seed,
            **{f'perturbation.{name}': value for name, value in fields.items()},
            **{'perturbation.seed': seed},
        )
        return config, self.folder / folder_name(named)

    def remember(self, compute: Callable[[], records.Record], **what: Any) -> records.Record:
        """What `compute` returns, computed only once for this config and these fields."""
        fields = {'config': config_lib.as_json(self.config), **what}
        name = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]
        file = self.folder / f'{name}.json'
        if not file.exists():
            with numbers_of(self.config.param_dtype):
                result = compute()
            self.folder.mkdir(parents=True, exist_ok=True)
            records.write_json(file, fields | result)
        return records.read_json(file, list(fields))

    def predict(
        self, seed: int, scales: Sequence[float], features: int = FEATURES
    ) -> dict[str, list[Curves]]:
        """For Gaussian noise of a seed, what small networks say of the run with each scale.

        Args:
            seed: of the run and its noise.
            scales: of the noise.
            features: of a stream of the reduced network, above `prediction.ALONE`.

        Returns:
            'linear' and 'reduced' (see `Predictor`): for each scale the natural logarithm of each
            stream's asymmetry, [num_steps + 1]; NaN where it is not finite.
        """

        def compute() -> records.Record:
            noise = {'perturbation.kind': 'gaussian', 'perturbation.seed': seed}
            config = runs.changed(self.config, seed=seed, **noise)
            predictor = Predictor(config, self.dataset, self.config.num_steps, features)
            own = predictor.noise(seed)
            curves = {
                'linear': [predictor.linear(scale) for scale in scales],
                'reduced': [predictor.reduced(own, scale) for scale in scales],
            }
            return jax.tree.map(
                lambda log: [x if math.isfinite(x) else None for x in log.tolist()], curves
            )

        fields = {'predict': 'streams', 'features': features, 'scales': list(scales)}
        found = self.remember(compute, seed=seed, **fields)
        return {
            method: [
                {name: np.array(log, np.float64) for name, log in each.items()}
                for each in found[method]
            ]
            for method in METHODS
        }

    def initial_state(self, seed: int) -> TrainState:
        """The unperturbed state before the first step; the seed decides the noise to come too."""
        seeds = {'seed': np.int32(seed), 'perturbation.seed': np.int32(seed)}
        with numbers_of(self.config.param_dtype):
            return self.program.initial_state(scalars_of(self.config) | seeds)

    def sources(self, state: TrainState) -> Iterator[Source]:
        """What each step reads."""
        scalars = scalars_of(self.config)
        for step in range(self.config.num_steps):
            epoch, position = divmod(step, len(self.dataset.train.labels) // self.config.batch_size)
            if position == 0:
                source = self.program.source(state, scalars, epoch)
            yield source
