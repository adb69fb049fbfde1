"""How fast a small asymmetry grows, and when it will be large: from one symmetric run.

While features are almost identical, their deviations obey the linearised train step, in which a
deviation neither knows its own size nor moves the symmetric run. So one symmetric run that pushes
a few tangents along tells the asymmetry that every small perturbation will have at every step.

A train step is any pure function (state, batch) -> state with a state (params, rest): `rest` is a
pytree of all else that decides the next step (optimizer state, statistics, counters, keys). Its
floats are linearised with the weights; anything else is followed along the symmetric run only.
`of_train_step` brings zerojax's own step into this form.

The theory fails where the step has no derivative. Features exactly at a ReLU's kink make any
perturbation, however small, a finite one (`zerojax.measure.kinks` counts them); for these,
`one_sided_log_asymmetry`. And a feature that a perturbation takes over a kink later changes the
gradient by a finite amount: from there on the asymmetry is larger than predicted, so a predicted
onset is late rather than early (`kinks.crossings` counts these inputs).

Rounding is another bound. Once features differ at all, it no longer treats them alike and adds
asymmetry of its own, some 1e-9 to 1e-8 in float32: smaller perturbations grow as if they had that
size, or are swallowed (`rounded_away`). In float64 the bound is far below.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zerojax import perturb, symmetry
from zerojax.step.determinism import jit_in_mode

__all__ = [
    'ONSET', 'Growth', 'LinearisedStep', 'gaussian_tangents', 'growth', 'of_train_step',
    'one_sided_log_asymmetry', 'predict_onset', 'rounded_away', 'split',
]  # fmt: skip

ONSET = 0.1  # asymmetry from which on features are as good as different; see docs/findings.md

Tree = Any
State = tuple[Tree, Tree]
Step = Callable[[State, Any], State]


@dataclasses.dataclass(frozen=True)
class Growth:
    """What becomes of k small perturbations along a symmetric run of N steps; natural logarithms.

    Attributes:
        log_by_stream: for each stream [N + 1, k]: its asymmetry (`symmetry.asymmetry_by_stream`)
            per unit of perturbation, before the first step and after each. -inf where it is 0.
        log_largest: for each stream [N + 1]: largest weight that it indexes, which its asymmetry is
            relative to.
        log_distance: [N + 1, k]: the same for the L2 distance of the weights from the symmetric
            subspace (`symmetry.distance`).
        log_stretch: [N, k]: logarithm of the diagonal of each step's R, for the exponents.

    All are float64 on the host.
    """

    log_by_stream: dict[str, np.ndarray]
    log_largest: dict[str, np.ndarray]
    log_distance: np.ndarray
    log_stretch: np.ndarray

    @property
    def log_asymmetry(self) -> np.ndarray:
        """The largest of any stream, [N + 1, k]."""
        return np.max(list(self.log_by_stream.values()), axis=0)

    def exponents(self) -> np.ndarray:
        """Transverse Lyapunov exponents over the first n = 1..N steps, per step, [N, k]; largest
        first once n is large."""
        steps = np.arange(1, len(self.log_stretch) + 1)
        return np.cumsum(self.log_stretch, axis=0) / steps[:, None]


def of_train_step(train_step: Callable[[Any, Any], tuple[Any, Any]]) -> Step:
    """A (TrainState, batch) -> (TrainState, metrics) as a step on (params, rest).

    `rest` is the TrainState with params None: start from `split(state)`.
    """

    def step(state: State, batch: Any) -> State:
        params, rest = state
        new_state, _ = train_step(dataclasses.replace(rest, params=params), batch)
        return split(new_state)

    return step


def split(train_state: Any) -> State:
    """A TrainState as (params, rest)."""
    return train_state.params, dataclasses.replace(train_state, params=None)


def gaussian_tangents(params: Tree, keys: jax.Array, layers: str = '.*') -> Tree:
    """N(0, 1) for every weight of the chosen parameters, a tangent for each key: params [k, ...].

    With the key that a run draws its perturbation from, epsilon times the tangent is the
    perturbation of that run: for one at step n, `fold_in(state.keys['perturbation'], n)`.

    Args:
        params: the weights; only shapes and dtypes count.
        keys: typed PRNG keys [k].
        layers: as in `perturb.Perturbation`.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.vmap(lambda key: perturb.gaussian(zeros, key, 1.0, layers))(keys)


def growth(
    step: Step,
    state: State,
    batches: Iterable[Any],
    tangents: Tree,
    feature_axes: Tree,
    orbits: symmetry.Orbits | None = None,
) -> Growth:
    """Pushes tangents through the linearised step along the symmetric run from `state`.

    The tangents are kept orthonormal by a QR decomposition at every step, so that all of them stay
    distinct beside the fastest one and the logarithms of R's diagonals give as many exponents
    (Benettin et al. 1980). The weights of the run are projected onto the symmetric subspace after
    each step, in case the kernels are not symmetric. A step takes the time of about three train
    steps for each tangent.

    Args:
        step: the train step, see this module's docstring; is jitted here.
        state: (params, rest) with symmetric params.
        batches: what the step is called with, one for each step.
        tangents: perturbations of the params at the start, each per unit of epsilon: [k, ...] like
            params, k at least 1. Only their transverse part counts.
        feature_axes, orbits: of the params, see `zerojax.symmetry`.

    Raises:
        ValueError: the params are not symmetric, a tangent has no transverse part, or the
            linearised step is not finite.
    """
    return LinearisedStep(step, feature_axes, orbits).growth(state, batches, tangents)


def predict_onset(
    log_asymmetry: np.ndarray, epsilon: float = 1.0, threshold: float = ONSET
) -> int | None:
    """The first step at which a perturbation's asymmetry reaches the threshold; None if never.

    Args:
        log_asymmetry: [N + 1]: a column of `Growth.log_asymmetry`.
        epsilon: size of the perturbation in units of its tangent; for a Gaussian its scale. 1
            for the asymmetry of a perturbation itself.
        threshold: asymmetry that counts as onset. On digits the loss differs from that of the
            symmetric run by 1% at asymmetries of 0.03 to 0.12, by 5% at 0.08 to 0.25.
    """
    reached = np.flatnonzero(log_asymmetry + math.log(epsilon) >= math.log(threshold))
    return int(reached[0]) if len(reached) else None


def rounded_away(params: Tree, tangent: Tree, epsilon: float) -> jax.Array:
    """Share of the weights that `params + epsilon · tangent` leaves as they are, float32 [].

    There, epsilon · tangent is below half an ULP of the weight. Weights that start at 0 keep any
    perturbation until they move, so ask a few steps into the symmetric run: where nearly all is
    rounded away, linear theory says nothing of a run in this arithmetic.
    """
    lost = jax.tree.map(
        lambda w, t: (t != 0) & (w + jnp.asarray(epsilon, w.dtype) * t == w), params, tangent
    )
    moved = sum(jnp.sum(t != 0) for t in jax.tree.leaves(tangent))
    return sum(jnp.sum(x) for x in jax.tree.leaves(lost)) / jnp.maximum(moved, 1)


def one_sided_log_asymmetry(
    step: Step,
    state: State,
    batches: Iterable[Any],
    tangents: Tree,
    feature_axes: Tree,
    orbits: symmetry.Orbits | None = None,
    *,
    exact_steps: int,
    epsilon: float = 1e-30,
) -> np.ndarray:
    """Logarithm of the asymmetry [N + 1, k] where the run starts at kinks.

    The first steps are taken exactly, with and without the perturbation; their difference is pushed
    through the linearised step from there on. A perturbation that the kinks make finite is so after
    these steps whatever its size: then one tiny epsilon stands for all smaller ones, of which only
    the signs count. Features that start at a kink stay near it for some steps and cross it again,
    which the linearised step misses: the prediction then falls short, less so with more exact
    steps.

    Args:
        step, state, batches, feature_axes, orbits: as in `growth`.
        tangents: as in `growth`, but not just their transverse part: it is the signs of the whole
            perturbation that count.
        exact_steps: at least as many as the symmetric run has features at kinks that the tangents
            move, see `kinks.crossings`.
        epsilon: size of the perturbation in units of its tangent.
    """
    params, _ = state
    jitted = jit_in_mode(step, 'deterministic')
    asymmetry = jit_in_mode(
        lambda params: _largest(symmetry.asymmetry(params, feature_axes, orbits)), 'deterministic'
    )
    perturbed = []
    for tangent in _unstacked(tangents):
        moved = jax.tree.map(lambda w, t: w + jnp.asarray(epsilon, w.dtype) * t, params, tangent)
        perturbed.append((moved, state[1]))
    logs = [[float(jnp.log(asymmetry(each[0]))) for each in perturbed]]
    batches = iter(batches)
    for _, batch in zip(range(exact_steps), batches, strict=False):
        state = jitted(state, batch)
        perturbed = [jitted(each, batch) for each in perturbed]
        logs.append([float(jnp.log(asymmetry(each[0]))) for each in perturbed])
    base = floats_of(state)
    deviations = [jax.tree.map(jnp.subtract, floats_of(each), base) for each in perturbed]
    tangents = jax.tree.map(lambda *x: jnp.stack(x), *deviations)
    linearised = LinearisedStep(step, feature_axes, orbits)
    rest = linearised.push_along(state, batches, tangents).log_asymmetry
    return np.concatenate([np.array(logs, np.float64)[:-1], rest])


class LinearisedStep:
    """The train step and its derivative, jitted once for all that is pushed through them.

    Args:
        step, feature_axes, orbits: as in `growth`.
    """

    def __init__(
        self, step: Step, feature_axes: Tree, orbits: symmetry.Orbits | None = None
    ) -> None:
        self._step, self._axes, self._orbits = step, feature_axes, orbits
        self._start, self._push, self._measure = (
            jit_in_mode(each, 'deterministic')
            for each in (self._start_of, self._push_once, self._measured)
        )

    def lower(self, state: State, batch: Any, tangents: Tree) -> list[jax.stages.Lowered]:
        """What `growth` calls with such arguments; once it is compiled, `growth` need not."""
        tangents = self._with_rest(state, tangents)
        basis, coefficients, _ = jax.eval_shape(self._start, tangents)
        return [
            self._start.lower(tangents),
            self._push.lower(state, basis, coefficients, batch),
            self._measure.lower(state, basis, coefficients),
        ]

    def growth(self, state: State, batches: Iterable[Any], tangents: Tree) -> Growth:
        """See the function `growth`."""
        check = functools.partial(
            symmetry.is_symmetric, feature_axes=self._axes, orbits=self._orbits
        )
        # Eagerly, each shape would be compiled.
        if not jit_in_mode(check, 'deterministic')(state[0]):
            raise ValueError('state: its params are not symmetric')
        return self.push_along(state, batches, self._with_rest(state, tangents))

    def _with_rest(self, state: State, tangents: Tree) -> Tree:
        """Tangents of the params as such of the whole state, the rest of which stays."""
        count = len(jax.tree.leaves(tangents)[0])
        rest = floats_of(state[1])
        return tangents, jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), rest)

    def push_along(self, state: State, batches: Iterable[Any], tangents: Tree) -> Growth:
        """`growth` of tangents that are floats [k, ...] like those of the whole state."""
        basis, coefficients, first = self._start(tangents)
        records = [first | self._measure(state, basis, coefficients)]
        for batch in batches:
            state, basis, coefficients, sizes = self._push(state, basis, coefficients, batch)
            records.append(sizes | self._measure(state, basis, coefficients))
        return _growth_of(records)

    def _measured(self, state: State, basis: Tree, coefficients: jax.Array) -> dict[str, Tree]:
        """Of the tangents, which are the basis times the columns of the coefficients [k, k]."""
        tangents = jax.tree.map(
            lambda x: jnp.tensordot(coefficients.astype(x.dtype), x, (0, 0), precision='highest'),
            basis,
        )

        def of_one(tangent: Tree) -> dict[str, Tree]:
            by_stream = symmetry.asymmetry_by_stream(
                tangent[0], self._axes, self._orbits, relative_to=state[0]
            )
            distances = symmetry.distance(tangent[0], self._axes, self._orbits)
            return {
                'log_by_stream': jax.tree.map(jnp.log, by_stream),
                'log_distance': jnp.log(jnp.sqrt(sum(x**2 for x in distances.values()))),
            }

        largest = symmetry.largest_weights(state[0], self._axes)
        return jax.vmap(of_one)(tangents) | {'log_largest': jax.tree.map(jnp.log, largest)}

    def _transverse(self, tangents: Tree) -> Tree:
        params, rest = tangents
        parts = jax.vmap(lambda x: symmetry.transverse(x, self._axes, self._orbits))(params)
        # Equal features of which none is finite have a transverse part of 0, but are no tangent.
        return jax.tree.map(
            lambda part, x: jnp.where(jnp.all(jnp.isfinite(x)), part, jnp.full_like(part, jnp.nan)),
            parts,
            params,
        ), rest

    def _start_of(self, tangents: Tree) -> Any:
        basis, r = _orthonormalised(self._transverse(tangents))
        sizes = jnp.linalg.norm(r, axis=0)
        coefficients = r / sizes[None, :]
        return basis, coefficients, {'size': sizes}

    def _push_once(self, state: State, basis: Tree, coefficients: jax.Array, batch: Any) -> Any:
        floats, others = floats_of(state), others_of(state)

        def advance(floats: Tree) -> tuple[Tree, Tree]:
            new_state = self._step(merged(floats, others), batch)
            return floats_of(new_state), others_of(new_state)

        floats, linearised, others = jax.linearize(advance, floats, has_aux=True)
        # Transverse tangents stay so but for rounding, which may grow faster than they do.
        basis, r = _orthonormalised(self._transverse(jax.vmap(linearised)(basis)))
        params, rest = merged(floats, others)
        state = symmetry.project(params, self._axes, self._orbits), rest
        coefficients = jnp.matmul(r, coefficients, precision='highest')
        sizes = jnp.linalg.norm(coefficients, axis=0)
        coefficients = coefficients / sizes[None, :]
        return state, basis, coefficients, {'size': sizes, 'stretch': jnp.diagonal(r)}


def _growth_of(records: list[dict[str, Any]]) -> Growth:
    """Of what was measured before the first step and after each."""

    def stacked(values: Iterable[Any]) -> np.ndarray:
        return np.array(list(values), np.float64)

    count = len(records[0]['size'])
    sizes = stacked(record['size'] for record in records)
    bad = np.flatnonzero(~np.all(np.isfinite(sizes) & (sizes > 0), axis=1))
    if len(bad) and bad[0] == 0:
        raise ValueError('tangents: must be finite and have a transverse part')
    if len(bad):
        raise ValueError(
            f'step {bad[0]}: the linearised step is not finite, or leaves nothing of a tangent; '
            'has it a derivative there? (Adam has none where a gradient is 0, unless eps_root > 0)'
        )
    log_sizes = np.cumsum(np.log(sizes), axis=0)
    by_stream = [record['log_by_stream'] for record in records]
    return Growth(
        log_by_stream={
            name: stacked(each[name] for each in by_stream) + log_sizes for name in by_stream[0]
        },
        log_largest={
            name: stacked(record['log_largest'][name] for record in records)
            for name in by_stream[0]
        },
        log_distance=stacked(record['log_distance'] for record in records) + log_sizes,
        log_stretch=np.log(stacked(record['stretch'] for record in records[1:])).reshape(-1, count),
    )


def _orthonormalised(tangents: Tree) -> tuple[Tree, jax.Array]:
    """An orthonormal basis [k, ...] of the tangents' span and R [k, k] with R's diagonal positive:
    tangent j is the sum over i of basis i times R_ij."""
    leaves, treedef = jax.tree.flatten(tangents)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32
    flat = jnp.concatenate([x.reshape(len(x), -1).astype(dtype) for x in leaves], axis=1)
    q, r = jnp.linalg.qr(flat.T)
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)
    q, r = q * signs[None, :], r * signs[:, None]
    parts = jnp.split(q.T, np.cumsum([x[0].size for x in leaves])[:-1], axis=1)
    basis = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, basis), r


def _largest(by_layer: dict[str, jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(list(by_layer.values())))


def _unstacked(tangents: Tree) -> list[Tree]:
    count = len(jax.tree.leaves(tangents)[0])
    return [jax.tree.map(lambda x, i=i: x[i], tangents) for i in range(count)]


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def floats_of(tree: Tree) -> Tree:
    """The tree with None for all that is not a float, and so has no derivative."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def others_of(tree: Tree) -> Tree:
    """The tree with None for all floats."""
    return jax.tree.map(lambda x: None if _is_float(x) else x, tree)


def merged(floats: Tree, others: Tree) -> Tree:
    """The tree that `floats` and `others` are the parts of."""
    return jax.tree.map(
        lambda x, other: other if x is None else x, floats, others, is_leaf=lambda x: x is None
    )
