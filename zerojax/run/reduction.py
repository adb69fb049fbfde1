"""The small networks that stand for the network of a run, trained as the run would be."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from zerojax import symmetry
from zerojax.measure.stability import State, Step, of_train_step, split
from zerojax.run.building import Source, build_optimizer, scalars_of
from zerojax.run.program import Program
from zerojax.step import TrainState, create_state, jit_without_products, train_step_function
from zerojax.symmetry import quotient

Tree = Any


class Reduction:
    """The network of a program with a feature for each orbit.

    Args:
        program: of the run; its perturbation is left out.
        orbits: of the features, sets of them as `quotient.shares` makes them.

    Attributes:
        model: the small network, to be applied to reduced variables.
        step: the train step, a pure (state, source) -> state with a state (params, rest), see
            `zerojax.measure.stability`.
    """

    def __init__(self, program: Program, orbits: symmetry.Orbits) -> None:
        self._program = program
        self._orbits = orbits
        self._axes = program.model.feature_axes()
        self._small = program.model.with_features(orbits.counts())
        self._tx = optax.chain(
            quotient.average_gradients(self._axes['params'], orbits),
            build_optimizer(program.config, scalars_of(program.config)),
        )
        self.model = quotient.Quotient(self._small, self._axes, orbits)
        train_step = train_step_function(self.model, self._tx)

        def step(state: TrainState, source: Source) -> Any:
            return train_step(state, program.make_batch(state, source))

        self.step: Step = of_train_step(step)

    def state(self, params: Tree, seed: int) -> State:
        """The state before the first step with these weights, like the reduced network's."""
        dtype = jnp.dtype(self._program.config.param_dtype)

        def new(seed: Any) -> State:
            shape = self._program.dataset.image_shape
            return split(
                create_state(
                    self._small, self._tx, shape, seed=seed, perturbation_seed=0, dtype=dtype
                )
            )

        _, rest = jit_without_products(new)(seed)
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), rest
