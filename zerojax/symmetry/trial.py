"""A function at random weights, in float64: how far it is from being symmetric.

What `check` decides by. Runs on the host but for the function itself.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any
Axis = tuple[int, int]  # number of an array among the leaves, and of an axis of it
Moves = dict[Axis, np.ndarray]  # new feature i is the old one of this number
Arrays = list[np.ndarray]

# A thousand times what sums of ten thousand numbers are off by; a wrong axis is off by about 1.
TOLERANCE = 1e-10  # of the array's largest number
FLOOR = 1e-12  # and of the tree's: gradients that cancel, as of a key's bias, are nothing else
# Adam divides by |g| + eps, the largest g being 1: so it makes an error 1/eps times larger at most.
EPS = 1e-2
OPTIMIZERS = {'SGD': optax.sgd(1e-2, momentum=0.9), 'Adam': optax.adam(1e-2, eps=EPS)}
STEPS = 2
# Compiled for a moment's use; and without fusions that give wrong sums, see zerojax.step.
OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': '', 'xla_backend_optimization_level': 0}


class Trial:
    """The function at random weights and inputs, jitted; within the contexts of float64."""

    def __init__(
        self, apply: Callable[..., Tree], treedef: Any, leaves: Arrays, arguments: tuple[Tree, ...]
    ) -> None:
        rng = np.random.default_rng(0)
        arguments = jax.tree.map(lambda x: _moved_input(x, rng), arguments)
        drawn = [_random_weights(x, rng) for x in leaves]
        # Some functions are of positive weights, such as variances.
        positive = [_random_weights(x, rng, positive=True) for x in leaves]
        coefficients = np.random.default_rng(1)

        def outputs_of(weights: list[jax.Array]) -> list[jax.Array]:
            outputs = jax.tree.leaves(apply(jax.tree.unflatten(treedef, weights), *arguments))
            return [jnp.asarray(x) for x in outputs]

        _check_precision(outputs_of, drawn)
        floats = [x for x in jax.eval_shape(outputs_of, drawn) if is_float(x.dtype)]
        if not floats:
            raise ValueError('apply: returns no floats, and has no gradient')
        linear = [coefficients.normal(size=x.shape) for x in floats]
        bent = [coefficients.normal(size=x.shape) for x in floats]

        def functional(weights: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            outputs = outputs_of(weights)
            value = jnp.zeros(())
            for x, a, b in zip(filter(has_floats, outputs), linear, bent, strict=True):
                size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=1e-300))
                value += jnp.sum(a * (x / size)) + jnp.sum(b * jnp.tanh(x / size))
            return value, outputs

        def gradient(weights: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            inner = [x if has_floats(x) else None for x in weights]

            def of_floats(floats: list[Any]) -> tuple[jax.Array, list[jax.Array]]:
                merged = [w if x is None else x for x, w in zip(floats, weights, strict=True)]
                return functional(merged)

            grads, outputs = jax.grad(of_floats, has_aux=True)(inner)
            return [jnp.zeros(w.shape) if g is None else g
                    for g, w in zip(grads, weights, strict=True)], outputs  # fmt: skip

        self._gradient = jax.jit(gradient, compiler_options=OPTIONS)
        self._steps = {name: _step_of(tx) for name, tx in OPTIMIZERS.items()}
        for weights in (drawn, positive):
            self.weights, self._unit = weights, 1.0
            self.gradients, outputs = self._at(weights)
            if _all_finite([*self.gradients, *outputs]):
                break
        else:
            raise ValueError('apply: not finite at random weights, so nothing can be compared')
        # Gradients in units of the largest, which the optimizers' constants are made for.
        self._unit = max([float(np.max(np.abs(x), initial=0.0)) for x in self.gradients]) or 1.0
        self.gradients = [x / self._unit for x in self.gradients]
        self._outputs = outputs
        self._updates: dict[str, Arrays] = {}

    def _at(self, weights: Arrays) -> tuple[Arrays, Arrays]:
        grads, outputs = jax.device_get(self._gradient(weights))
        return [np.asarray(x) / self._unit for x in grads], [np.asarray(x) for x in outputs]

    def _updated(self, optimizer: str, weights: Arrays, grads: Arrays) -> Arrays:
        """What some steps add to the weights."""
        tx, moved = OPTIMIZERS[optimizer], weights
        floats = [is_float(x.dtype) for x in weights]
        state = tx.init([x for x, of_floats in zip(weights, floats, strict=True) if of_floats])
        for step in range(STEPS):
            if step:
                grads, _ = self._at(moved)
            kept = [g for g, of_floats in zip(grads, floats, strict=True) if of_floats]
            updates, state = self._steps[optimizer](kept, state)
            found = iter(jax.device_get(updates))
            moved = [x + next(found) if ok else x for x, ok in zip(moved, floats, strict=True)]
        return [b - a if ok else 0.0 * a for a, b, ok in zip(weights, moved, floats, strict=True)]

    def differences(self, moves: Moves, optimizers: Iterable[str] = ()) -> dict[str, Any]:
        """How far all is from what it must be once features are moved: for each array the largest
        difference, in units of what rounding may come to."""
        moved = _permuted(self.weights, moves)
        grads, outputs = self._at(moved)
        found = {
            'outputs': _apart(outputs, self._outputs),
            'gradients': _apart(grads, _permuted(self.gradients, moves)),
        }
        for name in optimizers:
            if name not in self._updates:
                self._updates[name] = self._updated(name, self.weights, self.gradients)
            updates = self._updated(name, moved, grads)
            found[name] = _apart(updates, _permuted(self._updates[name], moves))
        return found

    def holds(self, moves: Moves) -> bool:
        return all(max(sizes) <= 1 for sizes in self.differences(moves).values())

    def unequal(self, chosen: list[Axis]) -> tuple[float, Axis] | None:
        """Where the features along these axes are equal: how far their gradients are from being so,
        in units of what rounding may come to, and along which axis; None if they are not finite."""
        weights = list(self.weights)
        for i, axis in chosen:
            first = np.take(weights[i], [0], axis)
            weights[i] = np.broadcast_to(first, weights[i].shape)
        grads, _ = self._at(weights)
        if not _all_finite(grads):
            return None
        firsts = [(i, axis, np.take(grads[i], [0], axis)) for i, axis in chosen]
        largest = max(float(np.max(np.abs(x), initial=0.0)) for x in grads)
        return max(
            (
                _in_units(grads[i], np.broadcast_to(first, grads[i].shape), largest),
                (i, axis),
            )
            for i, axis, first in firsts
        )


def _step_of(tx: optax.GradientTransformation) -> Callable[[Any, Any], Any]:
    return jax.jit(lambda grads, state: tx.update(grads, state), compiler_options=OPTIONS)


def _apart(found: Arrays, expected: Arrays) -> list[float]:
    largest = max([float(np.max(np.abs(x), initial=0.0)) for x in expected], default=0.0)
    return [_in_units(a, b, largest) for a, b in zip(found, expected, strict=True)] or [0.0]


def _in_units(a: np.ndarray, b: np.ndarray, largest: float) -> float:
    """Largest difference, in units of what rounding may come to; infinite if one is no number."""
    if not is_float(a.dtype):
        return 0.0 if np.array_equal(a, b) else np.inf
    unit = TOLERANCE * float(np.max(np.abs(b), initial=0.0)) + FLOOR * largest
    difference = float(np.max(np.abs(a - b), initial=0.0))
    if not np.isfinite(difference):
        return np.inf
    return difference / unit if difference else 0.0


def _permuted(arrays: Arrays, moves: Moves) -> Arrays:
    moved = list(arrays)
    for (i, axis), permutation in moves.items():
        moved[i] = np.take(moved[i], permutation, axis)
    return moved


def _random_weights(
    x: np.ndarray, rng: np.random.Generator, *, positive: bool = False
) -> np.ndarray:
    """N(0, 1 / fan), in float64, so that activations stay of order 1; what is no float stays."""
    if not is_float(x.dtype):
        return x
    fan = x.size / max(x.shape, default=1) if x.size else 1
    drawn = rng.uniform(0.5, 1.5, x.shape) if positive else rng.normal(size=x.shape)
    return np.asarray(drawn / np.sqrt(fan))


def _moved_input(x: Any, rng: np.random.Generator) -> Any:
    if not has_floats(x):
        return x
    x = np.asarray(x, np.float64)
    return x + rng.normal(size=x.shape) * (np.std(x) or 1.0)


def is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def has_floats(x: Any) -> bool:
    return is_float(jnp.result_type(x))


def _all_finite(arrays: Arrays) -> bool:
    return all(np.isfinite(x).all() for x in arrays if is_float(x.dtype))


def first_line(error: Exception) -> str:
    """Of what an exception says, or its kind if it says nothing (`zerojax.host` has its own)."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_precision(function: Callable[[Any], Any], weights: Arrays) -> None:
    """Raises ValueError if the function fails in float64, or rounds what it computes to less."""
    try:
        closed = jax.make_jaxpr(function)(weights)
    except Exception as error:
        raise ValueError(
            f'apply: fails in float64, in which it is checked ({first_line(error)}); take its '
            'dtypes from its params'
        ) from error
    for eqn in equations_of(closed.jaxpr):
        if eqn.primitive.name == 'convert_element_type':
            narrow, wide = eqn.params['new_dtype'], eqn.invars[0].aval.dtype
            if wide == np.float64 and is_float(narrow) and jnp.finfo(narrow).bits < 64:
                raise ValueError(
                    f'apply: rounds to {jnp.dtype(narrow).name}, and is checked in float64; take '
                    'its dtypes from its params'
                )


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """Equations that depend on the jaxpr's arguments, also those of functions it calls."""
    reached = set(map(id, jaxpr.invars))
    for eqn in jaxpr.eqns:
        if reached.isdisjoint(map(id, eqn.invars)):
            continue
        reached |= set(map(id, eqn.outvars))
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
        ):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from equations_of(inner)
