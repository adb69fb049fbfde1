"""What small noise on the initial weights will come to, told by small networks.

Noise on symmetric weights acts on a feature of a stream only through sums: of a kernel's weights
over all features that its other axes belong to. What is left of it, with sums of 0, is *passive*:
it moves no activation and no gradient, and only the optimizer's decay moves it. The sums, one
vector a feature, are *active*. While they are small, they obey one linear law for all features of
the stream, that of the network with two features a stream (`symmetry.quotient`); and after some
steps it hardly matters what they were but for one number, their product with the covector that
grows fastest backwards in time. So, for the very noise of a run:

    `sensitivities`     that covector for each stream, from the network of two features
    `coordinates`       that number for each feature
    `arranged`          an order of the features, and shares of them for a reduced network: alone
                        are the first, and those that will deviate most from it
    `two_features`      the first and the one furthest from it, to be pushed along the symmetric run
                        by `stability.growth`: the linear prediction
    `Follower`          the reduced network, trained as it is: through the kinks of ReLUs, where the
                        linear law fails; `furthest` and `spread` tell of the features that
                        are not alone
    `passive_deviations`, `persistence`   the rest, which is the larger part at first

All work on any model whose train step can be had for any number of features, as a pure function
(state, batch) -> state with a state (params, rest), see `zerojax.measure.stability`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.integrate import simpson
from scipy.special import ndtr

from zerojax import symmetry
from zerojax.measure.stability import State, Step, floats_of, merged, others_of
from zerojax.step.determinism import jit_in_mode
from zerojax.symmetry import alignment
from zerojax.symmetry.orbits import feature_counts

Tree = Any
Streams = dict[str, np.ndarray]
Curves = dict[str, np.ndarray]  # of each stream: natural logarithm of its asymmetry, [N + 1]

HORIZON = 50  # steps, over which the covectors are found
ALONE = 3  # shares of one feature: the first, and those with the lowest and highest coordinate


def sensitivities(
    step: Step, state: State, batches: Sequence[Any], feature_axes: Tree
) -> dict[str, Tree]:
    """For each stream the covector of initial weights that decides what a deviation comes to.

    After some steps all deviations of a stream's features are multiples of one vector; this says of
    which size, but for a factor. Found backwards in time, from any vector after the last batch
    (transposed of what `stability.growth` does); some tens of steps are enough.

    Args:
        step, state: of the network with two features a stream, symmetric.
        batches: what the first steps are called with.
        feature_axes: of the params.

    Returns:
        {stream: tree like the params, in NumPy arrays; with what belongs to the rest of the
        state, of norm 1, or 0 where no weight of the stream decides anything}.

    Raises:
        ValueError: they are not finite.
    """
    forward = jit_in_mode(step, 'deterministic')
    states = [state]
    for batch in batches[:-1]:
        states.append(forward(states[-1], batch))

    def pull(state: State, covectors: Tree, batch: Any) -> Tree:
        others = others_of(state)

        def advance(floats: Tree) -> Tree:
            return floats_of(step(merged(floats, others), batch))

        _, transposed = jax.vjp(advance, floats_of(state))
        (pulled,) = jax.vmap(transposed)(covectors)
        norms = jax.vmap(optax.tree.norm)(pulled)
        norms = jnp.where(norms == 0, jnp.ones_like(norms), norms)
        return jax.tree.map(lambda x: x / jnp.expand_dims(norms, range(1, x.ndim)), pulled)

    streams = symmetry.stream_names(feature_axes)
    floats = floats_of(state)
    random = np.random.default_rng(0)
    like = jax.tree.map(lambda x: random.normal(size=x.shape), floats[0])
    of_each = [_of_stream(like, feature_axes, stream) for stream in streams]
    start = jax.tree.map(lambda x: jnp.zeros((len(streams), *x.shape), x.dtype), floats)
    covectors = (
        jax.tree.map(lambda x, *each: jnp.asarray(each, x.dtype), start[0], *of_each),
        start[1],
    )
    pull = jit_in_mode(pull, 'deterministic')
    for state, batch in zip(reversed(states), reversed(batches), strict=True):
        covectors = pull(state, covectors, batch)
    found = jax.device_get(covectors[0])
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
        raise ValueError(
            f'steps 1 to {len(states)}: what they do, backwards in time, is not finite; are they '
            'themselves, and have they a derivative there?'
        )
    return {stream: jax.tree.map(lambda x, i=i: x[i], found) for i, stream in enumerate(streams)}


def _of_stream(tree: Tree, feature_axes: Tree, stream: str) -> Tree:
    """The part that a single feature of the stream has: equal along all other named axes."""
    parts = {}
    for path, x, names in symmetry.named_axes(tree, feature_axes):
        parts[path] = np.zeros_like(x)
        for axis, name in names.items():
            if name == stream:
                parts[path] += own_part(x, axis, names)
    return unflatten_dict(parts)


def _over_others(x: np.ndarray, axis: int, names: dict[int, str]) -> np.ndarray:
    """The mean over all named axes but one, float64, of length 1 along them."""
    return x.mean(tuple(each for each in names if each != axis), np.float64, keepdims=True)


def own_part(x: np.ndarray, axis: int, names: dict[int, str]) -> np.ndarray:
    """What acts on the features along one named axis: their sums, less what they have in common."""
    sums = _over_others(x, axis, names)
    return sums - sums.mean(axis, keepdims=True)


def passive_part(x: np.ndarray, names: dict[int, str]) -> np.ndarray:
    """What acts on no feature, [...] as x; exactly 0 where a single axis has a name."""
    if len(names) < 2:
        return np.zeros_like(x)
    common = x.mean(tuple(names), keepdims=True)
    return x - common - sum(own_part(x, axis, names) for axis in names)


def coordinates(noise: Tree, feature_axes: Tree, covectors: dict[str, Tree]) -> Streams:
    """For each stream what each feature's deviation will come to, but for a factor: float64 [n].

    Args:
        noise: on all weights, like the large network's params.
        covectors: of `sensitivities`.
    """
    found = {name: np.zeros(count) for name, count in feature_counts(noise, feature_axes).items()}
    flat = {name: flatten_dict(tree) for name, tree in covectors.items()}
    for path, x, names in symmetry.named_axes(jax.device_get(noise), feature_axes):
        for axis, name in names.items():
            others = tuple(each for each in names if each != axis)
            weights = flat[name][path].sum(others, keepdims=True)
            if weights.shape[axis] == 2:
                terms = _over_others(x, axis, names) * np.diff(weights, axis=axis) / 2
                found[name] += terms.sum(tuple(each for each in range(x.ndim) if each != axis))
    return found


def arranged(coordinates: Streams, m: int) -> tuple[alignment.Permutations, symmetry.Orbits]:
    """An order of each stream's features, and shares of them for a reduced network of m.

    The first feature stays first and is a share of its own, since deviations are measured from it.
    So are those with the lowest and the highest coordinate, further from it first. The others are
    divided evenly, neighbours in their coordinate together. Numbers of features in the shares
    depend on nothing but m and the stream's number of features.

    Raises:
        ValueError: m is not above `ALONE`.
    """
    if m <= ALONE:
        raise ValueError(f'm={m}: must be at least {ALONE + 1}')
    permutations, first = {}, {}
    for name, at in coordinates.items():
        rest = 1 + np.argsort(at[1:], kind='stable')
        ends = [rest[0], *rest[-1:]] if len(rest) > 1 else list(rest)
        ends.sort(key=lambda d: -abs(at[d] - at[0]))
        permutations[name] = np.array([0, *ends, *rest[1:-1]], np.int64)
        rest_in_shares = np.array_split(np.arange(1 + len(ends), len(at)), m - ALONE)
        alone = [np.array([i]) for i in range(1 + len(ends))]
        shares = [share for share in [*alone, *rest_in_shares] if len(share)]
        first[name] = np.concatenate([np.full(len(share), share[0]) for share in shares])
    return permutations, symmetry.Orbits(first, entries={})


def two_features(noise: Tree, feature_axes: Tree) -> Tree:
    """The deviation of each stream's second feature from its first, active part only.

    As tangents of the network with two features a stream: float64, [streams, ...] like its params.

    A tangent for each stream, in the order of `symmetry.stream_names`: in one array two streams
    would drown each other's digits once one has grown far beyond the other.
    """
    tangents = {}
    streams = symmetry.stream_names(feature_axes)
    for path, x, names in symmetry.named_axes(jax.device_get(noise), feature_axes):
        shape = [min(n, 2) if axis in names else n for axis, n in enumerate(x.shape)]
        of_each = {stream: np.zeros(shape) for stream in streams}
        for axis, name in names.items():
            if x.shape[axis] > 1:
                both = _over_others(x, axis, names).take([0, 1], axis)
                of_each[name] += both - both.mean(axis, keepdims=True)
        tangents[path] = np.stack(list(of_each.values()))
    return unflatten_dict(tangents)


def passive_deviations(noise: Tree, feature_axes: Tree) -> dict[str, dict[str, float]]:
    """{stream: {path of an array: largest deviation of its passive part from the first feature}}.

    Only arrays of two named axes or more have such a part.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in feature_counts(noise, feature_axes)}
    for path, x, names in symmetry.named_axes(jax.device_get(noise), feature_axes):
        if len(names) > 1:
            part = passive_part(x, names)
            for axis, name in names.items():
                size = float(np.max(np.abs(part - part.take([0], axis))))
                key = '/'.join(path)
                found[name][key] = max(found[name].get(key, 0.0), size)
    return found


def persistence(
    tx: optax.GradientTransformation, params: Tree, num_steps: int
) -> dict[str, np.ndarray]:
    """{path: what is left of a passive deviation of 1 after 0, 1, ... steps, float64 [N + 1]}.

    It has no gradient, so the optimizer alone acts on it.
    """

    def one(carry: Any, _: None) -> tuple[Any, Tree]:
        left, opt_state = carry
        updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, left), opt_state, left)
        left = optax.apply_updates(left, updates)
        return (left, opt_state), left

    ones = jax.tree.map(lambda x: jnp.ones((), x.dtype), params)
    run = jit_in_mode(
        lambda: jax.lax.scan(one, (ones, tx.init(ones)), None, num_steps)[1], 'deterministic'
    )
    return {
        path: np.concatenate([[1.0], np.asarray(left, np.float64)])
        for path, left in flatten_dict(jax.device_get(run()), sep='/').items()
    }


def expected_largest(n: int) -> float:
    """Mean of the largest |z_i - z_1| of n independent standard normal numbers.

    By E ∫ (1 - (Φ(z_1 + t) - Φ(z_1 - t))^(n - 1)) dt over t > 0, numerically, to 1e-6.
    """
    first = np.linspace(-8, 8, 801)
    sizes = np.linspace(0, 16, 1601)
    below = ndtr(first[:, None] + sizes) - ndtr(first[:, None] - sizes)
    means = simpson(1 - below ** (n - 1), x=sizes, axis=1)
    return float(np.trapezoid(means * np.exp(-(first**2) / 2), first) / math.sqrt(2 * math.pi))


def furthest(coordinates: Streams, shares: symmetry.Orbits) -> dict[str, float]:
    """How much further from the first the furthest feature is than shares of several are spread.

    In standard deviations of these shares: by the coordinates, which is exact while the linear law
    holds, but at most as expected of as many independent normal numbers (`expected_largest`).

    Args:
        coordinates: of the features, in the order of `arranged`.
        shares: the orbits whose features they are; streams with fewer than two shares of several
            features are left out.
    """
    found = {}
    for name, at in coordinates.items():
        _, of_share, sizes = np.unique(shares.first[name], return_inverse=True, return_counts=True)
        means = np.bincount(of_share, at) / sizes
        if (sizes > 1).sum() > 1:
            deviation = means[sizes > 1].std(ddof=1)
            own = float(np.abs(at - at[0]).max() / deviation) if deviation > 0 else math.inf
            found[name] = min(own, expected_largest(len(at)))
    return found


def spread(
    params: Tree, feature_axes: Tree, shares: symmetry.Orbits, factors: dict[str, Any]
) -> dict[str, jax.Array]:
    """The asymmetry [] of each stream whose features differ as its shares of several do.

    While the linear law holds, those that will be furthest from the first are alone, see
    `arranged`. At kinks features part by the signs of what reaches them, any of them may be
    furthest, and the furthest of many is further than that of the few shares.

    Args:
        params: of the reduced network.
        feature_axes: of it.
        shares: the orbits whose features they are.
        factors: of `furthest`; streams without one are left out.
    """
    scales = symmetry.largest_weights(params, feature_axes)
    found: dict[str, jax.Array] = {}
    for _, x, names in symmetry.named_axes(params, feature_axes):
        for axis, name in names.items():
            if name in factors:
                _, sizes = np.unique(shares.first[name], return_counts=True)
                several = jnp.take(x, np.flatnonzero(sizes > 1), axis)
                size = factors[name] * jnp.max(jnp.std(several, axis, ddof=1)) / scales[name]
                found[name] = jnp.maximum(found[name], size) if name in found else size
    return found


def largest(curves: Curves) -> np.ndarray:
    """Of all streams, [N + 1]; NaN where one of them is."""
    return np.max(list(curves.values()), axis=0)


def growth_per_step(curve: np.ndarray) -> float | None:
    """Mean slope over the second half of the steps; None where there is no asymmetry."""
    half = min(len(curve) // 2, len(curve) - 2)  # of a single step, that one
    if not np.isfinite(curve[[half, -1]]).all():
        return None
    return float((curve[-1] - curve[half]) / (len(curve) - 1 - half))


def while_finite(params: Tree, by_stream: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same numbers, or NaN if a weight is not finite: lost features may well be equal."""
    finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)])
    return {name: jnp.where(jnp.all(finite), x, jnp.nan) for name, x in by_stream.items()}


class Follower:
    """A reduced network's training, from one start or another.

    Args:
        step: the train step of the network whose features are the shares.
        feature_axes: of its params, the large network's.
        shares: the orbits of the large network's features.
    """

    def __init__(self, step: Step, feature_axes: Tree, shares: symmetry.Orbits) -> None:
        def measure(params: Tree, factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
            by_stream = symmetry.asymmetry_by_stream(params, feature_axes)
            by_stream |= {
                name: jnp.maximum(by_stream[name], size.astype(by_stream[name].dtype))
                for name, size in spread(params, feature_axes, shares, factors).items()
            }
            return while_finite(params, by_stream)

        self._step = jit_in_mode(step, 'deterministic')
        self._measure = jit_in_mode(measure, 'deterministic')

    def follow(
        self, state: State, batches: Iterable[Any], factors: dict[str, float]
    ) -> Iterator[dict[str, jax.Array]]:
        """Each stream's asymmetry [] before the first step and after each; NaN once a weight is not
        finite.

        The largest of all shares, or by `spread` of the features that they stand for; `factors` are
        those of `furthest`, or none.
        """
        yield self._measure(state[0], factors)
        for batch in batches:
            state = self._step(state, batch)
            yield self._measure(state[0], factors)
