"""Many short runs that differ in their perturbation: loss and asymmetry at every step.

`zerojax.train` would compile, evaluate and save anew for each of them. Here all runs of one config
and one kind of perturbation share a compiled step, in which the scale is an argument. Every
finished run is a JSON file named by a hash of all that decides it, so an experiment that is stopped
goes on where it was, and a run of another config is never taken for it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.runs import dataset_of
from zerojax import config as config_lib
from zerojax import determinism, records, symmetry
from zerojax.perturb import NONE, WEIGHT_KINDS, Perturbation, perturb_weights
from zerojax.precision import numbers_of
from zerojax.prepare import resolve
from zerojax.program import Program, Source, build_optimizer, scalars_of
from zerojax.step import TrainState, train_step_function

ONSET = 0.1  # asymmetry from which on features are as good as different; see docs/findings.md


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One run.

    Attributes:
        loss: of the training batch of each step, [num_steps], in nats.
        asymmetry: the largest of any layer after each step, [num_steps].
        accuracy: on the held-out set after the last step.
        broken_at_step: as in summary.json; None if it never was.
    """

    loss: np.ndarray
    asymmetry: np.ndarray
    accuracy: float
    broken_at_step: int | None

    def onset(self) -> int | None:
        """Number of updates after which the asymmetry first is `ONSET`; None if it never is."""
        return first_at_least(self.asymmetry, ONSET)


def first_at_least(asymmetry: np.ndarray, threshold: float) -> int | None:
    """Number of updates after which an asymmetry [num_steps] first reaches the threshold."""
    reached = np.flatnonzero(asymmetry >= threshold)
    return int(reached[0]) + 1 if len(reached) else None


def perturb_state(perturbation: Perturbation, feature_axes: Any, state: TrainState) -> TrainState:
    """The state with its weights perturbed as before the gradient of its step is taken."""
    key = state.keys['perturbation']
    params = perturb_weights(perturbation, state.params, key, state.step, feature_axes)
    return dataclasses.replace(state, params=params)


class Laboratory:
    """Runs of one config, whatever its perturbation; their results are kept in `folder`."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path) -> None:
        config_lib.check(config)
        self.dataset = dataset_of(config)
        self.config = resolve(config, self.dataset)
        self.folder = folder
        self.program = Program(self.config, self.dataset)
        self.model = self.program.model
        self.make_batch = self.program.make_batch
        self.axes = self.program.feature_axes
        self.orbits = self.program.orbits
        self.jit = functools.partial(determinism.jit_in_mode, mode=self.config.determinism.mode)
        self._executables: dict[Perturbation, Any] = {}

    def run(self, perturbation: Perturbation = NONE, seed: int = 0) -> Trajectory:
        """The run of a perturbation and seed, which decides everything random in it."""
        result = self.remember(
            lambda: self._simulate(perturbation, seed), seed=seed, perturbation=vars(perturbation)
        )
        return Trajectory(
            np.array(result['loss'], float),  # null becomes NaN
            np.array(result['asymmetry'], float),
            result['accuracy'],
            result['broken_at_step'],
        )

    def remember(self, compute: Callable[[], records.Record], **what: Any) -> records.Record:
        """What `compute` returns, computed only once for this config and these fields."""
        fields = {'config': json.loads(json.dumps(self.config.to_dict())), **what}
        name = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:20]
        file = self.folder / f'{name}.json'
        if not file.exists():
            with numbers_of(self.config.param_dtype):
                result = compute()
            self.folder.mkdir(parents=True, exist_ok=True)
            records.write_json(file, fields | result)
        return json.loads(file.read_text())

    def initial_state(self, seed: int) -> TrainState:
        """The unperturbed state before the first step; the seed decides the noise to come too."""
        seeds = {'seed': np.int32(seed), 'perturbation.seed': np.int32(seed)}
        return self.program.initial_state(scalars_of(self.config) | seeds)

    def sources(self, state: TrainState) -> Iterator[Source]:
        """What each step reads."""
        scalars = scalars_of(self.config)
        for step in range(self.config.num_steps):
            epoch, position = divmod(step, len(self.dataset.train.labels) // self.config.batch_size)
            if position == 0:
                order = self.program.epoch_order(state.keys['order'], epoch)
            yield Source(self.program.examples, order, scalars)

    def _simulate(self, perturbation: Perturbation, seed: int) -> records.Record:
        p, once = perturbation, None
        if p.kind in WEIGHT_KINDS and not p.every:  # outside the step, which all of these share
            p, once = NONE, self.jit(functools.partial(perturb_state, perturbation, self.axes))
        step = self._executable(p)
        state = self.initial_state(seed)
        measured = []
        for number, source in enumerate(self.sources(state)):
            if once is not None and number == perturbation.at_step:
                state = once(state)
            state, values = step(state, source, float(p.scale))
            measured.append(values)
        measured = jax.device_get(measured)
        curves = {
            name: [float(each[name]) if np.isfinite(each[name]) else None for each in measured]
            for name in ('loss', 'asymmetry')
        }
        broken = int(state.broken_at_step)
        return {
            **curves,
            'accuracy': float(self.program.evaluate(state)['accuracy']),
            'broken_at_step': None if broken < 0 else broken,
        }

    def _executable(self, perturbation: Perturbation) -> Any:
        """Jitted (state, source, scale) -> (state, {'loss', 'asymmetry'}) for any scale."""
        kind = dataclasses.replace(perturbation, scale=0.0)
        if kind not in self._executables:

            def step(state: TrainState, source: Source, scale: jax.Array) -> Any:
                train_step = train_step_function(
                    self.model,
                    build_optimizer(self.config, source.scalars),
                    perturbation=dataclasses.replace(kind, scale=scale),
                    project=self.config.symmetry.project,
                    orbits=self.orbits,
                )
                state, metrics = train_step(state, self.make_batch(state, source))
                by_layer = symmetry.asymmetry(state.params, self.axes, self.orbits)
                largest = jnp.max(jnp.stack(list(by_layer.values())))
                return state, {'loss': metrics['loss'], 'asymmetry': largest}

            self._executables[kind] = self.jit(step)
        return self._executables[kind]
