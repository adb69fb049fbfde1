"""The onset of a run, predicted from its config by the small networks that stand for its own."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import perturb, symmetry
from zerojax.host.errors import UsageError
from zerojax.measure import prediction, stability
from zerojax.run import checks
from zerojax.run.building import Source, build_optimizer, keeps_last, scalars_of
from zerojax.run.data import Dataset
from zerojax.run.program import Program
from zerojax.run.reduction import Reduction
from zerojax.step import jit_in_mode
from zerojax.step.precision import numbers_of
from zerojax.symmetry import alignment, quotient
from zerojax.symmetry.orbits import feature_counts

Tree = Any
ONSET = 0.1  # asymmetry from which on features are as good as different; see docs/findings.md
Curves = dict[str, np.ndarray]  # of each stream: natural logarithm of its asymmetry, [N + 1]


class Predictor:
    """The small networks of one run, each compiled once.

    Args:
        config: of the run; its seeds decide initial weights and batches. Noise as its perturbation
            has it, of any scale and seed.
        dataset: the config's data.
        steps: how many steps are predicted, at most; no more than the run has.
        features: number of features of each stream of the reduced network, above
            `measure.prediction.ALONE`.

    Attributes:
        config: resolved, without the run's own determinism mode and mesh.
        steps: that are predicted.
        features: {stream: number of features} of the run's network.

    Raises:
        UsageError: the run cannot be predicted.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, steps: int, features: int) -> None:
        check_predictable(config)
        config = checks.resolve(config, dataset)
        config.determinism.mode = 'deterministic'
        config.mesh.data = config.steps_per_call = 1
        checks.check_backend(config.determinism.mode)
        self.config = config
        self.steps = min(steps, config.num_steps)
        with numbers_of(config.param_dtype):
            self._program = Program(config, dataset)
            self._state = self._program.initial_state(scalars_of(config))
            params, self._axes = self._state.params, self._program.feature_axes
            checks.check_layers(config, params, self._axes)
            check_symmetric(self._program, params)
            self.features = feature_counts(params, self._axes)
            self._number = features
            any_order = {name: np.zeros(count) for name, count in self.features.items()}
            _, self._shares = prediction.arranged(any_order, features)
            self._reduced = Reduction(self._program, self._shares)
            self._start = self._reduced.state(
                quotient.reduce(params, self._axes, self._shares), config.seed
            )
            self._follower = prediction.Follower(self._reduced.step, self._axes)
            self._batches = self._sources(self._program)
            halves = quotient.shares(self.features, 2)
            self._pair = Reduction(self._pair_program(), halves)
            self._pair_start = self._pair.state(
                quotient.reduce(params, self._axes, halves), config.seed
            )

    def _pair_program(self) -> Program:
        """In float32 at least: what is linear has no rounding of its own that matters."""
        config = ConfigDict(self.config.to_dict())
        config.model.dtype = None
        if config.param_dtype == 'bfloat16':
            config.param_dtype = 'float32'
        return Program(config, self._program.dataset)

    @functools.cached_property
    def _sensitivities(self) -> dict[str, Tree]:
        with numbers_of(self.config.param_dtype):
            batches = self._batches[: prediction.HORIZON]
            return prediction.sensitivities(self._pair.step, self._pair_start, batches, self._axes)

    def _sources(self, program: Program) -> list[Source]:
        """What each step reads."""
        scalars = scalars_of(program.config)
        found: list[Source] = []
        for step in range(self.steps):
            if step % program.steps_per_epoch == 0:
                source = program.source(self._state, scalars, step // program.steps_per_epoch)
            found.append(source)
        return found

    def noise(self, seed: int) -> Tree:
        """Per unit of scale, what a run with this seed of the perturbation adds to its weights.

        In NumPy arrays, with the features of each stream in the order of `prediction.arranged`.
        """
        with numbers_of(self.config.param_dtype):
            seeds = {'perturbation.seed': np.int32(seed)}
            state = self._program.initial_state(scalars_of(self.config) | seeds)
            key = state.keys['perturbation']
            noise = jax.device_get(self._draw(state.params, key))
        at = prediction.coordinates(noise, self._axes, self._sensitivities)
        order, _ = prediction.arranged(at, self._number)
        return alignment.permute(noise, self._axes, order)

    @functools.cached_property
    def _draw(self) -> Callable[[Tree, jax.Array], Tree]:
        """Jitted (weights, key of the perturbation) -> what is added to them per unit of scale."""
        perturbation = config_lib.build_perturbation(self.config, 1.0)
        frozen = self.config.optimizer.freeze

        def draw(params: Tree, key: jax.Array) -> Tree:
            perturbed = perturb.perturb_weights(
                perturbation, params, key, jnp.int32(0), self._axes, frozen=frozen
            )
            return jax.tree.map(jnp.subtract, perturbed, params)

        return jit_in_mode(draw, 'deterministic')

    @functools.cached_property
    def _own_noise(self) -> Tree:
        return self.noise(self.config.perturbation.seed)

    @functools.cached_property
    def _growth(self) -> tuple[list[str], stability.Growth]:
        """The streams that the run's own noise breaks, and the growth of a tangent for each."""
        tangents = prediction.two_features(self._own_noise, self._axes)
        streams = symmetry.stream_names(self._axes)
        broken = [
            i for i in range(len(streams)) if any(x[i].any() for x in jax.tree.leaves(tangents))
        ]
        if not broken:
            raise UsageError(
                f'perturbation.layers={self.config.perturbation.layers!r}: noise on these breaks '
                'no symmetry; choose others'
            )
        with numbers_of(self.config.param_dtype):
            tangents = jax.tree.map(
                lambda x, w: jnp.asarray(x[broken], w.dtype), tangents, self._pair_start[0]
            )
            growth = stability.growth(
                self._pair.step, self._pair_start, self._batches, tangents, self._axes
            )
        return [streams[i] for i in broken], growth

    @functools.cached_property
    def _persistence(self) -> dict[str, np.ndarray]:
        with numbers_of(self.config.param_dtype):
            tx = build_optimizer(self.config, scalars_of(self.config))
            return prediction.persistence(tx, self._pair_start[0], self.steps)

    def active(self) -> Curves:
        """By the linear law of small asymmetry, of the run's own noise, per unit of scale.

        -inf of streams that the noise does not break.

        Raises:
            UsageError: it breaks none.
            ValueError: the symmetric run itself is not finite.
        """
        broken, growth = self._growth
        unbroken = np.full(self.steps + 1, -np.inf)
        return {
            name: growth.log_by_stream[name][:, broken.index(name)] if name in broken else unbroken
            for name in self.features
        }

    def passive(self, noise: Tree) -> Curves:
        """Of what the noise has beside its active part, per unit of scale; -inf where it is 0."""
        curves = {}
        for name, sizes in prediction.passive_deviations(noise, self._axes).items():
            left = [size * self._persistence[path] for path, size in sizes.items()]
            with np.errstate(divide='ignore'):
                curves[name] = np.log(np.max([np.zeros(self.steps + 1), *left], axis=0))
            curves[name] = curves[name] - self._growth[1].log_largest[name]
        return curves

    def linear(self, scale: float) -> Curves:
        """The linear prediction, of the run's own noise: the larger of active and passive part."""
        return _larger(self.active(), self.passive(self._own_noise), scale, scale)

    def reduced(
        self, noise: Tree, scale: float, advance: Callable[[int], object] = lambda _: None
    ) -> Curves:
        """The reduced prediction: the larger of the reduced network's and the passive part.

        NaN once a weight is not finite. `advance` is called with the number of steps that were
        done, after each.
        """
        share_noise = quotient.average(noise, self._axes, self._shares)
        with numbers_of(self.config.param_dtype):
            params, rest = self._start
            params = jax.tree.map(
                lambda w, x: (np.asarray(w) + np.float32(scale) * x).astype(w.dtype),
                params,
                share_noise,
            )
            found = []
            for measured in self._follower.follow((params, rest), self._batches):
                found.append(measured)
                advance(1)
            found = jax.device_get(found)
        with np.errstate(divide='ignore'):
            followed = {
                name: np.log([float(each[name]) for each in found]) for name in self.features
            }
        return _larger(followed, self.passive(noise), 1.0, scale)

    def seconds_per_step(self) -> float:
        """What a step of the reduced network takes here, once it is compiled."""
        with numbers_of(self.config.param_dtype):
            for _ in range(2):
                began = time.monotonic()
                jax.block_until_ready(list(self._follower.follow(self._start, self._batches[:1])))
        return time.monotonic() - began

    def operations(self) -> dict[str, float]:
        """Of a step, as XLA counts them: {'full': of the run's network, 'reduced'}."""
        with numbers_of(self.config.param_dtype):
            full = jit_in_mode(self._program.one_step, 'deterministic')
            reduced = jit_in_mode(self._reduced.step, 'deterministic')
            lowered = {
                'full': full.lower(self._state, self._batches[0]),
                'reduced': reduced.lower(self._start, self._batches[0]),
            }
            return {name: each.cost_analysis()['flops'] for name, each in lowered.items()}


def _larger(curves: Curves, others: Curves, scale: float, scale_of_others: float) -> Curves:
    """Of curves that are per unit of these scales."""
    return {
        name: np.maximum(curve + np.log(scale), others[name] + np.log(scale_of_others))
        for name, curve in curves.items()
    }


def largest(curves: Curves) -> np.ndarray:
    """Of all streams, [N + 1]; NaN where one of them is."""
    return np.max(list(curves.values()), axis=0)


def onset(curve: np.ndarray) -> int | None:
    """The number of updates after which an asymmetry first is `ONSET`; None if it never is.

    `curve` is its natural logarithm, [N + 1].
    """
    reached = np.flatnonzero(curve >= np.log(ONSET))
    return int(reached[0]) if len(reached) else None


def check_predictable(config: ConfigDict) -> None:
    """Raises UsageError for a run that small networks cannot stand for."""
    p = config.perturbation
    if p.kind != 'gaussian':
        raise UsageError(
            f'perturbation.kind={p.kind!r}: only noise on the initial weights is predicted; '
            "must be 'gaussian'"
        )
    if p.at_step > 0 or p.every:
        name = 'at_step' if p.at_step > 0 else 'every'
        raise UsageError(
            f'perturbation.{name}={p[name]}: only noise on the initial weights is predicted, added '
            'once; must be 0'
        )
    if config.model.dropout > 0:
        raise UsageError(
            f'model.dropout={config.model.dropout}: breaks every symmetry by itself, so there is '
            'nothing to predict; must be 0'
        )
    if config.symmetry.project:
        raise UsageError('symmetry.project=True: no asymmetry outlives a step; must be False')
    if config.pruning.source:
        raise UsageError(
            f'pruning.source={config.pruning.source!r}: what is pruned makes features unequal; '
            "must be ''"
        )
    if keeps_last(config):
        raise UsageError(
            "dataset.last_batch='keep': predictions need batches of one size; must be 'drop'"
        )


def check_symmetric(program: Program, params: Tree) -> None:
    """Raises UsageError if a run does not start with all features of each stream equal."""
    symmetric = jit_in_mode(
        lambda params: symmetry.is_symmetric(params, program.feature_axes), 'deterministic'
    )
    if program.orbits is not None or not symmetric(params):
        raise UsageError(
            f'model.init={program.config.model.init!r}: some features of a stream start different '
            "from others, and nothing can be predicted; must be 'averaging', or letters of "
            'leakynet that are all 1'
        )
