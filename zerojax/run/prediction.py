"""The onset of a run, predicted from its config by the small networks that stand for its own."""

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zerojax import config as config_lib
from zerojax import perturb, symmetry
from zerojax.host.errors import UsageError
from zerojax.measure import prediction, stability
from zerojax.measure.compiled import count_operations
from zerojax.measure.prediction import Curves
from zerojax.run import checks
from zerojax.run.building import Source, build_optimizer, keeps_last, scalars_of
from zerojax.run.data import Dataset
from zerojax.run.program import Program
from zerojax.run.reduction import Reduction
from zerojax.step import jit_in_mode, jit_without_products
from zerojax.step.precision import numbers_of
from zerojax.symmetry import alignment, quotient
from zerojax.symmetry.orbits import feature_counts

Tree = Any


@dataclasses.dataclass(frozen=True)
class Noise:
    """What a run adds to its initial weights, per unit of scale.

    Attributes:
        weights: in NumPy arrays, with the features of each stream in the order of
            `prediction.arranged`.
        furthest: of each stream, see `prediction.furthest`.
    """

    weights: Tree
    furthest: dict[str, float]


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
        config: resolved, but in deterministic mode, on one device, a step a call.
        steps: that are predicted.
        stream_sizes: {stream: number of features} of the run's network.

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
            self.stream_sizes = feature_counts(params, self._axes)
            checks.check_layers(config, params, self._axes)
            checks.check_initial_weights(config, params, self._axes, self._program.orbits)
            check_symmetric(self._program, params)
            self._broken = self._find_broken()
            self._features = features
            on_host = jax.device_get(params)  # there, or each shape would be compiled
            any_order = {name: np.zeros(count) for name, count in self.stream_sizes.items()}
            _, shares = prediction.arranged(any_order, features)
            # One share of a stream that stays symmetric: several would not, to rounding.
            self._shares = symmetry.Orbits(
                {
                    name: first if name in self._broken else np.zeros_like(first)
                    for name, first in shares.first.items()
                },
                entries={},
            )
            self._reduced = Reduction(self._program, self._shares)
            self._start = self._reduced.state(
                quotient.reduce(on_host, self._axes, self._shares), config.seed
            )
            self._follower = prediction.Follower(self._reduced.step, self._axes, self._shares)
            self._batches = self._sources()
            halves = quotient.shares(self.stream_sizes, 2)
            self._pair = Reduction(self._pair_program(), halves)
            self._pair_start = self._pair.state(
                quotient.reduce(on_host, self._axes, halves), config.seed
            )

    def _find_broken(self) -> list[str]:
        """The streams whose symmetry the noise breaks.

        Raises:
            UsageError: there is none.
        """
        p = self.config.perturbation
        unique = symmetry.unique_features_by_stream(self._draw_noise(p.seed), self._axes)
        broken = [name for name, count in unique.items() if count > 1]
        if not broken:
            raise UsageError(
                f'perturbation.layers={p.layers!r}: noise on these breaks no symmetry, as they '
                'have no features that could differ; choose others'
            )
        return broken

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

    def _sources(self) -> list[Source]:
        """What each step reads."""
        program, scalars = self._program, scalars_of(self.config)
        found: list[Source] = []
        for step in range(self.steps):
            if step % program.steps_per_epoch == 0:
                source = program.source(self._state, scalars, step // program.steps_per_epoch)
            found.append(source)
        return found

    def noise(self, seed: int) -> Noise:
        """What a run with this seed of the perturbation adds to its weights."""
        noise = self._draw_noise(seed)
        at = prediction.coordinates(noise, self._axes, self._sensitivities)
        order, _ = prediction.arranged(at, self._features)
        in_order = {name: of_stream[order[name]] for name, of_stream in at.items()}
        return Noise(
            alignment.permute(noise, self._axes, order),
            prediction.furthest(in_order, self._shares),
        )

    def _draw_noise(self, seed: int) -> Tree:
        with numbers_of(self.config.param_dtype):
            seeds = {'perturbation.seed': np.int32(seed)}
            state = self._program.initial_state(scalars_of(self.config) | seeds)
            return jax.device_get(self._draw(state.params, state.keys['perturbation']))

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

        return jit_without_products(draw)

    @functools.cached_property
    def _own_noise(self) -> Noise:
        return self.noise(self.config.perturbation.seed)

    @functools.cached_property
    def _growth(self) -> stability.Growth:
        """Of a tangent for each broken stream."""
        linearised = stability.LinearisedStep(self._pair.step, self._axes)
        any_tangents = self._tangents(self._draw_noise(self.config.perturbation.seed))
        with numbers_of(self.config.param_dtype), futures.ThreadPoolExecutor(1) as pool:
            lowered = linearised.lower(self._pair_start, self._batches[0], any_tangents)
            # Takes longest of all; beside it, what compiles and computes the covectors.
            compiling = pool.submit(lambda: [each.compile() for each in lowered])
            tangents = self._tangents(self._own_noise.weights)
            compiling.result()
            return linearised.growth(self._pair_start, self._batches, tangents)

    def _tangents(self, noise: Tree) -> Tree:
        tangents = prediction.two_features(noise, self._axes)
        broken = [symmetry.stream_names(self._axes).index(name) for name in self._broken]
        with numbers_of(self.config.param_dtype):
            return jax.tree.map(
                lambda x, w: jnp.asarray(x[broken], w.dtype), tangents, self._pair_start[0]
            )

    @functools.cached_property
    def _persistence(self) -> dict[str, np.ndarray]:
        with numbers_of(self.config.param_dtype):
            tx = build_optimizer(self.config, scalars_of(self.config))
            return prediction.persistence(tx, self._pair_start[0], self.steps)

    def active(self) -> Curves:
        """By the linear law of small asymmetry, of the run's own noise, per unit of scale.

        -inf of streams that the noise does not break.

        Raises:
            ValueError: the symmetric run itself is not finite.
        """
        growth, unbroken = self._growth.log_by_stream, np.full(self.steps + 1, -np.inf)
        return {
            name: growth[name][:, self._broken.index(name)] if name in self._broken else unbroken
            for name in self.stream_sizes
        }

    def passive(self, noise: Noise) -> Curves:
        """Of what the noise has beside its active part, per unit of scale; -inf where it is 0."""
        curves = {}
        for name, sizes in prediction.passive_deviations(noise.weights, self._axes).items():
            left = [size * self._persistence[path] for path, size in sizes.items()]
            with np.errstate(divide='ignore'):
                curves[name] = np.log(np.max([np.zeros(self.steps + 1), *left], axis=0))
            curves[name] = curves[name] - self._growth.log_largest[name]
        return curves

    def linear(self, scale: float) -> Curves:
        """The linear prediction, of the run's own noise: the larger of active and passive part."""
        own = {name: curve + np.log(scale) for name, curve in self.active().items()}
        return _larger(own, self.passive(self._own_noise), scale)

    def reduced(
        self, noise: Noise, scale: float, advance: Callable[[int], object] = lambda _: None
    ) -> Curves:
        """The reduced prediction: the larger of the reduced network's and the passive part.

        NaN once a weight is not finite. `advance` is called with the number of steps that were
        done, after each.
        """
        noise_of_shares = quotient.average(noise.weights, self._axes, self._shares)
        with numbers_of(self.config.param_dtype):
            params, rest = self._start
            params = jax.tree.map(
                lambda w, x: (np.asarray(w, np.float64) + scale * x).astype(w.dtype),
                params,
                noise_of_shares,
            )
            found = []
            followed = self._follower.follow((params, rest), self._batches, noise.furthest)
            for measured in followed:
                found.append(measured)
                advance(1)
            found = jax.device_get(found)
        with np.errstate(divide='ignore'):
            curves = {
                name: np.log([float(each[name]) for each in found]) for name in self.stream_sizes
            }
        return _larger(curves, self.passive(noise), scale)

    def seconds_per_step(self) -> float:
        """What a step of the reduced network takes here, once it is compiled."""
        with numbers_of(self.config.param_dtype):
            for _ in range(2):
                began = time.monotonic()
                followed = self._follower.follow(
                    self._start, self._batches[:1], self._own_noise.furthest
                )
                jax.block_until_ready(list(followed))
        return time.monotonic() - began

    def operations(self) -> dict[str, float]:
        """Of a step, as `count_operations`: {'full': of the run's network, 'reduced'}.

        Raises:
            UsageError: JAX has no CPU to count them for.
        """
        batch = self._batches[0]
        with numbers_of(self.config.param_dtype):
            try:
                return {
                    'full': count_operations(self._program.one_step, self._state, batch),
                    'reduced': count_operations(self._reduced.step, self._start, batch),
                }
            except ValueError as error:
                raise UsageError(str(error)) from error


def _larger(curves: Curves, passive: Curves, scale: float) -> Curves:
    """The larger of each curve and its passive part, which is per unit of scale."""
    return {
        name: np.maximum(curve, passive[name] + np.log(scale)) for name, curve in curves.items()
    }


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
