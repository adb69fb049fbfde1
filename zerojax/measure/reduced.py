"""The reduced prediction of anyone's model: small networks that are the same with fewer features.

As `zerojax.predict` has it for a config, see `measure.prediction`; here the small networks come
from a function of the numbers of features, and are tried out before they are believed.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zerojax import symmetry
from zerojax.measure import optimizers, prediction
from zerojax.measure.prediction import Curves
from zerojax.measure.stability import State
from zerojax.step.determinism import jit_in_mode
from zerojax.symmetry import alignment, quotient
from zerojax.symmetry.trial import first_line

if TYPE_CHECKING:
    from zerojax.measure.own_model import Model

Tree = Any

# Relative, of outputs: in float64, and where a function computes in less whatever it is given.
TOLERANCES = {True: 1e-9, False: 1e-2}


class Reduction:
    """The network of a model with a feature for each orbit.

    Raises:
        ValueError: what `make` gives fails, or is not the same network; or as
            `optimizers.check_each_alone`.
    """

    def __init__(self, model: 'Model', orbits: symmetry.Orbits) -> None:
        self._model, self.orbits = model, orbits
        self._average = quotient.average_gradients(model.axes, orbits)
        self.params = quotient.reduce(jax.device_get(model.params), model.axes, orbits)
        # As they are in training, before x64 makes int64 of NumPy's integers.
        self._inputs = jax.tree.map(jnp.asarray, model.batches[0][0])
        self._check_same()
        optimizers.check_each_alone(model.tx, model.restored(self.params), self._expand)

    def step(self, state: State, batch: tuple[Tree, Tree]) -> State:
        """As `Model.step`; the gradient of each weight is that of one that it stands for."""
        model, (inputs, targets) = self._model, batch

        def loss(params: Tree) -> jax.Array:
            weights = quotient.counted(params, model.axes, self.orbits)
            return model.loss(model.call(self._apply, weights, inputs), targets)

        grads, _ = self._average.update(jax.grad(loss)(state[0]), optax.EmptyState())
        params = model.restored(state[0])
        updates, opt_state = model.tx.update(model.restored(grads), state[1], params)
        return model.nested(optax.apply_updates(params, updates)), opt_state

    def start(self, params: Tree) -> State:
        """The state before the first step."""
        params = jax.tree.map(jnp.asarray, params)
        return params, self._model.tx.init(self._model.restored(params))

    def _outputs(self, apply: Callable[..., Tree], weights: Tree) -> list[jax.Array]:
        inputs = jax.tree.map(_in_float64, self._inputs)
        call = jit_in_mode(
            lambda weights: self._model.call(apply, weights, inputs), 'deterministic'
        )
        return jax.tree.leaves(call(weights))

    def _check_same(self) -> None:
        """At random weights, in float64: outputs are those of the network whose features differ as
        its own do."""
        model, axes, counts = self._model, self._model.axes, self.orbits.counts()
        rng = np.random.default_rng(0)
        with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
            small = jax.tree.map(
                lambda x: rng.normal(size=x.shape) / np.sqrt(max(x.shape[:-1], default=1)),
                self.params,
            )
            large = quotient.expand(small, axes, self.orbits)
            weights = quotient.counted(small, axes, self.orbits)
            try:
                expected = self._outputs(model.apply, large)
            except Exception as error:
                raise ValueError(
                    f'apply: fails in float64 ({first_line(error)}), in which `make` is tried out; '
                    'it must compute in whatever dtype its weights and inputs have'
                ) from error
            try:
                assert model.make is not None
                self._apply = model.make(counts)
                found = self._outputs(self._apply, weights)
            except Exception as error:
                raise ValueError(
                    f'make: what it gives for {counts} fails ({first_line(error)})'
                ) from error
        if len(found) != len(expected) or not all(map(_same, found, expected)):
            raise ValueError(
                f'make: the network with features {counts} computes something else than the one it '
                'stands for; arrays must sum over all named axes but their last axis, and not over '
                'that (kernels are [in, out], a readout [in, 1]), and nothing else may sum over '
                'features, as LayerNorm does'
            )

    def _expand(self, params: Tree) -> Tree:
        """The large network's params in which these stand, both like the user's."""
        large = quotient.expand(self._model.nested(params), self._model.axes, self.orbits)
        return self._model.restored(large)


def _in_float64(x: Any) -> Any:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays are, but for rounding."""
    if a.shape != b.shape:
        return False
    exact, expected = np.asarray(a, np.float64), np.asarray(b, np.float64)
    largest = float(np.max(np.abs(expected), initial=0.0))
    difference = float(np.max(np.abs(exact - expected), initial=0.0))
    return difference <= TOLERANCES[b.dtype == np.float64] * largest


def networks(model: 'Model', features: int) -> tuple[Reduction, Reduction]:
    """Of two features a stream, and of some, in the sets of `prediction.arranged`.

    Raises:
        ValueError: as `Reduction`, or features are too few.
    """
    if features not in model.reductions:
        any_order = {name: np.zeros(count) for name, count in model.streams.items()}
        _, shares = prediction.arranged(any_order, features)
        halves = quotient.shares(model.streams, 2)
        model.reductions[features] = Reduction(model, halves), Reduction(model, shares)
    return model.reductions[features]


def follow(
    model: 'Model',
    scales: Sequence[float],
    steps: int,
    features: int,
    noises: Sequence[Tree],
    passive: Curves,
) -> dict[float, list[Curves]]:
    """{scale: for each draw of the noise the curves of a reduced network}; NaN once not finite.

    Args:
        model: with `make`.
        scales, steps: as in `own_model.predict`.
        features: number of features of each stream, above `prediction.ALONE`.
        noises: what is added to the weights per unit of scale, in NumPy arrays.
        passive: what the first of them has beside that, per unit of scale, see
            `measure.prediction`; that of the others stays as much larger or smaller as it starts.

    Raises:
        ValueError: as `networks`.
    """
    batches, axes = model.batches[:steps], model.axes
    pair, small = networks(model, features)
    covectors = prediction.sensitivities(
        pair.step, pair.start(pair.params), batches[: prediction.HORIZON], axes
    )
    shares = small.orbits
    follower = prediction.Follower(small.step, axes, shares)
    found: dict[float, list[Curves]] = {scale: [] for scale in scales}
    start_of_passive = _largest_passive(noises[0], axes)
    for noise in noises:
        relative = {
            name: math.log(size / start_of_passive[name]) if size else 0.0
            for name, size in _largest_passive(noise, axes).items()
        }
        at = prediction.coordinates(noise, axes, covectors)
        order, _ = prediction.arranged(at, features)
        furthest = prediction.furthest({name: x[order[name]] for name, x in at.items()}, shares)
        of_shares = quotient.average(alignment.permute(noise, axes, order), axes, shares)
        for scale in scales:
            start = small.start(jax.tree.map(_added(scale), small.params, of_shares))
            measured = jax.device_get(list(follower.follow(start, batches, furthest)))
            with np.errstate(divide='ignore'):
                found[scale].append(
                    {
                        name: np.maximum(
                            np.log([float(each[name]) for each in measured]),
                            passive[name] + relative[name] + math.log(scale),
                        )
                        for name in model.streams
                    }
                )
    return found


def _largest_passive(noise: Tree, axes: Tree) -> dict[str, float]:
    found = prediction.passive_deviations(noise, axes)
    return {name: max(of_arrays.values(), default=0.0) for name, of_arrays in found.items()}


def _added(scale: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda w, x: (np.asarray(w, np.float64) + scale * x).astype(w.dtype)
